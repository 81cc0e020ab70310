"""Compiled kernels of the Lagrangian backend: one listed choice per client, so that all loads are kept.

A set partitioning problem, searched depth first (Knuth, *The Art of Computer Programming*, section 7.2.2.1): the
client with the fewest choices left is fixed next. Choices go that need an expert which others cannot do without,
that leave out one which nobody else can hold, or that lose too much.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import part

__all__ = ["has_bit", "pick"]

_PASSES = 4  # of the same choices, as long as some go


@part
def has_bit(row: Any, j: int) -> bool:
    """Whether a choice holds an expert."""
    return bool((row[j >> 6] >> np.uint64(j & 63)) & np.uint64(1) == np.uint64(1))


@part
def pick(  # noqa: PLR0912, PLR0915
    taken: Any, loss: Any, starts: Any, low: Any, high: Any, prices: Any, limit: float, step: float, effort: int,
    alive: Any, best: Any,
) -> Any:  # fmt: skip
    """Choose one listed choice per client, of least total loss up to `limit`, that keeps the loads.

    Returns the loss (infinite if none), the effort spent, and whether the search is complete. `alive` is memory
    for the choices that are left, level by level; `best` gets the rows.
    """
    clients, words, experts = len(starts) - 1, taken.shape[1], len(low)
    one = np.uint64(1)
    record, spent, complete = np.inf, 0, True
    ends = np.empty((clients + 1, clients), np.int64)  # of each client's choices that are left, by level
    begins = np.empty((clients + 1, clients), np.int64)
    top = np.empty(clients + 2, np.int64)  # of `alive`, by level
    fixed = np.empty(clients, np.int64)  # the choice of each client, or -1
    turn, at = np.empty(clients + 1, np.int64), np.empty(clients + 1, np.int64)
    lost = np.empty(clients + 1)
    count = np.empty(experts, np.int64)
    closed, needed = np.empty((clients + 1, words), np.uint64), np.empty((clients + 1, words), np.uint64)
    any_, all_ = np.empty((clients, words), np.uint64), np.empty((clients, words), np.uint64)
    once, twice, sole = np.empty(words, np.uint64), np.empty(words, np.uint64), np.empty(words, np.uint64)
    taboo = np.empty(words, np.uint64)
    single, least = np.empty(words, np.uint64), np.empty(clients)
    for w in range(words):
        closed[0, w], needed[0, w] = np.uint64(0), np.uint64(0)
    for j in range(experts):
        count[j] = 0
        if high[j] <= 0:
            closed[0, j >> 6] |= one << np.uint64(j & 63)
        if low[j] > 0:
            needed[0, j >> 6] |= one << np.uint64(j & 63)
    top[0] = 0
    for i in range(clients):
        fixed[i] = -1
        begins[0, i] = top[0]
        for p in range(starts[i], starts[i + 1]):
            if loss[p] > limit:
                break
            alive[top[0]] = p
            top[0] += 1
        ends[0, i] = top[0]
    level, lost[0], entering = 0, 0.0, True
    while level >= 0:
        if entering:
            entering = False
            dead, changed, passes = False, True, 0
            while changed and not dead and passes < _PASSES:
                changed = False
                passes += 1
                total = lost[level]
                for w in range(words):
                    once[w], twice[w], single[w] = np.uint64(0), np.uint64(0), np.uint64(0)
                    taboo[w] = np.uint64(0)
                for i in range(clients):
                    if fixed[i] >= 0:
                        continue
                    if begins[level, i] == ends[level, i]:
                        dead = True
                        break
                    least[i] = loss[alive[begins[level, i]]]
                    total += least[i]
                    for w in range(words):
                        ors, ands = np.uint64(0), ~np.uint64(0)
                        for q in range(begins[level, i], ends[level, i]):
                            bits = taken[alive[q], w]
                            ors |= bits
                            ands &= bits
                        any_[i, w], all_[i, w] = ors, ands
                        twice[w] |= once[w] & ors
                        once[w] |= ors
                        taboo[w] |= single[w] & ands  # two clients that cannot do without it
                        single[w] |= ands
                if dead or total > limit:
                    dead = True
                    break
                for w in range(words):
                    if needed[level, w] & ~once[w] != np.uint64(0):
                        dead = True
                    sole[w] = needed[level, w] & ~twice[w]
                if dead:
                    break
                # Bits of experts with one place left: whoever cannot do without it has it.
                for w in range(words):
                    if single[w] != np.uint64(0):
                        for b in range(64):
                            j = 64 * w + b
                            if (single[w] >> np.uint64(b)) & one and high[j] - count[j] != 1:
                                single[w] &= ~(one << np.uint64(b))
                                taboo[w] &= ~(one << np.uint64(b))
                        if taboo[w] != np.uint64(0):
                            dead = True
                if dead:
                    break
                for i in range(clients):
                    if fixed[i] >= 0:
                        continue
                    to, most = begins[level, i], limit - total + least[i]
                    for q in range(begins[level, i], ends[level, i]):
                        p = alive[q]
                        if loss[p] > most:
                            break
                        good = True
                        for w in range(words):
                            bits = taken[p, w]
                            if bits & single[w] & ~all_[i, w] or sole[w] & any_[i, w] & ~bits:
                                good = False
                                break
                        if good:
                            alive[to] = p
                            to += 1
                    spent += ends[level, i] - begins[level, i]
                    if to < ends[level, i]:
                        changed = True
                        ends[level, i] = to
            if dead:
                level = _undo(level, turn, fixed, taken, count, experts)
                continue
            turn[level], fewest = -1, 1 << 60
            for i in range(clients):
                if fixed[i] < 0 and ends[level, i] - begins[level, i] < fewest:
                    fewest = ends[level, i] - begins[level, i]
                    turn[level] = i
            if turn[level] < 0:  # all are fixed
                total, good = lost[level], True
                for j in range(experts):
                    good = good and low[j] <= count[j] <= high[j]
                    total += max(prices[j], 0.0) * (high[j] - count[j]) + max(-prices[j], 0.0) * (
                        count[j] - low[j]
                    )
                if good and total <= limit:
                    record, limit = total, total - step
                    for i in range(clients):
                        best[i] = fixed[i]
                level = _undo(level, turn, fixed, taken, count, experts)
                continue
            at[level] = begins[level, turn[level]]
        i = turn[level]
        if spent > effort:
            complete = False
            break
        if at[level] == ends[level, i]:
            level = _undo(level, turn, fixed, taken, count, experts)
            continue
        p = alive[at[level]]
        at[level] += 1
        if lost[level] + loss[p] > limit:
            level = _undo(level, turn, fixed, taken, count, experts)
            continue
        fixed[i] = p
        deeper = level + 1
        lost[deeper] = lost[level] + loss[p]
        for w in range(words):
            closed[deeper, w], needed[deeper, w] = closed[level, w], needed[level, w]
        for j in range(experts):
            if has_bit(taken[p], j):
                count[j] += 1
                if count[j] >= high[j]:
                    closed[deeper, j >> 6] |= one << np.uint64(j & 63)
                if count[j] >= low[j]:
                    needed[deeper, j >> 6] &= ~(one << np.uint64(j & 63))
        top[deeper], good = top[level], True
        for c in range(clients):
            begins[deeper, c] = top[deeper]
            if fixed[c] < 0:
                for q in range(begins[level, c], ends[level, c]):
                    other = alive[q]
                    fits = True
                    for w in range(words):
                        if taken[other, w] & closed[deeper, w]:
                            fits = False
                            break
                    if fits:
                        if top[deeper] == len(alive):
                            complete, good = False, False
                            break
                        alive[top[deeper]] = other
                        top[deeper] += 1
                spent += ends[level, c] - begins[level, c]
                good = good and top[deeper] > begins[deeper, c]
            ends[deeper, c] = top[deeper]
            if not good:
                break
        level = deeper
        if good:
            turn[level] = -1
            entering = True
        else:
            turn[level] = -1
            level = _undo(level, turn, fixed, taken, count, experts)
    return record, spent, complete


@part
def _undo(level: int, turn: Any, fixed: Any, taken: Any, count: Any, experts: int) -> int:
    """Take back the choice that led to this level; return the one above."""
    level -= 1
    if level >= 0:
        p = fixed[turn[level]]
        fixed[turn[level]] = -1
        for j in range(experts):
            if has_bit(taken[p], j):
                count[j] -= 1
    return level
