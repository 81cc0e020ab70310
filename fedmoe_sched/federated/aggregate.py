"""Expert-wise aggregation of client updates; knows names and arrays, neither torch nor the training loop.

Shared parts are averaged over clients by their samples (FedAvg: McMahan et al. 2017, arXiv 1602.05629); expert j
is averaged over the clients that trained it, by the samples that their routers sent to it. Parts that nobody
trained stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Aggregation",
    "Rejection",
    "Update",
    "aggregate",
    "as_floats",
    "expert_of",
    "name_within",
    "split_state",
]

_EXPERT = re.compile(r"experts\.(\d+)\.")


def expert_of(name: str) -> int | None:
    """Return the expert that a parameter belongs to, None for shared parts.

    >>> expert_of("experts.12.0.weight"), expert_of("gate.weight")
    (12, None)
    """
    found = _EXPERT.match(name)
    return int(found[1]) if found else None


def name_within(name: str) -> str:
    """Return the name of an expert's parameter within the expert.

    >>> name_within("experts.12.0.weight")
    '0.weight'
    """
    return name.split(".", 2)[2]


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    """Split parameters by name.

    Parameters
    ----------
    state : mapping of str to array

    Returns
    -------
    shared : dict
        Parameters of no expert.
    experts : dict of int to dict
        Parameters of every expert, under their full names.
    """
    shared: dict[str, Any] = {}
    experts: dict[int, dict[str, Any]] = {}
    for name, value in state.items():
        expert = expert_of(name)
        if expert is None:
            shared[name] = value
        else:
            experts.setdefault(expert, {})[name] = value
    return shared, experts


@dataclass(frozen=True)
class Update:
    """What one client sends back after local training.

    Parameters
    ----------
    client : hashable
        Its name; names of one round are distinct.
    parameters : mapping of str to array
        New values of what it trained: its experts, and the shared parts if it trained them. NumPy arrays or torch
        tensors.
    samples : float
        Samples that it trained on: the weight of its shared parts.
    expert_samples : mapping of int to float
        Samples that its router sent to each assigned expert: the weight of that expert.
    signals : mapping of str to array_like
        What else it tells, for the policy and the method.
    """

    client: Hashable
    parameters: Mapping[str, Any]
    samples: float
    expert_samples: Mapping[int, float]
    signals: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejection:
    """An update that was not used, and why."""

    client: Hashable
    reason: str

    def __str__(self) -> str:
        return f"{self.client}: {self.reason}"


@dataclass(frozen=True)
class Aggregation:
    """The new global state.

    Parameters
    ----------
    state : dict of str to array
        All parameters, of the kinds and shapes of the old state.
    rejected : tuple of Rejection
        Updates that were left out, in the order in which they came.
    expert_samples : dict of int to float
        Total weight of every expert that was averaged.
    """

    state: dict[str, Any]
    rejected: tuple[Rejection, ...] = ()
    expert_samples: dict[int, float] = field(default_factory=dict)


def aggregate(
    state: Mapping[str, Any],
    updates: Sequence[Update],
    *,
    assigned: Mapping[Any, Sequence[int]] | None = None,
) -> Aggregation:
    """Average the updates of a round into the global state.

    Parameters
    ----------
    state : mapping of str to array
        Global parameters; not changed. NumPy arrays or torch tensors.
    updates : sequence of Update
        In any order: the answer does not depend on it, bit for bit.
    assigned : mapping of client to experts, optional
        The schedule; an update for another expert is rejected.

    Returns
    -------
    Aggregation
        Malformed updates (not finite, of wrong shape, of an unknown parameter or unassigned expert, with negative
        weights) are rejected as a whole with a reason, the others used.
    """
    rejected: list[Rejection] = []
    valid: list[Update] = []
    seen: set[Hashable] = set()
    for update in updates:
        reason = "sent two updates" if update.client in seen else _fault(state, update, assigned)
        seen.add(update.client)
        if reason is None:
            valid.append(update)
        else:
            rejected.append(Rejection(update.client, reason))
    # Sums of floats depend on their order: make it one of names.
    valid.sort(key=lambda update: (type(update.client).__name__, repr(update.client)))
    totals: dict[int, float] = {}
    answer = {}
    for name, old in state.items():
        expert = expert_of(name)
        weights = [_weight(update, expert) if name in update.parameters else 0.0 for update in valid]
        total = math.fsum(weights)
        if expert is not None and total > 0:
            totals[expert] = total
        answer[name] = _average(name, old, valid, weights, total)
    return Aggregation(answer, tuple(rejected), totals)


def _weight(update: Update, expert: int | None) -> float:
    return float(update.samples if expert is None else update.expert_samples.get(expert, 0.0))


def _average(name: str, old: Any, updates: Sequence[Update], weights: Sequence[float], total: float) -> Any:
    if total <= 0:
        return old
    mean = np.zeros(tuple(old.shape), dtype=np.float64)
    for update, weight in zip(updates, weights, strict=True):
        if weight > 0:
            mean += (weight / total) * as_floats(update.parameters[name])
    if hasattr(old, "new_tensor"):  # a torch tensor: same type and device
        return old.new_tensor(mean)
    return mean.astype(old.dtype)


def as_floats(value: Any) -> npt.NDArray[np.float64]:
    """Return a NumPy array or torch tensor as a float64 array; not a copy if it is one already."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64)


def _fault(state: Mapping[str, Any], update: Update, assigned: Mapping[Any, Sequence[int]] | None) -> str | None:
    """Say what is wrong with an update; None if nothing."""
    experts = None if assigned is None else set(assigned.get(update.client, ()))
    return next(_faults(state, update, experts), None)


def _faults(state: Mapping[str, Any], update: Update, experts: set[int] | None) -> Iterator[str]:
    weights = {"samples": update.samples}
    weights |= {f"samples of expert {j}": weight for j, weight in update.expert_samples.items()}
    for name, weight in weights.items():
        fault = _weight_fault(name, weight)
        if fault is not None:
            yield fault
    for name, value in update.parameters.items():
        fault = _place_fault(state, update, name, experts) or _value_fault(tuple(state[name].shape), value)
        if fault is not None:
            yield f"parameter {name!r}{fault}"


def _weight_fault(name: str, value: Any) -> str | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return f"{name} = {value!r}: must be a number"
    if not math.isfinite(number) or number < 0:
        return f"{name} = {number}: must be finite and >= 0"
    return None


def _place_fault(state: Mapping[str, Any], update: Update, name: str, experts: set[int] | None) -> str | None:
    """Say why a parameter has no business in this update."""
    if name not in state:
        return ": there is none of that name"
    expert = expert_of(name)
    if expert is not None and experts is not None and expert not in experts:
        return f": expert {expert} was not assigned to this client"
    if expert is not None and expert not in update.expert_samples:
        return f": no sample count for expert {expert}"
    return None


def _value_fault(shape: tuple[int, ...], value: Any) -> str | None:
    try:
        values = as_floats(value)
    except (TypeError, ValueError) as error:
        return f": cannot be read as numbers ({error})"
    if values.shape != shape:
        return f": has shape {values.shape}, must be {shape}"
    bad = ~np.isfinite(values)
    if bad.any():
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
        return f"{list(at)} = {values[at]}: must be finite"
    return None
