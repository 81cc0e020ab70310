"""FedMoE-DA: personal experts, each averaged with those whose gate vectors are most like its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray, as_counts, row_blocks
from fedmoe_sched._scheduler_options import real_option
from fedmoe_sched.errors import InputError
from fedmoe_sched.policies.base import RulePolicy
from fedmoe_sched.policies.client_rule import CLIENT_BY_CLIENT

__all__ = ["FedMoeDaPolicy", "Neighbours", "nearest_pairs"]


class Neighbours(NamedTuple):
    """With whom each of N pairs (client, expert) is averaged; columns from the nearest on, itself the first.

    Parameters
    ----------
    places : ndarray, shape (N, P + 1), int64
        Numbers of pairs; -1 where there are fewer.
    weights : ndarray, shape (N, P + 1), float64
        Rows sum to 1; 0 where there are fewer.
    """

    places: IntArray
    weights: FloatArray


def nearest_pairs(
    vectors: FloatArray, count: int, temperature: float, kinds: npt.ArrayLike | None = None
) -> Neighbours:
    """Find the nearest pairs of each pair by the cosine of their gate vectors, and the weights of their average.

    The weights are the softmax of cosine over temperature, masked to the pair itself (cosine 1) and its `count`
    nearest [S]. A vector of zeros has cosine 0 to all others [I]; ties go to the lower number.

    Parameters
    ----------
    vectors : ndarray, shape (N, d)
    count : int
        P >= 0.
    temperature : float
        tau > 0.
    kinds : array_like of int, shape (N,), optional
        Only pairs of one kind can be neighbours; all by default.

    Returns
    -------
    Neighbours

    Examples
    --------
    >>> found = nearest_pairs(np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]), count=1, temperature=1.0)
    >>> found.places.tolist(), found.weights[0].round(3).tolist()  # e / (e + e^0.6), with cosine 3 / 5
    ([[0, 2], [1, 2], [2, 1]], [0.599, 0.401])
    """
    size = len(vectors)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.where(norms > 0, norms, 1.0)
    kind = np.zeros(size, dtype=np.int64) if kinds is None else np.asarray(kinds)
    width = min(count + 1, size)
    places, weights = np.zeros((size, width), dtype=np.int64), np.zeros((size, width))
    for block in row_blocks((size, size)):
        cosine = np.clip(units[block] @ units.T, -1.0, 1.0)
        cosine[kind[block][:, None] != kind] = -np.inf
        rows = np.arange(len(cosine))
        cosine[rows, rows + block.start] = np.inf  # itself comes first
        order = np.argsort(-cosine, axis=1, kind="stable")[:, :width]
        near = np.minimum(np.take_along_axis(cosine, order, axis=1), 1.0)
        mass = np.exp((near - 1.0) / temperature)
        places[block] = np.where(np.isfinite(near), order, -1)
        weights[block] = mass / mass.sum(axis=1, keepdims=True)
    return Neighbours(places, weights)


class FedMoeDaPolicy(RulePolicy):
    """Every client has experts of its own; what is chosen is with whose experts each of them is averaged.

    After each round every expert that a client has trained becomes the weighted average of itself and of the P
    experts, of all pairs (client, expert), whose gate vectors have the largest cosine to its own; `nearest_pairs`
    is the rule. Who is nearest is found anew every I rounds, in between peers exchange experts by themselves.

    Source: FedMoE-DA (arXiv 2411.02115): clients train all their experts; aggregation neighbours by cosine
    similarity of the gate vectors of all (client, expert) pairs, itself and the P nearest, masked softmax at
    temperature tau; refreshed every I rounds, peer to peer in between [S]. P, tau and I of the paper are not
    known. Ours [I]:

    - A client trains the experts of its own that it is fittest for, as many as it has room for: with a capacity of
      m these are all of them. The paper has no capacities.
    - Only pairs that were trained take part. Neighbours may be experts of any number, of the client itself too,
      as long as they are of the same size.
    - The gate vector of an expert is its row of the gate's weights, without the bias.
    - Neighbours are found first after one round (before it, all gates are alike), then every I rounds.

    What a training loop has to do for it is the method `fedmoe_sched.federated.methods.fedmoe_da`.

    Parameters
    ----------
    experts : int or iterable of hashable
        m of each client.
    neighbours : int, default 3
        P >= 0.
    temperature : float, default 0.5
        tau > 0; small ones leave every expert to itself.
    refresh : int, default 5
        I >= 1, in rounds.
    **options
        Those of `fedmoe_sched.Scheduler`; ``solver="greedy"``, ``balance=None``, no `load_min` or `load_max`,
        ``fill=True``, ``usage_weight=0`` and ``fitness_weight=1`` are fixed.

    Raises
    ------
    InputError
        A wrong option, or one that the policy fixes otherwise.
    """

    name: ClassVar[str] = "fedmoe-da"
    method: ClassVar[str] = "fedmoe-da"
    fixed: ClassVar[Mapping[str, Any]] = CLIENT_BY_CLIENT

    def __init__(
        self,
        experts: int | Iterable[Hashable],
        *,
        neighbours: int = 3,
        temperature: float = 0.5,
        refresh: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(experts, **options)
        self.neighbours = int(as_counts("neighbours", neighbours, 1, "one number")[0])
        self.refresh = int(as_counts("refresh", refresh, 1, "one number")[0])
        self.temperature = real_option("temperature", temperature)
        for name, value in (("temperature", self.temperature), ("refresh", self.refresh)):
            if value <= 0:
                msg = f"{name} = {value}: must be > 0"
                raise InputError(msg)

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        return super().options() | {name: getattr(self, name) for name in ("neighbours", "temperature", "refresh")}

    @property
    def is_refresh_due(self) -> bool:
        """Whether neighbours are to be found anew before the next round: after round 1, I + 1, 2 I + 1, ..."""
        return self.round >= 1 and (self.round - 1) % self.refresh == 0

    def find_neighbours(self, vectors: FloatArray, kinds: npt.ArrayLike) -> Neighbours:
        """Return `nearest_pairs` with the policy's options."""
        return nearest_pairs(vectors, self.neighbours, self.temperature, kinds)
