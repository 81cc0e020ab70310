"""What budgets leave of a problem: pairs that fit alone, how many experts fit together, the network around."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedmoe_sched._arrays import BoolArray, IntArray

if TYPE_CHECKING:
    from fedmoe_sched.problem import AssignmentProblem

__all__ = ["fitting_counts", "fitting_pairs", "network_relaxation"]


def fitting_pairs(problem: AssignmentProblem) -> BoolArray:
    """Return which eligible pairs keep every budget by themselves; shape (n, m), bool."""
    fits = np.ones(problem.shape, dtype=np.bool_) if problem.eligible is None else problem.eligible.copy()
    for resource in problem.budgets:
        allowed = resource.allowed
        for block in problem.blocks():
            fits[block] &= resource.sizes_of(block) <= allowed[block, None]
    return fits


def fitting_counts(problem: AssignmentProblem, fits: BoolArray) -> tuple[IntArray, IntArray]:
    """Count how many experts of each client fit its budgets together.

    Parameters
    ----------
    problem : AssignmentProblem
    fits : ndarray, shape (n, m), bool
        See `fitting_pairs`.

    Returns
    -------
    surely, at_most : ndarray, each of shape (n,), int64
        The most of which *any* choice fits, and a number that no choice exceeds, because not even the smallest
        experts fit; both within the capacity.
    """
    open_ = fits.sum(axis=1, dtype=np.int64)
    surely = np.minimum(problem.capacity, open_)
    at_most = surely.copy()
    for resource in problem.budgets:
        allowed = resource.allowed
        for block in problem.blocks():
            sizes = np.sort(np.where(fits[block], resource.sizes_of(block), np.inf), axis=1)
            ascending = np.cumsum(sizes, axis=1) <= allowed[block, None]
            np.minimum(at_most[block], _leading(ascending & np.isfinite(sizes)), out=at_most[block])
            sizes[~np.isfinite(sizes)] = 0.0  # the largest ones come first below
            descending = np.cumsum(np.sort(-sizes, axis=1), axis=1) >= -allowed[block, None]
            np.minimum(surely[block], _leading(descending), out=surely[block])
    return surely, at_most


def _leading(within: BoolArray) -> IntArray:
    """Count the leading true entries of each row."""
    counts: IntArray = np.logical_and.accumulate(within, axis=1).sum(axis=1, dtype=np.int64)
    return counts


def network_relaxation(problem: AssignmentProblem) -> AssignmentProblem:
    """Return the problem without its budgets, as far as counting can keep them.

    Pairs that do not fit alone are not eligible, and no capacity exceeds the number of experts that could fit: all
    assignments of `problem` are among those of the relaxation. Capacities stay at ``min_experts`` at least.
    """
    if not problem.budgets:
        return problem
    fits = fitting_pairs(problem)
    _, at_most = fitting_counts(problem, fits)
    return problem.replace(
        budgets=(), eligible=fits, capacity=np.maximum(problem.min_experts, np.minimum(problem.capacity, at_most))
    )
