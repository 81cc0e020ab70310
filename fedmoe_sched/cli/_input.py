"""Problem files of the command line: a ready problem, or scores to make one from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_sched._arrays import Labelled
from fedmoe_sched.errors import InputError
from fedmoe_sched.instances import load_problem
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.problem_files import read_arrays, read_score_table, refuse_unknown
from fedmoe_sched.result import Schedule
from fedmoe_sched.schedule import schedule

__all__ = ["Scores", "problem_of", "read_input"]

_SCORE_ARRAYS = (
    "fitness",
    "usage",
    "capacity",
    "eligible",
    "load_min",
    "load_max",
    "held",
    "switching_cost",
    "client_labels",
    "expert_labels",
)


@dataclass(frozen=True, eq=False)
class _Frame:
    """A matrix with labels, in the shape that `schedule` recognises a data frame by."""

    values: Any
    index: Any
    columns: Any

    def to_numpy(self) -> Any:
        return self.values


@dataclass(frozen=True)
class Scores:
    """Arguments of `schedule` read from a file.

    Parameters
    ----------
    path : Path
    arguments : dict
        Keyword arguments, without the options of the command line.
    """

    path: Path
    arguments: dict[str, Any]

    def schedule(self, **options: Any) -> Schedule:
        """Call `schedule`; options that are None are left at the file's value or the default."""
        given = {name: value for name, value in options.items() if value is not None}
        arguments = self.arguments | given
        if arguments.get("capacity") is None:
            msg = f"{self.path}: has no capacities; give one for all clients with --capacity"
            raise InputError(msg)
        # The one option whose None means something.
        if options.get("balance") == NO_BALANCE:
            arguments["balance"] = None
        return schedule(**arguments)


#: Stands for ``balance=None`` among options where None means "not given".
NO_BALANCE = -1.0


def read_input(path: Path) -> AssignmentProblem | Scores:
    """Read a problem (.npz with ``desirability``) or scores (.npz with ``fitness``, .npy, .csv).

    Raises
    ------
    InputError
        Another suffix, or contents that are not what they should be.
    OSError
        The file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return _table(path)
    if suffix == ".npz":
        arrays = read_arrays(path)
        return _score_arrays(path, arrays) if "fitness" in arrays else load_problem(path)
    if suffix == ".npy":
        return _matrix(path)
    msg = f"{path}: must be an .npz, .npy or .csv file"
    raise InputError(msg)


def problem_of(path: Path) -> AssignmentProblem:
    """Read a file as a problem; scores become one with the defaults of `schedule`."""
    read = read_input(path)
    if isinstance(read, AssignmentProblem):
        return read
    try:
        # The cheapest backend: only the problem is wanted.
        return read.schedule(solver="greedy").problem
    except InputError as error:
        msg = str(error) if str(error).startswith(str(path)) else f"{path}: {error}"
        raise InputError(msg) from error


def _table(path: Path) -> Scores:
    table = read_score_table(path)
    frame = _Frame(table.scores, table.clients, table.experts)
    usage = [0.0] * len(table.experts)
    # No usage is known, so it must not shift the objective either.
    arguments = {"fitness": frame, "usage": usage, "usage_weight": 0.0, "eligible": table.eligible}
    return Scores(path, arguments | {"capacity": table.capacity})


def _matrix(path: Path) -> Scores:
    """Open a bare matrix as scores that stay in the file."""
    try:
        scores = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        msg = f"{path}: not a complete .npy file of numbers ({error})"
        raise InputError(msg) from error
    usage = [0.0] * (scores.shape[1] if scores.ndim == 2 else 0)
    return Scores(path, {"fitness": scores, "usage": usage, "usage_weight": 0.0})


def _score_arrays(path: Path, arrays: dict[str, Any]) -> Scores:
    refuse_unknown(path, arrays, _SCORE_ARRAYS, needed=("fitness", "usage", "capacity"))
    arguments = dict(arrays)
    labels = Labelled(
        arguments.pop("fitness"), arguments.pop("client_labels", None), arguments.pop("expert_labels", None)
    )
    n, m = labels.values.shape if labels.values.ndim == 2 else (0, 0)
    arguments["fitness"] = labels.values
    if labels.rows is not None or labels.columns is not None:
        rows = tuple(range(n)) if labels.rows is None else labels.rows
        columns = tuple(range(m)) if labels.columns is None else labels.columns
        arguments["fitness"] = _Frame(labels.values, rows, columns)
    return Scores(path, arguments)
