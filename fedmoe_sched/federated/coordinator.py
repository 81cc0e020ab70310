"""The server's side of a run whose clients train somewhere else: plan, aggregate, report, evaluate, checkpoint.

It knows neither an engine nor a network: whoever moves the messages asks `Coordinator.plan` who trains what, and
hands what came back to `Coordinator.close`. Settings, run folder, seeds, aggregation and checkpoints are those of
the loop on one machine (`fedmoe_sched.federated.simulation`): where all clients answer, both give the same run,
bit for bit, and either goes on with a run that the other one began.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_sched._files import write_archive
from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.aggregate import Aggregation, Rejection, aggregate, expert_of
from fedmoe_sched.federated.bookkeeping import (
    Laps,
    Stream,
    client_arrays,
    client_names,
    learning_record,
    restored_state,
    round_arrays,
    round_random,
)
from fedmoe_sched.federated.client import LocalResult
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.cost import model_cost
from fedmoe_sched.federated.evaluate import Evaluation, evaluate
from fedmoe_sched.federated.methods import Brief, View
from fedmoe_sched.federated.model import build_model
from fedmoe_sched.federated.preparation import prepare
from fedmoe_sched.federated.runs import RunFolder
from fedmoe_sched.federated.workers import ClientJob
from fedmoe_sched.policies import load_policy, make_policy
from fedmoe_sched.scheduler import Scheduler
from fedmoe_sched.scores import CapacityProfile

__all__ = ["ClientOffer", "Coordinator"]

Record = dict[str, Any]


@dataclass(frozen=True)
class ClientOffer:
    """What a client says of itself before a round.

    Parameters
    ----------
    capacity : int or None
        The most experts that it takes; None for what the settings say.
    profile : CapacityProfile or None
        Of its device, ``ms_per_sample`` per sample.
    """

    capacity: int | None = None
    profile: CapacityProfile | None = None


@dataclass
class _OpenRound:
    """A round between plan and close."""

    number: int
    assigned: dict[str, list[int]]
    clock: Laps


class Coordinator:
    """One global model, one policy and one run folder.

    Parameters
    ----------
    config : TrainConfig
        ``workers`` is of no effect: every client trains where it is.
    run_dir : path
        See `fedmoe_sched.federated.runs`.
    resume : bool
        Go on after the last checkpoint, if there is one; the settings must be those of the run.
    min_replies : int
        With fewer answers that can be used the model stays as it is.
    deadline : float, optional
        Seconds of a round; policies plan for it where clients tell a profile.

    Attributes
    ----------
    round : int
        Finished rounds.
    state : dict of str to Tensor
        Global parameters.
    names : list of str
        All clients, in the order of their numbers.

    Raises
    ------
    InputError
        Wrong settings, or a run folder that is in use.
    StateFileError
        The checkpoint is corrupted.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: str | os.PathLike[str],
        *,
        resume: bool = False,
        min_replies: int = 1,
        deadline: float | None = None,
    ) -> None:
        _refuse_simulated(config)
        self.config, self.folder = config, RunFolder(run_dir)
        self._least = min_replies
        self._device = torch.device(config.device)
        self._prepared = prepare(config)
        self.names = client_names(config.clients.count)
        self._numbers = {name: i for i, name in enumerate(self.names)}
        self._capacity = config.clients.capacities()
        data = self._prepared.data
        model = build_model(config.model, data.train_images.shape[1], data.n_classes, seed=config.seed)
        self._model = model.to(self._device)
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in self._model.state_dict().items()}
        self.sizes = {name: value.numel() * value.element_size() for name, value in self.state.items()}
        self._policy = self._new_policy(deadline)
        self._held: list[list[int]] = [[] for _ in self.names]
        self.round = 0
        self._open: _OpenRound | None = None
        self._begin(resume=resume)

    def _new_policy(self, deadline: float | None) -> Scheduler:
        config = self.config
        cost = model_cost(self.sizes, config.local, config.devices)
        options = {"seed": config.seed, "expert_cost": cost, "deadline": deadline, **config.policy_options}
        policy = make_policy(config.policy, config.model.experts, **options)
        _refuse_more_than_assignment(policy)
        return policy

    def _begin(self, *, resume: bool) -> None:
        if resume and self.folder.config_file.exists():
            self.config.refuse_to_continue(self.folder.config_file)
            self._restore()
            self.folder.write_config(self.config.to_toml())
        else:
            self.folder.begin(self.config.to_toml())
        arrays = client_arrays(self._prepared.partition, self._capacity)
        write_archive(self.folder.clients_file, arrays, {"names": self.names})

    # One round -----------------------------------------------------------------------------------------------

    def plan(self, available: Mapping[str, ClientOffer]) -> list[ClientJob]:
        """Open a round: decide which of the available clients train which experts.

        Parameters
        ----------
        available : mapping of client name to ClientOffer
            At least one of `names`. With ``clients.participation`` below 1 a share of them is drawn.

        Returns
        -------
        list of ClientJob
            In the order of the clients' numbers; clients without an expert have none.

        Raises
        ------
        InputError
            No client, or one that is not among `names`; a profile that makes no sense.
        InfeasibleError, NoAssignmentError
            The round cannot be scheduled; nothing has changed.
        """
        number, clock = self.round + 1, Laps()
        unknown = [name for name in available if name not in self._numbers]
        if unknown:
            msg = f"available[{unknown[0]!r}]: the run has clients {self.names[0]} to {self.names[-1]}"
            raise InputError(msg)
        drawn = self._drawn(number, available)
        for name in drawn:
            profile = available[name].profile
            if profile is not None:
                work = len(self._prepared.partition.samples[self._numbers[name]]) * self.config.local.epochs
                scaled = replace(profile, ms_per_sample=profile.ms_per_sample * work)
                self._policy.add_client(name, profile=scaled)
        schedule = self._policy.plan({name: self._capacity_of(name, available[name]) for name in drawn})
        assigned = {
            str(name): [int(j) for j in experts]  # type: ignore[call-overload]
            for name, experts in schedule.experts_by_client().items()
        }
        clock.lap("schedule_seconds")
        self._open = _OpenRound(number, assigned, clock)
        return [self._job(number, name, experts) for name, experts in assigned.items() if experts]

    def _drawn(self, number: int, available: Mapping[str, ClientOffer]) -> list[str]:
        """Draw who takes part; the first so many of a random order that are there."""
        n = len(self.names)
        order = round_random(self.config.seed, Stream.DRAWN, number).permutation(n).tolist()
        count = max(1, round(self.config.clients.participation * n))
        there = [i for i in order if self.names[i] in available][:count]
        return [self.names[i] for i in sorted(there)]

    def _capacity_of(self, name: str, offer: ClientOffer) -> int:
        return self._capacity[self._numbers[name]] if offer.capacity is None else offer.capacity

    def _job(self, number: int, name: str, experts: Sequence[int]) -> ClientJob:
        client = self._numbers[name]
        seed = (self.config.seed, int(Stream.LOCAL), number, client)
        return ClientJob(name, client, Brief.plain(experts), seed)

    def parts(self, experts: Sequence[int]) -> list[str]:
        """Name the parameters that a client with these experts needs: theirs, and the shared ones."""
        wanted = {None, *experts}
        return [name for name in self.state if expert_of(name) in wanted]

    def close(self, results: Sequence[LocalResult], *, unanswered: Mapping[str, str] | None = None) -> Record:
        """End the open round with what came back, and put record, arrays and checkpoint on disk.

        Parameters
        ----------
        results : sequence of LocalResult
            In any order: the answer does not depend on it. Updates that are malformed are left out.
        unanswered : mapping of client name to str, optional
            Why clients have no result; those that are in neither count as failed too.

        Returns
        -------
        dict
            The record of the round, as it is in ``metrics.jsonl``. Beside what all runs have: ``rejected`` (client
            and what was wrong with its update), ``unanswered`` (client and reason) and ``enough`` (whether there
            were as many good updates as `min_replies` asks for).

        Raises
        ------
        InputError
            No round is open.
        """
        opened = self._open
        if opened is None:
            msg = "close: no round is open; plan() comes first"
            raise InputError(msg)
        clock = opened.clock
        clock.lap("train_seconds")
        good, faulty = self._sorted_out(opened, results)
        enough, combined = self._combined(opened, good)
        clock.lap("aggregate_seconds")
        left_out = {str(rejection.client) for rejection in combined.rejected}
        used = [result for result in good if result.update.client not in left_out]
        closed = self._report(opened, used, counts=enough)
        clock.lap("feedback_seconds")
        self.state = combined.state
        for name, experts in opened.assigned.items():
            self._held[self._numbers[name]] = experts
        views = [View(tuple(experts)) for experts in self._held]
        evaluation = evaluate(self._model, self.state, self._prepared, views, device=self._device)
        clock.lap("evaluate_seconds")
        record = {
            **closed,
            **learning_record(used, evaluation),
            "rejected": [str(fault) for fault in (*faulty, *combined.rejected)],
            "unanswered": _reasons(opened, results, unanswered or {}),
            "enough": enough,
            **self._traffic(opened, results),
            **clock.laps,
        }
        self._write(opened, record, used, evaluation)
        return record

    def _sorted_out(
        self, opened: _OpenRound, results: Sequence[LocalResult]
    ) -> tuple[list[LocalResult], list[Rejection]]:
        """Keep what the policy can be told, in the order of the plan; `aggregate` looks at the parameters."""
        good: dict[str, LocalResult] = {}
        faulty = []
        for result in results:
            name = str(result.update.client)
            fault = "sent two updates" if name in good else _feedback_fault(result, opened.assigned)
            if fault is None:
                good[name] = result
            else:
                faulty.append(Rejection(name, fault))
        return [good[name] for name in opened.assigned if name in good], sorted(faulty, key=str)

    def _combined(self, opened: _OpenRound, good: Sequence[LocalResult]) -> tuple[bool, Aggregation]:
        combined = aggregate(self.state, [result.update for result in good], assigned=opened.assigned)
        enough = len(good) - len(combined.rejected) >= self._least
        return enough, combined if enough else replace(combined, state=self.state, expert_samples={})

    def _report(self, opened: _OpenRound, used: Sequence[LocalResult], *, counts: bool) -> Record:
        """Feed the policy, in the order of the plan, and close its round.

        In a round without enough answers nothing that was trained entered the model, so no expert was used; what
        the clients found out about the experts they received is true all the same.
        """
        answers = {str(result.update.client): result for result in used}
        for name, experts in opened.assigned.items():
            result = answers.get(name)
            if not experts:
                continue
            if result is None:
                self._policy.report(name, failed=True)
                continue
            samples = result.update.expert_samples
            feedback = {j: (samples[j] if counts else 0.0, result.rewards[j]) for j in experts}
            seconds = result.seconds if self.config.report_seconds else None
            self._policy.report(name, feedback, seconds=seconds)
        return self._policy.close_round().to_dict()

    def _traffic(self, opened: _OpenRound, results: Sequence[LocalResult]) -> dict[str, int]:
        """Count the bytes of the parameters that were sent, down to all that were planned, up as they came."""
        down = sum(self.sizes[part] for e in opened.assigned.values() if e for part in self.parts(e))
        up = sum(self.sizes.get(part, 0) for result in results for part in result.update.parameters)
        return {"bytes_down": down, "bytes_up": up, "bytes_saved": 0}

    # On disk -------------------------------------------------------------------------------------------------

    def _write(
        self, opened: _OpenRound, record: Record, used: Sequence[LocalResult], evaluation: Evaluation
    ) -> None:
        m = self.config.model.experts
        arrays = round_arrays(self._numbers, m, opened.assigned, used, evaluation, self._policy)
        self.folder.write_schedule(opened.number, arrays)
        metadata = {
            "metrics_bytes": self.folder.append(record),
            "held": self._held,
            "simulated_time": 0.0,
            "devices": None,
        }
        state = {name: value.cpu().numpy() for name, value in self.state.items()}
        self.folder.save_checkpoint(opened.number, state, metadata, self._policy)
        self.round, self._open = opened.number, None

    def _restore(self) -> None:
        """Go back to the latest checkpoint; to the start if there is none."""
        found = self.folder.load_checkpoint()
        if found is None:
            self.folder.rewind(0, 0)
            return
        arrays, metadata, policy_file = found
        self.state = restored_state(self.state, arrays, policy_file.with_name("model.npz"))
        self._policy = load_policy(policy_file)
        self._held, self.round = metadata["held"], metadata["round"]
        self.folder.rewind(self.round, metadata["metrics_bytes"])


