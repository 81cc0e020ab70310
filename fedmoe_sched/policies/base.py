"""What a training loop asks of a policy, and the base of those that are a rule for ``schedule()``."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from fedmoe_sched._files import PathLike
from fedmoe_sched.errors import InputError
from fedmoe_sched.registry import solver_class
from fedmoe_sched.result import Schedule
from fedmoe_sched.rounds import RoundRecord
from fedmoe_sched.scheduler import Scheduler
from fedmoe_sched.solver import Solver

__all__ = ["Policy", "RulePolicy"]


@runtime_checkable
class Policy(Protocol):
    """All that a training loop may know of a policy; `fedmoe_sched.Scheduler` documents the methods."""

    name: ClassVar[str]
    method: ClassVar[str]

    def signals(self, when: str) -> tuple[str, ...]:
        """Return the names of what clients are asked for ``"once"``, ``"before"`` plans or ``"after"`` rounds."""

    def tell(self, client: Hashable, signals: Mapping[str, Any]) -> None:
        """Take in what a client says of itself."""

    def plan(self, available_clients: Any) -> Schedule:
        """Decide which of the available clients train which experts, and open the round."""

    def report(
        self,
        client: Hashable,
        results: Mapping[Any, tuple[float, float]] | None = None,
        *,
        seconds: float | None = None,
        failed: bool = False,
    ) -> None:
        """Take in what one client of the open round sent back."""

    def close_round(self) -> RoundRecord:
        """End the round and learn from it."""

    def save(self, path: PathLike) -> None:
        """Save the whole state to one file."""

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state as arrays and JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class RulePolicy(Scheduler):
    """A scheduler some of whose options are what makes it the policy that it is.

    Parameters
    ----------
    experts : int or iterable of hashable
    **options
        Those of `fedmoe_sched.Scheduler`; one that the policy fixes may be given only as it is.

    Raises
    ------
    InputError
        An option contradicts the policy.
    """

    #: Options that cannot be changed.
    fixed: ClassVar[Mapping[str, Any]] = {}

    #: Whether only an exact backend will do, or ``"auto"``.
    needs_exact: ClassVar[bool] = False

    def __init__(self, experts: int | Iterable[Hashable], **options: Any) -> None:
        for name, value in self.fixed.items():
            if _differs(options.setdefault(name, value), value):
                msg = f"{name} = {options[name]!r}: policy {self.name!r} has {name} = {value!r}"
                raise InputError(msg)
        if self.needs_exact and not _is_exact(options.get("solver", "auto")):
            msg = f"solver = {options['solver']!r}: policy {self.name!r} needs an exact backend, or 'auto'"
            raise InputError(msg)
        super().__init__(experts, **options)


def _differs(value: Any, fixed: Any) -> bool:
    """Whether an option is not as it is fixed; arrays give no one answer to that, and are never fixed."""
    several = hasattr(value, "__len__") and not isinstance(value, str)
    return several or bool(value != fixed)


def _is_exact(solver: Any) -> bool:
    """Whether a solver is exact; what is no solver at all is refused elsewhere."""
    if isinstance(solver, Mapping):  # as options of a saved policy have an instance
        solver = solver.get("name")
    if isinstance(solver, str):
        return solver == "auto" or solver_class(solver).exact
    return solver.exact if isinstance(solver, Solver) else True
