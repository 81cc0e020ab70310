"""What a round problem is made of, checked part by part; every error names argument, position and value."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from fedmoe_sched._arrays import IntArray, as_counts
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.resource_budget import ResourceBudget

__all__ = [
    "checked_budgets",
    "checked_labels",
    "checked_layers",
    "checked_part",
    "checked_penalty",
    "part_of",
    "refuse_crossed",
    "span",
]

Index = slice | IntArray


def checked_part(name: str, numbers: Any, size: int) -> Index:
    """Read the numbers of some clients or experts; neighbours as a slice, which makes a view and no copy.

    Raises
    ------
    InputError
        A number is out of range, or occurs twice.
    """
    if numbers is None:
        return slice(0, size)
    part = as_counts(name, numbers, np.size(numbers), "a list of numbers")
    if len(part) and int(part.max()) >= size:
        at = int(np.argmax(part))
        msg = f"{name}[{at}] = {part[at]}: must be below {size}"
        raise InputError(msg)
    first = np.unique(part, return_index=True)[1]
    if len(first) < len(part):
        at = int(np.setdiff1d(np.arange(len(part)), first)[0])
        msg = f"{name}[{at}] = {part[at]}: occurs twice"
        raise InputError(msg)
    if len(part) and (np.diff(part) == 1).all():
        return slice(int(part[0]), int(part[-1]) + 1)
    return part


def part_of(matrix: Any, clients: Index, experts: Index) -> Any:
    """Return some rows and columns of a matrix, as a view where both are slices."""
    if isinstance(clients, slice) or isinstance(experts, slice):
        return matrix[clients, experts]
    return matrix[np.ix_(clients, experts)]


def span(bounds: IntArray) -> str:
    """Return the range of bounds in words."""
    low, high = int(bounds.min()), int(bounds.max())
    return str(low) if low == high else f"[{low}-{high}]"


def checked_penalty(penalty: Any, n_experts: int) -> LoadPenalty | None:
    """Refuse what is no penalty, or one of other experts."""
    if penalty is None:
        return None
    if not isinstance(penalty, LoadPenalty):
        msg = f"load_penalty: is a {type(penalty).__name__}, must be a LoadPenalty or None"
        raise InputError(msg)
    if penalty.n_experts != n_experts:
        msg = f"load_penalty: is of {penalty.n_experts} experts, must be of {n_experts}"
        raise InputError(msg)
    return penalty


def checked_budgets(budgets: Any, shape: tuple[int, int]) -> tuple[ResourceBudget, ...]:
    """Refuse what are no budgets, those of other experts or clients, and names that occur twice."""
    if isinstance(budgets, ResourceBudget):
        budgets = (budgets,)
    checked: dict[str, ResourceBudget] = {}
    for position, resource in enumerate(budgets):
        if not isinstance(resource, ResourceBudget):
            msg = f"budgets[{position}]: is a {type(resource).__name__}, must be a ResourceBudget"
            raise InputError(msg)
        if resource.shape != shape:
            (n, m), (clients, experts) = shape, resource.shape
            msg = f"budgets[{position}]: is of {clients} clients x {experts} experts, must be of {n} x {m}"
            raise InputError(msg)
        if resource.name in checked:
            msg = f"budgets[{position}]: there is another resource called {resource.name!r}"
            raise InputError(msg)
        checked[resource.name] = resource
    return tuple(checked.values())


def checked_layers(layers: Any, shape: tuple[int, int]) -> ExpertLayers | None:
    """Refuse what are no layers, or those of other experts or clients."""
    if layers is None:
        return None
    if not isinstance(layers, ExpertLayers):
        msg = f"layers: is a {type(layers).__name__}, must be an ExpertLayers or None"
        raise InputError(msg)
    if layers.n_experts != shape[1]:
        msg = f"layers: is of {layers.n_experts} experts, must be of {shape[1]}"
        raise InputError(msg)
    if layers.n_clients not in {None, shape[0]}:
        msg = f"layers: is of {layers.n_clients} clients, must be of {shape[0]}"
        raise InputError(msg)
    return layers


def checked_labels(
    name: str, given: Sequence[Hashable] | None, default: Sequence[Hashable] | None, size: int
) -> tuple[Hashable, ...] | None:
    """Refuse labels of another number, or that occur twice."""
    if given is None and default is None:
        return None
    labels = tuple(given if given is not None else default or ())
    if len(labels) != size:
        msg = f"{name}: has {len(labels)} labels, must be {size}"
        raise InputError(msg)
    first: dict[Hashable, int] = {}
    for position, label in enumerate(labels):
        if label in first:
            msg = f"{name}[{position}] = {label!r}: already the label at position {first[label]}"
            raise InputError(msg)
        first[label] = position
    return labels


def refuse_crossed(low_name: str, low: IntArray, high_name: str, high: IntArray) -> None:
    """Refuse lower bounds above upper ones."""
    crossed = low > high
    if crossed.any():
        at = int(np.argmax(crossed))
        msg = f"{low_name}[{at}] = {low[at]}: must be <= {high_name}[{at}] = {high[at]}"
        raise InputError(msg)
