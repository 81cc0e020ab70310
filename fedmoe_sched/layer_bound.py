"""Best choices of clients whose experts lie in layers, and the layer bounds that an assignment breaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedmoe_sched._arrays import FloatArray, IntArray
from fedmoe_sched._layers import layer_bounds, layers_of

if TYPE_CHECKING:
    from fedmoe_sched.assignment import Assignment
    from fedmoe_sched.problem import AssignmentProblem

__all__ = ["beyond_layers", "layered_choice"]


def layered_choice(
    problem: AssignmentProblem, block: slice, reduced: FloatArray
) -> tuple[float, FloatArray, IntArray, IntArray]:
    """Split the best choice of some clients into what their layers force, and what is left to choose.

    A client's bounds are nested (each layer, then all of them), so that its choices are a generalised matroid and
    the greedy choice is best (Frank and Tardos 1988, *Mathematical Programming* 42): of each layer the largest
    up to its minimum; then, of what the layers have room for, the largest of all.

    Parameters
    ----------
    problem : AssignmentProblem
        With layers; none of the clients is overstretched.
    block : slice
    reduced : ndarray, shape (clients, m), float64
        Scores less prices; -inf where not eligible.

    Returns
    -------
    forced : float
        The sum of what the minima of the layers force.
    optional : ndarray, shape (clients, m), float64
        What may be taken beside, -inf for nothing; any number of the largest ones keeps the bounds of the layers.
    least, most : ndarray, shape (clients,), int64
        How many of them must and may be taken.
    """
    low, high, fewest, most = layer_bounds(problem, block)
    forced, parts = 0.0, []
    for layer, experts in enumerate(layers_of(problem).members):
        ranked = -np.sort(-reduced[:, experts], axis=1)
        rank = np.arange(len(experts))
        must = rank < low[:, layer, None]
        forced += float(np.add.reduce(ranked, axis=None, where=must))
        ranked[must | (rank >= high[:, layer, None])] = -np.inf
        parts.append(ranked)
    taken = low.sum(axis=1)
    return forced, np.concatenate(parts, axis=1), fewest - taken, most - taken


def beyond_layers(
    problem: AssignmentProblem, assignment: Assignment, block: slice, *, upper: bool
) -> list[list[int]]:
    """List (client, layer, count, bound) where some clients have more than layer_max, or fewer than layer_min."""
    layers = layers_of(problem)
    counts = layers.count_pairs(assignment, block)
    low, high = layers.bounds_of(block, len(counts))
    bounds, bad = (high, counts > high) if upper else (low, counts < low)
    return [
        [block.start + i, layer, int(counts[i, layer]), int(bounds[i, layer])]
        for i, layer in np.argwhere(bad).tolist()
    ]
