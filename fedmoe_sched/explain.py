"""Why a pair is in a schedule or not, and what bounds and capacities are worth; exact, for network problems.

All answers are shortest distances in the exchange graph of an optimal assignment (`fedmoe_sched.exchange`): to
force a pair, or to forbid it, closes a cycle through it, and the cheapest such cycle is what it costs (Ahuja,
Magnanti and Orlin, *Network Flows*, section 9.11, on the sensitivity of minimum cost flows). Prices alone would
only bound it, and where several sets of prices are optimal, say too little or too much.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._layer_exchange import LayerRoom
from fedmoe_sched._layers import layers_of
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError
from fedmoe_sched.exchange import exchange_distances
from fedmoe_sched.problem import AssignmentProblem

if TYPE_CHECKING:
    from fedmoe_sched.result import Schedule

__all__ = ["Explainer", "Explanation", "Sensitivity", "summary_table"]


@dataclass(frozen=True)
class Explanation:
    """Why a client trains an expert, or does not.

    Parameters
    ----------
    client, expert : hashable
    chosen : bool
    eligible : bool
    desirability : float
    margin : float
        What the objective loses at least if the decision on this pair is turned round: the pair forced in, or
        forbidden, and everything else arranged anew in the best way. 0 where that is as good; inf where no
        assignment keeps the bounds then. The desirability of the pair would have to rise, or fall, by so much.
    instead : tuple of hashable
        For a pair that is not chosen, the expert that the client would give up in that best rearrangement; for one
        that is, the expert that it would take instead. Empty if it would train one more, or one less.
    binding : tuple of str
        Bounds at their limit that have to do with this pair, in words.
    """

    client: Hashable
    expert: Hashable
    chosen: bool
    eligible: bool
    desirability: float
    margin: float
    instead: tuple[Hashable, ...]
    binding: tuple[str, ...]

    def __str__(self) -> str:
        pair = f"client {self.client!r} and expert {self.expert!r} (desirability {self.desirability:.6g})"
        if not self.eligible:
            return f"{pair}: not chosen: the pair is not eligible"
        lines = [f"{pair}: {'chosen' if self.chosen else 'not chosen'}{self._turned()}"]
        lines += [f"  {reason}" for reason in self.binding]
        return "\n".join(lines)

    def _turned(self) -> str:
        """Say what the opposite would cost."""
        what = "without it" if self.chosen else "with it"
        if math.isinf(self.margin):
            return f"; {what} no assignment keeps all bounds"
        if self.chosen:
            how = f" and expert {self.instead[0]!r} instead" if self.instead else ""
        else:
            how = f" in place of expert {self.instead[0]!r}" if self.instead else " in addition"
        direction = "fall" if self.chosen else "rise"
        if self.margin == 0:
            return f"; {what}{how} the objective would be the same"
        return (
            f"; {what}{how} the objective would be {self.margin:.6g} less: so much its desirability would have to "
            f"{direction}"
        )


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What one unit more or less of every bound is worth: how much the optimum would rise.

    Parameters
    ----------
    load_max : ndarray, shape (m,), float64
        One more place at each expert; 0 where the bound does not bind.
    load_min : ndarray, shape (m,), float64
        One client less that each expert must get.
    capacity : ndarray, shape (n,), float64
        One more expert that each client may train.
    min_experts : ndarray, shape (n,), float64
        One expert less that each client must train.
    """

    load_max: FloatArray
    load_min: FloatArray
    capacity: FloatArray
    min_experts: FloatArray


