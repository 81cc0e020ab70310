"""The round loop on one machine: plan, local training, aggregation, report, evaluation.

The loop knows a policy (`fedmoe_sched.policies.Policy`), never a solver. All randomness comes from the seed of the
run and the number of the round, and checkpoints hold the rest of the state: a run that is killed and resumed gives
the same metrics, apart from measured times, as one that is not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.bookkeeping import Arrays, Laps, Stream, round_random
from fedmoe_sched.federated.client import LocalResult
from fedmoe_sched.federated.clock import Gathering, Outcome, SimulatedClock
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.cost import model_cost
from fedmoe_sched.federated.devices import draw_devices
from fedmoe_sched.federated.methods import Brief, work_of
from fedmoe_sched.federated.runs import Run, RunFolder, read_run
from fedmoe_sched.federated.server import Record, Server
from fedmoe_sched.federated.workers import LocalTrainer, client_pool
from fedmoe_sched.scores import profile_table

__all__ = ["Callback", "RunResult", "run_training"]

Callback = Callable[[Record], None]


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Parameters
    ----------
    run : Run
        The run folder, read back.
    state : dict of str to Tensor
        Global parameters after the last round, on the CPU.
    """

    run: Run
    state: dict[str, Tensor]

    @property
    def records(self) -> tuple[Record, ...]:
        """One per round."""
        return self.run.records


