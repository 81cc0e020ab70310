"""pFedMoE: one expert that all share, and one of each client's own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched.errors import InputError
from fedmoe_sched.policies.client_rule import ClientRule

__all__ = ["PFedMoePolicy"]


class PFedMoePolicy(ClientRule):
    """Every client trains expert 0, which all share, and expert 1, of which every client has its own.

    There is nothing to select. What makes the rule is the method ``pfedmoe``
    (`fedmoe_sched.federated.methods.pfedmoe`): expert 1 and the gate stay with the client.

    Source: pFedMoE (arXiv 2402.01350): no selection; one large local expert of each client's own, one small shared
    expert for everybody, a local gate that mixes them sample by sample; the shared expert is averaged [A]. Ours
    [I]:

    - Expert 0 stands for the shared one, expert 1 for the local ones: one width for all of them, where the paper's
      clients may have models of different kinds. ``model.expert_hidden = [16, 64]`` makes the shared one small.
      Further experts stay idle: the policy also runs beside others that share out more than two.
    - A client with capacity for one expert trains the shared one: the local one alone would neither learn from
      others nor give them anything. One that may not train the shared expert trains its own.

    Fitness is learned and reported, and counts for nothing; the loads are what they are.

    Parameters
    ----------
    experts : int or iterable of hashable
        At least 2.
    **options
        Those of `fedmoe_sched.Scheduler`; ``solver="greedy"``, ``balance=None``, no `load_min` or `load_max`,
        ``fill=True``, ``usage_weight=0`` and ``fitness_weight=1`` are fixed.

    Raises
    ------
    InputError
        Fewer than two experts, or an option that the policy fixes otherwise.

    Examples
    --------
    >>> policy = PFedMoePolicy(["shared", "local"], default_capacity=2)
    >>> policy.plan({"anna": 2, "ben": 1}).experts_by_client()
    {'anna': ['shared', 'local'], 'ben': ['shared']}
    """

    name: ClassVar[str] = "pfedmoe"
    method: ClassVar[str] = "pfedmoe"

    def __init__(self, experts: int | Iterable[Hashable], **options: Any) -> None:
        super().__init__(experts, **options)
        if len(self.experts) < 2:
            msg = f"experts: has {len(self.experts)}, policy {self.name!r} needs 2, one shared and one local"
            raise InputError(msg)

    def choose(
        self,
        fitness: FloatArray,
        capacity: IntArray,
        eligible: BoolArray,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
    ) -> tuple[FloatArray, BoolArray]:
        """Choose the shared expert, and the local one where there is room for it."""
        chosen = np.zeros(fitness.shape, dtype=np.bool_)
        chosen[:, 0] = eligible[:, 0] & (capacity > 0)
        chosen[:, 1] = eligible[:, 1] & (capacity > chosen[:, 0])
        return fitness, chosen
