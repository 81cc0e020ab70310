"""The plain method, and the base of the others: clients get, train and send back the experts assigned to them.

Shared parts and experts are averaged as in `fedmoe_sched.federated.aggregate`. What a method calls *personal* is
kept by each client instead: nobody sends it, and nobody else uses it. The average over the clients is computed all
the same, and is what a client starts from that has none of its own yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.errors import StateFileError
from fedmoe_sched.federated.aggregate import Aggregation, Update, aggregate, expert_of
from fedmoe_sched.federated.clock import RoundWork
from fedmoe_sched.policies.base import Policy
from fedmoe_sched.scores.capacity import TRAINING_FACTOR

__all__ = ["Arrays", "Brief", "Method", "Setting", "View", "work_of"]

Arrays = Mapping[str, Any]

_NUMBER_AND_NAME = "/"


@dataclass(frozen=True)
class Setting:
    """What a method knows of the run.

    Parameters
    ----------
    clients : tuple of str
        Names, by number.
    experts : int
        m.
    """

    clients: tuple[str, ...]
    experts: int


@dataclass(frozen=True)
class Brief:
    """What one client gets, and what it does with it.

    Parameters
    ----------
    experts : tuple of int
        Experts that its mixture is made of.
    trained : tuple of int
        Those of them that it trains; the others stay frozen.
    judged : tuple of int
        Experts whose answers it is asked about (signal ``expert_loss``), whether in the mixture or not.
    parts : mapping of str to ndarray
        Parameters that take the place of the global ones.
    down, up : tuple of int
        Experts that are sent to and by the client, as often as they are.
    kept : tuple of int
        Experts that would be sent, if the client had no copy to go on from.
    """

    experts: tuple[int, ...]
    trained: tuple[int, ...]
    judged: tuple[int, ...]
    parts: Arrays = field(default_factory=dict)
    down: tuple[int, ...] = ()
    up: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()

    @classmethod
    def plain(cls, experts: Sequence[int]) -> Brief:
        """Make the brief of the plain method: what is assigned is sent, trained and sent back."""
        held = tuple(int(j) for j in experts)
        return cls(held, held, held, down=held, up=held)


@dataclass(frozen=True)
class View:
    """A model to judge: the global one, or that of a client.

    Parameters
    ----------
    experts : tuple of int
        Empty for all.
    parts : mapping of str to ndarray
        Parameters that take the place of the global ones.
    """

    experts: tuple[int, ...]
    parts: Arrays = field(default_factory=dict)


class Method:
    """Clients get, train and send back the experts that are assigned to them, and the shared parts.

    Parameters
    ----------
    setting : Setting
    """

    #: What it is called.
    name: ClassVar[str] = "shared"

    #: Signals that clients are asked for by the method itself, beside those of the policy.
    signals: ClassVar[tuple[str, ...]] = ()

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._numbers = {name: i for i, name in enumerate(setting.clients)}
        self._personal: dict[int, dict[str, npt.NDArray[Any]]] = {}

    def is_personal(self, name: str) -> bool:
        """Return whether every client has a parameter of its own, which is not sent."""
        return False

    def before_plan(self, policy: Policy, state: Arrays, clients: Sequence[int]) -> None:
        """Tell the policy what only the server knows; nothing here.

        Parameters
        ----------
        policy : Policy
            The one whose method this is.
        state : mapping of str to array
            Global parameters.
        clients : sequence of int
            Those that are about to be planned.
        """

    def brief(self, client: int, experts: Sequence[int], state: Arrays) -> Brief:
        """Return what a client gets and does.

        Parameters
        ----------
        client : int
        experts : sequence of int
            Assigned to it.
        state : mapping of str to array
            Global parameters.
        """
        held = tuple(experts)
        sent = self.sent(held, state)
        return Brief(held, held, held, self.personal_parts(client), sent, sent)

    def sent(self, experts: Sequence[int], state: Arrays) -> tuple[int, ...]:
        """Return the experts that are not personal."""
        kept = {expert_of(name) for name in state if self.is_personal(name)}
        return tuple(j for j in experts if j not in kept)

    def personal_parts(self, client: int) -> dict[str, npt.NDArray[Any]]:
        """Return the personal parameters of a client; empty where it has none yet."""
        return self._personal.get(client, {})

    def merge(
        self, state: Arrays, updates: Sequence[Update], briefs: Mapping[str, Brief], policy: Policy
    ) -> Aggregation:
        """Make the new global parameters, and keep what is personal.

        Parameters
        ----------
        state : mapping of str to array
            Global parameters; not changed.
        updates : sequence of Update
        briefs : mapping of client name to Brief
            Of all that were planned; an update for an expert that the client was not to train is rejected.
        policy : Policy

        Returns
        -------
        Aggregation
        """
        combined = aggregate(state, updates, assigned={name: brief.trained for name, brief in briefs.items()})
        rejected = {rejection.client for rejection in combined.rejected}
        for update in updates:
            if update.client not in rejected:
                own = {k: np.asarray(v) for k, v in update.parameters.items() if self.is_personal(k)}
                if own:
                    kept = self._personal.setdefault(self._numbers[str(update.client)], {})
                    kept.update(own)
        return combined

    def client_view(self, client: int, held: Sequence[int]) -> View:
        """Return the model that a client uses.

        Parameters
        ----------
        client : int
        held : sequence of int
            Experts that were last assigned to it; none stand for all.
        """
        return View(tuple(held), self.personal_parts(client))

    def global_view(self) -> View:
        """Return the model that somebody uses who takes no part in the training."""
        return View(())

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all that has to be saved; `restore` takes it back."""
        return {
            f"{client}{_NUMBER_AND_NAME}{name}": value
            for client, parts in self._personal.items()
            for name, value in parts.items()
        }

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `arrays` returned.

        Raises
        ------
        StateFileError
            They are of another run.
        """
        self._personal = {}
        for key, value in arrays.items():
            number, _, name = key.partition(_NUMBER_AND_NAME)
            if not number.isdigit() or int(number) >= len(self.setting.clients) or not self.is_personal(name):
                msg = f"saved parameter {key!r}: method {self.name!r} has none of that name"
                raise StateFileError(msg)
            self._personal.setdefault(int(number), {})[name] = value


def work_of(briefs: Sequence[Brief], n_experts: int) -> RoundWork:
    """Return what the clock counts of some briefs, expert by expert.

    >>> work = work_of([Brief(experts=(0, 2), trained=(0,), judged=(1, 2), down=(2, 2), up=(0,))], 3)
    >>> [table.round(2).tolist() for table in work]
    [[[1.0, 0.33, 0.33]], [[0.0, 0.0, 2.0]], [[1.0, 0.0, 0.0]]]
    """
    computed, down, up = (np.zeros((len(briefs), n_experts)) for _ in range(3))
    for row, brief in enumerate(briefs):
        computed[row, [*brief.experts, *brief.judged]] = 1 / TRAINING_FACTOR
        computed[row, list(brief.trained)] = 1.0
        np.add.at(down[row], list(brief.down), 1.0)
        np.add.at(up[row], list(brief.up), 1.0)
    return RoundWork(computed, down, up)
