"""The options of a scheduler, checked at once, and their way into JSON values and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar, overload

import numpy as np

from fedmoe_sched._arrays import FloatArray, as_array, as_counts, as_vector
from fedmoe_sched._clients import CapacityRules
from fedmoe_sched._scheduler_layers import check_layers
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.registry import solver_class
from fedmoe_sched.scores.capacity import CapacityProfile, ExpertCost
from fedmoe_sched.scores.fairness import FairnessOptions
from fedmoe_sched.scores.fitness import FitnessOptions
from fedmoe_sched.scores.selection import SelectionOptions
from fedmoe_sched.scores.usage import UsageOptions
from fedmoe_sched.solver import Limits, Solver

__all__ = ["SchedulerOptions", "cost_option", "count_option", "ranged_option", "real_option"]

OptionsT = TypeVar("OptionsT")

_TO_SCHEDULE = (
    "fitness_weight",
    "usage_weight",
    "balance",
    "load_min",
    "load_max",
    "fill",
    "solver",
    "time_limit",
    "certify",
    "switching_cost",
    "soft",
)  # layers go there too, by the clients of a round


@dataclass(frozen=True, eq=False)
class SchedulerOptions:
    """What the constructor of `fedmoe_sched.Scheduler` takes, without the experts; documented there.

    Raises
    ------
    InputError
        A wrong option; the message names it.
    """

    n_experts: int
    default_capacity: Any
    expert_cost: Any
    default_profile: Any
    deadline: float | None
    correction_rate: float
    fitness: Any
    usage: Any
    seed: int
    fitness_weight: float
    usage_weight: float
    balance: float | None
    load_min: Any
    load_max: Any
    fill: bool
    solver: Any
    time_limit: float | None
    certify: bool
    selection: Any = None
    switching_cost: Any = 0.0
    fairness: Any = None
    layers: Any = None
    soft: bool = False
    max_staleness: int | None = None

    def __post_init__(self) -> None:
        m = self.n_experts
        plain: dict[str, Any] = {
            "default_capacity": int(as_counts("default_capacity", self.default_capacity, 1, "one number")[0]),
            "expert_cost": _made("expert_cost", ExpertCost, self.expert_cost),
            "default_profile": _made("default_profile", CapacityProfile, self.default_profile),
            "fitness": _made("fitness", FitnessOptions, self.fitness) or FitnessOptions(),
            "usage": _made("usage", UsageOptions, self.usage) or UsageOptions(),
            "selection": _made("selection", SelectionOptions, self.selection),
            "switching_cost": cost_option("switching_cost", self.switching_cost, m),
            "fairness": _made("fairness", FairnessOptions, self.fairness),
            "layers": _made("layers", ExpertLayers, self.layers),
            "fill": bool(self.fill),
            "certify": bool(self.certify),
            "soft": bool(self.soft),
            "solver": _solver_from_plain(self.solver) if isinstance(self.solver, Mapping) else self.solver,
        }
        if self.max_staleness is not None:
            plain["max_staleness"] = count_option("max_staleness", self.max_staleness, 0)
        for name in ("load_min", "load_max"):
            bound = getattr(self, name)
            if bound is not None:
                plain[name] = as_counts(name, bound, m, "one per expert")
        for name in ("fitness_weight", "usage_weight", "balance", "deadline", "correction_rate", "time_limit"):
            optional = name in ("balance", "deadline", "time_limit")
            plain[name] = real_option(name, getattr(self, name), optional=optional)
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        self._refuse_bad_values()

    def _refuse_bad_values(self) -> None:
        """Refuse now what `plan` would refuse only in the first round."""
        if self.layers is not None:
            check_layers(self.layers, self.n_experts, self.default_capacity)
        Limits(time=self.time_limit, seed=self.seed)
        if isinstance(self.solver, str) and self.solver != "auto":
            solver_class(self.solver)
        if not 0 < self.correction_rate <= 1:
            msg = f"correction_rate = {self.correction_rate}: must be > 0 and <= 1"
            raise InputError(msg)
        if self.balance is not None and self.balance < 0:
            msg = f"balance = {self.balance}: must be >= 0, or None"
            raise InputError(msg)
        if self.fairness is not None and not self.fitness_weight > 0:
            msg = f"fitness_weight = {self.fitness_weight}: must be > 0 with fairness, whose gains are in fitness"
            raise InputError(msg)
        if self.deadline is not None and not self.deadline > 0:
            msg = f"deadline = {self.deadline}: must be > 0 seconds, or None"
            raise InputError(msg)
        if self.expert_cost is not None:
            self.expert_cost.bytes_of(self.n_experts)  # refuses sizes of another number of experts
        elif self.default_profile is not None or self.deadline is not None:
            name = "deadline" if self.default_profile is None else "default_profile"
            msg = f"{name}: needs expert_cost, to become a number of experts"
            raise InputError(msg)

    @property
    def rules(self) -> CapacityRules:
        """What turns profiles into capacities."""
        return CapacityRules(self.default_capacity, self.expert_cost, self.default_profile, self.deadline)

    @property
    def expert_compute(self) -> Any:
        """Relative compute of each expert, shape (m,), or None where nothing is known."""
        return None if self.expert_cost is None else self.expert_cost.compute_of(self.n_experts)

    def schedule_arguments(self) -> dict[str, Any]:
        """Return those that go to `fedmoe_sched.schedule`."""
        return {name: getattr(self, name) for name in _TO_SCHEDULE}

    def to_plain(self) -> dict[str, Any]:
        """Return all as JSON values that the constructor takes.

        Raises
        ------
        InputError
            The solver is an instance that cannot be made again from plain values.
        """
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        del plain["n_experts"]
        for name in ("load_min", "load_max", "switching_cost"):
            plain[name] = plain[name].tolist() if isinstance(plain[name], np.ndarray) else plain[name]
        for name in ("expert_cost", "default_profile", "fitness", "usage", "selection", "fairness"):
            plain[name] = None if plain[name] is None else asdict(plain[name])
        if self.layers is not None:
            names = ("layer_of", "layer_min", "layer_max")
            plain["layers"] = {name: getattr(self.layers, name).tolist() for name in names}
        plain["solver"] = _solver_to_plain(self.solver)
        return plain


@overload
def real_option(name: str, value: Any, *, optional: Literal[False] = False) -> float: ...
@overload
def real_option(name: str, value: Any, *, optional: bool) -> float | None: ...
def real_option(name: str, value: Any, *, optional: bool = False) -> float | None:
    """Read an option that is a finite number, or None where it is `optional`.

    Raises
    ------
    InputError
        It is something else.
    """
    if optional and value is None:
        return None
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not math.isfinite(value):
        msg = f"{name} = {value!r}: must be a finite number" + (", or None" if optional else "")
        raise InputError(msg)
    return float(value)


def count_option(name: str, value: Any, least: int) -> int:
    """Read an option that is one whole number, at least `least`.

    Raises
    ------
    InputError
        It is something else.
    """
    count = int(as_counts(name, value, 1, "one number")[0])
    if count < least:
        msg = f"{name} = {count}: must be >= {least}"
        raise InputError(msg)
    return count


def cost_option(name: str, value: Any, n_experts: int) -> float | FloatArray:
    """Read an option that is a number >= 0, or one per expert.

    Raises
    ------
    InputError
        It is something else.
    """
    if np.ndim(as_array(name, value)) == 0:
        return ranged_option(name, value, 0)
    return as_vector(name, value, n_experts, "one per expert", least=0).copy()


def ranged_option(name: str, value: Any, least: float, most: float = np.inf) -> float:
    """Read an option that is a number within limits.

    Raises
    ------
    InputError
        It is something else.
    """
    number = real_option(name, value)
    if not least <= number <= most:
        rule = f">= {least:g}" if most == np.inf else f"from {least:g} to {most:g}"
        msg = f"{name} = {value!r}: must be {rule}"
        raise InputError(msg)
    return number


def _made(name: str, cls: type[OptionsT], value: OptionsT | Mapping[str, Any] | None) -> OptionsT | None:
    """Take options as they are, or make them of a mapping of their fields."""
    if value is None or isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        msg = f"{name} = {value!r}: must be a {cls.__name__} or a mapping of its fields"
        raise InputError(msg)
    try:
        return cls(**value)
    except TypeError as error:
        msg = f"{name}: {error}"
        raise InputError(msg) from error


def _solver_to_plain(solver: str | Solver[Any]) -> Any:
    """Return a solver as JSON values: its name, with the options of an instance."""
    if isinstance(solver, str):
        return solver
    options = {key: value for key, value in vars(solver).items() if not key.startswith("_")}
    try:
        known = solver_class(solver.name) is type(solver)
        json.dumps(options)
    except (InputError, TypeError, ValueError):
        known = False
    if not known:
        msg = f"solver = {solver!r}: cannot be stored; use a registered backend with plain options, or its name"
        raise InputError(msg)
    return {"name": solver.name, "options": options}


def _solver_from_plain(plain: Mapping[str, Any]) -> Solver[Any]:
    try:
        return solver_class(plain["name"])(**plain["options"])
    except (KeyError, TypeError) as error:
        msg = f"solver = {plain!r}: must be a name, a Solver, or its name and options ({error})"
        raise InputError(msg) from error
