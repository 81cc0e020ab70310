"""The simulated clock: how long a round takes, who answers in time, and what is sent; pure NumPy.

A client takes `fedmoe_sched.scores.round_seconds` (FedScale's model), times a random factor where the config asks
for one. With ``remaining`` seconds until its device goes away it

- is a *dropout* if the device goes away before it is done, and before the deadline;
- is a *straggler* if it is not done at the deadline;
- has *failed* if the config's failure rate hit it: the server waits for it in vain;
- has *answered* otherwise.

The round lasts until the last answer; until the deadline, if some client did not answer; and without a deadline
until it is clear that nothing more will come: a dropout has gone away, the time of one that failed is over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.availability import Availability
from fedmoe_sched.federated.devices import Devices
from fedmoe_sched.scores import CapacityProfile, ExpertCost, capacity_and_eligibility, profile_table, round_seconds

__all__ = ["Gathering", "Outcome", "RoundTimes", "RoundWork", "SimulatedClock", "round_times"]

_MOST_WAIT = 30 * 86400.0  # seconds
_SLACK = 1e-9  # of the limit: who plans to the second must not be late by a rounding error


class RoundWork(NamedTuple):
    """What k clients do in a round, expert by expert.

    Parameters
    ----------
    computed : ndarray, shape (k, m), float64
        1 for an expert that is trained, a third for one that is only asked: a pass forward is a third of a step.
    down, up : ndarray, shape (k, m), float64
        How often an expert is sent to, and by, the client.
    """

    computed: FloatArray
    down: FloatArray
    up: FloatArray


@dataclass(frozen=True, eq=False)
class RoundTimes:
    """What became of the k clients of a round.

    Parameters
    ----------
    answered, stragglers, dropouts : ndarray, shape (k,), bool
        At most one of them holds for a client; none for one that failed.
    length : float
        Seconds from the start of the round to its end.
    """

    answered: BoolArray
    stragglers: BoolArray
    dropouts: BoolArray
    length: float


def round_times(
    seconds: FloatArray, remaining: FloatArray, failed: BoolArray, deadline: float | None
) -> RoundTimes:
    """Judge a round by the rules of this module.

    Parameters
    ----------
    seconds : ndarray, shape (k,)
        How long each client takes.
    remaining : ndarray, shape (k,)
        How long it is available from the start of the round; inf for ever.
    failed : ndarray, shape (k,), bool
        Whether it fails for another reason.
    deadline : float or None
        Seconds from the start.

    Returns
    -------
    RoundTimes
        Without any client, a round lasts until the deadline, or no time.

    Examples
    --------
    >>> times = round_times(np.array([5.0, 9.0, 7.0]), np.array([np.inf, 20.0, 6.0]), np.zeros(3, bool), 8.0)
    >>> times.answered.tolist(), times.stragglers.tolist(), times.dropouts.tolist(), times.length
    ([True, False, False], [False, True, False], [False, False, True], 8.0)
    """
    limit = math.inf if deadline is None else deadline
    dropouts = np.minimum(seconds, limit) > remaining * (1 + _SLACK)
    stragglers = ~dropouts & (seconds > limit * (1 + _SLACK))
    answered = ~dropouts & ~stragglers & ~failed
    ends = np.minimum(seconds, remaining)
    if deadline is not None and not (len(seconds) and answered.all()):
        length = deadline
    else:
        length = float(ends.max()) if len(ends) else 0.0
    return RoundTimes(answered, stragglers, dropouts, length)


@dataclass(frozen=True)
class Gathering:
    """The clients of a round before it is planned.

    Parameters
    ----------
    clients : tuple of int
        Those that were drawn and are available.
    unavailable : int
        How many of those that were drawn are not.
    waited : float
        Seconds until they were there.
    """

    clients: tuple[int, ...]
    unavailable: int = 0
    waited: float = 0.0


@dataclass(frozen=True, eq=False)
class Outcome:
    """A round after it was simulated.

    Parameters
    ----------
    answered : ndarray, shape (k,), bool
        Whose update is used.
    seconds : ndarray, shape (k,), float64, or None
        How long each client takes; None without devices.
    record : dict
        For the metrics of the round: ``bytes_down``, ``bytes_up``; with devices also ``simulated_round`` and
        ``simulated_time`` (seconds of this round with the wait before it, and since the start of the run),
        ``stragglers``, ``dropouts`` and ``unavailable`` (clients).
    """

    answered: BoolArray
    seconds: FloatArray | None
    record: dict[str, Any]


class SimulatedClock:
    """Simulated time and traffic of a run. Without devices time stands still, and all clients are always there.

    Parameters
    ----------
    cost : ExpertCost
        For one unit of work, see `fedmoe_sched.federated.cost.model_cost`.
    n_experts : int
        m.
    devices : Devices, optional
    samples : sequence of n ints
        What each client trains on in a round: samples times epochs.
    deadline : float, optional
        Seconds of a round.
    min_available : int
        How many clients a round waits for.

    Attributes
    ----------
    time : float
        Simulated seconds since the start of the run; all there is to save.

    Raises
    ------
    InputError
        No client can train any expert.
    """

    def __init__(
        self,
        cost: ExpertCost,
        n_experts: int,
        *,
        samples: Sequence[int],
        devices: Devices | None = None,
        deadline: float | None = None,
        min_available: int = 1,
    ) -> None:
        self.time = 0.0
        self._least = min_available
        self._cost, self._m, self._deadline = cost, n_experts, deadline
        self._devices = devices
        #: What the server knows of the clients: profiles with a round's work as the unit, as `cost` has it.
        self.profiles: tuple[CapacityProfile, ...] = () if devices is None else devices.for_work(samples)
        self._table = profile_table(self.profiles)
        self._able = self._able_clients() if devices is not None else np.ones(len(samples), dtype=np.bool_)

    def _able_clients(self) -> BoolArray:
        capacity, _ = capacity_and_eligibility(self._table, self._cost, self._m, deadline=self._deadline)
        if not capacity.any():
            limit = "" if self._deadline is None else f" and devices.deadline = {self._deadline:g} s"
            smallest = np.eye(1, self._m, int(np.argmin(self._cost.bytes_of(self._m))))
            least = float(round_seconds(self._table, self._cost, smallest).min())
            most = float(self._table[:, 1].max())
            msg = (
                f"devices: no client can train an expert within its memory (at most {most:.3g} bytes){limit}: one "
                f"takes {self._cost.memory_overhead * (self._cost.shared_bytes + self._expert_bytes):.3g} bytes "
                f"and at least {least:.3g} s"
            )
            raise InputError(msg)
        able: BoolArray = capacity > 0
        return able

    @property
    def expert_bytes(self) -> FloatArray:
        """What an expert takes to send, by its number; shape (m,), in bytes."""
        return self._cost.bytes_of(self._m)

    @property
    def _expert_bytes(self) -> float:
        return float(self._cost.bytes_of(self._m).min())

    def policy_options(self) -> dict[str, Any]:
        """Return the options that make a policy plan for these devices; none without devices."""
        return {} if self._devices is None else {"expert_cost": self._cost, "deadline": self._deadline}

    def gather(self, drawn: Sequence[int]) -> Gathering:
        """Return which clients are available now; if they are too few, wait until enough are.

        Enough is `min_available`, or all if that is less. Clients that can train no expert do not count, unless
        none else was drawn.

        Parameters
        ----------
        drawn : sequence of int
            The clients that may take part, at least one.

        Raises
        ------
        InputError
            So many are never there together in 30 simulated days.
        """
        if self._devices is None or self._devices.availability is None:
            return Gathering(tuple(drawn))
        chosen = np.array(drawn, dtype=np.int64)
        able = chosen[self._able[chosen]]
        waited = self._wait(self._devices.availability, able if len(able) else chosen)
        here = self._devices.availability.remaining(self.time + waited)[chosen] > 0
        return Gathering(tuple(chosen[here].tolist()), int((~here).sum()), waited)

    def _wait(self, availability: Availability, clients: IntArray) -> float:
        """Return the seconds until enough of some clients are there: step by step from arrival to arrival."""
        waited, enough = 0.0, min(self._least, len(clients))
        while waited < _MOST_WAIT:
            waits = availability.waiting(self.time + waited)[clients]
            if (waits == 0).sum() >= enough:
                return waited
            waited += float(waits[waits > 0].min())
        msg = (
            f"devices.min_available = {self._least}: of the {len(clients)} clients that may take part so many are "
            f"not there together in the {_MOST_WAIT / 86400:.0f} days from simulated second {self.time:.0f} on"
        )
        raise InputError(msg)

    def run(
        self,
        gathering: Gathering,
        clients: Sequence[int],
        work: RoundWork,
        failed: BoolArray,
        factor: FloatArray,
    ) -> Outcome:
        """Simulate a round, and move on to its end.

        Parameters
        ----------
        gathering : Gathering
        clients : sequence of k ints
            Those that were assigned experts.
        work : RoundWork
            What they do.
        failed : ndarray, shape (k,), bool
            Whether a client fails for reasons of its own.
        factor : ndarray, shape (k,), float64
            Time that it takes over the time of the model.

        Returns
        -------
        Outcome
        """
        if self._devices is None:
            return Outcome(~failed, None, self._traffic(work, ~failed))
        rows = np.array(clients, dtype=np.int64)
        seconds = round_seconds(
            self._table[rows], self._cost, work.computed, correction=factor, received=work.down, sent=work.up
        )
        remaining = np.full(len(rows), np.inf)
        if self._devices.availability is not None:
            remaining = self._devices.availability.remaining(self.time + gathering.waited)[rows]
        times = round_times(seconds, remaining, failed, self._deadline)
        length = gathering.waited + times.length
        # Whole microseconds, as in the traces: to wait until a client comes is then to find it there.
        self.time = round(self.time + length, 6)
        record = self._traffic(work, times.answered) | {
            "simulated_round": length,
            "simulated_time": self.time,
            "stragglers": int(times.stragglers.sum()),
            "dropouts": int(times.dropouts.sum()),
            "unavailable": gathering.unavailable,
        }
        return Outcome(times.answered, seconds, record)

    def _traffic(self, work: RoundWork, answered: BoolArray) -> dict[str, int]:
        """Count bytes: shared parts and experts, down to all that were planned, up from those that answered."""
        sizes = self._cost.bytes_of(self._m)
        down = len(work.down) * self._cost.shared_bytes + (work.down @ sizes).sum()
        up = answered.sum() * self._cost.shared_upload + (work.up[answered] @ sizes).sum()
        return {"bytes_down": round(float(down)), "bytes_up": round(float(up))}
