"""Compiled kernels of the exact price backend for clients whose layers interact: responses and exchanges.

A client that gives up an expert may take any other one of the same layer; of another layer, or none, only where it
has more than the fewest of the first layer, and less than the most of the second one. Node m is the hub, as in
`_path_kernels`, and counts as a layer of its own, number G, without bounds. ``low`` and ``high`` are the fewest
and most experts of each layer, ``least`` and ``most`` those of all layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import jit, part
from fedmoe_sched.solvers._response_kernels import fill, rounded_down

__all__ = [
    "exchange_costs_layered",
    "may_give",
    "may_take",
    "net_scores",
    "note_exchanges",
    "respond_layered",
    "sharpen_slacks",
]


@part
def _rank(value: Any, layer_of: Any, high: Any, best: Any, who: Any) -> None:
    """Rank the best experts of each layer, one more than may be taken of it; -inf where there are none."""
    for layer in range(best.shape[0]):
        for r in range(best.shape[1]):
            best[layer, r] = -np.inf
            who[layer, r] = -1
    for j in range(len(value)):
        layer = layer_of[j]
        at = np.int64(high[layer])
        if value[j] > best[layer, at]:
            while at > 0 and value[j] > best[layer, at - 1]:
                best[layer, at] = best[layer, at - 1]
                who[layer, at] = who[layer, at - 1]
                at -= 1
            best[layer, at] = value[j]
            who[layer, at] = j


@part
def _take(best: Any, low: Any, high: Any, least: Any, most: Any, taken: Any) -> Any:
    """Decide how many of each layer a client takes: the fewest, then the best of what there is room for."""
    total = 0
    for layer in range(len(low)):
        taken[layer] = low[layer]
        total += low[layer]
    while total < most:
        bar, choice = (-np.inf if total < least else 0.0), -1
        for layer in range(len(low)):
            if taken[layer] < high[layer] and best[layer, taken[layer]] > bar:
                bar, choice = best[layer, taken[layer]], layer
        if choice < 0:
            break
        taken[choice] += 1
        total += 1
    return total


@part
def _cheapest_exchange(
    best: Any, who: Any, low: Any, high: Any, least: Any, most: Any, taken: Any, total: Any, hub: Any, arc: Any
) -> Any:
    """Return the reduced cost of a client's cheapest exchange, and note its ends; -1 where there is none."""
    margin, tail, head = np.inf, -1, -1
    worst, giver, gain, taker = np.inf, -1, -np.inf, -1
    for layer in range(len(low)):
        at = taken[layer]
        if at > 0 and best[layer, at - 1] - best[layer, at] < margin:
            margin, tail, head = best[layer, at - 1] - best[layer, at], who[layer, at - 1], who[layer, at]
        if at > low[layer] and best[layer, at - 1] < worst:
            worst, giver = best[layer, at - 1], who[layer, at - 1]
        if at < high[layer] and best[layer, at] > gain:
            gain, taker = best[layer, at], who[layer, at]
    if giver >= 0 and taker >= 0 and worst - gain < margin:
        margin, tail, head = worst - gain, giver, taker
    if giver >= 0 and total > least and worst < margin:
        margin, tail, head = worst, giver, hub
    if taker >= 0 and total < most and -gain < margin:
        margin, tail, head = -gain, hub, taker
    arc[0], arc[1] = tail, head
    return margin


@jit
def respond_layered(
    scores: Any,
    eligible: Any,
    noise: Any,
    amplitude: float,
    first: int,
    prices: Any,
    layer_of: Any,
    low: Any,
    high: Any,
    least: Any,
    most: Any,
    drift: float,
    settled: float,
    choice: Any,
    count: Any,
    slack: Any,
    arcs: Any,
    loads: Any,
) -> None:
    """Let a block of clients choose their best experts under new prices; see `_response_kernels.respond`.

    Parameters
    ----------
    layer_of : ndarray, shape (m,), int16
    low, high : ndarray, shape (b, G), int16
        No bound of a layer is beyond what the other bounds of the client leave.
    """
    size, m = scores.shape
    n_layers = low.shape[1]
    widest = 0
    for at in range(size):
        for layer in range(n_layers):
            widest = max(widest, high[at, layer])
    best, who = np.empty((n_layers, widest + 1)), np.empty((n_layers, widest + 1), np.int64)
    value, taken = np.empty(m), np.empty(n_layers, np.int64)
    for at in range(size):
        if slack[at] > settled:
            left = slack[at] - drift
            slack[at] = np.float32(left - 1e-6 * left)
            continue
        for r in range(count[at]):
            loads[choice[at, r]] -= 1
        fill(scores, eligible, noise, amplitude, first, prices, at, value)
        _rank(value, layer_of, high[at], best, who)
        total = _take(best, low[at], high[at], least[at], most[at], taken)
        margin = _cheapest_exchange(best, who, low[at], high[at], least[at], most[at], taken, total, m, arcs[at])
        slack[at] = rounded_down(margin)
        place = 0
        for layer in range(n_layers):
            for r in range(taken[layer]):
                choice[at, place] = who[layer, r]
                loads[who[layer, r]] += 1
                place += 1
        count[at] = total


