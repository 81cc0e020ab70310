"""What the loads cost beyond their lower bounds, in steps of constant cost: arcs or columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solvers._budget_rows import engine_scores, rounded_claim
from fedmoe_sched.solvers._matrix import Bounds, Pairs, largest_cost, unit_scores

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = [
    "NO_STEPS",
    "LoadSteps",
    "engine_bound",
    "engine_costs",
    "load_sides",
    "load_steps",
    "paid_anyway",
    "step_columns",
]

#: With budgets what an engine ends with stays; gaps of engines end at 1e-6, whatever is asked.
_BRANCHING_SCALE = 1e4


class LoadSteps(NamedTuple):
    """Steps of the loads, expert by expert and never falling in cost; parallel arrays.

    An optimal flow takes the cheap steps of an expert first, because its costs are convex; the clients up to
    ``load_min`` are paid for in any case, and have no step.
    """

    experts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]


#: Of an integer program whose loads cost nothing: their bounds are rows.
NO_STEPS = LoadSteps(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))


def load_steps(problem: AssignmentProblem, bounds: Bounds, scale: float | None = None) -> LoadSteps:
    """List the steps of each load between its bounds.

    Parameters
    ----------
    problem : AssignmentProblem
    bounds : Bounds
        Of the same problem.
    scale : float, optional
        Costs are multiples of `largest_cost`, or with a scale whole multiples of that, divided by the scale.

    Returns
    -------
    LoadSteps
        Equal costs in a row are one step; without a penalty there is one step per expert, which costs nothing.
    """
    room = bounds.expert_max - bounds.expert_min
    if problem.load_penalty is None:
        return LoadSteps(np.arange(len(room)), room, np.zeros(len(room)))
    experts = np.repeat(np.arange(len(room)), room)
    first = np.cumsum(room) - room
    loads = np.arange(1, len(experts) + 1) + (bounds.expert_min - first)[experts]
    costs = problem.load_penalty.marginal_of(experts, loads) / (largest_cost(problem) or 1.0)
    if scale is not None:
        costs = np.rint(costs * scale)
    begins = np.ones(len(experts), dtype=np.bool_)
    begins[1:] = (experts[1:] != experts[:-1]) | (costs[1:] != costs[:-1])
    at = np.flatnonzero(begins)
    return LoadSteps(experts[at], np.diff(at, append=len(experts)), costs[at])


def step_columns(steps: LoadSteps, n_experts: int) -> csr_array[Any, Any]:
    """Return which expert each step is of; shape (m, steps), one 1 per column."""
    from scipy.sparse import csr_array

    size = len(steps.experts)
    return csr_array((np.ones(size), (steps.experts, np.arange(size))), shape=(n_experts, size))


def load_sides(bounds: Bounds, steps: LoadSteps) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return both sides of the experts' rows: pairs less steps, whose sizes keep the upper bounds."""
    high = bounds.expert_max.copy()
    high[steps.experts] = bounds.expert_min[steps.experts]
    return bounds.expert_min, high


def paid_anyway(problem: AssignmentProblem) -> float:
    """Return the penalty of the lower bounds of the loads, which no step holds; 0 without a penalty."""
    if problem.load_penalty is None:
        return 0.0
    return float(problem.load_penalty.total(np.minimum(problem.load_min, problem.n_clients)).sum())


def engine_costs(
    problem: AssignmentProblem, pairs: Pairs, bounds: Bounds
) -> tuple[npt.NDArray[np.float64], LoadSteps, float]:
    """Return scores and steps on the scale that suits an engine for integer programs.

    The steps may be continuous variables: with whole loads the cheapest steps are whole too, because they are
    filled in order.

    Parameters
    ----------
    problem : AssignmentProblem
    pairs : Pairs
        The variables.
    bounds : Bounds
        That the program is made with.

    Returns
    -------
    scores : ndarray, shape (pairs,), float64
    steps : LoadSteps
        `NO_STEPS` without a load penalty.
    unit : float
        ``scores * unit`` is the desirability.
    """
    if problem.load_penalty is None:
        scores, unit = engine_scores(problem, pairs)
        return scores, NO_STEPS, unit
    scores, unit = unit_scores(problem, pairs)
    steps = load_steps(problem, bounds)
    if not problem.budgets:
        return scores, steps, unit
    scaled = steps._replace(costs=steps.costs * _BRANCHING_SCALE)
    return scores * _BRANCHING_SCALE, scaled, unit / _BRANCHING_SCALE


def engine_bound(problem: AssignmentProblem, bound: float) -> float:
    """Turn an engine's bound on scores less steps, in units of desirability, into one on the objective."""
    if problem.load_penalty is None:
        return rounded_claim(problem, bound)
    return bound - paid_anyway(problem)
