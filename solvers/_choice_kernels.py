"""Compiled kernels of the Lagrangian backend: all choices of a client that are nearly best at given prices.

What a choice is worth less than the client's best one is its loss. Choices are listed depth first, experts by
efficiency, with what the rest could add at most: from a table over whole units where the budget has them
(Martello and Toth, *Knapsack Problems*, section 2.6), which leaves no dead ends, else the last expert in part.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import jit, part
from fedmoe_sched.solvers._knapsack_kernels import core_of, fractional, rank, rate, split_knapsack
from fedmoe_sched.solvers._nested_kernels import floor_worth, owed, owed_change

__all__ = ["list_near", "near_choices", "sort_choices"]

_CLOSER = 1.6  # how much less a listed choice may lose where there are too many
_LEAST_REACH = 1e-9
_NODES = 50  # looked at for every choice that may be listed


@part
def _listing_order(
    reduced: Any, size: Any, client: int, layer_of: Any, low: Any, high: Any, short: float, least: int, most: int,
    worth: float, limit: float, sort: bool, order: Any, key: Any, load: Any, shifted: Any, pull: Any, within: Any,
) -> int:  # fmt: skip
    """Write the experts that choices of such a loss may hold into `order`; return how many.

    By efficiency, where they are to be sorted.
    """
    # Who must take so many may have to take some that cost more than a choice may lose.
    lowest, count = -np.inf if least > 0 else -limit, 0
    if short < np.inf:
        lowest -= short
    for j in range(len(reduced)):
        if reduced[j] < lowest or reduced[j] == -np.inf:
            continue
        order[count] = j
        count += 1
    for g in range(len(pull)):
        pull[g] = 0.0
    if not sort:
        return count
    bound, price = rate(
        reduced, size, client, layer_of, low, high, short, least, most, order, count,
        np.empty((2, size.shape[0] + 1)), key, load, shifted, pull, within,
    )  # fmt: skip
    if price >= 0.0:  # whatever is taken that is worth less than its share of the budget costs the difference
        allowed, kept = bound - worth + limit + 1e-9 * (1.0 + abs(bound)), 0
        for k in range(count):
            j = order[k]
            if price * load[j] - shifted[j] <= allowed:
                order[kept] = j
                kept += 1
        count = kept
    return count


@part
def _rest_table(reduced: Any, units: Any, budget: int, order: Any, count: int, table: Any) -> None:
    """Write into ``table[k, w]`` what the experts from the k-th on are worth at most in w units."""
    for w in range(budget + 1):
        table[count, w] = 0.0
    for k in range(count - 1, -1, -1):
        j = order[k]
        weight, value = units[j], reduced[j]
        for w in range(min(weight, budget + 1)):
            table[k, w] = table[k + 1, w]
        for w in range(weight, budget + 1):
            table[k, w] = max(table[k + 1, w], table[k + 1, w - weight] + value)


@part
def _list_choices(  # noqa: PLR0912, PLR0915
    reduced: Any, size: Any, units: Any, budget: int, client: int, layer_of: Any, low: Any, high: Any,
    short: float, least: int, most: int, order: Any, count: int, key: Any, load: Any, shifted: Any, pull: Any,
    within: Any, open_: Any, table: Any, worth: float, reach: float, state: Any, used: Any, sure: Any,
    sure_count: int, sure_worth: float, taken: Any, loss: Any, first: int, listed_most: int,
) -> int:  # fmt: skip
    """List the choices of a client whose loss is at most `reach`; return how many, or -1 if they are too many.

    Their experts go into the rows of `taken` from `first` on, as bits of whole words, and what they lose into
    `loss`. ``budget`` is -1 where there are no whole units; where there are, layers have no bounds. All choices
    have the experts `sure`, which are not among the listed ones, and what these take is in `used`.
    """
    resources, words = size.shape[0], taken.shape[1]
    found, depth, held, nodes, room = 0, 0, sure_count, 0, budget
    value, total, due = sure_worth, 0.0, owed(pull, low, high, short, least, most)
    for g in range(len(low)):
        within[g] = open_[g] = 0
    for k in range(count):
        open_[layer_of[order[k]]] += 1
    for g in range(len(low)):
        if short == np.inf and open_[g] < low[g]:
            return 0
    if held > most:
        return 0
    for r in range(resources):
        if used[r] > 1.0 + 1e-11:  # units may be rounded down
            return 0
        total += used[r]
    state[0] = 0
    while depth >= 0:
        if depth == count:
            nodes += 1
            reached = value + floor_worth(within, low, short)
            if held >= least and reached >= worth - reach - 1e-9 * (1.0 + abs(worth)):
                if found == listed_most:
                    return -1
                row = first + found
                for w in range(words):
                    taken[row, w] = sure[w]
                for k in range(count):
                    if state[k] == 1:
                        j = order[k]
                        taken[row, j >> 6] |= np.uint64(1) << np.uint64(j & 63)
                loss[row] = max(0.0, worth - reached)
                found += 1
            depth -= 1
            continue
        j = order[depth]
        g = layer_of[j]
        if state[depth] == 0:  # with it
            state[depth] = 1
            fits = held < most and within[g] < high[g] and (budget < 0 or units[j] <= room)
            for r in range(resources):
                fits = fits and used[r] + size[r, client, j] <= 1.0 + 1e-11
            if fits:
                if budget >= 0:
                    rest = table[depth + 1, room - units[j]]
                else:
                    rest = fractional(key, shifted, load, order, depth + 1, count, 1.0 - total - load[j])
                    rest -= due + owed_change(pull, low, within, g, held, least)
                fits = fits and value + reduced[j] + rest >= worth - reach
            if fits:
                value += reduced[j]
                due += owed_change(pull, low, within, g, held, least)
                within[g] += 1
                open_[g] -= 1
                held += 1
                if budget >= 0:
                    room -= units[j]
                total += load[j]
                for r in range(resources):
                    used[r] += size[r, client, j]
                depth += 1
                state[depth] = 0
                continue
            state[depth] = 3
        if state[depth] == 1:  # give it back
            value -= reduced[j]
            held -= 1
            within[g] -= 1
            open_[g] += 1
            due -= owed_change(pull, low, within, g, held, least)
            if budget >= 0:
                room += units[j]
            total -= load[j]
            for r in range(resources):
                used[r] -= size[r, client, j]
            state[depth] = 3
        if state[depth] == 3:  # without it
            if budget >= 0:
                rest = table[depth + 1, room]
            else:
                rest = fractional(key, shifted, load, order, depth + 1, count, 1.0 - total) - due
            nodes += 1
            enough = held + count - depth - 1 >= least
            enough = enough and (short < np.inf or within[g] + open_[g] > low[g])
            if enough and value + rest >= worth - reach:
                open_[g] -= 1
                state[depth] = 2
                depth += 1
                state[depth] = 0
                continue
            state[depth] = 4
        if nodes > _NODES * (listed_most + 10):
            return -1
        if state[depth] == 2:  # it was left out
            open_[g] += 1
        depth -= 1
    return found


@part
def near_choices(
    reduced: Any, size: Any, units: Any, budget: int, client: int, layer_of: Any, low: Any, high: Any,
    short: float, least: int, most: int, worth: float, limit: float, order: Any, key: Any, load: Any, shifted: Any,
    pull: Any, within: Any, open_: Any, table: Any, state: Any, used: Any, sure: Any, taken: Any, loss: Any,
    first: int, listed_most: int,
) -> Any:  # fmt: skip
    """List the choices of a client that lose at most `limit`, or less where there are too many.

    Returns how many, -1 if there are too many at any limit, and whether those are all. Rows are as in
    `_list_choices`; arrays before `taken` are memory, ``table`` of one row per expert and one more.
    """
    sure_worth, sure_count, reach = 0.0, 0, limit
    count = _listing_order(
        reduced, size, client, layer_of, low, high, short, least, most, worth, limit, budget < 0, order, key, load,
        shifted, pull, within,
    )  # fmt: skip
    for w in range(len(sure)):
        sure[w] = np.uint64(0)
    total = count
    if budget >= 0:
        unit, bound = split_knapsack(reduced, units, budget, key, order, count)[:2]
        count, sure_worth, sure_used = core_of(
            reduced, units, unit, bound - worth + limit + 1e-9 * (1.0 + bound), order, count
        )
        for k in range(count, total):
            j = order[k]
            if reduced[j] > unit * units[j]:
                sure[j >> 6] |= np.uint64(1) << np.uint64(j & 63)
                sure_count += 1
        budget -= sure_used
        _rest_table(reduced, units, budget, order, count, table)
    while True:
        for r in range(size.shape[0]):
            used[r] = 0.0
            for k in range(count, total):
                j = order[k]
                if (sure[j >> 6] >> np.uint64(j & 63)) & np.uint64(1):
                    used[r] += size[r, client, j]
        found = _list_choices(
            reduced, size, units, budget, client, layer_of, low, high, short, least, most, order, count, key, load,
            shifted, pull, within, open_, table, worth, reach, state, used, sure, sure_count, sure_worth, taken,
            loss, first, listed_most,
        )  # fmt: skip
        if found >= 0:
            return found, reach == limit
        reach /= _CLOSER
        if reach < _LEAST_REACH:
            return -1, False


@part
def sort_choices(taken: Any, loss: Any, first: int, found: int, ranks: Any, spare: Any, spare_loss: Any) -> None:
    """Sort the rows from `first` on, so many, by their loss."""
    for q in range(found):
        ranks[q], spare_loss[q] = q, -loss[first + q]
        for w in range(taken.shape[1]):
            spare[q, w] = taken[first + q, w]
    rank(spare_loss, ranks, found)
    for q in range(found):
        loss[first + q] = -spare_loss[ranks[q]]
        for w in range(taken.shape[1]):
            taken[first + q, w] = spare[ranks[q], w]


@jit
def list_near(
    gain: Any, size: Any, least: Any, most: Any, layer_of: Any, layer_min: Any, layer_max: Any, units: Any,
    budgets: Any, short: float, prices: Any, worth: Any, limit: float, listed_most: int,
) -> Any:  # fmt: skip
    """List the choices of every client that lose at most `limit`, or less where they are more than `listed_most`.

    Parameters
    ----------
    gain, size, least, most, layer_of, layer_min, layer_max, units, budgets, short
        As in `fedmoe_sched.solvers._budget_dual.Clients`.
    prices : ndarray, shape (m,)
    worth : ndarray, shape (n,)
        At least what each client's best choice is worth at these prices.
    limit : float
    listed_most : int

    Returns
    -------
    taken : ndarray, shape (n * listed_most, words), uint64
        Experts of the choices, as bits.
    starts : ndarray, shape (n + 1,), int64
        Where the choices of each client begin, and the last ones end.
    whole : bool
        Whether no choice that loses at most `limit` is missing.
    """
    n, m = gain.shape
    words, widest = (m + 63) >> 6, 0
    for i in range(n):
        widest = max(widest, budgets[i])
    taken, loss = np.empty((n * listed_most, words), np.uint64), np.empty(n * listed_most)
    table = np.empty((m + 1, widest + 1))
    reduced, key, load = np.empty(m), np.empty(m), np.empty(m)
    order, state = np.empty(m + 1, np.int64), np.empty(m + 1, np.int64)
    shifted, pull = np.empty(m), np.empty(layer_min.shape[1] + 1)
    within, open_ = np.empty(layer_min.shape[1], np.int64), np.empty(layer_min.shape[1], np.int64)
    used, sure, starts, whole = (
        np.empty(size.shape[0]),
        np.empty(words, np.uint64),
        np.empty(n + 1, np.int64),
        True,
    )
    starts[0] = 0
    for i in range(n):
        for j in range(m):
            reduced[j] = gain[i, j] - prices[j]
        found, all_ = near_choices(
            reduced, size, units[i], budgets[i], i, layer_of, layer_min[i], layer_max[i], short, least[i],
            most[i], worth[i], limit, order, key, load, shifted, pull, within, open_, table, state, used, sure,
            taken, loss, starts[i], listed_most,
        )  # fmt: skip
        whole = whole and all_
        starts[i + 1] = starts[i] + max(found, 0)
    return taken[: starts[n]], starts, whole
