"""Arrays that grow row by row at amortised constant cost."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["GrowingRows"]


class GrowingRows:
    """An array whose first axis grows; the storage doubles when it is full.

    Parameters
    ----------
    rows : ndarray, shape (n, ...)
        What it starts with; copied.

    Examples
    --------
    >>> store = GrowingRows(np.zeros((0, 2)))
    >>> store.append(np.ones((3, 2)))
    >>> store.rows.shape
    (3, 2)
    """

    def __init__(self, rows: npt.NDArray[Any]) -> None:
        self._storage = rows.copy()
        self._size = len(rows)

    def __len__(self) -> int:
        return self._size

    @property
    def rows(self) -> npt.NDArray[Any]:
        """The rows in use, as a view that may be written to; an append may detach it."""
        return self._storage[: self._size]

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Add rows at the end."""
        size = self._size + len(rows)
        if size > len(self._storage):
            grown = np.empty((max(size, 2 * len(self._storage)), *self._storage.shape[1:]), self._storage.dtype)
            grown[: self._size] = self.rows
            self._storage = grown
        self._storage[self._size : size] = rows
        self._size = size
