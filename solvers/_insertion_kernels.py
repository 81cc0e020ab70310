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
def _best_two(
    score: Any, size: Any, used: Any, count: Any, most: Any, held: Any, expert: int, first: Any, second: Any
) -> None:
    """Write the two best clients that an expert could be placed at, or -1."""
    first[expert], second[expert] = -1, -1
    for i in range(score.shape[0]):
        if score[i, expert] == -np.inf or held[i, expert] or not _fits(size, used, count, most, i, expert):
            continue
        if first[expert] < 0 or score[i, expert] > score[first[expert], expert]:
            first[expert], second[expert] = i, first[expert]
        elif second[expert] < 0 or score[i, expert] > score[second[expert], expert]:
            second[expert] = i


@jit
def insert(score: Any, size: Any, most: Any, load_min: Any, load_max: Any, order: Any, held: Any) -> int:
    """Place experts at clients up to their lower bounds by regret, then pairs in the order given, where they fit.

    Parameters
    ----------
    score : ndarray, shape (n, m), float64
        By which clients are chosen; -inf where the pair is not possible.
    size : ndarray, shape (R, n, m), float64
        In parts of the budgets.
    most : ndarray, shape (n,), int64
    load_min, load_max : ndarray, shape (m,), int64
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
    first, second, closed = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int8)
    for i in range(n):
        count[i] = 0
        for r in range(size.shape[0]):
            used[r, i] = 0.0
    for j in range(m):
        loads[j], closed[j] = 0, 0
        _best_two(score, size, used, count, most, held, j, first, second)
    missing = 0
    while True:
        expert, largest = -1, -np.inf
        for j in range(m):
            if closed[j] or loads[j] >= load_min[j]:
                continue
            i, other = first[j], second[j]
            if (i >= 0 and not _fits(size, used, count, most, i, j)) or (
                other >= 0 and not _fits(size, used, count, most, other, j)
            ):
                _best_two(score, size, used, count, most, held, j, first, second)
                i, other = first[j], second[j]
            if i < 0:
                closed[j] = 1
                missing += load_min[j] - loads[j]
                continue
            regret = np.inf if other < 0 else score[i, j] - score[other, j]
            if expert < 0 or regret > largest:
                expert, largest = j, regret
        if expert < 0:
            break
        _hold(held, size, used, count, loads, first[expert], expert)
        _best_two(score, size, used, count, most, held, expert, first, second)
    for pair in order:
        i, j = pair // m, pair % m
        if loads[j] < load_max[j] and not held[i, j] and _fits(size, used, count, most, i, j):
            _hold(held, size, used, count, loads, i, j)
    return missing
