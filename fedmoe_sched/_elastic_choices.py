"""The least weighted relaxation within budgets: an ordinary problem with prices for what gives way.

Load bounds that give way are a convex penalty of the loads. Experts that a client lacks are taken from some "not
given", which use no resource and cost what a place weighs. So the least total is the optimum of a problem that
column generation over choices of clients bounds closely (Dantzig and Wolfe 1960, *Operations Research* 8). Of all
ways by that total the best objective is that of a problem in which a small share of the desirability counts too:
where its optimum needs no more than the least total, no other way is better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched._elastic import least_relaxation, whole_weights
from fedmoe_sched._elastic_priced import PricedRelaxation
from fedmoe_sched._elastic_program import BudgetRelaxation
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import objective
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solver import Limits
from fedmoe_sched.solvers._budget_dual import Clients
from fedmoe_sched.solvers._choice_master import Pool, generate
from fedmoe_sched.solvers._choice_search import ChoiceSearch, load_kernels

__all__ = ["relax_by_choices", "takes"]

_KINDS = frozenset({"min_experts", "layer_min", "load_min", "load_max"})
_FIRST, _STEP = 500.0, 4.0  # what a place weighs, in mean scores, in the first problem; and how that grows
_PROBLEMS = 8
_CLOSE = 1.5  # shares of the desirability between which no other one is tried
_BOUNDING, _COMBINING = 0.5, 0.2  # of the time left
_SHORTEST = 2.0  # seconds for the objective once the total is proved,
_FOR_BEST = 2.0  # or so many times those for the total
_ROUNDING = 1e-9
_TINY = 1e-200


def takes(problem: AssignmentProblem, weights: Mapping[str, float]) -> bool:
    """Whether all bounds that may give way, and all others, can be written so."""
    return "capacity" not in weights and (problem.layers is None or "layer_max" not in weights)


def relax_by_choices(problem: AssignmentProblem, weights: Mapping[str, float], seconds: float) -> BudgetRelaxation:
    """Find an assignment within budgets whose bounds give way by the least total weight, and of these the best.

    Parameters
    ----------
    problem : AssignmentProblem
        With budgets, and such that `takes` it.
    weights : mapping of str to float
        What one place of each kind of bound counts; kinds that are not named are hard.
    seconds : float
        In all, without the time to load kernels.
    """
    load_kernels()
    weights = {kind: weight for kind, weight in weights.items() if kind in _KINDS}
    if problem.layers is None:
        weights.pop("layer_min", None)
    whole, unit = whole_weights(weights)
    model = PricedRelaxation(problem, whole)
    without = None if model.hopeless else least_relaxation(network_relaxation(problem), weights)
    if without is None:
        return BudgetRelaxation(None, math.inf)
    found = _Ladder(model, int(without.bound / unit), seconds)
    found.climb()
    bound = math.inf if found.infeasible else float(found.least * unit)
    return BudgetRelaxation(found.best, bound)


class _Ladder:
    """Problems with a smaller or a larger share of the desirability, and what they showed.

    Parameters
    ----------
    model : PricedRelaxation
    least : int
        A total that is known to be needed.
    seconds : float
    """

    def __init__(self, model: PricedRelaxation, least: int, seconds: float) -> None:
        self._model, self._end = model, time.perf_counter() + seconds
        self._started = time.perf_counter()
        self.best: Assignment | None = None
        self.total, self._worth = 0, -math.inf
        self.least, self.infeasible = least, False
        self._prices: npt.NDArray[np.float64] | None = None
        self._pool: Pool | None = None
        self._bounded = self._hurried = False

    def _left(self, share: float = 1.0) -> float:
        return max(0.0, share * (self._end - time.perf_counter()))

    @property
    def _met(self) -> bool:
        return self.best is not None and self.total <= self.least

    def climb(self) -> None:
        """Try shares of the desirability until the best way by the least total is proved, or time is over."""
        model = self._model
        share = model.lightest / (_FIRST * model.scale) if model.scale > _TINY else 0.0
        enough, too_much = 0.0, math.inf  # shares that meet the least total, and that do not
        for _ in range(_PROBLEMS):
            settled, met = self._try(share)
            if self.infeasible or self._left() <= 0.0 or share == 0.0 or (met and settled):
                return
            if met:
                enough = share
            else:
                too_much = share
            if enough == 0.0:
                share /= _STEP
            elif too_much == math.inf:
                share *= _STEP
            elif too_much / enough > _CLOSE:
                share = math.sqrt(enough * too_much)
            else:
                return

    def _try(self, share: float) -> tuple[bool, bool]:
        """Solve one of the problems; return whether that is proved, and whether it meets the least total."""
        model = self._model
        limits = Limits(time=max(self._left(), 1e-3))
        search = ChoiceSearch(model.at(share), limits, pool=self._pool, floors=model.floors)
        if not search.price(self._prices):
            self.infeasible = True
            return False, False
        self._prices, self._pool = search.dual.prices, search.pool
        if search.relaxed is not None:
            search.untangle(search.relaxed.shares)
        if search.held is None:
            search.adopt(search.insert())
        self._take(search)
        if not self._bounded:
            self._bound()
            self._take(search)
        if not search.proved:
            search.combine(self._left(_COMBINING))
            self._take(search)
        if math.isfinite(search.bound):
            lowest = share * model.lowest() if share else 0.0
            self._raise(lowest - search.bound)
        return search.proved, search.held is not None and self._lacks(search) <= self.least

    def _lacks(self, search: ChoiceSearch) -> int:
        return self._model.lacks(self._read(search))

    def _read(self, search: ChoiceSearch) -> Assignment:
        assert search.held is not None
        return Assignment.from_mask(search.held[:, : self._model.problem.n_experts])

    def _take(self, search: ChoiceSearch) -> None:
        if search.held is None:
            return
        assignment = self._read(search)
        total, worth = self._model.lacks(assignment), objective(self._model.problem, assignment)
        if self.best is None or (total, -worth) < (self.total, -self._worth):
            self.best, self.total, self._worth = assignment, total, worth
        if self._met and self._bounded and not self._hurried:
            self._hurried, now = True, time.perf_counter()
            self._end = min(self._end, now + max(_SHORTEST, _FOR_BEST * (now - self._started)))

    def _bound(self) -> None:
        """Bound the total, without any desirability."""
        self._bounded = True
        clients = Clients.of(self._model.at(0.0)).with_floors(self._model.floors)
        end = time.perf_counter() + self._left(_BOUNDING)
        found = generate(
            clients, np.random.default_rng(0), lambda: end - time.perf_counter(), self._prices, self._pool
        )
        self._raise(-found.dual.bound)

    def _raise(self, proved: float) -> None:
        """Use that the total is at least this, beside what is settled; totals are whole."""
        if math.isfinite(proved):
            value = self._model.total + proved
            rounding = 1e-6 + _ROUNDING * (abs(self._model.total) + abs(proved))
            self.least = max(self.least, math.ceil(value - rounding))
