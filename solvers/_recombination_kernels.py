"""Compiled kernels of the Lagrangian backend: the best answer for some clients, all others fixed.

At good prices an optimal answer is made of choices that lose little against each client's best one: what it is
worth less than the bound is the sum of those losses, and of prices paid for places that stay free. All choices of
little loss are listed, and combined. If nothing is found, the limit of the loss rises (iterative deepening: Korf
1985, *Artificial Intelligence* 27), until it is proved that no answer is better.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._choice_kernels import near_choices, sort_choices
from fedmoe_sched.solvers._compile import jit, part
from fedmoe_sched.solvers._knapsack_kernels import respond
from fedmoe_sched.solvers._partition_kernels import has_bit, pick

__all__ = ["recombine"]

_DEEPER = 1.6  # how much the limit of the loss rises
_SHALLOWEST, _FIRST = 1 / 60, 1 / 500  # of what an answer may lose: the first limit
_AIM = 0.01  # of the bound, that subgradient steps aim below it
_PATIENCE, _SHRINK, _INERTIA = 4, 0.6, 0.5  # of subgradient steps
_MEMORY = 30_000_000  # choices in all levels of the search


@jit
def recombine(  # noqa: PLR0912, PLR0915
    gain: Any, size: Any, least: Any, most: Any, layer_of: Any, layer_min: Any, layer_max: Any, units: Any,
    budgets: Any, load_min: Any, load_max: Any, prices: Any, held: Any, loads: Any, some: Any, step: float,
    allowed: float, ascent: int, listed_most: int, effort: int,
) -> Any:  # fmt: skip
    """Find the best experts of some clients, all others fixed, and write them into `held` and `loads`.

    Parameters
    ----------
    gain, size, least, most, layer_of, layer_min, layer_max, units, budgets, load_min, load_max
        As in `fedmoe_sched.solvers._budget_dual.Clients`.
    prices : ndarray, shape (m,)
        To start from.
    held : ndarray, shape (n, m), int8
    loads : ndarray, shape (m,), int64
    some : ndarray, shape (k,), int64
        The clients.
    step : float
        Least difference of two objectives.
    allowed : float
        What an answer may lose against the bound, where none that keeps the loads of the experts is held yet; -1
        where one is.
    ascent : int
        Subgradient steps that adapt the prices.
    listed_most : int
        Choices that are listed of a client.
    effort : int
        Choices looked at, in all.

    Returns
    -------
    better : float
        What was gained, or may be gained at most where nothing was held; 0 if nothing better was found.
    slack : float
        By how much a better answer might still exceed the one held now; 0 if there is none.
    """
    k, m, resources, layers = len(some), gain.shape[1], size.shape[0], layer_min.shape[1]
    places = np.empty(m, np.int64)
    experts = 0
    for j in range(m):
        outside = loads[j]
        for i in some:
            outside -= held[i, j]
        if load_max[j] - outside > 0:
            places[experts] = j
            experts += 1
    low, high = np.empty(experts, np.int64), np.empty(experts, np.int64)
    own, own_size, own_units = (
        np.empty((k, experts)),
        np.empty((resources, k, experts)),
        np.empty((k, experts), np.int64),
    )
    own_least, own_most, own_budgets = np.empty(k, np.int64), np.empty(k, np.int64), np.empty(k, np.int64)
    own_layer, own_low, own_high = (
        np.empty(experts, np.int64),
        np.empty((k, layers), np.int64),
        np.empty((k, layers), np.int64),
    )
    price = np.empty(experts)
    value = 0.0
    for e in range(experts):
        j = places[e]
        own_layer[e] = layer_of[j]
        outside = loads[j]
        price[e] = prices[j]
        for c in range(k):
            i = some[c]
            outside -= held[i, j]
            own[c, e], own_units[c, e] = gain[i, j], units[i, j]
            for r in range(resources):
                own_size[r, c, e] = size[r, i, j]
            if held[i, j]:
                value += gain[i, j]
        low[e], high[e] = max(load_min[j] - outside, 0), load_max[j] - outside
    for c in range(k):
        own_least[c], own_most[c], own_budgets[c] = least[some[c]], most[some[c]], budgets[some[c]]
        for g in range(layers):
            own_low[c, g], own_high[c, g] = layer_min[some[c], g], layer_max[some[c], g]
    chosen, worth = np.empty((k, experts), np.int8), np.empty(k)
    target = value + step
    if allowed >= 0.0:
        bound = _adapt(
            own, own_size, own_least, own_most, own_layer, own_low, own_high, own_units, own_budgets, low, high,
            price, -np.inf, 0, chosen, worth,
        )  # fmt: skip
        target = bound - _AIM * abs(bound)
    bound = _adapt(
        own, own_size, own_least, own_most, own_layer, own_low, own_high, own_units, own_budgets, low, high, price,
        target, ascent, chosen, worth,
    )  # fmt: skip
    if bound == -np.inf:  # a client has fewer experts that fit than it must take
        return 0.0, 0.0
    if allowed >= 0.0:
        value = bound - allowed - step
    gap = bound - value - step
    if gap < 0.0:
        return 0.0, 0.0
    words = (experts + 63) >> 6
    taken, loss = np.empty((k * listed_most + 1, words), np.uint64), np.empty(k * listed_most + 1)
    spare, spare_loss = np.empty((listed_most, words), np.uint64), np.empty(listed_most)
    ranks = np.empty(listed_most, np.int64)
    widest = 0
    for c in range(k):
        widest = max(widest, own_budgets[c])
    table = np.empty((experts + 1, widest + 1))
    reduced, key, load = np.empty(experts), np.empty(experts), np.empty(experts)
    order, state = np.empty(experts + 1, np.int64), np.empty(experts + 1, np.int64)
    sure, shifted, pull = np.empty(words, np.uint64), np.empty(experts), np.empty(layers + 1)
    within, open_ = np.empty(layers, np.int64), np.empty(layers, np.int64)
    used, starts, best = np.empty(resources), np.empty(k + 1, np.int64), np.empty(k, np.int64)
    limit, slack, whole = min(gap * _SHALLOWEST, max(gap * _FIRST, step)), gap + step, True
    while True:
        limit = min(limit, gap)
        if whole:  # else no more could be listed
            starts[0] = 0
            for c in range(k):
                for e in range(experts):
                    reduced[e] = own[c, e] - price[e]
                found, all_ = near_choices(
                    reduced, own_size, own_units[c], own_budgets[c], c, own_layer, own_low[c], own_high[c],
                    np.inf, own_least[c], own_most[c], worth[c], limit, order, key, load, shifted, pull, within,
                    open_, table, state, used, sure, taken, loss, starts[c], listed_most,
                )  # fmt: skip
                if found < 0:
                    return 0.0, slack
                whole = whole and all_
                starts[c + 1] = starts[c] + found
                sort_choices(taken, loss, starts[c], found, ranks, spare, spare_loss)
        alive = np.empty(min((k + 1) * starts[k] + 1, _MEMORY), np.int64)
        record, spent, complete = pick(taken, loss, starts, low, high, price, limit, step, effort, alive, best)
        effort -= spent
        if record < np.inf:
            for c in range(k):
                i = some[c]
                for e in range(experts):
                    j = places[e]
                    now = 1 if has_bit(taken[best[c]], e) else 0
                    loads[j] += now - held[i, j]
                    held[i, j] = now
            return bound - record - value, 0.0 if whole and complete else record
        if not complete or effort <= 0:
            return 0.0, slack
        if limit >= gap:
            return 0.0, 0.0 if whole else slack
        if whole:
            slack = gap + step - limit
        limit *= _DEEPER


@part
def _adapt(  # noqa: PLR0912
    gain: Any, size: Any, least: Any, most: Any, layer_of: Any, layer_min: Any, layer_max: Any, units: Any,
    budgets: Any, low: Any, high: Any, price: Any, target: float, steps: int, chosen: Any, worth: Any,
) -> float:  # fmt: skip
    """Improve prices by subgradient steps towards `target`; return the bound of the best ones, which are left."""
    experts = len(price)
    best, best_worth, direction = np.empty(experts), np.empty(len(worth)), np.empty(experts)
    for e in range(experts):
        best[e], direction[e] = price[e], 0.0
    record, trust, stalled = np.inf, 1.0, 0
    for at in range(steps + 1):
        respond(
            gain, size, least, most, layer_of, layer_min, layer_max, units, budgets, np.inf, price, chosen, worth
        )
        bound = 0.0
        for c in range(len(worth)):
            bound += worth[c]
        for e in range(experts):
            bound += max(price[e], 0.0) * high[e] - max(-price[e], 0.0) * low[e]
        if bound < record:
            if bound < record - 1e-3 * abs(record - target):
                stalled = 0
            record = bound
            for e in range(experts):
                best[e] = price[e]
            for c in range(len(worth)):
                best_worth[c] = worth[c]
        else:
            stalled += 1
        if record < target or at == steps:
            break
        if stalled > _PATIENCE:
            trust, stalled = _SHRINK * trust, 0
            for e in range(experts):
                price[e], direction[e] = best[e], 0.0
            continue
        length = 0.0
        for e in range(experts):
            load = 0
            for c in range(len(worth)):
                load += chosen[c, e]
            wanted = high[e] if price[e] > 0.0 else low[e] if price[e] < 0.0 else min(max(load, low[e]), high[e])
            direction[e] = load - wanted + _INERTIA * direction[e]
            length += direction[e] * direction[e]
        if length == 0.0:
            break
        for e in range(experts):
            price[e] += trust * (bound - target) / length * direction[e]
    for e in range(experts):
        price[e] = best[e]
    for c in range(len(worth)):
        worth[c] = best_worth[c]
    return record
