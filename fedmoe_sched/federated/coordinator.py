"""The server's side of a run whose clients train somewhere else: plan, aggregate, report, evaluate, checkpoint.

It knows neither an engine nor a network. Whoever moves the messages gets from `Coordinator.questions` what to ask
clients, from `Coordinator.plan` who trains what, and hands what came back to `Coordinator.close`. Settings, run
folder, seeds, methods and checkpoints are those of the loop on one machine (`fedmoe_sched.federated.simulation`):
where all clients answer, both give the same run, bit for bit, and either goes on with a run that the other began.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.aggregate import Aggregation, Rejection, expert_of
from fedmoe_sched.federated.bookkeeping import Laps, Stream, round_random
from fedmoe_sched.federated.client import LocalResult
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.cost import is_trained, model_cost
from fedmoe_sched.federated.methods import Brief
from fedmoe_sched.federated.runs import RunFolder
from fedmoe_sched.federated.server import Record, Server
from fedmoe_sched.federated.signals import LARGEST, signal_fault
from fedmoe_sched.federated.workers import ClientJob, ClientQuestion
from fedmoe_sched.scores import CapacityProfile

__all__ = ["ClientOffer", "Coordinator", "NobodyToldError"]


class NobodyToldError(InputError):
    """A round cannot be planned: no client told what the policy asks for."""


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
    """A round between plan and close; `unheard` and `faulty` are clients that were asked in vain."""

    number: int
    assigned: dict[str, list[int]]
    briefs: dict[str, Brief]
    clock: Laps
    asked_bytes: int
    unheard: dict[str, str]
    faulty: list[Rejection]


class Coordinator(Server):
    """One global model, one policy and one run folder.

    A round is `questions`, `plan`, `close`. What is personal to clients under some methods (a gate, an expert) is
    held here, and goes to the client and back with its task.

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
        super().__init__(config, RunFolder(run_dir))
        self._least = min_replies
        cost = model_cost(self.sizes, config.local, config.devices, self.method.is_personal)
        self.make_policy({"expert_cost": cost, "deadline": deadline})
        self._open: _OpenRound | None = None
        self._asking = Laps()
        self.begin(resume=resume)

    # One round -----------------------------------------------------------------------------------------------

    def questions(self, available: Collection[str]) -> list[ClientQuestion]:
        """Return what to ask of which clients before `plan`; nothing for most policies.

        Parameters
        ----------
        available : collection of str
            Those that `plan` will get.

        Raises
        ------
        InputError
            A client that is not among `names`.
        """
        self._asking = Laps()
        return self.questions_to([self.numbers[name] for name in self._drawn(available)])

    def plan(
        self,
        available: Mapping[str, ClientOffer],
        answers: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        unanswered: Mapping[str, str] | None = None,
    ) -> list[ClientJob]:
        """Open a round: decide which of the available clients train which experts.

        Parameters
        ----------
        available : mapping of client name to ClientOffer
            At least one of `names`. With ``clients.participation`` below 1 a share of them is drawn.
        answers : mapping of client name to signals, optional
            To `questions`. Clients whose answer is missing or malformed are left out of the round.
        unanswered : mapping of client name to str, optional
            Why clients have no answer.

        Returns
        -------
        list of ClientJob
            In the order of the clients' numbers; clients without an expert have none.

        Raises
        ------
        InputError
            No client, or one that is not among `names`; a profile that makes no sense.
        NobodyToldError
            No client has told what it was asked for.
        InfeasibleError, NoAssignmentError
            The round cannot be scheduled; only what clients told is kept.
        """
        clock, answers = Laps() if answers is None else self._asking, answers or {}
        drawn = self._drawn(available)
        questions = self.questions_to([self.numbers[name] for name in drawn])
        faults = self._heard(questions, answers, unanswered or {})
        left = [name for name in drawn if name not in faults]
        if not left:
            msg = f"no client told what policy {self.policy.name!r} asks for ({_list(faults)})"
            raise NobodyToldError(msg) if faults else InputError("available: names no client")
        for name in left:
            self._learn_profile(name, available[name].profile)
        capacities = {name: self._capacity_of(name, available[name]) for name in left}
        assigned, briefs = self.decide(capacities, clock)
        unheard = {name: fault for name, fault in faults.items() if name not in answers}
        faulty = [Rejection(name, fault) for name, fault in faults.items() if name in answers]
        number, asked = self.round + 1, self._bytes_of(questions)
        self._open = _OpenRound(number, assigned, briefs, clock, asked, unheard, faulty)
        return [self.job(number, name, brief) for name, brief in briefs.items()]

    def _drawn(self, available: Collection[str]) -> list[str]:
        """Draw who takes part; the first so many of a random order that are there."""
        unknown = [name for name in available if name not in self.numbers]
        if unknown:
            msg = f"available[{unknown[0]!r}]: the run has clients {self.names[0]} to {self.names[-1]}"
            raise InputError(msg)
        n = len(self.names)
        order = round_random(self.config.seed, Stream.DRAWN, self.round + 1).permutation(n).tolist()
        count = max(1, round(self.config.clients.participation * n))
        there = [i for i in order if self.names[i] in available][:count]
        return [self.names[i] for i in sorted(there)]

    def _heard(
        self,
        questions: Sequence[ClientQuestion],
        answers: Mapping[str, Mapping[str, Any]],
        unanswered: Mapping[str, str],
    ) -> dict[str, str]:
        """Take in the answers that make sense; return what is wrong with the others."""
        every, faults = range(self.config.model.experts), {}
        for question in questions:
            name = question.client
            if name not in answers:
                faults[name] = unanswered.get(name, "did not tell what it was asked for")
                continue
            fault = self._signal_fault(question.signals, answers[name], judged=every)
            if fault is None:
                self.hear(question, answers[name])
            else:
                faults[name] = fault
        return faults

    def _signal_fault(
        self, names: Sequence[str], told: Mapping[str, Any], *, judged: Sequence[int], trained: Sequence[int] = ()
    ) -> str | None:
        kinds = self.policy.variables
        return signal_fault(
            names,
            told,
            n_experts=self.config.model.experts,
            n_classes=self.prepared.data.n_classes,
            judged=judged,
            trained=trained,
            least={name: kind.least for name, kind in kinds.items() if kind.least is not None},
        )

    def _learn_profile(self, name: str, profile: CapacityProfile | None) -> None:
        if profile is not None:
            work = len(self.prepared.partition.samples[self.numbers[name]]) * self.config.local.epochs
            self.policy.add_client(name, profile=replace(profile, ms_per_sample=profile.ms_per_sample * work))

    def _capacity_of(self, name: str, offer: ClientOffer) -> int:
        return self.capacity[self.numbers[name]] if offer.capacity is None else offer.capacity

    def parts(self, experts: Collection[int]) -> list[str]:
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
            and what was wrong with its update, or with its answer before the round), ``unanswered`` (client and
            reason), ``enough`` (whether there were as many good updates as `min_replies` asks for) and
            ``bytes_asked`` (parameters that went to clients with questions).

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
        seconds = {str(r.update.client): r.seconds for r in used} if self.config.report_seconds else {}
        closed = self.teach(opened.briefs, used, seconds, counts=enough)
        clock.lap("feedback_seconds")
        self.state = combined.state
        more = {
            "rejected": [str(fault) for fault in (*opened.faulty, *faulty, *combined.rejected)],
            "unanswered": opened.unheard | _reasons(opened, results, unanswered or {}),
            "enough": enough,
            **self._traffic(opened, results),
        }
        record = self.settle(opened.number, opened.assigned, used, closed, more, clock)
        self._open = None
        return record

    def _sorted_out(
        self, opened: _OpenRound, results: Sequence[LocalResult]
    ) -> tuple[list[LocalResult], list[Rejection]]:
        """Keep what policy and method can be told, in the order of the plan; `aggregate` looks at the numbers."""
        good: dict[str, LocalResult] = {}
        faulty = []
        for result in results:
            name = str(result.update.client)
            fault = "sent two updates" if name in good else self._fault(result, opened.briefs.get(name))
            if fault is None:
                good[name] = result
            else:
                faulty.append(Rejection(name, fault))
        return [good[name] for name in opened.briefs if name in good], sorted(faulty, key=str)

    def _fault(self, result: LocalResult, brief: Brief | None) -> str | None:
        """Say why a result cannot be used; None if it can."""
        if brief is None:
            return "no expert was assigned to it"
        return (
            _feedback_fault(result, brief.trained)
            or self._parameter_fault(result, brief.trained)
            or self._signal_fault(
                self.signals("after"), result.update.signals, judged=brief.judged, trained=brief.trained
            )
        )

    def _parameter_fault(self, result: LocalResult, trained: Sequence[int]) -> str | None:
        """Say which parameter is missing, or was not to be trained; methods rely on both."""
        sent = result.update.parameters
        for name in self.state:
            due = is_trained(name, trained, self.config.local)
            if due and name not in sent:
                return f"lacks the parameter {name!r}"
            if not due and name in sent and expert_of(name) is None:
                return f"parameter {name!r}: was not to be trained"
        return None

    def _combined(self, opened: _OpenRound, good: Sequence[LocalResult]) -> tuple[bool, Aggregation]:
        """Merge; with too few good updates model and method stay as they are."""
        before = self.method.arrays()
        updates = [result.update for result in good]
        combined = self.method.merge(self.state, updates, opened.briefs, self.policy)
        enough = len(good) - len(combined.rejected) >= self._least
        if enough:
            return enough, combined
        self.method.restore(before)
        return enough, replace(combined, state=self.state, expert_samples={})

    def _traffic(self, opened: _OpenRound, results: Sequence[LocalResult]) -> dict[str, int]:
        """Count the bytes of the parameters that were sent, down to all that were planned, up as they came."""
        briefs = opened.briefs.values()
        down = sum(self.sizes[part] for b in briefs for part in self.parts({*b.experts, *b.judged}))
        up = sum(self.sizes.get(part, 0) for result in results for part in result.update.parameters)
        return {"bytes_down": down, "bytes_up": up, "bytes_saved": 0, "bytes_asked": opened.asked_bytes}

    def _bytes_of(self, questions: Sequence[ClientQuestion]) -> int:
        return sum(self.sizes[part] for question in questions for part in self.parts(question.experts))


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


