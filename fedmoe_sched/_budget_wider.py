"""Which wider bounds bring a pair into every best assignment of a problem with budgets, as far as it is proved."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np

from fedmoe_sched._budget_sensitivity import BudgetWorth
from fedmoe_sched._client_alone import client_alone
from fedmoe_sched._fixed_pair import Fixed, with_pair, without_pair
from fedmoe_sched.certify import OPTIMALITY_GAP, load_terms, responses_bound
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.result import Status
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Limits

__all__ = ["RESOURCE", "WiderBounds"]

#: What the name of a resource follows in `BudgetExplanation.brought_in_by`.
RESOURCE = "budget:"

_ENGINE = "milp-scipy"


class WiderBounds:
    """Looks for bounds that, a little wider, bring a pair in that a schedule does not have.

    A set of them does where an assignment with the pair is known that is worth more than any without it can be:
    the client arranged anew against the bound by prices, else what solving both problems shows.

    Parameters
    ----------
    worth : BudgetWorth
    client, expert : int
        Eligible and not chosen.
    missing : sequence of float
        How much more of each resource lets the expert fit beside those that the client has.
    seconds : float
        For solving, in all; 0 to do without.
    """

    def __init__(
        self, worth: BudgetWorth, client: int, expert: int, missing: Iterable[float], seconds: float
    ) -> None:
        self.worth, self.problem = worth, worth.problem
        self.client, self.expert, self.missing = client, expert, list(missing)
        self._end = time.perf_counter() + seconds
        self._noise = OPTIMALITY_GAP * max(1.0, abs(worth.objective))

    def enough(self) -> tuple[tuple[str, ...], ...]:
        """Return sets of bounds that are proved to do, and no part of which is."""
        found: list[tuple[str, ...]] = []
        names = self._at_their_limit()
        for size in range(1, len(names) + 1):
            for bounds in combinations(names, size):
                if not any(set(known) <= set(bounds) for known in found) and self._bring_in(bounds):
                    found.append(bounds)
        return tuple(found)

    def _at_their_limit(self) -> list[str]:
        problem, alone = self.problem, self.worth.alone
        held = alone.held(self.client)
        full = {
            "capacity": held.sum() == problem.capacity[self.client],
            "load_max": alone.loads[self.expert] == problem.load_max[self.expert],
        }
        if problem.layers is not None:
            layer = problem.layers.layer_of[self.expert]
            high = problem.layers.bounds_of(slice(self.client, self.client + 1), 1)[1][0, layer]
            full["layer_max"] = held[problem.layers.layer_of == layer].sum() == high
        for resource, amount in zip(problem.budgets, self.missing, strict=True):
            full[RESOURCE + resource.name] = amount > 0
        return [name for name, binds in full.items() if binds]

    def _widened(self, bounds: tuple[str, ...]) -> AssignmentProblem:
        problem, changes = self.problem, dict[str, Any]()
        for name, at in (("capacity", self.client), ("load_max", self.expert)):
            if name in bounds:
                changes[name] = getattr(problem, name).copy()
                changes[name][at] += 1
        if "layer_max" in bounds:
            assert problem.layers is not None
            low, high = problem.layers.bounds_of(slice(0, problem.n_clients), problem.n_clients)
            high = high.copy()
            high[self.client, problem.layers.layer_of[self.expert]] += 1
            changes["layers"] = ExpertLayers(problem.layers.layer_of, low, high)
        budgets = list(problem.budgets)
        for number, (one, amount) in enumerate(zip(problem.budgets, self.missing, strict=True)):
            if RESOURCE + one.name in bounds:
                budget = one.budget.copy()
                budget[self.client] += amount
                budgets[number] = ResourceBudget(one.name, one.size, budget)
        return problem.replace(**changes, budgets=budgets)

    def _bring_in(self, bounds: tuple[str, ...]) -> bool:
        wider = self._widened(bounds)
        with_it, without = (
            with_pair(wider, self.client, self.expert),
            without_pair(wider, self.client, self.expert),
        )
        if with_it is None:
            return False
        # What is worth at least and at most, with the pair and without it, in the wider problem.
        without_least = self.worth.objective
        with_most, without_most = self._by_prices(wider)
        if with_most <= without_least + self._noise:
            return False
        with_least = self._alone(wider)
        if with_least > without_most + self._noise:
            return True
        if (left := self._end - time.perf_counter()) > 0:
            least, most = _solved(without, left)
            without_least, without_most = max(without_least, least), min(without_most, most)
            if with_most <= without_least + self._noise:
                return False
            if with_least > without_most + self._noise:
                return True
        if (left := self._end - time.perf_counter()) > 0:
            with_least = max(with_least, _solved(with_it, left)[0])
        return with_least > without_most + self._noise

    def _by_prices(self, wider: AssignmentProblem) -> tuple[float, float]:
        """Bound the objective of the wider problem with the pair, and without it."""
        prices = self.worth.prices
        if prices is None:
            return np.inf, np.inf
        alone = wider.restrict([self.client], load_min=0, load_max=1, load_penalty=None)
        with_it, without = with_pair(alone, 0, self.expert), without_pair(alone, 0, self.expert)
        assert with_it is not None
        others = self.worth.price_bound - float(self.worth.shares[self.client])
        others += load_terms(wider, prices) - load_terms(self.problem, prices)
        choice = with_it.worth - float(prices[self.expert]) + responses_bound(with_it.rest, prices)
        return (
            self.worth.rounded(others + choice),
            self.worth.rounded(others + responses_bound(without.rest, prices)),
        )

    def _alone(self, wider: AssignmentProblem) -> float:
        """Arrange the client's experts anew, with the pair, all others as they are; -inf where nothing does."""
        held = self.worth.alone.held(self.client)
        one = client_alone(wider, self.client, self.worth.alone.loads - held)
        fixed = with_pair(one, 0, self.expert)
        if fixed is None:
            return -np.inf
        now = float(one.desirability[0, held].sum())
        return self.worth.objective - now + _solved(fixed, None)[0]


def _solved(fixed: Fixed, seconds: float | None) -> tuple[float, float]:
    """Return the optimum of a problem with a pair fixed at least and at most."""
    answer = solve(fixed.rest, _ENGINE, limits=Limits(time=seconds))
    if answer.status is Status.INFEASIBLE:
        return -np.inf, -np.inf
    most = np.inf if answer.bound is None else answer.bound
    if answer.certificate is None or not answer.certificate.feasible:
        return -np.inf, most + fixed.worth
    least = answer.certificate.objective
    return least + fixed.worth, max(least, most) + fixed.worth
