"""The integer program by OR-Tools CP-SAT."""

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
from fedmoe_sched.solvers._budget_rows import budget_rows, has_whole_scores
from fedmoe_sched.solvers._layer_rows import layer_rows
from fedmoe_sched.solvers._load_steps import load_sides
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs
from fedmoe_sched.solvers._rounding import completed_answer, unrounded_bound, whole_costs

__all__ = ["CpSat"]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    pairs: Pairs
    unit: float
    program: Any
    engine: Any
    status: Any = None


class CpSat(Solver[_Model]):
    """Exact constraint programming and branch and bound with OR-Tools CP-SAT.

    Desirability is rounded to whole numbers, which is all the engine takes; improving cycles that the rounding
    hid are cancelled after a completed run, and the bound of an interrupted one has the rounding error added. With
    budgets there are no such cycles: scores that are no whole numbers are rounded far more finely, and the
    rounding error is added to every bound. Sizes become whole numbers too; where they are none, they are rounded
    down so little that whatever fits still fits, and no answer exceeds a budget by more than the certificate
    forgives. Of a load penalty every step of a load is an integer variable, whose cost is rounded like the scores.
    One thread unless ``Limits.threads`` asks for more: answers repeat exactly, and on this problem, whose linear
    relaxation is integral, a second thread mostly repeats the work of the first. With several threads equally
    good answers may differ from run to run. The engine looks at the clock between the steps of its presolve, which
    is left out where clients with budgets have to take experts: there it calls some problems infeasible that are
    not (OR-Tools 9.15), and takes longer.
    """

    name: ClassVar[str] = "ilp-ortools"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.LOAD_PENALTY,
        Capability.BUDGETS,
        Capability.LAYERS,
        Capability.PRICES,
        Capability.TIME_LIMIT,
        Capability.THREADS,
    }
    requires: ClassVar[tuple[str, ...]] = ("ortools",)
    summary: ClassVar[str] = "integer program (OR-Tools CP-SAT); shows its best assignment at a time limit"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Make one Boolean per eligible pair, one linear constraint per client, expert, and layer of a client."""
        from ortools.sat.python import cp_model

        network = network_relaxation(problem)
        pairs = eligible_pairs(network)
        bounds = clipped_bounds(network)
        scores, steps, unit = whole_costs(problem, pairs, bounds)
        program = cp_model.CpModel()
        takes = np.array([program.new_bool_var("") for _ in range(len(pairs.clients))], dtype=object)
        used = np.array([program.new_int_var(0, size, "") for size in steps.sizes.tolist()], dtype=object)
        clients = _sums(takes, pairs.clients, len(bounds.client_min))
        loads = _sums(takes, pairs.experts, len(bounds.expert_min))
        beyond = _sums(used, steps.experts, len(bounds.expert_min))
        rows = [*clients, *(load - more for load, more in zip(loads, beyond, strict=True))]
        low, high = load_sides(bounds, steps)
        sides = np.concatenate([[bounds.client_min, bounds.client_max], [low, high]], axis=1).T.tolist()
        for row, (least, most) in zip(rows, sides, strict=True):
            program.add_linear_constraint(row, least, most)
        if problem.layers is not None:
            layers = layer_rows(network, pairs)
            rows = _sums(takes, layers.rows, len(layers.low))
            for row, least, most in zip(rows, layers.low.tolist(), layers.high.tolist(), strict=True):
                program.add_linear_constraint(row, least, most)
        budgets = budget_rows(problem, pairs, whole=True)
        for numbers, sizes, limit in zip(*budgets[:3], strict=True):
            taken = cp_model.LinearExpr.weighted_sum(takes[numbers].tolist(), sizes.astype(np.int64).tolist())
            program.add_linear_constraint(taken, 0, int(limit))
        weights = [*scores.tolist(), *(-steps.costs).astype(np.int64).tolist()]
        program.maximize(cp_model.LinearExpr.weighted_sum([*takes.tolist(), *used.tolist()], weights))
        return _Model(problem, pairs, unit, program, _engine(problem, limits))

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve within the limits."""
        model.status = model.engine.solve(model.program)

    def read(self, model: _Model) -> Answer:
        """Read the assignment, and the bound where the run was interrupted."""
        from ortools.sat.python import cp_model

        problem, engine = model.problem, model.engine
        if model.status == cp_model.INFEASIBLE:
            return Answer(StopReason.PROVED_INFEASIBLE)
        if model.status not in {cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN}:
            return Answer(StopReason.FAILED, message=engine.status_name(model.status))
        if model.status == cp_model.UNKNOWN:
            # No bound either: before its first solution the engine may report 0, whatever the scores.
            return Answer(StopReason.TIME_LIMIT)
        chosen = np.array(engine.response_proto.solution, dtype=np.int64)[: len(model.pairs.clients)] > 0
        assignment = Assignment.from_pairs(model.pairs.clients[chosen], model.pairs.experts[chosen], problem.shape)
        bound = engine.best_objective_bound
        if not problem.budgets or problem.load_penalty is not None or not has_whole_scores(problem):
            bound = unrounded_bound(problem, bound, model.unit)
        if model.status == cp_model.OPTIMAL:
            return completed_answer(problem, assignment, bound)
        return Answer(StopReason.TIME_LIMIT, assignment, bound=bound)


def _sums(variables: npt.NDArray[np.object_], side: npt.NDArray[np.int64], size: int) -> list[Any]:
    """Sum the variables of each client, or expert; `side` says to which one each of them belongs."""
    from ortools.sat.python import cp_model

    by_side = np.argsort(side, kind="stable")
    ends = np.cumsum(np.bincount(side, minlength=size))[:-1]
    return [cp_model.LinearExpr.sum(group.tolist()) for group in np.split(variables[by_side], ends)]


def _engine(problem: AssignmentProblem, limits: Limits) -> Any:
    from ortools.sat.python import cp_model

    engine = cp_model.CpSolver()
    engine.parameters.num_workers = limits.threads or 1
    engine.parameters.random_seed = limits.seed
    engine.parameters.relative_gap_limit = 0.0
    engine.parameters.absolute_gap_limit = 0.0
    if problem.budgets and (problem.layers is not None or problem.min_experts.any()):
        engine.parameters.cp_model_presolve = False
    if limits.time is not None:
        engine.parameters.max_time_in_seconds = limits.time
    return engine
