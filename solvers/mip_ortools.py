"""The mixed-integer program by OR-Tools MathOpt with SCIP."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs, incidence, unit_scores
from fedmoe_sched.solvers._rounding import polished_answer

__all__ = ["OrToolsMIP"]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    pairs: Pairs
    unit: float
    program: Any
    engine: Any
    parameters: Any
    result: Any = None


class OrToolsMIP(Solver[_Model]):
    """Exact branch, cut and price with SCIP, through OR-Tools MathOpt.

    What the tolerances of the engine leave is recovered by cancelling improving cycles after a completed run.
    SCIP works in one thread, and looks at the clock between the steps of its presolve.
    """

    name: ClassVar[str] = "mip-ortools"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {Capability.PRICES, Capability.TIME_LIMIT}
    requires: ClassVar[tuple[str, ...]] = ("ortools",)
    summary: ClassVar[str] = "mixed-integer program (OR-Tools MathOpt, SCIP); shows its best at a time limit"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Fill the model's arrays in bulk and load them into the engine."""
        from ortools.math_opt.python import mathopt

        pairs = eligible_pairs(problem)
        scores, unit = unit_scores(problem, pairs)
        program = mathopt.Model.from_model_proto(_program(problem, pairs, scores))
        time = None if limits.time is None else datetime.timedelta(seconds=limits.time)
        parameters = mathopt.SolveParameters(
            time_limit=time,
            random_seed=limits.seed,
            relative_gap_tolerance=0.0,
            absolute_gap_tolerance=0.0,
        )
        engine = mathopt.IncrementalSolver(program, mathopt.SolverType.GSCIP)
        return _Model(problem, pairs, unit, program, engine, parameters)

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve within the limits."""
        model.result = model.engine.solve(params=model.parameters)

    def read(self, model: _Model) -> Answer:
        """Read the assignment, and the bound where the run was interrupted."""
        from ortools.math_opt.python import mathopt

        end = model.result.termination
        if end.reason in {
            mathopt.TerminationReason.INFEASIBLE,
            mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED,  # no objective over binaries is unbounded
        }:
            return Answer(StopReason.PROVED_INFEASIBLE)
        bound = end.objective_bounds.dual_bound * model.unit
        finite_bound = bound if math.isfinite(bound) else None
        if end.reason == mathopt.TerminationReason.NO_SOLUTION_FOUND:
            return Answer(StopReason.TIME_LIMIT, bound=finite_bound, message=end.detail)
        if not model.result.has_primal_feasible_solution():
            return Answer(StopReason.FAILED, message=f"{end.reason.name} {end.detail}".strip())
        values = np.array(model.result.variable_values(list(model.program.variables())))
        chosen = values > 0.5
        assignment = Assignment.from_pairs(
            model.pairs.clients[chosen], model.pairs.experts[chosen], model.problem.shape
        )
        if end.reason == mathopt.TerminationReason.OPTIMAL:
            return polished_answer(model.problem, assignment)
        return Answer(StopReason.TIME_LIMIT, assignment, bound=finite_bound, message=end.detail)


def _program(problem: AssignmentProblem, pairs: Pairs, scores: npt.NDArray[np.float64]) -> Any:
    """Return the program as MathOpt's message; variable k is pair k, rows are clients, then experts."""
    from ortools.math_opt import model_pb2

    n, m = problem.shape
    size = len(pairs.clients)
    bounds = clipped_bounds(problem)
    program = model_pb2.ModelProto()
    variables, rows = program.variables, program.linear_constraints
    variables.ids.extend(range(size))
    variables.lower_bounds.extend(np.zeros(size))
    variables.upper_bounds.extend(np.ones(size))
    variables.integers.extend([True] * size)
    used = np.flatnonzero(scores)  # the message must not hold zeros
    program.objective.maximize = True
    program.objective.linear_coefficients.ids.extend(used)
    program.objective.linear_coefficients.values.extend(scores[used])
    rows.ids.extend(range(n + m))
    rows.lower_bounds.extend(np.concatenate([bounds.client_min, bounds.expert_min]).astype(np.float64))
    rows.upper_bounds.extend(np.concatenate([bounds.client_max, bounds.expert_max]).astype(np.float64))
    matrix = incidence(problem, pairs).tocoo()
    program.linear_constraint_matrix.row_ids.extend(matrix.row)
    program.linear_constraint_matrix.column_ids.extend(matrix.col)
    program.linear_constraint_matrix.coefficients.extend(matrix.data)
    return program
