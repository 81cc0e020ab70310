"""Arrays that live in files: pages that were read are handed back, so that memory stays small.

The pages of a memory map count as resident once they are touched, and stay so while memory is plentiful: a pass
over a matrix of several gigabytes would look, to a container with a limit, like loading it.
"""

from __future__ import annotations

import contextlib
import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["release_rows"]

_ADVICE: int = getattr(mmap, "MADV_DONTNEED", -1)  # -1: the platform has none

# A page fault maps the pages around it too, 64 KiB on Linux: some of a block that was already handed back.
_AROUND = 65_536

# Shared maps only: what was written to a private one ("c") is nowhere but in its pages.
_SHARED = frozenset({"r", "r+", "w+"})


def release_rows(matrix: npt.NDArray[Any] | None, start: int, stop: int) -> None:
    """Tell the kernel that some rows of a memory map are not needed for now; their values stay as they are.

    They are read from the file, or from the kernel's cache of it, when they are touched again. Nothing happens for
    None, for arrays in memory, for copy-on-write maps, for maps that NumPy did not open, and on platforms without
    ``madvise``; such a call takes less than a microsecond. Threads may call it for one matrix at the same time,
    also for rows that another one is reading.

    Parameters
    ----------
    matrix : ndarray, at least one-dimensional, or None
        A `numpy.memmap` or any view of one, of any layout.
    start, stop : int
        Rows ``start`` to ``stop - 1``, with ``0 <= start <= stop <= len(matrix)``; pages next to theirs go too.
    """
    mapped = None if matrix is None or _ADVICE < 0 else _shared_map(matrix)
    if mapped is None or matrix is None or start >= stop:
        return
    block = matrix[start:stop]
    # By column where rows are not one piece of the file (column-major layout, selected columns).
    parts = [block] if block.flags.c_contiguous or block.ndim == 1 else list(block.reshape(len(block), -1).T)
    origin = np.frombuffer(mapped, dtype=np.uint8).__array_interface__["data"][0]
    for part in parts:
        first, end = _span(part)
        _advise(mapped, first - origin - _AROUND, end - origin + _AROUND)


def _shared_map(array: npt.NDArray[Any]) -> mmap.mmap | None:
    """Follow the views down to the file; None unless NumPy opened it as a shared map."""
    mode: str | None = None
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap):
            mode = base.mode
        base = base.base
    return base if isinstance(base, mmap.mmap) and mode in _SHARED else None


def _span(part: npt.NDArray[Any]) -> tuple[int, int]:
    """Return the addresses of the first byte and behind the last one of an array in one piece or dimension."""
    first = part.__array_interface__["data"][0]
    if part.flags.c_contiguous:
        return first, first + part.nbytes
    last = first + (len(part) - 1) * part.strides[0]
    return min(first, last), max(first, last) + part.itemsize


def _advise(mapped: mmap.mmap, first: int, end: int) -> None:
    first = max(0, first) // mmap.PAGESIZE * mmap.PAGESIZE
    # It is advice: a kernel that refuses it (locked pages) has lost nothing.
    with contextlib.suppress(OSError):
        mapped.madvise(_ADVICE, first, min(end, len(mapped)) - first)
