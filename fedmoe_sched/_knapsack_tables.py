"""Knapsacks by dynamic programming over whole units (Martello and Toth, *Knapsack Problems*, section 2.6)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray

__all__ = ["Table", "Units", "whole_units"]


class Units(NamedTuple):
    """One client's sizes, shape (k,), and budget in whole units, and whether it is sure that no more fits so."""

    sizes: IntArray
    budget: int
    exact: bool


def whole_units(sizes: npt.NDArray[np.float64], allowed: float, most: int, units: int) -> Units:
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
    """
    if allowed == 0 or not sizes.any():
        return Units(np.zeros(len(sizes), dtype=np.int64), 0, exact=allowed > 0)
    if (sizes == np.floor(sizes)).all() and sizes.max() < 2**53:
        whole = sizes.astype(np.int64)
        divisor = int(np.gcd.reduce(whole))
        budget = math.floor(allowed) // divisor
        if budget <= most:
            return Units(whole // divisor, budget, exact=True)
    # Not 1, but a hair less: the quotient itself is rounded, perhaps up.
    return Units(np.floor(sizes / allowed * units * (1 - 1e-15)).astype(np.int64), units, exact=False)


class Table(NamedTuple):
    """A knapsack in whole units, for dynamic programming over the budget and, if need be, the count."""

    values: FloatArray
    units: Units
    least: int
    most: int

    @property
    def counted(self) -> bool:
        """Whether the bounds on the count can matter."""
        return self.least > 0 or self.most < len(self.values)

    @property
    def cells(self) -> int:
        """What finding the optimum takes."""
        return len(self.values) * (self.units.budget + 1) * (self.most + 1 if self.counted else 1)

    def best(self) -> float:
        """Return the optimum; ``-inf`` where nothing keeps both bounds of the count."""
        room = self.units.budget + 1
        if not self.counted:
            best = np.zeros(room)
            for value, size in zip(self.values.tolist(), self.units.sizes.tolist(), strict=True):
                np.maximum(best[size:], best[: room - size] + value, out=best[size:])
            return float(best[-1])
        by_count = np.full((self.most + 1, room), -np.inf)
        by_count[0] = 0.0
        for value, size in zip(self.values.tolist(), self.units.sizes.tolist(), strict=True):
            with_it = by_count[:-1, : room - size] + value
            np.maximum(by_count[1:, size:], with_it, out=by_count[1:, size:])
        return float(by_count[self.least :, -1].max())
