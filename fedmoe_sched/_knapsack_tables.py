"""Knapsacks by dynamic programming over whole units (Martello and Toth, *Knapsack Problems*, section 2.6)."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray

__all__ = ["Table", "whole_units"]


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


class Table(NamedTuple):
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
        """What finding the optimum takes."""
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
