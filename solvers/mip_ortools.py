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
from fedmoe_sched.solvers._budget_rows import BudgetRows, Covers, budget_rows
from fedmoe_sched.solvers._layer_rows import LayerRows, layer_rows
from fedmoe_sched.solvers._load_steps import LoadSteps, engine_bound, engine_costs, load_sides, step_columns
from fedmoe_sched.solvers._matrix import Bounds, Pairs, clipped_bounds, eligible_pairs, incidence
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
        takes = list(self.program.variables())[: len(self.pairs.clients)]  # the others are steps of the loads
        values = np.array(self.result.variable_values(takes))
        chosen = values > 0.5
        return Assignment.from_pairs(self.pairs.clients[chosen], self.pairs.experts[chosen], self.problem.shape)


class OrToolsMIP(Solver[_Model]):
    """Exact branch, cut and price with SCIP, through OR-Tools MathOpt.

    What the tolerances of the engine leave is recovered by cancelling improving cycles after a completed run. With
    budgets its bound is the backend's word, and answers that exceed a budget within the engine's tolerance are
    excluded by a row of their own. With a load penalty each expert has a continuous variable for every step in the
    cost of its load.
    SCIP works in one thread, and looks at the clock between the steps of its presolve.
    """

    name: ClassVar[str] = "mip-ortools"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.LOAD_PENALTY,
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
        bounds = clipped_bounds(network)
        scores, steps, unit = engine_costs(problem, pairs, bounds)
        budgets = budget_rows(problem, pairs, whole=False)
        layers = layer_rows(network, pairs)
        matrix = _matrix(network, pairs, steps, layers, budgets)
        message = _program(scores, steps, matrix, *_sides(bounds, steps, layers, budgets))
        program = mathopt.Model.from_model_proto(message)
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
        bound = engine_bound(model.problem, end.objective_bounds.dual_bound * model.unit)
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


def _matrix(
    problem: AssignmentProblem, pairs: Pairs, steps: LoadSteps, layers: LayerRows, budgets: BudgetRows
) -> Any:
    """Return the rows of clients, experts, layers and budgets over pairs and steps, as sparse coordinates."""
    from scipy.sparse import block_array, csr_array

    n, m = problem.shape
    takes = incidence(problem, pairs)
    size = len(steps.experts)
    blocks = [
        [takes[:n], csr_array((n, size))],
        [takes[n:], -step_columns(steps, m)],
        [layers.matrix(), None],
        [budgets.matrix(len(pairs.clients)), None],
    ]
    return block_array(blocks, format="csr").tocoo()


def _sides(
    bounds: Bounds, steps: LoadSteps, layers: LayerRows, budgets: BudgetRows
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the least and the most of each row of the matrix."""
    load_min, load_max = load_sides(bounds, steps)
    limits = np.array(budgets.limits)
    low = np.concatenate([bounds.client_min, load_min, layers.low, np.full_like(limits, -np.inf)])
    return low, np.concatenate([bounds.client_max, load_max, layers.high, limits])


def _program(
    scores: npt.NDArray[np.float64],
    steps: LoadSteps,
    matrix: Any,
    low: npt.NDArray[np.float64],
    high: npt.NDArray[np.float64],
) -> Any:
    """Return the program as MathOpt's message; variables are pairs, then steps."""
    from ortools.math_opt import model_pb2

    program = model_pb2.ModelProto()
    variables, rows = program.variables, program.linear_constraints
    variables.ids.extend(range(len(scores) + len(steps.sizes)))
    variables.lower_bounds.extend(np.zeros(len(scores) + len(steps.sizes)))
    variables.upper_bounds.extend(np.concatenate([np.ones(len(scores)), steps.sizes]))
    variables.integers.extend([True] * len(scores) + [False] * len(steps.sizes))
    gains = np.concatenate([scores, -steps.costs])
    used = np.flatnonzero(gains)  # the message must not hold zeros
    program.objective.maximize = True
    program.objective.linear_coefficients.ids.extend(used)
    program.objective.linear_coefficients.values.extend(gains[used])
    rows.ids.extend(range(matrix.shape[0]))
    rows.lower_bounds.extend(low)
    rows.upper_bounds.extend(high)
    program.linear_constraint_matrix.row_ids.extend(matrix.row)
    program.linear_constraint_matrix.column_ids.extend(matrix.col)
    program.linear_constraint_matrix.coefficients.extend(matrix.data)
    return program
