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
    loads = others.sum(axis=0)
    part = clients.part(some, np.maximum(clients.load_min - loads, 0), clients.load_max - loads)
    found = _choose(part, replace(dual, worth=dual.worth[some]), limit, known[some], seconds)
    if found.held is None:
        return Chosen(None, math.inf)
    others[some] = found.held
    return Chosen(others, math.inf)


def _choose(clients: Clients, dual: Dual, limit: float, known: Mask | None, seconds: float) -> Chosen:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array, vstack

    n, m = clients.gain.shape
    taken, starts, whole = list_near(
        clients.gain, clients.size, clients.least, clients.most, clients.units, clients.budgets, dual.prices,
        dual.worth, limit, max(1, min(_EACH, _ROWS // n)),
    )  # fmt: skip
    bits = np.unpackbits(taken.view(np.uint8), axis=1, count=m, bitorder="little").astype(np.bool_)
    owners = np.repeat(np.arange(n), np.diff(starts))
    if known is not None:
        bits, owners = np.concatenate([bits, known]), np.concatenate([owners, np.arange(n)])
    if len(np.unique(owners)) < n:
        return Chosen(None, math.inf)
    worth = np.where(bits, clients.gain[owners], 0.0).sum(axis=1)
    one = csr_array((np.ones(len(owners)), (owners, np.arange(len(owners)))), shape=(n, len(owners)))
    rows = vstack([one, csr_array(bits.T.astype(np.float64))])
    found = milp(
        -worth,
        integrality=np.ones(len(owners)),
        bounds=Bounds(0.0, 1.0),
        constraints=LinearConstraint(
            rows, np.append(np.ones(n), clients.load_min), np.append(np.ones(n), clients.load_max)
        ),
        options={"time_limit": max(seconds, 1e-3), "mip_rel_gap": 0.0},
    )
    beyond = dual.bound - limit if whole else math.inf
    if found.status == 2:  # infeasible
        return Chosen(None, beyond)
    held = None
    if found.x is not None:
        held = np.zeros((n, m), dtype=np.bool_)
        held[owners[found.x > 0.5]] = bits[found.x > 0.5]
    bound = math.inf if found.mip_dual_bound is None else max(beyond, -found.mip_dual_bound)
    return Chosen(held, bound)
