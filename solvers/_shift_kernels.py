"""Compiled kernels of the Lagrangian backend: local search that moves experts from client to client.

A step moves one expert from client a to b, or at the same time one that b held on to c, which may be a: ejection
chains of length two, after Yagiura, Ibaraki and Glover (2004, *INFORMS Journal on Computing* 16). Where the load
of an expert is not fixed, a step may also start with a place that was free, or end with one that becomes free.
Bounds on loads, and on the experts of a client and of its layers, always hold. Budgets may be exceeded at a price
per client and resource, which rises where they are and falls while none is, so that the search passes through what
is not allowed. Only clients among the most promising of an expert are looked at, and experts only where clients
that they have to do with have changed.
"""

# ruff: noqa: NPY002 - compiled code has no other generator that is seeded once for all kernels

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fedmoe_sched.solvers._compile import jit, part

__all__ = ["shift_search"]

_LEAST_GAIN = 1e-9
_RISE, _FALL = 1.15, 0.9
_HIGHEST = 1e4  # of a price, in terms of the first one: beyond, rounding errors are worth something
_STUCK = 8  # local optima without a better answer before the search goes back to the best one
_NOBODY = -1  # where a step starts with a free place, or ends with one


class _State(NamedTuple):
    """Problem as in `shift_search`, and the assignment.

    Held experts, also listed by client, and counted in three ways; budgets used, shape (R, n); the largest score
    that promising clients have for each expert; which experts are to be looked at.
    """

    gain: Any
    size: Any
    near: Any
    least: Any
    most: Any
    layer_of: Any
    layer_min: Any
    layer_max: Any
    load_min: Any
    load_max: Any
    price: Any
    held: Any
    items: Any
    count: Any
    within: Any
    loads: Any
    used: Any
    top: Any
    fans: Any
    waiting: Any


@part
def _charge(at: Any, client: int, adds: int, drops: int) -> float:
    """Return by how much what is charged to a client grows with one expert more and one less (-1 is none)."""
    change = 0.0
    for r in range(at.used.shape[0]):
        before = at.used[r, client]
        after = before
        if adds >= 0:
            after += at.size[r, client, adds]
        if drops >= 0:
            after -= at.size[r, client, drops]
        change += at.price[r, client] * (max(0.0, after - 1.0) - max(0.0, before - 1.0))
    return change


@part
def _may_lose(at: Any, client: int, expert: int) -> bool:
    layer = at.layer_of[expert]
    return bool(at.count[client] > at.least[client] and at.within[client, layer] > at.layer_min[client, layer])


@part
def _may_gain(at: Any, client: int, expert: int) -> bool:
    layer = at.layer_of[expert]
    return bool(at.count[client] < at.most[client] and at.within[client, layer] < at.layer_max[client, layer])


@part
def _may_swap(at: Any, client: int, adds: int, drops: int) -> bool:
    into, out = at.layer_of[adds], at.layer_of[drops]
    if into == out:
        return True
    return bool(
        at.within[client, into] < at.layer_max[client, into] and at.within[client, out] > at.layer_min[client, out]
    )


@part
def _take(at: Any, client: int, expert: int) -> None:
    at.held[client, expert] = 1
    at.items[client, at.count[client]] = expert
    at.count[client] += 1
    at.within[client, at.layer_of[expert]] += 1
    at.loads[expert] += 1
    for r in range(at.used.shape[0]):
        at.used[r, client] += at.size[r, client, expert]


@part
def _leave(at: Any, client: int, expert: int) -> None:
    at.held[client, expert] = 0
    place = 0
    while at.items[client, place] != expert:
        place += 1
    at.count[client] -= 1
    at.items[client, place] = at.items[client, at.count[client]]
    at.within[client, at.layer_of[expert]] -= 1
    at.loads[expert] -= 1
    for r in range(at.used.shape[0]):
        at.used[r, client] -= at.size[r, client, expert]


@part
def _reset(source: Any, at: Any) -> None:
    """Make the assignment `source` the one that is held, and sum up what is used anew."""
    n, m = at.held.shape
    for j in range(m):
        at.loads[j] = 0
    for i in range(n):
        at.count[i] = 0
        for g in range(at.within.shape[1]):
            at.within[i, g] = 0
        for r in range(at.used.shape[0]):
            at.used[r, i] = 0.0
        for j in range(m):
            at.held[i, j] = 0
            if source[i, j]:
                _take(at, i, j)


