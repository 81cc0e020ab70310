"""FedMoE-DA (arXiv 2411.02115): personal experts and gates, experts averaged with their neighbours after a round.

`fedmoe_sched.policies.fedmoe_da` has the rule and says what is reconstructed. Experts and gates are personal: the
server has an average over all clients that have one, which nobody trains, and which a client starts an expert from
that it has never trained. The extractor is averaged as ever. A neighbour that was not in the round takes part with
the expert that it last sent [I].

Traffic: for every expert that a client trains, those of its neighbours at other clients down (once each) and its
own up, whether by the server or from peer to peer: the bytes are the same. An expert that a client has not had yet
comes from the server. The gate vectors, one row of the gate per expert every few rounds, are not counted.

Memory: every (client, expert) that was ever trained is kept, and part of each checkpoint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray
from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.federated.aggregate import Aggregation, Update, aggregate, as_floats, expert_of, name_within
from fedmoe_sched.federated.methods.base import Arrays, Brief, Method, Setting
from fedmoe_sched.policies.base import Policy
from fedmoe_sched.policies.fedmoe_da import FedMoeDaPolicy

__all__ = ["FedMoeDa"]

Pair = tuple[int, int]

_NEAREST = "nearest/"
_GATE = "gate.weight"


class FedMoeDa(Method):
    """Every client keeps its own experts and gate; experts are averaged with their neighbours.

    Parameters
    ----------
    setting : Setting
    """

    name: ClassVar[str] = "fedmoe-da"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self._set_nearest(np.zeros((0, 2), dtype=np.int64), np.zeros((0, 1), dtype=np.int64), np.zeros((0, 1)))

    def is_personal(self, name: str) -> bool:
        """Return whether a parameter is of the gate or of an expert."""
        return name.startswith("gate.") or expert_of(name) is not None

    def before_plan(self, policy: Policy, state: Arrays, clients: Sequence[int]) -> None:
        """Find the neighbours anew, if that is due.

        Raises
        ------
        InputError
            The policy has no rule for neighbours.
        """
        if not isinstance(policy, FedMoeDaPolicy):
            msg = f"method {self.name!r}: needs policy 'fedmoe-da', not {policy.name!r}"
            raise InputError(msg)
        pairs = [(client, expert) for client in sorted(self._personal) for expert in sorted(self._had(client))]
        if not policy.is_refresh_due or not pairs:
            return
        # A gate that is not trained is the same for all.
        gates = {client: as_floats(self._personal[client].get(_GATE, state[_GATE])) for client, _ in pairs}
        kind = _kinds(state)
        found = policy.find_neighbours(
            np.stack([gates[client][expert] for client, expert in pairs]), [kind[expert] for _, expert in pairs]
        )
        self._set_nearest(np.array(pairs, dtype=np.int64), found.places, found.weights)

    def brief(self, client: int, experts: Sequence[int], state: Arrays) -> Brief:
        """Return what a client gets and does: it has its own experts already, and is sent its neighbours'."""
        held, had = tuple(experts), self._had(client)
        new = [j for j in held if j not in had]
        near = {pair for j in held for pair, _ in self._neighbours((client, j)) if pair[0] != client}
        parts = {
            name: value
            for name, value in self.personal_parts(client).items()
            if expert_of(name) is None or expert_of(name) in held
        }
        return Brief(held, held, held, parts, (*new, *(expert for _, expert in sorted(near))), held)

    def merge(
        self, state: Arrays, updates: Sequence[Update], briefs: Mapping[str, Brief], policy: Policy
    ) -> Aggregation:
        """Average the trained experts with their neighbours, and all clients' experts and gates for newcomers."""
        combined = super().merge(state, updates, briefs, policy)
        rejected = {rejection.client for rejection in combined.rejected}
        trained = [
            (self._numbers[str(one.client)], expert)
            for one in updates
            if one.client not in rejected
            for expert in briefs[str(one.client)].trained
        ]
        mixed = [(client, self._mixed((client, expert))) for client, expert in trained]
        for client, parts in mixed:  # only now: all averages are of what was trained
            self._personal[client].update(parts)
        everybody = [
            Update(self.setting.clients[client], parts, 1.0, dict.fromkeys(self._had(client), 1.0))
            for client, parts in self._personal.items()
        ]
        return dataclasses.replace(combined, state=aggregate(combined.state, everybody).state)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the personal parameters and the neighbours."""
        own = {"pairs": self._pairs, "places": self._places, "weights": self._weights}
        return super().arrays() | {_NEAREST + name: value for name, value in own.items()}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `arrays` returned."""
        super().restore({name: value for name, value in arrays.items() if not name.startswith(_NEAREST)})
        try:
            found = [arrays[_NEAREST + name] for name in ("pairs", "places", "weights")]
        except KeyError as error:
            msg = f"saved parameters: method {self.name!r} lacks {error}"
            raise StateFileError(msg) from error
        self._set_nearest(*found)

    def _set_nearest(self, pairs: IntArray, places: IntArray, weights: FloatArray) -> None:
        self._pairs, self._places, self._weights = pairs, places, weights
        self._rows: dict[Pair, int] = {
            (int(client), int(expert)): row for row, (client, expert) in enumerate(pairs)
        }

    def _had(self, client: int) -> set[int]:
        """Return the experts that a client has trained."""
        experts = {expert_of(name) for name in self.personal_parts(client)}
        return {expert for expert in experts if expert is not None}

    def _neighbours(self, pair: Pair) -> list[tuple[Pair, float]]:
        """Return with whom, itself included, an expert is averaged, and the weights."""
        row = self._rows.get(pair)
        if row is None:  # trained for the first time since neighbours were found
            return [(pair, 1.0)]
        there = self._places[row] >= 0
        nearest = self._pairs[self._places[row][there]].tolist()
        weights = self._weights[row][there].tolist()
        return [((client, expert), weight) for (client, expert), weight in zip(nearest, weights, strict=True)]

    def _mixed(self, pair: Pair) -> dict[str, npt.NDArray[Any]]:
        """Return the parameters of an expert after it is averaged with its neighbours."""
        client, expert = pair
        near = self._neighbours(pair)
        mixed = {}
        for name, old in self._personal[client].items():
            if expert_of(name) == expert:
                terms = (w * as_floats(self._personal[i][_named(j, name)]) for (i, j), w in near)
                mixed[name] = np.asarray(sum(terms)).astype(old.dtype)
        return mixed


def _named(expert: int, name: str) -> str:
    """Name of the same parameter in another expert."""
    return f"experts.{expert}.{name_within(name)}"


def _kinds(state: Arrays) -> dict[int, int]:
    """Return a number for the size of every expert: the same for experts of one size."""
    sizes: dict[int, list[Any]] = {}
    for name, value in state.items():
        expert = expert_of(name)
        if expert is not None:
            sizes.setdefault(expert, []).append((name_within(name), tuple(value.shape)))
    known = sorted({repr(size) for size in sizes.values()})
    return {expert: known.index(repr(size)) for expert, size in sizes.items()}
