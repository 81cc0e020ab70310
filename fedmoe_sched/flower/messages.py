"""What goes over the wire: queries, questions and training tasks with their answers, as records of Flower.

Both sides read what the other one wrote as if it were wrong: each `read_` function says in one line what is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.aggregate import Update
from fedmoe_sched.federated.client import LocalResult
from fedmoe_sched.federated.coordinator import ClientOffer
from fedmoe_sched.federated.methods import Brief
from fedmoe_sched.federated.workers import ClientJob, ClientQuestion
from fedmoe_sched.scores import CapacityProfile

__all__ = [
    "offer_content",
    "question_content",
    "read_arrays",
    "read_offer",
    "read_question",
    "read_result",
    "read_signals",
    "read_task",
    "result_content",
    "signals_content",
    "state_record",
    "task_content",
]

_ARRAYS, _TASK, _CLIENT, _PROFILE, _METRICS = "arrays", "task", "client", "profile", "metrics"
_QUESTION, _SIGNALS = "question", "signals"


def state_record(state: Mapping[str, Any]) -> ArrayRecord:
    """Serialise parameters, NumPy arrays or torch tensors, under their names."""
    arrays = {name: value.cpu().numpy() if hasattr(value, "cpu") else value for name, value in state.items()}
    return ArrayRecord({name: Array(np.ascontiguousarray(value)) for name, value in arrays.items()})


def read_arrays(content: RecordDict) -> dict[str, npt.NDArray[Any]]:
    """Return the parameters in a message."""
    return {str(name): array.numpy() for name, array in content.array_records[_ARRAYS].items()}


def _parts_record(arrays: ArrayRecord, names: Sequence[str], own: Mapping[str, Any]) -> ArrayRecord:
    """Take some of all parameters; those that are a client's own take their place, in the same precision."""
    taken = {name: np.asarray(own[name], dtype=arrays[name].dtype) for name in names if name in own}
    return ArrayRecord({name: arrays[name] for name in names} | dict(state_record(taken)))


# Query -----------------------------------------------------------------------------------------------------------


def offer_content(name: str, offer: ClientOffer) -> RecordDict:
    """Write who a client is and what its device can do."""
    client: dict[str, Any] = {"name": name}
    if offer.capacity is not None:
        client["capacity"] = offer.capacity
    content = RecordDict({_CLIENT: ConfigRecord(client)})
    if offer.profile is not None:
        content[_PROFILE] = MetricRecord(asdict(offer.profile))
    return content


def read_offer(content: RecordDict) -> tuple[str, ClientOffer]:
    """Read who a client is.

    Raises
    ------
    InputError
        It says no such thing, or nothing that makes sense.
    """
    try:
        client = content.config_records[_CLIENT]
        name, capacity = client["name"], client.get("capacity")
    except (KeyError, TypeError) as error:
        msg = f"answer to the query: lacks {error}"
        raise InputError(msg) from error
    if not isinstance(name, str):
        msg = f"answer to the query: name = {name!r}: must be text"
        raise InputError(msg)
    if capacity is not None and not (type(capacity) is int and 0 <= capacity < 2**31):
        msg = f"client {name!r}: capacity = {capacity!r}: must be a whole number >= 0"
        raise InputError(msg)
    profile = content.metric_records.get(_PROFILE)
    if profile is None:
        return name, ClientOffer(capacity)
    try:
        return name, ClientOffer(capacity, CapacityProfile(**profile))  # type: ignore[arg-type]
    except (TypeError, InputError) as error:
        msg = f"client {name!r}: profile: {error}"
        raise InputError(msg) from error


# Questions before a round ----------------------------------------------------------------------------------------


def question_content(question: ClientQuestion, arrays: ArrayRecord, parts: Sequence[str]) -> RecordDict:
    """Write what a client is asked, with the parameters that it takes to answer.

    Parameters
    ----------
    question : ClientQuestion
    arrays : ArrayRecord
        All parameters; what is sent is not copied.
    parts : sequence of str
        Names of those to send.
    """
    asked = ConfigRecord(
        {
            "client-name": question.client,
            "client-number": question.number,
            "signals": list(question.signals),
            "experts": [int(j) for j in question.experts],
        }
    )
    return RecordDict({_ARRAYS: _parts_record(arrays, parts, question.parts), _QUESTION: asked})


def read_question(content: RecordDict) -> ClientQuestion | None:
    """Read what is asked; None where the message is no such question.

    Raises
    ------
    InputError
        The message lacks a part.
    """
    if _QUESTION not in content.config_records:
        return None
    try:
        asked: Mapping[str, Any] = content.config_records[_QUESTION]
        signals, experts = tuple(asked["signals"]), tuple(asked["experts"])
        return ClientQuestion(asked["client-name"], asked["client-number"], signals, experts, {})
    except (KeyError, TypeError) as error:
        msg = f"question: lacks {error}"
        raise InputError(msg) from error


