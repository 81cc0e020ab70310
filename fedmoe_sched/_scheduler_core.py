"""What a scheduler knows, and its way into a file and back: the lower half of `Scheduler`."""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._clients import ClientTable, ClientUpdate
from fedmoe_sched._copies import COPY_VARIABLES, copies_that_count
from fedmoe_sched._fairness import fair_variables
from fedmoe_sched._files import PathLike, read_archive, write_archive
from fedmoe_sched._names import ExpertNames
from fedmoe_sched._scheduler_layers import LAYER_VARIABLES, round_layers
from fedmoe_sched._scheduler_options import SchedulerOptions
from fedmoe_sched._scheduler_state import pack_state, state_header, stored_experts, unpack_state
from fedmoe_sched._selecting import SELECTION_VARIABLES
from fedmoe_sched._variables import StateVariable, Variables
from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.result import Schedule
from fedmoe_sched.rounds import OpenRound
from fedmoe_sched.scores.capacity import CapacityProfile
from fedmoe_sched.scores.fitness import FitnessScores
from fedmoe_sched.scores.usage import UsageScores
from fedmoe_sched.switching import switching_paid

__all__ = ["SchedulerCore"]


class SchedulerCore:
    """State and options of a scheduler; `fedmoe_sched.Scheduler` is the round loop on top of it.

    Parameters
    ----------
    experts : int or sequence of hashable
    **options
        All fields of `SchedulerOptions` but the number of experts.
    """

    #: What state files and records call this policy.
    name: ClassVar[str] = "scheduler"

    #: What a policy keeps from round to round besides fitness and usage, by name. It is saved, loaded and grows
    #: with the clients by itself; `Scheduler.learned_variables` and `Scheduler.tell` bring it up to date,
    #: `variable` reads it.
    variables: ClassVar[Mapping[str, StateVariable]] = {}

    #: What is sent, trained, frozen and merged around the assignment, by name; a training loop knows what it
    #: stands for (`fedmoe_sched.federated.methods`).
    method: ClassVar[str] = "shared"

    def __init__(self, experts: int | Iterable[Hashable], **options: Any) -> None:
        self._experts = ExpertNames(experts)
        m = len(self._experts.names)
        self._options = SchedulerOptions(m, **options)
        self._fitness = FitnessScores(m, self._options.fitness)
        self._usage = UsageScores(m, self._options.usage, self._options.expert_compute)
        self._clients = ClientTable(m)
        asked = {} if self._options.selection is None else SELECTION_VARIABLES
        fair = {} if self._options.fairness is None else fair_variables(self._options.fairness)
        layered = {} if self._options.layers is None else LAYER_VARIABLES
        copied = {} if self._options.max_staleness is None else COPY_VARIABLES
        self._variables = Variables(m, {**self.variables, **asked, **fair, **layered, **copied})
        self._trained: IntArray = np.zeros(m, dtype=np.int64)
        self._round = 0
        self._prices: FloatArray | None = None
        self._open: OpenRound | None = None

    @property
    def experts(self) -> tuple[Hashable, ...]:
        """Names of the experts, in the order of every array over experts."""
        return self._experts.names

    @property
    def seed(self) -> int:
        """The seed that the seeds of all rounds are made of."""
        return self._options.seed

    @property
    def round(self) -> int:
        """Number of closed rounds."""
        return self._round

    @property
    def is_open(self) -> bool:
        """Whether a round is planned and not yet closed."""
        return self._open is not None

    @property
    def clients(self) -> tuple[Hashable, ...]:
        """Names of all known clients, in the order in which they appeared."""
        return tuple(self._clients.names)

    @property
    def fitness(self) -> FloatArray:
        """Fitness of all known clients, read-only; shape (n, m), rows as in `clients`."""
        return self._fitness.values

    @property
    def usage(self) -> FloatArray:
        """Usage of the experts, read-only; shape (m,), in samples or compute."""
        return self._usage.values

    def fitness_of(self, client: Hashable) -> FloatArray:
        """Return the fitness of one client, shape (m,); a copy."""
        row: FloatArray = self._fitness.of([self._clients.number(client)])[0]
        return row

    def speed_correction_of(self, client: Hashable) -> float:
        """Return observed over estimated round time of one client so far; 1.0 at the start."""
        return float(self._clients.correction[self._clients.number(client)])

    def held_by(self, client: Hashable) -> list[Hashable]:
        """Return the experts that a client holds: those of the last round that it answered.

        A client that was away since still holds them. One that failed may have got the new ones or not: it holds
        what is among the old and the new. With `max_staleness` those count that are not too old for the round that
        is open or comes next.

        Raises
        ------
        InputError
            There is no such client.
        """
        row = self._copies(np.array([self._clients.number(client)]))[0]
        return [self.experts[j] for j in np.flatnonzero(row).tolist()]

    def _held(self, clients: Sequence[Hashable]) -> BoolArray | None:
        """Return what clients hold, shape (k, m), for `schedule`; None where it costs nothing to switch."""
        costs = np.any(self._options.switching_cost)
        return self._copies(self._clients.numbers(clients)) if costs else None

    def _copies(self, rows: IntArray) -> BoolArray:
        """Return the experts that clients (-1: a new one) need not be sent; shape (k, m)."""
        oldest = self._options.max_staleness
        if oldest is None:
            return self._clients.held(rows)
        return copies_that_count(self._variables, rows, self._round + 1, oldest)

    def round_seed(self) -> int:
        """Return the seed of the round that is open or comes next; >= 0 and < 2**31."""
        return int(np.random.SeedSequence((self.seed, self._round)).generate_state(1)[0] >> 1)

    def assigned(self) -> dict[Hashable, list[Hashable]]:
        """Return the experts of each client in the open round, also after `load`.

        Raises
        ------
        InputError
            No round is open.
        """
        opened = self._opened_round("assigned")
        names = self._clients.names
        return {
            names[row]: [self.experts[j] for j in opened.experts_at(position)]
            for position, row in enumerate(opened.clients.tolist())
        }

    def cancel_round(self) -> None:
        """Drop the open round and its reports, as if it had not been planned; new clients stay known.

        Planning the same clients again gives the same plan.
        """
        self._opened_round("cancel_round")
        self._open = None

    def layers_of(self, clients: Sequence[Hashable], capacity: IntArray | None = None) -> ExpertLayers | None:
        """Return the layers of the experts with the bounds of some clients; None where there are no layers.

        Parameters
        ----------
        clients : sequence of hashable
            k names; those not known yet have the bounds that all have in common.
        capacity : ndarray, shape (k,), optional
            Of the round, as in `Scheduler.decide`: of clients of capacity 0 no layer then demands anything.
        """
        return self._layers_at(self._clients.numbers(clients), None if capacity is None else capacity > 0)

    def _layers_at(self, rows: IntArray, busy: BoolArray | None = None) -> ExpertLayers | None:
        """Do as `layers_of` does, by rows of clients (-1 for new ones), of whom not all may take part."""
        layers = self._options.layers
        return None if layers is None else round_layers(layers, self._variables, rows, busy)

    def _switching(self, clients: Sequence[Hashable], answer: Schedule) -> dict[str, Any]:
        """Return what a plan sends anew, for the record of its round."""
        pairs = answer.pairs
        assert pairs is not None
        fresh = ~self._copies(self._clients.numbers(clients))[pairs.clients, pairs.indices]
        paid = switching_paid(pairs, fresh, np.asarray(self._options.switching_cost))
        return {"experts_resent": int(fresh.sum()), "switching_paid": paid}

    def variable(self, name: str, clients: Sequence[Hashable] | None = None) -> FloatArray:
        """Return the values of one of `variables`.

        Parameters
        ----------
        name : str
        clients : sequence of hashable, optional
            The clients to return the rows of, k names; those not known yet have the start value. For a variable
            per client or pair, as needed in `Scheduler.decide`.

        Returns
        -------
        ndarray, float64
            Shape (k,) or (k, m), a copy. Without `clients` all values, read-only: shape (m,), (n,) or (n, m), rows
            in the order of the scheduler's clients.

        Raises
        ------
        InputError
            There is no such variable, or it is one per expert and clients were named.
        """
        if clients is None:
            return self._variables.of(name)
        return self._variables.at(name, self._clients.numbers(clients))

    def signals(self, when: str) -> tuple[str, ...]:
        """Return what clients are asked for.

        Parameters
        ----------
        when : {"once", "before", "after"}
            See `StateVariable.told`.

        Returns
        -------
        tuple of str
            Names of variables; answers go to `Scheduler.tell`.
        """
        return tuple(name for name, kind in self._variables.kinds.items() if kind.told == when)

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values; a subclass adds its own.

        Raises
        ------
        InputError
            The solver is an instance that cannot be made again from plain values.
        """
        return self._options.to_plain()

    def state_dict(self) -> dict[str, Any]:
        """Return the whole state: ``{"arrays": {name: ndarray}, "metadata": {...}}``, the latter JSON values.

        State that a subclass names in `variables` is part of it.

        Raises
        ------
        InputError
            The name of a client or expert cannot be stored.
        """
        header = state_header(self.name, self.experts, self.options(), self._round)
        return pack_state(
            header,
            clients=self._clients,
            fitness=self._fitness,
            usage=self._usage,
            trained=self._trained,
            prices=self._prices,
            opened=self._open,
            variables=self._variables,
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, for the same experts; the options stay those of this object.

        Raises
        ------
        InputError
            The state is of another policy or other experts, or its parts do not fit; nothing was changed.
        """
        parts = unpack_state(state, self.name, self.experts, self._fitness.options, self._variables.kinds)
        self._usage.restore(parts.usage)
        self._trained = parts.trained
        self._clients, self._fitness, self._variables = parts.clients, parts.fitness, parts.variables
        self._round, self._prices, self._open = parts.round, parts.prices, parts.open

    def save(self, path: PathLike) -> None:
        """Save the whole state, options and an open round included, to one file.

        The file is an .npz archive without pickled objects. It is replaced atomically: after a failure the old
        one is still there.

        Parameters
        ----------
        path : str or path-like

        Raises
        ------
        InputError
            The name of a client or expert cannot be stored.
        OSError
            The file cannot be written.
        """
        state = self.state_dict()
        write_archive(path, state["arrays"], state["metadata"])

    @classmethod
    def load(cls, path: PathLike) -> Self:
        """Make the scheduler that `save` saved: from here on it plans as the saved one would have.

        Parameters
        ----------
        path : str or path-like

        Returns
        -------
        Scheduler
            Of this class. `fedmoe_sched.policies.load_policy` finds the class by itself.

        Raises
        ------
        StateFileError
            The file is corrupted, truncated, of another version or of another policy.
        OSError
            There is no such file.
        """
        arrays, metadata = read_archive(path)
        try:
            loaded = cls(stored_experts(metadata, cls.name), **metadata["options"])
            loaded.load_state_dict({"arrays": arrays, "metadata": metadata})
        except (InputError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
            msg = f"{os.fspath(path)}: not a state that {cls.__name__} can load: {reason}"
            raise StateFileError(msg) from error
        return loaded

    def _opened_round(self, method: str) -> OpenRound:
        if self._open is None:
            msg = f"{method}: no round is open; plan() comes first"
            raise InputError(msg)
        return self._open

    def _refuse_profile_without_cost(self, name: Hashable, profile: CapacityProfile | None) -> None:
        if profile is not None and self._options.expert_cost is None:
            msg = f"client {name!r}: profile: the scheduler needs expert_cost to use it"
            raise InputError(msg)

    def _add_new(self, names: list[Hashable]) -> None:
        self._fitness.add(len(names))
        self._variables.add(len(names))
        self._clients.add(names)

    def _learn_clients(self, names: tuple[Hashable, ...], updates: Mapping[int, ClientUpdate]) -> None:
        """Take in the new names and the news of a plan that succeeded."""
        rows = self._clients.numbers(names)
        self._add_new([names[position] for position in np.flatnonzero(rows < 0).tolist()])
        if updates:
            rows = self._clients.numbers(names)
            for position, update in updates.items():
                self._clients.apply(int(rows[position]), update)
