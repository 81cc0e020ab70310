"""HFedMoE: the experts that the gate prefers, less what their use betrays of the client."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._scheduler_options import ranged_option
from fedmoe_sched._variables import StateVariable
from fedmoe_sched.policies.client_rule import ClientRule, best_pairs

__all__ = ["HFedMoePolicy", "divergence"]


class HFedMoePolicy(ClientRule):
    """Every client trains the experts of highest importance to its gate, as many as it can.

    The score of expert e at client i is ``mix * mean_ie + (1 - mix) * max_ie - beta * kl_ie``: the mean and the
    largest gate probability over the client's samples, and a penalty for how far the client's use of the expert
    is from everybody's, ``kl_ie = p_ie * log(p_ie / q_e) - p_ie + q_e`` (`divergence`). p_i is the client's mean
    gate, scaled to sum 1, and q the mean of p over all known clients that have told theirs.

    Source: HFedMoE (arXiv 2601.00583): the mean and the largest gate probability mixed by a factor lambda, less
    beta times a KL-like term, and the best experts within the client's budget [S]. The KL-like term itself is not
    known to us; ours is a reconstruction [I]:

    - The paper argues by an information bottleneck [A]: keep what helps, compress what the choice tells of the
      input. Seen from the server the input is the client, and what the routing tells of it is the mean over
      clients of ``KL(p_i || q)``. The penalty is the expert's part of that divergence, in nats: at least 0, 0 only
      where the client uses the expert as all do, and over the experts it sums to KL(p_i || q). The more usual part
      ``p log(p / q)`` has the same sum, but would reward experts that a client hardly uses.
    - Experts that the client alone uses thus lose, by at most ``beta * log(n)``, and those that many share win.
      ``beta=0`` switches the penalty off.
    - ``mix=0.5`` and ``beta=0.1`` are ours.
    - Ties are broken by lot, anew for each client and round: a client that has told no gate trains random experts,
      and so do all while the gate is even, as it is before it has learnt anything. Ties to the lower number would
      send everybody to the same experts, and the gate would learn just that.

    The schedule's objective is the total score. Fitness is learned, and what the rule gives up of it is reported,
    but it does not count. The paper's aggregation, weighted by importance and aware of sparsity [A], is not part
    of this policy: experts are averaged by samples over the clients that trained them.

    Parameters
    ----------
    experts : int or iterable of hashable
    mix : float, default 0.5
        lambda, the weight of the mean against the largest gate probability, 0 to 1.
    beta : float, default 0.1
        Weight of the penalty, >= 0, in gate probability per nat.
    **options
        Those of `fedmoe_sched.Scheduler`; ``solver="greedy"``, ``balance=None``, no load bounds, ``fill=True``,
        ``usage_weight=0`` and ``fitness_weight=1`` are fixed.

    Raises
    ------
    InputError
        A wrong option, or one that the policy fixes otherwise.

    Examples
    --------
    >>> policy = HFedMoePolicy(3, beta=0)
    >>> policy.tell("anna", {"gate_mean": [0.5, 0.3, 0.2], "gate_max": [0.6, 0.9, 0.3]})
    >>> policy.scores(["anna"]).round(2).tolist(), policy.plan(["anna"]).experts_by_client()
    ([[0.55, 0.6, 0.25]], {'anna': [1]})
    """

    name: ClassVar[str] = "hfedmoe"
    variables: ClassVar[Mapping[str, StateVariable]] = {
        "gate_mean": StateVariable("pair", told="before", least=0.0),
        "gate_max": StateVariable("pair", told="before", least=0.0),
    }

    def __init__(
        self, experts: int | Iterable[Hashable], *, mix: float = 0.5, beta: float = 0.1, **options: Any
    ) -> None:
        super().__init__(experts, **options)
        self.mix = ranged_option("mix", mix, 0, 1)
        self.beta = ranged_option("beta", beta, 0)

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        return super().options() | {"mix": self.mix, "beta": self.beta}

    def scores(self, clients: Iterable[Hashable]) -> FloatArray:
        """Return the score of every expert for some clients, shape (k, m); 0 for clients that told no gate."""
        names = tuple(clients)
        mean, largest = self.variable("gate_mean", names), self.variable("gate_max", names)
        preferred = self.mix * mean + (1 - self.mix) * largest
        known = _shares(self.variable("gate_mean"))
        told = known.any(axis=1)
        if not self.beta or not told.any():
            return preferred
        penalty = divergence(_shares(mean), known[told].mean(axis=0))
        return np.where(mean.any(axis=1, keepdims=True), preferred - self.beta * penalty, preferred)

    def choose(
        self,
        fitness: FloatArray,
        capacity: IntArray,
        eligible: BoolArray,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
    ) -> tuple[FloatArray, BoolArray]:
        """Take each client's experts of highest score."""
        scores = self.scores(clients)
        return scores, best_pairs(scores, capacity, eligible, seed=seed)


def divergence(shares: FloatArray, average: FloatArray) -> FloatArray:
    """Return what each expert adds to the divergence of clients from the average client, ``KL(p || q)``.

    Parameters
    ----------
    shares : ndarray, shape (k, m)
        p: rows sum to 1, or are 0 throughout.
    average : ndarray, shape (m,)
        q, > 0 wherever p is.

    Returns
    -------
    ndarray, shape (k, m)
        ``p log(p / q) - p + q``, >= 0, in nats; rows sum to the divergence.

    Examples
    --------
    >>> divergence(np.array([[0.5, 0.5], [1.0, 0.0]]), np.array([0.5, 0.5])).round(4).tolist()
    [[0.0, 0.0], [0.1931, 0.5]]
    """
    ratio = np.divide(shares, average, out=np.ones_like(shares), where=shares > 0)
    parts: FloatArray = np.maximum(0.0, shares * np.log(ratio) - shares + average)
    return parts


def _shares(gates: FloatArray) -> FloatArray:
    """Scale rows to sum 1; rows of zeros stay."""
    total = gates.sum(axis=1, keepdims=True)
    shares: FloatArray = np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)
    return shares
