"""A Flower strategy that sends every client its assigned experts only, and averages them expert by expert."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedmoe_sched.errors import InputError, WorkerError
from fedmoe_sched.federated.coordinator import ClientOffer, Coordinator, NobodyToldError
from fedmoe_sched.federated.workers import ClientJob, ClientQuestion
from fedmoe_sched.flower.messages import question_content, read_result, read_signals, state_record, task_content
from fedmoe_sched.flower.roster import Roster
from fedmoe_sched.flower.settings import FlowerConfig

__all__ = ["ExpertStrategy"]

_log = logging.getLogger("flwr")  # what the engine shows and sends to `flwr log`

_PAUSE = 0.25  # seconds before clients are asked once more

Callback = Callable[[dict[str, Any]], None]
T = TypeVar("T")


class _Task(NamedTuple):
    """A message with work, and to whom it went; `message` gets its number when it is sent."""

    client: str
    node: int
    message: Message


class ExpertStrategy(Strategy):
    """Flower's side of a `Coordinator`: nodes, messages and time.

    A round asks the nodes that are new or owe an answer who they are, waits until enough clients are idle, asks
    them what the policy wants to know, sends each its task, and hands what comes back in time to the coordinator.
    Whatever is missing then has failed; its node gets no further task until it has answered a query.

    Parameters
    ----------
    coordinator : Coordinator
    options : FlowerConfig
    callbacks : sequence of callable
        Called with the record of every round, once it is on disk.
    """

    def __init__(
        self, coordinator: Coordinator, options: FlowerConfig, *, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.coordinator, self.options = coordinator, options
        self._callbacks = callbacks
        self._roster = Roster(coordinator.names, query_timeout=options.round_timeout)
        self._tasks: list[_Task] = []
        self._arrays = ArrayRecord()

    def run(self, grid: Grid) -> Result:
        """Run the rounds that are left, from the latest checkpoint to the number in the settings.

        Raises
        ------
        WorkerError
            Too few clients came in time; finished rounds are kept, the run can be resumed.
        """
        left = self.coordinator.config.rounds - self.coordinator.round
        return self.start(grid, self.initial_arrays(), num_rounds=max(0, left), timeout=self.options.round_timeout)

    def initial_arrays(self) -> ArrayRecord:
        """Return the global parameters as they are now."""
        return state_record(self.coordinator.state)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Plan a round and write its messages; the rounds of a resumed run go on from those of the run before."""
        self._arrays = arrays
        jobs = self._planned(grid)
        nodes = self._roster.idle()
        self._tasks = []
        for job in jobs:
            parts = self.coordinator.parts({*job.brief.experts, *job.brief.judged})
            content = task_content(job, self.coordinator.round + 1, arrays, parts)
            self._tasks.append(self._task(job.client, nodes[job.client], content, MessageType.TRAIN))
        return [task.message for task in self._tasks]

    def _planned(self, grid: Grid) -> list[ClientJob]:
        """Ask clients what the policy wants to know, and plan; again, for a while, if nobody tells."""
        end = time.monotonic() + self.options.wait_timeout
        while True:
            offers = self._offers(grid)
            answers, reasons = self._told(grid, self.coordinator.questions(offers))
            try:
                return self.coordinator.plan(offers, answers, unanswered=reasons)
            except NobodyToldError as error:
                if time.monotonic() >= end:
                    raise WorkerError(self._ending(str(error))) from error
            time.sleep(_PAUSE)

    def _offers(self, grid: Grid) -> dict[str, ClientOffer]:
        """Wait for clients."""
        enough = self._roster.wait_for(grid, self.options.min_clients, self.options.wait_timeout)
        offers = self._roster.offers()
        if not enough:
            busy = self._roster.busy()
            msg = (
                f"{len(offers)} clients are idle after {self.options.wait_timeout:g} s, "
                f"flower.min-clients = {self.options.min_clients}"
                + (f" (busy: {', '.join(busy)})" if busy else "")
            )
            raise WorkerError(self._ending(msg))
        return offers

    def _ending(self, reason: str) -> str:
        return (
            f"round {self.coordinator.round + 1}: {reason}; finished rounds are kept, the run can be resumed "
            "(flower.resume = true)"
        )

    def _told(
        self, grid: Grid, questions: Sequence[ClientQuestion]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Ask clients; return what they tell, and why others do not."""
        nodes, tasks = self._roster.idle(), []
        for question in questions:
            content = question_content(question, self._arrays, self.coordinator.parts(question.experts))
            tasks.append(self._task(question.client, nodes[question.client], content, MessageType.QUERY))
        if not tasks:
            return {}, {}
        messages = [task.message for task in tasks]
        replies = grid.send_and_receive(messages, timeout=self.options.round_timeout)
        return self._answers(tasks, replies, lambda _, content: read_signals(content))

    def _task(self, client: str, node: int, content: RecordDict, kind: str) -> _Task:
        """Write a message for a client, whose node owes an answer from then on."""
        self._roster.occupy(node)
        # A node that is late must not begin with work that nobody waits for any more.
        ttl, group = self.options.round_timeout, str(self.coordinator.round + 1)
        return _Task(client, node, Message(content, node, kind, ttl=ttl, group_id=group))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Take in what came back in time, and close the round."""
        results, reasons = self._answers(self._tasks, replies, read_result)
        before = self.coordinator.state
        record = self.coordinator.close(list(results.values()), unanswered=reasons)
        after = self.coordinator.state
        changed = state_record({name: value for name, value in after.items() if value is not before[name]})
        _log.info("%s", _summary(record))
        for callback in self._callbacks:
            callback(record)
        return ArrayRecord({**self._arrays, **changed}), _metrics(record)

    def _answers(
        self, tasks: Iterable[_Task], replies: Iterable[Message], read: Callable[[str, RecordDict], T]
    ) -> tuple[dict[str, T], dict[str, str]]:
        """Tell answers from errors. A reply is known by the message it answers: its sender may be the engine."""
        asked = {task.message.metadata.message_id: task for task in tasks}
        results: dict[str, T] = {}
        reasons: dict[str, str] = {}
        for reply in replies:
            task = asked.get(reply.metadata.reply_to_message_id)
            if task is None:
                continue
            if reply.metadata.src_node_id == task.node:
                self._roster.release(task.node)
            try:
                if reply.has_error():
                    reasons[task.client] = _first_line(reply.error.reason)
                else:
                    results[task.client] = read(task.client, reply.content)
            except InputError as error:
                reasons[task.client] = str(error)
        return results, reasons

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask no client: the coordinator evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: the coordinator evaluates."""
        return None

    def summary(self) -> None:
        """Log what the strategy is about to do."""
        config, options = self.coordinator.config, self.options
        _log.info(
            "policy %s, %d experts, rounds %d to %d of at most %g s, run folder %s",
            config.policy,
            config.model.experts,
            self.coordinator.round + 1,
            config.rounds,
            options.round_timeout,
            self.coordinator.folder.path,
        )


def _first_line(text: str | None) -> str:
    """Cut the reason of an error to what fits into a report."""
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[0][:300] if lines else "error without a reason"


def _summary(record: Mapping[str, Any]) -> str:
    failed = "".join(f"; {name}: {reason}" for name, reason in record["unanswered"].items())
    rejected = "".join(f"; {fault}" for fault in record["rejected"])
    return f"round {record['round']}: accuracy {record['accuracy']:.4f}, loads {record['loads']}{failed}{rejected}"


def _metrics(record: Mapping[str, Any]) -> MetricRecord:
    """Return the numbers of a record that Flower's own log and result can hold."""
    keys = (
        "round",
        "accuracy",
        "loss",
        "load_cv",
        "client_jain",
        "expert_jain",
        "answered",
        "failed",
        "bytes_down",
        "bytes_up",
    )
    numbers = {key: record[key] for key in keys if record.get(key) is not None}
    return MetricRecord({key: int(v) if isinstance(v, int) else float(v) for key, v in numbers.items()})
