"""What clients with budgets could gain at most at given prices: knapsacks, bounded from above.

A client with budgets picks the best of its experts that fit: a knapsack with bounds on the count. What is returned
here is never less than its optimum, and mostly equal to it. Per client it is the least of

- the best choice without budgets, which is the optimum where it happens to fit;
- for each resource alone, the minimum over its multiplier of the Lagrangian of that budget, the linear relaxation
  (Martello and Toth, *Knapsack Problems*, sections 2.2 and 6.2);
- for each resource alone, dynamic programming over whole units of the budget (section 2.6), as long as that is
  cheap: exact where the sizes are whole numbers, else with sizes rounded down to small units.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray

__all__ = ["Knapsacks", "budgeted_responses", "whole_units"]

_STEPS = 40  # halvings of the interval of a multiplier
_UNITS = 4096  # that a budget is cut into where sizes are not whole numbers
_MOST_UNITS = 20_000  # of a budget of whole numbers
_CHEAP = 2_000_000_000  # cells of all tables of a block: a second or two


class Knapsacks(NamedTuple):
    """One resource of some clients: what every expert takes, shape (clients, m), and what there is, (clients,)."""

    sizes: FloatArray
    allowed: FloatArray


def budgeted_responses(reduced: FloatArray, least: IntArray, most: IntArray, resources: list[Knapsacks]) -> float:
    """Bound the sum of each row's best choice that keeps all budgets.

    Parameters
    ----------
    reduced : ndarray, shape (clients, m), float64
        Scores less prices; -inf where not eligible. Overwritten.
    least, most : ndarray, shape (clients,), int64
        Fewest and most experts of a choice.
    resources : list of Knapsacks

    Returns
    -------
    float
        ``-inf`` where some client has fewer experts that fit alone than it must take.
    """
    for resource in resources:
        reduced[resource.sizes > resource.allowed[:, None]] = -np.inf
    best = _ranked(reduced, least, most)
    if not np.isfinite(best.worth).all():
        return -np.inf
    worth = best.worth
    over = np.zeros(len(reduced), dtype=np.bool_)
    for resource in resources:
        over |= (resource.sizes * best.taken).sum(axis=1) > resource.allowed
    rows = np.flatnonzero(over)
    for resource in resources:
        bound = _bounded(reduced[rows], least[rows], most[rows], Knapsacks(*(part[rows] for part in resource)))
        worth[rows] = np.minimum(worth[rows], bound)
    return math.fsum(worth)


class _Choices(NamedTuple):
    worth: FloatArray  # (clients,)
    taken: BoolArray  # (clients, m)


def _ranked(reduced: FloatArray, least: IntArray, most: IntArray) -> _Choices:
    """Take each row's `least` largest entries, then positive ones up to `most`."""
    order = np.argsort(-reduced, axis=1, kind="stable")
    ranked = np.take_along_axis(reduced, order, axis=1)
    rank = np.arange(reduced.shape[1])
    chosen = (rank < least[:, None]) | ((rank < most[:, None]) & (ranked > 0))
    worth = np.where(chosen, ranked, 0.0).sum(axis=1)
    taken = np.zeros_like(chosen)
    np.put_along_axis(taken, order, chosen, axis=1)
    return _Choices(worth, taken)


def _bounded(reduced: FloatArray, least: IntArray, most: IntArray, one: Knapsacks) -> FloatArray:
    """Bound each row's best choice within one budget."""
    bound = _multiplied(reduced, least, most, one)
    tables = [_table(reduced[i], int(least[i]), int(most[i]), one, i) for i in range(len(reduced))]
    if sum(table.cells for table in tables) <= _CHEAP:
        for i, table in enumerate(tables):
            bound[i] = min(bound[i], table.best())
    return bound


