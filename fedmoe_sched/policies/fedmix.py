"""FedMix: every client trains the experts that explain its data best."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._scheduler_options import count_option, real_option
from fedmoe_sched._variables import StateVariable
from fedmoe_sched.errors import InputError
from fedmoe_sched.policies.client_rule import ClientRule, best_pairs

__all__ = ["FedMixPolicy", "responsibilities"]


class FedMixPolicy(ClientRule):
    """Every client trains the experts of highest responsibility for its data, by the losses that it told last.

    With l_ie the mean loss of expert e on the samples of client i, its responsibility is
    ``pi_ie = exp(-l_ie) / sum_k exp(-l_ik)`` over all M experts. The client trains the eligible experts of
    ``pi_ie >= threshold``, the highest first, at most `top_k` and at most its capacity; where none reaches the
    threshold, the highest alone.

    Source: FedMix (arXiv 2107.06724), used as a baseline elsewhere with all M experts sent to every client, expert
    e averaged with weights ``n_i * pi_ie`` [S]. That pi is proportional to exp(-local loss), and that a client
    trains the experts above a threshold or its top K, is a reconstruction [I]; whether the loss is a sum or a mean
    over the samples is not known, and the mean is ours: a sum over hundreds of samples would leave one expert. The
    method ``fedmix`` (`fedmoe_sched.federated.methods.fedmix`) sends and averages accordingly. Also ours [I]:

    - By default there is no threshold, and as many experts as the capacity allows.
    - Losses are those of the client's last answer, of the experts as it received them then: nobody can tell them
      before the experts are sent. One that it has never told counts as 0, the best there is, so that it is tried.
    - Equal responsibilities, as of a client that has told nothing, are decided by lot, drawn anew each round.
    - Fitness is learned and reported, and counts for nothing.

    Parameters
    ----------
    experts : int or iterable of hashable
    top_k : int, optional
        The most experts of a client, >= 1; None is no limit but its capacity.
    threshold : float, default 0.0
        Least responsibility of an expert that is trained, 0 to 1.
    **options
        Those of `fedmoe_sched.Scheduler`; ``solver="greedy"``, ``balance=None``, no `load_min` or `load_max`,
        ``fill=True``, ``usage_weight=0`` and ``fitness_weight=1`` are fixed.

    Raises
    ------
    InputError
        A wrong option, or one that the policy fixes otherwise.

    Examples
    --------
    >>> policy = FedMixPolicy(3, default_capacity=3, threshold=0.25)
    >>> policy.tell("anna", {"expert_loss": [2.0, 0.5, 1.0]})
    >>> policy.plan(["anna"]).experts_by_client()
    {'anna': [1, 2]}
    """

    name: ClassVar[str] = "fedmix"
    method: ClassVar[str] = "fedmix"
    variables: ClassVar[Mapping[str, StateVariable]] = {"expert_loss": StateVariable("pair", told="after")}

    def __init__(
        self,
        experts: int | Iterable[Hashable],
        *,
        top_k: int | None = None,
        threshold: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(experts, **options)
        self.top_k = None if top_k is None else count_option("top_k", top_k, 1)
        self.threshold = real_option("threshold", threshold)
        if not 0 <= self.threshold <= 1:
            msg = f"threshold = {threshold}: must be >= 0 and <= 1"
            raise InputError(msg)

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        return super().options() | {"top_k": self.top_k, "threshold": self.threshold}

    def choose(
        self,
        fitness: FloatArray,
        capacity: IntArray,
        eligible: BoolArray,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
    ) -> tuple[FloatArray, BoolArray]:
        """Choose by the responsibilities."""
        shares = responsibilities(self.variable("expert_loss", clients))
        enough = np.count_nonzero(eligible & (shares >= self.threshold), axis=1)
        most = np.minimum(capacity, np.maximum(enough, 1))
        if self.top_k is not None:
            most = np.minimum(most, self.top_k)
        return shares, best_pairs(shares, most, eligible, seed=seed)


def responsibilities(losses: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return how much each expert answers for a client's data.

    Parameters
    ----------
    losses : array_like, shape (..., m)
        Mean loss of every expert on the client's samples, in nats.

    Returns
    -------
    ndarray, shape (..., m), float64
        ``exp(-loss)`` over their sum; sums to 1. NaN throughout where a loss is not finite.

    Examples
    --------
    >>> responsibilities([0.0, np.log(2), np.log(4)]).round(3).tolist()
    [0.571, 0.286, 0.143]
    """
    known = np.asarray(losses, dtype=np.float64)
    finite = np.isfinite(known).all(axis=-1, keepdims=True)
    known = np.where(finite, known, 0.0)
    with np.errstate(over="ignore"):  # to -inf: no responsibility at all
        weights = np.exp(known.min(axis=-1, keepdims=True) - known)
    return np.where(finite, weights / weights.sum(axis=-1, keepdims=True), np.nan)
