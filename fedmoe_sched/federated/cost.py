"""What a round costs a client: bytes of the parts of the model, and which of them it sends back; no torch here."""

from __future__ import annotations

from collections.abc import Collection, Mapping

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


def model_cost(sizes: Mapping[str, int], local: LocalConfig, devices: DevicesConfig) -> ExpertCost:
    """Return what training an expert of this model costs a client, for *one* unit of work.

    Clients differ in the number of their samples, `fedmoe_sched.scores.ExpertCost` knows one number for all: here
    ``samples`` is 1, and the profiles that go with it say how long all the samples of a client take, see
    `fedmoe_sched.federated.devices.Devices.for_work`.

    Parameters
    ----------
    sizes : mapping of str to int
        Bytes of every parameter of the global model; all experts are of one size.
    local : LocalConfig
        Shared parts that are not trained are not sent back.
    devices : DevicesConfig
        May state other sizes, those of the model that this one stands for.
    """
    shared = sum(size for name, size in sizes.items() if expert_of(name) is None)
    sent_back = sum(
        size for name, size in sizes.items() if expert_of(name) is None and is_trained(name, (), local)
    )
    one_expert = sum(size for name, size in sizes.items() if expert_of(name) == 0)
    stated = shared if devices.shared_bytes is None else devices.shared_bytes
    return ExpertCost(
        expert_bytes=one_expert if devices.expert_bytes is None else devices.expert_bytes,
        expert_compute=devices.expert_compute,
        shared_bytes=stated,
        shared_compute=devices.shared_compute,
        memory_overhead=devices.memory_overhead,
        samples=1.0,
        shared_up_bytes=stated * sent_back / shared,
    )
