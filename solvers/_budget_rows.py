"""Budgets as rows of an integer program, and how engines that reckon with tolerances are held to them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.solvers._matrix import Pairs, unit_scores

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = [
    "BudgetRows",
    "Covers",
    "budget_rows",
    "engine_scores",
    "has_whole_scores",
    "rounded_claim",
    "whole_limits",
]

#: Rows in whole numbers up to this size are read exactly by engines whose tolerance is 1e-6 of a row.
_EXACT_LIMIT = 100_000
_LARGEST_LIMIT = 2.0**45  # sums over some ten thousand experts stay below 2**62
_LARGEST_WHOLE = 2.0**31
_SCORE_SCALE = 1e4  # gaps of engines end at 1e-6, whatever is asked


class BudgetRows(NamedTuple):
    """One row per client and resource that can bind: ``sum of coefficients[k] over chosen pairs k <= limit``."""

    pairs: list[npt.NDArray[np.int64]]  # of each row: numbers of pairs
    coefficients: list[npt.NDArray[np.float64]]
    limits: list[float]
    clients: list[int]
    resources: list[int]  # numbers of them

    def matrix(self, n_pairs: int) -> csr_array[Any, Any]:
        """Return the rows as a sparse matrix of shape (rows, n_pairs)."""
        from scipy.sparse import csr_array

        ends = np.cumsum([0, *(len(row) for row in self.pairs)])
        empty = [np.zeros(0)]
        columns = np.concatenate([*empty, *self.pairs]).astype(np.int64)
        values = np.concatenate([*empty, *self.coefficients])
        return csr_array((values, columns, ends), shape=(len(self.limits), n_pairs))


def budget_rows(problem: AssignmentProblem, pairs: Pairs, *, whole: bool) -> BudgetRows:
    """List the budgets that could exclude an assignment of `pairs`, none of which exceeds one alone.

    Parameters
    ----------
    problem : AssignmentProblem
    pairs : Pairs
        Client by client, as `fedmoe_sched.solvers._matrix.eligible_pairs` has them.
    whole : bool
        Whether all numbers must be whole, see `whole_limits`; else those are that are small, and the others are
        relative to their budget.

    Returns
    -------
    BudgetRows
    """
    rows = BudgetRows([], [], [], [], [])
    starts = np.searchsorted(pairs.clients, np.arange(problem.n_clients + 1))
    for number, resource in enumerate(problem.budgets):
        sizes = resource.pair_sizes(pairs.clients, pairs.experts)
        for client in np.flatnonzero(np.isfinite(resource.budget)).tolist():
            numbers = np.arange(starts[client], starts[client + 1])
            taken = sizes[numbers]
            numbers, taken = numbers[taken > 0], taken[taken > 0]
            if taken.sum() <= resource.budget[client]:
                continue
            coefficients, limit = whole_limits(taken, resource, client)
            if not whole and limit > _EXACT_LIMIT:
                coefficients, limit = taken / resource.budget[client], 1.0
            rows.pairs.append(numbers)
            rows.coefficients.append(coefficients.astype(np.float64))
            rows.limits.append(limit)
            rows.clients.append(client)
            rows.resources.append(number)
    return rows


def whole_limits(
    sizes: npt.NDArray[np.floating[Any]], resource: ResourceBudget, client: int
) -> tuple[npt.NDArray[np.int64], float]:
    """Express the sizes of one client's experts, and its budget, in whole numbers.

    Whole sizes are divided by their greatest common divisor, which changes nothing. Others are rounded *down* to
    multiples of so small a part of the budget that no choice exceeds the budget by more than half of
    `fedmoe_sched.resource_budget.BUDGET_TOLERANCE`: every choice that fits still fits, and every choice that fits
    the whole numbers passes the certificate.

    Parameters
    ----------
    sizes : ndarray, shape (k,), float64
        All > 0 and within the budget, which is finite.
    resource : ResourceBudget
    client : int

    Returns
    -------
    whole : ndarray, shape (k,), int64
    limit : float
        A whole number.
    """
    allowed = float(resource.allowed[client])
    if allowed <= _LARGEST_LIMIT and (sizes == np.floor(sizes)).all():
        exact = sizes.astype(np.int64)
        divisor = int(np.gcd.reduce(exact))
        return exact // divisor, float(int(allowed) // divisor)
    # k experts lose less than k units, and 2**-31 is less than half of 1e-9.
    units = 2.0 ** (31 + len(sizes).bit_length())
    budget = float(resource.budget[client])
    return np.minimum(np.floor(sizes / budget * units * (1 - 1e-15)), units).astype(np.int64), units


def has_whole_scores(problem: AssignmentProblem) -> bool:
    """Whether all desirabilities are whole numbers of moderate size, and so every objective."""
    if problem.largest_score >= _LARGEST_WHOLE:
        return False
    return all(
        bool((part == np.rint(part)).all()) for part in map(problem.desirability.__getitem__, problem.blocks())
    )


def engine_scores(problem: AssignmentProblem, pairs: Pairs) -> tuple[npt.NDArray[np.float64], float]:
    """Return the desirability of `pairs` on the scale that suits an engine, and what to multiply by to undo it.

    Without budgets improving cycles are cancelled afterwards, and the largest score is 1. With budgets what the
    engine ends with stays: whole scores are left alone, and others are scaled up, so that what its tolerances
    leave is too little to matter.
    """
    if problem.budgets and has_whole_scores(problem):
        return problem.desirability[pairs.clients, pairs.experts].astype(np.float64), 1.0
    scores, unit = unit_scores(problem, pairs)
    return (scores * _SCORE_SCALE, unit / _SCORE_SCALE) if problem.budgets else (scores, unit)


def rounded_claim(problem: AssignmentProblem, bound: float) -> float:
    """Round an engine's bound down where objectives are whole numbers."""
    if not np.isfinite(bound) or not has_whole_scores(problem):
        return bound
    return float(np.floor(bound + 1e-6 * max(1.0, abs(bound) * 1e-3)))


