"""FedJETs: anchor clients for the experts, and the gate for everybody else."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._scheduler_options import count_option
from fedmoe_sched._variables import StateVariable
from fedmoe_sched.policies.client_rule import ClientRule, best_pairs
from fedmoe_sched.rounds import OpenRound, RoundReports

__all__ = ["FedJetsPolicy"]


class FedJetsPolicy(ClientRule):
    """Every expert has an anchor client that trains nothing else; the others train what the gate ranks highest.

    With g_ij the gate's mean probability of expert j over the samples of client i, a client that is no anchor
    trains the `top_k` eligible experts of highest g_ij, fewer where its capacity is less. The anchors are M
    clients whose label mixes are as distinct as can be found, anchor j with expert j.

    Source: FedJETs (arXiv 2306.08586): M anchor clients with near-distinct label mixes, each with one expert of
    its own; for any other client the gate on the embedding of a frozen common model, top K of M, K = 2 and M = 5
    to 10; experts and gate are averaged [S]. That the scores are averaged over the client's samples is an
    inference [I]. Not known is how the anchors are found, and what happens where one is away. Ours [I]:

    - Clients tell their label counts once. As soon as `candidates` clients have, every expert gets an anchor, in
      the order of the experts: of the clients that may train it and are no anchor yet, the one whose label shares
      are farthest (in total variation) from those of the nearest anchor; the first anchor is farthest from the
      mean of all shares. Ties go to the client known first.
    - Anchors are fixed when the first round that they are in closes, and are never replaced. An expert that no
      client may train has none until one comes.
    - An anchor trains its own expert only. While it cannot (not eligible, no capacity), it is like any other
      client; while it is away, its expert is trained by those whose gate ranks it.
    - Where the gate is undecided, the lot decides, drawn anew each round: with an even gate at the start, ties to
      the lower number would send everybody to the same two experts, and teach the gate to do so ever after. It
      also decides for clients that have told nothing.
    - Fitness is learned and reported, and counts for nothing.

    The gate of this package's training loop sits on the shared extractor. It is frozen as in the paper with
    ``local.train_extractor = false``, or with ``data.patches`` and no convolution blocks.

    Parameters
    ----------
    experts : int or iterable of hashable
    top_k : int, default 2
        K >= 1.
    candidates : int, optional
        Clients that must have told their labels before there are anchors, >= 1; None is m.
    **options
        Those of `fedmoe_sched.Scheduler`; ``solver="greedy"``, ``balance=None``, no `load_min` or `load_max`,
        ``fill=True``, ``usage_weight=0`` and ``fitness_weight=1`` are fixed.

    Raises
    ------
    InputError
        A wrong option, or one that the policy fixes otherwise.

    Examples
    --------
    >>> policy = FedJetsPolicy(2, default_capacity=2, top_k=1)
    >>> labels = {"anna": [5, 5], "ben": [9, 1], "carl": [0, 8]}
    >>> for client, counts in labels.items():
    ...     policy.tell(client, {"labels": counts, "gate_mean": [0.3, 0.7]})
    >>> policy.plan(list(labels)).experts_by_client(), policy.anchors
    ({'anna': [1], 'ben': [1], 'carl': [0]}, {'carl': 0, 'ben': 1})
    """

    name: ClassVar[str] = "fedjets"
    variables: ClassVar[Mapping[str, StateVariable]] = {
        "labels": StateVariable("vector", told="once"),
        "gate_mean": StateVariable("pair", told="before"),
        "anchor": StateVariable("client", -1.0),
    }

    def __init__(
        self,
        experts: int | Iterable[Hashable],
        *,
        top_k: int = 2,
        candidates: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(experts, **options)
        self.top_k = count_option("top_k", top_k, 1)
        self.candidates = None if candidates is None else count_option("candidates", candidates, 1)

    @property
    def anchors(self) -> dict[Hashable, Hashable]:
        """The expert of every anchor by client, in the order of the experts; those of the next plan."""
        experts = self._experts_of_anchors()
        rows = np.flatnonzero(experts >= 0)
        ordered = rows[np.argsort(experts[rows])]
        return {self.clients[row]: self.experts[int(experts[row])] for row in ordered.tolist()}

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        return super().options() | {"top_k": self.top_k, "candidates": self.candidates}

    def choose(
        self,
        fitness: FloatArray,
        capacity: IntArray,
        eligible: BoolArray,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
    ) -> tuple[FloatArray, BoolArray]:
        """Choose by the gate, but for the anchors."""
        gate = self.variable("gate_mean", clients)
        chosen = best_pairs(gate, np.minimum(capacity, self.top_k), eligible, seed=seed)
        known = self._clients.numbers(clients)
        # One more for clients that nothing is known of: their number is -1.
        experts = np.append(self._experts_of_anchors(), -1)[known].astype(np.int64)
        anchors = np.flatnonzero((experts >= 0) & (capacity > 0) & eligible[np.arange(len(known)), experts])
        chosen[anchors] = False
        chosen[anchors, experts[anchors]] = True
        return gate, chosen

    def learned_variables(self, opened: OpenRound, reports: RoundReports) -> Mapping[str, npt.ArrayLike]:
        """Fix the anchors."""
        return {"anchor": self._experts_of_anchors()}

    def _experts_of_anchors(self) -> FloatArray:
        """Return the expert of every known client that is or becomes an anchor, -1 for the others; shape (n,)."""
        experts, labels = self.variable("anchor"), self.variable("labels")
        told = labels.sum(axis=1) > 0
        m = len(self.experts)
        needed = m if self.candidates is None else self.candidates
        if np.count_nonzero(told) < needed or np.count_nonzero(experts >= 0) == m:
            return experts
        rows = np.arange(len(experts))
        capacity, eligible = self._clients.limits(rows, {}, self._options.rules)
        able = np.ones((len(rows), m), dtype=np.bool_) if eligible is None else eligible
        return _with_anchors(labels, experts, able & (told & (capacity > 0))[:, None])


def _with_anchors(labels: FloatArray, experts: FloatArray, able: BoolArray) -> FloatArray:
    """Appoint an anchor for every expert that has none.

    Greedy, as in Gonzalez 1985 (farthest point first).

    Parameters
    ----------
    labels : ndarray, shape (n, classes)
        Samples of every class.
    experts : ndarray, shape (n,)
        Of the anchors so far; -1 for all others.
    able : ndarray, shape (n, m), bool
        Which clients may be the anchor of which experts; only those with samples.

    Returns
    -------
    ndarray, shape (n,)
    """
    experts = experts.copy()
    shares = labels / np.maximum(labels.sum(axis=1, keepdims=True), 1)
    nearest = _nearest(shares, shares[experts >= 0])
    for expert in sorted(set(range(able.shape[1])) - set(experts.astype(np.int64).tolist())):
        free = able[:, expert] & (experts < 0)
        if not free.any():
            continue
        distance = nearest
        if not (experts >= 0).any():
            distance = _nearest(shares, shares[able.any(axis=1)].mean(axis=0, keepdims=True))
        pick = int(np.argmax(np.where(free, distance, -1.0)))
        experts[pick] = expert
        nearest = np.minimum(nearest, _nearest(shares, shares[[pick]]))
    return experts


def _nearest(shares: FloatArray, others: FloatArray) -> FloatArray:
    """Total variation distance of every row to the nearest of some others; 1, the largest, where there is none."""
    nearest = np.ones(len(shares))
    for other in others:
        np.minimum(nearest, np.abs(shares - other).sum(axis=1) / 2, out=nearest)
    return nearest
