"""pFedMoAP: one expert for each client, mixed with the frozen experts of its nearest peers."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, as_counts
from fedmoe_sched._variables import StateVariable
from fedmoe_sched.errors import InputError
from fedmoe_sched.policies.client_rule import ClientRule
from fedmoe_sched.result import Schedule
from fedmoe_sched.rounds import OpenRound, RoundReports
from fedmoe_sched.scores.capacity import CapacityProfile

__all__ = ["PFedMoapPolicy"]


class PFedMoapPolicy(ClientRule):
    """Every client gets its own expert, which it trains, and the experts of its nearest peers, which stay frozen.

    The experts are those of the clients: a client owns one from the first round that it is planned in, in order of
    appearance, and nobody else trains it. Beside it the client gets the K nearest other experts, by the Euclidean
    distance of their parameters to its own. There must be as many experts as clients that ever train.

    Source: pFedMoAP (arXiv 2410.10114): each client downloads the local experts of its K nearest clients by l2
    distance, frozen, and trains its own expert and its own gate; own experts are averaged into a global one, from
    which all of them start the next round [T]. There the experts are prompts of a frozen CLIP model, here they are
    those of the model that is trained. Ours [I]:

    - K is what the capacity leaves room for, or `neighbours` if that is less.
    - Experts that nobody has trained yet are nobody's neighbours. A client that has not trained its own yet is
      where it starts from: at the global one.
    - A client whose own expert it may not train (eligibility) sits out; a new one gets the first free expert that
      it may train.

    What a training loop has to do for it (frozen neighbours, the global expert, personal gates) is the method
    `fedmoe_sched.federated.methods.pfedmoap`; that also tells the distances.

    Parameters
    ----------
    experts : int or iterable of hashable
    neighbours : int, optional
        K >= 0, at most capacity - 1 of which a client gets; None for as many as that.
    **options
        Those of `fedmoe_sched.Scheduler`; ``solver="greedy"``, ``balance=None``, no `load_min` or `load_max`,
        ``fill=True``, ``usage_weight=0`` and ``fitness_weight=1`` are fixed. Fitness is kept up
        to date but decides nothing.

    Raises
    ------
    InputError
        A wrong option, or one that the policy fixes otherwise. `plan`: there are more clients than experts.

    Examples
    --------
    >>> policy = PFedMoapPolicy(3, default_capacity=2)
    >>> policy.plan(["anna", "ben", "carl"]).experts_by_client()
    {'anna': [0], 'ben': [1], 'carl': [2]}
    >>> for client, (expert,) in policy.assigned().items():
    ...     policy.report(client, {expert: (100, 0.5)})
    >>> _ = policy.close_round()
    >>> policy.tell("anna", {"distance": [0.0, 0.7, 0.2]})
    >>> policy.plan(["anna", "ben"]).experts_by_client()
    {'anna': [0, 2], 'ben': [1]}
    """

    name: ClassVar[str] = "pfedmoap"
    method: ClassVar[str] = "pfedmoap"
    variables: ClassVar[Mapping[str, StateVariable]] = {
        # The expert that a client owns; -1 for none.
        "own": StateVariable("client", -1.0),
        # 1 for experts that their owner has trained.
        "trained": StateVariable("expert"),
        # Of the client's own expert to each; -1 where it is not known.
        "distance": StateVariable("pair", -1.0, told="server"),
    }

    def __init__(
        self, experts: int | Iterable[Hashable], *, neighbours: int | None = None, **options: Any
    ) -> None:
        super().__init__(experts, **options)
        self.neighbours = (
            None if neighbours is None else int(as_counts("neighbours", neighbours, 1, "one number")[0])
        )

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        return super().options() | {"neighbours": self.neighbours}

    def own_expert(self, client: Hashable) -> int | None:
        """Return the number of the expert that a client owns; None if it was never planned."""
        number = int(self.variable("own", [client])[0])
        return None if number < 0 else number

    def plan(
        self, available_clients: Iterable[Hashable] | Mapping[Hashable, int | CapacityProfile | None]
    ) -> Schedule:
        """Plan as `Scheduler.plan` does, and let new clients keep the experts that they were given."""
        answer = super().plan(available_clients)
        opened, own = self._opened_round("plan"), self.variable("own").copy()
        taken = set(own.tolist())
        for position, row in enumerate(opened.clients.tolist()):
            if own[row] < 0:
                # Neighbours have an owner, so that the only expert without one is the client's.
                own[row] = next((j for j in opened.experts_at(position) if j not in taken), -1)
        self._variables.put({"own": own})
        return answer

    def choose(
        self,
        fitness: FloatArray,
        capacity: IntArray,
        eligible: BoolArray,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
    ) -> tuple[FloatArray, BoolArray]:
        """Leave every client its own expert and its nearest neighbours, as many as it has room for."""
        possible = eligible & (capacity > 0)[:, None]
        own = self._own_experts(self.variable("own", clients).astype(np.int64), possible)
        chosen = self._own_and_nearest(own, self.variable("distance", clients), capacity, possible)
        return fitness, chosen

    def _own_experts(self, own: IntArray, possible: BoolArray) -> IntArray:
        """Give each client that has none, and can train some, the first free expert; shape (k,), -1 for none."""
        owned = self.variable("own")
        free = np.ones(len(self.experts), dtype=np.bool_)
        free[owned[owned >= 0].astype(np.int64)] = False
        new = np.flatnonzero((own < 0) & possible.any(axis=1))
        if len(new) > free.sum():
            clients = int((~free).sum()) + len(new)
            msg = f"experts = {len(free)}: policy {self.name!r} needs one per client that trains, so far {clients}"
            raise InputError(msg)
        for client in new.tolist():
            mine = np.flatnonzero(free & possible[client])[:1]
            free[mine] = False
            own[client] = mine[0] if len(mine) else -1
        return own

    def _own_and_nearest(
        self, own: IntArray, distance: FloatArray, capacity: IntArray, possible: BoolArray
    ) -> BoolArray:
        """Return which experts each client gets, shape (k, m)."""
        having = np.flatnonzero(own >= 0)
        having = having[possible[having, own[having]]]
        far = np.where(possible & (distance >= 0), distance, np.inf)
        far[having, own[having]] = np.inf
        room = np.zeros(len(own), dtype=np.int64)
        room[having] = capacity[having] - 1
        if self.neighbours is not None:
            room = np.minimum(room, self.neighbours)
        rank = np.argsort(np.argsort(far, axis=1, kind="stable"), axis=1)
        chosen: BoolArray = (rank < room[:, None]) & np.isfinite(far)
        chosen[having, own[having]] = True
        return chosen

    def learned_variables(self, opened: OpenRound, reports: RoundReports) -> Mapping[str, npt.ArrayLike]:
        """Note which experts were trained."""
        trained = self.variable("trained").copy()
        trained[reports.experts] = 1.0
        return {"trained": trained}