@jit
def sharpen_slacks(  # noqa: PLR0912
    scores: Any,
    eligible: Any,
    noise: Any,
    amplitude: float,
    first: int,
    prices: Any,
    layer_of: Any,
    low: Any,
    high: Any,
    least: Any,
    most: Any,
    choice: Any,
    count: Any,
    window: float,
    slack: Any,
) -> None:
    """Compute the slack of clients of a block exactly, where its lower bound is not above the window.

    What clients hold is a best response to the prices, in any order; see `respond_layered`.
    """
    size, m = scores.shape
    n_layers = low.shape[1]
    value, kept = np.empty(m), np.empty(m, np.bool_)
    worst, gain, taken = np.empty(n_layers), np.empty(n_layers), np.empty(n_layers, np.int64)
    for j in range(m):
        kept[j] = False
    for at in range(size):
        if slack[at] > window:
            continue
        fill(scores, eligible, noise, amplitude, first, prices, at, value)
        for layer in range(n_layers):
            worst[layer], gain[layer], taken[layer] = np.inf, -np.inf, 0
        for r in range(count[at]):
            kept[choice[at, r]] = True
        for j in range(m):
            layer = layer_of[j]
            if kept[j]:
                kept[j] = False
                taken[layer] += 1
                worst[layer] = min(worst[layer], value[j])
            else:
                gain[layer] = max(gain[layer], value[j])
        margin, drop, add = np.inf, np.inf, -np.inf
        for layer in range(n_layers):
            margin = min(margin, worst[layer] - gain[layer])
            if taken[layer] > low[at, layer]:
                drop = min(drop, worst[layer])
            if taken[layer] < high[at, layer]:
                add = max(add, gain[layer])
        margin = min(margin, drop - add)
        if count[at] > least[at]:
            margin = min(margin, drop)
        if count[at] < most[at]:
            margin = min(margin, -add)
        slack[at] = rounded_down(margin)


@jit
def net_scores(
    scores: Any, eligible: Any, noise: Any, amplitude: float, first: int, prices: Any, rows: Any, value: Any
) -> None:
    """Write the net values of some clients of a block, by their numbers in it; see `_response_kernels.respond`."""
    for r in range(len(rows)):
        fill(scores, eligible, noise, amplitude, first, prices, rows[r], value[r])


@part
def may_give(i: Any, node: Any, held: Any, count: Any, low: Any, most: Any, layer_of: Any, across: bool) -> Any:
    """Whether a client has something to give up at a node, and may take nothing of its layer (`across`)."""
    n_layers = low.shape[1]
    if node == held.shape[1]:
        return count[i, n_layers] < most[i]
    return held[i, node] and (not across or count[i, layer_of[node]] > low[i, layer_of[node]])


@part
def may_take(
    i: Any, node: Any, score: Any, held: Any, count: Any, high: Any, least: Any, layer_of: Any, across: bool
) -> Any:
    """Whether a client may take what is at a node, and give up nothing of its layer (`across`)."""
    n_layers = high.shape[1]
    if node == held.shape[1]:
        return count[i, n_layers] > least[i]
    if held[i, node] or score[i, node] == -np.inf:
        return False
    return not across or count[i, layer_of[node]] < high[i, layer_of[node]]


@part
def note_exchanges(
    i: Any, score: Any, held: Any, count: Any, low: Any, high: Any, least: Any, most: Any, layer_of: Any, row: Any,
    gives: Any, takes: Any,
) -> None:  # fmt: skip
    """Note what a client may give up and take, in row `row`: 0 nothing, 1 within a layer, 2 across layers too."""
    hub, n_layers = held.shape[1], low.shape[1]
    for node in range(hub):
        number, layer = count[i, layer_of[node]], layer_of[node]
        gives[row, node], takes[row, node] = 0, 0
        if held[i, node]:
            gives[row, node] = 2 if number > low[i, layer] else 1
        elif score[i, node] > -np.inf:
            takes[row, node] = 2 if number < high[i, layer] else 1
    gives[row, hub] = 2 if count[i, n_layers] < most[i] else 0
    takes[row, hub] = 2 if count[i, n_layers] > least[i] else 0


@jit
def exchange_costs_layered(
    scores: Any,
    eligible: Any,
    noise: Any,
    amplitude: float,
    first: int,
    prices: Any,
    layer_of: Any,
    low: Any,
    high: Any,
    least: Any,
    most: Any,
    choice: Any,
    count: Any,
    cost: Any,
) -> None:
    """Find the cheapest exchange arcs of a block of clients; see `_response_kernels.exchange_costs`."""
    size, m = scores.shape
    n_layers = low.shape[1]
    value, held, number = np.empty((1, m)), np.empty((1, m), np.bool_), np.empty((1, n_layers + 1), np.int64)
    gives, takes = np.empty((1, m + 1), np.int8), np.empty((1, m + 1), np.int8)
    for at in range(size):
        fill(scores, eligible, noise, amplitude, first, prices, at, value[0])
        for j in range(m):
            held[0, j] = False
        for layer in range(n_layers):
            number[0, layer] = 0
        for r in range(count[at]):
            held[0, choice[at, r]] = True
            number[0, layer_of[choice[at, r]]] += 1
        number[0, n_layers] = count[at]
        note_exchanges(
            0, value, held, number, low[at : at + 1], high[at : at + 1], least[at : at + 1], most[at : at + 1],
            layer_of, 0, gives, takes,
        )  # fmt: skip
        for tail in range(m + 1):
            give = gives[0, tail]
            if give == 0:
                continue
            lost = value[0, tail] if tail < m else 0.0
            for head in range(m + 1):
                take = takes[0, head]
                if take > 0 and tail != head and (layer_of[tail] == layer_of[head] or (give == 2 and take == 2)):
                    loss = lost - (value[0, head] if head < m else 0.0)
                    cost[tail, head] = min(cost[tail, head], loss)
