"""pFedMoAP (arXiv 2410.10114): own experts that start from their average, frozen experts of peers, personal gates.

The state's experts are the pool: expert j as its owner last sent it. An owner starts every round from the *global*
expert, the average of the experts that were sent in the last round (by samples), and gets its neighbours from the
pool, frozen; it trains its expert and its gate. Down go the global expert and the neighbours, up goes its own [T].

Ours [I]: before anything was trained the global expert is the model's first one. A client without a gate starts
from the even one of the beginning, not from an average of gates, in which column j speaks of somebody else's
neighbours. Other shared parts (the extractor, where it is trained) are averaged as ever; the paper's, CLIP, is
frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import cdist

from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.federated.aggregate import Aggregation, Update, aggregate, as_floats, name_within, split_state
from fedmoe_sched.federated.methods.base import Arrays, Brief, Method, Setting, View
from fedmoe_sched.policies.base import Policy
from fedmoe_sched.policies.pfedmoap import PFedMoapPolicy

__all__ = ["PFedMoap"]

Floats = npt.NDArray[np.float64]

_GLOBAL = "global/"


class PFedMoap(Method):
    """Clients train an expert of their own beside the frozen ones of their neighbours.

    Parameters
    ----------
    setting : Setting
    """

    name: ClassVar[str] = "pfedmoap"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._global: dict[str, Floats] = {}  # by the name within the expert
        self._policy: PFedMoapPolicy | None = None

    def is_personal(self, name: str) -> bool:
        """Return whether a parameter is one of the gate."""
        return name.startswith("gate.")

    def before_plan(self, policy: Policy, state: Arrays, clients: Sequence[int]) -> None:
        """Tell the distances of the clients' experts to those that were trained.

        Raises
        ------
        InputError
            The policy has no owners of experts, or the experts are not of one shape.
        """
        if not isinstance(policy, PFedMoapPolicy):
            msg = f"method {self.name!r}: needs policy 'pfedmoap', not {policy.name!r}"
            raise InputError(msg)
        self._policy = policy
        pool = _experts(state)
        self._global = self._global or pool[0]
        trained = np.flatnonzero(policy.variable("trained"))
        if not len(trained):
            return
        own = [self._trained_own(client) for client in clients]
        starts = [self._global if j is None else pool[j] for j in own]
        distances = cdist(_flat(starts), _flat([pool[j] for j in trained.tolist()]))
        for client, distance in zip(clients, distances, strict=True):
            row = np.full(self.setting.experts, np.nan)
            row[trained] = distance
            policy.tell(self.setting.clients[client], {"distance": row})

    def brief(self, client: int, experts: Sequence[int], state: Arrays) -> Brief:
        """Return what a client gets and does: its own expert comes in the shape of the global one."""
        own = self._own(client)
        assert own is not None
        down = (own, *(j for j in experts if j != own))
        parts = {**self.personal_parts(client), **self._global_as(own)}
        return Brief(tuple(experts), (own,), tuple(experts), parts, down, (own,))

    def merge(
        self, state: Arrays, updates: Sequence[Update], briefs: Mapping[str, Brief], policy: Policy
    ) -> Aggregation:
        """Put the own experts into the pool, and average them into the global one."""
        # An expert of one client needs no weight, and must not be lost where the gate sent it nothing.
        whole = [
            dataclasses.replace(one, expert_samples=dict.fromkeys(one.expert_samples, one.samples))
            for one in updates
        ]
        combined = super().merge(state, whole, briefs, policy)
        rejected = {rejection.client for rejection in combined.rejected}
        own = [_own_part(one, briefs[str(one.client)]) for one in updates if one.client not in rejected]
        self._global = aggregate(self._global, own).state
        gate = {name: value for name, value in state.items() if self.is_personal(name)}
        return dataclasses.replace(combined, state=combined.state | gate)

    def client_view(self, client: int, held: Sequence[int]) -> View:
        """Return what a client uses: its own expert and its last neighbours as they are in the pool, its gate."""
        own = self._own(client)
        if own is None:
            return self.global_view()
        untrained = {} if self._trained_own(client) is not None else self._global_as(own)
        return View(tuple(held) or (own,), {**self.personal_parts(client), **untrained})

    def global_view(self) -> View:
        """Return the global expert alone."""
        return View((0,), self._global_as(0))

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the gates and the global expert."""
        return super().arrays() | {_GLOBAL + name: value for name, value in self._global.items()}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `arrays` returned."""
        own = {name.removeprefix(_GLOBAL): value for name, value in arrays.items() if name.startswith(_GLOBAL)}
        super().restore({name: value for name, value in arrays.items() if not name.startswith(_GLOBAL)})
        if not own:
            msg = f"saved parameters: method {self.name!r} lacks its global expert"
            raise StateFileError(msg)
        self._global = own

    def _own(self, client: int) -> int | None:
        assert self._policy is not None, "before_plan comes first"
        return self._policy.own_expert(self.setting.clients[client])

    def _trained_own(self, client: int) -> int | None:
        """Return the client's own expert if it has been trained."""
        own = self._own(client)
        assert self._policy is not None
        return own if own is not None and self._policy.variable("trained")[own] else None

    def _global_as(self, expert: int) -> dict[str, Floats]:
        return {f"experts.{expert}.{name}": value for name, value in self._global.items()}


def _experts(state: Arrays) -> dict[int, dict[str, Floats]]:
    """Return the parameters of every expert by their names within it.

    Raises
    ------
    InputError
        Experts differ in shape.
    """
    pool = {
        expert: {name_within(name): as_floats(value) for name, value in parts.items()}
        for expert, parts in split_state(state)[1].items()
    }
    shapes = {expert: {name: value.shape for name, value in parts.items()} for expert, parts in pool.items()}
    for expert, shape in shapes.items():
        if shape != shapes[0]:
            msg = f"experts 0 and {expert} differ in size: method 'pfedmoap' averages experts, which must be alike"
            raise InputError(msg)
    return pool


def _flat(experts: Sequence[Mapping[str, Floats]]) -> Floats:
    return np.stack([np.concatenate([value.ravel() for value in one.values()]) for one in experts])


def _own_part(update: Update, brief: Brief) -> Update:
    """Keep only the own expert of an update, as if it were a shared part."""
    start = f"experts.{brief.trained[0]}."
    parts = {name_within(name): value for name, value in update.parameters.items() if name.startswith(start)}
    return Update(update.client, parts, update.samples, {})
