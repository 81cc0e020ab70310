"""The stateful round loop around ``schedule()``: plan, report, close the round; save and load."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._clients import ClientUpdate, as_client_update, as_client_updates
from fedmoe_sched._copies import learned_copies
from fedmoe_sched._fairness import gains, learned_fairness, selected_fairly
from fedmoe_sched._names import check_names
from fedmoe_sched._scheduler_core import SchedulerCore
from fedmoe_sched._scheduler_layers import able_clients, own_bounds
from fedmoe_sched._scheduler_options import ranged_option
from fedmoe_sched._selecting import learned_selection, selected
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.metrics import jain_index
from fedmoe_sched.result import Schedule
from fedmoe_sched.rounds import (
    ClientReport,
    LabelledMatrix,
    OpenRound,
    RoundRecord,
    RoundReports,
    labelled_answer,
    plan_summary,
)
from fedmoe_sched.schedule import schedule
from fedmoe_sched.scores.capacity import CapacityProfile, ExpertCost
from fedmoe_sched.scores.fairness import FairnessOptions
from fedmoe_sched.scores.fitness import FitnessOptions
from fedmoe_sched.scores.selection import SelectionOptions
from fedmoe_sched.scores.usage import UsageOptions
from fedmoe_sched.solver import Solver

__all__ = ["Scheduler"]


class Scheduler(SchedulerCore):
    """Decides round after round which client trains which experts, and learns from what comes back.

    One round is `plan`, any number of `report`, `close_round`. Every method either does all of its work or raises
    and leaves the state as it was. Clients are known by name; they may appear, disappear and come back.

    Parameters
    ----------
    experts : int or sequence of hashable
        m, for experts 0..m-1, or the names of the experts.
    default_capacity : int, default 1
        Experts per round of a client with neither capacity nor profile.
    expert_cost : ExpertCost or mapping of its fields, optional
        Sizes and work of the experts; needed for clients with a profile.
    default_profile : CapacityProfile or mapping of its fields, optional
        For clients without a profile of their own: together with observed round times it estimates theirs.
    deadline : float, optional
        Seconds that a client's round may take, by its profile; None is no limit.
    correction_rate : float, default 0.3
        How fast observed round times correct profiles, see `fedmoe_sched.scores.corrected_speed`. The correction
        of a client that could train nothing for its correction alone goes back towards 1 with a third of this
        rate per round, so that it is tried again.
    fitness : FitnessOptions or mapping of its fields, optional
    usage : UsageOptions or mapping of its fields, optional
    seed : int, default 0
        Of everything random. Each round has its own seed made of this one and the round's number, so that a plan
        does not depend on how often planning failed before it.
    fitness_weight, usage_weight, balance, load_min, load_max, fill, solver, time_limit, certify, soft
        As in `fedmoe_sched.schedule`; with `soft` rounds whose bounds exclude one another take place.
    selection : SelectionOptions or mapping of its fields, optional
        Plan only so many of the available clients, chosen by Oort's utility; they are asked for the signal
        ``oort_utility``. None plans all.
    switching_cost : float or array_like of shape (m,), default 0.0
        As in `fedmoe_sched.schedule`, for experts that `held_by` does not name.
    max_staleness : int, optional
        Rounds up to which what a client holds counts as held though others have changed the expert since, 0 or
        more: where older copies are sent anew, `switching_cost` is paid for them. None is no limit.
    fairness : FairnessOptions or mapping of its fields, optional
        What clients and experts are guaranteed over time: who is owed gains fitness for the plan, and goes first
        in a `selection`. It bites where clients compete: with a selection, or with ``fill=False`` and load bounds.
    layers : ExpertLayers or mapping of its fields, optional
        Which experts are in which layer, in the order of `experts`, and how many of each layer clients train;
        bounds of single clients go to `add_client`. A client whose capacity or eligible experts fall short of what
        its layers demand takes no part in the round, like one of capacity 0.

    Raises
    ------
    InputError
        A wrong option; the message names it.

    Examples
    --------
    >>> scheduler = Scheduler(2, balance=0)
    >>> answer = scheduler.plan(["anna", "ben", "carl", "dora"])
    >>> for client, experts in answer.experts_by_client().items():
    ...     scheduler.report(client, {expert: (100, 0.5) for expert in experts})
    >>> record = scheduler.close_round()
    >>> record.loads, record.failed, scheduler.usage.tolist()
    ((2, 2), (), [60.0, 60.0])
    """

    def __init__(
        self,
        experts: int | Iterable[Hashable],
        *,
        default_capacity: int = 1,
        expert_cost: ExpertCost | Mapping[str, Any] | None = None,
        default_profile: CapacityProfile | Mapping[str, Any] | None = None,
        deadline: float | None = None,
        correction_rate: float = 0.3,
        fitness: FitnessOptions | Mapping[str, Any] | None = None,
        usage: UsageOptions | Mapping[str, Any] | None = None,
        seed: int = 0,
        fitness_weight: float = 1.0,
        usage_weight: float = 0.1,
        balance: float | None = 0.25,
        load_min: Any = None,
        load_max: Any = None,
        fill: bool = True,
        solver: str | Solver[Any] = "auto",
        time_limit: float | None = None,
        certify: bool = False,
        selection: SelectionOptions | Mapping[str, Any] | None = None,
        switching_cost: float | npt.ArrayLike = 0.0,
        fairness: FairnessOptions | Mapping[str, Any] | None = None,
        layers: ExpertLayers | Mapping[str, Any] | None = None,
        soft: bool = False,
        max_staleness: int | None = None,
    ) -> None:
        super().__init__(
            experts,
            default_capacity=default_capacity,
            expert_cost=expert_cost,
            default_profile=default_profile,
            deadline=deadline,
            correction_rate=correction_rate,
            fitness=fitness,
            usage=usage,
            seed=seed,
            fitness_weight=fitness_weight,
            usage_weight=usage_weight,
            balance=balance,
            load_min=load_min,
            load_max=load_max,
            fill=fill,
            solver=solver,
            time_limit=time_limit,
            certify=certify,
            selection=selection,
            switching_cost=switching_cost,
            fairness=fairness,
            layers=layers,
            soft=soft,
            max_staleness=max_staleness,
        )

    def add_client(
        self,
        name: Hashable,
        *,
        capacity: int | None = None,
        profile: CapacityProfile | None = None,
        eligible: Iterable[Hashable] | None = None,
        fitness: Mapping[Hashable, float] | npt.ArrayLike | None = None,
        rate: float | None = None,
        layer_min: npt.ArrayLike | None = None,
        layer_max: npt.ArrayLike | None = None,
    ) -> None:
        """Add a client, or change what is known of one. What is left out stays as it is.

        Parameters
        ----------
        name : hashable
            To be stored in a file it must be text, a number, bool, bytes, None, or a tuple of these.
        capacity : int, optional
            The most experts it may train per round. With a profile too, the smaller number holds.
        profile : CapacityProfile, optional
            Replaces an earlier one.
        eligible : iterable of expert names, optional
            The only experts that it may train.
        fitness : mapping of expert to float, or array_like of shape (m,), optional
            Replaces the fitness of the experts that are named.
        rate : float, optional
            In [0, 1]: its own guaranteed share of rounds, in place of `FairnessOptions.client_rate`.
        layer_min, layer_max : int or array_like of int, shape (G,), optional
            The fewest and the most experts of each layer that it trains, in place of those that all clients have
            in common.

        Raises
        ------
        InputError
            A wrong argument; nothing was changed.
        """
        check_names("name", [name])
        row = int(self._clients.numbers([name])[0])
        mask = None if eligible is None else self._experts.mask(f"client {name!r}: eligible", eligible)
        self._refuse_profile_without_cost(name, profile)
        if rate is not None:
            if self._options.fairness is None:
                msg = f"client {name!r}: rate: the scheduler needs fairness to use it"
                raise InputError(msg)
            rate = ranged_option(f"client {name!r}: rate", rate, 0, 1)
        count = None if capacity is None else as_client_update("capacity", capacity).capacity
        own = own_bounds(
            name, row, {"layer_min": layer_min, "layer_max": layer_max}, self._options.layers, self._variables
        )
        values = None
        if fitness is not None:
            values = self._experts.values(f"client {name!r}: fitness", fitness, self._fitness.of([row])[0])
        if row < 0:
            self._add_new([name])
            row = len(self._clients) - 1
        self._clients.apply(row, ClientUpdate(count, profile, mask))
        if values is not None:
            self._fitness.put(row, values)
        if rate is not None:
            self._variables.put_row(row, {"fair_rate": np.array(rate)})
        self._variables.put_row(row, own)

    def plan(
        self, available_clients: Iterable[Hashable] | Mapping[Hashable, int | CapacityProfile | None]
    ) -> Schedule:
        """Decide which of the available clients train which experts, and open the round.

        Parameters
        ----------
        available_clients : iterable of hashable, or mapping of hashable to int, CapacityProfile or None
            Names; those not known yet are added with the prior. The values of a mapping are news of capacity or
            profile, kept from then on as by `add_client`; None is no news.

        Returns
        -------
        Schedule
            With the names of clients and experts; with a `selection` only of the clients that were chosen.

        Raises
        ------
        InputError
            No client, a name twice, a wrong value, or a round is open already.
        InfeasibleError
            Bounds exclude one another; the message names clients and experts.
        NoAssignmentError
            The backend found nothing within its limits.
        """
        start = time.perf_counter()
        if self._open is not None:
            msg = f"plan: round {self._round + 1} is still open; close_round() or cancel_round() comes first"
            raise InputError(msg)
        names = check_names("available_clients", available_clients)
        if not names:
            msg = "available_clients: names no client"
            raise InputError(msg)
        updates = as_client_updates(names, available_clients)
        for position, update in updates.items():
            self._refuse_profile_without_cost(names[position], update.profile)
        rows = self._clients.numbers(names)
        capacity, eligible = self._clients.limits(rows, updates, self._options.rules)
        layers = self._layers_at(rows)
        if layers is not None:
            capacity = np.where(able_clients(capacity, eligible, layers), capacity, 0)
        available, new_names, able = len(names), names, able_clients(capacity, eligible)
        if self._options.selection is not None:
            chosen = self._selected(rows, capacity, updates)
            names, rows, capacity = tuple(names[i] for i in chosen.tolist()), rows[chosen], capacity[chosen]
            eligible = None if eligible is None else eligible[chosen]
        bare = self._fitness.of(rows)
        fitness = bare + self._fitness.bonus(rows) if self._fitness.options.exploration else bare
        if self._options.fairness is not None:
            fitness = fitness + gains(self._variables, rows, self._options.fairness)
        answer = self.decide(
            fitness, self.usage, capacity, eligible, clients=names, seed=self.round_seed(), warm_start=self._prices
        )
        answer = labelled_answer(answer, names, self.experts)
        summary = plan_summary(answer, bare, capacity, eligible)
        summary |= {"available": available, **self._switching(names, answer)}
        self._learn_clients(new_names, updates)
        summary["plan_seconds"] = time.perf_counter() - start
        self._open = OpenRound.of(self._clients.numbers(names), answer, summary)
        if self._options.fairness is not None:
            self._open.able = self._clients.numbers(new_names)[able]
        return answer

    def decide(
        self,
        fitness: FloatArray,
        usage: FloatArray,
        capacity: IntArray,
        eligible: BoolArray | None,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
        warm_start: FloatArray | None,
    ) -> Schedule:
        """Make the decision of one round; policies override this, and `learned_variables` if they keep state.

        Parameters
        ----------
        fitness : ndarray, shape (k, m)
            Of the available clients, exploration bonus included.
        usage : ndarray, shape (m,)
        capacity : ndarray, shape (k,), int64
        eligible : ndarray, shape (k, m), bool, or None
        clients : tuple of hashable
            Names of the k clients.
        seed : int
            Of this round.
        warm_start : ndarray, shape (m,), or None
            Prices of the last closed round.

        Returns
        -------
        Schedule
            Of shape (k, m); with the names of `clients` and `experts` as labels.
        """
        return schedule(
            LabelledMatrix(fitness, clients, self.experts),
            usage,
            capacity,
            eligible=eligible,
            seed=seed,
            warm_start=warm_start,
            held=self._held(clients),
            layers=self.layers_of(clients, capacity),
            **self._options.schedule_arguments(),
        )

    def report(
        self,
        client: Hashable,
        results: Mapping[Any, tuple[float, float]] | None = None,
        *,
        seconds: float | None = None,
        failed: bool = False,
    ) -> None:
        """Take in what one client of the open round sent back.

        Parameters
        ----------
        client : hashable
        results : mapping of expert to (samples, reward), optional
            Feedback on experts that were assigned to the client: samples it trained them on, >= 0, and the
            reward, finite. An expert that is left out got no feedback: its fitness is left as idle.
        seconds : float, optional
            How long the client's round took; corrects its profile.
        failed : bool, default False
            The client failed, and has no results. So do clients that never report.

        Raises
        ------
        InputError
            No round is open, the client is unknown, not in this round or reported before, or a value is wrong;
            the message names it and nothing was changed.
        """
        opened = self._opened_round("report")
        position = opened.position(self._clients.number(client))
        if position is None:
            msg = f"client {client!r}: is not part of round {self._round + 1}"
            raise InputError(msg)
        if position in opened.reports:
            msg = f"client {client!r}: has reported already in round {self._round + 1}"
            raise InputError(msg)
        assigned = {self.experts[j]: j for j in opened.experts_at(position)}
        results = {} if results is None else results
        opened.reports[position] = ClientReport.checked(client, results, assigned, seconds, failed=failed)

    def tell(self, client: Hashable, signals: Mapping[str, Any]) -> None:
        """Take in what a client says of itself; it holds at once, whether a round is open or not.

        Parameters
        ----------
        client : hashable
            One that is not known yet is added.
        signals : mapping of str to float or array_like
            By the names that `signals` returns: one number for a variable per client, m for one per pair, in the
            order of `experts` (NaN where the client cannot tell), and any number, the same for all clients, for a
            vector.

        Raises
        ------
        InputError
            A name that the policy does not ask for, a wrong shape or value; nothing was changed.
        """
        check_names("client", [client])
        row = int(self._clients.numbers([client])[0])
        try:
            told = self._variables.told(row, signals)
        except InputError as error:
            msg = f"client {client!r}: {error}"
            raise InputError(msg) from error
        if row < 0:
            self._add_new([client])
            row = len(self._clients) - 1
        self._variables.put_row(row, {**told, **self.learned_signals(row, told)})

    def learned_signals(self, client: int, told: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """Return what a client's variables become by what it tells; by default just that.

        Parameters
        ----------
        client : int
            Row of the client in a variable per client or pair.
        told : mapping of str to ndarray
            Checked; of shape (), (m,) or (w,).

        Returns
        -------
        mapping of str to array_like
            New rows of any of the policy's variables per client, pair or vector; what is told and left out here
            becomes what was told.
        """
        return {}

    def close_round(self) -> RoundRecord:
        """End the round: learn fitness, usage and speeds from the reports, and count who did not report as failed.

        Available clients that only their speed correction kept out of the round are held to be a little faster
        from then on, see `correction_rate`.

        Returns
        -------
        RoundRecord

        Raises
        ------
        InputError
            No round is open.
        """
        opened = self._opened_round("close_round")
        reports = opened.gathered()
        m = len(self.experts)
        work = np.bincount(reports.experts, weights=reports.samples, minlength=m)
        seconds = np.where(reports.answered, reports.seconds, np.nan)
        speeds = self._clients.learned_speeds(
            opened.clients,
            opened.pairs,
            seconds,
            self._options.rules,
            self._options.correction_rate,
            self._layers_at(opened.clients),
        )
        variables = self._variables.checked(self.learned_variables(opened, reports))
        if self._options.selection is not None:
            variables |= learned_selection(self._variables, opened.clients, reports, self._round + 1)
        if self._options.fairness is not None:
            variables |= learned_fairness(self._variables, opened, reports, self._options.fairness)
        if self._options.max_staleness is not None:
            oldest = self._options.max_staleness
            variables |= learned_copies(self._variables, opened, reports, self._round + 1, oldest)
        trained = reports.answered & (opened.pairs.counts > 0)
        self._variables.put(variables)
        self._usage.update(work)
        self._trained = self._trained + np.bincount(reports.experts, minlength=m)
        self._fitness.update(opened.clients[reports.positions], reports.experts, reports.rewards)
        self._clients.correction[opened.clients] = speeds
        self._clients.answered[opened.clients[trained]] += 1
        self._clients.hold(opened.clients, opened.pairs, reports.answered)
        self._round += 1
        self._prices, self._open = opened.prices, None
        return RoundRecord.of(
            opened,
            reports,
            self._clients.names,
            round=self._round,
            policy=self.name,
            usage=tuple(self.usage.tolist()),
            client_jain=jain_index(self._clients.answered),
            expert_jain=jain_index(self._trained),
        )

    def learned_variables(self, opened: OpenRound, reports: RoundReports) -> Mapping[str, npt.ArrayLike]:
        """Return what the `variables` become by the round that closes; policies with variables override this.

        Called by `close_round` before anything changes: fitness, usage and the variables are those of the plan.
        A round that is cancelled never gets here.

        Parameters
        ----------
        opened : OpenRound
            The plan: ``opened.pairs`` of shape (k, m), and ``opened.clients``, the row of each of the k available
            clients in a variable per client or pair.
        reports : RoundReports
            What came back, pair by pair; clients of the plan that did not report count as failed.

        Returns
        -------
        mapping of str to array_like
            Whole new arrays, of the shape that `variable` returns; what is left out stays as it is.
        """
        return {}

    # Private parts ---------------------------------------------------------------------------------------------

    def _selected(self, rows: IntArray, capacity: IntArray, updates: Mapping[int, ClientUpdate]) -> IntArray:
        """Return the positions of the clients that take part.

        Those that can train nothing take no place, and stay in the round: their speed correction may relax.
        """
        able = np.flatnonzero(capacity > 0)
        seconds = self._clients.estimated_seconds(rows, updates, self._options.rules)[able]
        seed = self.round_seed()
        choose = selected if self._options.fairness is None else selected_fairly
        chosen = choose(self._variables, rows[able], seconds, self._round + 1, self._options.selection, seed)
        return np.sort(np.concatenate([able[chosen], np.flatnonzero(capacity <= 0)]))
