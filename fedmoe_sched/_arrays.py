"""Array-likes in, checked NumPy arrays out; every refusal names argument, position and value."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe_sched._mapped import release_rows
from fedmoe_sched.errors import InputError

__all__ = [
    "BoolArray",
    "FloatArray",
    "IntArray",
    "KnownMatrix",
    "Labelled",
    "as_array",
    "as_bool_matrix",
    "as_count_matrix",
    "as_counts",
    "as_matrix",
    "as_vector",
    "read_only",
    "row_blocks",
    "split_labels",
    "vector_size",
]

FloatArray: TypeAlias = npt.NDArray[np.floating[Any]]
IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

_LARGEST_COUNT = 2**53  # every whole number up to here is exact in float64

# Cells per block of the passes over a matrix, by measurement: 4 MiB of float64, which stay in the cache.
_BLOCK_CELLS = 524_288

_KEPT_TYPES = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))


@dataclass(frozen=True, eq=False)
class KnownMatrix:
    """A matrix that `as_matrix` returned before: it is not looked through again."""

    array: FloatArray


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


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Cut the rows of a matrix into blocks whose temporaries stay in the processor's cache."""
    rows = shape[0]
    step = max(1, _BLOCK_CELLS // max(1, shape[1] if len(shape) > 1 else 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


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


def _refuse_first(name: str, array: npt.NDArray[Any], bad: BoolArray, rule: str, first_row: int = 0) -> None:
    """Raise for the first position where `bad` holds; `array` starts at row `first_row` of the argument."""
    if bad.any():
        index = np.unravel_index(int(np.argmax(bad)), bad.shape)
        where = (int(index[0]) + first_row, *index[1:])
        msg = f"{name}[{_position(where)}] = {array[index]}: must be {rule}"
        raise InputError(msg)


def _refuse_not_finite(name: str, array: npt.NDArray[Any]) -> None:
    for block in row_blocks(array.shape):
        part = array[block]
        _refuse_first(name, part, ~np.isfinite(part), "finite", block.start)
        release_rows(array, block.start, block.stop)


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
    """Read a finite matrix, clients by experts; float16, float32 and float64 are taken without a copy.

    It is looked through in blocks: of a memory map only a few pages are resident at a time.

    Parameters
    ----------
    name : str
        The argument's name, for messages.
    value : array_like, shape (n, m), or KnownMatrix
        Numbers.
    shape : (int, int), optional
        The shape to insist on; else anything with n >= 1 and m >= 1.
    axes : (str, str), default ("client", "expert")
        What rows and columns stand for, for messages.

    Returns
    -------
    ndarray, shape (n, m), float16, float32 or float64

    Raises
    ------
    InputError
        Wrong shape, not numeric, or not finite.
    """
    if isinstance(value, KnownMatrix):
        return value.array
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
    if array.dtype not in _KEPT_TYPES:
        array = array.astype(np.float64)
    _refuse_not_finite(name, array)
    return array


def as_bool_matrix(name: str, value: Any, shape: tuple[int, int]) -> BoolArray:
    """Read a boolean (clients, experts) matrix; 0 and 1 are taken for False and True. bool is not copied."""
    array = as_array(name, value)
    _refuse_shape(name, array, shape, "clients, experts")
    if array.dtype == np.bool_:
        return array
    read = np.empty(shape, dtype=np.bool_)
    for block in row_blocks(shape):
        part = array[block]
        _refuse_first(name, part, (part != 0) & (part != 1), "True or False", block.start)
        read[block] = part
        release_rows(array, block.start, block.stop)
    return read


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
    """Read `size` whole numbers >= 0 as int64 that nobody can write to; one number stands for all of them.

    They are a copy, unless they are such numbers already: those of another problem.

    Raises
    ------
    InputError
        Wrong shape, negative, fractional, or not finite: ``capacity[17] = -2: must be >= 0``.
    """
    array = as_array(name, value)
    if array.ndim == 0:
        _refuse_bad_counts(name, array.reshape(1), scalar=True)
        return _frozen(np.full(size, int(array), dtype=np.int64))
    _refuse_shape(name, array, (size,), meaning)
    for block in row_blocks(array.shape):
        _refuse_bad_counts(name, array[block], scalar=False, first_row=block.start)
    if array.dtype == np.int64 and _is_frozen(array):
        return array
    return _frozen(array.astype(np.int64))


def as_count_matrix(name: str, value: Any, columns: int, meaning: str) -> IntArray:
    """Read a matrix of whole numbers >= 0 with so many columns, as a copy; see `as_counts`."""
    array = as_array(name, value)
    _refuse_shape(name, array, (len(array), columns), meaning)
    _refuse_bad_counts(name, array, scalar=False)
    return _frozen(array.astype(np.int64))


def _frozen(array: IntArray) -> IntArray:
    array.flags.writeable = False
    return array


def _is_frozen(array: npt.NDArray[Any]) -> bool:
    """Whether nothing can write to these numbers: neither the array nor what it is a view of."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if base.flags.writeable:
            return False
        base = base.base
    return base is None


def _refuse_bad_counts(name: str, array: npt.NDArray[Any], *, scalar: bool, first_row: int = 0) -> None:
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
        _refuse_first(name, array, bad, rule, first_row)
