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
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._budgets import fitting_counts, fitting_pairs, network_relaxation
from fedmoe_sched._elastic import least_relaxation, total_above, whole_weights
from fedmoe_sched._elastic_program import BudgetRelaxation
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import objective
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.solver import Limits
from fedmoe_sched.solvers._budget_dual import Clients
from fedmoe_sched.solvers._choice_master import Pool, generate
from fedmoe_sched.solvers._choice_search import ChoiceSearch, load_kernels

__all__ = ["relax_by_choices", "takes"]

_KINDS = frozenset({"min_experts", "load_min", "load_max"})
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
    return problem.layers is None and "capacity" not in weights


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
    whole, unit = whole_weights(weights)
    model = _Priced(problem, whole)
    without = None if model.hopeless else least_relaxation(network_relaxation(problem), weights)
    if without is None:
        return BudgetRelaxation(None, math.inf)
    found = _Ladder(model, int(without.bound / unit), seconds)
    found.climb()
    bound = math.inf if found.infeasible else float(found.least * unit)
    return BudgetRelaxation(found.best, bound)


class _Priced:
    """Problems whose objective is a share of the desirability, less the weight of what gives way, plus `total`.

    Parameters
    ----------
    problem : AssignmentProblem
    weights : mapping of str to int
    """

    def __init__(self, problem: AssignmentProblem, weights: Mapping[str, int]) -> None:
        self.problem, self._weights = problem, weights
        fits = fitting_pairs(problem)
        _, most = fitting_counts(problem, fits)
        least, reach = np.minimum(problem.min_experts, most), fits.sum(axis=0)
        self._low = np.minimum(problem.load_min, reach)
        self._high = np.minimum(problem.load_max, problem.n_clients)
        beyond = {
            "min_experts": total_above(problem.min_experts, most),
            "load_min": total_above(problem.load_min, reach),
        }
        self.hopeless = any(kind not in weights and lost for kind, lost in beyond.items())
        place = weights.get("min_experts", 0)
        # Who can have no more than the fewest loses by every expert less: that needs no experts "not given".
        self._earns = np.where(least == most, place, 0)
        missing = np.where((self._earns > 0) | (place == 0), 0, least)
        self._absent = np.arange(missing.max(initial=0)) < missing[:, None]
        self.least_experts = np.where(self._earns > 0, 0, least)
        self._fits, self._most = fits, most
        #: What the objective of `at` lacks, with a minus, where nothing is given.
        self.total = (
            sum(weights.get(kind, 0) * lost for kind, lost in beyond.items())
            + int((self._earns * least).sum())
            + weights.get("load_min", 0) * int(self._low.sum())
        )
        self.scale = self._mean_worth(reach)
        self.lightest = min(weights.values(), default=1)

    def _mean_worth(self, reach: IntArray) -> float:
        """Return the mean size of a possible pair's score, and of the penalty of one client."""
        penalty, scores = self.problem.load_penalty, self.problem.desirability[self._fits]
        if not len(scores):
            return 0.0
        size = float(np.abs(scores.astype(np.float64)).mean())
        if penalty is not None:
            size += float((np.abs(penalty.total(reach)) / np.maximum(reach, 1)).mean())
        return size

    def lacks(self, assignment: Assignment) -> int:
        """Return the weight of what gives way."""
        counts, loads, problem = assignment.counts, assignment.loads, self.problem
        weigh = self._weights.get
        return (
            weigh("min_experts", 0) * total_above(problem.min_experts, counts)
            + weigh("load_min", 0) * total_above(problem.load_min, loads)
            + weigh("load_max", 0) * total_above(loads, problem.load_max)
        )

    def lowest(self) -> float:
        """Return what any assignment is worth at least."""
        scores = np.where(self._fits, self.problem.desirability, 0.0).astype(np.float64)
        losses = np.sort(scores.clip(max=0.0), axis=1)
        losses[np.arange(losses.shape[1]) >= self._most[:, None]] = 0.0
        penalty = self.problem.load_penalty
        if penalty is None:
            return float(losses.sum())
        return float(losses.sum() - penalty.total(self._fits.sum(axis=0)).clip(min=0.0).sum())

    def at(self, share: float) -> AssignmentProblem:
        """Return the problem where such a share of the desirability counts; the last experts are "not given"."""
        problem, absent = self.problem, self._absent
        extra = absent.shape[1]
        place = float(self._weights.get("min_experts", 0))
        gain = share * problem.desirability.astype(np.float64) + self._earns[:, None]
        hard_min = self._low if "load_min" not in self._weights else np.zeros_like(self._low)
        hard_max = self._high if "load_max" not in self._weights else np.full_like(self._high, problem.n_clients)
        none = np.zeros(extra, dtype=np.int64)
        return AssignmentProblem(
            np.hstack([gain, np.full(absent.shape, -place)]),
            self._most,
            min_experts=self.least_experts,
            load_min=np.concatenate([hard_min, none]),
            load_max=np.concatenate([hard_max, none + problem.n_clients]),
            eligible=np.hstack([self._fits, absent]),
            load_penalty=self._penalty(share, extra),
            budgets=[_with_columns(resource, extra) for resource in problem.budgets],
        )

    def _penalty(self, share: float, extra: int) -> LoadPenalty:
        """Penalise loads below `load_min` and above `load_max`, and such a share of what the problem does."""
        known = self.problem.load_penalty or LoadPenalty.quadratic(0.0, n_experts=self.problem.n_experts)
        below, above = (float(self._weights.get(kind, 0)) for kind in ("load_min", "load_max"))
        parts: list[tuple[Any, Any, Any]] = []
        for j, (low, high) in enumerate(zip(self._low.tolist(), self._high.tolist(), strict=True)):
            segments = slice(known.indptr[j], known.indptr[j + 1])
            start = np.union1d(known.start[segments], [1, low + 1, high + 1])
            slope = share * known.slope[segments][np.searchsorted(known.start[segments], start, "right") - 1]
            value = share * known.marginal_of(np.full(len(start), j), start)
            value += np.where(start <= low, -below, 0.0) + np.where(start > high, above, 0.0)
            for k in range(1, len(start)):  # rounding must not make it fall
                value[k] = max(value[k], value[k - 1] + slope[k - 1] * (start[k] - 1 - start[k - 1]))
            parts.append((start, value, slope))
        parts += [(np.ones(1, dtype=np.int64), np.zeros(1), np.zeros(1))] * extra
        indptr = np.append(0, np.cumsum([len(start) for start, _, _ in parts]))
        return LoadPenalty(indptr, *(np.concatenate(each) for each in zip(*parts, strict=True)))


def _with_columns(resource: ResourceBudget, extra: int) -> ResourceBudget:
    """Add experts that take nothing of a resource."""
    size = resource.size
    return ResourceBudget(
        resource.name, np.concatenate([size, np.zeros((*size.shape[:-1], extra))], axis=-1), resource.budget
    )


class _Ladder:
    """Problems with a smaller or a larger share of the desirability, and what they showed.

    Parameters
    ----------
    model : _Priced
    least : int
        A total that is known to be needed.
    seconds : float
    """

    def __init__(self, model: _Priced, least: int, seconds: float) -> None:
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
        search = ChoiceSearch(model.at(share), Limits(time=max(self._left(), 1e-3)), pool=self._pool)
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
        clients = Clients.of(self._model.at(0.0))
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
