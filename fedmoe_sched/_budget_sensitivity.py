"""What wider bounds are worth where there are budgets: at most by prices, at least by one client arranged anew."""

from __future__ import annotations

import math
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fedmoe_sched._arrays import FloatArray
from fedmoe_sched._client_alone import ClientsAlone
from fedmoe_sched.certify import OPTIMALITY_GAP, client_bounds, is_whole, load_terms, rounded_down
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.explain import BudgetSensitivity, Sensitivity
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget

if TYPE_CHECKING:
    from fedmoe_sched.result import Schedule

__all__ = ["BudgetWorth", "without_limit"]


class BudgetWorth:
    """Bounds of what wider bounds add to the objective of a feasible schedule; each part is made when asked for.

    Parameters
    ----------
    schedule : Schedule
        Feasible, of a problem with budgets.
    """

    def __init__(self, schedule: Schedule) -> None:
        assert schedule.pairs is not None
        assert schedule.certificate is not None
        self.problem, self.prices = schedule.problem, schedule.prices
        self.objective = schedule.certificate.objective
        self.alone = ClientsAlone(schedule.problem, schedule.pairs)

    @cached_property
    def shares(self) -> FloatArray:
        """What each client adds to the bound by prices; shape (n,)."""
        assert self.prices is not None
        return client_bounds(self.problem, self.prices)

    @cached_property
    def price_bound(self) -> float:
        """The bound by prices, before it is rounded."""
        assert self.prices is not None
        return load_terms(self.problem, self.prices) + math.fsum(self.shares)

    @cached_property
    def _whole(self) -> bool:
        return is_whole(self.problem)

    def rounded(self, bound: float) -> float:
        """Round a bound down where all objectives are whole numbers."""
        return rounded_down(bound) if self._whole else bound

    def _gain(self, more: FloatArray) -> FloatArray:
        """Return what is gained at most where so much is added to the bound."""
        bounds = self.price_bound + np.maximum(more, 0.0)
        if self._whole:
            bounds = np.floor(bounds + OPTIMALITY_GAP * np.maximum(1.0, np.abs(bounds)))
        return np.maximum(bounds - self.objective, 0.0)

    def place_change(self, expert: int, name: str) -> float:
        """Return what one more place, or one client less that must be, adds to the bound by prices."""
        assert self.prices is not None
        bounds = getattr(self.problem, name).copy()
        bounds[expert] = bounds[expert] + 1 if name == "load_max" else max(0, bounds[expert] - 1)
        wider = self.problem.replace(**{name: bounds})
        return load_terms(wider, self.prices) - load_terms(self.problem, self.prices)

    @cached_property
    def places(self) -> tuple[FloatArray, FloatArray]:
        """One more place at each expert: at most and at least; each of shape (m,)."""
        return self._both("load_max", self.alone.places())

    @cached_property
    def releases(self) -> tuple[FloatArray, FloatArray]:
        """One client less that each expert must get: at most and at least; each of shape (m,)."""
        return self._both("load_min", self.alone.releases())

    def _both(self, name: str, least: FloatArray) -> tuple[FloatArray, FloatArray]:
        m = self.problem.n_experts
        if self.prices is None:
            return np.full(m, np.inf), least
        changes = np.array([self.place_change(expert, name) for expert in range(m)])
        return _in_order(self._gain(changes), least)

    @cached_property
    def slots(self) -> tuple[FloatArray, FloatArray]:
        """One more slot at each client: at most and at least; each of shape (n,)."""
        return self._clients(self.problem.replace(capacity=self.problem.capacity + 1))

    @cached_property
    def fewer(self) -> tuple[FloatArray, FloatArray]:
        """One expert less that each client must take: at most and at least; each of shape (n,)."""
        least = np.maximum(self.problem.min_experts - 1, 0)
        return self._clients(self.problem.replace(min_experts=least))

    def of_layer(self, layer: int, name: str) -> tuple[FloatArray, FloatArray]:
        """One expert more, or less, that each client may or must have of a layer: at most and at least; (n,) each.

        Parameters
        ----------
        layer : int
        name : str
            ``"layer_max"`` or ``"layer_min"``.
        """
        problem = self.problem
        assert problem.layers is not None
        low, high = map(np.array, problem.layers.bounds_of(slice(0, problem.n_clients), problem.n_clients))
        if name == "layer_max":
            high[:, layer] += 1
        else:
            low[:, layer] = np.maximum(low[:, layer] - 1, 0)
        return self._clients(problem.replace(layers=ExpertLayers(problem.layers.layer_of, low, high)))

    def _clients(self, wider: AssignmentProblem) -> tuple[FloatArray, FloatArray]:
        """Return gains where one client has the bounds of `wider`: at most and at least; each of shape (n,)."""
        least = self.alone.gains(wider)
        if self.prices is None:
            return np.full(len(least), np.inf), least
        return _in_order(self._gain(client_bounds(wider, self.prices) - self.shares), least)

    def without(self, resource: int) -> float:
        """Return what no limit on one resource is worth at most, at all clients together."""
        if self.prices is None:
            return math.inf
        shares = client_bounds(without_limit(self.problem, resource), self.prices)
        return float(self._gain(np.array([math.fsum(shares) - math.fsum(self.shares)]))[0])

    def sensitivity(self) -> BudgetSensitivity:
        """Return all of it."""
        problem = self.problem
        each = [self._clients(without_limit(problem, r)) for r in range(len(problem.budgets))]
        most, least = (
            Sensitivity(*part) for part in zip(self.places, self.releases, self.slots, self.fewer, strict=True)
        )
        return BudgetSensitivity(
            most,
            least,
            np.stack([above for above, _ in each]),
            np.stack([below for _, below in each]),
            np.array([self.without(r) for r in range(len(problem.budgets))]),
            self.alone.smallest_steps(),
        )


def without_limit(problem: AssignmentProblem, resource: int) -> AssignmentProblem:
    """Return the problem with no limit on one resource."""
    budgets = list(problem.budgets)
    one = budgets[resource]
    budgets[resource] = ResourceBudget(one.name, one.size, np.full(len(one.budget), np.inf))
    return problem.replace(budgets=budgets)


def _in_order(most: FloatArray, least: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Let rounding errors of the one not exceed the other, and make one of what they cannot tell apart."""
    close = np.abs(most - least) <= OPTIMALITY_GAP * np.maximum(1.0, least)
    return np.where(close, least, most), np.minimum(least, most)
