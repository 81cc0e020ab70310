"""Explanations of network problems: shortest distances in the exchange graph of an optimal assignment."""

from __future__ import annotations

import math
from collections.abc import Hashable

import numpy as np

from fedmoe_sched._arrays import FloatArray
from fedmoe_sched._layers import layers_of
from fedmoe_sched._pair_margins import PairMargins
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError
from fedmoe_sched.exchange import ExchangeGraph
from fedmoe_sched.explain import Explanation, Sensitivity
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["Explainer", "binding_bounds", "fitness_change"]


class Explainer:
    """Answers questions about one optimal assignment; the exchange graph is made once.

    Making it takes a boolean matrix of shape (n, m) and a pass over all clients for each expert.

    Parameters
    ----------
    problem : AssignmentProblem
    assignment : Assignment
        Optimal for it.
    prices : ndarray, shape (m,), optional
        Optimal dual prices; by default those of the exchange graph.
    fitness_weight : float, optional
        What a unit of fitness adds to desirability.

    Raises
    ------
    InputError
        The problem has budgets, or the assignment is not optimal: nothing but chance or haste explains it.
    """

    def __init__(
        self,
        problem: AssignmentProblem,
        assignment: Assignment,
        prices: FloatArray | None = None,
        fitness_weight: float | None = None,
    ) -> None:
        if problem.budgets:
            msg = "problem: has budgets; this is exact, and for network problems only"
            raise InputError(msg)
        graph = ExchangeGraph(problem, assignment)
        distance = graph.distances()
        if distance is None:
            msg = "schedule: is not optimal, so that there is no reason for it; solve with an exact backend"
            raise InputError(msg)
        self.problem, self.assignment = problem, assignment
        self._prices = graph.settle()[0] if prices is None else prices
        self._fitness_weight = fitness_weight
        self._margins = PairMargins(graph, distance)
        self._distance = distance
        self._room = graph.layers

    def explain(self, client: int, expert: int) -> Explanation:
        """Explain one pair, by numbers.

        Parameters
        ----------
        client, expert : int
        """
        problem, held = self.problem, self._margins.held(client)
        eligible = problem.eligible is None or bool(problem.eligible[client, expert])
        chosen = bool(held[expert])
        margin = math.inf
        instead: tuple[Hashable, ...] = ()
        brought_in_by: tuple[tuple[str, ...], ...] = ()
        if eligible:
            costs = self._margins.costs(client, expert)
            best = int(np.argmin(costs))
            margin = max(0.0, float(costs[best]))
            if math.isfinite(margin) and best < problem.n_experts:
                instead = (problem.expert_name(best),)
            if not chosen:
                brought_in_by = self._margins.brought_in_by(client, expert)
        return Explanation(
            problem.client_name(client),
            problem.expert_name(expert),
            chosen,
            eligible,
            float(problem.desirability[client, expert]),
            float(self._prices[expert]),
            margin,
            fitness_change(margin, self._fitness_weight, chosen=chosen),
            instead,
            brought_in_by,
            self._binding(client, expert, int(held.sum())),
        )

    def _binding(self, client: int, expert: int, count: int) -> tuple[str, ...]:
        layered = []
        if self._room is not None:
            layered = self._room.binding(client, expert, f"client {self.problem.client_name(client)!r}")
        place, release = self._place_worth()[expert], self._release_worth()[expert]
        return binding_bounds(
            self.problem,
            client,
            expert,
            (count, int(self.assignment.loads[expert])),
            layered,
            f"one more place is worth {place:.6g}",
            f"one less is worth {release:.6g}",
        )

    def _place_worth(self) -> FloatArray:
        penalty = self._marginal(+1)
        full = self.assignment.loads == self.problem.load_max
        worth: FloatArray = np.where(full, np.maximum(0.0, -self._distance[-1, :-1] - penalty), 0.0)
        return worth

    def _release_worth(self) -> FloatArray:
        penalty = self._marginal(0)
        least = (self.assignment.loads == self.problem.load_min) & (self.problem.load_min > 0)
        worth: FloatArray = np.where(least, np.maximum(0.0, -self._distance[:-1, -1] + penalty), 0.0)
        return worth

    def _marginal(self, step: int) -> FloatArray:
        """Penalty of the client that a load has last (0) or gets next (1)."""
        if self.problem.load_penalty is None:
            return np.zeros(self.problem.n_experts)
        loads = np.maximum(self.assignment.loads + step, 1)
        return self.problem.load_penalty.marginal_of(np.arange(self.problem.n_experts), loads)

    def sensitivity(self) -> Sensitivity:
        """Return what one unit more or less of every bound is worth."""
        problem, counts = self.problem, self.assignment.counts
        capacity, least = np.zeros(problem.n_clients), np.zeros(problem.n_clients)
        for block in problem.blocks():
            scores = problem.desirability[block].astype(np.float64)
            held = self._margins.graph.held[block]
            free = ~held if problem.eligible is None else ~held & problem.eligible[block]
            if self._room is not None:
                more, less = self._room.changes(block)
                free, held = free & more, held & less
            take = np.where(free, scores - self._distance[:-1, -1], -np.inf).max(axis=1)
            drop = np.where(held, -scores - self._distance[-1, :-1], -np.inf).max(axis=1)
            capacity[block], least[block] = np.maximum(take, 0.0), np.maximum(drop, 0.0)
        capacity[counts < problem.capacity] = 0.0
        least[(counts > problem.min_experts) | (problem.min_experts == 0)] = 0.0
        return Sensitivity(self._place_worth(), self._release_worth(), capacity, least)

    def layer_worth(self, client: int, layer: int, bound: str) -> float:
        """Return how much the optimum would rise if a layer bound of one client gave way by one.

        Parameters
        ----------
        client, layer : int
        bound : str
            ``"layer_min"`` or ``"layer_max"``.
        """
        assert self._room is not None
        problem, m = self.problem, self.problem.n_experts
        inside = layers_of(problem).layer_of == layer
        held, lowered = self._margins.held(client), bound == "layer_min"
        if not self._room.at_bound(client, layer, bound):
            return 0.0
        more, less = (part[0] for part in self._room.changes(slice(client, client + 1)))
        eligible = np.ones(m, dtype=np.bool_) if problem.eligible is None else problem.eligible[client]
        give = held & (inside if lowered else ~inside & less)
        take = eligible & ~held & (~inside & more if lowered else inside)
        scores = np.append(problem.desirability[client].astype(np.float64), 0.0)
        # The last node is a slot that stays unused.
        give = np.append(give, not lowered and held.sum() < problem.capacity[client])
        take = np.append(take, lowered and held.sum() > problem.min_experts[client])
        tails, heads = np.flatnonzero(take), np.flatnonzero(give)
        costs = self._distance[np.ix_(tails, heads)] + scores[heads] - scores[tails][:, None]
        return max(0.0, -float(costs.min(initial=0.0)))


