"""Compiled kernel of the Lagrangian backend: a first answer in no time, expert by expert.

The expert that would lose most if it did not get its best client is placed next (Martello and Toth, *Knapsack
Problems*, section 7.3, where jobs are assigned by regret). It may end with places that no client has room for.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import jit, part

__all__ = ["insert"]


@part
def _fits(size: Any, used: Any, count: Any, most: Any, client: int, expert: int) -> bool:
    good = bool(count[client] < most[client])
    for r in range(size.shape[0]):
        good = good and used[r, client] + size[r, client, expert] <= 1.0
    return good


@part
def _hold(held: Any, size: Any, used: Any, count: Any, loads: Any, client: int, expert: int) -> None:
    held[client, expert] = 1
    count[client] += 1
    loads[expert] += 1
    for r in range(size.shape[0]):
        used[r, client] += size[r, client, expert]


@part
def _next(
    score: Any, size: Any, used: Any, count: Any, most: Any, held: Any, ranked: Any, expert: int, start: int
) -> int:
    """Return from which rank on, `start` or later, an expert could be placed; n if nowhere."""
    while start < len(score) and score[ranked[expert, start], expert] > -np.inf:
        i = ranked[expert, start]
        if not held[i, expert] and _fits(size, used, count, most, i, expert):
            return start
        start += 1
    return len(score)


@jit
def insert(
    score: Any, size: Any, most: Any, load_min: Any, load_max: Any, ranked: Any, order: Any, held: Any
) -> int:
    """Place experts at clients up to their lower bounds by regret, then pairs in the order given, where they fit.

    Parameters
    ----------
    score : ndarray, shape (n, m), float64
        By which clients are chosen; -inf where the pair is not possible.
    size : ndarray, shape (R, n, m), float64
        In parts of the budgets.
    most : ndarray, shape (n,), int64
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
    n, m = score.shape
    used, count, loads = np.empty((size.shape[0], n)), np.empty(n, np.int64), np.empty(m, np.int64)
    first, second, closed = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int8)  # ranks
    for i in range(n):
        count[i] = 0
        for r in range(size.shape[0]):
            used[r, i] = 0.0
    for j in range(m):
        loads[j], closed[j], first[j], second[j] = 0, 0, 0, 1
    missing = 0
    while True:
        expert, largest = -1, -np.inf
        for j in range(m):
            if closed[j] or loads[j] >= load_min[j]:
                continue
            # Room only shrinks: whoever has none for the expert has none later.
            first[j] = _next(score, size, used, count, most, held, ranked, j, first[j])
            if first[j] == n:
                closed[j] = 1
                missing += load_min[j] - loads[j]
                continue
            second[j] = _next(score, size, used, count, most, held, ranked, j, max(second[j], first[j] + 1))
            regret = np.inf
            if second[j] < n:
                regret = score[ranked[j, first[j]], j] - score[ranked[j, second[j]], j]
            if expert < 0 or regret > largest:
                expert, largest = j, regret
        if expert < 0:
            break
        _hold(held, size, used, count, loads, ranked[expert, first[expert]], expert)
    for pair in order:
        i, j = pair // m, pair % m
        if loads[j] < load_max[j] and not held[i, j] and _fits(size, used, count, most, i, j):
            _hold(held, size, used, count, loads, i, j)
    return missing
