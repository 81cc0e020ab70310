"""The linear program by SciPy's HiGHS: the matrix is totally unimodular, so a vertex is an assignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import OPTIMALITY_GAP, dual_bound, objective
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs, incidence, unit_scores
from fedmoe_sched.solvers._rounding import polished_answer

__all__ = ["SciPyLP"]

# Statuses of scipy.optimize.OptimizeResult.
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    pairs: Pairs
    costs: npt.NDArray[np.float64]
    unit: float
    matrix: Any
    sides: npt.NDArray[np.float64]
    capped: npt.NDArray[np.int64]  # experts with a row for load_max ...
    floored: npt.NDArray[np.int64]  # ... and with one for load_min: the last rows, in this order
    result: Any = None


class SciPyLP(Solver[_Model]):
    """Exact linear programming with `scipy.optimize.linprog` (HiGHS dual simplex).

    The constraint matrix is totally unimodular, so the vertex that a simplex method ends in is an assignment
    (Hoffman and Kruskal 1956). Prices are the duals of the load constraints; where the tolerances of the
    engine leave a gap, improving cycles are cancelled and the prices recovered from the answer. A simplex method
    has no assignment to show before it ends: at a time limit there is none.
    """

    name: ClassVar[str] = "lp-scipy"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {Capability.PRICES, Capability.TIME_LIMIT}
    requires: ClassVar[tuple[str, ...]] = ("scipy",)
    summary: ClassVar[str] = "linear program (SciPy HiGHS simplex); exact, with the duals as prices"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Make the sparse matrix: one row per client and expert and side on which a bound can bite."""
        from scipy.sparse import vstack

        n = problem.n_clients
        pairs = eligible_pairs(problem)
        bounds = clipped_bounds(problem)
        takes = incidence(problem, pairs)
        client_rows, expert_rows = takes[:n], takes[n:]
        needy = np.flatnonzero(bounds.client_min > 0)
        capped = np.flatnonzero(bounds.expert_max < np.bincount(pairs.experts, minlength=problem.n_experts))
        floored = np.flatnonzero(bounds.expert_min > 0)
        matrix = vstack(
            [client_rows, -client_rows[needy], expert_rows[capped], -expert_rows[floored]], format="csr"
        )
        sides = [
            bounds.client_max,
            -bounds.client_min[needy],
            bounds.expert_max[capped],
            -bounds.expert_min[floored],
        ]
        scores, unit = unit_scores(problem, pairs)
        right = np.concatenate(sides).astype(np.float64)
        return _Model(problem, pairs, -scores, unit, matrix, right, capped, floored)

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve; the dual simplex, because an interior point would not be a vertex."""
        from scipy.optimize import linprog

        if not len(model.costs):
            return  # the engine refuses a program without variables
        options: dict[str, float] = {} if limits.time is None else {"time_limit": limits.time}
        model.result = linprog(
            model.costs, A_ub=model.matrix, b_ub=model.sides, bounds=(0, 1), method="highs-ds", options=options
        )

    def read(self, model: _Model) -> Answer:
        """Read the vertex and the duals."""
        problem, result = model.problem, model.result
        if result is None:
            return _without_pairs(model)
        if result.status != _OPTIMAL:
            reasons = {_LIMIT: StopReason.TIME_LIMIT, _INFEASIBLE: StopReason.PROVED_INFEASIBLE}
            return Answer(reasons.get(result.status, StopReason.FAILED), message=str(result.message))
        chosen = result.x > 0.5
        assignment = Assignment.from_pairs(model.pairs.clients[chosen], model.pairs.experts[chosen], problem.shape)
        prices = _prices(model)
        slack = dual_bound(problem, prices) - objective(problem, assignment)
        # Relative to the scores, however small they are: an engine's tolerance may leave more than rounding.
        if slack <= OPTIMALITY_GAP * max(model.unit, abs(objective(problem, assignment))):
            return Answer(StopReason.COMPLETED, assignment, prices)
        return polished_answer(problem, assignment)


def _without_pairs(model: _Model) -> Answer:
    """Nothing is eligible: taking nothing is the only choice, if it is one."""
    if (model.sides < 0).any():
        return Answer(StopReason.PROVED_INFEASIBLE)
    problem = model.problem
    nothing = Assignment.from_pairs([], [], problem.shape)
    return Answer(StopReason.COMPLETED, nothing, np.zeros(problem.n_experts))


def _prices(model: _Model) -> npt.NDArray[np.float64]:
    """Prices from the duals of a minimisation with rows <=, which are <= 0 by SciPy's convention."""
    duals = np.asarray(model.result.ineqlin.marginals, dtype=np.float64)
    at_floor = len(duals) - len(model.floored)
    at_cap = at_floor - len(model.capped)
    prices = np.zeros(model.problem.n_experts)
    prices[model.capped] -= duals[at_cap:at_floor]
    prices[model.floored] += duals[at_floor:]
    return prices * model.unit