def signals_content(signals: Mapping[str, npt.NDArray[np.float64]]) -> RecordDict:
    """Write the signals that a client tells: numbers, and lists of them."""
    return RecordDict({_SIGNALS: _signals_record(signals)})


def _signals_record(signals: Mapping[str, npt.NDArray[np.float64]]) -> MetricRecord:
    return MetricRecord({name: value.tolist() for name, value in signals.items()})


def read_signals(content: RecordDict) -> dict[str, npt.NDArray[np.float64]]:
    """Read what a client tells; whether it makes sense is for the server's round to judge.

    Raises
    ------
    InputError
        It cannot be read.
    """
    try:
        return {
            str(name): np.asarray(value, np.float64) for name, value in content.metric_records[_SIGNALS].items()
        }
    except Exception as error:  # whatever a stranger put there
        msg = f"cannot be read ({type(error).__name__}: {error})"
        raise InputError(msg) from error


# Training --------------------------------------------------------------------------------------------------------


def task_content(job: ClientJob, number: int, arrays: ArrayRecord, parts: Sequence[str]) -> RecordDict:
    """Write what a client has to do, with the parameters that it needs for it and no others.

    Parameters
    ----------
    job : ClientJob
    number : int
        Of the round.
    arrays : ArrayRecord
        All parameters; what is sent is not copied.
    parts : sequence of str
        Names of those to send.
    """
    task = ConfigRecord(
        {
            "server-round": number,
            "client-name": job.client,
            "client-number": job.number,
            "experts": [int(j) for j in job.brief.experts],
            "trained": [int(j) for j in job.brief.trained],
            "judged": [int(j) for j in job.brief.judged],
            "signals": list(job.signals),
            "seed": [int(part) for part in job.seed],
        }
    )
    return RecordDict({_ARRAYS: _parts_record(arrays, parts, job.brief.parts), _TASK: task})


def read_task(content: RecordDict) -> tuple[ClientJob, int]:
    """Read what to do, and the number of the round.

    Raises
    ------
    InputError
        The message lacks a part.
    """
    try:
        task: Mapping[str, Any] = content.config_records[_TASK]
        # The client's own parameters have come in the place of the global ones.
        brief = Brief(tuple(task["experts"]), tuple(task["trained"]), tuple(task["judged"]))
        seed, signals = list(task["seed"]), tuple(task["signals"])
        job = ClientJob(task["client-name"], task["client-number"], brief, seed, signals)
        return job, task["server-round"]
    except (KeyError, TypeError) as error:
        msg = f"task: lacks {error}"
        raise InputError(msg) from error


def result_content(result: LocalResult) -> RecordDict:
    """Write what a client found out: trained parameters, what they weigh, and what else it was asked for."""
    experts = sorted(result.rewards)
    metrics = MetricRecord(
        {
            "num-examples": float(result.update.samples),
            "expert-ids": experts,
            "expert-num-examples": [float(result.update.expert_samples[j]) for j in experts],
            "expert-reward": [float(result.rewards[j]) for j in experts],
            "train-loss": float(result.loss),
            "seconds": float(result.seconds),
        }
    )
    content = RecordDict({_ARRAYS: state_record(result.update.parameters), _METRICS: metrics})
    if result.update.signals:
        content[_SIGNALS] = _signals_record(result.update.signals)
    return content


def read_result(name: str, content: RecordDict) -> LocalResult:
    """Read what a client sent back; whether it makes sense is for the server's round to judge.

    Parameters
    ----------
    name : str
        Of the client that was asked.
    content : RecordDict

    Raises
    ------
    InputError
        It cannot be read.
    """
    try:
        metrics: Mapping[str, Any] = content.metric_records[_METRICS]
        experts = [int(j) for j in metrics["expert-ids"]]
        samples = [float(count) for count in metrics["expert-num-examples"]]
        rewards = [float(reward) for reward in metrics["expert-reward"]]
        told = read_signals(content) if _SIGNALS in content.metric_records else {}
        weights = dict(zip(experts, samples, strict=True))
        update = Update(name, read_arrays(content), float(metrics["num-examples"]), weights, told)
        loss, seconds = float(metrics.get("train-loss", math.nan)), float(metrics.get("seconds", 0.0))
        return LocalResult(update, dict(zip(experts, rewards, strict=True)), loss, seconds)
    except Exception as error:  # whatever a stranger put there, and whatever reading it as an array may raise
        msg = f"cannot be read ({type(error).__name__}: {error})"
        raise InputError(msg) from error
