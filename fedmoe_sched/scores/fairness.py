"""Fairness over time: what clients are owed in rounds, and experts in clients, as virtual queues.

A constraint on a long-run average becomes a queue that grows with what is due and shrinks with what is served. To
serve the longest queues first, weighed against what the round is worth otherwise, is the drift-plus-penalty rule
(Neely, *Stochastic Network Optimization with Application to Communication and Queueing Systems*, 2010, chapter 4)
[T]. For the participation of clients in federated learning: Huang et al., "An efficiency-boosting client selection
scheme for federated learning with fairness guarantee", 2021 (arXiv 2011.01783) [S]. FLEX-MoE (arXiv 2512.23070)
keeps a deficit per expert, see the policy ``flex-moe``; that of a guaranteed share, for any policy, is ours [I].
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, as_vector
from fedmoe_sched.errors import InputError

__all__ = ["FairnessOptions", "client_queues", "expert_deficits", "fairness_gains"]


@dataclass(frozen=True)
class FairnessOptions:
    """What clients and experts are guaranteed in the long run, and what it may cost.

    Parameters
    ----------
    client_rate : float, default 0.0
        In [0, 1]: share of the rounds in which it could train that a client is given experts in; that of single
        clients can be set by `Scheduler.add_client`.
    client_weight : float, default 0.1
        Fitness that all pairs of a client gain per round that it is owed; >= 0.
    expert_share : float, default 0.0
        In [0, 1]: share of the mean load that an expert is guaranteed; 1 is equal loads.
    expert_weight : float, default 0.1
        Fitness that all pairs of an expert gain per client that it is owed; >= 0.

    Raises
    ------
    InputError
        A value out of range.
    """

    client_rate: float = 0.0
    client_weight: float = 0.1
    expert_share: float = 0.0
    expert_weight: float = 0.1

    def __post_init__(self) -> None:
        for name in ("client_rate", "expert_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                msg = f"fairness: {name} = {value}: must be from 0 to 1"
                raise InputError(msg)
        for name in ("client_weight", "expert_weight"):
            value = getattr(self, name)
            if not 0 <= value < np.inf:
                msg = f"fairness: {name} = {value}: must be finite and >= 0"
                raise InputError(msg)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values; ``FairnessOptions(**values)`` restores them."""
        return asdict(self)


def client_queues(
    queue: npt.ArrayLike, rate: npt.ArrayLike, able: npt.ArrayLike, participated: npt.ArrayLike
) -> FloatArray:
    """Return the rounds that each client is owed after a round.

    ``Q <- max(0, Q + rate - participated)`` for clients that were there and could have trained something; nothing
    becomes due to the others while they are away. Summed up over T such rounds of a client, it took part in at
    least ``rate T - Q(T)`` of them: if its queue stays bounded, its rate is met in the long run.

    Parameters
    ----------
    queue : array_like, shape (n,)
        Before the round, in rounds, >= 0; 0 for new clients.
    rate : array_like, shape (n,)
        Guaranteed share of rounds, >= 0.
    able : array_like of bool, shape (n,)
        Whether the client was available, and could train any expert.
    participated : array_like of bool, shape (n,)
        Whether it was given any.

    Returns
    -------
    ndarray, shape (n,), float64

    Examples
    --------
    >>> client_queues([0.0, 0.5, 0.5, 2.0], 0.25, [True, True, True, False], [False, True, False, False]).tolist()
    [0.25, 0.0, 0.75, 2.0]
    """
    size = np.size(queue)
    owed = as_vector("queue", queue, size, "one per client", least=0)
    due = as_vector("rate", np.broadcast_to(rate, size), size, "one per client", least=0)
    there = np.broadcast_to(np.asarray(able, dtype=np.bool_), size)
    served = np.broadcast_to(np.asarray(participated, dtype=np.bool_), size)
    queues: FloatArray = np.where(there, np.maximum(0.0, owed + due - served), owed)
    return queues


def expert_deficits(deficit: npt.ArrayLike, loads: npt.ArrayLike, share: float) -> FloatArray:
    """Return the clients that each expert is owed after a round.

    ``D <- max(0, D + share * mean load - load)``. Summed up over rounds, the expert got at least its share of all
    clients, less D.

    Parameters
    ----------
    deficit : array_like, shape (m,)
        Before the round, in clients, >= 0.
    loads : array_like, shape (m,)
        Clients that trained each expert this round.
    share : float
        Guaranteed share of the mean load.

    Returns
    -------
    ndarray, shape (m,), float64

    Examples
    --------
    >>> expert_deficits([0.0, 1.0], [3, 1], share=0.75).tolist()
    [0.0, 1.5]
    """
    size = np.size(deficit)
    owed = as_vector("deficit", deficit, size, "one per expert", least=0)
    got = as_vector("loads", loads, size, "one per expert", least=0)
    deficits: FloatArray = np.maximum(0.0, owed + share * got.mean() - got)
    return deficits


def fairness_gains(queue: npt.ArrayLike, deficit: npt.ArrayLike, options: FairnessOptions) -> FloatArray:
    """Return what is added to the fitness of every pair: ``client_weight * Q_i + expert_weight * D_j``.

    Parameters
    ----------
    queue : array_like, shape (n,)
        Rounds that clients are owed.
    deficit : array_like, shape (m,)
        Clients that experts are owed.
    options : FairnessOptions

    Returns
    -------
    ndarray, shape (n, m), float64
        In units of fitness.

    Examples
    --------
    >>> fairness_gains([0.0, 2.0], [4.0], FairnessOptions(client_weight=0.5, expert_weight=0.25)).tolist()
    [[1.0], [2.0]]
    """
    rounds = as_vector("queue", queue, np.size(queue), "one per client", least=0)
    clients = as_vector("deficit", deficit, np.size(deficit), "one per expert", least=0)
    gains: FloatArray = options.client_weight * rounds[:, None] + options.expert_weight * clients
    return gains
