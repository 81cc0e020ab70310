"""The integer program in choices: each client takes one of those that lose little at good prices."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched.solvers._budget_dual import Clients, Dual
from fedmoe_sched.solvers._choice_kernels import list_near

__all__ = ["Chosen", "choose"]

_STEPS = 100  # runs of places at an expert
_INFEASIBLE = 2  # for SciPy
_ROWS, _EACH = 20_000, 100  # choices in the program, and of a client

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class Chosen(NamedTuple):
    """What the program found.

    Parameters
    ----------
    held : ndarray, shape (n, m), bool, or None
        None if nothing was found.
    bound : float
        No assignment is worth more than this, or than `held`; infinite where that is not known.
    """

    held: Mask | None
    bound: float


def choose(
    clients: Clients, dual: Dual, limit: float, known: Mask | None, seconds: float, some: Ints | None = None
) -> Chosen:
    """Find the best assignment of choices that lose at most `limit` each, by SciPy's HiGHS.

    An assignment whose choices lose more is worth less than the bound of the prices by more than the limit.

    Parameters
    ----------
    clients : Clients
    dual : Dual
        With the worth of every client's best choice.
    limit : float
    known : ndarray, shape (n, m), bool, or None
        An assignment whose choices are listed too.
    seconds : float
        For the program, after it has been written.
    some : ndarray, shape (k,), or None
        Clients that choose anew, where the others keep what they have in `known`, and the bounds of the loads need
        not be kept by `known`.

    Returns
    -------
    Chosen
    """
    if some is None or known is None:
        return _choose(clients, dual, limit, known, seconds)
    others = known.copy()
    others[some] = False
    part = clients.beside(some, others.sum(axis=0))
    if (part.load_max < 0).any():
        return Chosen(None, math.inf)
    found = _choose(part, replace(dual, worth=dual.worth[some]), limit, None, seconds)
    if found.held is None:
        return Chosen(None, math.inf)
    others[some] = found.held
    return Chosen(others, math.inf)


class _Steps(NamedTuple):
    """Places at experts beyond their least loads, in runs of the same marginal penalty."""

    low: Ints  # (m,)
    high: Ints  # (m,)
    experts: Ints
    sizes: Ints
    costs: npt.NDArray[np.float64]
    whole: bool  # whether no load that loses at most the limit is missing


def _steps(clients: Clients, prices: npt.NDArray[np.float64], limit: float, known: Mask | None) -> _Steps:
    """List the loads that lose at most the limit against what is best at these prices, or fewer."""
    low, high, penalty = clients.load_min.copy(), clients.load_max.copy(), clients.penalty
    experts, sizes, costs = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    whole = True
    if penalty is None:
        return _Steps(low, high, experts[0], sizes[0], costs[0], whole)
    best = penalty.best_loads(prices, low, high)
    for j, wanted in enumerate(best.tolist()):
        marginal = penalty.marginal_of(np.full(high[j] - low[j], j), np.arange(low[j], high[j]) + 1)
        lost = np.append(0.0, np.cumsum(marginal - prices[j]))
        near = low[j] + np.flatnonzero(lost - lost[wanted - low[j]] <= limit)
        first, last = int(near[0]), int(near[-1])
        if len(_runs(marginal[first - low[j] : last - low[j]])) > _STEPS:
            first, last, whole = max(first, wanted - _STEPS // 2), min(last, wanted + _STEPS // 2), False
        if known is not None:
            load = int(known[:, j].sum())
            first, last = min(first, load), max(last, load)
        marginal = marginal[first - low[j] : last - low[j]]
        starts = _runs(marginal)
        experts.append(np.full(len(starts), j))
        sizes.append(np.diff(np.append(starts, len(marginal))))
        costs.append(marginal[starts])
        low[j], high[j] = first, last
    return _Steps(low, high, np.concatenate(experts), np.concatenate(sizes), np.concatenate(costs), whole)


def _runs(marginal: npt.NDArray[np.float64]) -> Ints:
    """Return where runs of the same value begin."""
    return np.flatnonzero(np.append(True, np.diff(marginal) != 0)[: len(marginal)])


def _choose(clients: Clients, dual: Dual, limit: float, known: Mask | None, seconds: float) -> Chosen:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, hstack, vstack

    n, m = clients.gain.shape
    taken, starts, whole = list_near(
        *clients.arrays, clients.short, dual.prices, dual.worth, limit, max(1, min(_EACH, _ROWS // n))
    )
    bits = np.unpackbits(taken.view(np.uint8), axis=1, count=m, bitorder="little").astype(np.bool_)
    owners = np.repeat(np.arange(n), np.diff(starts))
    if known is not None:
        bits, owners = np.concatenate([bits, known]), np.concatenate([owners, np.arange(n)])
    rest = np.setdiff1d(np.arange(n), owners)
    if len(rest):  # too many choices are nearly best: the one that was found best
        best = Dual.at(clients.sample(rest), dual.prices)[1].astype(np.bool_)
        enough = best.sum(axis=1) >= clients.least[rest]
        bits, owners = np.concatenate([bits, best[enough]]), np.concatenate([owners, rest[enough]])
        if not enough.all():
            return Chosen(None, math.inf)
    worth = np.where(bits, clients.gain[owners], 0.0).sum(axis=1) + clients.floor_worth(owners, bits)
    k, steps = len(owners), _steps(clients, dual.prices, limit, known)
    one = csr_array((np.ones(k), (owners, np.arange(k))), shape=(n, k + len(steps.experts)))
    places = csr_array(
        (np.ones(len(steps.experts)), (steps.experts, np.arange(len(steps.experts)))),
        shape=(m, len(steps.experts)),
    )
    rows = vstack([one, hstack([csr_array(bits.T.astype(np.float64)), -places])])
    found = milp(
        np.append(-worth, steps.costs),
        integrality=np.repeat([1, 0], [k, len(steps.experts)]),
        bounds=Bounds(0.0, np.append(np.ones(k), steps.sizes)),
        constraints=LinearConstraint(
            rows,
            np.append(np.ones(n), steps.low),
            np.append(np.ones(n), steps.high if clients.penalty is None else steps.low),
        ),
        options={"time_limit": max(seconds, 1e-3), "mip_rel_gap": 0.0},
    )
    beyond = dual.bound - limit if whole and steps.whole else math.inf
    if found.status == _INFEASIBLE:
        return Chosen(None, beyond)
    held = None
    if found.x is not None:
        taken_ = found.x[:k] > 0.5
        held = np.zeros((n, m), dtype=np.bool_)
        held[owners[taken_]] = bits[taken_]
    if found.mip_dual_bound is None:
        return Chosen(held, math.inf)
    paid = 0.0 if clients.penalty is None else float(clients.penalty.total(steps.low).sum())
    return Chosen(held, max(beyond, -found.mip_dual_bound - paid))