class Covers:
    """Repeats a solve until its answer keeps the budgets to the certificate's tolerance, not only the engine's.

    Engines accept sums that exceed a row by a millionth. Experts of a client that do so together are a cover: one
    of them at least must go, and a row that says so excludes nothing else.
    """

    def __init__(self, problem: AssignmentProblem) -> None:
        self._problem = problem

    def of(self, assignment: Assignment | None) -> list[tuple[int, npt.NDArray[np.int64]]]:
        """List (client, its experts) wherever an assignment exceeds a budget."""
        if assignment is None:
            return []
        broken = np.zeros(self._problem.n_clients, dtype=np.bool_)
        for resource in self._problem.budgets:
            broken |= resource.used(assignment) > resource.allowed
        ends = assignment.indptr
        return [(i, assignment.indices[ends[i] : ends[i + 1]]) for i in np.flatnonzero(broken).tolist()]

    def enforce(
        self,
        solve: Callable[[float | None], None],
        read: Callable[[], Assignment | None],
        exclude: Callable[[int, npt.NDArray[np.int64]], None],
        seconds: float | None,
    ) -> bool:
        """Solve, exclude covers, and solve again.

        Parameters
        ----------
        solve : callable
            Takes the seconds left, or None.
        read : callable
            Returns the engine's assignment, if it has one.
        exclude : callable
            Takes a client and experts that it must not all hold, and adds the row.
        seconds : float or None
            Time limit of all solves together.

        Returns
        -------
        bool
            Whether the last assignment keeps the budgets; False if time ran out before.
        """
        if not self._problem.budgets:
            solve(seconds)
            return True
        end = None if seconds is None else time.perf_counter() + seconds
        while True:
            left = None if end is None else end - time.perf_counter()
            if left is not None and left <= 0:
                return False
            solve(left)
            covers = self.of(read())
            if not covers:
                return True
            for client, experts in covers:
                exclude(client, experts)
