"""The client's half of a Flower app: says who it is, answers questions, trains what it is sent on its own data."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from torch import Tensor

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.bookkeeping import client_names
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.coordinator import ClientOffer
from fedmoe_sched.federated.preparation import prepare
from fedmoe_sched.federated.workers import ClientJob, ClientQuestion, LocalTrainer
from fedmoe_sched.flower.messages import (
    offer_content,
    read_arrays,
    read_question,
    read_task,
    result_content,
    signals_content,
)
from fedmoe_sched.flower.settings import read_run_config
from fedmoe_sched.scores import CapacityProfile

__all__ = ["client_app", "node_offer"]

#: Flower's type of this name moved between versions.
Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


def client_app(config: TrainConfig | None = None, *, mods: Sequence[Mod] = ()) -> ClientApp:
    """Make the client's half of the app.

    Parameters
    ----------
    config : TrainConfig, optional
        By default what the run config of ``flwr run`` says, see `fedmoe_sched.flower.settings.read_run_config`.
    mods : sequence of callable (message, context, next)
        Wrapped around whatever the client does, e.g. for privacy.

    Returns
    -------
    ClientApp
        Its node config may have, beside ``partition-id``: ``capacity``, the fields of
        `fedmoe_sched.CapacityProfile` (``ms-per-sample``, ``memory-bytes``, ...) and ``data-dir``.
    """
    app = ClientApp(mods=list(mods))

    @app.query()
    def query(message: Message, context: Context) -> Message:
        settings = _settings(config, context)
        number, offer = node_offer(context.node_config, settings.clients.count)
        question = read_question(message.content)
        if question is not None:
            _refuse_others(question, number)
            state, trainer = _received(message, settings)
            return Message(signals_content(trainer.answer(state, question)), reply_to=message)
        return Message(offer_content(client_names(settings.clients.count)[number], offer), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        settings = _settings(config, context)
        number, _ = node_offer(context.node_config, settings.clients.count)
        job, _ = read_task(message.content)
        _refuse_others(job, number)
        state, trainer = _received(message, settings)
        return Message(result_content(trainer.train(state, job)), reply_to=message)

    return app


def _refuse_others(work: ClientJob | ClientQuestion, number: int) -> None:
    """Refuse what is meant for another client."""
    if work.number != number:
        msg = f"task for {work.client} (number {work.number}) came to the node with partition-id = {number}"
        raise InputError(msg)


def _received(message: Message, settings: TrainConfig) -> tuple[dict[str, Tensor], LocalTrainer]:
    """Return the parameters in a message, and who works on them."""
    torch.set_num_threads(settings.threads)
    state = {name: torch.from_numpy(value.copy()) for name, value in read_arrays(message.content).items()}
    return state, _trainer(json.dumps(settings.model_dump(mode="json")))


def _settings(config: TrainConfig | None, context: Context) -> TrainConfig:
    """Return the settings of the run, with what this machine knows better."""
    settings = read_run_config(context.run_config)[0] if config is None else config
    folder = context.node_config.get("data-dir")
    return settings if folder is None else settings.updated({"data.dir": folder}, source="node config")


@functools.lru_cache(maxsize=1)
def _trainer(settings: str) -> LocalTrainer:
    """Load the data once per process: in a simulation one process is many clients."""
    config = TrainConfig.from_dict(json.loads(settings))
    prepared = prepare(config)
    return LocalTrainer(config, prepared.data, prepared.partition.samples)


def node_offer(node_config: Mapping[str, Any], count: int) -> tuple[int, ClientOffer]:
    """Read the config of a node.

    Parameters
    ----------
    node_config : mapping
        As ``flower-supernode --node-config`` gives it.
    count : int
        Clients of the run.

    Returns
    -------
    int
        Number of the client, from ``partition-id``.
    ClientOffer
        Without a profile if none of its fields is there.

    Raises
    ------
    InputError
        A missing or wrong value.

    Examples
    --------
    >>> node_offer({"partition-id": 1, "capacity": 3, "up-bandwidth": 1e6}, 4)[1].profile.up_bandwidth
    1000000.0
    """
    number = node_config.get("partition-id")
    if type(number) is not int or not 0 <= number < count:
        msg = f"node config: partition-id = {number!r}: must be a whole number >= 0 and < clients.count = {count}"
        raise InputError(msg)
    capacity = node_config.get("capacity")
    if capacity is not None and (type(capacity) is not int or capacity < 0):
        msg = f"node config: capacity = {capacity!r}: must be a whole number >= 0"
        raise InputError(msg)
    values = {}
    for field in fields(CapacityProfile):
        key = field.name.replace("_", "-")
        if key in node_config:
            values[field.name] = _number(key, node_config[key])
    return number, ClientOffer(capacity, CapacityProfile(**values) if values else None)


def _number(key: str, value: Any) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    msg = f"node config: {key} = {value!r}: must be a number"
    raise InputError(msg)
