"""Evaluation of the global model: as a whole, and as each client sees it with its experts and its own data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe_sched.federated.data import Dataset
from fedmoe_sched.federated.model import MixtureOfExperts, mix

__all__ = ["Evaluation", "evaluate", "worst_decile"]

_BATCH = 125

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on the test set.

    Parameters
    ----------
    accuracy : float
        Of the whole global model, 0 to 1.
    loss : float
        Mean cross-entropy in nats.
    client_accuracy : ndarray, shape (n,), float64
        Of the model with only the client's experts, test samples weighted by the client's class shares.
    """

    accuracy: float
    loss: float
    client_accuracy: Floats

    @property
    def client_mean(self) -> float:
        """Mean over clients."""
        return float(self.client_accuracy.mean())

    @property
    def client_worst_decile(self) -> float:
        """Mean over the worst tenth of the clients."""
        return worst_decile(self.client_accuracy)


def worst_decile(values: npt.ArrayLike) -> float:
    """Return the mean of the lowest tenth, rounded up to whole entries."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    return float(ordered[: math.ceil(len(ordered) / 10)].mean())


@torch.no_grad()
def evaluate(
    model: MixtureOfExperts,
    state: Mapping[str, Tensor],
    data: Dataset,
    shares: Floats,
    held: Sequence[Sequence[int]],
    *,
    device: torch.device,
) -> Evaluation:
    """Evaluate on the test set.

    Parameters
    ----------
    model : MixtureOfExperts
        A workspace with all experts; overwritten by `state`.
    state : mapping of str to Tensor
        Global parameters.
    data : Dataset
    shares : ndarray, shape (n, classes)
        Class shares of every client's own data: its test distribution.
    held : sequence of sequence of int
        Experts of every client; an empty one stands for the whole model.
    device : torch.device
    """
    model.load_parts(state)
    model.eval()
    gate_logs, log_experts = [], []
    for start in range(0, len(data.test_labels), _BATCH):
        images = torch.from_numpy(data.normalised(data.test_images[start : start + _BATCH])).to(device)
        prediction = model(images)
        gate_logs.append(prediction.gate_log.cpu())
        log_experts.append(prediction.expert_log_probabilities.cpu())
    gate_log, experts = torch.cat(gate_logs), torch.cat(log_experts)
    labels = torch.from_numpy(data.test_labels)
    top_k = model.config.routed
    mixture, _ = mix(gate_log, experts, top_k)
    per_class: dict[tuple[int, ...], Floats] = {}
    accuracy = np.empty(len(held))
    for i, numbers in enumerate(held):
        key = tuple(sorted(numbers)) or tuple(range(model.config.experts))
        if key not in per_class:
            columns = list(key)
            answer, _ = mix(gate_log[:, columns], experts[:, columns], top_k)
            per_class[key] = _class_accuracy(answer, labels, data.n_classes)
        accuracy[i] = shares[i] @ per_class[key]
    right = mixture.argmax(dim=1) == labels
    loss = -mixture[torch.arange(len(labels)), labels].double().mean()
    return Evaluation(float(right.double().mean()), float(loss), accuracy)


def _class_accuracy(log_probabilities: Tensor, labels: Tensor, n_classes: int) -> Floats:
    """Accuracy on the test samples of every class; 0 for a class without any."""
    right = (log_probabilities.argmax(dim=1) == labels).numpy()
    numbers = labels.numpy()
    totals = np.bincount(numbers, minlength=n_classes)
    answer: Floats = np.bincount(numbers, weights=right, minlength=n_classes) / np.maximum(totals, 1)
    return answer
