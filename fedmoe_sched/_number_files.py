"""What readers of published instances share: files of numbers, and whether their sum is to be small or large."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe_sched.errors import InputError

__all__ = ["Numbers", "Sense", "desirability_sign", "read_numbers"]

Numbers: TypeAlias = npt.NDArray[np.float64]
Sense: TypeAlias = Literal["min", "max"]


def read_numbers(path: str | os.PathLike[str]) -> Numbers:
    """Read numbers parted by blanks or line ends, from text or the same compressed by gzip.

    Raises
    ------
    InputError
        Something else, or a number that is not finite; the message starts with the path.
    OSError
        The file cannot be read.
    """
    data = Path(path).read_bytes()
    try:
        text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        numbers = np.array(text.split(), dtype=np.float64)
    except (ValueError, EOFError, OSError, zlib.error) as error:
        msg = f"{path}: not numbers parted by blanks ({error})"
        raise InputError(msg) from error
    endless = np.flatnonzero(~np.isfinite(numbers))
    if len(endless):
        msg = f"{path}: not numbers parted by blanks (number {endless[0] + 1} is {numbers[endless[0]]})"
        raise InputError(msg)
    return numbers


def desirability_sign(sense: Sense) -> float:
    """Return what costs are multiplied by: -1 where their sum is to be small, 1 where it is to be large.

    Raises
    ------
    InputError
        `sense` is neither.
    """
    if sense not in ("min", "max"):
        msg = f"sense = {sense!r}: must be 'min' or 'max'"
        raise InputError(msg)
    return 1.0 if sense == "max" else -1.0
