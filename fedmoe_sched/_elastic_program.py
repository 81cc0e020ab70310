"""The least weighted relaxation where budgets, which never give way, make it an integer program.

Every bound that may give way has a variable for by how much. A first program has the least total weight of these,
a second one the best objective of all assignments that need no more. Both are solved by SciPy's HiGHS.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from fedmoe_sched._arrays import FloatArray, IntArray
from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched._elastic import least_relaxation, total_above, whole_weights
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solvers._budget_rows import Covers, budget_rows
from fedmoe_sched.solvers._load_steps import engine_costs, step_columns
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs

__all__ = ["BudgetRelaxation", "relax_by_program"]

_SHORTEST = 1.0  # seconds that the second program has, even if the first one was faster
_INFEASIBLE = 2  # status of scipy.optimize.OptimizeResult


@dataclass(frozen=True, eq=False)
class BudgetRelaxation:
    """What was found of the least total weight.

    Parameters
    ----------
    assignment : Assignment or None
        It keeps the budgets, and all bounds that are hard. None: none was found.
    bound : float
        No assignment needs less, in units of the weights; inf where none keeps what is hard.
    """

    assignment: Assignment | None
    bound: float


class _Family(NamedTuple):
    """Counts of one kind: of which count each pair is one, the bounds, and the names of the bounds."""

    rows: IntArray  # shape (pairs,)
    low: IntArray  # shape (counts,)
    high: IntArray
    names: tuple[str, str]


def relax_by_program(problem: AssignmentProblem, weights: Mapping[str, float], seconds: float) -> BudgetRelaxation:
    """Find an assignment within budgets whose bounds give way by the least total weight, and of these the best.

    Parameters
    ----------
    problem : AssignmentProblem
    weights : mapping of str to float
        What one place of each kind of bound counts; kinds that are not named are hard.
    seconds : float
        For both programs together. The second one has no more than the first one took, or one second: it is only
        about which of the least relaxations is taken.
    """
    whole, unit = whole_weights(weights)
    network = network_relaxation(problem)
    start = time.perf_counter()
    end = start + seconds
    without = least_relaxation(network, weights)
    program = _Program(problem, network, whole)
    if without is None or program.hopeless:
        return BudgetRelaxation(None, np.inf)
    program.bound_total(low=int(without.bound / unit - program.lost))  # else the engine goes on at its optimum
    least = program.solve(program.slack_costs, end - time.perf_counter())
    if least.infeasible:
        return BudgetRelaxation(None, np.inf)
    bound = float(max((program.lost + least.bound) * unit, without.bound))
    if least.assignment is None:
        return BudgetRelaxation(None, bound)
    program.bound_total(high=least.total)
    now = time.perf_counter()
    left = min(end - now, max(now - start, _SHORTEST))
    best = program.solve(program.objective(), left) if left > 0 else least
    return BudgetRelaxation(least.assignment if best.assignment is None else best.assignment, bound)


class _Found(NamedTuple):
    assignment: Assignment | None
    total: int  # the weight of what gives way
    bound: Fraction
    infeasible: bool


class _Program:
    """Pairs that fit the budgets alone, then what gives way, then the steps of the load penalty."""

    def __init__(self, problem: AssignmentProblem, network: AssignmentProblem, weights: Mapping[str, int]) -> None:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array, hstack

        n, m = problem.shape
        # Bounds that give way are none of the engine's.
        free = problem.replace(eligible=network.eligible, load_min=0, load_max=n)
        self._problem, self._pairs = free, eligible_pairs(free)
        size = len(self._pairs.clients)
        self._scores, self._steps, _ = engine_costs(free, self._pairs, clipped_bounds(free))
        self.lost, self.hopeless = Fraction(0), False
        rows, lows, highs, costs, tops, columns = [], [], [], [], [], []
        first = 0
        for family in _families(network, self._pairs):
            count = len(family.low)
            reach = np.bincount(family.rows, minlength=count)
            low, high = np.minimum(family.low, reach), np.minimum(family.high, reach)
            beyond = total_above(family.low, reach)
            self.hopeless |= bool(beyond) and family.names[0] not in weights
            self.lost += weights.get(family.names[0], 0) * beyond
            for name, sign, top in zip(family.names, (1, -1), (low, reach - high), strict=True):
                at = np.flatnonzero(top) if name in weights else np.zeros(0, dtype=np.int64)
                columns.append(np.stack([first + at, np.full(len(at), sign)]))
                costs.append(np.full(len(at), weights.get(name, 0)))
                tops.append(top[at])
            rows.append(first + family.rows)
            lows.append(low)
            highs.append(high)
            first += count
        at, signs = np.concatenate(columns, axis=1)
        weight, self._tops = np.concatenate(costs), np.concatenate(tops)
        self._weight = weight
        counted = csr_array(
            (np.ones(size * len(rows)), (np.concatenate(rows), np.tile(np.arange(size), len(rows)))),
            shape=(first, size),
        )
        slack = csr_array((signs.astype(float), (at, np.arange(len(at)))), shape=(first, len(at)))
        steps = csr_array((first, len(self._steps.sizes)))
        matrix = hstack([counted, slack, steps], format="csr")
        self._rows = [LinearConstraint(matrix, np.concatenate(lows), np.concatenate(highs))]
        if len(self._steps.sizes):
            loads = csr_array((np.ones(size), (self._pairs.experts, np.arange(size))), shape=(m, size))
            empty = csr_array((m, len(at)))
            self._rows.append(
                LinearConstraint(hstack([loads, empty, -step_columns(self._steps, m)], format="csr"), 0, 0)
            )
        budgets = budget_rows(free, self._pairs, whole=False)
        if budgets.limits:
            self._add(budgets.matrix(size), np.array(budgets.limits))

    @property
    def slack_costs(self) -> FloatArray:
        """Costs of the first program: the weights of what gives way."""
        return self._costs(np.zeros(len(self._scores)), self._weight, np.zeros(len(self._steps.sizes)))

    def objective(self) -> FloatArray:
        """Return the costs of the second program: the desirability, with a minus, and the load penalty."""
        return self._costs(-self._scores, np.zeros(len(self._weight)), self._steps.costs)

    def _costs(self, *parts: Any) -> FloatArray:
        return np.concatenate([part.astype(np.float64) for part in parts])

    def _add(self, pair_rows: Any, limits: Any) -> None:
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array, hstack

        rest = csr_array((pair_rows.shape[0], len(self._weight) + len(self._steps.sizes)))
        self._rows.append(LinearConstraint(hstack([pair_rows, rest], format="csr"), -np.inf, limits))

    def bound_total(self, *, low: int = 0, high: float = np.inf) -> None:
        """Let at least, or at most, this weight give way in all."""
        from scipy.optimize import LinearConstraint

        if low > 0 or np.isfinite(high):
            # Totals are whole: half a unit more is none more, and leaves room for the engine's tolerances.
            self._rows.append(LinearConstraint(self.slack_costs[None, :], low, high + 0.5))

    def solve(self, costs: FloatArray, seconds: float) -> _Found:
        """Solve, until what is found keeps the budgets to the certificate's tolerance."""
        from scipy.optimize import Bounds, milp
        from scipy.sparse import csr_array

        if not len(costs):  # nothing to take, and nothing to lack: the engine refuses a program without variables
            return _Found(Assignment.from_pairs([], [], self._problem.shape), 0, Fraction(0), infeasible=False)
        size, slack = len(self._scores), len(self._weight)
        whole = np.repeat([1, 0], [size, len(costs) - size])
        most = np.concatenate([np.ones(size), self._tops, self._steps.sizes])
        found: list[Any] = []

        def once(left: float | None) -> None:
            options: dict[str, Any] = {"mip_rel_gap": 0.0, "time_limit": seconds if left is None else left}
            found.append(
                milp(costs, integrality=whole, bounds=Bounds(0, most), constraints=self._rows, options=options)
            )

        def read() -> Assignment | None:
            if found[-1].x is None:
                return None
            chosen = found[-1].x[:size] > 0.5
            return Assignment.from_pairs(
                self._pairs.clients[chosen], self._pairs.experts[chosen], self._problem.shape
            )

        def exclude(client: int, experts: IntArray) -> None:
            row = csr_array([(self._pairs.clients == client) & np.isin(self._pairs.experts, experts)], dtype=float)
            self._add(row, len(experts) - 1)

        kept = Covers(self._problem).enforce(once, read, exclude, seconds)
        if not found or found[-1].status == _INFEASIBLE:
            return _Found(None, 0, Fraction(0), infeasible=bool(found))
        dual = found[-1].mip_dual_bound
        # Totals are whole: so is what is proved of them.
        bound = Fraction(0) if dual is None or not np.isfinite(dual) else Fraction(int(np.ceil(dual - 1e-6)))
        if not kept or found[-1].x is None:
            return _Found(None, 0, max(Fraction(0), bound), infeasible=False)
        total = round(float(found[-1].x[size : size + slack] @ self._weight))
        return _Found(read(), total, max(Fraction(0), bound), infeasible=False)


def _families(problem: AssignmentProblem, pairs: Pairs) -> list[_Family]:
    families = [
        _Family(pairs.clients, problem.min_experts, problem.capacity, ("min_experts", "capacity")),
        _Family(pairs.experts, problem.load_min, problem.load_max, ("load_min", "load_max")),
    ]
    layers = problem.layers
    if layers is not None:
        low, high = layers.bounds_of(slice(0, problem.n_clients), problem.n_clients)
        rows = pairs.clients * layers.n_layers + layers.layer_of[pairs.experts]
        families.append(_Family(rows, low.reshape(-1), high.reshape(-1), ("layer_min", "layer_max")))
    return families
