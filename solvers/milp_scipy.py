"""The integer program by SciPy's HiGHS: branch and cut, without a package beyond SciPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._budget_rows import Covers, budget_rows
from fedmoe_sched.solvers._layer_rows import layer_rows
from fedmoe_sched.solvers._load_steps import LoadSteps, engine_bound, engine_costs, load_sides, step_columns
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs, incidence
from fedmoe_sched.solvers._rounding import completed_answer

__all__ = ["SciPyMILP"]

# Statuses of scipy.optimize.OptimizeResult.
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    pairs: Pairs
    scores: npt.NDArray[np.float64]
    steps: LoadSteps  # their variables follow those of the pairs
    unit: float
    rows: list[Any]
    result: Any = None
    kept: bool = True  # whether the last assignment keeps the budgets to the certificate's tolerance

    def widened(self, rows: Any) -> Any:
        """Return rows over the pairs as rows over all variables."""
        from scipy.sparse import csr_array, hstack

        return hstack([rows, csr_array((rows.shape[0], len(self.steps.sizes)))], format="csr")

    def assignment(self) -> Assignment | None:
        """Return the best assignment found, if there is one."""
        if self.result is None or self.result.x is None:
            return None
        chosen = self.result.x[: len(self.pairs.clients)] > 0.5
        return Assignment.from_pairs(self.pairs.clients[chosen], self.pairs.experts[chosen], self.problem.shape)


class SciPyMILP(Solver[_Model]):
    """Exact branch and cut with `scipy.optimize.milp` (HiGHS).

    Without budgets what the tolerances of the engine leave is recovered by cancelling improving cycles. With
    budgets its bound is the backend's word, and answers that exceed a budget within the engine's tolerance are
    excluded by a row of their own. With a load penalty each expert has a continuous variable for every step in the
    cost of its load.
    """

    name: ClassVar[str] = "milp-scipy"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.LOAD_PENALTY,
        Capability.BUDGETS,
        Capability.LAYERS,
        Capability.PRICES,
        Capability.TIME_LIMIT,
    }
    requires: ClassVar[tuple[str, ...]] = ("scipy",)
    summary: ClassVar[str] = "integer program (SciPy HiGHS); takes budgets, shows its best at a time limit"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Make the sparse rows: clients and experts, layers, budgets."""
        from scipy.optimize import LinearConstraint
        from scipy.sparse import csr_array, hstack, vstack

        network = network_relaxation(problem)
        pairs = eligible_pairs(network)
        bounds = clipped_bounds(network)
        scores, steps, unit = engine_costs(problem, pairs, bounds)
        load_min, load_max = load_sides(bounds, steps)
        low = np.concatenate([bounds.client_min, load_min]).astype(np.float64)
        high = np.concatenate([bounds.client_max, load_max]).astype(np.float64)
        model = _Model(problem, pairs, scores, steps, unit, [])
        n, m = problem.shape
        columns = vstack([csr_array((n, len(steps.sizes))), -step_columns(steps, m)])
        model.rows.append(LinearConstraint(hstack([incidence(network, pairs), columns], format="csr"), low, high))
        if problem.layers is not None:
            layers = layer_rows(network, pairs)
            model.rows.append(LinearConstraint(model.widened(layers.matrix()), layers.low, layers.high))
        budgets = budget_rows(problem, pairs, whole=False)
        if budgets.limits:
            rows = budgets.matrix(len(pairs.clients))
            model.rows.append(LinearConstraint(model.widened(rows), -np.inf, np.array(budgets.limits)))
        return model

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve within the limits."""
        if not len(model.pairs.clients):
            return  # the engine refuses a program without variables

        def solve(seconds: float | None) -> None:
            model.result = _solve(model, seconds)

        def exclude(client: int, experts: npt.NDArray[np.int64]) -> None:
            from scipy.optimize import LinearConstraint
            from scipy.sparse import csr_array

            row = csr_array([(model.pairs.clients == client) & np.isin(model.pairs.experts, experts)], dtype=float)
            model.rows.append(LinearConstraint(model.widened(row), -np.inf, len(experts) - 1))

        model.kept = Covers(model.problem).enforce(solve, model.assignment, exclude, limits.time)

    def read(self, model: _Model) -> Answer:
        """Read the assignment and the bound."""
        problem, result = model.problem, model.result
        if result is None:
            return _without_pairs(problem)
        message = str(result.message)
        if result.status == _INFEASIBLE:
            return Answer(StopReason.PROVED_INFEASIBLE, message=message)
        if result.status not in {_OPTIMAL, _LIMIT}:
            return Answer(StopReason.FAILED, message=message)
        dual = result.mip_dual_bound
        bound = None if dual is None or not np.isfinite(dual) else engine_bound(problem, -dual * model.unit)
        assignment = model.assignment() if model.kept else None
        if result.status == _LIMIT or assignment is None:
            return Answer(StopReason.TIME_LIMIT, assignment, bound=bound, message=message)
        return completed_answer(problem, assignment, bound)


def _solve(model: _Model, seconds: float | None) -> Any:
    from scipy.optimize import Bounds, milp

    options: dict[str, Any] = {"mip_rel_gap": 0.0}
    if seconds is not None:
        options["time_limit"] = seconds
    costs = np.concatenate([-model.scores, model.steps.costs])
    most = np.concatenate([np.ones(len(model.scores)), model.steps.sizes])
    whole = np.repeat([1, 0], [len(model.scores), len(model.steps.sizes)])
    return milp(costs, integrality=whole, bounds=Bounds(0, most), constraints=model.rows, options=options)


def _without_pairs(problem: AssignmentProblem) -> Answer:
    """Nothing is eligible: taking nothing is the only choice, if it is one."""
    if (problem.demands > 0).any() or (problem.load_min > 0).any():
        return Answer(StopReason.PROVED_INFEASIBLE)
    return completed_answer(problem, Assignment.from_pairs([], [], problem.shape), 0.0)