@part
def _best_step(at: Any, a: int, j: int) -> Any:  # noqa: PLR0912
    """Find the best step that takes expert j from client a, or fills a free place where a is `_NOBODY`.

    Returns gain, b, k, c, and how many steps were looked at; k is -1 for a plain shift, and b or c `_NOBODY` where
    a place becomes free.
    """
    record, to, ejected, last, looked = _LEAST_GAIN, -2, -1, -1, 1
    lost, may_lose = 0.0, True
    if a >= 0:
        lost, may_lose = at.gain[a, j] + _charge(at, a, -1, j), _may_lose(at, a, j)
        if may_lose and at.loads[j] > at.load_min[j] and -lost > record:
            record, to = -lost, _NOBODY
    for b in at.near[j]:
        if b < 0:
            break
        if at.held[b, j]:
            continue
        profit = at.gain[b, j] - lost
        if may_lose and _may_gain(at, b, j):
            looked += 1
            better = profit - _charge(at, b, j, -1)
            if better > record:
                record, to, ejected, last = better, b, -1, -1
        for place in range(at.count[b]):
            k = at.items[b, place]
            back = a >= 0 and not at.held[a, k] and _may_swap(at, a, k, j)
            if not (may_lose or back) or not _may_swap(at, b, j, k):
                continue
            through = profit - at.gain[b, k] - _charge(at, b, j, k)
            if may_lose and at.loads[k] > at.load_min[k] and through > record:
                record, to, ejected, last = through, b, k, _NOBODY
            looked += 1
            if through + at.top[k] <= record:  # what is added is charged, if anything
                continue
            for c in at.near[k]:
                if c < 0:
                    break
                if c == b or at.held[c, k]:
                    continue
                looked += 1
                if c == a:
                    if not back:
                        continue
                    better = through + lost - at.gain[a, j] + at.gain[a, k] - _charge(at, a, k, j)
                elif may_lose and _may_gain(at, c, k):
                    better = through + at.gain[c, k] - _charge(at, c, k, -1)
                else:
                    continue
                if better > record:
                    record, to, ejected, last = better, b, k, c
    return record, to, ejected, last, looked


@part
def _improve(at: Any, a: int, j: int) -> Any:
    """Take the best step of an expert and a client, if it helps; return whether it did, and steps looked at."""
    _, b, k, c, tried = _best_step(at, a, j)
    if b < _NOBODY:
        return False, tried
    if a >= 0:
        _leave(at, a, j)
    if k >= 0:
        _leave(at, b, k)
        if c >= 0:
            _take(at, c, k)
    if b >= 0:
        _take(at, b, j)
    _wake(at, a)
    _wake(at, b)
    if k >= 0:
        _wake(at, c)
    return True, tried


@part
def _wake(at: Any, client: int) -> None:
    """Have the experts of a client looked at again, and those that may want to move to it."""
    if client < 0:
        return
    for place in range(at.count[client]):
        at.waiting[at.items[client, place]] = 1
    for j in at.fans[client]:
        if j < 0:
            break
        at.waiting[j] = 1


@part
def _descend(at: Any, order: Any, effort: int) -> int:
    """Take best steps of experts that wait, until none helps or enough were looked at; return how many were."""
    looked, idle, turn = 0, 0, 0
    n, m = at.held.shape
    while idle < m and looked < effort:
        j = order[turn]
        turn = (turn + 1) % m
        idle += 1
        if not at.waiting[j]:
            continue
        idle = 0
        at.waiting[j] = 0
        for a in range(n):
            if at.held[a, j]:
                _, tried = _improve(at, a, j)
                looked += tried
        if at.loads[j] < at.load_max[j]:
            _, tried = _improve(at, _NOBODY, j)
            looked += tried
    return looked