def binding_bounds(
    problem: AssignmentProblem,
    client: int,
    expert: int,
    counts: tuple[int, int],
    layered: list[str],
    place: str,
    release: str,
) -> tuple[str, ...]:
    """Name the bounds of a client and an expert that are at their limit.

    Parameters
    ----------
    problem : AssignmentProblem
    client, expert : int
    counts : (int, int)
        Experts of the client, and clients of the expert.
    layered : list of str
        The same of the client's layers.
    place, release : str
        What one more place at the expert is worth, and one client less that it must get; in words, or empty.
    """
    count, load = counts
    who, what = f"client {problem.client_name(client)!r}", f"expert {problem.expert_name(expert)!r}"
    reasons = []
    if count == problem.slots[client]:
        reasons.append(f"{who} trains {_counted(count, 'expert')}, as many as it can")
    if count == problem.min_experts[client] > 0:
        reasons.append(f"{who} trains {_counted(count, 'expert')}, the fewest it must")
    reasons += layered
    if load == problem.load_max[expert]:
        reasons.append(f"{what} has {_counted(load, 'client')}, the most it may{_also(place)}")
    if load == problem.load_min[expert] > 0:
        reasons.append(f"{what} has {_counted(load, 'client')}, the fewest it must{_also(release)}")
    return tuple(reasons)


def fitness_change(margin: float, weight: float | None, *, chosen: bool) -> float | None:
    """Return by how much the fitness of a pair has to change to make up for a margin of desirability."""
    if weight is None:
        return None
    towards = -margin if chosen else margin
    return towards / weight if weight != 0 else math.copysign(math.inf, towards)


def _also(worth: str) -> str:
    return f"; {worth}" if worth else ""


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
