"""What layers leave to each client: how many experts of each layer it can take, and whether layers interact."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedmoe_sched._arrays import IntArray

if TYPE_CHECKING:
    from fedmoe_sched.expert_layers import ExpertLayers
    from fedmoe_sched.problem import AssignmentProblem

__all__ = ["LayerBounds", "layer_bounds", "layers_interact", "layers_of", "open_layers"]


class LayerBounds(NamedTuple):
    """Fewest and most experts of some clients: of each layer, shape (clients, G), and of all, shape (clients,).

    Every number within the bounds of a layer occurs in some choice that keeps all bounds of the client.
    """

    low: IntArray
    high: IntArray
    least: IntArray
    most: IntArray


def layers_of(problem: AssignmentProblem) -> ExpertLayers:
    """Return the layers of a problem that has some."""
    if problem.layers is None:
        msg = "the problem has no layers"
        raise ValueError(msg)
    return problem.layers


def open_layers(problem: AssignmentProblem, block: slice) -> tuple[IntArray, IntArray]:
    """Return ``layer_min``, and ``layer_max`` or the number of eligible experts if that is less.

    Returns
    -------
    low, high : ndarray, each of shape (clients, G), int64
    """
    layers = layers_of(problem)
    low, high = layers.bounds_of(block, block.stop - block.start)
    if problem.eligible is None:
        return low, np.minimum(high, [len(experts) for experts in layers.members])
    return low, np.minimum(high, layers.count(problem.eligible[block]))


def layer_bounds(problem: AssignmentProblem, block: slice) -> LayerBounds:
    """Tighten the bounds of some clients until none can be missed by the others.

    A layer gets at least what the other layers cannot take of ``min_experts``, and at most what their minima leave
    of the capacity. Bounds of clients that are `AssignmentProblem.overstretched` may cross.
    """
    low, high = open_layers(problem, block)
    fewest, room = low.sum(axis=1), high.sum(axis=1)
    least = np.maximum(problem.min_experts[block], fewest)
    most = np.minimum(problem.capacity[block], room)
    return LayerBounds(
        np.maximum(low, high - (room - least)[:, None]),
        np.minimum(high, low + (most - fewest)[:, None]),
        least,
        most,
    )


def layers_interact(problem: AssignmentProblem) -> bool:
    """Whether ``capacity`` or ``min_experts`` of some client says more than its layers do one by one.

    Where it does not, the problem is one independent problem per layer.
    """
    for block in problem.blocks():
        low, high, least, most = layer_bounds(problem, block)
        if (low.sum(axis=1) < least).any() or (high.sum(axis=1) > most).any():
            return True
    return False
