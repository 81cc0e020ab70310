"""The least weighted relaxation of a network problem: a minimum cost circulation that pays for what gives way.

Hub -> clients -> layers of each client -> experts -> hub. Every count has three arcs side by side: up to its lower
bound each unit earns the weight of that bound, up to its upper bound it costs nothing, and beyond it costs the
weight of the upper bound (Ahuja, Magnanti and Orlin, *Network Flows*, section 14.3, on convex costs). All data are
whole, and so is an optimal flow. Clients that are alike share their nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Any, NamedTuple

import numpy as np

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._dealing import alike_clients
from fedmoe_sched._face import Face
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["LeastRelaxation", "least_relaxation", "total_above", "whole_weights"]

_FAR = 2**60  # further than any distance
_FINEST = 10**6  # the largest whole weight


@dataclass(frozen=True, eq=False)
class LeastRelaxation:
    """The least total weight of what gives way, and all assignments that need no more.

    Parameters
    ----------
    total, bound : Fraction
        The least total in units of the weights, and what the potentials prove of it: the same.
    face : Face
        The assignments within relaxed bounds of that total weight.
    """

    total: Fraction
    bound: Fraction
    face: Face


def whole_weights(weights: Mapping[str, float]) -> tuple[dict[str, int], Fraction]:
    """Return whole weights, and what one unit of them is worth.

    They are exact up to whole weights of a million, and else rounded to millionths of the largest one, or one of
    these where that would be nothing.
    """
    exact = {kind: Fraction(str(float(weight))) for kind, weight in weights.items()}
    if not exact:
        return {}, Fraction(1)
    common = lcm(*(weight.denominator for weight in exact.values()))
    numerators = [int(weight * common) for weight in exact.values()]
    unit = Fraction(gcd(*numerators), common)
    largest = max(exact.values())
    if largest / unit > _FINEST:
        unit = largest / _FINEST
    return {kind: max(1, round(weight / unit)) for kind, weight in exact.items()}, unit


def total_above(wanted: IntArray, most: IntArray) -> int:
    """Add up by how much numbers exceed others; the sum may exceed 64 bits."""
    above = wanted - most
    return sum(above[above > 0].tolist())


class _Counts(NamedTuple):
    """Numbers of some nodes in three steps: up to a lower bound, up to an upper one, beyond; shape (..., 3)."""

    sizes: IntArray
    costs: IntArray  # shape (3,)

    def next_cost(self, flow: IntArray) -> IntArray:
        """Cost of one unit more; `_FAR` where there is none."""
        cost: IntArray = np.where(flow < self.sizes, self.costs, _FAR).min(axis=-1)
        return cost

    def last_gain(self, flow: IntArray) -> IntArray:
        """Return what one unit less saves, with a minus; `_FAR` where there is none."""
        gain: IntArray = np.where(flow > 0, -self.costs, _FAR).min(axis=-1)
        return gain

    def bound(self, difference: IntArray) -> int:
        """Return the least cost of these arcs, given the difference of potentials, tail less head."""
        reduced = self.costs + difference[..., None]
        return int((np.minimum(reduced, 0) * self.sizes).sum())

    def interval(self, difference: IntArray) -> tuple[IntArray, IntArray]:
        """Fewest and most units of an optimal flow, given the difference of potentials."""
        reduced = self.costs + difference[..., None]
        low: IntArray = np.where(reduced < 0, self.sizes, 0).sum(axis=-1)
        high: IntArray = np.where(reduced <= 0, self.sizes, 0).sum(axis=-1)
        return low, high


class _Potentials(NamedTuple):
    hub: int
    clients: IntArray  # shape (g,)
    layers: IntArray  # shape (g, G)
    experts: IntArray  # shape (m,)


def least_relaxation(problem: AssignmentProblem, weights: Mapping[str, float]) -> LeastRelaxation | None:
    """Find the least total weight of what must give way.

    Parameters
    ----------
    problem : AssignmentProblem
        Without budgets.
    weights : mapping of str to float
        What one place of each kind of bound counts; kinds that are not named are hard.

    Returns
    -------
    LeastRelaxation or None
        None: no assignment keeps the hard bounds.
    """
    whole, unit = whole_weights(weights)
    network = _Network(problem, whole)
    if network.hopeless:
        return None
    network.solve()
    if network.breaks_hard_bounds():
        return None
    potentials = network.potentials()
    total, bound = network.total(), network.bound(potentials)
    return LeastRelaxation(total * unit, bound * unit, network.face(potentials))


class _Network:
    """The circulation; g groups of clients that are alike, in one layer where there are none.

    Parameters
    ----------
    problem : AssignmentProblem
    weights : mapping of str to int
    """

    def __init__(self, problem: AssignmentProblem, weights: Mapping[str, int]) -> None:
        self._problem = problem
        n, m = problem.shape
        self._layers = problem.layers or ExpertLayers(np.zeros(m, dtype=np.int64))
        # A simple cycle changes at most two layer counts at each expert, and few others at the hub.
        hard = (2 * m + 7) * max(weights.values(), default=1)
        self._hard = hard
        cost = {kind: weights.get(kind, hard) for kind in ("min_experts", "load_min", "layer_min")}
        first, self._member, self._size = alike_clients(problem)
        self._open = np.ones((len(first), m), dtype=np.bool_)
        if problem.eligible is not None:
            self._open = problem.eligible[first]
        size = self._size
        within = self._layers.count(self._open)
        least, most = problem.min_experts[first], problem.capacity[first]
        low, high = self._layers.bounds_of(first, len(first))
        reach = (self._open * size[:, None]).sum(axis=0)
        self._beyond = {
            "min_experts": total_above(problem.min_experts, problem.eligible_counts),
            "layer_min": total_above(self._layers.bounds_of(slice(0, n), n)[0], within[self._member]),
            "load_min": total_above(problem.load_min, reach),
        }
        self._prices = {kind: cost[kind] for kind in self._beyond}
        self.hopeless = any(kind not in weights and beyond for kind, beyond in self._beyond.items())

        def steps(low: IntArray, high: IntArray, top: IntArray, names: tuple[str, str]) -> _Counts:
            low, high = np.minimum(low, top), np.minimum(high, top)
            above = top - high if names[1] in weights else np.zeros_like(top)
            costs = np.array([-cost[names[0]], 0, weights.get(names[1], 0)])
            return _Counts(np.stack([low, high - low, above], axis=-1), costs)

        self._client = steps(least, most, self._open.sum(axis=1), ("min_experts", "capacity"))
        self._layer = steps(low, high, within, ("layer_min", "layer_max"))
        self._expert = steps(problem.load_min, problem.load_max, reach, ("load_min", "load_max"))

    def solve(self) -> None:
        """Find an optimal circulation."""
        from ortools.graph.python import min_cost_flow

        g, m = self._open.shape
        n_layers, size = self._layers.n_layers, self._size
        clients, layers = np.arange(g), g + np.arange(g * n_layers)
        experts, hub = g + g * n_layers + np.arange(m), g + g * n_layers + m
        kinds, numbers = np.nonzero(self._open)
        pair_tails = g + kinds * n_layers + self._layers.layer_of[numbers]
        parts = [
            (np.full(g, hub), clients, self._client.sizes * size[:, None], self._client.costs),
            (np.repeat(clients, n_layers), layers, self._layer.sizes * size[:, None, None], self._layer.costs),
            (experts, np.full(m, hub), self._expert.sizes, self._expert.costs),
        ]
        flow = min_cost_flow.SimpleMinCostFlow()
        arcs = [_add(flow, *part) for part in parts]
        pairs = flow.add_arcs_with_capacity_and_unit_cost(
            pair_tails, experts[numbers], size[kinds], np.zeros(len(kinds), dtype=np.int64)
        )
        # Without supplies the engine knows of no nodes.
        flow.set_nodes_supplies(np.arange(hub + 1), np.zeros(hub + 1, dtype=np.int64))
        status = flow.solve()
        if status != flow.OPTIMAL:
            msg = f"min-cost flow of the relaxation ended with {status}"
            raise RuntimeError(msg)
        self._of_client, self._of_layer, self._of_expert = (
            _read(flow, numbers_, counts.sizes.shape)
            for numbers_, counts in zip(arcs, (self._client, self._layer, self._expert), strict=True)
        )
        self._pairs = np.zeros((g, m), dtype=np.int64)
        self._pairs[kinds, numbers] = flow.flows(pairs)

    def breaks_hard_bounds(self) -> bool:
        """Whether some bound gave way that must not."""
        return any(
            -int(counts.costs[0]) == self._hard and int(flow[..., 0].sum()) < int(sizes[..., 0].sum())
            for counts, flow, sizes in self._parts()
        )

    def _parts(self) -> list[tuple[_Counts, IntArray, IntArray]]:
        size = self._size
        return [
            (self._client, self._of_client, self._client.sizes * size[:, None]),
            (self._layer, self._of_layer, self._layer.sizes * size[:, None, None]),
            (self._expert, self._of_expert, self._expert.sizes),
        ]

    def _full(self) -> int:
        """Return what it costs if no count reaches its lower bound, less what the network cannot give at all."""
        return sum(-int(counts.costs[0]) * int(sizes[..., 0].sum()) for counts, _, sizes in self._parts())

    def _lost(self) -> int:
        return sum(self._prices[kind] * beyond for kind, beyond in self._beyond.items())

    def total(self) -> int:
        """Return the weight of what gives way."""
        paid = sum(int((flow * counts.costs).sum()) for counts, flow, _ in self._parts())
        return self._lost() + self._full() + paid

    def bound(self, at: _Potentials) -> int:
        """Return what potentials prove: no circulation costs less (weak duality)."""
        size = self._size
        value = self._expert.bound(at.experts - at.hub)
        for counts, difference in (
            (self._client, at.hub - at.clients),
            (self._layer, at.clients[:, None] - at.layers),
        ):
            whole = _Counts(counts.sizes * size.reshape(-1, *[1] * (counts.sizes.ndim - 1)), counts.costs)
            value += whole.bound(difference)
        reduced = at.layers[:, self._layers.layer_of] - at.experts
        value += int((np.where(self._open, np.minimum(reduced, 0), 0) * size[:, None]).sum())
        return self._lost() + self._full() + value

    def potentials(self) -> _Potentials:
        """Shortest distances in the residual network from a node before all others (Bellman and Ford).

        They never change again after a sweep for each expert of a simple path.
        """
        size, members = self._size, self._layers.members
        have, may = self._pairs > 0, self._open & (self._pairs < size[:, None])
        (up_c, down_c), (up_l, down_l), (up_e, down_e) = (
            (_Counts(sizes, counts.costs).next_cost(flow), counts.last_gain(flow))
            for counts, flow, sizes in self._parts()
        )
        clients, layers = np.zeros(len(size), dtype=np.int64), np.zeros_like(up_l)
        experts, hub = np.zeros(self._problem.n_experts, dtype=np.int64), 0
        while True:
            before = hub, int(clients.sum()), int(layers.sum()), int(experts.sum())  # they only ever fall
            for layer, inside in enumerate(members):
                nearest = np.where(have[:, inside], experts[inside], _FAR).min(axis=1)
                np.minimum(layers[:, layer], nearest, out=layers[:, layer])
            np.minimum(clients, (layers + down_l).min(axis=1), out=clients)
            hub = min(hub, int((clients + down_c).min()), int((experts + up_e).min()))
            np.minimum(clients, hub + up_c, out=clients)
            np.minimum(layers, clients[:, None] + up_l, out=layers)
            for layer, inside in enumerate(members):
                nearest = np.where(may[:, inside], layers[:, layer, None], _FAR).min(axis=0)
                experts[inside] = np.minimum(experts[inside], nearest)
            np.minimum(experts, hub + down_e, out=experts)
            if before == (hub, int(clients.sum()), int(layers.sum()), int(experts.sum())):
                return _Potentials(hub, clients, layers, experts)

    def face(self, at: _Potentials) -> Face:
        """Return what is complementary to the potentials, client by client."""
        member = self._member
        reduced = at.layers[:, self._layers.layer_of] - at.experts
        forced, free = self._open & (reduced < 0), self._open & (reduced == 0)
        least, most = self._client.interval(at.hub - at.clients)
        low: IntArray | None = None
        high: IntArray | None = None
        if self._problem.layers is not None:
            low, high = (part[member] for part in self._layer.interval(at.clients[:, None] - at.layers))
        load_min, load_max = self._expert.interval(at.experts - at.hub)
        return Face(forced[member], free[member], least[member], most[member], low, high, load_min, load_max)


def _add(flow: Any, tails: IntArray, heads: IntArray, sizes: IntArray, costs: IntArray) -> IntArray:
    """Add three arcs side by side for each count; return their numbers."""
    per_step = sizes.reshape(-1, 3)
    numbers: IntArray = flow.add_arcs_with_capacity_and_unit_cost(
        np.repeat(tails, 3), np.repeat(heads, 3), per_step.reshape(-1), np.tile(costs, len(per_step))
    )
    return numbers


def _read(flow: Any, numbers: IntArray, shape: tuple[int, ...]) -> IntArray:
    units: IntArray = np.asarray(flow.flows(numbers), dtype=np.int64).reshape(shape)
    return units
