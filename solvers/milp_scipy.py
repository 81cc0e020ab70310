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
from fedmoe_sched.solvers._budget_rows import Covers, budget_rows, engine_scores, rounded_claim
from fedmoe_sched.solvers._layer_rows import layer_rows
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
    unit: float
    rows: list[Any]
    result: Any = None
    kept: bool = True  # whether the last assignment keeps the budgets to the certificate's tolerance

    def assignment(self) -> Assignment | None:
        """Return the best assignment found, if there is one."""
        if self.result is None or self.result.x is None:
            return None
        chosen = self.result.x > 0.5
        return Assignment.from_pairs(self.pairs.clients[chosen], self.pairs.experts[chosen], self.problem.shape)


class SciPyMILP(Solver[_Model]):
    """Exact branch and cut with `scipy.optimize.milp` (HiGHS).

    Without budgets what the tolerances of the engine leave is recovered by cancelling improving cycles. With
    budgets its bound is the backend's word, and answers that exceed a budget within the engine's tolerance are
    excluded by a row of their own.
    """

    name: ClassVar[str] = "milp-scipy"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
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

        network = network_relaxation(problem)
        pairs = eligible_pairs(network)
        bounds = clipped_bounds(network)
        scores, unit = engine_scores(problem, pairs)
        low = np.concatenate([bounds.client_min, bounds.expert_min]).astype(np.float64)
        high = np.concatenate([bounds.client_max, bounds.expert_max]).astype(np.float64)
        rows = [LinearConstraint(incidence(network, pairs), low, high)]
        layers = layer_rows(network, pairs)
        if problem.layers is not None:
            rows.append(LinearConstraint(layers.matrix(), layers.low, layers.high))
        budgets = budget_rows(problem, pairs, whole=False)
        if budgets.limits:
            rows.append(LinearConstraint(budgets.matrix(len(pairs.clients)), -np.inf, np.array(budgets.limits)))
        return _Model(problem, pairs, scores, unit, rows)

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve within the limits."""
        if not len(model.pairs.clients):
            return  # the engine refuses a program without variables

        def solve(seconds: float | None) -> None:
            model.result = _solve(model, seconds)

        def exclude(client: int, experts: npt.NDArray[np.int64]) -> None:
            from scipy.optimize import LinearConstraint

            row = ((model.pairs.clients == client) & np.isin(model.pairs.experts, experts)).astype(np.float64)
            model.rows.append(LinearConstraint(row[None, :], -np.inf, len(experts) - 1))

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
        bound = None if dual is None or not np.isfinite(dual) else rounded_claim(problem, -dual * model.unit)
        assignment = model.assignment() if model.kept else None
        if result.status == _LIMIT or assignment is None:
            return Answer(StopReason.TIME_LIMIT, assignment, bound=bound, message=message)
        return completed_answer(problem, assignment, bound)


def _solve(model: _Model, seconds: float | None) -> Any:
    from scipy.optimize import Bounds, milp

    options: dict[str, Any] = {"mip_rel_gap": 0.0}
    if seconds is not None:
        options["time_limit"] = seconds
    whole = np.ones(len(model.scores))
    return milp(-model.scores, integrality=whole, bounds=Bounds(0, 1), constraints=model.rows, options=options)


def _without_pairs(problem: AssignmentProblem) -> Answer:
    """Nothing is eligible: taking nothing is the only choice, if it is one."""
    if (problem.demands > 0).any() or (problem.load_min > 0).any():
        return Answer(StopReason.PROVED_INFEASIBLE)
    return completed_answer(problem, Assignment.from_pairs([], [], problem.shape), 0.0)
