"""Compiled kernel of the Lagrangian backend: a first answer in no time, expert by expert.

Clients first get what they need. Then the expert that would lose most if it did not get its best client is placed
next (Martello and Toth, *Knapsack Problems*, section 7.3, where jobs are assigned by regret). It may end with
places that no client has room for.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fedmoe_sched.solvers._compile import jit, part
from fedmoe_sched.solvers._knapsack_kernels import rank

__all__ = ["insert"]


class _State(NamedTuple):
    """Scores and bounds as in `insert`; what is used, shape (R, n); held experts, counted in three ways."""

    score: Any
    size: Any
    least: Any
    most: Any
    layer_of: Any
    layer_min: Any
    layer_max: Any
    load_max: Any
    used: Any
    count: Any
    within: Any
    loads: Any
    held: Any


@part
def _holds(at: Any, client: int, expert: int) -> bool:
    """Let a client hold an expert, if it does not yet, and all upper bounds allow it; return whether it did."""
    if at.held[client, expert] or at.loads[expert] >= at.load_max[expert] or not _fits(at, client, expert):
        return False
    at.held[client, expert] = 1
    at.count[client] += 1
    at.within[client, at.layer_of[expert]] += 1
    at.loads[expert] += 1
    for r in range(len(at.used)):
        at.used[r, client] += at.size[r, client, expert]
    return True


@part
def _fits(at: Any, client: int, expert: int) -> bool:
    layer = at.layer_of[expert]
    good = bool(at.count[client] < at.most[client] and at.within[client, layer] < at.layer_max[client, layer])
    for r in range(len(at.used)):
        good = good and at.used[r, client] + at.size[r, client, expert] <= 1.0
    return good


@part
def _next(at: Any, ranked: Any, expert: int, start: int) -> int:
    """Return from which rank on, `start` or later, an expert could be placed; n if nowhere."""
    n = len(at.score)
    while start < n and at.score[ranked[expert, start], expert] > -np.inf:
        i = ranked[expert, start]
        if not at.held[i, expert] and _fits(at, i, expert):
            return start
        start += 1
    return n


@part
def _take_least(at: Any, client: int, listed: Any) -> None:
    """Give a client its best experts that fit: what each layer needs first, then what all of them need."""
    possible = 0
    for j in range(len(listed)):
        if at.score[client, j] > -np.inf:
            listed[possible] = j
            possible += 1
    rank(at.score[client], listed, possible)
    for k in range(possible):
        layer = at.layer_of[listed[k]]
        if at.within[client, layer] < at.layer_min[client, layer]:
            _holds(at, client, listed[k])
    for k in range(possible):
        if at.count[client] < at.least[client]:
            _holds(at, client, listed[k])


@part
def _place(at: Any, load_min: Any, ranked: Any, first: Any, second: Any, regret: Any, closed: Any) -> int:
    """Place experts up to their lower bounds; return how many places no client has room for."""
    n, m = at.score.shape
    for j in range(m):
        closed[j], first[j], second[j] = 0, 0, 1
    missing, changed = 0, -1
    while True:
        expert, largest = -1, -np.inf
        for j in range(m):
            if closed[j] or at.loads[j] >= load_min[j]:
                continue
            known = changed >= 0 and changed != ranked[j, first[j]]
            if known and (second[j] >= n or changed != ranked[j, second[j]]):
                if expert < 0 or regret[j] > largest:
                    expert, largest = j, regret[j]
                continue
            # Room only shrinks: whoever has none for the expert has none later.
            first[j] = _next(at, ranked, j, first[j])
            if first[j] == n:
                closed[j] = 1
                missing += load_min[j] - at.loads[j]
                continue
            second[j] = _next(at, ranked, j, max(second[j], first[j] + 1))
            regret[j] = np.inf
            if second[j] < n:
                regret[j] = at.score[ranked[j, first[j]], j] - at.score[ranked[j, second[j]], j]
            if expert < 0 or regret[j] > largest:
                expert, largest = j, regret[j]
        if expert < 0:
            return missing
        changed = ranked[expert, first[expert]]
        if not _holds(at, changed, expert):
            return missing


@jit
def insert(
    score: Any, size: Any, least: Any, most: Any, layer_of: Any, layer_min: Any, layer_max: Any, load_min: Any,
    load_max: Any, ranked: Any, order: Any, held: Any,
) -> int:  # fmt: skip
    """Give clients what they need, place experts up to their lower bounds by regret, then the pairs in `order`.

    Parameters
    ----------
    score : ndarray, shape (n, m), float64
        By which clients are chosen; -inf where the pair is not possible.
    size : ndarray, shape (R, n, m), float64
        In parts of the budgets.
    least, most : ndarray, shape (n,), int64
    layer_of : ndarray, shape (m,), int64
    layer_min, layer_max : ndarray, shape (n, G), int64
    load_min, load_max : ndarray, shape (m,), int64
    ranked : ndarray, shape (m, n), int64
        Clients of each expert, the best first.
    order : ndarray, shape (k,), int64
        Pairs ``i * m + j`` that may be added, the best first.
    held : ndarray, shape (n, m), int8
        What is held is written here; all 0 before.

    Returns
    -------
    missing : int
        Places that no client has room for.
    """
    (n, m), resources, layers = score.shape, size.shape[0], layer_min.shape[1]
    used, count, within = np.empty((resources, n)), np.empty(n, np.int64), np.empty((n, layers), np.int64)
    loads, listed = np.empty(m, np.int64), np.empty(m, np.int64)
    for i in range(n):
        count[i] = 0
        for g in range(layers):
            within[i, g] = 0
        for r in range(resources):
            used[r, i] = 0.0
    for j in range(m):
        loads[j] = 0
    at = _State(
        score, size, least, most, layer_of, layer_min, layer_max, load_max, used, count, within, loads, held
    )
    for i in range(n):
        needs = least[i]
        for g in range(layers):
            needs = max(needs, layer_min[i, g])
        if needs > 0:
            _take_least(at, i, listed)
    first, second, closed = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int8)  # first two: ranks
    missing = _place(at, load_min, ranked, first, second, np.empty(m), closed)
    for pair in order:
        _holds(at, pair // m, pair % m)
    return missing