def _multiplied(reduced: FloatArray, least: IntArray, most: IntArray, one: Knapsacks) -> FloatArray:
    """Minimise the Lagrangian of one budget over its multiplier, by halving: any multiplier gives a bound."""
    limited = np.isfinite(one.allowed)
    allowed = np.where(limited, one.allowed, 0.0)
    ratio = np.where(one.sizes > 0, np.maximum(reduced, 0) / np.where(one.sizes > 0, one.sizes, 1.0), 0.0)
    low, high = np.zeros(len(reduced)), np.where(limited, ratio.max(axis=1, initial=0.0), 0.0)
    bound = np.full(len(reduced), np.inf)
    for multiplier in (low, high):
        bound = np.minimum(bound, _lagrangian(reduced, least, most, one.sizes, allowed, multiplier)[0])
    for _ in range(_STEPS):
        middle = (low + high) / 2
        value, over = _lagrangian(reduced, least, most, one.sizes, allowed, middle)
        bound = np.minimum(bound, value)
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    return bound


def _lagrangian(
    reduced: FloatArray,
    least: IntArray,
    most: IntArray,
    sizes: FloatArray,
    allowed: FloatArray,
    multiplier: FloatArray,
) -> tuple[FloatArray, BoolArray]:
    """Return the value at a multiplier per row, and where its choice exceeds the budget."""
    choices = _ranked(reduced - multiplier[:, None] * sizes, least, most)
    used = (sizes * choices.taken).sum(axis=1)
    return choices.worth + multiplier * allowed, used > allowed


def whole_units(sizes: npt.NDArray[np.float64], allowed: float, most: int, units: int) -> tuple[IntArray, int]:
    """Express one client's sizes and budget in whole units, rounded so that whatever fits still fits.

    Sizes that are whole numbers, and a budget of no more than `most` of their greatest common divisor, are
    expressed exactly. All others are rounded down to multiples of the budget over `units`.

    Parameters
    ----------
    sizes : ndarray, shape (k,), float64
        None larger than the budget.
    allowed : float
        Finite.
    most, units : int

    Returns
    -------
    whole : ndarray, shape (k,), int64
    budget : int
    """
    if allowed == 0 or not sizes.any():
        return np.zeros(len(sizes), dtype=np.int64), 0
    if (sizes == np.floor(sizes)).all() and sizes.max() < 2**53:
        whole = sizes.astype(np.int64)
        divisor = int(np.gcd.reduce(whole))
        budget = math.floor(allowed) // divisor
        if budget <= most:
            return whole // divisor, budget
    # Not 1, but a hair less: the quotient itself is rounded, perhaps up.
    return np.floor(sizes / allowed * units * (1 - 1e-15)).astype(np.int64), units


class _Table(NamedTuple):
    """A knapsack in whole units, for dynamic programming over the budget and, if need be, the count."""

    values: FloatArray
    sizes: IntArray
    budget: int
    least: int
    most: int

    @property
    def counted(self) -> bool:
        """Whether the bounds on the count can matter."""
        return self.least > 0 or self.most < len(self.values)

    @property
    def cells(self) -> int:
        return len(self.values) * (self.budget + 1) * (self.most + 1 if self.counted else 1)

    def best(self) -> float:
        """Return the optimum; ``-inf`` where nothing keeps both bounds of the count."""
        if not self.counted:
            best = np.zeros(self.budget + 1)
            for value, size in zip(self.values.tolist(), self.sizes.tolist(), strict=True):
                np.maximum(best[size:], best[: self.budget + 1 - size] + value, out=best[size:])
            return float(best[-1])
        by_count = np.full((self.most + 1, self.budget + 1), -np.inf)
        by_count[0] = 0.0
        for value, size in zip(self.values.tolist(), self.sizes.tolist(), strict=True):
            with_it = by_count[:-1, : self.budget + 1 - size] + value
            np.maximum(by_count[1:, size:], with_it, out=by_count[1:, size:])
        return float(by_count[self.least :, -1].max())


def _table(reduced: FloatArray, least: int, most: int, one: Knapsacks, row: int) -> _Table:
    """Keep what a best choice may hold: eligible experts, only those of a gain where none must be taken."""
    kept = np.flatnonzero(reduced > (0 if least == 0 else -np.inf))
    allowed = float(one.allowed[row])
    sizes = one.sizes[row, kept] if math.isfinite(allowed) else np.zeros(len(kept))
    whole, budget = whole_units(sizes, allowed if math.isfinite(allowed) else 0.0, _MOST_UNITS, _UNITS)
    return _Table(reduced[kept], whole, budget, least, min(most, len(kept)))
