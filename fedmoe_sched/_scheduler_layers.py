"""Layers of experts inside a scheduler: bounds of single clients, and who can train what its layers demand."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Final

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, as_counts
from fedmoe_sched._variables import StateVariable, Variables
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers

__all__ = ["LAYER_VARIABLES", "able_clients", "check_layers", "own_bounds", "round_layers"]

_SHARED = -1.0  # a bound that a client has in common with all others

#: Bounds that clients have of their own; without columns until the first client has some.
LAYER_VARIABLES: Final = {name: StateVariable("vector", start=_SHARED) for name in ("layer_min", "layer_max")}


def check_layers(layers: ExpertLayers, n_experts: int, default_capacity: int) -> None:
    """Refuse layers that a scheduler cannot have.

    Raises
    ------
    InputError
        They are of another number of experts, have bounds by client, which a scheduler knows by name, or demand
        more than a client can train of which nothing is known.
    """
    if layers.n_experts != n_experts:
        msg = f"layers: is of {layers.n_experts} experts, must be of {n_experts}"
        raise InputError(msg)
    if layers.n_clients is not None:
        msg = (
            f"layers: has bounds of {layers.n_clients} clients by number; give those that all have in common, and "
            "those of single clients by add_client(layer_min=..., layer_max=...)"
        )
        raise InputError(msg)
    demand = int(layers.layer_min.sum())
    if 0 < default_capacity < demand:
        msg = f"default_capacity = {default_capacity}: must be 0, or at least {demand}, which layers demand"
        raise InputError(msg)


def own_bounds(
    client: Hashable, row: int, given: dict[str, Any], layers: ExpertLayers | None, variables: Variables
) -> dict[str, FloatArray]:
    """Check the bounds that a client has of its own, and return its rows of the variables; nothing is stored.

    Parameters
    ----------
    client : hashable
        For messages.
    row : int
        Of the client; -1 for a new one.
    given : dict of str to array_like of int, shape (G,), int, or None
        ``layer_min`` and ``layer_max``; None leaves what is known.
    layers : ExpertLayers or None
    variables : Variables

    Raises
    ------
    InputError
        The scheduler has no layers, or a bound is wrong.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return {}
    if layers is None:
        msg = f"client {client!r}: {next(iter(asked))}: the scheduler needs layers to use it"
        raise InputError(msg)
    rows: dict[str, FloatArray] = {
        name: as_counts(f"client {client!r}: {name}", value, layers.n_layers, "one per layer").astype(np.float64)
        for name, value in asked.items()
    }
    known = _bounds(layers, variables, np.array([row], dtype=np.int64))
    low, high = (rows.get(name, bounds[0]) for name, bounds in zip(LAYER_VARIABLES, known, strict=True))
    crossed = low > high
    if crossed.any():
        at = int(np.argmax(crossed))
        msg = f"client {client!r}: layer_min[{at}] = {low[at]:g}: must be <= layer_max[{at}] = {high[at]:g}"
        raise InputError(msg)
    return rows


def round_layers(
    layers: ExpertLayers, variables: Variables, rows: IntArray, busy: BoolArray | None = None
) -> ExpertLayers:
    """Return the layers of the clients of a round.

    Parameters
    ----------
    layers : ExpertLayers
        With the bounds that all have in common.
    variables : Variables
    rows : ndarray, shape (k,)
        Of the clients; -1 for new ones.
    busy : ndarray, shape (k,), bool, optional
        Who takes part: no layer demands anything of the others.
    """
    low, high = _bounds(layers, variables, rows)
    busy = np.ones(len(rows), dtype=np.bool_) if busy is None else busy
    if busy.all() and (low == layers.layer_min).all() and (high == layers.layer_max).all():
        return layers
    return ExpertLayers(layers.layer_of, np.where(busy[:, None], low, 0), high)


def _bounds(layers: ExpertLayers, variables: Variables, rows: IntArray) -> tuple[IntArray, IntArray]:
    """Return fewest and most experts of each layer, the client's own where it has some; (k, G) int64 each."""
    found = []
    for name in LAYER_VARIABLES:
        shared = np.broadcast_to(getattr(layers, name), (len(rows), layers.n_layers))
        own = variables.at(name, rows)
        found.append(np.where(own == _SHARED, shared, own).astype(np.int64) if own.size else shared)
    return found[0], found[1]


def able_clients(capacity: IntArray, eligible: BoolArray | None, layers: ExpertLayers | None = None) -> BoolArray:
    """Whether each client could train any expert, and with layers as many of each as they demand; (k,) bool."""
    able: BoolArray = capacity > 0
    if eligible is not None:
        able &= eligible.any(axis=1)
    if layers is not None:
        low, high = layers.bounds_of(slice(0, len(capacity)), len(capacity))
        sizes = [len(experts) for experts in layers.members]
        room = np.minimum(high, sizes if eligible is None else layers.count(eligible))
        able &= (room >= low).all(axis=1) & room.any(axis=1) & (low.sum(axis=1) <= capacity)
    return able
