"""Compiled kernels of the exact price backend: what experts want at a price, and Newton steps on the dual.

Nodes 0 .. m - 1 are the experts; node m is the hub, where unused client slots and the load bounds meet.
``penalty`` is (indptr, start, value, slope) of `fedmoe_sched.load_penalty.LoadPenalty`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import jit, part

__all__ = ["NOTHING", "marginal", "newton_step", "quantile", "surplus", "wanted_loads"]

#: Slack from which on a client has nothing to exchange.
NOTHING = 1e38

_SMALLEST = 149  # float32 goes down to 2**-149, and frexp counts from one power higher
_BINS = 8 * (_SMALLEST + 130)


@part
def marginal(penalty: Any, expert: int, load: int) -> float:
    """Cost of the `load`-th client of an expert, load >= 1."""
    indptr, start, value, slope = penalty
    low, high = indptr[expert], indptr[expert + 1] - 1
    while low < high:
        middle = (low + high + 1) // 2
        if start[middle] <= load:
            low = middle
        else:
            high = middle - 1
    return float(value[low] + slope[low] * (load - start[low]))


@part
def wanted_loads(penalty: Any, expert: int, price: float, low: int, high: int) -> Any:
    """Least and largest load in low .. high that are best for an expert with this price."""
    indptr, _, value, slope = penalty
    at = indptr[expert]
    if indptr[expert + 1] == at + 1 and slope[at] == 0.0:
        if price > value[at]:
            return high, high
        return (low, low) if price < value[at] else (low, high)
    least, most = low, high  # the fewest that leave nothing to gain by one more
    while least < most:
        middle = (least + most) // 2
        if marginal(penalty, expert, middle + 1) < price:
            least = middle + 1
        else:
            most = middle
    bottom, top = least, high  # the most of which none costs more than the price
    while bottom < top:
        middle = (bottom + top + 1) // 2
        if marginal(penalty, expert, middle) <= price:
            bottom = middle
        else:
            top = middle - 1
    return least, bottom


@jit
def surplus(penalty: Any, prices: Any, loads: Any, load_min: Any, load_max: Any, excess: Any) -> int:
    """Set the load of each expert beyond what complementary slackness asks of it; return the sum of sizes."""
    total = 0
    for j in range(len(loads)):
        low, high = wanted_loads(penalty, j, prices[j], load_min[j], load_max[j])
        excess[j] = loads[j] - min(max(loads[j], low), high)
        total += abs(excess[j])
    return total


@jit
def quantile(slack: Any, wanted: int) -> float:
    """Return the slack that about `wanted` clients do not exceed, to an eighth; of many, a sample is looked at.

    Clients with nothing to exchange do not count; if there are fewer others, the answer is the largest of theirs.
    """
    stride = 1 + len(slack) // 65536
    histogram = np.empty(_BINS, np.int64)
    for at in range(_BINS):
        histogram[at] = 0
    last = 0
    for at in range(0, len(slack), stride):
        if slack[at] >= NOTHING:
            continue
        fraction, exponent = math.frexp(slack[at])
        # The fraction is in [1/2, 1), or 0: eight bins to an octave.
        place = 8 * (exponent + _SMALLEST) + int(16.0 * fraction) - 7 if fraction > 0.0 else 0
        histogram[place] += stride
        last = max(last, place)
    place, below = 0, histogram[0]
    while place < last and below <= wanted:
        place += 1
        below += histogram[place]
    octave, eighth = divmod(place, 8)
    return math.ldexp(0.5 + 0.0625 * eighth, octave - _SMALLEST)


@part
def _solve(matrix: Any, damping: float, right: Any, factor: Any, step: Any) -> None:
    """Solve ``(matrix + damping * I) step = right`` by Cholesky, column by column; a grounded Laplacian."""
    size = len(right)
    for a in range(size):
        for b in range(a + 1):
            factor[a, b] = matrix[a, b]
        factor[a, a] += damping
        step[a] = right[a]
    column = np.empty(size)
    for c in range(size):
        pivot = np.sqrt(max(factor[c, c], 1e-3 * damping))
        factor[c, c] = pivot
        step[c] /= pivot
        for a in range(c + 1, size):
            column[a] = factor[a, c] / pivot
            factor[a, c] = column[a]
            step[a] -= column[a] * step[c]
        for a in range(c + 1, size):
            scale = column[a]
            for b in range(c + 1, a + 1):
                factor[a, b] -= scale * column[b]
    for a in range(size - 1, -1, -1):
        step[a] /= factor[a, a]
        for c in range(a):
            step[c] -= factor[a, c] * step[a]


@part
def _elasticity(penalty: Any, expert: int, load: int, low: int, high: int) -> float:
    """Clients per unit of price by which the load that an expert wants would change."""
    if load <= low or load >= high:
        return 0.0
    rise = marginal(penalty, expert, load + 1) - marginal(penalty, expert, load)
    return 1.0 / rise if rise > 0.0 else 0.0


@part
def _limited(
    penalty: Any, expert: int, price: float, step: float, load: int, excess: int, load_min: int, load_max: int
) -> Any:
    """Return the price after a step, cut short where the expert's load as it is becomes the one that it wants.

    What an expert wants jumps there, by up to all that the load bounds allow.
    """
    low, high = wanted_loads(penalty, expert, price, load_min, load_max)
    if low < high and step * excess < 0:
        return price
    least, most = wanted_loads(penalty, expert, price + step, load_min, load_max)
    if step > 0 and low <= load < least:
        return max(price, marginal(penalty, expert, load + 1))
    if step < 0 and most < load <= high:
        return min(price, marginal(penalty, expert, load))
    return price + step


@jit
def newton_step(  # noqa: PLR0912
    penalty: Any,
    prices: Any,
    loads: Any,
    load_min: Any,
    load_max: Any,
    excess: Any,
    slack: Any,
    arcs: Any,
    finest: float,
    trust: float,
    moved: Any,
) -> float:
    """Find the price changes that would remove the surplus, judging by the density of nearly indifferent clients.

    Parameters
    ----------
    penalty, prices, loads, load_min, load_max
        See `surplus`.
    excess : ndarray, shape (m,), int64
        As `surplus` sets it.
    slack, arcs
        See `respond`; of all clients.
    finest : float
        Differences of scores below this are not told apart.
    trust : float
        No price changes by more than this times the reach.
    moved : ndarray, shape (m,), float64
        Out: the prices to go to.

    Returns
    -------
    float
        The reach: clients with a slack up to this were counted.
    """
    m = len(prices)
    size = len(slack)
    off = 0
    for j in range(m):
        off += abs(excess[j])
    reach = quantile(slack, min(size - 1, size // 2, max(16 * m, off // 2, size // 16)))
    density = np.empty((m + 1, m + 1))
    for a in range(m + 1):
        for b in range(m + 1):
            density[a, b] = 0.0
    for at in range(size):
        if slack[at] <= reach and arcs[at, 0] >= 0:
            density[arcs[at, 0], arcs[at, 1]] += 1.0
    reach = max(reach, finest)
    moving = np.empty(m, np.int64)
    size = 0
    for j in range(m):
        low, high = wanted_loads(penalty, j, prices[j], load_min[j], load_max[j])
        if excess[j] != 0 or low == high:
            moving[size] = j
            size += 1
    laplacian, right = np.empty((size, size)), np.empty(size)
    trace = 0.0
    for a in range(size):
        tail = moving[a]
        for b in range(a):
            head = moving[b]
            laplacian[a, b] = -(density[tail, head] + density[head, tail]) / (2 * reach)
        laplacian[a, a] = 0.0
        for node in range(m + 1):
            laplacian[a, a] += (density[tail, node] + density[node, tail]) / (2 * reach)
        laplacian[a, a] += _elasticity(penalty, tail, loads[tail] - excess[tail], load_min[tail], load_max[tail])
        trace += laplacian[a, a]
        right[a] = excess[tail]
    damping = 1e-3 * trace / max(1, size) + 0.5 / reach
    solution, factor = np.empty(size), np.empty((size, size))
    furthest = np.inf
    for _ in range(4):
        _solve(laplacian, damping, right, factor, solution)
        furthest = 0.0
        for a in range(size):
            furthest = max(furthest, abs(solution[a]))
        if furthest <= trust * reach:
            break
        damping *= 4
    shrink = min(1.0, trust * reach / furthest) if furthest > 0.0 else 0.0
    for j in range(m):
        moved[j] = prices[j]
    for a in range(size):
        j = moving[a]
        step = shrink * solution[a]
        moved[j] = _limited(penalty, j, prices[j], step, loads[j], excess[j], load_min[j], load_max[j])
    return reach
