"""Measurements of real phones, read from a folder: memory and speed, bandwidth, availability.

The folder holds what FedScale built its traces from, in the form of plain tables:

- ``phones_spec.csv``: columns ``ram_gb`` (GB) and ``infer_ms`` (milliseconds of an inference), from AI-Benchmark;
- ``bandwidth_updown.csv``: ``down_mean_kbps`` and ``up_mean_kbps`` (kilobits per second) of one user per row;
- ``bandwidth_mobiperf_2018.csv``: ``mean_kbps``, download only; from MobiPerf;
- ``availability_flash.npz``: ``trace_start``, ``trace_end`` (k,), ``offset`` (k + 1,), ``start``, ``end``, in
  whole seconds of one clock; device i is available in the intervals ``offset[i]:offset[i + 1]``; from FLASH.

Further columns and arrays are not read. No file has a key in common with another: rows are paired at random.
"""

from __future__ import annotations

import csv
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched.federated.availability import Traces
from fedmoe_sched.federated.data import DATA_DIR_VARIABLE, DataFileError

__all__ = ["phones_folder", "read_columns", "read_traces"]

SPEC, UP_DOWN = "phones_spec.csv", "bandwidth_updown.csv"
MOBIPERF, TRACES = "bandwidth_mobiperf_2018.csv", "availability_flash.npz"

_SUBFOLDER = "device_traces"
_ARRAYS = ("trace_start", "trace_end", "offset", "start", "end")


def phones_folder(devices_dir: str | None, data_dir: str | None) -> Path:
    """Return the folder of the measurements.

    Parameters
    ----------
    devices_dir : str, optional
        The folder itself.
    data_dir : str, optional
        Folder of the data, else the environment variable ``FEDMOE_SCHED_DATA``; the measurements are in its
        sub-folder ``device_traces``, or in itself.

    Raises
    ------
    DataFileError
        Nothing names a folder, or the measurements are not in it.
    """
    root = devices_dir or data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not root:
        msg = (
            "devices.source = 'phones': needs the folder of the measurements: set devices.dir, data.dir "
            f"(--data-dir) or the environment variable {DATA_DIR_VARIABLE}"
        )
        raise DataFileError(msg)
    base = Path(root).expanduser()
    homes = [base] if devices_dir else [base / _SUBFOLDER, base]
    for home in homes:
        if (home / SPEC).exists():
            return home
    msg = f"devices file {homes[0] / SPEC}: is missing" + "".join(f", and so is {h / SPEC}" for h in homes[1:])
    raise DataFileError(msg)


def read_columns(path: Path, names: Sequence[str]) -> list[FloatArray]:
    """Read columns of positive numbers from a table with a header line.

    Parameters
    ----------
    path : Path
    names : sequence of str

    Returns
    -------
    list of ndarray, shape (rows,), float64
        In the order of `names`.

    Raises
    ------
    DataFileError
        The file is missing, lacks a column or has no row, or a value is not a finite number > 0: the message names
        file, line, column and value.
    """
    rows: list[list[float]] = []
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            _refuse_missing(path, names, reader.fieldnames or (), "column")
            rows.extend([_positive(path, reader.line_num, name, row[name]) for name in names] for row in reader)
    except FileNotFoundError as error:
        msg = f"devices file {path}: is missing"
        raise DataFileError(msg) from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"devices file {path}: cannot be read ({error})"
        raise DataFileError(msg) from error
    if not rows:
        msg = f"devices file {path}: has no row below its header"
        raise DataFileError(msg)
    return list(np.array(rows, dtype=np.float64).T)


def _refuse_missing(path: Path, wanted: Sequence[str], found: Sequence[str], what: str) -> None:
    for name in wanted:
        if name not in found:
            msg = f"devices file {path}: lacks the {what} {name!r} (has {', '.join(map(repr, found)) or 'none'})"
            raise DataFileError(msg)


def _positive(path: Path, line: int, name: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        msg = f"devices file {path}, line {line}: {name} = {text!r}: must be a finite number > 0"
        raise DataFileError(msg)
    return value


def read_traces(path: Path) -> Traces:
    """Read the availability traces, each from its own start on.

    Returns
    -------
    Traces
        Without traces in which the device is never available.

    Raises
    ------
    DataFileError
        The file is missing or corrupted, or the intervals of a trace are not in order, overlap or leave it: the
        message names file, array, position and value.
    """
    arrays = _read_arrays(path)
    trace_start, trace_end, offset, start, end = (arrays[name] for name in _ARRAYS)
    _refuse_bad_sizes(path, arrays)
    if not (offset[0] == 0 and offset[-1] == len(start) and (np.diff(offset) >= 0).all()):
        msg = f"devices file {path}: offset: must rise from 0 to {len(start)}, the number of intervals"
        raise DataFileError(msg)
    first, owner = trace_start, np.repeat(np.arange(len(trace_start)), np.diff(offset))
    before = np.where(np.diff(owner, prepend=-1) > 0, first[owner], np.concatenate([[0], end[:-1]]))
    _refuse(path, "trace_end", trace_end, trace_end > first, "> its trace_start", first)
    _refuse(path, "start", start, start >= before, ">= what comes before", before)
    _refuse(path, "end", end, end >= start, ">= its start", start)
    _refuse(path, "end", end, end <= trace_end[owner], "<= its trace_end", trace_end[owner])
    traces = Traces(offset, start - first[owner], end - first[owner], trace_end - first).cleaned()
    usable = np.flatnonzero(traces.counts)
    if not len(usable):
        msg = f"devices file {path}: has no device that is ever available"
        raise DataFileError(msg)
    return traces.taken(usable)


def _read_arrays(path: Path) -> dict[str, IntArray]:
    try:
        loaded: Any = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            msg = f"devices file {path}: holds a single array, must be an .npz archive"
            raise DataFileError(msg)
        with loaded:
            _refuse_missing(path, _ARRAYS, loaded.files, "array")
            arrays = {name: loaded[name] for name in _ARRAYS}
    except FileNotFoundError as error:
        msg = f"devices file {path}: is missing"
        raise DataFileError(msg) from error
    except DataFileError:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        msg = f"devices file {path}: cannot be read ({error})"
        raise DataFileError(msg) from error
    for name, array in arrays.items():
        if array.dtype.kind not in "iu" or array.ndim != 1:
            kind = f"{array.dtype} values of shape {array.shape}"
            msg = f"devices file {path}: {name}: holds {kind}, must be a vector of whole numbers"
            raise DataFileError(msg)
    return {name: array.astype(np.int64) for name, array in arrays.items()}


def _refuse_bad_sizes(path: Path, arrays: dict[str, IntArray]) -> None:
    traces, intervals = len(arrays["trace_start"]), len(arrays["start"])
    for name, size in (("trace_end", traces), ("offset", traces + 1), ("end", intervals)):
        if len(arrays[name]) != size:
            msg = f"devices file {path}: {name}: has length {len(arrays[name])}, must be {size}"
            raise DataFileError(msg)


def _refuse(
    path: Path, name: str, values: IntArray, good: BoolArray, rule: str, limits: npt.NDArray[np.int64]
) -> None:
    if not good.all():
        at = int(np.argmin(good))
        msg = f"devices file {path}: {name}[{at}] = {values[at]}: must be {rule} = {limits[at]}"
        raise DataFileError(msg)
