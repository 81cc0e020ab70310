"""The constraint matrix of the round problem, for backends that take one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched.problem import AssignmentProblem

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = [
    "PENALTY_RANGE",
    "Bounds",
    "Pairs",
    "clipped_bounds",
    "eligible_pairs",
    "incidence",
    "largest_cost",
    "unit_scores",
]

#: A marginal penalty may be so many times the largest score before scores lose precision to it: far more than what
#: a client can gain, and little enough for 64-bit sums of whole costs.
PENALTY_RANGE = 1e3


class Pairs(NamedTuple):
    """Client and expert number of every eligible pair, client by client; parallel int64 arrays."""

    clients: npt.NDArray[np.int64]
    experts: npt.NDArray[np.int64]


class Bounds(NamedTuple):
    """Fewest and most pairs of each client, shape (n,), and of each expert, shape (m,); int64."""

    client_min: npt.NDArray[np.int64]
    client_max: npt.NDArray[np.int64]
    expert_min: npt.NDArray[np.int64]
    expert_max: npt.NDArray[np.int64]


def eligible_pairs(problem: AssignmentProblem) -> Pairs:
    """List the pairs that are possible at all: one variable, or arc, each."""
    if problem.eligible is None:
        n, m = problem.shape
        return Pairs(*np.divmod(np.arange(n * m, dtype=np.int64), m))
    clients, experts = np.nonzero(problem.eligible)
    return Pairs(clients.astype(np.int64, copy=False), experts.astype(np.int64, copy=False))


def clipped_bounds(problem: AssignmentProblem) -> Bounds:
    """Return the problem's bounds, cut down to the size of the problem.

    "No limit" may be any large number in a problem; sums of such numbers overflow in the engines. A lower bound
    that cannot be met stays so: it is cut to one more than there is.
    """
    n, m = problem.shape
    return Bounds(
        *_clip(problem.min_experts, problem.capacity, m),
        *_clip(problem.load_min, problem.load_max, n),
    )


def _clip(
    low: npt.NDArray[np.int64], high: npt.NDArray[np.int64], most: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    low = np.minimum(low, most + 1)
    return low, np.maximum(low, np.minimum(high, most))


def largest_cost(problem: AssignmentProblem) -> float:
    """Return what scores and penalties are measured by; 0 where there is nothing to gain or pay.

    The largest absolute score, unless marginal penalties within the problem's reach exceed that `PENALTY_RANGE`
    times.
    """
    largest = problem.largest_score
    if problem.load_penalty is None:
        return largest
    most = np.minimum(problem.load_max, problem.n_clients)
    within = np.flatnonzero(most > 0)
    # Marginal penalties never fall: the first or the last one is the largest.
    ends = [problem.load_penalty.marginal_of(within, loads) for loads in (np.ones_like(within), most[within])]
    steepest = float(np.abs(ends).max(initial=0.0))
    return max(largest, steepest / PENALTY_RANGE) if largest else steepest


def unit_scores(problem: AssignmentProblem, pairs: Pairs) -> tuple[npt.NDArray[np.float64], float]:
    """Scale the desirability of `pairs` by `largest_cost`: the tolerances of floating-point engines are absolute.

    Returns
    -------
    scores : ndarray, shape (pairs,), float64
    unit : float
        ``scores * unit`` is the desirability.
    """
    unit = largest_cost(problem) or 1.0
    return problem.desirability[pairs.clients, pairs.experts].astype(np.float64) / unit, unit


def incidence(problem: AssignmentProblem, pairs: Pairs) -> csr_array[Any, Any]:
    """Return the matrix of a row per client, then per expert, and a column per pair; shape (n + m, pairs)."""
    from scipy.sparse import csr_array

    n, m = problem.shape
    columns = np.arange(len(pairs.clients))
    rows = np.concatenate([pairs.clients, n + pairs.experts])
    ones = np.ones(len(rows))
    return csr_array((ones, (rows, np.concatenate([columns, columns]))), shape=(n + m, len(columns)))
