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
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.aggregate import Aggregation
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
from fedmoe_sched.federated.clock import Gathering, Outcome, SimulatedClock
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.cost import model_cost
from fedmoe_sched.federated.devices import draw_devices
from fedmoe_sched.federated.evaluate import Evaluation, evaluate
from fedmoe_sched.federated.methods import Brief, Method, Setting, make_method, work_of
from fedmoe_sched.federated.methods.cached import CachedExperts, refuse_cache
from fedmoe_sched.federated.model import build_model
from fedmoe_sched.federated.preparation import prepare
from fedmoe_sched.federated.runs import Run, RunFolder, read_run
from fedmoe_sched.federated.signals import experts_needed, observe, refuse_unknown_signals, tell_signals
from fedmoe_sched.federated.workers import ClientJob, client_pool
from fedmoe_sched.policies import Policy, load_policy, make_policy, policy_class
from fedmoe_sched.scores import profile_table

__all__ = ["Callback", "RunResult", "run_training"]

Record = dict[str, Any]
Callback = Callable[[Record], None]

# What belongs to the method, among the arrays of a checkpoint.
_OF_METHOD = "method:"


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
        if resume and folder.config_file.exists():
            config.refuse_to_continue(folder.config_file)
            loop.restore()
            folder.write_config(config.to_toml())
        else:
            folder.begin(config.to_toml())
        loop.write_clients()
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


