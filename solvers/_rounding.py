"""Whole-number costs for backends that take no others, and the way back to the unrounded optimum."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.exchange import polish
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import Answer
from fedmoe_sched.solvers._budget_rows import has_whole_scores
from fedmoe_sched.solvers._load_steps import NO_STEPS, LoadSteps, load_steps, paid_anyway
from fedmoe_sched.solvers._matrix import Bounds, Pairs, largest_cost, unit_scores

__all__ = [
    "COST_SCALE",
    "FINE_SCALE",
    "fine_costs",
    "fine_scores",
    "polished_answer",
    "unrounded_bound",
    "whole_costs",
    "whole_scores",
    "whole_steps",
]

#: The largest score becomes this whole number: enough for 1e-9 of it, small enough for 64-bit sums.
COST_SCALE = 1e9

#: The same where what rounding hides cannot be mended; engines have room for sums of some million such scores.
FINE_SCALE = 2.0**40

_LARGEST_SUM = 2.0**60  # of all whole costs together: engines refuse objectives that could leave 64 bits


def whole_scores(problem: AssignmentProblem) -> tuple[npt.NDArray[np.int64], float]:
    """Round desirability to whole numbers, on a scale that load penalties share.

    Returns
    -------
    scores : ndarray, shape (n, m), int64
        At most `COST_SCALE` in absolute value.
    unit : float
        ``scores * unit`` is the desirability, to within half a `unit`.
    """
    largest = largest_cost(problem)
    if largest == 0:
        return np.zeros(problem.shape, dtype=np.int64), 0.0
    # Not times COST_SCALE / largest, which overflows for the tiniest scores.
    scores = problem.desirability.astype(np.float64) / largest * COST_SCALE
    return np.rint(scores).astype(np.int64), largest / COST_SCALE


def fine_scores(problem: AssignmentProblem) -> tuple[npt.NDArray[np.int64], float]:
    """Round desirability to whole numbers so finely that it needs no mending; whole scores stay as they are.

    Returns
    -------
    scores : ndarray, shape (n, m), int64
        At most `FINE_SCALE` in absolute value.
    unit : float
        ``scores * unit`` is the desirability, to within half a `unit`.
    """
    if has_whole_scores(problem):
        return problem.desirability.astype(np.int64), 1.0
    largest = problem.largest_score
    scores = problem.desirability.astype(np.float64) / largest * FINE_SCALE
    return np.rint(scores).astype(np.int64), largest / FINE_SCALE


def whole_steps(problem: AssignmentProblem, bounds: Bounds) -> LoadSteps:
    """List the steps of the loads, with whole costs in the unit of `whole_scores`."""
    return load_steps(problem, bounds, COST_SCALE)


def whole_costs(
    problem: AssignmentProblem, pairs: Pairs, bounds: Bounds
) -> tuple[npt.NDArray[np.int64], LoadSteps, float]:
    """Round the desirability of `pairs`, and the steps of the loads, to whole numbers of one unit.

    With budgets, where what rounding hides cannot be mended, they are rounded as finely as 64-bit sums allow.

    Parameters
    ----------
    problem : AssignmentProblem
    pairs : Pairs
    bounds : Bounds

    Returns
    -------
    scores : ndarray, shape (pairs,), int64
    steps : LoadSteps
        With whole costs; `NO_STEPS` without a load penalty.
    unit : float
        ``scores * unit`` is the desirability, to within half a `unit`.
    """
    if problem.budgets and problem.load_penalty is not None:
        return fine_costs(problem, pairs, bounds)
    scores, unit = fine_scores(problem) if problem.budgets else whole_scores(problem)
    steps = NO_STEPS if problem.load_penalty is None else whole_steps(problem, bounds)
    return scores[pairs.clients, pairs.experts], steps, unit


def fine_costs(
    problem: AssignmentProblem, pairs: Pairs, bounds: Bounds
) -> tuple[npt.NDArray[np.int64], LoadSteps, float]:
    """Round scores and steps as finely as 64-bit sums allow, `FINE_SCALE` at most; see `whole_costs`."""
    scores, unit = unit_scores(problem, pairs)
    exact = load_steps(problem, bounds)
    total = float(np.abs(scores).sum() + (exact.sizes * np.abs(exact.costs)).sum())
    scale = min(FINE_SCALE, _LARGEST_SUM / total) if total else FINE_SCALE
    return np.rint(scores * scale).astype(np.int64), load_steps(problem, bounds, scale), unit / scale


def unrounded_bound(problem: AssignmentProblem, bound: float, unit: float) -> float:
    """Turn an upper bound on the objective in whole scores into one on the unrounded objective.

    Every chosen pair may be worth half a unit more than its rounded score, and its step of the load may cost
    half a unit less; no assignment has more pairs than clients have slots, or experts have places.
    """
    most_pairs = min(int(problem.slots.sum()), int(np.minimum(problem.load_max, problem.n_clients).sum()))
    # What is above one half covers the float64 errors of the scaling itself; steps may be a thousand times larger
    # than scores, and have larger ones.
    hidden = 0.5001 if problem.load_penalty is None else 2.0
    value = (bound + hidden * most_pairs) * unit - paid_anyway(problem)
    return value + 4 * float(np.finfo(np.float64).eps) * abs(value)


def completed_answer(problem: AssignmentProblem, assignment: Assignment, bound: float | None) -> Answer:
    """Hand over what a completed branch and bound found.

    Without budgets it is polished, and its prices prove it. With budgets its bound is all there is.
    """
    if problem.budgets:
        return Answer(StopReason.COMPLETED, assignment, bound=bound)
    return polished_answer(problem, assignment)


def polished_answer(problem: AssignmentProblem, assignment: Assignment) -> Answer:
    """Undo the rounding: cancel what improving cycles the exact scores still have, and take the prices."""
    polished = polish(problem, assignment)
    return Answer(StopReason.COMPLETED, polished.assignment, polished.prices)
