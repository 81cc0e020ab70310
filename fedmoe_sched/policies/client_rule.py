"""The base of rules that choose the experts of every client by itself."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, Final

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched.policies.base import RulePolicy
from fedmoe_sched.result import Schedule

__all__ = ["CLIENT_BY_CLIENT", "ClientRule", "best_pairs", "top_ranked"]


#: What a rule that decides client by client fixes.
CLIENT_BY_CLIENT: Final[Mapping[str, Any]] = {
    "solver": "greedy",
    "balance": None,
    "load_min": None,
    "load_max": None,
    "fill": True,
    "usage_weight": 0.0,
    "fitness_weight": 1.0,
    "switching_cost": 0.0,
    "layers": None,
}


class ClientRule(RulePolicy, ABC):
    """A policy that chooses the experts of every client by itself, by scores of its own.

    The schedule's problem has the rule's scores as desirability, and the chosen pairs alone as eligible: its
    objective is the sum of these scores, and its certificate proves that what was chosen was assigned. The fitness
    given up is measured against all eligible pairs, as for every policy.

    Parameters
    ----------
    experts : int or iterable of hashable
    **options
        Those of `fedmoe_sched.Scheduler`; what concerns backend, weights and loads is fixed, see `fixed`.
    """

    fixed: ClassVar[Mapping[str, Any]] = CLIENT_BY_CLIENT

    @abstractmethod
    def choose(
        self,
        fitness: FloatArray,
        capacity: IntArray,
        eligible: BoolArray,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
    ) -> tuple[FloatArray, BoolArray]:
        """Choose pairs.

        Parameters
        ----------
        fitness : ndarray, shape (k, m)
        capacity : ndarray, shape (k,), int64
        eligible : ndarray, shape (k, m), bool
        clients : tuple of k hashable
        seed : int
            Of this round.

        Returns
        -------
        scores : ndarray, shape (k, m)
            Finite.
        chosen : ndarray, shape (k, m), bool
            Eligible pairs, at most `capacity` of each client.
        """

    def decide(
        self,
        fitness: FloatArray,
        usage: FloatArray,
        capacity: IntArray,
        eligible: BoolArray | None,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
        warm_start: FloatArray | None,
    ) -> Schedule:
        """Choose, and leave nothing else to the backend."""
        open_ = np.ones(fitness.shape, dtype=np.bool_) if eligible is None else eligible
        scores, chosen = self.choose(fitness, capacity, open_, clients=clients, seed=seed)
        answer = super().decide(scores, usage, capacity, chosen, clients=clients, seed=seed, warm_start=warm_start)
        return dataclasses.replace(answer, fitness_weight=None)  # the scores are the rule's own


def best_pairs(scores: FloatArray, most: IntArray, eligible: BoolArray, *, seed: int) -> BoolArray:
    """Choose the eligible experts of highest score for every client; ties are broken at random, evenly.

    Parameters
    ----------
    scores : ndarray, shape (k, m)
    most : ndarray, shape (k,), int64
        How many for each client; fewer where fewer are eligible.
    eligible : ndarray, shape (k, m), bool
    seed : int

    Returns
    -------
    ndarray, shape (k, m), bool

    Examples
    --------
    >>> best_pairs(np.array([[0.2, 0.5, 0.3]]), np.array([2]), np.array([[True, False, True]]), seed=0).tolist()
    [[True, False, True]]
    """
    lots = np.random.default_rng(seed).random(scores.shape)
    ranked = np.lexsort((lots, -scores, ~eligible), axis=1)
    chosen = np.zeros(scores.shape, dtype=np.bool_)
    np.put_along_axis(chosen, ranked, np.arange(scores.shape[1]) < most[:, None], axis=1)
    return chosen & eligible


def top_ranked(ranks: FloatArray, counts: IntArray) -> BoolArray:
    """Mark the experts of highest rank of every client; ties go to the lower expert number.

    Parameters
    ----------
    ranks : ndarray, shape (k, m)
        -inf for experts that are not to be taken.
    counts : ndarray, shape (k,), int64
        How many each client takes, at most as many as it has that are not -inf.

    >>> top_ranked(np.array([[0.1, 0.5, 0.5], [3.0, 2.0, 1.0]]), np.array([1, 2])).astype(int).tolist()
    [[0, 1, 0], [1, 1, 0]]
    """
    order = np.argsort(-ranks, axis=1, kind="stable")
    taken = np.zeros(ranks.shape, dtype=np.bool_)
    np.put_along_axis(taken, order, np.arange(ranks.shape[1]) < counts[:, None], axis=1)
    return taken
