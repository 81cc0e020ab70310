"""Problems as files: .npz with the arrays of `AssignmentProblem`, and tables of scores as .csv."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import zipfile
import zlib
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._files import atomic_file
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget

__all__ = ["ScoreTable", "load_problem", "read_arrays", "read_score_table", "save_problem"]

_PROBLEM_ARRAYS = (
    "desirability",
    "capacity",
    "min_experts",
    "load_min",
    "load_max",
    "eligible",
    "client_labels",
    "expert_labels",
)
# A load penalty is its four arrays, all or none of them.
_PENALTY_PREFIX = "load_penalty_"
_PENALTY_ARRAYS = tuple(_PENALTY_PREFIX + field.name for field in dataclasses.fields(LoadPenalty))
# Layers are their three arrays, all or none of them.
_LAYER_ARRAYS = ("layer_of", "layer_min", "layer_max")
# Budgets are a list of names, and two arrays for each: budget_0_size, budget_0_limit, budget_1_size, ...
_BUDGET_NAMES = "budget_names"


def save_problem(problem: AssignmentProblem, path: str | os.PathLike[str]) -> None:
    """Write a problem as .npz; an existing file is replaced only once the new one is complete.

    Parameters
    ----------
    problem : AssignmentProblem
        Labels, if any, must be text or whole numbers.
    path : path-like

    Raises
    ------
    InputError
        A label that is neither text nor a whole number.
    OSError
        The file cannot be written.
    """
    arrays: dict[str, Any] = {}
    for name in _PROBLEM_ARRAYS:
        value = getattr(problem, name)
        if value is not None:
            # A JSON list keeps 1 and "1" apart, which an array of labels would not.
            arrays[name] = json.dumps(_plain_labels(name, value)) if name.endswith("_labels") else value
    for name in _PENALTY_ARRAYS if problem.load_penalty is not None else ():
        arrays[name] = getattr(problem.load_penalty, name.removeprefix(_PENALTY_PREFIX))
    for name in _LAYER_ARRAYS if problem.layers is not None else ():
        arrays[name] = getattr(problem.layers, name)
    if problem.budgets:
        arrays[_BUDGET_NAMES] = json.dumps([resource.name for resource in problem.budgets])
    for number, resource in enumerate(problem.budgets):
        size, limit = _budget_arrays(number)
        arrays[size], arrays[limit] = resource.size, resource.budget
    with atomic_file(path) as file:
        np.savez(file, **arrays)


def _budget_arrays(number: int) -> tuple[str, str]:
    return f"budget_{number}_size", f"budget_{number}_limit"


def _plain_labels(name: str, labels: tuple[Hashable, ...]) -> list[Any]:
    plain = []
    for position, label in enumerate(labels):
        if isinstance(label, np.integer):
            label = int(label)  # noqa: PLW2901 - the same label, as JSON can write it
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            msg = f"{name}[{position}] = {label!r}: only text and whole numbers can be saved"
            raise InputError(msg)
        plain.append(label)
    return plain


def load_problem(path: str | os.PathLike[str]) -> AssignmentProblem:
    """Read a problem that `save_problem` wrote, or any .npz with arrays of the same names.

    Parameters
    ----------
    path : path-like
        ``desirability`` and ``capacity`` are needed; ``min_experts``, ``load_min``, ``load_max``, ``eligible``,
        ``client_labels``, ``expert_labels`` and all four arrays of a `LoadPenalty` (``load_penalty_indptr``,
        ``load_penalty_start``, ...) and all three of an `ExpertLayers` (``layer_of``, ``layer_min``,
        ``layer_max``) may be there; and ``budget_names``, a list of names, with the arrays
        ``budget_0_size`` and ``budget_0_limit`` for the first one, and so on.

    Returns
    -------
    AssignmentProblem

    Raises
    ------
    InputError
        Not a complete .npz file, an array missing or unknown, or a value that `AssignmentProblem` refuses; the
        message starts with the path.
    OSError
        The file cannot be read.
    """
    arrays = read_arrays(path)
    penalised = not arrays.keys().isdisjoint(_PENALTY_ARRAYS)
    layered = not arrays.keys().isdisjoint(_LAYER_ARRAYS)
    names = arrays.get(_BUDGET_NAMES, ())
    budgets = tuple(name for number in range(len(names)) for name in _budget_arrays(number))
    groups = (*(_PENALTY_ARRAYS if penalised else ()), *(_LAYER_ARRAYS if layered else ()), *budgets)
    needed = ("desirability", "capacity", *groups)
    known = (*_PROBLEM_ARRAYS, *_PENALTY_ARRAYS, *_LAYER_ARRAYS, _BUDGET_NAMES, *budgets)
    refuse_unknown(path, arrays, known, needed=needed)
    try:
        arrays["budgets"] = _read_budgets(arrays)
        if penalised:
            penalty = {name.removeprefix(_PENALTY_PREFIX): arrays.pop(name) for name in _PENALTY_ARRAYS}
            arrays["load_penalty"] = LoadPenalty(**penalty)
        if layered:
            arrays["layers"] = ExpertLayers(*(arrays.pop(name) for name in _LAYER_ARRAYS))
        return AssignmentProblem(**arrays)
    except InputError as error:
        msg = f"{path}: {error}"
        raise InputError(msg) from error


def _read_budgets(arrays: dict[str, Any]) -> tuple[ResourceBudget, ...]:
    """Take the arrays of budgets out of `arrays`."""
    budgets = []
    for number, name in enumerate(arrays.pop(_BUDGET_NAMES, ())):
        size, limit = (arrays.pop(array) for array in _budget_arrays(number))
        try:
            budgets.append(ResourceBudget(name, size, limit))
        except InputError as error:
            msg = f"budget_{number}: {error}"
            raise InputError(msg) from error
    return tuple(budgets)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read every array of a .npz file into memory; labels become tuples.

    Raises
    ------
    InputError
        Not a .npz file, truncated, damaged, or holding Python objects.
    OSError
        The file cannot be read.
    """
    try:
        with zipfile.ZipFile(path):
            pass  # np.load takes bare arrays too, and blames pickling for whatever else it cannot read
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        msg = f"{path}: not a complete .npz file of plain arrays ({error})"
        raise InputError(msg) from error
    lists = ("_labels", _BUDGET_NAMES)
    return {name: _labels(path, name, a) if name.endswith(lists) else a for name, a in arrays.items()}


