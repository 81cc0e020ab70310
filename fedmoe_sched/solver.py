"""What a backend is: declared capabilities, limits, and three steps (build, run, read)."""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason

__all__ = ["NETWORK_PROBLEMS", "Answer", "Capability", "Limits", "Solver", "required_capabilities"]

ModelT = TypeVar("ModelT")


class Capability(StrEnum):
    """What a backend can do; `required_capabilities` says what a problem needs."""

    MIN_EXPERTS = "min experts"
    LOAD_BOUNDS = "load bounds"
    ELIGIBILITY = "eligibility"
    LOAD_PENALTY = "load penalty"
    BUDGETS = "budgets"
    LAYERS = "layers"
    PRICES = "prices"
    WARM_START = "warm start"
    TIME_LIMIT = "time limit"
    THREADS = "threads"


#: What every backend for the whole network problem can do; load penalties, budgets and layers are not among it.
NETWORK_PROBLEMS = frozenset({Capability.MIN_EXPERTS, Capability.LOAD_BOUNDS, Capability.ELIGIBILITY})


@dataclass(frozen=True)
class Limits:
    """Resource limits of one solve.

    Parameters
    ----------
    time : float, optional
        Wall seconds for the solve, model building excluded; None is no limit.
    seed : int, default 0
        Seed of everything random in a backend.
    threads : int, optional
        Threads a backend may use; None leaves the choice to it.

    Raises
    ------
    InputError
        A value out of range.
    """

    time: float | None = None
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.time is not None and not (self.time > 0 and math.isfinite(self.time)):
            msg = f"time = {self.time}: must be a finite number of seconds > 0, or None"
            raise InputError(msg)
        if not 0 <= self.seed < 2**31:
            msg = f"seed = {self.seed}: must be >= 0 and < 2**31"
            raise InputError(msg)
        if self.threads is not None and self.threads < 1:
            msg = f"threads = {self.threads}: must be >= 1, or None"
            raise InputError(msg)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a backend hands back; everything in it is checked by `fedmoe_sched.certify`.

    Parameters
    ----------
    stop_reason : StopReason
    assignment : Assignment or None
        None where nothing was found.
    prices : ndarray, shape (m,), optional
        Dual prices of the loads.
    bound : float, optional
        Upper bound on the objective that only the backend vouches for.
    message : str
        The backend's own words.
    """

    stop_reason: StopReason
    assignment: Assignment | None = None
    prices: npt.NDArray[np.float64] | None = None
    bound: float | None = None
    message: str = ""


class Solver(ABC, Generic[ModelT]):
    """Base class of the backends. One backend, one file in ``solvers/``, one class.

    The options of a backend are arguments of its constructor. The three steps are apart so that each is timed
    by itself.
    """

    #: The name in the registry.
    name: ClassVar[str]
    #: Whether a completed run is optimal.
    exact: ClassVar[bool]
    #: What the backend can do.
    capabilities: ClassVar[frozenset[Capability]]
    #: Import names of the packages that it needs.
    requires: ClassVar[tuple[str, ...]] = ()
    #: One line for tables: what it is and when to use it.
    summary: ClassVar[str]

    @classmethod
    def missing(cls) -> str | None:
        """Return which package is missing, or None; nothing is imported."""
        absent = [name for name in cls.requires if importlib.util.find_spec(name) is None]
        return f"{cls.name} needs {', '.join(absent)}: pip install {' '.join(absent)}" if absent else None

    def supports(self, problem: AssignmentProblem) -> str | None:
        """Return None, or the reason why this backend does not take `problem`."""
        lacking = required_capabilities(problem) - self.capabilities
        if not self.exact:
            # A heuristic may ignore load bounds: the schedule then says VIOLATED and lists them. A penalty that it
            # ignores counts in the objective all the same.
            lacking -= {Capability.LOAD_BOUNDS, Capability.LOAD_PENALTY}
        if not lacking:
            return None
        return f"{self.name} does not take {', '.join(sorted(lacking))}"

    @abstractmethod
    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> ModelT:
        """Turn the problem into the backend's own model.

        Parameters
        ----------
        problem : AssignmentProblem
        limits : Limits
        prices : ndarray, shape (m,), or None
            Prices of a similar problem, to start from; backends without `Capability.WARM_START` ignore them.
        """

    @abstractmethod
    def run(self, model: ModelT, limits: Limits) -> None:
        """Solve the model in place: the only step that counts as solve time."""

    @abstractmethod
    def read(self, model: ModelT) -> Answer:
        """Read the answer out of the solved model."""

    def __repr__(self) -> str:
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items() if not k.startswith("_"))
        return f"{type(self).__name__}({options})"


def required_capabilities(problem: AssignmentProblem) -> frozenset[Capability]:
    """Return what a backend must be able to do for `problem`."""
    needs: dict[Capability, Any] = {
        Capability.MIN_EXPERTS: (problem.min_experts > 0).any(),
        Capability.LOAD_BOUNDS: problem.has_load_bounds,
        Capability.ELIGIBILITY: problem.eligible is not None,
        Capability.LOAD_PENALTY: problem.load_penalty is not None,
        Capability.BUDGETS: bool(problem.budgets),
        Capability.LAYERS: problem.layers is not None,
    }
    return frozenset(capability for capability, needed in needs.items() if needed)
