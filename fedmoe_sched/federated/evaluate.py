"""Evaluation of the global model: as a whole, and as each client sees it with its experts and its own data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe_sched._arrays import IntArray
from fedmoe_sched.federated.model import MixtureOfExperts, mix
from fedmoe_sched.federated.preparation import Prepared

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
        Of the model with only the client's experts, test samples weighted by the shares of their kinds (classes,
        and domains) in the client's own data.
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
    prepared: Prepared,
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
    prepared : Prepared
        Its test set, and the shares of its kinds for every client.
    held : sequence of sequence of int
        Experts of every client; an empty one stands for the whole model.
    device : torch.device
    """
    model.load_parts(state)
    model.eval()
    data = prepared.data
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
    per_cell: dict[tuple[int, ...], Floats] = {}
    accuracy = np.empty(len(held))
    for i, numbers in enumerate(held):
        key = tuple(sorted(numbers)) or tuple(range(model.config.experts))
        if key not in per_cell:
            columns = list(key)
            answer, _ = mix(gate_log[:, columns], experts[:, columns], top_k)
            right = (answer.argmax(dim=1) == labels).numpy()
            per_cell[key] = _cell_accuracy(right, prepared.cells, prepared.shares.shape[1])
        accuracy[i] = prepared.shares[i] @ per_cell[key]
    hits = mixture.argmax(dim=1) == labels
    loss = -mixture[torch.arange(len(labels)), labels].double().mean()
    return Evaluation(float(hits.double().mean()), float(loss), accuracy)


def _cell_accuracy(right: npt.NDArray[np.bool_], cells: IntArray, count: int) -> Floats:
    """Accuracy on the test samples of every kind; 0 for a kind without any."""
    totals = np.bincount(cells, minlength=count)
    answer: Floats = np.bincount(cells, weights=right, minlength=count) / np.maximum(totals, 1)
    return answer
