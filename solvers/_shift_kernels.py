"""Compiled kernels of the Lagrangian backend: local search that moves experts from client to client.

A step moves one expert from client a to b, or at the same time one that b held on to c, which may be a: ejection
chains of length two, after Yagiura, Ibaraki and Glover (2004, *INFORMS Journal on Computing* 16). All steps keep
the loads of the experts. Budgets may be exceeded at a price per client and resource, which rises where they are
and falls while none is, so that the search passes through what is not allowed; counts of experts always hold. Only
clients among the most promising of an expert are looked at.
"""

# ruff: noqa: NPY002 - compiled code has no other generator that is seeded once for all kernels

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import jit, part

__all__ = ["shift_search"]

_LEAST_GAIN = 1e-9
_RISE, _FALL = 1.15, 0.9
_HIGHEST = 1e4  # of a price, in terms of the first one: beyond, rounding errors are worth something
_STUCK = 8  # local optima without a better answer before the search goes back to the best one


@part
def _charge(price: Any, used: Any, client: int, size: Any, adds: int, drops: int) -> float:
    """Return by how much what is charged to a client grows with one expert more and one less (-1 is none)."""
    change = 0.0
    for r in range(used.shape[0]):
        before = used[r, client]
        after = before
        if adds >= 0:
            after += size[r, client, adds]
        if drops >= 0:
            after -= size[r, client, drops]
        change += price[r, client] * (max(0.0, after - 1.0) - max(0.0, before - 1.0))
    return change


@part
def _take(held: Any, items: Any, count: Any, used: Any, size: Any, client: int, expert: int) -> None:
    held[client, expert] = 1
    items[client, count[client]] = expert
    count[client] += 1
    for r in range(used.shape[0]):
        used[r, client] += size[r, client, expert]


@part
def _leave(held: Any, items: Any, count: Any, used: Any, size: Any, client: int, expert: int) -> None:
    held[client, expert] = 0
    at = 0
    while items[client, at] != expert:
        at += 1
    count[client] -= 1
    items[client, at] = items[client, count[client]]
    for r in range(used.shape[0]):
        used[r, client] -= size[r, client, expert]


@part
def _reset(source: Any, held: Any, items: Any, count: Any, used: Any, size: Any) -> None:
    """Make `held` the assignment `source`, and sum up what is used anew."""
    n, m = held.shape
    for i in range(n):
        count[i] = 0
        for r in range(used.shape[0]):
            used[r, i] = 0.0
        for j in range(m):
            held[i, j] = 0
            if source[i, j]:
                _take(held, items, count, used, size, i, j)


@part
def _best_step(  # noqa: PLR0912
    gain: Any, size: Any, near: Any, least: Any, most: Any, price: Any,
    held: Any, items: Any, count: Any, used: Any, a: int, j: int,
) -> Any:  # fmt: skip
    """Find the best step that takes expert j from client a: (gain, b, k, c, tried); k is -1 for a plain shift."""
    record, to, ejected, last, looked = _LEAST_GAIN, -1, -1, -1, 0
    freed = _charge(price, used, a, size, -1, j)
    may_lose = count[a] > least[a]
    for b in near[j]:
        if b < 0:
            break
        if held[b, j]:
            continue
        profit = gain[b, j] - gain[a, j]
        if may_lose and count[b] < most[b]:
            looked += 1
            better = profit - freed - _charge(price, used, b, size, j, -1)
            if better > record:
                record, to, ejected, last = better, b, -1, -1
        for at in range(count[b]):
            k = items[b, at]
            if held[a, k] and not may_lose:
                continue
            through = profit - gain[b, k] - _charge(price, used, b, size, j, k)
            for c in near[k]:
                if c < 0:
                    break
                if c == b or held[c, k]:
                    continue
                looked += 1
                if c == a:
                    better = through + gain[a, k] - _charge(price, used, a, size, k, j)
                elif may_lose and count[c] < most[c]:
                    better = through + gain[c, k] - freed - _charge(price, used, c, size, k, -1)
                else:
                    continue
                if better > record:
                    record, to, ejected, last = better, b, k, c
    return record, to, ejected, last, looked


