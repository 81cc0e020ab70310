"""Small parts of a round that need no server: names, seeds, times, records, arrays."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.federated.client import LocalResult
from fedmoe_sched.federated.evaluate import Evaluation
from fedmoe_sched.federated.partition import Partition

__all__ = [
    "Arrays",
    "Laps",
    "Stream",
    "client_arrays",
    "client_names",
    "learning_record",
    "restored_state",
    "round_arrays",
    "round_random",
]

Arrays = dict[str, npt.NDArray[Any]]


class Stream(IntEnum):
    """Streams of random numbers, by purpose: what they are for in a seed such as (run seed, purpose, round)."""

    DRAWN = 1
    FAILED = 2
    LOCAL = 3
    JITTER = 4


def round_random(seed: int, purpose: Stream, number: int) -> np.random.Generator:
    """Return the generator of one purpose in one round of a run."""
    return np.random.default_rng([seed, int(purpose), number])


def client_names(count: int) -> list[str]:
    """Return the names of the clients, which sort like their numbers.

    >>> client_names(11)[::10]
    ['client-00', 'client-10']
    """
    width = len(str(count - 1))
    return [f"client-{i:0{width}d}" for i in range(count)]


class Laps:
    """Wall times of consecutive phases of a round, in seconds by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def learning_record(results: Sequence[LocalResult], evaluation: Evaluation) -> dict[str, Any]:
    """Return what the clients and the test set say of a round, as metrics of its record.

    Parameters
    ----------
    results : sequence of LocalResult
        Those that count.
    evaluation : Evaluation
        After the round.
    """
    rewards = [reward for result in results for reward in result.rewards.values()]
    return {
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "client_accuracy_mean": evaluation.client_mean,
        "client_accuracy_worst_decile": evaluation.client_worst_decile,
        "train_loss": float(np.mean([result.loss for result in results])) if results else None,
        "reward_mean": float(np.mean(rewards)) if rewards else None,
        "slowest_client_seconds": max((result.seconds for result in results), default=None),
    }


def client_arrays(partition: Partition, capacity: Sequence[int]) -> Arrays:
    """Return what figures need to know of the clients, for ``clients.npz`` of a run folder."""
    return {
        "counts": partition.counts,
        "groups": partition.groups,
        "capacity": np.array(capacity, dtype=np.int64),
    }


def round_arrays(
    numbers: Mapping[str, int],
    n_experts: int,
    assigned: Mapping[str, Sequence[int]],
    results: Sequence[LocalResult],
    evaluation: Evaluation,
    policy: Any,
) -> Arrays:
    """Return the client x expert tables of a round, clients in the order of their numbers.

    Parameters
    ----------
    numbers : mapping of client name to int
        Of all n clients.
    n_experts : int
        m.
    assigned : mapping of client name to sequence of int
    results : sequence of LocalResult
    evaluation : Evaluation
    policy : Policy

    Returns
    -------
    dict
        ``assignment``, ``samples`` and ``fitness``, of shape (n, m), and ``client_accuracy``, of shape (n,). The
        fitness is NaN for clients and policies that have none.
    """
    shape = (len(numbers), n_experts)
    assignment, samples = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.float32)
    fitness = np.full(shape, np.nan, dtype=np.float32)
    for name, experts in assigned.items():
        assignment[numbers[name], list(experts)] = True
    for result in results:
        for expert, count in result.update.expert_samples.items():
            samples[numbers[str(result.update.client)], expert] = count
    fitness_of = getattr(policy, "fitness_of", None)
    if fitness_of is not None:
        for name, row in numbers.items():
            with contextlib.suppress(InputError):  # not known to the policy yet
                fitness[row] = fitness_of(name)
    return {
        "assignment": assignment,
        "samples": samples,
        "fitness": fitness,
        "client_accuracy": evaluation.client_accuracy.astype(np.float32),
    }


def restored_state(
    state: Mapping[str, Tensor], arrays: Mapping[str, npt.NDArray[Any]], file: Path
) -> dict[str, Tensor]:
    """Return the global parameters of a checkpoint, where `state` has those of a new run.

    Parameters
    ----------
    state : mapping of str to Tensor
    arrays : mapping of str to ndarray
        Of the checkpoint; may hold more.
    file : Path
        Of the checkpoint, for messages.

    Raises
    ------
    StateFileError
        A parameter is missing, or of another shape.
    """
    for name, value in state.items():
        if name not in arrays or arrays[name].shape != tuple(value.shape):
            msg = f"{file}: its parameter {name!r} does not fit the settings"
            raise StateFileError(msg)
    return {name: torch.from_numpy(arrays[name]).to(value.device) for name, value in state.items()}
