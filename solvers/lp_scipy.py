"""The linear program by SciPy's HiGHS: the matrix is totally unimodular, so a vertex is an assignment."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import OPTIMALITY_GAP, dual_bound, objective
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._layer_rows import layer_rows
from fedmoe_sched.solvers._load_steps import LoadSteps, load_steps, step_columns
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
    most: npt.NDArray[np.int64]  # of each variable: the pairs, then the steps of the loads
    balance: Any = None  # with a load penalty, an equation per expert: its load is load_min plus its steps
    result: Any = None


class SciPyLP(Solver[_Model]):
    """Exact linear programming with `scipy.optimize.linprog` (HiGHS dual simplex).

    The constraint matrix is totally unimodular, so the vertex that a simplex method ends in is an assignment
    (Hoffman and Kruskal 1956). Prices are the duals of the load constraints; where the tolerances of the
    engine leave a gap, improving cycles are cancelled and the prices recovered from the answer. A simplex method
    has no assignment to show before it ends: at a time limit there is none. With a load penalty each expert has a
    variable for every step in the cost of its load: columns of a network, like the rest.
    """

    name: ClassVar[str] = "lp-scipy"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.LAYERS,
        Capability.LOAD_PENALTY,
        Capability.PRICES,
        Capability.TIME_LIMIT,
    }
    requires: ClassVar[tuple[str, ...]] = ("scipy",)
    summary: ClassVar[str] = "linear program (SciPy HiGHS simplex); exact, with the duals as prices"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Make the sparse matrix: one row per client, layer and expert and side on which a bound can bite."""
        from scipy.sparse import vstack

        n, m = problem.shape
        pairs = eligible_pairs(problem)
        bounds = clipped_bounds(problem)
        takes = incidence(problem, pairs)
        client_rows, expert_rows = takes[:n], takes[n:]
        needy = np.flatnonzero(bounds.client_min > 0)
        layers = layer_rows(problem, pairs)
        by_layer = layers.matrix()
        scarce = np.flatnonzero(layers.low > 0)
        bounded = problem.load_penalty is None  # else the steps keep the bounds of the loads
        capped = np.flatnonzero(bounded & (bounds.expert_max < np.bincount(pairs.experts, minlength=m)))
        floored = np.flatnonzero(bounded & (bounds.expert_min > 0))
        matrix = vstack(
            [
                client_rows,
                -client_rows[needy],
                by_layer,
                -by_layer[scarce],
                expert_rows[capped],
                -expert_rows[floored],
            ],
            format="csr",
        )
        sides = [
            bounds.client_max,
            -bounds.client_min[needy],
            layers.high,
            -layers.low[scarce],
            bounds.expert_max[capped],
            -bounds.expert_min[floored],
        ]
        scores, unit = unit_scores(problem, pairs)
        right = np.concatenate(sides).astype(np.float64)
        most = np.ones(len(scores), dtype=np.int64)
        model = _Model(problem, pairs, -scores, unit, matrix, right, capped, floored, most)
        return model if bounded else _with_steps(model, expert_rows, load_steps(problem, bounds))

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve; the dual simplex, because an interior point would not be a vertex."""
        from scipy.optimize import linprog

        if not len(model.pairs.clients):
            return  # the engine refuses a program without variables
        # Presolve finds little in a network. Where many bounds are equations it looks for dependent ones, for up
        # to 1000 s where there is no time limit: minutes with 400 clients and experts, one to one.
        options: dict[str, float] = {"presolve": False}
        if limits.time is not None:
            options["time_limit"] = limits.time
        model.result = linprog(
            model.costs,
            A_ub=model.matrix,
            b_ub=model.sides,
            A_eq=model.balance,
            b_eq=None if model.balance is None else clipped_bounds(model.problem).expert_min,
            bounds=np.stack([np.zeros_like(model.most), model.most], axis=1),
            method="highs-ds",
            options=options,
        )

    def read(self, model: _Model) -> Answer:
        """Read the vertex and the duals."""
        problem, result = model.problem, model.result
        if result is None:
            return _without_pairs(model)
        if result.status != _OPTIMAL:
            reasons = {_LIMIT: StopReason.TIME_LIMIT, _INFEASIBLE: StopReason.PROVED_INFEASIBLE}
            return Answer(reasons.get(result.status, StopReason.FAILED), message=str(result.message))
        chosen = result.x[: len(model.pairs.clients)] > 0.5
        assignment = Assignment.from_pairs(model.pairs.clients[chosen], model.pairs.experts[chosen], problem.shape)
        prices = _prices(model)
        value = objective(problem, assignment)
        scores = model.unit * np.abs(model.costs[: len(chosen)])
        # Relative to the scores, however small they are and whatever the loads cost: an engine's tolerance may
        # leave more than rounding.
        scale = max(float(scores.max()), min(abs(value), float(scores[chosen].sum())))
        if dual_bound(problem, prices) - value <= OPTIMALITY_GAP * scale:
            return Answer(StopReason.COMPLETED, assignment, prices)
        return polished_answer(problem, assignment)


def _with_steps(model: _Model, expert_rows: Any, steps: LoadSteps) -> _Model:
    """Add a variable for every step of the loads, and the equations that tie them to the pairs."""
    from scipy.sparse import csr_array, hstack

    size = len(steps.experts)
    columns = step_columns(steps, expert_rows.shape[0])
    return dataclasses.replace(
        model,
        costs=np.concatenate([model.costs, steps.costs]),
        matrix=hstack([model.matrix, csr_array((model.matrix.shape[0], size))], format="csr"),
        most=np.concatenate([model.most, steps.sizes]),
        balance=hstack([expert_rows, -columns], format="csr"),
    )


def _without_pairs(model: _Model) -> Answer:
    """Nothing is eligible: taking nothing is the only choice, if it is one."""
    problem = model.problem
    if (problem.demands > 0).any() or (problem.load_min > 0).any():
        return Answer(StopReason.PROVED_INFEASIBLE)
    return polished_answer(problem, Assignment.from_pairs([], [], problem.shape))


def _prices(model: _Model) -> npt.NDArray[np.float64]:
    """Prices from the duals of a minimisation; those of rows <= are <= 0 by SciPy's convention."""
    if model.balance is not None:
        steps: npt.NDArray[np.float64] = -np.asarray(model.result.eqlin.marginals, dtype=np.float64) * model.unit
        return steps
    duals = np.asarray(model.result.ineqlin.marginals, dtype=np.float64)
    at_floor = len(duals) - len(model.floored)
    at_cap = at_floor - len(model.capped)
    prices = np.zeros(model.problem.n_experts)
    prices[model.capped] -= duals[at_cap:at_floor]
    prices[model.floored] += duals[at_floor:]
    return prices * model.unit
