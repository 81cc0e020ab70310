"""Conflicts of problems with layers: clients that cannot keep their own bounds, and cuts in words.

How many of some experts a client trains at most, or at least, follows from its nested bounds in closed form: what
the layers allow one by one, and what ``capacity``, or ``min_experts``, makes of them together.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, IntArray
from fedmoe_sched._layers import layers_of, open_layers
from fedmoe_sched._wording import ints, listed, them, verb
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import Conflict

__all__ = ["layered_cut", "overstretched_clients"]


class _Reach(NamedTuple):
    """Fewest and most of some experts that each client trains, shape (n,), and which bounds say so, shape (n,)."""

    least: IntArray
    most: IntArray
    by_layer_min: BoolArray
    by_layer_max: BoolArray


def overstretched_clients(problem: AssignmentProblem) -> Conflict:
    """Name the clients that must take more than they can, in all or of one layer."""
    clients = np.flatnonzero(problem.demands > problem.slots)
    if len(clients):
        required, available = int(problem.demands[clients].sum()), int(problem.slots[clients].sum())
        forced = bool((problem.demands > problem.min_experts)[clients].any())
        message = (
            f"{listed('client', problem.client_labels, clients)} must take {required} places "
            f"({'layer_min' if forced else 'min_experts'}), only {available} are open to {them(clients)}"
        )
        return Conflict("clients overflow", ints(clients), (), required, available, message)
    return _short_layer(problem)


def _short_layer(problem: AssignmentProblem) -> Conflict:
    """Name a layer of which some clients must train more experts than are eligible."""
    layers = layers_of(problem)
    low = np.empty((problem.n_clients, layers.n_layers), dtype=np.int64)
    high = np.empty_like(low)
    for block in problem.blocks():
        low[block], high[block] = open_layers(problem, block)
    layer = int(np.argmax((low > high).any(axis=0)))
    clients = np.flatnonzero(low[:, layer] > high[:, layer])
    required, available = int(low[clients, layer].sum()), int(high[clients, layer].sum())
    message = (
        f"{listed('client', problem.client_labels, clients)} must take {required} places in layer {layer} "
        f"(layer_min), only {available} are open to {them(clients)}"
    )
    return Conflict("clients overflow", ints(clients), (), required, available, message)


def layered_cut(problem: AssignmentProblem, experts: IntArray, *, overfull: bool) -> Conflict:
    """Put a cut into words: its experts, the clients at it, and the bounds that exclude one another.

    Parameters
    ----------
    problem : AssignmentProblem
    experts : ndarray of int
        That must have more clients than they may (`overfull`), or than can come.
    overfull : bool
    """
    reach = _reach(problem, experts)
    where = f"{listed('expert', problem.expert_labels, experts)} of {_layer_names(problem, experts)}"
    if overfull:
        clients = np.flatnonzero(reach.least > 0)
        required = int(reach.least.sum())
        available = int(np.minimum(problem.load_max[experts], problem.n_clients).sum())
        bounds = _bounds("min_experts", "layer_min", reach.by_layer_min[clients])
        message = (
            f"{listed('client', problem.client_labels, clients)} must take {required} places at {where} "
            f"({bounds}), only {available} are open to {them(clients)} (load_max)"
        )
        return Conflict("clients overflow", ints(clients), ints(experts), required, available, message)
    clients = np.flatnonzero(reach.most > 0)
    required, available = int(problem.load_min[experts].sum()), int(reach.most.sum())
    bounds = _bounds("capacity", "layer_max", reach.by_layer_max[clients])
    message = (
        f"{where} {verb(experts, 'need')} {required} clients (load_min), only {available} eligible slots "
        f"({bounds}) reach {them(experts)}"
    )
    return Conflict("experts starve", ints(clients), ints(experts), required, available, message)


def _bounds(total: str, layered: str, by_layer: BoolArray) -> str:
    """Name the bounds at work: those of the layers, those of all experts, or both."""
    names = ([layered] if by_layer.any() else []) + ([total] if not by_layer.all() else [])
    return ", ".join(names) or total


def _layer_names(problem: AssignmentProblem, experts: IntArray) -> str:
    return listed("layer", None, np.unique(layers_of(problem).layer_of[experts]))


def _reach(problem: AssignmentProblem, experts: IntArray) -> _Reach:
    layers = layers_of(problem)
    inside = np.zeros(problem.n_experts, dtype=np.bool_)
    inside[experts] = True
    counts = np.empty((2, problem.n_clients), dtype=np.int64)
    by_layer = np.empty((2, problem.n_clients), dtype=np.bool_)
    for block in problem.blocks():
        low, high = open_layers(problem, block)
        open_ = np.ones((len(low), problem.n_experts), dtype=np.bool_)
        if problem.eligible is not None:
            open_ = problem.eligible[block]
        within, beside = layers.count(open_ & inside), layers.count(open_ & ~inside)
        forced = np.maximum(0, low - beside).sum(axis=1)
        beyond = problem.min_experts[block] - np.minimum(high, beside).sum(axis=1)
        room = np.minimum(high, within).sum(axis=1)
        left = problem.capacity[block] - np.maximum(0, low - within).sum(axis=1)
        counts[:, block] = np.maximum(forced, beyond), np.minimum(room, left)
        by_layer[:, block] = forced >= beyond, room <= left
    counts = np.maximum(counts, 0)  # less is said of clients that cannot keep their own bounds
    return _Reach(counts[0], counts[1], by_layer[0], by_layer[1])
