"""Published instances of the linear assignment problem, as problems in which everybody gets exactly one.

The two formats of the OR-Library (Beasley 1990, *Journal of the Operational Research Society* 41): numbers parted
by blanks. First n, the number of rows and of columns; then either the n x n costs row by row, or the pairs that
are possible, three numbers each: row and column, both counted from 1, and cost. Rows are clients, columns experts.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from fedmoe_sched._number_files import Numbers, Sense, desirability_sign, read_numbers
from fedmoe_sched.errors import InputError
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["read_linear", "read_linear_sparse"]


def read_linear(path: str | os.PathLike[str], sense: Sense = "min") -> AssignmentProblem:
    """Read an instance that has a cost for every pair.

    Parameters
    ----------
    path : path-like
        Text, or the same compressed by gzip: n, then n * n costs row by row.
    sense : {"min", "max"}, default "min"
        Whether the sum of costs is to be small, and desirability is minus the cost; or large, and it is the cost.

    Returns
    -------
    AssignmentProblem
        n clients and n experts, one to one.

    Raises
    ------
    InputError
        Not such a file; the message starts with the path.
    OSError
        The file cannot be read.
    """
    sign = desirability_sign(sense)
    size, costs = _sized(path)
    if len(costs) != size * size:
        msg = f"{path}: {len(costs)} numbers after n = {size}, must be {size} x {size} = {size * size} costs"
        raise InputError(msg)
    return _one_to_one(sign * costs.reshape(size, size), None)


def read_linear_sparse(path: str | os.PathLike[str], sense: Sense = "min") -> AssignmentProblem:
    """Read an instance that lists the pairs that are possible.

    Parameters
    ----------
    path : path-like
        Text, or the same compressed by gzip: n, then row, column and cost of each pair.
    sense : {"min", "max"}, default "min"
        Whether the sum of costs is to be small, and desirability is minus the cost; or large, and it is the cost.

    Returns
    -------
    AssignmentProblem
        n clients and n experts, one to one; pairs that are not listed are not eligible, and their desirability
        is 0.

    Raises
    ------
    InputError
        Not such a file, a row or column that there is not, or a pair listed twice; the message starts with the
        path and names the pair.
    OSError
        The file cannot be read.
    """
    sign = desirability_sign(sense)
    size, rest = _sized(path)
    if len(rest) % 3:
        msg = f"{path}: {len(rest)} numbers after n = {size}, must be three for each pair: row, column, cost"
        raise InputError(msg)
    rows, columns, costs = rest.reshape(-1, 3).T
    places = [_places(path, name, numbers, size) for name, numbers in (("row", rows), ("column", columns))]
    _refuse_twice(path, places[0] * size + places[1], size)
    desirability = np.zeros((size, size))
    eligible = np.zeros((size, size), dtype=np.bool_)
    desirability[places[0], places[1]] = sign * costs
    eligible[places[0], places[1]] = True
    return _one_to_one(desirability, eligible)


def _sized(path: str | os.PathLike[str]) -> tuple[int, Numbers]:
    """Return n and the numbers after it."""
    numbers = read_numbers(path)
    if not len(numbers) or numbers[0] < 1 or numbers[0] % 1:
        first = f"is {numbers[0]:g}" if len(numbers) else "is missing"
        msg = f"{path}: the first number {first}, must be n, a whole number of at least 1"
        raise InputError(msg)
    return int(numbers[0]), numbers[1:]


def _places(path: str | os.PathLike[str], name: str, numbers: Numbers, size: int) -> npt.NDArray[np.int64]:
    """Count from 0 what the file counts from 1."""
    wrong = np.flatnonzero((numbers < 1) | (numbers > size) | (numbers % 1 != 0))
    if len(wrong):
        msg = f"{path}: pair {wrong[0] + 1}: {name} is {numbers[wrong[0]]:g}, must be one of 1 to {size}"
        raise InputError(msg)
    return numbers.astype(np.int64) - 1


def _refuse_twice(path: str | os.PathLike[str], pairs: npt.NDArray[np.int64], size: int) -> None:
    _, first, which = np.unique(pairs, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[which] != np.arange(len(pairs)))
    if len(again):
        late = int(again[0])
        row, column = divmod(int(pairs[late]), size)
        msg = f"{path}: pair {late + 1}: row {row + 1}, column {column + 1} is pair {first[which[late]] + 1} too"
        raise InputError(msg)


def _one_to_one(desirability: Numbers, eligible: npt.NDArray[np.bool_] | None) -> AssignmentProblem:
    return AssignmentProblem(desirability, 1, min_experts=1, load_min=1, load_max=1, eligible=eligible)