def _feedback_fault(result: LocalResult, trained: Sequence[int]) -> str | None:
    """Say why the policy cannot be told of a result; None if it can."""
    return next(_feedback_faults(result, trained), None)


def _feedback_faults(result: LocalResult, trained: Sequence[int]) -> Iterator[str]:
    weights = result.update.expert_samples
    for name, values in {"expert_samples": weights, "rewards": result.rewards}.items():
        if set(values) != set(trained):
            yield f"{name} of experts {sorted(values)}, but {sorted(trained)} were assigned to it"
        for expert, value in values.items():
            if not math.isfinite(value):
                yield f"{name} of expert {expert} = {value}: must be finite"
    # Methods may put other weights in the place of these before anybody looks at them.
    for expert, count in weights.items():
        if count < 0:
            yield f"samples of expert {expert} = {count}: must be finite and >= 0"
    for what, numbers in {
        "samples": (result.update.samples, *weights.values()),
        "rewards": result.rewards.values(),
    }.items():
        if not max(map(abs, numbers)) <= LARGEST:
            yield f"claims {what} of more than 2**53"
    if not math.isfinite(result.loss):
        yield f"loss = {result.loss}: must be finite"
    if not (math.isfinite(result.seconds) and result.seconds >= 0):
        yield f"seconds = {result.seconds}: must be finite and >= 0"


def _reasons(opened: _OpenRound, results: Sequence[LocalResult], unanswered: Mapping[str, str]) -> dict[str, str]:
    """Name every planned client without a result, with the reason where one is known."""
    answered = {str(result.update.client) for result in results}
    return {name: unanswered.get(name, "no answer") for name in opened.briefs if name not in answered}


def _list(faults: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {fault}" for name, fault in faults.items())
