"""Client by client within layers: what the fewest of each layer force, and what is left to choose from."""

from __future__ import annotations

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._layers import layer_bounds, layers_of
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["LayerWalk", "narrow_to_layers"]


def narrow_to_layers(
    problem: AssignmentProblem, block: slice, scores: FloatArray
) -> tuple[BoolArray, IntArray, IntArray]:
    """Take the best experts of each layer up to its minimum, and leave those beyond what it has room for aside.

    Bounds that cannot be kept are kept as far as they can: capacity and ``layer_max`` before the minima.

    Parameters
    ----------
    problem : AssignmentProblem
        With layers.
    block : slice
    scores : ndarray, shape (clients, m), float64
        What experts are ranked by; -inf where not eligible. In and out: -inf for all that is no longer to be
        chosen from. Of what is left, any number of the largest ones within the bounds below keeps all bounds.

    Returns
    -------
    forced : ndarray, shape (clients, m), bool
    least, most : ndarray, shape (clients,), int64
        How many of the others must and may be taken.
    """
    low, high, least, most = layer_bounds(problem, block)
    high = np.maximum(np.minimum(high, most[:, None]), 0)
    low = np.clip(low, 0, high)
    # Minima beyond the capacity: the last layers get less.
    low -= np.clip(np.cumsum(low, axis=1) - most[:, None], 0, low)
    forced = np.zeros(scores.shape, dtype=np.bool_)
    for layer, experts in enumerate(layers_of(problem).members):
        part = scores[:, experts]
        order = np.argsort(-part, axis=1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.arange(len(experts))[None, :], axis=1)
        must = rank < low[:, layer, None]
        forced[:, experts] = must
        part[must | (rank >= high[:, layer, None])] = -np.inf
        scores[:, experts] = part
    taken = low.sum(axis=1)
    return forced, np.maximum(least - taken, 0), np.minimum(most - taken, np.isfinite(scores).sum(axis=1))


class LayerWalk:
    """What layers leave of every client while pairs are taken one by one; plain lists, as in `greedy-global`.

    Parameters
    ----------
    problem : AssignmentProblem
        With layers.
    """

    def __init__(self, problem: AssignmentProblem) -> None:
        layers = layers_of(problem)
        low, high = layers.bounds_of(slice(0, problem.n_clients), problem.n_clients)
        self._layer_of: list[int] = layers.layer_of.tolist()
        self._room: list[list[int]] = high.tolist()
        self._misses: list[list[int]] = low.tolist()
        self._min_experts: list[int] = np.minimum(problem.min_experts, problem.n_experts + 1).tolist()
        self._forced: list[int] = low.sum(axis=1).tolist()

    def allows(self, client: int, expert: int, slots: int) -> bool:
        """Whether a client with so many slots left can take an expert and still get the fewest of other layers."""
        layer = self._layer_of[expert]
        return self._room[client][layer] > 0 and (self._misses[client][layer] > 0 or slots > self._forced[client])

    def missing_after(self, client: int, expert: int) -> int:
        """Return how many experts a client must still take once it has taken this one."""
        forced = self._forced[client] - (self._misses[client][self._layer_of[expert]] > 0)
        return max(self._min_experts[client] - 1, forced, 0)

    def take(self, client: int, expert: int) -> None:
        """Count an expert that a client takes."""
        layer = self._layer_of[expert]
        self._room[client][layer] -= 1
        self._min_experts[client] -= 1
        if self._misses[client][layer] > 0:
            self._misses[client][layer] -= 1
            self._forced[client] -= 1
