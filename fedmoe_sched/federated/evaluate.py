"""Evaluation of the global model: as a whole, and as each client sees it with its experts and its own data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe_sched._arrays import IntArray
from fedmoe_sched.federated.methods import View
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
        Of the client's model, with only its experts, test samples weighted by the shares of their kinds (classes,
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
    clients: Sequence[View],
    *,
    device: torch.device,
    whole: View | None = None,
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
    clients : sequence of View
        The model of every client.
    device : torch.device
    whole : View, optional
        The global model as somebody uses it who takes no part in the training; all of it by default.
    """
    whole = whole or View(())
    test, every = _TestSet(model, prepared, device), range(len(prepared.data.test_labels))
    common = None
    if not whole.parts or any(not view.parts for view in clients):
        common = test.answers(state, View(()), every)
    answer = test.answers(state, whole, every) if whole.parts or common is None else common.part(whole.experts)
    labels = torch.from_numpy(prepared.data.test_labels)
    hits = answer.mixture.argmax(dim=1) == labels
    loss = -answer.mixture[torch.arange(len(labels)), labels].double().mean()
    per_cell: dict[tuple[int, ...], Floats] = {}
    accuracy = np.empty(len(clients))
    for i, view in enumerate(clients):
        if view.parts or common is None:
            seen = np.flatnonzero(prepared.shares[i, prepared.cells] > 0)  # the others have no weight
            cells = test.accuracy(test.answers(state, view, seen), seen) if len(seen) else prepared.shares[i] * 0
        else:
            key = tuple(sorted(view.experts))
            if key not in per_cell:
                per_cell[key] = test.accuracy(common.part(key), every)
            cells = per_cell[key]
        accuracy[i] = prepared.shares[i] @ cells
    return Evaluation(float(hits.double().mean()), float(loss), accuracy)


class _Answers(NamedTuple):
    """What k experts and the gate say of some test samples."""

    gate_log: Tensor
    experts: Tensor
    top_k: int | None

    @property
    def mixture(self) -> Tensor:
        return mix(self.gate_log, self.experts, self.top_k)[0]

    def part(self, numbers: Sequence[int]) -> _Answers:
        """Keep some of the experts; all where none is named."""
        if not len(numbers):
            return self
        columns = list(numbers)
        return _Answers(self.gate_log[:, columns], self.experts[:, columns], self.top_k)


class _TestSet:
    """The test samples, and the workspace that answers them."""

    def __init__(self, model: MixtureOfExperts, prepared: Prepared, device: torch.device) -> None:
        self._model, self._prepared, self._device = model, prepared, device

    def answers(self, state: Mapping[str, Tensor], view: View, rows: Sequence[int] | IntArray) -> _Answers:
        """Ask the model of a view about some samples."""
        model, data = self._model, self._prepared.data
        held = sorted(view.experts) or list(range(model.config.experts))
        parts = {name: torch.as_tensor(value).to(self._device) for name, value in view.parts.items()}
        model.load_parts({**state, **parts}, held)
        model.eval()
        gate_logs, log_experts = [], []
        for start in range(0, len(rows), _BATCH):
            images = data.test_images[np.asarray(rows[start : start + _BATCH])]
            prediction = model(torch.from_numpy(data.normalised(images)).to(self._device), held)
            gate_logs.append(prediction.gate_log.cpu())
            log_experts.append(prediction.expert_log_probabilities.cpu())
        return _Answers(torch.cat(gate_logs), torch.cat(log_experts), model.config.routed)

    def accuracy(self, answers: _Answers, rows: Sequence[int] | IntArray) -> Floats:
        """Accuracy on every kind of the test samples that were answered."""
        chosen = np.asarray(rows)
        right = (
            answers.mixture.argmax(dim=1) == torch.from_numpy(self._prepared.data.test_labels[chosen])
        ).numpy()
        return _cell_accuracy(right, self._prepared.cells[chosen], self._prepared.shares.shape[1])


def _cell_accuracy(right: npt.NDArray[np.bool_], cells: IntArray, count: int) -> Floats:
    """Accuracy on the test samples of every kind; 0 for a kind without any."""
    totals = np.bincount(cells, minlength=count)
    answer: Floats = np.bincount(cells, weights=right, minlength=count) / np.maximum(totals, 1)
    return answer
