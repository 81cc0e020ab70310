"""What clients with budgets gain at given prices: their best choices, exactly or bounded from above and below.

A client with budgets picks the best of its experts that fit: a knapsack with bounds on counts, of all experts or
of each layer too. For all clients at once, as arrays (Kellerer, Pferschy and Pisinger, *Knapsack Problems*,
chapters 2 and 9), as far as each client needs it:

- the best choice without budgets, which is the optimum where it happens to fit;
- the Lagrangian relaxation of all budgets, with the multiplier of a single one by tangents, of several by
  subgradient steps, and greedy choices: what is left out, or taken, in every choice that is better than the best
  one known is decided;
- enumeration of what is left, breadth first, the costliest choices dropped where there are too many;
- dynamic programming instead, for one budget of whole units and no layers, where many choices are left;
- where some were dropped, dynamic programming over whole units of one budget, the others relaxed, as long as that
  is cheap: exact for one budget where the sizes are whole numbers, else with sizes rounded down to small units.

Upper bounds are never less than the optimum, up to the rounding of sums in float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._knapsack_enumeration import enumerated
from fedmoe_sched._knapsack_rows import Relaxed, Rows, greedy, improved, relaxed
from fedmoe_sched._knapsack_tables import Table, whole_units

__all__ = ["ChoiceBounds", "Knapsacks", "Responses", "budgeted_responses"]

_STEPS = (15, 10)  # of multipliers, before and after experts are decided on
_FEW, _MANY = 128, 4096  # states per client
_TOGETHER = 1 << 18  # states of some clients at a time
_WORK = 1 << 25  # sums of all states at all experts, that more than a few states may take in a block: a second
_UNITS = 4096  # that a budget is cut into where sizes are not whole numbers
_MOST_UNITS = 20_000  # of a budget of whole numbers
_CHEAP = 2_000_000_000  # cells of all tables of a block: a second or two
_NOISE = 1e-12


class Knapsacks(NamedTuple):
    """One resource of some clients: what every expert takes, shape (clients, m), and what there is, (clients,)."""

    sizes: FloatArray
    allowed: FloatArray


class ChoiceBounds(NamedTuple):
    """Fewest and most experts of a choice, of each of G layers, shape (clients, G), and of all, shape (clients,).

    `members` has the experts of each layer; bounds of layers that exclude others are not reported.
    """

    members: tuple[IntArray, ...]
    low: IntArray
    high: IntArray
    least: IntArray
    most: IntArray


class Responses(NamedTuple):
    """What the best choices are worth, bounded from below and above, each of shape (clients,).

    Both are -inf where no choice keeps the bounds; `lower` also where none was found.
    """

    lower: FloatArray
    upper: FloatArray


def budgeted_responses(reduced: FloatArray, bounds: ChoiceBounds, resources: list[Knapsacks]) -> Responses:
    """Bound each row's best choice that keeps all budgets.

    Parameters
    ----------
    reduced : ndarray, shape (clients, m), float64
        Scores less prices; -inf where not eligible. Overwritten.
    bounds : ChoiceBounds
    resources : list of Knapsacks

    Returns
    -------
    Responses
    """
    rows = _rows(reduced, bounds, resources)
    found = Responses(np.full(len(rows), -np.inf), np.full(len(rows), -np.inf))
    at = np.flatnonzero(rows.feasible)
    if not len(at):
        return found
    free = rows.take(at)
    part = relaxed(free, np.zeros(free.room.shape))
    fits = _fits(free, part)
    for side in found:
        side[at[fits]] = part.bound[fits]
    at, free = at[~fits], free.take(np.flatnonzero(~fits))
    if not len(at):
        return found
    wanted = np.isfinite(free.worth)
    wanted &= (free.worth > 0) | ((free.low > 0).any(axis=1) | (free.least > 0))[:, None, None]
    _respond(free.packed(wanted), at, found, resources)
    return found


def _rows(reduced: FloatArray, bounds: ChoiceBounds, resources: list[Knapsacks]) -> Rows:
    """Read the clients as knapsacks with budgets of 1."""
    count, m = reduced.shape
    for resource in resources:
        reduced[resource.sizes > resource.allowed[:, None]] = -np.inf
    weight = np.zeros((len(resources), count, m))
    for part, resource in zip(weight, resources, strict=True):
        limited = np.isfinite(resource.allowed) & (resource.allowed > 0)
        sizes = np.where(np.isfinite(reduced[limited]), resource.sizes[limited], 0.0)
        part[limited] = sizes / resource.allowed[limited, None]
    noise = 2 * (m + 4) * np.finfo(np.float64).eps  # of a sum of shares, of each that is rounded, and of a check
    width = max(map(len, bounds.members))
    columns = np.full((len(bounds.members), width), m)
    for layer, experts in enumerate(bounds.members):
        columns[layer, : len(experts)] = experts
    if len(columns) == 1:
        worth, weight = reduced[:, None, :], weight[:, :, None, :]
    else:
        inside = columns < m
        worth = np.where(inside, reduced[:, np.where(inside, columns, 0)], -np.inf)
        weight = np.where(inside, weight[:, :, np.where(inside, columns, 0)], 0.0)
    return Rows(
        worth,
        weight,
        np.broadcast_to(columns, worth.shape),
        np.full(weight.shape[:2], 1.0 + noise),
        bounds.low,
        bounds.high,
        bounds.least,
        bounds.most,
        np.zeros(count),
        np.full(count, -np.inf),
        noise,
    )


def _fits(rows: Rows, part: Relaxed) -> BoolArray:
    """Whether the choice of a relaxation without multipliers keeps all bounds, and so is the best one."""
    taken = part.rest > 0
    number = taken.sum(axis=2)
    fits: BoolArray = np.all(_complementary(number, rows.low, rows.high, part.layers), axis=1)
    if number.shape[1] > 1:
        fits &= _complementary(number.sum(axis=1), rows.least, rows.most, part.total)
    for weight in rows.weight:
        fits &= np.where(taken, weight, 0.0).sum(axis=(1, 2)) <= 1 - rows.hair
    return fits


def _complementary(number: IntArray, low: IntArray, high: IntArray, price: FloatArray) -> BoolArray:
    """Whether numbers are within bounds, and at the bound that has a price."""
    kept: BoolArray = np.where(price > 0, number == high, number >= low)
    kept &= np.where(price < 0, number == low, number <= high)
    return kept


class _Work(NamedTuple):
    """Clients that are not done: their places in the answer, their knapsacks, and the best relaxation of these."""

    at: IntArray
    rows: Rows
    part: Relaxed

    def noted(self, found: Responses) -> _Work:
        """Note what is known in the answer, and go on with those of which too little is."""
        upper = np.where(
            self.rows.feasible, np.maximum(self.rows.lower, self.rows.base + self.part.bound), self.rows.lower
        )
        found.lower[self.at], found.upper[self.at] = self.rows.lower, upper
        return self.those(np.flatnonzero(_open(found, self.at)))

    def those(self, some: IntArray) -> _Work:
        part = self.part
        return _Work(
            self.at[some],
            self.rows.take(some),
            Relaxed(part.bound[some], part.budgets[:, some], part.layers[some], part.total[some], part.rest[some]),
        )


def _open(found: Responses, at: IntArray) -> BoolArray:
    """Whether bounds differ by more than rounding errors."""
    lower, upper = found.lower[at], found.upper[at]
    return np.isfinite(upper) & (lower < upper - _NOISE * (1 + np.abs(upper)))


def _respond(rows: Rows, at: IntArray, found: Responses, resources: list[Knapsacks]) -> None:
    """Find the best choices of clients that have to leave something out for their budgets."""
    work = _Work(at, rows, relaxed(rows, np.zeros(rows.room.shape)))
    for steps in _STEPS:
        if not len(work.at):
            return
        rows, part = work.rows, work.part
        rows.lower = np.maximum(rows.lower, greedy(rows, part.rest))
        part = improved(rows, part, steps)
        rows.lower = np.maximum(rows.lower, greedy(rows, part.rest))
        rows = rows.decided(part)
        work = _Work(work.at, rows, relaxed(rows, part.budgets)).noted(found)
    work = _enumerate(work, found, _FEW)
    if len(resources) == 1 and work.rows.low.shape[1] == 1:
        work = _by_exact_tables(work, found, resources[0])
    work = _enumerate(work, found, _MANY)
    _by_tables(work, found, resources)


def _enumerate(work: _Work, found: Responses, states: int) -> _Work:
    """Enumerate choices, with so many states per client at most; return what is left open."""
    items = np.isfinite(work.rows.worth).sum(axis=(1, 2))
    sums = len(work.rows.weight) + work.rows.low.shape[1]
    most = max(_FEW, min(states, _WORK // max(1, sums * int(items.sum()))))
    by_size = np.argsort(items, kind="stable")
    step = _TOGETHER // most
    for start in range(0, len(by_size), step):
        some = work.those(by_size[start : start + step])
        lower, upper = enumerated(some.rows, some.part, most)
        found.lower[some.at], found.upper[some.at] = lower, np.minimum(found.upper[some.at], upper)
    work.rows.lower = found.lower[work.at]
    return work.those(np.flatnonzero(_open(found, work.at)))


def _by_exact_tables(work: _Work, found: Responses, resource: Knapsacks) -> _Work:
    """Solve clients of one budget in whole units, where that is cheaper than many states; return the others."""
    left = np.ones(len(work.at), dtype=np.bool_)
    for place, client in enumerate(work.at.tolist()):
        table, constant = _table(work.rows, work.part, place, 0, resource, client)
        # Whole numbers fit below a whole one, whether rounding lets a hair more in or keeps one back.
        room, hair, allowed = work.rows.room[0, place], work.rows.hair, resource.allowed[client]
        sure = room > 2 * hair and np.floor((room + hair) * allowed) == np.floor((room - 2 * hair) * allowed)
        if sure and table.units.exact and table.cells <= _MANY * len(table.values):
            best = max(float(work.rows.lower[place]), constant + table.best())
            found.lower[client] = found.upper[client] = min(found.upper[client], best)
            left[place] = False
    return work.those(np.flatnonzero(left))


def _by_tables(work: _Work, found: Responses, resources: list[Knapsacks]) -> None:
    """Improve upper bounds by dynamic programming over each budget in turn, the others relaxed."""
    cells = 0
    for place in np.argsort(found.lower[work.at] - found.upper[work.at], kind="stable").tolist():
        client = int(work.at[place])
        for one, resource in enumerate(resources):
            table, constant = _table(work.rows, work.part, place, one, resource, client)
            cells += table.cells
            if cells > _CHEAP:
                return
            best = max(float(work.rows.lower[place]), constant + table.best())
            found.upper[client] = min(found.upper[client], best)


def _table(
    rows: Rows, part: Relaxed, place: int, one: int, resource: Knapsacks, client: int
) -> tuple[Table, float]:
    """Return the knapsack of one budget, and what the choice is worth besides."""
    layered = rows.low.shape[1] > 1
    values, constant = rows.worth[place].copy(), float(rows.base[place])
    for other, (weight, multiplier) in enumerate(zip(rows.weight[:, place], part.budgets[:, place], strict=True)):
        if other != one:
            values -= multiplier * weight
            constant += float(multiplier * rows.room[other, place])
    least, most = int(rows.low[place, 0]), int(rows.high[place, 0])
    if layered:
        price = part.layers[place]
        values -= price[:, None]
        constant += float(np.where(price >= 0, price * rows.high[place], price * rows.low[place]).sum())
        least, most = int(rows.least[place]), int(rows.most[place])
    kept = values > (0 if least == 0 else -np.inf)
    allowed = float(resource.allowed[client])
    limited = math.isfinite(allowed)
    left = max(0.0, float(rows.room[one, place] + rows.hair)) * allowed if limited else 0.0
    experts = rows.expert[place][kept]
    sizes = resource.sizes[client, experts] if limited else np.zeros(len(experts))
    units = whole_units(np.minimum(sizes, left), left, _MOST_UNITS, _UNITS)
    return Table(values[kept], units, least, min(most, len(experts))), constant