@part
def _reprice(at: Any, floor: Any) -> bool:
    """Charge more where a budget is exceeded, less everywhere where none is; return whether all are kept."""
    kept = True
    for r in range(at.used.shape[0]):
        for i in range(at.used.shape[1]):
            if at.used[r, i] > 1.0 + 1e-11:
                at.price[r, i] = min(max(at.price[r, i] * _RISE, floor[r, i]), _HIGHEST * floor[r, i])
                kept = False
                for place in range(at.count[i]):
                    at.waiting[at.items[i, place]] = 1
    if kept:
        for r in range(at.used.shape[0]):
            for i in range(at.used.shape[1]):
                at.price[r, i] *= _FALL
    return kept


@part
def _kick(at: Any, steps: int) -> None:
    """Move some experts at random, to clients that are promising for them, or swap two."""
    n = at.held.shape[0]
    for _ in range(steps):
        a = np.random.randint(n)
        if at.count[a] == 0:
            continue
        j = at.items[a, np.random.randint(at.count[a])]
        b = at.near[j, np.random.randint(at.near.shape[1])]
        if b < 0 or at.held[b, j]:
            continue
        if _may_lose(at, a, j) and _may_gain(at, b, j):
            _leave(at, a, j)
            _take(at, b, j)
            _wake(at, a)
            _wake(at, b)
        elif at.count[b] > 0:
            k = at.items[b, np.random.randint(at.count[b])]
            possible = not at.held[a, k] and at.gain[a, k] > -np.inf
            if possible and _may_swap(at, a, k, j) and _may_swap(at, b, j, k):
                _leave(at, a, j)
                _leave(at, b, k)
                _take(at, a, k)
                _take(at, b, j)
                _wake(at, a)
                _wake(at, b)


@part
def _copy(source: Any, to: Any) -> None:
    for i in range(source.shape[0]):
        for j in range(source.shape[1]):
            to[i, j] = source[i, j]


@jit
def shift_search(
    gain: Any, size: Any, least: Any, most: Any, layer_of: Any, layer_min: Any, layer_max: Any, load_min: Any,
    load_max: Any, near: Any, fans: Any, price: Any, floor: Any, current: Any, best: Any, record: float,
    effort: int, seed: int,
) -> float:  # fmt: skip
    """Search from `current` on, which is kept up to date; write better answers into `best`, and return its worth.

    Parameters
    ----------
    gain, size, least, most, layer_of, layer_min, layer_max, load_min, load_max
        As in `fedmoe_sched.solvers._budget_dual.Clients`.
    near : ndarray, shape (m, k), int64
        Promising clients of each expert, where the pair is possible, then -1.
    fans : ndarray, shape (n, l), int64
        Experts that are looked at again when a client changes, besides those that it holds, then -1.
    price, floor : ndarray, shape (R, n), float64
        What exceeding a budget by all of it costs, kept up to date, and least prices above 0.
    current, best : ndarray, shape (n, m), int8
        `current` keeps all bounds but the budgets.
    record : float
        The worth of `best`, -inf where it is none yet.
    effort : int
        Steps looked at before the search ends, or soon after.
    seed : int

    Returns
    -------
    float
    """
    np.random.seed(seed)
    n, m = gain.shape
    at = _State(
        gain, size, near, least, most, layer_of, layer_min, layer_max, load_min, load_max, price,
        np.empty((n, m), np.int8), np.empty((n, m + 1), np.int64), np.empty(n, np.int64),
        np.empty(layer_min.shape, np.int64), np.empty(m, np.int64), np.empty((size.shape[0], n)),
        np.empty(m), fans, np.empty(m, np.int8),
    )  # fmt: skip
    order = np.random.permutation(m)
    for j in range(m):
        at.waiting[j], at.top[j] = 1, -np.inf
        for i in near[j]:
            if i >= 0:
                at.top[j] = max(at.top[j], gain[i, j])
    _reset(current, at)
    looked, stuck = 0, 0
    while looked < effort:
        looked += m + _descend(at, order, effort)
        stuck += 1
        if _reprice(at, floor):
            worth = 0.0
            for i in range(n):
                for place in range(at.count[i]):
                    worth += gain[i, at.items[i, place]]
            if worth > record + _LEAST_GAIN:
                record, stuck = worth, 0
                _copy(at.held, best)
        if stuck > _STUCK and record > -np.inf:
            stuck = 0
            _reset(best, at)
        _kick(at, 1 + np.random.randint(4))
        order = np.random.permutation(m)
    _copy(at.held, current)
    return record
