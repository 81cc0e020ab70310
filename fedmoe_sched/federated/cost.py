"""What a round costs a client: bytes of the parts of the model, and which of them it sends back; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from fedmoe_sched.federated.aggregate import expert_of
from fedmoe_sched.federated.config import DevicesConfig, LocalConfig
from fedmoe_sched.scores import ExpertCost

__all__ = ["is_trained", "model_cost"]


def is_trained(name: str, held: Collection[int], config: LocalConfig) -> bool:
    """Return whether a client that holds some experts trains a parameter, and so sends it back.

    >>> frozen = LocalConfig(train_extractor=False)
    >>> [is_trained(name, [1], frozen) for name in ("extractor.0.bias", "gate.bias", "experts.1.bias")]
    [False, True, True]
    """
    expert = expert_of(name)
    if expert is not None:
        return expert in held
    return config.train_gate if name.startswith("gate.") else config.train_extractor


def _never(name: str) -> bool:
    return False


def model_cost(
    sizes: Mapping[str, int],
    local: LocalConfig,
    devices: DevicesConfig,
    is_personal: Callable[[str], bool] = _never,
) -> ExpertCost:
    """Return what training an expert of this model costs a client, for *one* unit of work.

    Clients differ in the number of their samples, `fedmoe_sched.scores.ExpertCost` knows one number for all: here
    ``samples`` is 1, and the profiles that go with it say how long all the samples of a client take, see
    `fedmoe_sched.federated.devices.Devices.for_work`.

    Parameters
    ----------
    sizes : mapping of str to int
        Bytes of every parameter of the global model.
    local : LocalConfig
        Shared parts that are not trained are not sent back.
    devices : DevicesConfig
        May state other sizes, those of the model that this one stands for. What it says of one expert holds for
        the largest; smaller ones are in proportion.
    is_personal : callable
        Whether a parameter is kept by the client, by name: shared parts that are, are not sent.
    """
    shared = {name: size for name, size in sizes.items() if expert_of(name) is None}
    received = {name: size for name, size in shared.items() if not is_personal(name)}
    sent_back = sum(size for name, size in received.items() if is_trained(name, (), local))
    stated = sum(shared.values()) if devices.shared_bytes is None else devices.shared_bytes
    scale = stated / sum(shared.values())
    experts = _expert_sizes(sizes)
    largest = max(experts)
    one_expert = largest if devices.expert_bytes is None else devices.expert_bytes
    return ExpertCost(
        expert_bytes=_one_or_all([one_expert * size / largest for size in experts]),
        expert_compute=_one_or_all([devices.expert_compute * size / largest for size in experts]),
        shared_bytes=scale * sum(received.values()),
        shared_compute=devices.shared_compute,
        memory_overhead=devices.memory_overhead,
        samples=1.0,
        shared_up_bytes=scale * sent_back,
    )


def _expert_sizes(sizes: Mapping[str, int]) -> list[int]:
    totals: dict[int, int] = {}
    for name, size in sizes.items():
        expert = expert_of(name)
        if expert is not None:
            totals[expert] = totals.get(expert, 0) + size
    return [totals[expert] for expert in sorted(totals)]


def _one_or_all(values: Sequence[float]) -> float | tuple[float, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)