def _refuse_more_than_assignment(policy: Scheduler) -> None:
    """Refuse policies that change more than the assignment: no message carries what they need yet."""
    asked = [name for when in ("once", "before", "after") for name in policy.signals(when)]
    if policy.method != "shared" or asked:
        what = f"signal {asked[0]!r}" if asked else f"method {policy.method!r}"
        msg = f"policy = {policy.name!r}: needs the {what}, which only training on one machine has"
        raise InputError(msg)


def _refuse_simulated(config: TrainConfig) -> None:
    """Refuse settings of simulated devices and failures: here they are real."""
    if config.devices.source != "none":
        msg = f"devices.source = {config.devices.source!r}: clients elsewhere tell their own profiles; set 'none'"
        raise InputError(msg)
    if config.clients.cache != "none":
        msg = f"clients.cache = {config.clients.cache!r}: clients elsewhere are sent all their experts; set 'none'"
        raise InputError(msg)
    if config.clients.failure_rate:
        msg = f"clients.failure_rate = {config.clients.failure_rate}: clients elsewhere fail by themselves; set 0"
        raise InputError(msg)


def _feedback_fault(result: LocalResult, assigned: Mapping[str, Sequence[int]]) -> str | None:
    """Say why the policy cannot be told of a result; None if it can."""
    experts = assigned.get(str(result.update.client))
    if not experts:
        return "no expert was assigned to it"
    told = {"expert_samples": result.update.expert_samples, "rewards": result.rewards}
    for name, values in told.items():
        if set(values) != set(experts):
            return f"{name} of experts {sorted(values)}, but {sorted(experts)} were assigned to it"
        for expert, value in values.items():
            if not np.isfinite(value):
                return f"{name} of expert {expert} = {value}: must be finite"
    if not max(result.update.samples, *result.update.expert_samples.values()) <= 2**53:
        return "claims more than 2**53 samples"
    if not (np.isfinite(result.seconds) and result.seconds >= 0):
        return f"seconds = {result.seconds}: must be finite and >= 0"
    return None


def _reasons(opened: _OpenRound, results: Sequence[LocalResult], unanswered: Mapping[str, str]) -> dict[str, str]:
    """Name every planned client without a result, with the reason where one is known."""
    answered = {str(result.update.client) for result in results}
    missing = (name for name, experts in opened.assigned.items() if experts and name not in answered)
    return {name: unanswered.get(name, "no answer") for name in missing}
