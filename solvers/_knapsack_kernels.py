"""Compiled kernels of the Lagrangian backend: what clients with budgets choose at given prices of the experts.

Sizes are relative to the budgets, ``size[r, i, j]``, so that every budget is 1; pairs that are not possible have a
gain of -inf. A client first takes its best experts, whatever their size; if that does not fit, it is solved by
dynamic programming over whole units (Martello and Toth, *Knapsack Problems*, section 2.6) or, where the budget
has none or there are several, by a depth-first branch and bound (section 2.5) of so many nodes at most.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import jit, part
from fedmoe_sched.solvers._nested_kernels import floor_worth, greedy, is_nested, owed, owed_change, price_numbers

__all__ = ["core_of", "fractional", "multipliers", "rank", "rate", "respond", "split_knapsack"]

_MOST_NODES = 2000
_WEIGHINGS, _STALLED = 12, 2  # weights of resources that are tried, and so many without a better bound,
_BETTER = 0.999  # that is, so many times the one before
_NEXT, _TINY = 0.8, 1e-12  # of the efficiency of experts, that the next to be sorted have at least


@part
def rank(key: Any, listed: Any, size: int) -> None:
    """Sort the first `size` numbers of `listed` by `key`, the largest first: a heap sort, in place."""
    for start in range(size // 2 - 1, -1, -1):
        _sink(key, listed, start, size)
    for end in range(size - 1, 0, -1):
        listed[0], listed[end] = listed[end], listed[0]
        _sink(key, listed, 0, end)


@part
def _sink(key: Any, listed: Any, start: int, end: int) -> None:
    at = start
    while True:
        child = 2 * at + 1
        if child >= end:
            return
        if child + 1 < end and key[listed[child + 1]] < key[listed[child]]:
            child += 1
        if key[listed[child]] >= key[listed[at]]:
            return
        listed[at], listed[child] = listed[child], listed[at]
        at = child


@part
def _by_dynamic_program(
    reduced: Any, units: Any, budget: int, listed: Any, size: int, table: Any, took: Any
) -> float:
    """Solve a knapsack in whole units over the listed experts; mark the choice, and return its worth."""
    for w in range(budget + 1):
        table[w] = 0.0
    for k in range(size):
        j = listed[k]
        weight, value = units[j], reduced[j]
        for w in range(weight):
            took[k, w] = 0
        for w in range(budget, weight - 1, -1):
            with_it = table[w - weight] + value
            if with_it > table[w]:
                table[w] = with_it
                took[k, w] = 1
            else:
                took[k, w] = 0
    return float(table[budget])


@part
def split_knapsack(  # noqa: PLR0912
    reduced: Any, units: Any, budget: int, key: Any, listed: Any, count: int
) -> Any:
    """Solve the linear relaxation of a knapsack in whole units; sort the listed experts by efficiency.

    Returns what a unit is worth, the bound that it proves, what a choice loses against that, and this choice: the
    first `first` listed experts, and of those up to `front` what fits, in order; or one expert `out`, one `into`.

    An expert that is not as the bound has it (taken if it is worth more than its units) costs the difference:
    where that is more than an answer may lose, it is settled (Martello and Toth, section 2.2.3).
    """
    threshold = 0.0
    for k in range(count):
        j = listed[k]
        key[j] = reduced[j] / (units[j] + 1e-9) if reduced[j] > 0.0 else reduced[j]
        threshold = max(threshold, key[j])
    front, filled = 0, 0
    while front < count and filled <= 2 * budget and threshold > 0.0:  # the others are not worth sorting
        threshold = _NEXT * threshold if threshold > _TINY else 0.0
        for k in range(front, count):
            j = listed[k]
            if key[j] >= threshold:
                listed[k] = listed[front]
                listed[front] = j
                front += 1
                filled += units[j]
    rank(key, listed, front)
    room, first = budget, 0  # the first expert that does not fit
    while first < front and reduced[listed[first]] > 0.0 and units[listed[first]] <= room:
        room -= units[listed[first]]
        first += 1
    unit = 0.0
    if first < front and reduced[listed[first]] > 0.0:
        unit = reduced[listed[first]] / units[listed[first]]
    bound = unit * budget
    for k in range(first):
        bound += max(0.0, reduced[listed[k]] - unit * units[listed[k]])
    lost, left = 0.0, room
    for k in range(first, front):
        j = listed[k]
        if reduced[j] > 0.0 and units[j] <= left:
            left -= units[j]
            lost += unit * units[j] - reduced[j]
    lost += unit * left
    out, into = -1, -1
    for k in range(first):  # another one in its place
        without = reduced[listed[k]] - unit * units[listed[k]]
        if without >= lost:
            continue
        left = room + units[listed[k]]
        for q in range(first, front):
            j = listed[q]
            dearer = without + unit * units[j] - reduced[j]
            if dearer >= lost:
                break
            if units[j] <= left and dearer + unit * (left - units[j]) < lost:
                lost = dearer + unit * (left - units[j])
                out, into = listed[k], j
    return unit, bound, lost, first, front, out, into


@part
def core_of(reduced: Any, units: Any, unit: float, most_lost: float, listed: Any, count: int) -> Any:
    """Move the experts that are settled behind the others; return how many are not, and worth and units of those
    that are taken for sure, which come last.
    """  # noqa: D205
    kept, end, worth, used = 0, count, 0.0, 0
    while kept < end:
        j = listed[kept]
        difference = reduced[j] - unit * units[j]
        if -most_lost <= difference <= most_lost:
            kept += 1
            continue
        if difference > 0.0:
            worth += reduced[j]
            used += units[j]
        end -= 1
        listed[kept], listed[end] = listed[end], listed[kept]
    return kept, worth, used


@part
def fractional(key: Any, reduced: Any, load: Any, listed: Any, start: int, size: int, room: float) -> float:
    """Fill what is left of a knapsack by efficiency, the last expert in part: no choice is worth more."""
    worth = 0.0
    for k in range(start, size):
        j = listed[k]
        if key[j] <= 0.0:
            break
        if load[j] > room:
            worth += reduced[j] * (room / load[j])
            break
        room -= load[j]
        worth += reduced[j]
    return worth


@part
def _weigh(  # noqa: PLR0912
    reduced: Any, size: Any, client: int, most: int, listed: Any, count: int, weight: Any, key: Any, load: Any
) -> float:  # fmt: skip
    """Weigh all resources, and the count, so that the knapsack of their weighted sum bounds a client closely.

    Any weights give a bound (surrogate relaxation: Glover 1975, *Operations Research* 23); those of what is taken
    too much of rise. They sum to 1, and so does what there is. Writes `load`, what each expert takes of it, and
    `key`, what it is worth per load; sorts `listed` by it. ``weight`` is memory, shape (2, R + 1). Returns the
    bound.
    """
    resources = size.shape[0]
    positive = 0
    for k in range(count):
        if reduced[listed[k]] > 0.0:
            positive += 1
    one = 1.0 / max(most, 1)
    kinds = resources + 1 if most < positive else resources
    for r in range(resources + 1):
        weight[0, r] = weight[1, r] = 1.0 / kinds if r < kinds else 0.0
    bound, now, stalled = np.inf, 0, 0
    for step in range(_WEIGHINGS + 1):
        if step == _WEIGHINGS or stalled == _STALLED:
            now = 1  # the best weights once more at the end
        for k in range(count):
            j = listed[k]
            load[j] = weight[now, resources] * one
            for r in range(resources):
                load[j] += weight[now, r] * size[r, client, j]
            key[j] = reduced[j] / (load[j] + 1e-12) if reduced[j] > 0.0 else reduced[j]
        rank(key, listed, count)
        value = fractional(key, reduced, load, listed, 0, count, 1.0)
        if now == 1 or kinds == 1:
            return value
        stalled = 0 if value < _BETTER * bound else stalled + 1
        if value < bound:
            bound = value
            for r in range(kinds):
                weight[1, r] = weight[0, r]
        largest, total = 0.0, 0.0
        for r in range(kinds):
            taken, room = 0.0, 1.0
            for k in range(count):
                j = listed[k]
                if key[j] <= 0.0 or room <= 0.0:
                    break
                part_ = min(1.0, room / load[j]) if load[j] > 0.0 else 1.0
                taken += part_ * (one if r == resources else size[r, client, j])
                room -= part_ * load[j]
            largest = max(largest, taken)
            weight[0, r] *= np.exp(min(taken - 1.0, 2.0))
            total += weight[0, r]
        for r in range(kinds):
            weight[0, r] /= total
        if largest <= 1.0:  # it fits, all but one whole: no weights bound more closely
            return value
    return bound


@part
def rate(
    reduced: Any, size: Any, client: int, layer_of: Any, low: Any, high: Any, short: float, least: int, most: int,
    listed: Any, count: int, weight: Any, key: Any, load: Any, shifted: Any, pull: Any, within: Any,
) -> Any:  # fmt: skip
    """Weigh the budgets, price the bounds on numbers, if any, and sort experts by what they are worth per load.

    Writes `shifted` and `pull`, too; see `price_numbers`. Returns the bound, and the price of the weighed budget,
    -1 where it is not known.
    """
    if is_nested(layer_of, low, high, least, listed, count, within):
        net, takes = np.empty(len(reduced)), np.empty(len(reduced), np.int8)
        bound, price = price_numbers(
            reduced, size, client, layer_of, low, high, short, least, most, listed, count, weight, load, shifted,
            pull, net, within, takes,
        )  # fmt: skip
        for k in range(count):
            j = listed[k]
            key[j] = shifted[j] / (load[j] + 1e-12) if shifted[j] > 0.0 else shifted[j]
        rank(key, listed, count)
        return bound, price
    for g in range(len(pull)):
        pull[g] = 0.0
    for k in range(count):
        shifted[listed[k]] = reduced[listed[k]]
    return _weigh(reduced, size, client, most, listed, count, weight, key, load), -1.0


@part
def _alike(size: Any, client: int, layer_of: Any, one: int, other: int) -> bool:
    """Whether two experts of the same worth are the same to a client."""
    if layer_of[one] != layer_of[other]:
        return False
    same = True
    for r in range(size.shape[0]):
        same = same and size[r, client, one] == size[r, client, other]
    return same


@part
def _by_branching(  # noqa: PLR0912, PLR0915
    reduced: Any, size: Any, client: int, layer_of: Any, low: Any, high: Any, short: float, listed: Any,
    count: int, least: int, most: int, key: Any, load: Any, shifted: Any, pull: Any, within: Any, open_: Any,
    state: Any, used: Any, best: Any, weight: Any,
) -> Any:  # fmt: skip
    """Search the choices of a client; mark the best one in `best`; return its worth and an upper bound."""
    resources = size.shape[0]
    for k in range(count):
        best[k] = 0
        state[k] = 0
    ceiling, _ = rate(
        reduced, size, client, layer_of, low, high, short, least, most, listed, count, weight, key, load, shifted,
        pull, within,
    )  # fmt: skip
    for r in range(resources):
        used[r] = 0.0
    for g in range(len(low)):
        within[g] = open_[g] = 0
    for k in range(count):
        open_[layer_of[listed[k]]] += 1
    worth, record, held, depth, nodes, total = 0.0, -np.inf, 0, 0, 0, 0.0
    due = owed(pull, low, high, short, least, most)
    complete = ceiling > -np.inf
    if not complete:
        return -np.inf, -np.inf
    while True:
        if nodes > _MOST_NODES:
            complete = False
            break
        hopeless = held + count - depth < least
        if depth > 0:  # what was left out may have been needed
            g = layer_of[listed[depth - 1]]
            hopeless = hopeless or (short == np.inf and within[g] + open_[g] < low[g])
        if depth == count:
            earned = floor_worth(within, low, short)
            if not hopeless and worth + earned > record:
                record = worth + earned
                for k in range(count):
                    best[k] = state[k] == 1
            hopeless = True
        elif not hopeless:
            rest = 0.0
            if held < most:
                rest = fractional(key, shifted, load, listed, depth, count, 1.0 - total)
            hopeless = worth + rest - due <= record
        if hopeless:
            depth -= 1
            while depth >= 0 and state[depth] == 2:
                open_[layer_of[listed[depth]]] += 1
                depth -= 1
            if depth < 0:
                break
            j = listed[depth]
            state[depth] = 2
            held -= 1
            within[layer_of[j]] -= 1
            due -= owed_change(pull, low, within, layer_of[j], held, least)
            worth -= reduced[j]
            total -= load[j]
            for r in range(resources):
                used[r] -= size[r, client, j]
            depth += 1
            continue
        nodes += 1
        j = listed[depth]
        g = layer_of[j]
        fits = held < most and within[g] < high[g]
        for r in range(resources):
            fits = fits and used[r] + size[r, client, j] <= 1.0 + 1e-11
        if depth > 0 and state[depth - 1] == 2 and reduced[listed[depth - 1]] == reduced[j]:
            fits = fits and not _alike(size, client, layer_of, listed[depth - 1], j)  # one that was left out
        state[depth] = 2
        open_[g] -= 1
        if fits:
            state[depth] = 1
            due += owed_change(pull, low, within, g, held, least)
            within[g] += 1
            held += 1
            worth += reduced[j]
            total += load[j]
            for r in range(resources):
                used[r] += size[r, client, j]
        depth += 1
    return record, record if complete else ceiling


@part
def _by_core(
    reduced: Any, units: Any, budget: int, most: int, key: Any, listed: Any, count: int, table: Any, took: Any,
    chosen: Any,
) -> float:  # fmt: skip
    """Solve a knapsack in whole units; mark the choice, at most `most` experts of it, and return its worth."""
    unit, bound, lost, first, front, out, into = split_knapsack(reduced, units, budget, key, listed, count)
    rounding = 1e-9 * (1.0 + bound)
    kept = 0
    if lost <= rounding:  # there is nothing better
        room = budget
        for k in range(front):
            j = listed[k]
            takes = j != out if k < first or into >= 0 else reduced[j] > 0.0 and units[j] <= room
            if takes and (k < first or into < 0 or j == into) and kept < most:
                chosen[j] = 1
                kept += 1
                room -= units[j]
        return float(bound)
    core, sure, room = core_of(reduced, units, unit, lost + rounding, listed, count)
    room = budget - room
    worth = sure + _by_dynamic_program(reduced, units, room, listed, core, table, took)
    for k in range(core, count):
        j = listed[k]
        if reduced[j] > unit * units[j] and kept < most:
            chosen[j] = 1
            kept += 1
    for k in range(core - 1, -1, -1):
        if took[k, room] and kept < most:
            chosen[listed[k]] = 1
            room -= units[listed[k]]
            kept += 1
    return float(worth)


@jit
def respond(  # noqa: PLR0912
    gain: Any, size: Any, least: Any, most: Any, layer_of: Any, layer_min: Any, layer_max: Any, units: Any,
    budgets: Any, short: float, prices: Any, chosen: Any, worth: Any,
) -> None:  # fmt: skip
    """Let every client choose at these prices.

    Writes the choices, shape (n, m), and an upper bound on the worth of each client's best one. ``units[i, j]``
    are sizes in whole units of which client i has ``budgets[i]``; -1 where there is no such unit, or where there
    are bounds on layers. What an expert is worth more up to a layer's lower bound is `short`; infinite: it is
    never missed.
    """
    (n, m), layers = gain.shape, layer_min.shape[1]
    widest = 0
    for i in range(n):
        widest = max(widest, budgets[i])
    table, took = np.empty(widest + 1), np.empty((m if widest > 0 else 1, widest + 1), np.int8)
    reduced, key, load = np.empty(m), np.empty(m), np.empty(m)
    listed, state, best = np.empty(m, np.int64), np.empty(m, np.int64), np.empty(m, np.int64)
    used, weight = np.empty(size.shape[0]), np.empty((2, size.shape[0] + 1))
    within, open_, pull, shifted = (
        np.empty(layers, np.int64),
        np.empty(layers, np.int64),
        np.empty(layers + 1),
        np.empty(m),
    )
    for i in range(n):
        count, least_of_all = 0, least[i]
        for g in range(layers):
            least_of_all = max(least_of_all, layer_min[i, g])
        for j in range(m):
            chosen[i, j] = 0
            reduced[j] = gain[i, j] - prices[j]
            if reduced[j] > (0.0 if least_of_all == 0 else -np.inf):
                listed[count] = j
                count += 1
        if min(most[i], layer_max[i, 0]) < count or layers > 1 or least_of_all > 0:
            rank(reduced, listed, count)
        value, _ = greedy(
            reduced, layer_of, layer_min[i], layer_max[i], short, least[i], most[i], listed, count, within,
            chosen[i],
        )  # fmt: skip
        worth[i] = value
        if value == -np.inf:
            for j in range(m):
                chosen[i, j] = 0
            continue
        fits = True
        for r in range(size.shape[0]):
            used[r] = 0.0
            for k in range(count):
                if chosen[i, listed[k]]:
                    used[r] += size[r, i, listed[k]]
            fits = fits and used[r] <= 1.0 + 1e-11
        if fits:
            continue
        for j in range(m):
            chosen[i, j] = 0
        if budgets[i] >= 0 and least[i] == 0:
            worth[i] = min(
                value, _by_core(reduced, units[i], budgets[i], most[i], key, listed, count, table, took, chosen[i])
            )
            value, kept = worth[i], 0
            for j in range(m):
                if chosen[i, j]:
                    value -= reduced[j]
                    kept += 1
            fits = kept < most[i] or value <= 1e-9 * (1.0 + worth[i])
        if not fits:  # several resources, no units, or more experts than the client may take
            record, ceiling = _by_branching(
                reduced, size, i, layer_of, layer_min[i], layer_max[i], short, listed, count, least[i], most[i],
                key, load, shifted, pull, within, open_, state, used, best, weight,
            )  # fmt: skip
            worth[i] = min(worth[i], ceiling)
            if record > -np.inf:
                for k in range(count):
                    chosen[i, listed[k]] = best[k]


@jit
def multipliers(gain: Any, size: Any, least: Any, most: Any, prices: Any, found: Any) -> None:
    """Estimate what a budget of each client is worth at these prices, all its resources as one: shape (n,).

    It is the efficiency of the first expert, from the most efficient one down, that no longer fits.
    """
    n, m = gain.shape
    key, load, listed = np.empty(m), np.empty(m), np.empty(m, np.int64)
    for i in range(n):
        count = 0
        for j in range(m):
            reduced = gain[i, j] - prices[j]
            if reduced > 0.0:
                load[j] = 0.0
                for r in range(size.shape[0]):
                    load[j] += size[r, i, j]
                key[j] = reduced / (load[j] + 1e-12)
                listed[count] = j
                count += 1
        rank(key, listed, count)
        room, found[i] = float(size.shape[0]), 0.0
        for k in range(min(count, most[i])):
            room -= load[listed[k]]
            if room < 0.0:
                found[i] = key[listed[k]]
                break