class _Loop:
    """State and steps of one run; `round` is the number of finished rounds."""

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.device = _device(config.device)
        self.prepared = prepare(config)
        self.data, self.partition = self.prepared.data, self.prepared.partition
        self.capacity = config.clients.capacities()
        self.names = client_names(config.clients.count)
        self.numbers = {name: i for i, name in enumerate(self.names)}
        channels = self.data.train_images.shape[1]
        self.model = build_model(config.model, channels, self.data.n_classes, seed=config.seed).to(self.device)
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.devices = draw_devices(
            config.devices, config.clients.count, seed=config.seed, data_dir=config.data.dir
        )
        self.method = self._new_method()
        self.clock = self._new_clock()
        self.policy = self._new_policy()
        refuse_unknown_signals(self._signals("once", "before", "after"), f"policy {config.policy!r}")
        self.told: set[int] = set()  # clients that have told what they are asked for once
        self.held: list[list[int]] = [[] for _ in self.names]  # of each client, when it was last planned
        self.round = 0
        self.pool = client_pool(config, self.data, self.partition.samples)

    def _new_clock(self) -> SimulatedClock:
        config = self.config
        sizes = {name: value.numel() * value.element_size() for name, value in self.state.items()}
        return SimulatedClock(
            model_cost(sizes, config.local, config.devices, self.method.is_personal),
            config.model.experts,
            samples=[len(rows) * config.local.epochs for rows in self.partition.samples],
            devices=self.devices,
            deadline=config.devices.deadline,
            min_available=config.devices.min_available,
        )

    def _new_method(self) -> Method:
        config = self.config
        setting, clients = Setting(tuple(self.names), config.model.experts), config.clients
        name = policy_class(config.policy).method
        refuse_cache(clients.cache, config.policy, name)
        if clients.cache == "none":
            return make_method(name, setting)
        return CachedExperts(setting, clients.max_staleness if clients.cache == "stale" else None)

    def _signals(self, *times: str) -> tuple[str, ...]:
        """Name what clients are asked for at these times, by the policy and, after training, by the method."""
        asked = [name for when in times for name in self.policy.signals(when)]
        return tuple(dict.fromkeys([*asked, *(self.method.signals if "after" in times else ())]))

    def _new_policy(self) -> Policy:
        config = self.config
        # Options of the config come on top: a policy may be made to misjudge or to ignore the devices.
        options = {"seed": config.seed, **self.clock.policy_options(), **config.policy_options}
        policy = make_policy(config.policy, config.model.experts, **options)
        for i, profile in enumerate(self.clock.profiles):
            policy.add_client(self.names[i], capacity=self.capacity[i], profile=profile)
        return policy

    def write_clients(self) -> None:
        """Write what figures need to know of the clients."""
        from fedmoe_sched._files import write_archive

        arrays = client_arrays(self.partition, self.capacity)
        if self.devices is not None:
            arrays["profiles"] = profile_table(self.devices.profiles)
        write_archive(self.folder.clients_file, arrays, {"names": self.names})

    # One round -----------------------------------------------------------------------------------------------

    def next_round(self) -> Record:
        """Run a round and put its record, its arrays and a checkpoint on disk."""
        number = self.round + 1
        clock = Laps()
        gathering = self.clock.gather(self._drawn(number))
        self._ask(gathering.clients)
        self.method.before_plan(self.policy, self.state, gathering.clients)
        clock.lap("ask_seconds")
        schedule = self.policy.plan({self.names[i]: self.capacity[i] for i in gathering.clients})
        assigned = {str(name): [int(j) for j in experts] for name, experts in schedule.experts_by_client().items()}  # type: ignore[call-overload]
        clock.lap("schedule_seconds")
        briefs = {
            name: self.method.brief(self.numbers[name], experts, self.state)
            for name, experts in assigned.items()
            if experts
        }
        outcome = self._simulate(number, gathering, briefs)
        # Nobody would see what the others learn: it costs no time to simulate.
        working = [name for name, answered in zip(briefs, outcome.answered.tolist(), strict=True) if answered]
        results = self.pool.train(self.state, [self._job(number, name, briefs[name]) for name in working])
        clock.lap("train_seconds")
        combined = self.method.merge(self.state, [result.update for result in results], briefs, self.policy)
        self.state = combined.state
        clock.lap("aggregate_seconds")
        closed = self._report(briefs, results, combined, self._seconds(list(briefs), outcome, results))
        clock.lap("feedback_seconds")
        for name, experts in assigned.items():
            self.held[self.numbers[name]] = experts
        evaluation = self._evaluate()
        clock.lap("evaluate_seconds")
        rejected = [str(rejection) for rejection in combined.rejected]
        learnt = learning_record(results, evaluation)
        saved = sum(float(self.clock.expert_bytes[list(brief.kept)].sum()) for brief in briefs.values())
        sent = {**outcome.record, "bytes_saved": round(saved)}
        record = {**closed, **learnt, "rejected": rejected, **sent, **clock.laps}
        m = self.config.model.experts
        arrays = round_arrays(self.numbers, m, assigned, results, evaluation, self.policy)
        self.folder.write_schedule(number, arrays)
        self._checkpoint(number, self.folder.append(record))
        return record

    def _ask(self, clients: Sequence[int]) -> None:
        """Ask clients for what the policy wants to know before it plans."""
        always = self._signals("before")
        for client in clients:
            names = always if client in self.told else (*self._signals("once"), *always)
            if not names:
                continue
            images, labels = self.prepared.samples_of(client)
            parts = {k: torch.as_tensor(v) for k, v in self.method.personal_parts(client).items()}
            every = range(self.config.model.experts)
            held, judged = experts_needed(names, every, every)
            self.model.load_parts({**self.state, **parts}, {*held, *judged})
            seen = observe(
                self.model,
                torch.from_numpy(images).to(self.device),
                torch.from_numpy(labels).to(self.device),
                held,
                judged,
                n_classes=self.data.n_classes,
            )
            self.policy.tell(self.names[client], tell_signals(names, seen))
            self.told.add(client)

    def _evaluate(self) -> Evaluation:
        views = [self.method.client_view(client, held) for client, held in enumerate(self.held)]
        whole = self.method.global_view()
        return evaluate(self.model, self.state, self.prepared, views, device=self.device, whole=whole)

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

    def _job(self, number: int, name: str, brief: Brief) -> ClientJob:
        client = self.numbers[name]
        seed = (self.config.seed, int(Stream.LOCAL), number, client)
        return ClientJob(name, client, brief, seed, self._signals("after"))

    def _report(
        self,
        briefs: Mapping[str, Brief],
        results: Sequence[LocalResult],
        combined: Aggregation,
        seconds: Mapping[str, float],
    ) -> dict[str, Any]:
        """Feed the policy, in the order of the plan, and close its round."""
        rejected = {str(rejection.client) for rejection in combined.rejected}
        answers = {str(r.update.client): r for r in results if str(r.update.client) not in rejected}
        for name in briefs:
            result = answers.get(name)
            if result is None:
                self.policy.report(name, failed=True)
                continue
            samples = result.update.expert_samples
            feedback = {j: (samples[j], reward) for j, reward in result.rewards.items()}
            self.policy.report(name, feedback, seconds=seconds.get(name))
        record = self.policy.close_round().to_dict()
        asked = self.policy.signals("after")
        for name, result in answers.items():
            if asked:
                self.policy.tell(name, {signal: result.update.signals[signal] for signal in asked})
        return record

    # Checkpoints ---------------------------------------------------------------------------------------------

    def _checkpoint(self, number: int, metrics_bytes: int) -> None:
        arrays: dict[str, npt.NDArray[Any]] = {name: value.cpu().numpy() for name, value in self.state.items()}
        arrays |= {_OF_METHOD + name: value for name, value in self.method.arrays().items()}
        metadata = {
            "metrics_bytes": metrics_bytes,
            "held": self.held,
            "told": sorted(self.told),
            "simulated_time": self.clock.time,
            "devices": None if self.devices is None else self.devices.fingerprint(),
        }
        self.folder.save_checkpoint(number, arrays, metadata, self.policy)
        self.round = number

    def restore(self) -> None:
        """Go back to the latest checkpoint; to the start if there is none."""
        found = self.folder.load_checkpoint()
        if found is None:
            self.folder.rewind(0, 0)
            return
        arrays, metadata, policy_file = found
        state = restored_state(self.state, arrays, policy_file.with_name("model.npz"))
        if self.devices is not None and metadata["devices"] != self.devices.fingerprint():
            msg = f"run folder {self.folder.path}: was started with other devices (other files of measurements?)"
            raise InputError(msg)
        self.clock.time = metadata.get("simulated_time", 0.0)  # not in runs from before there was a clock
        self.state = state
        self.method.restore(
            {name.removeprefix(_OF_METHOD): v for name, v in arrays.items() if name.startswith(_OF_METHOD)}
        )
        self.told = set(metadata.get("told", ()))
        self.policy = load_policy(policy_file)
        self.held, self.round = metadata["held"], metadata["round"]
        self.folder.rewind(self.round, metadata["metrics_bytes"])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        msg = f"device = {name!r}: cannot be used here ({str(error).splitlines()[0]})"
        raise InputError(msg) from error
    return device
