"""Deal places out where clients' bounds are nested: so many of each layer, and so many of all.

A place may move from an expert to another one of its layer; to another layer only where the first layer can spare
a place and the second one has room, and likewise to and from the slots that stay unused. A shortest path never
uses the bounds of a group twice: if it did, one arc would lead from where it first comes to the group to where it
last leaves it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._dealing import Groups, Table, distinct_rows, first_open, pack_open
from fedmoe_sched._layers import layer_bounds, layers_of
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["LayeredGroups", "even_layer_loads", "group_layered_clients", "mean_layer_loads"]


@dataclass(frozen=True, eq=False)
class LayeredGroups(Groups):
    """Interchangeable clients whose bounds are nested.

    Parameters
    ----------
    layer_of : ndarray, shape (m,), int64
    low, high : ndarray, shape (g, G), int64
        Fewest and most experts of each layer, of each client of a group.
    """

    layer_of: IntArray
    low: IntArray
    high: IntArray

    def table(self) -> Table:
        """Return the flow to start from."""
        return _LayeredTable(self)


def group_layered_clients(problem: AssignmentProblem) -> LayeredGroups:
    """Find the clients that differ in neither bounds nor eligible experts; none of them may be overstretched."""
    layers = layers_of(problem)
    low = np.empty((problem.n_clients, layers.n_layers), dtype=np.int64)
    high, total = np.empty_like(low), np.empty((problem.n_clients, 2), dtype=np.int64)
    for block in problem.blocks():
        low[block], high[block], total[block, 0], total[block, 1] = layer_bounds(problem, block)
    words = [np.hstack([low, high, total]).astype(np.uint64)]
    if problem.eligible is not None:
        words.append(pack_open(problem))
    first, member, size = distinct_rows(np.hstack(words))
    open_ = np.ones((len(first), problem.n_experts), dtype=np.bool_)
    if problem.eligible is not None:
        open_ = problem.eligible[first]
    least, most = total[first].T
    return LayeredGroups(member, size, least, most, open_, layers.layer_of, low[first], high[first])


class _LayeredTable(Table):
    """As `Table`, with the number of places that each group has in each layer; a last row for unused slots."""

    def __init__(self, groups: LayeredGroups) -> None:
        n_layers = groups.low.shape[1]
        self._node_layer = np.append(groups.layer_of, n_layers)
        # The unused slots are a layer of their own, which never lacks room and always has something to spare.
        self._low = np.vstack([(groups.low * groups.size[:, None]).T, np.full(len(groups.size), -1)])
        self._high = np.vstack([(groups.high * groups.size[:, None]).T, np.ones(len(groups.size), dtype=np.int64)])
        self._start = _first_counts(groups)
        self._count = np.vstack([(self._start * groups.size[:, None]).T, np.zeros_like(groups.size)])
        self._same = self._node_layer[:, None] == self._node_layer
        super().__init__(groups)

    def _first_places(self, groups: Groups, open_: BoolArray, starts: IntArray, block: slice) -> BoolArray:
        places = np.zeros(open_.shape, dtype=np.bool_)
        for layer in range(self._start.shape[1]):
            experts = np.flatnonzero(self._node_layer[:-1] == layer)
            places[experts] = first_open(open_[experts], starts % len(experts), self._start[block, layer])
        return places

    def _links_of(self, columns: slice | IntArray) -> IntArray:
        held, limit = self._held[:, columns], self._limit[:, columns]
        count = self._count[:, columns]
        spare, room = count > self._low[:, columns], count < self._high[:, columns]
        have, may = held > 0, held < limit
        within = have.astype(np.float32) @ may.T.astype(np.float32)
        give, take = have & spare[self._node_layer], may & room[self._node_layer]
        across = give.astype(np.float32) @ take.T.astype(np.float32)
        return np.where(self._same, within, across).astype(np.int64)

    def _movable(self, a: int, b: int) -> npt.NDArray[Any]:
        places = super()._movable(a, b)
        tail, head = self._node_layer[a], self._node_layer[b]
        unused = len(self._count) - 1  # any number of slots may stay unused within the other bounds
        if tail not in {head, unused}:
            places = np.minimum(places, self._count[tail] - self._low[tail])
        if head not in {tail, unused}:
            places = np.minimum(places, self._high[head] - self._count[head])
        return places.astype(self._held.dtype)

    def _change(self, a: int, b: int, columns: IntArray, moved: npt.NDArray[Any]) -> None:
        super()._change(a, b, columns, moved)
        tail, head = self._node_layer[a], self._node_layer[b]
        for layer, step in ((tail, -1), (head, +1)):
            if tail != head and layer < len(self._count) - 1:
                self._count[layer, columns] += step * moved.astype(np.int64)


def _first_counts(groups: LayeredGroups) -> IntArray:
    """Share the most places that each client can take among its layers, evenly over their room; shape (g, G)."""
    room = groups.high - groups.low
    rest = groups.most - groups.low.sum(axis=1)
    share = room * rest[:, None] // np.maximum(room.sum(axis=1), 1)[:, None]
    rest -= share.sum(axis=1)
    left = room - share
    before = np.cumsum(left, axis=1) - left
    counts: IntArray = groups.low + share + np.clip(rest[:, None] - before, 0, left)
    return counts


def even_layer_loads(problem: AssignmentProblem) -> FloatArray:
    """Spread what clients must take, and what more they could, evenly over the eligible experts of each layer.

    What is not forced by the bounds of a layer is shared in proportion to the room that layers have.

    Returns
    -------
    loads : ndarray, shape (2, m), float64
    """
    layers = layers_of(problem)
    loads = np.zeros((2, problem.n_experts))
    for block in problem.blocks():
        low, high, least, most = layer_bounds(problem, block)
        open_ = np.ones((len(low), problem.n_experts)) if problem.eligible is None else problem.eligible[block]
        room, fewest = np.maximum(high - low, 0), low.sum(axis=1)  # bounds of an overstretched client may cross
        share = room / np.maximum(room.sum(axis=1), 1)[:, None]
        base = low + share * (least - fewest)[:, None]
        for number, places in enumerate((base, share * np.maximum(most - least, 0)[:, None])):
            for layer, experts in enumerate(layers.members):
                part = open_[:, experts].astype(np.float64)
                loads[number, experts] += (places[:, layer] / np.maximum(part.sum(axis=1), 1)) @ part
    return loads


def mean_layer_loads(problem: AssignmentProblem) -> FloatArray:
    """Return the mean load of each layer, if clients take as many experts as they can; shape (G,), float64."""
    layers = layers_of(problem)
    places = np.bincount(layers.layer_of, weights=even_layer_loads(problem).sum(axis=0))
    mean: FloatArray = places / np.bincount(layers.layer_of)
    return mean
