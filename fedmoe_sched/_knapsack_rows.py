"""Knapsacks of many clients at once, as arrays: their Lagrangian relaxation, greedy choices, what both decide.

Bounds on counts are nested: of each layer, then of all. Given multipliers of the budgets, the relaxed choice takes
what exceeds a threshold of its layer. Every multiplier and threshold bounds the optimum, and an expert that is
taken against its threshold, or left, lowers the bound by what it lies below or above (Martello and Toth, *Knapsack
Problems*, sections 2.2 and 2.2.3, on bounds and reduction).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray

__all__ = ["Relaxed", "Rows", "greedy", "improved", "relaxed"]

_SHRINK = 0.7  # of a step, where it brought nothing
_GUESS = 0.95  # share of the bound that a choice is worth, where none is known
_RETURN = 5  # steps, after which to go on from the best
_TINY = 1e-9  # of a budget


@dataclass(eq=False)
class Rows:
    """Clients with what each expert is worth to them and takes; K clients, R resources, G layers of k experts.

    Parameters
    ----------
    worth : ndarray, shape (K, G, k), float64
        -inf where there is no such expert.
    weight : ndarray, shape (R, K, G, k), float64
        Shares of the budgets.
    expert : ndarray, shape (K, G, k), int64
        Numbers of the experts.
    room : ndarray, shape (R, K), float64
        Shares of the budgets that are left, and `hair` more: sums that rounding puts above a budget may be kept.
    low, high : ndarray, shape (K, G), int64
        Fewest and most experts of a layer.
    least, most : ndarray, shape (K,), int64
        Of all layers; not looked at where there is one.
    base : ndarray, shape (K,), float64
        What experts that were decided on before are worth.
    lower : ndarray, shape (K,), float64
        What a choice that keeps all bounds is worth, base and all; -inf where none is known.
    hair : float
        What sums of shares may be off by, in float64.
    """

    worth: FloatArray
    weight: FloatArray
    expert: IntArray
    room: FloatArray
    low: IntArray
    high: IntArray
    least: IntArray
    most: IntArray
    base: FloatArray
    lower: FloatArray
    hair: float

    def __len__(self) -> int:
        return len(self.worth)

    def take(self, rows: IntArray | slice) -> Rows:
        """Return some of the clients."""
        return replace(
            self,
            worth=self.worth[rows],
            weight=self.weight[:, rows],
            expert=self.expert[rows],
            room=self.room[:, rows],
            low=self.low[rows],
            high=self.high[rows],
            least=self.least[rows],
            most=self.most[rows],
            base=self.base[rows],
            lower=self.lower[rows],
        )

    def packed(self, keep: BoolArray) -> Rows:
        """Keep some experts only, and move them together; `keep` has the shape of `worth`."""
        at = np.cumsum(keep, axis=2) - 1
        width = max(1, int(at.max(initial=-1)) + 1)
        row, layer, from_ = np.nonzero(keep)
        to = (row, layer, at[row, layer, from_])
        shape = (*keep.shape[:2], width)
        worth, expert = np.full(shape, -np.inf), np.zeros(shape, dtype=np.int64)
        weight = np.zeros((len(self.weight), *shape))
        worth[to], expert[to] = self.worth[row, layer, from_], self.expert[row, layer, from_]
        for part, whole in zip(weight, self.weight, strict=True):
            part[to] = whole[row, layer, from_]
        return replace(self, worth=worth, weight=weight, expert=expert)

    @property
    def feasible(self) -> BoolArray:
        """Whether the counts can be kept, budgets aside; shape (K,)."""
        there = np.isfinite(self.worth).sum(axis=2)
        kept: BoolArray = ((there >= self.low) & (self.high >= self.low)).all(axis=1)
        if self.low.shape[1] > 1:
            kept &= (self.most >= self.low.sum(axis=1)) & (self.least <= self.most)
            kept &= np.minimum(there, self.high).sum(axis=1) >= self.least
        kept &= (self.room >= -self.hair).all(axis=0)
        return kept

    def decided(self, part: Relaxed) -> Rows:
        """Drop what cannot be in a better choice than the best one known, and decide on what must be in it."""
        slack = (self.base + part.bound - self.lower)[:, None, None]
        must = part.rest >= np.maximum(slack, 0.0)
        must &= part.rest > 0
        keep = (-part.rest < slack) & ~must & np.isfinite(self.worth)
        weight = np.where(must, self.weight, 0.0).sum(axis=(2, 3))
        count = must.sum(axis=2)
        fixed = replace(
            self,
            room=self.room - weight,
            low=np.maximum(self.low - count, 0),
            high=self.high - count,
            least=np.maximum(self.least - count.sum(axis=1), 0),
            most=self.most - count.sum(axis=1),
            base=self.base + np.where(must, self.worth, 0.0).sum(axis=(1, 2)),
        )
        keep &= (self.weight <= (fixed.room + self.hair)[:, :, None, None]).all(axis=0)
        return fixed.packed(keep)


class Relaxed(NamedTuple):
    """Value of a relaxation, shape (K,), and what it is made of.

    Multipliers of the budgets, shape (R, K); of layers and of all of them, shapes (K, G) and (K,); worth less all
    of them, shape (K, G, k): what is positive is taken.
    """

    bound: FloatArray
    budgets: FloatArray
    layers: FloatArray
    total: FloatArray
    rest: FloatArray


def relaxed(rows: Rows, budgets: FloatArray) -> Relaxed:
    """Relax budgets by multipliers, shape (R, K), and counts by those that suit these best."""
    rest = rows.worth.copy()
    for multiplier, weight in zip(budgets, rows.weight, strict=True):
        rest -= multiplier[:, None, None] * weight
    ranked = -np.sort(-rest, axis=2)
    total: FloatArray = np.zeros(len(rows))
    bound = (budgets * rows.room).sum(axis=0)
    if ranked.shape[1] > 1:
        rank = np.arange(ranked.shape[2])
        inside = (rank >= rows.low[:, :, None]) & (rank < rows.high[:, :, None])
        optional = np.where(inside, ranked, -np.inf).reshape(len(rows), 1, -1)
        optional = -np.sort(-optional, axis=2)
        forced = rows.low.sum(axis=1)
        bounds = (np.maximum(rows.least - forced, 0)[:, None], np.maximum(rows.most - forced, 0)[:, None])
        total = _thresholds(optional, *bounds, np.zeros((len(rows), 1)))[:, 0]
        bound += np.where(total >= 0, total * rows.most, total * rows.least)
    above = _thresholds(ranked, rows.low, rows.high, np.broadcast_to(total[:, None], rows.low.shape))
    layers = above - total[:, None]
    bound += np.where(layers >= 0, layers * rows.high, layers * rows.low).sum(axis=1)
    rest -= above[:, :, None]
    bound += np.maximum(rest, 0.0).sum(axis=(1, 2))
    return Relaxed(bound, budgets, layers, total, rest)


def _thresholds(ranked: FloatArray, low: IntArray, high: IntArray, zero: FloatArray) -> FloatArray:
    """Return what the entries that are taken exceed; `ranked` falls along the last axis.

    That is `zero`, unless more than `high` or fewer than `low` entries exceed it.
    """
    k = ranked.shape[-1]
    above = (ranked > zero[..., None]).sum(axis=-1)
    found = zero.copy()

    def at(rank: IntArray, before: float) -> FloatArray:
        entry = np.take_along_axis(ranked, np.clip(rank, 0, k - 1)[..., None], axis=-1)[..., 0]
        return np.where(rank < 0, before, np.where(rank >= k, -np.inf, entry))

    over = above > high
    if over.any():
        last, next_ = at(high - 1, np.inf), np.maximum(at(high, np.inf), zero)
        last = np.where(np.isfinite(last), last, next_)
        found = np.where(over, last + (next_ - last) / 2, found)
    under = above < low
    if under.any():
        last, next_ = np.minimum(at(low - 1, np.inf), zero), at(low, np.inf)
        last = np.where(np.isfinite(last), last, zero)
        next_ = np.where(np.isfinite(next_), next_, last - 1 - abs(last))
        found = np.where(under, last + (next_ - last) / 2, found)
    return found


def improved(rows: Rows, start: Relaxed, steps: int) -> Relaxed:
    """Improve multipliers of the budgets: one by its tangents, several by subgradient steps.

    Steps are towards the best choice known (Polyak 1969). Clients keep the best bound that they have seen.
    """
    if len(rows.weight) == 1:
        return _by_tangents(rows, start, steps)
    best, at, pace = start, start, np.ones(len(rows))
    goal = rows.lower - rows.base
    for step in range(steps):
        over = (rows.weight * (at.rest > 0)).sum(axis=(2, 3)) - rows.room
        over[(at.budgets <= 0) & (over < 0)] = 0.0
        length = (over**2).sum(axis=0)
        ahead = np.maximum(at.bound - np.where(np.isfinite(goal), goal, _GUESS * at.bound), 0.0)
        stride = pace * ahead / np.where(length > 0, length, np.inf)
        if not stride.any():
            break
        at = relaxed(rows, np.maximum(at.budgets + stride * over, 0.0))
        better = at.bound < best.bound
        pace = np.where(better, pace, pace * _SHRINK)
        best = _merged(better, at, best)
        if step % _RETURN == _RETURN - 1:
            at = best
    return best


def _by_tangents(rows: Rows, start: Relaxed, steps: int) -> Relaxed:
    """Go on where the tangents on both sides of the least bound meet, which is convex in one multiplier."""
    best = at = start
    count = len(rows)
    # Multiplier, bound and slope of the nearest points on both sides: of falling bounds, then of the others.
    sides = np.full((2, 3, count), np.nan)
    for _ in range(steps):
        now = at.budgets[0]
        slope = rows.room[0] - (rows.weight[0] * (at.rest > 0)).sum(axis=(1, 2))
        rises = (slope >= 0).astype(np.int64)
        sides[rises, :, np.arange(count)] = np.stack([now, at.bound, slope], axis=1)
        (left, left_bound, fall), (right, right_bound, rise) = sides
        with np.errstate(invalid="ignore", divide="ignore"):
            meet = (left_bound - fall * left - right_bound + rise * right) / (rise - fall)
        further = np.maximum(2 * now, np.abs(at.bound) / np.maximum(rows.room[0], _TINY))
        wanted = np.where(np.isnan(right), further, np.where(np.isnan(left), 0.0, meet))
        inside = (np.isnan(left) | (wanted > left)) & (np.isnan(right) | (wanted < right)) & np.isfinite(wanted)
        if not inside.any():
            break
        at = relaxed(rows, np.where(inside, wanted, now)[None])
        best = _merged(at.bound < best.bound, at, best)
    return best


def _merged(where: BoolArray, one: Relaxed, other: Relaxed) -> Relaxed:
    return Relaxed(
        np.where(where, one.bound, other.bound),
        np.where(where, one.budgets, other.budgets),
        np.where(where[:, None], one.layers, other.layers),
        np.where(where, one.total, other.total),
        np.where(where[:, None, None], one.rest, other.rest),
    )


def greedy(rows: Rows, rest: FloatArray) -> FloatArray:
    """Return what greedy choices are worth, base and all, shape (K,); -inf where they miss a bound.

    Experts are tried in the order of `rest`, shape (K, G, k), and taken where they fit and gain, or are needed.
    """
    count, layers, width = rest.shape
    order = np.argsort(-rest.reshape(count, -1), axis=1, kind="stable")
    flat = np.arange(count)
    room = rows.room - 2 * rows.hair
    number, worth = np.zeros((count, layers), dtype=np.int64), rows.base.copy()
    weights = [weight.reshape(count, -1) for weight in rows.weight]
    values = rows.worth.reshape(count, -1)
    for t in range(int(np.isfinite(values).sum(axis=1).max(initial=0))):
        item = order[:, t]
        layer = item // width
        value = values[flat, item]
        missing = np.maximum(rows.low - number, 0)
        needed = missing[flat, layer] > 0
        takes = np.isfinite(value) & (number[flat, layer] < rows.high[flat, layer])
        if layers > 1:
            total, reserved = number.sum(axis=1), missing.sum(axis=1)
            takes &= total + reserved + ~needed <= rows.most
            needed |= total + reserved < rows.least
        takes &= (value > 0) | needed
        sizes = np.stack([weight[flat, item] for weight in weights])
        takes &= (sizes <= room).all(axis=0)
        room -= np.where(takes, sizes, 0.0)
        number[flat, layer] += takes
        worth += np.where(takes, value, 0.0)
    kept = (number >= rows.low).all(axis=1) & (room >= 0).all(axis=0)
    if layers > 1:
        kept &= number.sum(axis=1) >= rows.least
    return np.where(kept, worth, -np.inf)
