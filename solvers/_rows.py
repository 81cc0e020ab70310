"""Rows of the matrices of a problem, as the kernels of the exact price backend take them."""

from __future__ import annotations

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, read_only
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["gather", "readable"]


def gather(problem: AssignmentProblem, rows: IntArray) -> tuple[FloatArray, BoolArray | None]:
    """Copy the scores and the eligible experts of some clients, ascending, without loading all of a memory map."""
    m = problem.n_experts
    narrow = problem.desirability.dtype == np.float16
    scores = np.empty((len(rows), m), dtype=np.float32 if narrow else problem.desirability.dtype)
    eligible = None if problem.eligible is None else np.empty((len(rows), m), dtype=np.bool_)
    for block in problem.blocks():
        part = slice(*np.searchsorted(rows, (block.start, block.stop)))
        scores[part] = problem.desirability[rows[part]]
        if eligible is not None and problem.eligible is not None:
            eligible[part] = problem.eligible[rows[part]]
    return read_only(scores), None if eligible is None else read_only(eligible)


def readable(part: FloatArray) -> FloatArray:
    """Return scores as the kernels take them: contiguous, read-only, of a type that processors compute with."""
    if part.dtype == np.float16:
        part = part.astype(np.float32)
    return read_only(np.ascontiguousarray(part))
