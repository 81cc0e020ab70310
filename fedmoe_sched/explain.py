"""Why a pair is in a schedule or not, and what bounds and capacities are worth; exact, for network problems.

All answers are shortest distances in the exchange graph of an optimal assignment (`fedmoe_sched.exchange`): to
force a pair, or to forbid it, closes a cycle through it, and the cheapest such cycle is what it costs (Ahuja,
Magnanti and Orlin, *Network Flows*, section 9.11, on the sensitivity of minimum cost flows). Prices alone would
only bound it, and where several sets of prices are optimal, say too little or too much.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedmoe_sched._arrays import FloatArray, IntArray
from fedmoe_sched._pair_margins import PairMargins
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError
from fedmoe_sched.exchange import ExchangeGraph
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
    price : float
        Of the expert: what is left of the desirability after it is what counts for the client.
    margin : float
        What the objective loses at least if the decision on this pair is turned round: the pair forced in, or
        forbidden, and everything else arranged anew in the best way. 0 where that is as good; inf where no
        assignment keeps the bounds then. The desirability of the pair would have to rise, or fall, by so much.
    fitness_change : float or None
        By how much the fitness of the pair would have to rise (or fall, where negative) for that: the margin over
        the weight of fitness; infinite where fitness does not count. None where the schedule is not one of
        `fedmoe_sched.schedule`.
    instead : tuple of hashable
        For a pair that is not chosen, the expert that the client would give up in that best rearrangement; for one
        that is, the expert that it would take instead. Empty if it would train one more, or one less.
    brought_in_by : tuple of tuple of str
        For a pair that is not chosen, what brings it into every optimum: ``("capacity",)`` is one more slot of the
        client, ``("load_max",)`` one more place at the expert, ``("layer_max",)`` one more expert of the layer at
        the client; several in one entry only together.
    binding : tuple of str
        Bounds at their limit that have to do with this pair, in words.
    """

    client: Hashable
    expert: Hashable
    chosen: bool
    eligible: bool
    desirability: float
    price: float
    margin: float
    fitness_change: float | None
    instead: tuple[Hashable, ...]
    brought_in_by: tuple[tuple[str, ...], ...]
    binding: tuple[str, ...]

    def __str__(self) -> str:
        values = f"desirability {self.desirability:.6g}, price {self.price:.6g}"
        pair = f"client {self.client!r} and expert {self.expert!r} ({values})"
        if not self.eligible:
            return f"{pair}: not chosen: the pair is not eligible"
        lines = [f"{pair}: {'chosen' if self.chosen else 'not chosen'}{self._turned()}"]
        lines += [f"  {reason}" for reason in self.binding]
        lines += [f"  {self._wider(bounds)} would bring it in" for bounds in self.brought_in_by]
        return "\n".join(lines)

    def _wider(self, bounds: tuple[str, ...]) -> str:
        """Name bounds that are wider by one."""
        words = {
            "capacity": f"one more slot at client {self.client!r}",
            "load_max": f"one more place at expert {self.expert!r}",
            "layer_max": f"one more expert of its layer at client {self.client!r}",
        }
        return " and ".join(words[name] for name in bounds) + (" together" if len(bounds) > 1 else "")

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
            f"{direction}{self._by_fitness()}"
        )

    def _by_fitness(self) -> str:
        change = self.fitness_change
        if change is None:
            return ""
        if math.isinf(change):
            return " (its fitness does not count)"
        return f" (its fitness by {change:+.6g})"


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
            msg = "problem: has budgets; only network problems can be explained"
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


def fitness_change(margin: float, weight: float | None, *, chosen: bool) -> float | None:
    """Return by how much the fitness of a pair has to change to make up for a margin of desirability."""
    if weight is None:
        return None
    towards = -margin if chosen else margin
    return towards / weight if weight != 0 else math.copysign(math.inf, towards)


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