def run_training(
    config: TrainConfig,
    run_dir: str | os.PathLike[str],
    *,
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
) -> RunResult:
    """Train a global Mixture-of-Experts model with one policy.

    Parameters
    ----------
    config : TrainConfig
    run_dir : path
        Folder of the run, see `fedmoe_sched.federated.runs`.
    resume : bool
        Go on after the last checkpoint, if there is one. The settings must be those of the run; ``rounds`` may
        be larger, ``workers`` and where the data lie may differ.
    callbacks : sequence of callable
        Called with the record of every round, once it is on disk.

    Returns
    -------
    RunResult

    Raises
    ------
    InputError
        Wrong settings, a run folder that is in use, or missing data.
    StateFileError
        The checkpoint is corrupted.
    InfeasibleError, NoAssignmentError
        A round cannot be scheduled; the run can be resumed.
    WorkerError
        A worker process died; the run can be resumed.
    """
    folder = RunFolder(run_dir)
    with _torch_threads(config.threads), contextlib.ExitStack() as held:
        loop = _Loop(config, folder)
        held.enter_context(folder.locked())
        loop.begin(resume=resume)
        with loop.pool:
            while loop.round < config.rounds:
                record = loop.next_round()
                for callback in callbacks:
                    callback(record)
    return RunResult(read_run(folder.path), {name: value.cpu() for name, value in loop.state.items()})


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Loop(Server):
    """The server, with clients that are trained here, on simulated devices."""

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        super().__init__(config, folder)
        data, partition = self.prepared.data, self.prepared.partition
        self.devices = draw_devices(
            config.devices, config.clients.count, seed=config.seed, data_dir=config.data.dir
        )
        self.clock = self._new_clock()
        # Options of the config come on top: a policy may be made to misjudge or to ignore the devices.
        policy = self.make_policy(self.clock.policy_options())
        for i, profile in enumerate(self.clock.profiles):
            policy.add_client(self.names[i], capacity=self.capacity[i], profile=profile)
        self.trainer = LocalTrainer(config, data, partition.samples)
        self.pool = client_pool(config, data, partition.samples)

    def _new_clock(self) -> SimulatedClock:
        config = self.config
        return SimulatedClock(
            model_cost(self.sizes, config.local, config.devices, self.method.is_personal),
            config.model.experts,
            samples=[len(rows) * config.local.epochs for rows in self.prepared.partition.samples],
            devices=self.devices,
            deadline=config.devices.deadline,
            min_available=config.devices.min_available,
        )

    def client_arrays(self) -> Arrays:
        """Return what figures need to know of the clients, the profiles of their devices included."""
        profiles = {} if self.devices is None else {"profiles": profile_table(self.devices.profiles)}
        return {**super().client_arrays(), **profiles}

    # One round -----------------------------------------------------------------------------------------------

    def next_round(self) -> Record:
        """Run a round and put its record, its arrays and a checkpoint on disk."""
        number = self.round + 1
        clock = Laps()
        gathering = self.clock.gather(self._drawn(number))
        for question in self.questions_to(gathering.clients):
            self.hear(question, self.trainer.answer(self.state, question))
        capacities = {self.names[i]: self.capacity[i] for i in gathering.clients}
        assigned, briefs = self.decide(capacities, clock)
        outcome = self._simulate(number, gathering, briefs)
        # Nobody would see what the others learn: it costs no time to simulate.
        working = [name for name, answered in zip(briefs, outcome.answered.tolist(), strict=True) if answered]
        results = self.pool.train(self.state, [self.job(number, name, briefs[name]) for name in working])
        clock.lap("train_seconds")
        combined = self.method.merge(self.state, [result.update for result in results], briefs, self.policy)
        self.state = combined.state
        clock.lap("aggregate_seconds")
        rejected = {rejection.client for rejection in combined.rejected}
        used = [result for result in results if result.update.client not in rejected]
        closed = self.teach(briefs, used, self._seconds(list(briefs), outcome, results))
        clock.lap("feedback_seconds")
        saved = sum(float(self.clock.expert_bytes[list(brief.kept)].sum()) for brief in briefs.values())
        faults = [str(rejection) for rejection in combined.rejected]
        more = {"rejected": faults, **outcome.record, "bytes_saved": round(saved)}
        return self.settle(number, assigned, results, closed, more, clock)

    def _drawn(self, number: int) -> list[int]:
        """Draw who may take part: a share of all clients, whether available or not."""
        n = len(self.names)
        count = max(1, round(self.config.clients.participation * n))
        if count == n:
            return list(range(n))
        return sorted(self._random(Stream.DRAWN, number).permutation(n)[:count].tolist())

    def _simulate(self, number: int, gathering: Gathering, briefs: Mapping[str, Brief]) -> Outcome:
        """Find out who answers, before anybody trains."""
        n, clients = len(self.names), [self.numbers[name] for name in briefs]
        work = work_of(list(briefs.values()), self.config.model.experts)
        failed = self._random(Stream.FAILED, number).random(n) < self.config.clients.failure_rate
        factor = np.exp(self.config.devices.jitter * self._random(Stream.JITTER, number).standard_normal(n))
        return self.clock.run(gathering, clients, work, failed[clients], factor[clients])

    def _seconds(
        self, planned: Sequence[str], outcome: Outcome, results: Sequence[LocalResult]
    ) -> dict[str, float]:
        """Return the round times that the policy is told."""
        if outcome.seconds is not None:
            return dict(zip(planned, outcome.seconds.tolist(), strict=True))
        if self.config.report_seconds:
            return {str(result.update.client): result.seconds for result in results}
        return {}

    def _random(self, purpose: Stream, number: int) -> np.random.Generator:
        return round_random(self.config.seed, purpose, number)

    # Checkpoints ---------------------------------------------------------------------------------------------

    def simulated(self) -> dict[str, Any]:
        """Return the simulated time, and what tells these devices from others."""
        return {
            "simulated_time": self.clock.time,
            "devices": None if self.devices is None else self.devices.fingerprint(),
        }

    def restore_simulated(self, metadata: Mapping[str, Any]) -> None:
        """Take back what `simulated` returned.

        Raises
        ------
        InputError
            The run was on other devices.
        """
        if self.devices is not None and metadata["devices"] != self.devices.fingerprint():
            msg = f"run folder {self.folder.path}: was started with other devices (other files of measurements?)"
            raise InputError(msg)
        self.clock.time = metadata.get("simulated_time", 0.0)  # not in runs from before there was a clock