@dataclass(eq=False)
class Explainer:
    """Answers questions about one optimal assignment; the exchange graph is made once.

    Making it takes a boolean matrix of shape (n, m) and a pass over all clients for each expert.

    Parameters
    ----------
    problem : AssignmentProblem
    assignment : Assignment
        Optimal for it.

    Raises
    ------
    InputError
        The problem has budgets, or the assignment is not optimal: nothing but chance or haste explains it.
    """

    problem: AssignmentProblem
    assignment: Assignment
    _distance: FloatArray = field(init=False, repr=False)
    _room: LayerRoom | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.problem.budgets:
            msg = "problem: has budgets; only network problems can be explained"
            raise InputError(msg)
        distance = exchange_distances(self.problem, self.assignment)
        if distance is None:
            msg = "schedule: is not optimal, so that there is no reason for it; solve with an exact backend"
            raise InputError(msg)
        self._distance = distance
        self._room = None if self.problem.layers is None else LayerRoom(self.problem, self.assignment.mask())

    def explain(self, client: int, expert: int) -> Explanation:
        """Explain one pair, by numbers.

        Parameters
        ----------
        client, expert : int
        """
        problem = self.problem
        held = self._held(client)
        eligible = problem.eligible is None or bool(problem.eligible[client, expert])
        chosen = bool(held[expert])
        costs = self._removal(client, expert, held) if chosen else self._insertion(client, expert, held)
        margin = math.inf
        instead: tuple[Hashable, ...] = ()
        if eligible:
            best = int(np.argmin(costs))
            margin = max(0.0, float(costs[best]))
            if math.isfinite(margin) and best < problem.n_experts:
                instead = (problem.expert_name(best),)
        return Explanation(
            problem.client_name(client),
            problem.expert_name(expert),
            chosen,
            eligible,
            float(problem.desirability[client, expert]),
            margin,
            instead,
            self._binding(client, expert, int(held.sum())),
        )

    def _held(self, client: int) -> BoolArray:
        held = np.zeros(self.problem.n_experts, dtype=np.bool_)
        ends = self.assignment.indptr
        held[self.assignment.indices[ends[client] : ends[client + 1]]] = True
        return held

    def _insertion(self, client: int, expert: int, held: BoolArray) -> FloatArray:
        """Cost of forcing a pair in, by what the client gives up; the last entry is for nothing."""
        problem, m = self.problem, self.problem.n_experts
        scores = problem.desirability[client].astype(np.float64)
        costs: FloatArray = np.full(m + 1, np.inf)
        costs[:m][held] = scores[held]
        if held.sum() < problem.capacity[client]:
            costs[m] = 0.0
        if self._room is not None:
            costs[~self._room.partners(client, expert, taken=True)] = np.inf
        costs += self._distance[expert] - scores[expert]
        return costs

    def _removal(self, client: int, expert: int, held: BoolArray) -> FloatArray:
        """Cost of forbidding a pair, by what the client takes instead; the last entry is for nothing."""
        problem, m = self.problem, self.problem.n_experts
        scores = problem.desirability[client].astype(np.float64)
        costs: FloatArray = np.full(m + 1, np.inf)
        free = ~held if problem.eligible is None else ~held & problem.eligible[client]
        costs[:m][free] = -scores[free]
        if held.sum() > problem.min_experts[client]:
            costs[m] = 0.0
        if self._room is not None:
            costs[~self._room.partners(client, expert, taken=False)] = np.inf
        costs += self._distance[:, expert] + scores[expert]
        return costs

    def _binding(self, client: int, expert: int, count: int) -> tuple[str, ...]:
        """Name the bounds of the client and the expert that are at their limit."""
        problem, load = self.problem, int(self.assignment.loads[expert])
        who, what = f"client {problem.client_name(client)!r}", f"expert {problem.expert_name(expert)!r}"
        reasons = []
        if count == problem.slots[client]:
            reasons.append(f"{who} trains {_counted(count, 'expert')}, as many as it can")
        if count == problem.min_experts[client] > 0:
            reasons.append(f"{who} trains {_counted(count, 'expert')}, the fewest it must")
        if self._room is not None:
            reasons += self._room.binding(client, expert, str(who))
        if load == problem.load_max[expert]:
            worth = self._place_worth()[expert]
            reasons.append(
                f"{what} has {_counted(load, 'client')}, the most it may; one more place is worth {worth:.6g}"
            )
        if load == problem.load_min[expert] > 0:
            worth = self._release_worth()[expert]
            reasons.append(
                f"{what} has {_counted(load, 'client')}, the fewest it must; one less is worth {worth:.6g}"
            )
        return tuple(reasons)

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
            held = np.zeros(scores.shape, dtype=np.bool_)
            held[self.assignment.pairs_of(block)] = True
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
        held, lowered = self._held(client), bound == "layer_min"
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


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def summary_table(schedule: Schedule) -> str:
    """Return a schedule as a text table, one line per expert; see `Schedule.summary`."""
    problem, loads = schedule.problem, schedule.loads
    worth = None if problem.budgets or schedule.status != "optimal" else schedule.sensitivity()
    rows = [["expert", "load", "bounds", "price", "binding"]]
    for j in range(problem.n_experts):
        price = "-" if schedule.prices is None else f"{schedule.prices[j]:.6g}"
        bounds = f"{problem.load_min[j]}..{problem.load_max[j]}"
        rows.append(
            [str(problem.expert_name(j)), str(loads[j]), bounds, price, _binding_text(problem, loads, j, worth)]
        )
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    return "\n".join([repr(schedule), *lines])


def _binding_text(problem: AssignmentProblem, loads: IntArray, expert: int, worth: Sensitivity | None) -> str:
    parts = []
    if loads[expert] == problem.load_max[expert]:
        value = "" if worth is None else f", one more place is worth {worth.load_max[expert]:.6g}"
        parts.append(f"full{value}")
    if loads[expert] == problem.load_min[expert] > 0:
        value = "" if worth is None else f", one less is worth {worth.load_min[expert]:.6g}"
        parts.append(f"at its least{value}")
    return "; ".join(parts)
