"""Best choices within budgets by enumeration, for many clients at once, breadth first.

Against the choice of a relaxation, an expert that is taken or left costs some of the bound, and what other
choices cost adds up. So those that beat the best one known are few: they are enumerated expert by expert, the
costliest first. Where they are not few, the costliest are dropped, and the bound is what they could be worth.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._knapsack_rows import Relaxed, Rows

__all__ = ["enumerated"]

_NOISE = 1e-14  # of a bound: what is nearer to it than that is not looked at

Index = npt.NDArray[np.intp]


class _Limits(NamedTuple):
    """Sums over the experts of a choice, in D dimensions: budgets, and counts of layers and of all.

    Parameters
    ----------
    change : ndarray, shape (n, D, K)
        What turning the t-th expert of a client round adds.
    fall, rise : ndarray, shape (n + 1, D, K)
        How far the t-th expert and those after it can bring the sums down and up; fall is <= 0.
    lower, upper, sure : ndarray, shape (D, K)
        Sums up to `sure` are within bounds; between that and `upper` rounding errors decide.
    price : ndarray, shape (D, K)
        Multiplier: what a unit below `upper` costs of the bound; negative for one above `lower`.
    start : ndarray, shape (D, K)
        Of the relaxed choice.
    """

    change: FloatArray
    fall: FloatArray
    rise: FloatArray
    lower: FloatArray
    upper: FloatArray
    sure: FloatArray
    price: FloatArray
    start: FloatArray


class _States(NamedTuple):
    """S partial choices: their clients, what they cost of the bound, what they are worth, and sums, (D, S)."""

    row: Index
    cost: FloatArray
    worth: FloatArray
    sums: FloatArray

    def those(self, some: Index | BoolArray) -> _States:
        return _States(self.row[some], self.cost[some], self.worth[some], self.sums[:, some])


def enumerated(rows: Rows, part: Relaxed, most_states: int) -> tuple[FloatArray, FloatArray]:
    """Return worths of the best choices, bounded from below and above; base and all, each of shape (K,).

    Both are the same but for clients that have more than `most_states` choices to look at.
    """
    search = _Search(rows, part, most_states)
    search.run()
    upper = np.minimum(np.maximum(search.top, part.bound - search.cut), np.maximum(part.bound, search.top))
    return np.maximum(rows.lower, rows.base + search.best), np.maximum(rows.lower, rows.base + upper)


class _Search:
    def __init__(self, rows: Rows, part: Relaxed, most_states: int) -> None:
        self.rows, self.part, self.most_states = rows, part, most_states
        self.cost, self.gain, self.items, limits = _ordered(rows, part)
        self.limits = _relevant(limits)
        self.best = rows.lower - rows.base  # of choices that surely fit
        self.top = self.best.copy()  # of choices that fit, but perhaps for rounding
        self.cut = np.full(len(rows), np.inf)  # what the cheapest choice that was dropped costs
        self.noise = _NOISE * (1.0 + np.abs(part.bound))

    def _limit(self) -> FloatArray:
        limit: FloatArray = np.minimum(self.part.bound - self.top - self.noise, self.cut)
        return limit

    def run(self) -> None:
        count = len(self.rows)
        taken = np.where(self.part.rest > 0, self.rows.worth, 0.0).sum(axis=(1, 2))
        states = _States(np.arange(count), np.zeros(count), taken, self.limits.start)
        self._note(states)
        states = self._alive(states, 0)
        for t in range(len(self.cost)):
            if not len(states.row):
                break
            states = self._turned(states, t)

    def _turned(self, states: _States, t: int) -> _States:
        """Turn the t-th expert round in every state, and keep both where they can lead to something better."""
        limit, cost, gain = self._limit(), self.cost[t], self.gain[t]
        some = np.flatnonzero(states.cost + cost[states.row] < limit[states.row])
        row = states.row[some]
        turned = _States(
            row,
            states.cost[some] + cost[row],
            states.worth[some] + gain[row],
            states.sums[:, some] + self.limits.change[t][:, row],
        )
        self._note(turned)
        both = _States(*(np.concatenate(pair, axis=-1) for pair in zip(states, turned, strict=True)))
        return self._alive(both, t + 1)

    def _note(self, states: _States) -> None:
        """Note the worth of states as they are, where they keep all bounds."""
        row, limits = states.row, self.limits
        fits = np.ones(len(row), dtype=np.bool_)
        surely = fits.copy()
        for sums, lower, upper, sure in zip(states.sums, limits.lower, limits.upper, limits.sure, strict=True):
            fits &= (sums >= lower[row]) & (sums <= upper[row])
            surely &= sums <= sure[row]
        found = np.flatnonzero(fits)
        np.maximum.at(self.top, row[found], states.worth[found])
        found = np.flatnonzero(fits & surely)
        np.maximum.at(self.best, row[found], states.worth[found])

    def _alive(self, states: _States, t: int) -> _States:
        """Drop states that cannot keep the bounds, or lead to nothing better, or are too many."""
        row, limits, hair = states.row, self.limits, self.rows.hair
        alive = self.items[row] > t
        spare = states.cost.copy()
        for d, sums in enumerate(states.sums):
            least, most = sums + limits.fall[t, d][row], sums + limits.rise[t, d][row]
            lower, upper, price = limits.lower[d][row], limits.upper[d][row], limits.price[d]
            alive &= (least <= upper + hair) & (most >= lower - hair)
            if (price > 0).any():  # what stays unused whatever comes
                spare += np.maximum(price, 0)[row] * np.maximum(upper - hair - most, 0)
            if (price < 0).any():
                spare += np.maximum(-price, 0)[row] * np.maximum(least - lower, 0)
        limit = self._limit()
        alive &= spare < limit[row]
        kept = np.flatnonzero(alive)
        number = np.bincount(row[kept], minlength=len(limit))
        if number.max(initial=0) > self.most_states:
            kept = self._cheapest(kept, row[kept], spare[kept])
        return states.those(kept)

    def _cheapest(self, kept: Index, row: Index, spare: FloatArray) -> Index:
        """Keep the cheapest states of each client, and note what the cheapest of the others costs."""
        order = np.lexsort((spare, row))
        row, spare = row[order], spare[order]
        first = np.searchsorted(row, row)
        dropped = np.arange(len(row)) - first >= self.most_states
        np.minimum.at(self.cut, row[dropped], spare[dropped])
        return np.sort(kept[order[~dropped]])


def _ordered(rows: Rows, part: Relaxed) -> tuple[FloatArray, FloatArray, IntArray, _Limits]:
    """Order the experts of each client by what turning them round costs, the costliest first; others last."""
    count, layers, width = rows.worth.shape
    rest = part.rest.reshape(count, -1)
    there = np.isfinite(rest)
    order = np.argsort(np.where(there, -np.abs(rest), np.inf), axis=1, kind="stable")
    items = there.sum(axis=1)
    n = int(items.max(initial=0))
    order = order[:, :n]

    def arranged(values: FloatArray) -> FloatArray:
        return np.take_along_axis(values.reshape(count, -1), order, axis=1).T

    rest = arranged(rest)
    taken = rest > 0
    sign = np.where(np.isfinite(rest), np.where(taken, -1.0, 1.0), 0.0)
    cost = np.where(np.isfinite(rest), np.abs(rest), np.inf)
    worth = arranged(rows.worth)
    gain = np.where(np.isfinite(worth), worth, 0.0) * sign
    layer = order.T // max(width, 1)
    sums = [arranged(weight) for weight in rows.weight]
    lower = [np.full(count, -np.inf)] * len(sums)
    upper = list(rows.room)
    sure = list(rows.room - 2 * rows.hair)
    price = list(part.budgets)
    for g in range(layers):
        sums.append((layer == g).astype(np.float64))
        lower.append(rows.low[:, g].astype(np.float64))
        upper.append(rows.high[:, g].astype(np.float64))
        price.append(part.layers[:, g])
    if layers > 1:
        sums.append(np.ones(order.T.shape))
        lower.append(rows.least.astype(np.float64))
        upper.append(rows.most.astype(np.float64))
        price.append(part.total)
    each = np.stack(sums, axis=1)  # (n, D, K)
    change = each * sign[:, None]
    zero = np.zeros((1, *change.shape[1:]))
    fall = np.concatenate([np.cumsum(np.minimum(change, 0)[::-1], axis=0)[::-1], zero])
    rise = np.concatenate([np.cumsum(np.maximum(change, 0)[::-1], axis=0)[::-1], zero])
    start = (each * taken[:, None]).sum(axis=0)
    sure += upper[len(sure) :]  # counts are exact
    low, high, surely, prices = map(np.stack, (lower, upper, sure, price))
    limits = _Limits(change, fall, rise, low, high, surely, prices, start)
    return cost, gain, items, limits


def _relevant(limits: _Limits) -> _Limits:
    """Drop dimensions in which no bound can be broken, and nothing that is unused costs anything."""
    over = (limits.start + limits.rise[0] > limits.sure).any(axis=1)
    under = (limits.start + limits.fall[0] < limits.lower).any(axis=1)
    some = np.flatnonzero(over | under | (limits.price != 0).any(axis=1))
    change, fall, rise = (part[:, some] for part in (limits.change, limits.fall, limits.rise))
    return _Limits(change, fall, rise, *(part[some] for part in limits[3:]))
