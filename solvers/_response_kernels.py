"""Compiled kernels of the exact price backend: best responses of the clients, and what they could do instead.

Clients come in blocks of rows of the matrix of scores. Node m is the hub: an exchange with it takes one expert
more, or one less.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import jit, part

__all__ = [
    "candidates",
    "exchange_costs",
    "fill",
    "keep_rows",
    "respond",
    "respond_rows",
    "rounded_down",
    "write_rows",
]


@part
def _choose(value: Any, size: Any, least: Any, most: Any, best: Any, who: Any) -> Any:
    """Rank the `most` + 1 best of the values and take those that pay; return how many, and the cheapest exchange.

    The exchange is (margin, rank given up, rank taken), where -1 stands for the hub and -2 for no exchange.
    """
    for r in range(most + 1):
        best[r] = -np.inf
        who[r] = -1
    bar = -np.inf
    for j in range(size):
        if value[j] > bar:
            # Selects rather than branches, which nobody could predict.
            moving, mover = value[j], j
            for r in range(most + 1):
                there, sitting = best[r], who[r]
                up = moving > there
                best[r] = moving if up else there
                who[r] = mover if up else sitting
                moving = there if up else moving
                mover = sitting if up else mover
            bar = best[most]
    taken = least
    while taken < most and best[taken] > 0.0:
        taken += 1
    margin, gave, took = np.inf, -2, -2
    if taken > 0 and best[taken - 1] - best[taken] < margin:
        margin, gave, took = best[taken - 1] - best[taken], taken - 1, taken
    if taken > least and best[taken - 1] < margin:
        margin, gave, took = best[taken - 1], taken - 1, -1
    if taken < most and -best[taken] < margin:
        margin, gave, took = -best[taken], -1, taken
    return taken, margin, gave, took


@part
def rounded_down(margin: float) -> Any:
    """Return a margin as a float32 that is not above it."""
    return max(np.float32(0.0), np.nextafter(np.float32(margin), np.float32(0.0)))


@part
def fill(
    scores: Any, eligible: Any, noise: Any, amplitude: float, first: int, prices: Any, at: int, value: Any
) -> None:
    """Compute the net values of all experts for one client of a block; -inf where it is not eligible."""
    m = len(value)
    if amplitude > 0.0:
        offset = (((first + at) * 2654435761) >> 8) & (len(noise) - m - 1)
        for j in range(m):
            value[j] = scores[at, j] + amplitude * noise[offset + j] - prices[j]
    else:
        for j in range(m):
            value[j] = scores[at, j] - prices[j]
    if eligible.shape[0] > 0:
        for j in range(m):
            if not eligible[at, j]:
                value[j] = -np.inf


@jit
def respond(
    scores: Any,
    eligible: Any,
    noise: Any,
    amplitude: float,
    first: int,
    prices: Any,
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
    """Let a block of clients choose their best experts under new prices.

    Parameters
    ----------
    scores : ndarray, shape (b, m), float32 or float64
    eligible : ndarray, shape (b, m), bool, or (0, 0) for all
    noise : ndarray, shape (T,), float64
        Client i's score of expert j is ``scores[i, j] + amplitude * noise[o + j]`` with an offset o that is a
        multiplicative hash of the client (Knuth, *The Art of Computer Programming* 3, section 6.4). T - m is a
        power of two.
    first : int
        Number of the block's first client.
    prices : ndarray, shape (m,), float64
    least, most : ndarray, shape (b,), int16
        Fewest and most experts; ``most`` not above the number of eligible ones.
    drift, settled : float
        Prices, the hub's 0 included, have moved by no more than `drift` against one another since the last call.
        Clients whose slack is above `settled` (>= `drift`) keep their choice, and lose `drift` of their slack.
    choice : ndarray, shape (b, widest), int16
        In and out: chosen experts.
    count : ndarray, shape (b,), int16
        In and out: how many.
    slack : ndarray, shape (b,), float32
        In and out: by how much at least the best response beats the next one; -1 for clients without a choice.
    arcs : ndarray, shape (b, 2), int16
        In and out: tail and head of the exchange arc that costs this little; -1 where there is none.
    loads : ndarray, shape (m,), int64
        In and out: clients of each expert.
    """
    size, m = scores.shape
    best = np.empty(choice.shape[1] + 2)
    who = np.empty(choice.shape[1] + 2, np.int64)
    value = np.empty(m)
    for at in range(size):
        if slack[at] > settled:
            left = slack[at] - drift
            slack[at] = np.float32(left - 1e-6 * left)
            continue
        for r in range(count[at]):
            loads[choice[at, r]] -= 1
        fill(scores, eligible, noise, amplitude, first, prices, at, value)
        taken, margin, gave, took = _choose(value, m, np.int64(least[at]), np.int64(most[at]), best, who)
        slack[at] = rounded_down(margin)
        arcs[at, 0] = who[gave] if gave >= 0 else (m if gave == -1 else -1)
        arcs[at, 1] = who[took] if took >= 0 else (m if took == -1 else -1)
        count[at] = taken
        for r in range(taken):
            choice[at, r] = who[r]
            loads[who[r]] += 1


@jit
def respond_rows(
    indptr: Any,
    expert: Any,
    score: Any,
    held: Any,
    count: Any,
    least: Any,
    most: Any,
    prices: Any,
    slack: Any,
    arcs: Any,
    loads: Any,
) -> None:
    """Let clients choose among their candidates only; see `respond`, and `augment` for the lists.

    Sound while prices have moved by no more than the window for which the candidates were listed.
    """
    m = len(prices)
    widest = 0
    for i in range(len(count)):
        widest = max(widest, indptr[i + 1] - indptr[i])
    value, best, who = np.empty(widest), np.empty(widest + 2), np.empty(widest + 2, np.int64)
    for i in range(len(count)):
        start = indptr[i]
        size = indptr[i + 1] - start
        for a in range(size):
            j = expert[start + a]
            value[a] = score[start + a] - prices[j]
            if held[start + a]:
                loads[j] -= 1
                held[start + a] = False
        taken, margin, gave, took = _choose(
            value, size, np.int64(least[i]), np.int64(min(size, most[i])), best, who
        )
        slack[i] = rounded_down(margin)
        arcs[i, 0] = expert[start + who[gave]] if gave >= 0 and who[gave] >= 0 else (m if gave == -1 else -1)
        arcs[i, 1] = expert[start + who[took]] if took >= 0 and who[took] >= 0 else (m if took == -1 else -1)
        count[i] = taken
        for r in range(taken):
            held[start + who[r]] = True
            loads[expert[start + who[r]]] += 1


@part
def _cheapest(
    worst: float, tail: Any, best: float, free: Any, may_drop: bool, may_add: bool, hub: Any, arc: Any
) -> Any:
    """Return the reduced cost of a client's cheapest exchange, rounded down, and note its arc.

    It is between its worst expert or the hub on the one hand, and the best free one or the hub on the other.
    """
    margin, head = worst - best, free
    if may_drop and worst < margin:
        margin, head = worst, hub
    if may_add and -best < margin:
        margin, tail, head = -best, hub, free
    arc[0] = tail if head >= 0 else -1
    arc[1] = head if tail >= 0 else -1
    return rounded_down(margin)


@jit
def exchange_costs(
    scores: Any,
    eligible: Any,
    noise: Any,
    amplitude: float,
    first: int,
    prices: Any,
    least: Any,
    most: Any,
    choice: Any,
    count: Any,
    cost: Any,
) -> None:
    """Find the cheapest exchange arcs of a block of clients whose choices are best responses to the prices.

    Parameters
    ----------
    scores, eligible, noise, amplitude, first, prices, least, most
        See `respond`.
    choice, count
        See `respond`; in only, in any order.
    cost : ndarray, shape (m + 1, m + 1), float64
        In and out: least reduced cost of an arc from each node to each other one.
    """
    size, m = scores.shape
    value, kept = np.empty(m), np.empty(choice.shape[1])
    for at in range(size):
        fill(scores, eligible, noise, amplitude, first, prices, at, value)
        taken = count[at]
        for r in range(taken):
            kept[r] = value[choice[at, r]]
            value[choice[at, r]] = -np.inf
        for r in range(taken):
            row, lost = cost[choice[at, r]], kept[r]
            for j in range(m):
                row[j] = min(row[j], lost - value[j])
            if taken > least[at]:
                row[m] = min(row[m], lost)
        if taken < most[at]:
            row = cost[m]
            for j in range(m):
                row[j] = min(row[j], -value[j])


@jit
def candidates(
    scores: Any,
    eligible: Any,
    noise: Any,
    amplitude: float,
    first: int,
    prices: Any,
    least: Any,
    most: Any,
    choice: Any,
    count: Any,
    slack: Any,
    arcs: Any,
    window: float,
    sizes: Any,
    expert: Any,
    score: Any,
    held: Any,
) -> int:
    """List the experts that clients with a slack of at most `window` hold, or may come to hold within the window.

    Parameters
    ----------
    scores, eligible, noise, amplitude, first, prices, least, most, choice, count
        See `respond`; in only.
    slack, arcs
        See `respond`; in and out: what is a lower bound at first is exact then, where it is not above the window.
    window : float
        See `augment`.
    sizes : ndarray, shape (b,), int64
        Out: number of candidates of each client.
    expert, score, held : ndarray, shape (room,), int16, float64, bool
        Out: the candidates, client by client, ascending, as many as there is room for.

    Returns
    -------
    int
        Number of candidates.
    """
    size, m = scores.shape
    kept, value = np.empty(m, np.bool_), np.empty(m)
    for j in range(m):
        kept[j] = False
    total = 0
    for at in range(size):
        sizes[at] = 0
        if slack[at] > window:
            continue
        fill(scores, eligible, noise, amplitude, first, prices, at, value)
        taken = count[at]
        bar, tail = np.inf, -1
        for r in range(taken):
            j = choice[at, r]
            kept[j] = True
            if value[j] < bar:
                bar, tail = value[j], j
        best, free = -np.inf, -1
        for j in range(m):
            if value[j] > best and not kept[j]:
                best, free = value[j], j
        slack[at] = _cheapest(bar, tail, best, free, taken > least[at], taken < most[at], m, arcs[at])
        # Whatever a client holds is within a window of its worst expert now, and what it may take next within
        # another; likewise for taking one more, or one less.
        if least[at] < most[at] and (taken < most[at] or bar <= 2 * window):
            bar = min(bar, 0.0)
        bar = bar - 2 * window if slack[at] <= window else np.inf
        before = total
        for j in range(m):
            if value[j] >= bar and value[j] > -np.inf:
                if total < len(expert):
                    expert[total] = j
                    score[total] = value[j] + prices[j]
                    held[total] = kept[j]
                total += 1
        sizes[at] = total - before
        for r in range(taken):
            kept[choice[at, r]] = False
    return total


@jit
def keep_rows(movers: Any, indptr: Any, expert: Any, held: Any, choice: Any, count: Any) -> None:
    """Write the experts that clients have after moving back into their choices."""
    for i in range(len(movers)):
        at, taken = movers[i], 0
        for a in range(indptr[i], indptr[i + 1]):
            if held[a]:
                choice[at, taken] = expert[a]
                taken += 1
        count[at] = taken


@jit
def write_rows(choice: Any, count: Any, indptr: Any, indices: Any) -> None:
    """Write the choices in compressed-row layout, experts ascending within each client."""
    for at in range(len(count)):
        start = indptr[at]
        for r in range(count[at]):
            expert = choice[at, r]
            place = start + r
            while place > start and indices[place - 1] > expert:
                indices[place] = indices[place - 1]
                place -= 1
            indices[place] = expert
