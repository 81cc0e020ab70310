"""Whole-number costs for backends that take no others, and the way back to the unrounded optimum."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.exchange import polish
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import Answer

__all__ = ["COST_SCALE", "polished_answer", "whole_scores"]

#: The largest score becomes this whole number: enough for 1e-9 of it, small enough for 64-bit sums.
COST_SCALE = 1e9


def whole_scores(problem: AssignmentProblem) -> tuple[npt.NDArray[np.int64], float]:
    """Round desirability to whole numbers.

    Returns
    -------
    scores : ndarray, shape (n, m), int64
        At most `COST_SCALE` in absolute value.
    scale : float
        ``scores / scale`` is the desirability, to within half a unit of ``1 / scale``.
    """
    largest = float(max(abs(problem.desirability.max()), abs(problem.desirability.min())))
    scale = COST_SCALE / largest if largest > 0 else 1.0
    return np.rint(problem.desirability.astype(np.float64) * scale).astype(np.int64), scale


def polished_answer(problem: AssignmentProblem, assignment: Assignment, deadline: float | None = None) -> Answer:
    """Undo the rounding: cancel what improving cycles the exact scores still have, and take the prices."""
    polished = polish(problem, assignment, deadline=deadline)
    return Answer(StopReason.COMPLETED, polished.assignment, polished.prices)
