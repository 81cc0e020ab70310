"""Which exchanges the layers of a client allow, and cycles of exchanges that are allowed together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, IntArray
from fedmoe_sched._layers import layers_of
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["Arc", "LayerRoom"]


class Arc(NamedTuple):
    """A client that gives up the expert `tail` and takes `head`; -1 moves a load within its bounds."""

    tail: int
    head: int
    client: int


class LayerRoom:
    """What every client has of every layer, beside its bounds; node m, for unused slots, has none.

    Parameters
    ----------
    problem : AssignmentProblem
        With layers.
    held : ndarray, shape (n, m), bool
        What clients have at first.
    """

    def __init__(self, problem: AssignmentProblem, held: BoolArray) -> None:
        layers = layers_of(problem)
        n = problem.n_clients
        self._layer_of = layers.layer_of
        low, high = layers.bounds_of(slice(0, n), n)
        # A last column of its own for unused slots, which are always to be had.
        self._low = np.hstack([low, np.full((n, 1), -1)])
        self._high = np.hstack([high, np.ones((n, 1), dtype=np.int64)])
        self._counts = np.hstack([layers.count(held), np.zeros((n, 1), dtype=np.int64)])

    def _layer(self, node: int) -> int:
        return int(self._layer_of[node]) if node < len(self._layer_of) else self._counts.shape[1] - 1

    def may_give(self, clients: IntArray, node: int) -> BoolArray:
        """Whether clients can give something up at `node` and take nothing of its layer instead."""
        layer = self._layer(node)
        spare: BoolArray = self._counts[clients, layer] > self._low[clients, layer]
        return spare

    def may_take(self, clients: IntArray, tail: int) -> BoolArray:
        """Whether clients that give up `tail` may take each expert, as far as layers go; (clients, m) bool."""
        layer = self._layer(tail)
        room = self._counts[clients] < self._high[clients]
        room &= self.may_give(clients, tail)[:, None]
        room[:, layer] = True
        allowed: BoolArray = room[:, self._layer_of]
        return allowed

    def partners(self, client: int, expert: int, *, taken: bool) -> BoolArray:
        """Whether one client may exchange `expert` with each node, last that of unused slots; shape (m + 1,).

        Parameters
        ----------
        client, expert : int
        taken : bool
            Whether it takes the expert for the node, or gives it up.
        """
        nodes = np.append(self._layer_of, self._counts.shape[1] - 1)
        counts, low, high = self._counts[client], self._low[client], self._high[client]
        layer = self._layer_of[expert]
        if taken:
            allowed = (counts > low)[nodes] & (counts < high)[layer]
        else:
            allowed = (counts < high)[nodes] & (counts > low)[layer]
        return np.asarray(allowed | (nodes == layer))

    def changes(self, clients: slice) -> tuple[BoolArray, BoolArray]:
        """Whether clients may take one more, or give one up, in the layer of each expert; (clients, m) each."""
        counts = self._counts[clients]
        more, less = counts < self._high[clients], counts > self._low[clients]
        return more[:, self._layer_of], less[:, self._layer_of]

    def at_bound(self, client: int, layer: int, bound: str) -> bool:
        """Whether a client has as few experts of a layer as it must (``"layer_min"``), or as many as it may."""
        count = self._counts[client, layer]
        least = bound == "layer_min"
        return bool(0 < count == self._low[client, layer] if least else count == self._high[client, layer])

    def binding(self, client: int, expert: int, who: str) -> list[str]:
        """Name the bounds of the expert's layer that the client is at, in words."""
        layer = int(self._layer_of[expert])
        count = int(self._counts[client, layer])
        what = f"{who} trains {count} {'expert' if count == 1 else 'experts'} of layer {layer}"
        reasons = [f"{what}, as many as it may"] if count == self._high[client, layer] else []
        return reasons + ([f"{what}, the fewest it must"] if count == self._low[client, layer] > 0 else [])

    def copy(self) -> LayerRoom:
        """Return a copy whose counts and bounds may change by themselves."""
        room = copy.copy(self)
        room._counts, room._high = self._counts.copy(), self._high.copy()
        return room

    def is_full(self, client: int, expert: int) -> bool:
        """Whether a client trains as many experts of the expert's layer as it may."""
        layer = self._layer_of[expert]
        return bool(self._counts[client, layer] == self._high[client, layer])

    def widen(self, client: int, expert: int) -> None:
        """Let a client train one more expert of the expert's layer."""
        self._high[client, self._layer_of[expert]] += 1

    def shift(self, client: int, expert: int, step: int) -> None:
        """Count an expert that a client takes (1) or gives up (-1)."""
        self._counts[client, self._layer_of[expert]] += step

    def split(self, cycle: list[Arc], cost: Callable[[Arc], float]) -> list[Arc]:
        """Cut an improving cycle down to an improving one whose exchanges are allowed together.

        Where two exchanges of a client use the same of its bounds, each may end where the other one does: the
        cycle falls into two that cost as much together, so that one of them improves.
        """
        while (clash := self._clash(cycle)) is not None:
            first, last = clash
            one, two = cycle[first], cycle[last]
            parts = (
                [*cycle[:first], Arc(one.tail, two.head, one.client), *cycle[last + 1 :]],
                [Arc(two.tail, one.head, one.client), *cycle[first + 1 : last]],
            )
            closed = [[arc for arc in part if arc.tail != arc.head] for part in parts]
            cycle = min(closed, key=lambda part: sum(map(cost, part)))
        return cycle

    def _clash(self, cycle: list[Arc]) -> tuple[int, int] | None:
        """Return the places of two exchanges of one client that share a bound and break one together."""
        by_client: dict[int, list[int]] = {}
        for place, arc in enumerate(cycle):
            if arc.client >= 0:
                by_client.setdefault(arc.client, []).append(place)
        for client, places in by_client.items():
            if len(places) > 1 and not self._allowed(client, [cycle[place] for place in places]):
                for first, last in combinations(places, 2):
                    if self._bounds_used(cycle[first]) & self._bounds_used(cycle[last]):
                        return first, last
        return None

    def _allowed(self, client: int, arcs: Iterable[Arc]) -> bool:
        counts = self._counts[client, :-1].copy()
        for tail, head, _ in arcs:
            for node, step in ((tail, -1), (head, 1)):
                if node < len(self._layer_of):
                    counts[self._layer_of[node]] += step
        return bool((counts >= self._low[client, :-1]).all() and (counts <= self._high[client, :-1]).all())

    def _bounds_used(self, arc: Arc) -> set[int]:
        """Return the layers whose counts an exchange passes through, and -1 for the count of all."""
        tail, head = self._layer(arc.tail), self._layer(arc.head)
        return {tail} if tail == head else {tail, head, -1}