def _labels(path: str | os.PathLike[str], name: str, array: npt.NDArray[Any]) -> tuple[Hashable, ...]:
    labels = array.tolist()
    if array.ndim == 0:
        try:
            labels = json.loads(labels)
        except (TypeError, ValueError) as error:
            msg = f"{path}: {name}: must be a list of labels ({error})"
            raise InputError(msg) from error
    if not isinstance(labels, list) or not all(isinstance(label, (str, int)) for label in labels):
        msg = f"{path}: {name}: must be a list of text or whole numbers"
        raise InputError(msg)
    return tuple(labels)


def refuse_unknown(
    path: str | os.PathLike[str], arrays: dict[str, Any], known: tuple[str, ...], needed: tuple[str, ...]
) -> None:
    """Raise `InputError` unless all needed arrays are there, and none that nobody would read."""
    for name in needed:
        if name not in arrays:
            msg = f"{path}: has no array called {name!r}; it has {', '.join(sorted(arrays)) or 'none'}"
            raise InputError(msg)
    for name in arrays:
        if name not in known:
            msg = f"{path}: array {name!r} is not known; known are {', '.join(known)}"
            raise InputError(msg)


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """A table of scores with its labels.

    Parameters
    ----------
    scores : ndarray, shape (n, m), float64
        0 where the pair is not eligible.
    eligible : ndarray, shape (n, m), bool, or None
        False where the cell was empty; None where none was.
    capacity : ndarray, shape (n,), float64, or None
        The column ``capacity``, if there is one.
    clients, experts : tuple of str
        Row and column labels.
    """

    scores: npt.NDArray[np.float64]
    eligible: npt.NDArray[np.bool_] | None
    capacity: npt.NDArray[np.float64] | None
    clients: tuple[str, ...]
    experts: tuple[str, ...]


def read_score_table(path: str | os.PathLike[str]) -> ScoreTable:
    """Read a .csv file of one client per row and one expert per column.

    The first row names the experts, the first column the clients. A column called ``capacity`` is taken as the
    capacities. An empty cell is a pair that is not eligible.

    Parameters
    ----------
    path : path-like
        Comma-separated text in UTF-8.

    Returns
    -------
    ScoreTable

    Raises
    ------
    InputError
        No rows, rows of different lengths, or a cell that is not a number; the message names line and column.
    OSError
        The file cannot be read.
    """
    lines = _csv_lines(path)
    if len(lines) < 2 or len(lines[0][1]) < 2:
        msg = f"{path}: needs a header with the experts and at least one client row"
        raise InputError(msg)
    header = [cell.strip() for cell in lines[0][1]]
    cells = np.array([_numbers(path, number, header, row) for number, row in lines[1:]])
    clients = tuple(row[0].strip() for _, row in lines[1:])
    is_capacity = np.array([name == "capacity" for name in header[1:]])
    if is_capacity.sum() > 1 or is_capacity.all():
        msg = f"{path}: line 1: needs at least one expert column, and at most one called 'capacity'"
        raise InputError(msg)
    capacity = cells[:, is_capacity][:, 0] if is_capacity.any() else None
    if capacity is not None and np.isnan(capacity).any():
        at = int(np.argmax(np.isnan(capacity)))
        msg = f"{path}: line {lines[at + 1][0]}, column 'capacity': is empty"
        raise InputError(msg)
    scores = cells[:, ~is_capacity]
    missing = np.isnan(scores)
    return ScoreTable(
        np.where(missing, 0.0, scores),
        ~missing if missing.any() else None,
        capacity,
        clients,
        tuple(name for name in header[1:] if name != "capacity"),
    )


def _csv_lines(path: str | os.PathLike[str]) -> list[tuple[int, list[str]]]:
    """Return (line number, cells) of every line that is not blank."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            return [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (UnicodeDecodeError, csv.Error) as error:
        msg = f"{path}: not comma-separated text in UTF-8 ({error})"
        raise InputError(msg) from error


def _numbers(path: str | os.PathLike[str], line: int, header: list[str], row: list[str]) -> list[float]:
    """Read the cells after the label; an empty one is NaN."""
    if len(row) != len(header):
        msg = f"{path}: line {line}: has {len(row)} cells, the header has {len(header)}"
        raise InputError(msg)
    numbers = []
    for name, cell in zip(header[1:], row[1:], strict=True):
        try:
            number = float(cell) if cell.strip() else float("nan")
        except ValueError:
            number = float("inf")
        if np.isinf(number) or (np.isnan(number) and cell.strip()):
            msg = f"{path}: line {line}, column {name!r}: {cell.strip()!r} is not a finite number"
            raise InputError(msg)
        numbers.append(number)
    return numbers
