"""The clients that a scheduler knows: their names, limits, devices and history, as columns of arrays."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, as_counts
from fedmoe_sched._growing import GrowingRows
from fedmoe_sched._names import decode_name, encode_name
from fedmoe_sched._scheduler_layers import able_clients
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.scores.capacity import (
    CapacityProfile,
    ExpertCost,
    capacity_and_eligibility,
    corrected_speed,
    round_seconds,
)

__all__ = ["CapacityRules", "ClientTable", "ClientUpdate", "as_client_update", "as_client_updates"]

_UNSET = -1  # capacity of a client that was given none
_RELAXATION = 1 / 3  # of the correction rate: a round that a client sat out says less than one that it trained in


@dataclass(frozen=True)
class CapacityRules:
    """What turns a client's capacity, profile or silence into experts per round.

    Parameters
    ----------
    default_capacity : int
        For clients with neither capacity nor profile.
    cost : ExpertCost or None
        Needed for profiles.
    default_profile : CapacityProfile or None
        For clients without a profile of their own.
    deadline : float or None
        Seconds of a round.
    """

    default_capacity: int
    cost: ExpertCost | None
    default_profile: CapacityProfile | None
    deadline: float | None


@dataclass(frozen=True, eq=False)
class ClientUpdate:
    """News of one client; None leaves what is known.

    Parameters
    ----------
    capacity : int or None
    profile : CapacityProfile or None
    eligible : ndarray, shape (m,), bool, or None
    """

    capacity: int | None = None
    profile: CapacityProfile | None = None
    eligible: BoolArray | None = None


def as_client_update(argument: str, value: Any) -> ClientUpdate:
    """Read an entry of a mapping of clients: a capacity, a profile, or None."""
    if value is None:
        return ClientUpdate()
    if isinstance(value, CapacityProfile):
        return ClientUpdate(profile=value)
    if type(value) is int and 0 <= value < 2**31:
        return ClientUpdate(capacity=value)
    if np.ndim(value) != 0:
        msg = f"{argument} = {value!r}: must be a whole number, a CapacityProfile, or None"
        raise InputError(msg)
    return ClientUpdate(capacity=int(as_counts(argument, value, 1, "one number")[0]))


def as_client_updates(names: Sequence[Hashable], available: Any) -> dict[int, ClientUpdate]:
    """Read the values of a mapping of clients, by position in `names`; anything else holds no news."""
    if not isinstance(available, Mapping):
        return {}
    return {
        position: as_client_update(f"available_clients[{name!r}]", available[name])
        for position, name in enumerate(names)
    }


class ClientTable:
    """Names to row numbers, and one row per client in each column; rows are never given up.

    Parameters
    ----------
    n_experts : int
        m.

    Attributes
    ----------
    names : list of hashable
        In the order of the rows.
    """

    def __init__(self, n_experts: int) -> None:
        self.n_experts = n_experts
        self.names: list[Hashable] = []
        self._numbers: dict[Hashable, int] = {}
        self._columns = {
            "capacity": GrowingRows(np.zeros(0, dtype=np.int64)),
            "profile": GrowingRows(np.zeros((0, 5))),
            "correction": GrowingRows(np.zeros(0)),
            "answered": GrowingRows(np.zeros(0, dtype=np.int64)),
            "held": GrowingRows(np.zeros((0, n_experts), dtype=np.bool_)),
            # No columns until the first client is restricted: a million clients rarely are.
            "eligible": GrowingRows(np.zeros((0, 0), dtype=np.bool_)),
        }

    def __len__(self) -> int:
        return len(self.names)

    @property
    def profile(self) -> FloatArray:
        """Device profiles, NaN for clients without one; shape (n, 5)."""
        return self._columns["profile"].rows

    @property
    def correction(self) -> FloatArray:
        """Observed over estimated round time; shape (n,)."""
        return self._columns["correction"].rows

    @property
    def answered(self) -> IntArray:
        """Rounds that each client answered; shape (n,)."""
        return self._columns["answered"].rows

    def number(self, name: Hashable) -> int:
        """Return the row of a client.

        Raises
        ------
        InputError
            There is no such client.
        """
        try:
            return self._numbers[name]
        except (KeyError, TypeError):
            msg = f"client = {name!r}: there is no client of that name"
            raise InputError(msg) from None

    def numbers(self, names: Sequence[Hashable]) -> IntArray:
        """Return the rows of clients, -1 for those that are not known."""
        return np.fromiter((self._numbers.get(name, -1) for name in names), dtype=np.int64, count=len(names))

    def add(self, names: Sequence[Hashable]) -> None:
        """Add clients of which nothing is known but the name; they must be new."""
        count = len(names)
        width = self._columns["eligible"].rows.shape[1]
        news: dict[str, npt.NDArray[Any]] = {
            "capacity": np.full(count, _UNSET),
            "profile": np.full((count, 5), np.nan),
            "correction": np.ones(count),
            "answered": np.zeros(count, dtype=np.int64),
            "held": np.zeros((count, self.n_experts), dtype=np.bool_),
            "eligible": np.ones((count, width), dtype=np.bool_),
        }
        for column, rows in news.items():
            self._columns[column].append(rows)
        self._numbers.update(zip(names, range(len(self.names), len(self.names) + count), strict=True))
        self.names.extend(names)

    def apply(self, client: int, update: ClientUpdate) -> None:
        """Take in news of one client."""
        if update.capacity is not None:
            self._columns["capacity"].rows[client] = update.capacity
        if update.profile is not None:
            self.profile[client] = astuple(update.profile)
        if update.eligible is not None:
            if not self._columns["eligible"].rows.shape[1]:
                everything = np.ones((len(self), self.n_experts), dtype=np.bool_)
                self._columns["eligible"] = GrowingRows(everything)
            self._columns["eligible"].rows[client] = update.eligible

    def held(self, clients: IntArray) -> BoolArray:
        """Return the experts that clients hold, nothing for those that are new (-1); shape (k, m)."""
        return self._taken("held", clients, fill=False)

    def hold(self, clients: IntArray, pairs: Assignment, answered: BoolArray) -> None:
        """Take in a round: who answered holds what it was assigned, and nothing else.

        Of who did not answer nobody knows whether it got its experts, or still has the old ones: it holds those
        that are among both. Who was assigned nothing holds what it held.

        Parameters
        ----------
        clients : ndarray, shape (k,), int64
        pairs : Assignment
            Of shape (k, m).
        answered : ndarray, shape (k,), bool
        """
        busy = pairs.counts > 0
        rows, got = clients[busy], pairs.mask()[busy]
        kept = self._columns["held"].rows
        kept[rows] = got & (answered[busy, None] | kept[rows])

    def profiles(self, clients: IntArray, rules: CapacityRules) -> FloatArray:
        """Return the profiles of clients (-1: a new one) with the default put in; NaN where there is none."""
        table = self._taken("profile", clients, np.nan)
        if rules.default_profile is not None:
            table[np.isnan(table[:, 0])] = astuple(rules.default_profile)
        return table

    def limits(
        self,
        clients: IntArray,
        updates: Mapping[int, ClientUpdate],
        rules: CapacityRules,
        *,
        corrected: bool = True,
    ) -> tuple[IntArray, BoolArray | None]:
        """Return capacity and eligibility of the clients of a round.

        Parameters
        ----------
        clients : ndarray, shape (k,)
            Rows; -1 for clients that are not in the table yet.
        updates : mapping of int to ClientUpdate
            News of clients, by position in `clients`; nothing is stored.
        rules : CapacityRules
        corrected : bool, default True
            Whether the speeds that were learnt count; else profiles are taken at their word.

        Returns
        -------
        capacity : ndarray, shape (k,), int64
        eligible : ndarray, shape (k, m), bool, or None
            None if every pair is eligible.
        """
        capacity = self._taken("capacity", clients, _UNSET)
        profiles = self._profiles_with(clients, updates, rules)
        for position, update in updates.items():
            if update.capacity is not None:
                capacity[position] = update.capacity
        known = ~np.isnan(profiles[:, 0])
        unset = capacity == _UNSET
        capacity[unset] = np.where(known[unset], self.n_experts, rules.default_capacity)
        eligible = np.ones((len(clients), self.n_experts), dtype=np.bool_)
        if self._columns["eligible"].rows.size:
            eligible = self._taken("eligible", clients, fill=True)
        if known.any():
            if rules.cost is None:
                msg = f"{int(known.sum())} clients have a profile: the scheduler needs expert_cost to use it"
                raise InputError(msg)
            correction = self._taken("correction", clients, 1.0) if corrected else np.ones(len(clients))
            most, fits = capacity_and_eligibility(
                profiles[known],
                rules.cost,
                self.n_experts,
                deadline=rules.deadline,
                correction=correction[known],
            )
            capacity[known] = np.minimum(capacity[known], most)
            eligible[known] &= fits
        return capacity, None if eligible.all() else eligible

    def learned_speeds(
        self,
        clients: IntArray,
        pairs: Assignment,
        seconds: FloatArray,
        rules: CapacityRules,
        rate: float,
        layers: ExpertLayers | None = None,
    ) -> FloatArray:
        """Return the speed corrections of the clients of a round after it; nothing is stored.

        Clients whose time is known learn from it, see `fedmoe_sched.scores.corrected_speed`. A client that its
        correction c alone keeps out (nothing fits the deadline, but something would with ``c = 1``; with layers,
        as many experts as they demand) has no time to
        show, and would be kept out for ever by one slow round. Its correction relaxes instead [I]::

            c <- (1 - q) c + q        q = rate / 3

        as if it had kept to its profile, with a third of the weight of a time that was seen. If an expert fits up
        to the correction c*, it is tried again after ``ln((c - 1) / (c* - 1)) / -ln(1 - q)`` such rounds: later,
        the slower it was seen, and the sooner, the more room the deadline leaves it.

        Parameters
        ----------
        clients : ndarray, shape (k,), int64
        pairs : Assignment
            What they trained; of shape (k, m).
        seconds : ndarray, shape (k,)
            How long it took; NaN where that is not known.
        rules : CapacityRules
        rate : float
        layers : ExpertLayers, optional
            Of these clients.
        """
        speeds = self.correction[clients]
        profiles = self.profiles(clients, rules)
        told = (pairs.counts > 0) & ~np.isnan(seconds) & ~np.isnan(profiles[:, 0])
        if rules.cost is not None and told.any():
            estimated = round_seconds(profiles[told], rules.cost, pairs.mask()[told])
            speeds[told] = corrected_speed(speeds[told], seconds[told], estimated, rate)
        # Whoever is as fast as its profile, or faster, is not kept out by its correction.
        idle = np.flatnonzero((pairs.counts == 0) & (speeds > 1))
        if rules.deadline is not None and len(idle):
            own = None if layers is None else layers.restrict(idle)
            able, would = (
                able_clients(*self.limits(clients[idle], {}, rules, corrected=corrected), own)
                for corrected in (True, False)
            )
            barred = idle[would & ~able]
            kept = np.ones(len(barred))
            speeds[barred] = corrected_speed(speeds[barred], kept, kept, _RELAXATION * rate)
        return speeds

    def _profiles_with(
        self, clients: IntArray, updates: Mapping[int, ClientUpdate], rules: CapacityRules
    ) -> FloatArray:
        """Return profiles as `profiles` does, with news that are not stored yet."""
        profiles = self.profiles(clients, rules)
        for position, update in updates.items():
            if update.profile is not None:
                profiles[position] = astuple(update.profile)
        return profiles

    def estimated_seconds(
        self, clients: IntArray, updates: Mapping[int, ClientUpdate], rules: CapacityRules
    ) -> FloatArray:
        """Estimate how long clients take to train one expert, 0 where unknown; arguments as in `limits`."""
        profiles = self._profiles_with(clients, updates, rules)
        known = ~np.isnan(profiles[:, 0])
        seconds = np.zeros(len(clients))
        if rules.cost is not None and known.any():
            one = np.broadcast_to(np.eye(1, self.n_experts), (int(known.sum()), self.n_experts))
            correction = self._taken("correction", clients, 1.0)[known]
            seconds[known] = round_seconds(profiles[known], rules.cost, one, correction=correction)
        return seconds

    def _taken(self, column: str, clients: IntArray, fill: Any) -> npt.NDArray[Any]:
        """Copy rows of a column; `fill` for clients that are not in the table."""
        rows = self._columns[column].rows
        taken = np.full((len(clients), *rows.shape[1:]), fill, dtype=rows.dtype)
        known = clients >= 0
        taken[known] = rows[clients[known]]
        return taken

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of all columns; `restore` takes them back."""
        return {name: column.rows.copy() for name, column in self._columns.items()}

    def encoded_names(self) -> list[Any]:
        """Return the names as JSON values.

        Raises
        ------
        InputError
            A name cannot be stored in a file; the message names the client.
        """
        codes = []
        for name in self.names:
            try:
                codes.append(encode_name(name))
            except (TypeError, ValueError, RecursionError) as error:
                msg = f"client = {name!r}: this name cannot be stored in a file ({error})"
                raise InputError(msg) from error
        return codes

    @classmethod
    def restored(cls, n_experts: int, codes: Sequence[Any], arrays: Mapping[str, npt.NDArray[Any]]) -> ClientTable:
        """Make a table of what `encoded_names` and `arrays` returned.

        Raises
        ------
        InputError, ValueError
            They do not fit one another.
        """
        table = cls(n_experts)
        table.names = [decode_name(code) for code in codes]
        table._numbers = {name: number for number, name in enumerate(table.names)}
        if len(table._numbers) != len(codes):
            msg = "clients: a name occurs twice"
            raise InputError(msg)
        widths = {
            "profile": (5,),
            "held": (n_experts,),
            "eligible": (n_experts if arrays["eligible"].size else 0,),
        }
        for name, column in table._columns.items():
            shape = (len(codes), *widths.get(name, ()))
            if arrays[name].shape != shape or arrays[name].dtype != column.rows.dtype:
                msg = (
                    f"clients.{name}: a {arrays[name].dtype} array of shape {arrays[name].shape}, "
                    f"must be {column.rows.dtype} of {shape}"
                )
                raise InputError(msg)
            table._columns[name] = GrowingRows(arrays[name])
        return table
