"""The mixed-integer program by OR-Tools MathOpt with SCIP."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._budget_rows import BudgetRows, Covers, budget_rows, engine_scores, rounded_claim
from fedmoe_sched.solvers._layer_rows import layer_rows
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs, incidence
from fedmoe_sched.solvers._rounding import completed_answer

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
    kept: bool = True  # whether the last assignment keeps the budgets to the certificate's tolerance

    def assignment(self) -> Assignment | None:
        """Return the best assignment found, if there is one."""
        if not self.result.has_primal_feasible_solution():
            return None
        values = np.array(self.result.variable_values(list(self.program.variables())))
        chosen = values > 0.5
        return Assignment.from_pairs(self.pairs.clients[chosen], self.pairs.experts[chosen], self.problem.shape)


class OrToolsMIP(Solver[_Model]):
    """Exact branch, cut and price with SCIP, through OR-Tools MathOpt.

    What the tolerances of the engine leave is recovered by cancelling improving cycles after a completed run. With
    budgets its bound is the backend's word, and answers that exceed a budget within the engine's tolerance are
    excluded by a row of their own.
    SCIP works in one thread, and looks at the clock between the steps of its presolve.
    """

    name: ClassVar[str] = "mip-ortools"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.BUDGETS,
        Capability.LAYERS,
        Capability.PRICES,
        Capability.TIME_LIMIT,
    }
    requires: ClassVar[tuple[str, ...]] = ("ortools",)
    summary: ClassVar[str] = "mixed-integer program (OR-Tools MathOpt, SCIP); shows its best at a time limit"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Fill the model's arrays in bulk and load them into the engine."""
        from ortools.math_opt.python import mathopt

        network = network_relaxation(problem)
        pairs = eligible_pairs(network)
        scores, unit = engine_scores(problem, pairs)
        budgets = budget_rows(problem, pairs, whole=False)
        program = mathopt.Model.from_model_proto(_program(network, pairs, scores, budgets))
        parameters = mathopt.SolveParameters(
            random_seed=limits.seed,
            relative_gap_tolerance=0.0,
            absolute_gap_tolerance=0.0,
        )
        engine = mathopt.IncrementalSolver(program, mathopt.SolverType.GSCIP)
        return _Model(problem, pairs, unit, program, engine, parameters)

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve within the limits."""
        variables = list(model.program.variables())

        def solve(seconds: float | None) -> None:
            model.parameters.time_limit = None if seconds is None else datetime.timedelta(seconds=seconds)
            model.result = model.engine.solve(params=model.parameters)

        def exclude(client: int, experts: npt.NDArray[np.int64]) -> None:
            numbers = np.flatnonzero((model.pairs.clients == client) & np.isin(model.pairs.experts, experts))
            row = sum(variables[k] for k in numbers.tolist())
            model.program.add_linear_constraint(row <= len(experts) - 1)

        model.kept = Covers(model.problem).enforce(solve, model.assignment, exclude, limits.time)

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
        if model.problem.budgets:
            bound = rounded_claim(model.problem, bound)
        finite_bound = bound if math.isfinite(bound) else None
        if end.reason == mathopt.TerminationReason.NO_SOLUTION_FOUND:
            return Answer(StopReason.TIME_LIMIT, bound=finite_bound, message=end.detail)
        assignment = model.assignment()
        if assignment is None:
            return Answer(StopReason.FAILED, message=f"{end.reason.name} {end.detail}".strip())
        if not model.kept:
            assignment = None
        elif end.reason == mathopt.TerminationReason.OPTIMAL:
            return completed_answer(model.problem, assignment, finite_bound)
        return Answer(StopReason.TIME_LIMIT, assignment, bound=finite_bound, message=end.detail)


def _program(
    problem: AssignmentProblem, pairs: Pairs, scores: npt.NDArray[np.float64], budgets: BudgetRows
) -> Any:
    """Return the program as MathOpt's message; variable k is pair k; rows: clients, experts, layers, budgets."""
    from ortools.math_opt import model_pb2
    from scipy.sparse import vstack

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
    layers, limits = layer_rows(problem, pairs), np.array(budgets.limits)
    rows.ids.extend(range(n + m + len(layers.low) + len(limits)))
    no_limit = np.full_like(limits, -np.inf)
    rows.lower_bounds.extend(np.concatenate([bounds.client_min, bounds.expert_min, layers.low, no_limit]))
    rows.upper_bounds.extend(np.concatenate([bounds.client_max, bounds.expert_max, layers.high, limits]))
    matrix = vstack([incidence(problem, pairs), layers.matrix(), budgets.matrix(size)], format="csr").tocoo()
    program.linear_constraint_matrix.row_ids.extend(matrix.row)
    program.linear_constraint_matrix.column_ids.extend(matrix.col)
    program.linear_constraint_matrix.coefficients.extend(matrix.data)
    return program
