"""Copies: the plain method, where clients go on from the experts that they have instead of getting them again.

A client that answered keeps its trained copy of every expert that it was assigned, until it is assigned others.
Once the round is merged, the expert is an average: the copy still is the expert only if nobody else trained it,
then or since. So a copy spares a download in two ways:

- It is *current*: the client alone entered the last average of the expert. To go on from it changes nothing.
- It is *stale*, but not too old: the client goes on from what it trained itself, without what others did since.
  That is other training: local steps over several rounds between two averages, as in local SGD.

The age of a copy is the number of rounds since it was last in step with the expert: since it was sent, or was last
current. Of a client that failed nobody knows whether it got what was sent to it: it keeps only copies that it was
to go on from, as they were. The rules are ours [I].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.federated.aggregate import Aggregation, Update, expert_of
from fedmoe_sched.federated.methods.base import Arrays, Brief, Method, Setting
from fedmoe_sched.policies import takes_option
from fedmoe_sched.policies.base import Policy

__all__ = ["CachedExperts", "copy_options", "refuse_cache"]

_NEVER: Final = -1
_COPY: Final = "copy"
_TABLES: Final = ("since", "twin", "changed", "rounds")


def refuse_cache(cache: str, policy: str, method: str) -> None:
    """Refuse copies where another method than the plain one decides what is sent.

    Parameters
    ----------
    cache : str
        The setting ``clients.cache``.
    policy, method : str
        The policy, and the method that it has.

    Raises
    ------
    InputError
        They do not fit.
    """
    if cache != "none" and method != Method.name:
        msg = (
            f"clients.cache = {cache!r}: policy {policy!r} has the method {method!r}, and only {Method.name!r} "
            "lets clients go on from copies; set 'none'"
        )
        raise InputError(msg)


def copy_options(policy: str, oldest: int | None) -> dict[str, Any]:
    """Return the options that let a policy count as held what clients need not be sent.

    Parameters
    ----------
    policy : str
    oldest : int, optional
        Rounds up to which a copy will do after others have changed the expert; None without copies.

    Returns
    -------
    dict
        Empty without copies, and for a policy of a user's own that does not take the option.
    """
    if oldest is None or not takes_option(policy, "max_staleness"):
        return {}
    return {"max_staleness": oldest}


class CachedExperts(Method):
    """The plain method, but what a client has a copy of that will do is not sent.

    Parameters
    ----------
    setting : Setting
    oldest : int, optional
        Rounds up to which a stale copy will do; None: only current ones do.
    """

    def __init__(self, setting: Setting, oldest: int | None = None) -> None:
        super().__init__(setting)
        self._oldest = oldest
        shape = (len(setting.clients), setting.experts)
        # Of each copy, the round at whose start it was last in step, and the round after which it is the expert.
        self._since, self._twin = np.full(shape, _NEVER), np.full(shape, _NEVER)
        self._changed = np.zeros(setting.experts, dtype=np.int64)  # the last round that changed an expert
        self._rounds = np.zeros(1, dtype=np.int64)  # merged so far
        self._copies: dict[int, dict[str, npt.NDArray[Any]]] = {}

    @property
    def _now(self) -> int:
        """The round that is planned or going on; 1 for the first."""
        return int(self._rounds[0]) + 1

    def _is_current(self, client: int, expert: int) -> bool:
        return bool(self._twin[client, expert] == self._changed[expert])

    def _will_do(self, client: int, expert: int) -> bool:
        since = int(self._since[client, expert])
        stale = self._oldest is not None and since != _NEVER and self._now - since <= self._oldest
        return stale or self._is_current(client, expert)

    def brief(self, client: int, experts: Sequence[int], state: Arrays) -> Brief:
        """Return what a client gets and does: stale copies take the place of the global experts."""
        plain = super().brief(client, experts, state)
        kept = tuple(j for j in plain.down if self._will_do(client, j))
        stale = {j for j in kept if not self._is_current(client, j)}
        parts = {k: v for k, v in self._copies.get(client, {}).items() if expert_of(k) in stale}
        return replace(plain, parts=parts, down=tuple(j for j in plain.down if j not in kept), kept=kept)

    def merge(
        self, state: Arrays, updates: Sequence[Update], briefs: Mapping[str, Brief], policy: Policy
    ) -> Aggregation:
        """Average as the plain method does, and remember who has what now."""
        combined = super().merge(state, updates, briefs, policy)
        rejected = {rejection.client for rejection in combined.rejected}
        used = {str(update.client): update for update in updates if update.client not in rejected}
        for name, brief in briefs.items():
            self._remember(name, brief, used)
        self._changed[list(combined.expert_samples)] = self._now
        self._rounds += 1
        return combined

    def _remember(self, name: str, brief: Brief, used: Mapping[str, Update]) -> None:
        """Take in what became of one client's copies; `_changed` is still that of the round's start."""
        client, update = self._numbers[name], used.get(name)
        since, twin = (np.full(self.setting.experts, _NEVER) for _ in range(2))
        for j in brief.experts:
            in_step = j not in brief.kept or self._is_current(client, j)
            if update is None and j not in brief.kept:
                continue
            since[j] = self._now if in_step else self._since[client, j]
            if update is None:
                twin[j] = self._twin[client, j]
            elif _trained_alone(j, update, used):
                since[j], twin[j] = self._now + 1, self._now
        self._since[client], self._twin[client] = since, twin
        if self._oldest is not None:
            have = self._copies.get(client, {}) if update is None else update.parameters
            kept = {j for j in brief.experts if since[j] != _NEVER}
            self._copies[client] = {k: np.asarray(v) for k, v in have.items() if expert_of(k) in kept}

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all that has to be saved; `restore` takes it back."""
        tables = {name: getattr(self, f"_{name}").copy() for name in _TABLES}
        copies = {
            f"{_COPY}/{client}/{name}": value
            for client, own in self._copies.items()
            for name, value in own.items()
        }
        return {**tables, **copies}

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take back what `arrays` returned.

        Raises
        ------
        StateFileError
            They are of another run.
        """
        for name in _TABLES:
            have, mine = arrays.get(name), getattr(self, f"_{name}")
            if have is None or have.shape != mine.shape:
                msg = f"saved copies: {name!r} is missing, or of another number of clients or experts"
                raise StateFileError(msg)
            setattr(self, f"_{name}", have.copy())
        self._copies = {}
        for key, value in arrays.items():
            if key.startswith(f"{_COPY}/"):
                _, client, name = key.split("/", 2)
                self._copies.setdefault(int(client), {})[name] = value


def _trained_alone(expert: int, update: Update, used: Mapping[str, Update]) -> bool:
    """Whether the new average of an expert is what this client sent."""
    weights = {name: float(other.expert_samples.get(expert, 0.0)) for name, other in used.items()}
    return [name for name, weight in weights.items() if weight > 0] == [str(update.client)]
