"""Compiled kernels of the Lagrangian backend: clients whose experts are bounded in number, by layer and in all.

Without budgets the choices of such a client are a generalised matroid, and the greedy choice is best (Frank and
Tardos 1988, *Mathematical Programming* 42). With them, budgets are weighed into one that has a price; at that
price the greedy choice bounds what a client gains. What it says of the bounds on numbers, a price for every layer
and one for all experts, is then put on the experts, so that searches need not look at those bounds again.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import part

__all__ = ["floor_worth", "greedy", "is_nested", "owed", "owed_change", "price_numbers"]

_CUTS, _CLOSE = 12, 1e-4  # prices of the budget that are tried, and parts of the bound that they may miss
_WEIGHINGS, _STALLED = 12, 2  # weights of resources that are tried, and so many without a better bound,
_BETTER = 0.999  # that is, so many times the one before


@part
def is_nested(layer_of: Any, low: Any, high: Any, least: int, listed: Any, count: int, within: Any) -> bool:
    """Whether a client has to take experts, or has more possible ones in a layer than it may take."""
    for g in range(len(low)):
        within[g] = 0
        if low[g] > 0:
            return True
    for k in range(count):
        within[layer_of[listed[k]]] += 1
    for g in range(len(low)):
        if within[g] > high[g]:
            return True
    return least > 0


@part
def greedy(  # noqa: PLR0912
    net: Any, layer_of: Any, low: Any, high: Any, short: float, least: int, most: int, listed: Any, count: int,
    within: Any, takes: Any,
) -> Any:  # fmt: skip
    """Take the best of some experts, which are sorted, that keep the bounds of the layers and of the client.

    Returns what they are worth, -inf if nothing keeps the bounds, and from which worth on experts are taken where
    no layer binds. Where lower bounds of layers may give way, the first experts of a layer, that many, are worth
    `short` more.
    """
    total, worth, bar = 0, 0.0, 0.0
    for g in range(len(low)):
        within[g] = 0
    for k in range(count):
        j = listed[k]
        g = layer_of[j]
        takes[j] = 0
        if within[g] < low[g]:
            takes[j] = 1
            within[g] += 1
            total += 1
            worth += net[j]
    if short < np.inf:
        return _greedy_with_floors(net, layer_of, low, high, short, least, most, listed, count, within, takes)
    for g in range(len(low)):
        if within[g] < low[g]:
            return -np.inf, 0.0
    if total > most:
        return -np.inf, 0.0
    for k in range(count):
        j = listed[k]
        g = layer_of[j]
        if takes[j] or within[g] >= high[g]:
            continue
        if total == most:
            if net[j] > 0.0:
                bar = net[j]
            break
        if total >= least and net[j] <= 0.0:
            break
        takes[j] = 1
        within[g] += 1
        total += 1
        worth += net[j]
        if net[j] < 0.0:
            bar = net[j]
    if total < least:
        return -np.inf, 0.0
    return worth, bar


@part
def _greedy_with_floors(
    net: Any, layer_of: Any, low: Any, high: Any, short: float, least: int, most: int, listed: Any, count: int,
    within: Any, takes: Any,
) -> Any:  # fmt: skip
    """As `greedy`, where `takes` marks the first experts of each layer: they and the others are merged."""
    total, worth, bar, first, other = 0, 0.0, 0.0, 0, 0
    for k in range(count):
        takes[listed[k]] *= 2
    for g in range(len(low)):
        within[g] = 0
    while True:
        while first < count and takes[listed[first]] != 2:
            first += 1
        while other < count and (
            takes[listed[other]] > 0 or within[layer_of[listed[other]]] >= high[layer_of[listed[other]]]
        ):
            other += 1
        best = -np.inf
        if first < count:
            best = net[listed[first]] + short
        earlier = first < count and (other == count or best >= net[listed[other]])
        if not earlier and other < count:
            best = net[listed[other]]
        if total == most:
            bar = max(bar, best)
            break
        if best == -np.inf or (total >= least and best <= 0.0):
            break
        j = listed[first if earlier else other]
        takes[j] = 1
        within[layer_of[j]] += 1
        total += 1
        worth += best
        bar = min(bar, best)
    for k in range(count):
        if takes[listed[k]] == 2:
            takes[listed[k]] = 0
    return (worth if total >= least else -np.inf), bar


@part
def _sort(net: Any, listed: Any, count: int) -> None:
    """Sort by insertion, the largest first: the order is nearly right already."""
    for k in range(1, count):
        j, at = listed[k], k
        while at > 0 and net[listed[at - 1]] < net[j]:
            listed[at] = listed[at - 1]
            at -= 1
        listed[at] = j


@part
def _weighed(size: Any, client: int, weight: Any, listed: Any, count: int, load: Any) -> None:
    for k in range(count):
        j = listed[k]
        load[j] = 0.0
        for r in range(size.shape[0]):
            load[j] += weight[r] * size[r, client, j]


@part
def _respond_at(
    price: float, reduced: Any, load: Any, layer_of: Any, low: Any, high: Any, short: float, least: int, most: int,
    listed: Any, count: int, net: Any, within: Any, takes: Any,
) -> Any:  # fmt: skip
    """Choose at a price of the weighed budget; return the bound that it proves, its slope, and as in `greedy`."""
    for k in range(count):
        net[listed[k]] = reduced[listed[k]] - price * load[listed[k]]
    _sort(net, listed, count)
    worth, bar = greedy(net, layer_of, low, high, short, least, most, listed, count, within, takes)
    slope = 1.0
    for k in range(count):
        if takes[listed[k]]:
            slope -= load[listed[k]]
    return price + worth, slope, bar


@part
def price_numbers(  # noqa: PLR0912, PLR0915
    reduced: Any, size: Any, client: int, layer_of: Any, low: Any, high: Any, short: float, least: int, most: int,
    listed: Any, count: int, weight: Any, load: Any, shifted: Any, pull: Any, net: Any, within: Any, takes: Any,
) -> Any:  # fmt: skip
    """Find weights of the budgets, their price, and prices of the bounds on numbers, that bound a client closely.

    Any weights and prices give a bound (surrogate and Lagrangian relaxation: Fisher 1981, *Management Science*
    27). Weights of what is taken too much of rise; for each, the price is where two tangents of the bound meet.

    Writes `load`, what each expert takes of the weighed budget; `shifted`, what it is worth with the prices of
    the bounds on numbers; and `pull`, those prices: of each layer, positive where its lower bound binds, then from
    which worth on an expert is taken. ``weight`` is memory, shape (2, R); `listed` gets sorted. Returns the bound,
    -inf if nothing keeps the bounds on numbers, and the price of the weighed budget.
    """
    resources, layers = size.shape[0], len(low)
    above, below = np.empty(resources), np.empty(resources)
    for r in range(resources):
        weight[0, r] = weight[1, r] = 1.0 / resources
        above[r] = below[r] = 0.0
    bound, best, price, stalled = np.inf, 0.0, 0.0, 0
    for _ in range(_WEIGHINGS if resources > 1 else 1):
        _weighed(size, client, weight[0], listed, count, load)
        record, at, over, under = np.inf, price, 0.0, 0.0  # the bound at these weights, and slopes on both sides
        left, left_bound, right, right_bound = 0.0, 0.0, 0.0, 0.0
        for _ in range(_CUTS):
            value, slope, _ = _respond_at(
                price, reduced, load, layer_of, low, high, short, least, most, listed, count, net, within, takes
            )
            if value == -np.inf:
                return value, 0.0
            if value < record:
                record, at = value, price
            used = above if slope < 0.0 else below
            for r in range(resources):
                used[r] = 0.0
                for k in range(count):
                    if takes[listed[k]]:
                        used[r] += size[r, client, listed[k]]
            if slope < 0.0:
                left, left_bound, over = price, value, slope
            else:
                right, right_bound, under = price, value, slope
            if slope == 0.0:
                over = 0.0
                break
            if over == 0.0:
                if price == 0.0:
                    break
                price = 0.0
            elif under == 0.0:
                price = 2.0 * price if price > 0.0 else max(abs(value), 1e-9)
            else:
                price = (left_bound - over * left - right_bound + under * right) / (under - over)
                if record - left_bound - over * (price - left) <= _CLOSE * abs(record):
                    break
        better = bound == np.inf or record < bound - (1.0 - _BETTER) * abs(bound)
        stalled = 0 if better else stalled + 1
        if record < bound:
            bound, best = record, at
            for r in range(resources):
                weight[1, r] = weight[0, r]
        if stalled == _STALLED:
            break
        share, largest, total = 0.0, 0.0, 0.0  # of the choice that exceeds the budget, where the bound is least
        if over < 0.0:
            share = under / (under - over) if under > 0.0 else 1.0
        for r in range(resources):
            taken = share * above[r] + (1.0 - share) * below[r]
            largest = max(largest, taken)
            weight[0, r] *= np.exp(min(taken - 1.0, 2.0))
            total += weight[0, r]
        for r in range(resources):
            weight[0, r] /= total
        if largest <= 1.0:
            break
        price = at
    _weighed(size, client, weight[1], listed, count, load)
    _, _, bar = _respond_at(
        best, reduced, load, layer_of, low, high, short, least, most, listed, count, net, within, takes
    )
    pull[layers] = bar
    for g in range(layers):
        pull[g] = 0.0
        worst, next_ = np.inf, -np.inf
        for k in range(count):
            j = listed[k]
            if layer_of[j] == g and takes[j]:
                worst = net[j]
            elif layer_of[j] == g and next_ == -np.inf:
                next_ = net[j]
        if within[g] < low[g]:  # that gives way
            pull[g] = short
        elif within[g] == low[g] and low[g] > 0 and worst < bar:
            pull[g] = bar - worst
        elif within[g] == high[g] and next_ > bar:
            pull[g] = bar - next_
    for k in range(count):
        shifted[listed[k]] = reduced[listed[k]] + pull[layer_of[listed[k]]] - bar
    return bound, best


@part
def owed(pull: Any, low: Any, high: Any, short: float, least: int, most: int) -> float:
    """Return what the prices of the bounds on numbers cost at least, if nothing is taken yet.

    Less what is earned at most: `floor_worth`.
    """
    bar = pull[len(low)]
    total = -bar * (most if bar > 0.0 else least)
    for g in range(len(low)):
        total += pull[g] * (low[g] if pull[g] > 0.0 else high[g])
    return float(total - floor_worth(low, low, short))


@part
def floor_worth(within: Any, low: Any, short: float) -> float:
    """Return what is earned by experts up to the lower bounds of layers; nothing where these do not give way."""
    earned = 0.0
    if short < np.inf:
        for g in range(len(low)):
            earned += short * min(within[g], low[g])
    return earned


@part
def owed_change(pull: Any, low: Any, within: Any, layer: int, held: int, least: int) -> float:
    """Return by how much that changes if an expert of a layer is taken, besides so many of it and in all."""
    change, bar = 0.0, pull[len(low)]
    if pull[layer] < 0.0 or within[layer] < low[layer]:
        change -= pull[layer]
    if bar > 0.0 or held < least:
        change += bar
    return float(change)
