"""Array-likes in, checked NumPy arrays out; every refusal names argument, position and value."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe_sched.errors import InputError

__all__ = [
    "BoolArray",
    "FloatArray",
    "IntArray",
    "Labelled",
    "as_array",
    "as_bool_matrix",
    "as_counts",
    "as_matrix",
    "as_vector",
    "read_only",
    "split_labels",
    "vector_size",
]

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_LARGEST_COUNT = 2**53  # every whole number up to here is exact in float64


class Labelled(NamedTuple):
    """An array-like split into bare values and the labels of its axes (None where it has none)."""

    values: Any
    rows: tuple[Hashable, ...] | None
    columns: tuple[Hashable, ...] | None


def split_labels(value: Any) -> Labelled:
    """Take the labels off a pandas DataFrame or Series; anything else has none.

    pandas is recognised by its attributes, so that it need not be installed.
    """
    if not (hasattr(value, "index") and hasattr(value, "to_numpy")):
        return Labelled(value, None, None)
    columns = tuple(value.columns) if hasattr(value, "columns") else None
    return Labelled(value.to_numpy(), tuple(value.index), columns)


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a view of `array` that cannot be written through."""
    view = array.view()
    view.flags.writeable = False
    return view


def as_array(name: str, value: Any) -> npt.NDArray[Any]:
    """Read numbers of any shape; booleans count as numbers."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        msg = f"{name}: cannot be read as an array of numbers ({error})"
        raise InputError(msg) from error
    if array.dtype.kind not in "biuf":
        msg = f"{name}: holds {array.dtype} values, not numbers"
        raise InputError(msg)
    return array


def _position(index: Sequence[Any]) -> str:
    return ", ".join(str(int(i)) for i in index)


def _refuse_first(name: str, array: npt.NDArray[Any], bad: BoolArray, rule: str) -> None:
    """Raise for the first position where `bad` holds."""
    if bad.any():
        index = np.unravel_index(int(np.argmax(bad)), bad.shape)
        msg = f"{name}[{_position(index)}] = {array[index]}: must be {rule}"
        raise InputError(msg)


def _refuse_not_finite(name: str, array: npt.NDArray[Any]) -> None:
    # One pass without a temporary; only a sum that is not finite is worth the exact search.
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum(dtype=np.float64)
    if not np.isfinite(total):
        _refuse_first(name, array, ~np.isfinite(array), "finite")


def _refuse_shape(name: str, array: npt.NDArray[Any], shape: tuple[int, ...], meaning: str) -> None:
    if array.shape != shape:
        msg = f"{name}: has shape {array.shape}, must be {shape} ({meaning})"
        raise InputError(msg)


def as_matrix(
    name: str,
    value: Any,
    shape: tuple[int, int] | None = None,
    *,
    axes: tuple[str, str] = ("client", "expert"),
) -> FloatArray:
    """Read a finite matrix, clients by experts; float32 and float64 are taken without a copy.

    Parameters
    ----------
    name : str
        The argument's name, for messages.
    value : array_like, shape (n, m)
        Numbers.
    shape : (int, int), optional
        The shape to insist on; else anything with n >= 1 and m >= 1.
    axes : (str, str), default ("client", "expert")
        What rows and columns stand for, for messages.

    Returns
    -------
    ndarray, shape (n, m), float32 or float64

    Raises
    ------
    InputError
        Wrong shape, not numeric, or not finite.
    """
    array = as_array(name, value)
    row, column = axes
    if array.ndim != 2:
        msg = f"{name}: has shape {array.shape}, must be two-dimensional ({row}s, {column}s)"
        raise InputError(msg)
    if shape is not None:
        _refuse_shape(name, array, shape, f"{row}s, {column}s")
    if 0 in array.shape:
        msg = f"{name}: has shape {array.shape}, needs at least one {row} and one {column}"
        raise InputError(msg)
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    _refuse_not_finite(name, array)
    return array


def as_bool_matrix(name: str, value: Any, shape: tuple[int, int]) -> BoolArray:
    """Read a boolean (clients, experts) matrix; 0 and 1 are taken for False and True."""
    array = as_array(name, value)
    _refuse_shape(name, array, shape, "clients, experts")
    if array.dtype != np.bool_:
        _refuse_first(name, array, (array != 0) & (array != 1), "True or False")
    return array.astype(np.bool_, copy=False)


def as_vector(name: str, value: Any, size: int, meaning: str, *, least: float | None = None) -> FloatArray:
    """Read a finite float64 vector of `size` numbers, each at least `least` where that is given."""
    array = as_array(name, value)
    _refuse_shape(name, array, (size,), meaning)
    array = array.astype(np.float64, copy=False)
    _refuse_not_finite(name, array)
    if least is not None:
        _refuse_first(name, array, array < least, f">= {least:g}")
    return array


def vector_size(name: str, value: Any) -> int:
    """Return the length of a vector whose size nothing else prescribes."""
    array = as_array(name, value)
    if array.ndim != 1:
        msg = f"{name}: has shape {array.shape}, must be one-dimensional"
        raise InputError(msg)
    return len(array)


def as_counts(name: str, value: Any, size: int, meaning: str) -> IntArray:
    """Read `size` whole numbers >= 0 as int64; one number stands for all of them.

    Raises
    ------
    InputError
        Wrong shape, negative, fractional, or not finite: ``capacity[17] = -2: must be >= 0``.
    """
    array = as_array(name, value)
    if array.ndim == 0:
        _refuse_bad_counts(name, array.reshape(1), scalar=True)
        return np.full(size, int(array), dtype=np.int64)
    _refuse_shape(name, array, (size,), meaning)
    _refuse_bad_counts(name, array, scalar=False)
    return array.astype(np.int64)


def _refuse_bad_counts(name: str, array: npt.NDArray[Any], *, scalar: bool) -> None:
    rules: list[tuple[BoolArray, str]] = []
    if array.dtype.kind == "f":
        rules = [(~np.isfinite(array), "finite"), (array != np.floor(array), "a whole number")]
    if array.dtype.kind in "if":
        rules.append((array < 0, ">= 0"))
    if array.dtype.kind in "iuf":
        rules.append((array > _LARGEST_COUNT, f"<= {_LARGEST_COUNT}"))
    for bad, rule in rules:
        if scalar and bad.any():
            msg = f"{name} = {array[0]}: must be {rule}"
            raise InputError(msg)
        _refuse_first(name, array, bad, rule)
