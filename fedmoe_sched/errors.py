"""Errors raised by the package; all carry the argument, the position and the value at fault."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmoe_sched.result import Conflict

__all__ = [
    "InfeasibleError",
    "InputError",
    "MissingDependencyError",
    "NoAssignmentError",
    "StateFileError",
    "UnsupportedProblemError",
    "WorkerError",
]


class InputError(ValueError):
    """An argument is wrong; the message names the argument, the position and the value."""


class NoAssignmentError(RuntimeError):
    """The assignment was asked of a schedule that has none (nothing found within the limits)."""


class InfeasibleError(NoAssignmentError):
    """No assignment satisfies the constraints; ``conflict`` names those that exclude one another.

    Parameters
    ----------
    conflict : Conflict
        The clients, experts and bounds in conflict.
    """

    def __init__(self, conflict: Conflict) -> None:
        super().__init__(f"infeasible: {conflict.message}")
        self.conflict = conflict


class MissingDependencyError(ImportError):
    """An optional package is not installed; the message says which and how to get it."""


class StateFileError(ValueError):
    """A state file is corrupted, truncated, or of another version."""


class UnsupportedProblemError(ValueError):
    """A backend was asked for a problem that it does not take; the message says why."""


class WorkerError(RuntimeError):
    """A worker process ended before its work was done; the message says which, how, and at what."""