@part
def _descend(
    gain: Any, size: Any, near: Any, least: Any, most: Any, price: Any,
    held: Any, items: Any, count: Any, used: Any, order: Any, effort: int,
) -> int:  # fmt: skip
    """Take best steps, expert by expert, until none helps or enough were looked at; return how many were."""
    looked, idle, at = 0, 0, 0
    m = held.shape[1]
    while idle < m and looked < effort:
        j = order[at]
        at = (at + 1) % m
        idle += 1
        for a in range(held.shape[0]):
            if not held[a, j]:
                continue
            _, b, k, c, tried = _best_step(gain, size, near, least, most, price, held, items, count, used, a, j)
            looked += tried
            if b < 0:
                continue
            _leave(held, items, count, used, size, a, j)
            if k >= 0:
                _leave(held, items, count, used, size, b, k)
                _take(held, items, count, used, size, c, k)
            _take(held, items, count, used, size, b, j)
            idle = 0
    return looked


@part
def _reprice(price: Any, floor: Any, used: Any) -> bool:
    """Charge more where a budget is exceeded, less everywhere where none is; return whether all are kept."""
    kept = True
    for r in range(used.shape[0]):
        for i in range(used.shape[1]):
            if used[r, i] > 1.0 + 1e-11:
                price[r, i] = min(max(price[r, i] * _RISE, floor[r, i]), _HIGHEST * floor[r, i])
                kept = False
    if kept:
        for r in range(used.shape[0]):
            for i in range(used.shape[1]):
                price[r, i] *= _FALL
    return kept


@part
def _kick(
    near: Any, least: Any, most: Any, size: Any, held: Any, items: Any, count: Any, used: Any, steps: int
) -> None:
    """Move some experts at random, to clients that are promising for them."""
    n = held.shape[0]
    for _ in range(steps):
        a = np.random.randint(n)
        if count[a] <= least[a]:
            continue
        j = items[a, np.random.randint(count[a])]
        b = near[j, np.random.randint(near.shape[1])]
        if b >= 0 and not held[b, j] and count[b] < most[b]:
            _leave(held, items, count, used, size, a, j)
            _take(held, items, count, used, size, b, j)


@jit
def shift_search(
    gain: Any, size: Any, near: Any, least: Any, most: Any, price: Any, floor: Any, current: Any, best: Any,
    record: float, effort: int, seed: int,
) -> float:  # fmt: skip
    """Search from `current` on, which is kept up to date; write better answers into `best`, and return its worth.

    `record` is the worth of `best`, -inf where it is none yet. The search ends after `effort` steps looked at, or
    soon after.
    """
    np.random.seed(seed)
    n, m = gain.shape
    held, items = np.empty((n, m), np.int8), np.empty((n, m + 1), np.int64)
    count, used = np.empty(n, np.int64), np.empty((size.shape[0], n))
    order = np.random.permutation(m)
    _reset(current, held, items, count, used, size)
    looked, stuck = 0, 0
    while looked < effort:
        looked += m + _descend(gain, size, near, least, most, price, held, items, count, used, order, effort)
        stuck += 1
        if _reprice(price, floor, used):
            worth = 0.0
            for i in range(n):
                for at in range(count[i]):
                    worth += gain[i, items[i, at]]
            if worth > record + _LEAST_GAIN:
                record, stuck = worth, 0
                for i in range(n):
                    for j in range(m):
                        best[i, j] = held[i, j]
        if stuck > _STUCK and record > -np.inf:
            stuck = 0
            _reset(best, held, items, count, used, size)
        _kick(near, least, most, size, held, items, count, used, 1 + np.random.randint(4))
        order = np.random.permutation(m)
    for i in range(n):
        for j in range(m):
            current[i, j] = held[i, j]
    return record
