"""Resource budgets: what experts cost a client in bytes or seconds, and how much of it each client has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmoe_sched._arrays import (
    FloatArray,
    IntArray,
    as_array,
    as_matrix,
    as_vector,
    read_only,
    row_blocks,
    vector_size,
)
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError

__all__ = ["BUDGET_TOLERANCE", "ResourceBudget"]

#: A budget counts as kept up to this share of it: sums of bytes and seconds in float64 do not come out even.
BUDGET_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False, repr=False)
class ResourceBudget:
    """One resource that clients have so much of: ``sum_j size_ij x_ij <= budget_i`` for every client i.

    Parameters
    ----------
    name : str
        What messages call it: ``"memory"``, ``"seconds"``, ...
    size : array_like, shape (m,) or (n, m)
        What training expert j takes, the same for all clients or by client; finite and >= 0, in any unit
        (bytes, seconds, ...). Matrices of floats are kept without a copy.
    budget : array_like, shape (n,)
        What each client has, in the same unit; >= 0, inf is no limit.

    Attributes
    ----------
    size : ndarray, shape (m,) or (n, m), float16, float32 or float64
    budget : ndarray, shape (n,), float64

    Raises
    ------
    InputError
        A wrong shape, sign or value; the message names argument, position and value.

    Examples
    --------
    >>> ResourceBudget("memory", size=[4e6, 1e6], budget=[5e6, 2e6, 8e6])
    ResourceBudget('memory', 3 clients x 2 experts)
    """

    name: str
    size: FloatArray
    budget: FloatArray

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            msg = f"name = {self.name!r}: must be text"
            raise InputError(msg)
        size = as_array("size", self.size)
        if size.ndim == 1:
            size = as_vector("size", size, len(size), "one per expert", least=0)
        else:
            size = as_matrix("size", size)
            _refuse_negative("size", size)
        budget = _limits(self.budget)
        if size.ndim == 2 and len(size) != len(budget):
            msg = f"budget: has shape {budget.shape}, must be ({len(size)},) (one per client)"
            raise InputError(msg)
        object.__setattr__(self, "size", read_only(size))
        object.__setattr__(self, "budget", read_only(budget))

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return len(self.budget), int(self.size.shape[-1])

    @property
    def allowed(self) -> FloatArray:
        """The budgets and `BUDGET_TOLERANCE` of them on top: what no sum may exceed; shape (n,), float64."""
        wide: FloatArray = self.budget * (1 + BUDGET_TOLERANCE)
        return wide

    def sizes_of(self, clients: Any) -> FloatArray:
        """Return what every expert takes of some clients.

        Parameters
        ----------
        clients : slice or ndarray of int

        Returns
        -------
        ndarray, shape (clients, m), float64, read-only
        """
        if self.size.ndim == 2:
            return read_only(self.size[clients].astype(np.float64, copy=False))
        spread: FloatArray = np.broadcast_to(self.size, (len(self.budget[clients]), len(self.size)))
        return spread

    def restrict(self, clients: slice | IntArray, experts: slice | IntArray) -> ResourceBudget:
        """Return what some clients have and some experts take, in this order."""
        size = self.size[experts] if self.size.ndim == 1 else self.size[clients][:, experts]
        return ResourceBudget(self.name, size, self.budget[clients])

    def pair_sizes(self, clients: Any, experts: Any) -> FloatArray:
        """Return what single pairs take, from parallel arrays of client and expert numbers; float64."""
        sizes = self.size[experts] if self.size.ndim == 1 else self.size[clients, experts]
        exact: FloatArray = sizes.astype(np.float64, copy=False)
        return exact

    def used(self, assignment: Assignment) -> FloatArray:
        """Return what each client's experts take together; shape (n,), float64."""
        clients = assignment.clients
        sizes = self.pair_sizes(clients, assignment.indices)
        return np.bincount(clients, weights=sizes, minlength=len(self.budget)).astype(np.float64, copy=False)

    def __repr__(self) -> str:
        n, m = self.shape
        return f"ResourceBudget({self.name!r}, {n} clients x {m} experts)"


def _refuse_negative(name: str, matrix: FloatArray) -> None:
    for block in row_blocks(matrix.shape):
        bad = matrix[block] < 0
        if bad.any():
            row, column = np.unravel_index(int(np.argmax(bad)), bad.shape)
            value = matrix[block][row, column]
            msg = f"{name}[{int(row) + block.start}, {int(column)}] = {value}: must be >= 0"
            raise InputError(msg)


def _limits(budget: Any) -> FloatArray:
    """Read a vector of numbers >= 0, of which some may be infinite."""
    limits = as_array("budget", budget).astype(np.float64)
    vector_size("budget", limits)
    endless = np.isposinf(limits)
    as_vector("budget", np.where(endless, 0.0, limits), len(limits), "one per client", least=0)
    return limits
