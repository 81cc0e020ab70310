"""Federated Mixture-of-Experts training on NVFlare: a workflow that plans, and an executor that trains.

Both are thin: what a round is, is in `fedmoe_sched.federated.coordinator`, what a client does, in
`fedmoe_sched.federated.workers`. Sites have the names of the run's clients, ``client-0``, ``client-1``, ...
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from nvflare.apis.client import Client
from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.job_config.api import FedJob

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated import TrainConfig
from fedmoe_sched.federated.aggregate import Update
from fedmoe_sched.federated.bookkeeping import client_names
from fedmoe_sched.federated.client import LocalResult
from fedmoe_sched.federated.coordinator import ClientOffer, Coordinator
from fedmoe_sched.federated.methods import Brief
from fedmoe_sched.federated.preparation import prepare
from fedmoe_sched.federated.workers import ClientJob, LocalTrainer

TRAIN = "train"
REASON = "reason"  # header of an answer without a result


@dataclass
class Answers:
    """What came back in one round, and why clients have no result."""

    results: list[LocalResult] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)

    def receive(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        """Keep an answer, or why there is none; the engine calls this from its own threads, one at a time."""
        name, answer = client_task.client.name, client_task.result
        code = answer.get_return_code()
        if code != ReturnCode.OK:
            self.reasons[name] = f"{code}: {answer.get_header(REASON)}" if answer.get_header(REASON) else str(code)
            return
        try:
            self.results.append(read_result(name, from_shareable(answer)))
        except Exception as error:  # whatever a site may have put there
            self.reasons[name] = f"cannot be read ({type(error).__name__}: {error})"

    def clients(self) -> set[str]:
        """Name those that were heard of."""
        return {str(result.update.client) for result in self.results} | set(self.reasons)


class ExpertController(Controller):
    """The server's side: one task per client and round, with the parameters of its experts and the shared ones.

    NVFlare writes the arguments of components into a file, so they are plain values under the names of attributes.

    Parameters
    ----------
    settings : dict
        Of the run, as `TrainConfig.from_dict` takes them.
    run_dir : str
        On the server, see `fedmoe_sched.federated.runs`.
    resume : bool
        Go on after its last checkpoint.
    round_timeout : int
        Seconds after which a round ends; who has not answered by then has failed.
    min_replies : int
        With fewer good updates the model stays as it is.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        run_dir: str,
        resume: bool = False,
        round_timeout: int = 120,
        min_replies: int = 1,
    ) -> None:
        super().__init__()
        self.settings, self.run_dir, self.resume = settings, run_dir, resume
        self.round_timeout, self.min_replies = round_timeout, min_replies
        self._late: dict[str, int] = {}  # the last round in which a client was not heard of

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Begin, or go on with, the run."""
        config = TrainConfig.from_dict(self.settings)
        torch.set_num_threads(config.threads)
        self._coordinator = Coordinator(
            config,
            self.run_dir,
            resume=self.resume,
            min_replies=self.min_replies,
            deadline=float(self.round_timeout),
        )
        if self._coordinator.method.name != "shared" or self._coordinator.signals("once", "before", "after"):
            msg = f"policy = {config.policy!r}: asks for more than messages of this example carry"
            raise InputError(msg)

    def stop_controller(self, fl_ctx: FLContext) -> None:
        """Do nothing: every round is on disk once it is closed."""

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Run the rounds that are left."""
        while self._coordinator.round < self._coordinator.config.rounds and not abort_signal.triggered:
            self._run_round(abort_signal, fl_ctx)

    def _run_round(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        number = self._coordinator.round + 1
        jobs = self._coordinator.plan({name: ClientOffer() for name in self._idle(number, fl_ctx)})
        answers = Answers()
        tasks = {job.client: self._task(number, job, answers) for job in jobs}
        for name, task in tasks.items():
            self.send(task, fl_ctx, targets=[name])
        while any(task.completion_status is None for task in tasks.values()):
            if abort_signal.triggered:  # the round stays open: whoever resumes the run makes it again
                return
            time.sleep(0.1)
        self._late.update(dict.fromkeys(set(tasks) - answers.clients(), number))
        record = self._coordinator.close(answers.results, unanswered=answers.reasons)
        self.log_info(
            fl_ctx,
            f"round {number}: accuracy {record['accuracy']:.4f}, loads {record['loads']}, "
            f"unanswered {record['unanswered']}, rejected {record['rejected']}",
        )

    def _idle(self, number: int, fl_ctx: FLContext) -> list[str]:
        """Name the sites that get work: late ones may still be busy, and miss a round."""
        sites = sorted(client.name for client in fl_ctx.get_engine().get_clients())
        return [name for name in sites if self._late.get(name, -1) < number - 1]

    def _task(self, number: int, job: ClientJob, answers: Answers) -> Task:
        """Write what a client has to do, with the parameters that it needs for it and no others."""
        state = self._coordinator.state
        parts = {name: state[name].cpu().numpy() for name in self._coordinator.parts(job.brief.experts)}
        meta = {
            "round": number,
            "number": job.number,
            "experts": [int(j) for j in job.brief.experts],
            "seed": [int(part) for part in job.seed],
        }
        return Task(
            name=TRAIN,
            data=DXO(DataKind.WEIGHTS, data=parts, meta=meta).to_shareable(),
            timeout=self.round_timeout,
            result_received_cb=answers.receive,
        )

    def process_result_of_unknown_task(
        self, client: Client, task_name: str, client_task_id: str, result: Shareable, fl_ctx: FLContext
    ) -> None:
        """Drop what comes late; seldom, because clients ask whether a task still stands before they answer."""
        self.log_info(fl_ctx, f"{client.name} answered after the end of its round")


class ExpertExecutor(Executor):
    """The client's side: trains the experts that it is sent on its own data.

    Parameters
    ----------
    settings : dict
        Those of the run; ``data.dir`` may be where the data lie on this machine.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self._trainer: LocalTrainer | None = None

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Do one task; where that raises, the answer says why.

        NVFlare would catch the exception too, but keep its message on the client, and take a RuntimeError for a
        reason to abort the job.
        """
        if task_name != TRAIN:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        task = from_shareable(shareable)
        config = TrainConfig.from_dict(self.settings)
        site, number = fl_ctx.get_identity_name(), task.meta["number"]
        if site != client_names(config.clients.count)[number]:
            self.log_error(fl_ctx, f"task for client number {number} came to {site}")
            return make_reply(ReturnCode.BAD_TASK_DATA)
        try:
            return result_dxo(self.train(config, site, task)).to_shareable()
        except Exception as error:
            self.log_exception(fl_ctx, f"round {task.meta['round']}: {type(error).__name__}: {error}")
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            return make_reply(ReturnCode.EXECUTION_EXCEPTION, headers={REASON: reason})

    def train(self, config: TrainConfig, site: str, task: DXO) -> LocalResult:
        """Train the experts of a task."""
        torch.set_num_threads(config.threads)
        if self._trainer is None:  # not in __init__: the engine makes components to read their arguments, too
            prepared = prepare(config)
            self._trainer = LocalTrainer(config, prepared.data, prepared.partition.samples)
        job = ClientJob(site, task.meta["number"], Brief.plain(task.meta["experts"]), task.meta["seed"])
        return self._trainer.train({name: torch.tensor(value) for name, value in task.data.items()}, job)


def result_dxo(result: LocalResult) -> DXO:
    """Write what a client found out."""
    experts = sorted(result.rewards)
    meta = {
        "samples": float(result.update.samples),
        "experts": experts,
        "expert_samples": [float(result.update.expert_samples[j]) for j in experts],
        "rewards": [float(result.rewards[j]) for j in experts],
        "loss": float(result.loss),
        "seconds": float(result.seconds),
    }
    return DXO(DataKind.WEIGHTS, data=dict(result.update.parameters), meta=meta)


def read_result(name: str, answer: DXO) -> LocalResult:
    """Read what a client sent back; whether it makes sense is for the coordinator to judge."""
    experts = [int(j) for j in answer.meta["experts"]]
    samples = [float(count) for count in answer.meta["expert_samples"]]
    rewards = [float(reward) for reward in answer.meta["rewards"]]
    update = Update(name, answer.data, float(answer.meta["samples"]), dict(zip(experts, samples, strict=True)))
    loss, seconds = float(answer.meta.get("loss", math.nan)), float(answer.meta.get("seconds", 0.0))
    return LocalResult(update, dict(zip(experts, rewards, strict=True)), loss, seconds)


def moe_job(
    config: TrainConfig, run_dir: str, *, executor: type[ExpertExecutor] = ExpertExecutor, **options: Any
) -> FedJob:
    """Put the two halves together.

    Parameters
    ----------
    config : TrainConfig
    run_dir : str
        Full path of the run folder on the server.
    executor : type
        Of the clients' half.
    **options
        Of `ExpertController`.
    """
    settings = config.model_dump(mode="json", exclude_none=True)
    job = FedJob(name="fedmoe-sched", min_clients=1)
    # Installed on every machine, like torch: the job carries this file only.
    job.set_app_packages(["fedmoe_sched"])
    job.to_server(ExpertController(settings, run_dir, **options))
    for name in client_names(config.clients.count):
        job.to(executor(settings), name, tasks=[TRAIN])
    return job
