"""What clients can tell a policy or a method beside the rewards of their experts, by name.

A policy names the signals that it asks for in its `variables`; `SIGNALS` lists those that this loop knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.model import MixtureOfExperts
from fedmoe_sched.scores import oort_reward

__all__ = [
    "LARGEST",
    "SIGNALS",
    "Observation",
    "experts_needed",
    "observe",
    "refuse_unknown_signals",
    "signal_fault",
    "tell_signals",
]

_BATCH = 500

#: The most that a client's word is taken for: beyond it sums of what clients tell would lose the others.
LARGEST = 2.0**53

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """What the model says of a client's own samples, as it was received.

    Parameters
    ----------
    n_experts : int
        m.
    n_classes : int
    labels : ndarray, shape (samples,), int64
    gate : ndarray, shape (samples, m)
        Gate probabilities over all experts; rows sum to 1.
    judged : tuple of k ints
    expert_losses : ndarray, shape (samples, k)
        Cross-entropy of each judged expert alone, in nats.
    losses : ndarray, shape (samples,)
        Cross-entropy of the mixture of the client's experts; empty where nobody asked for it.
    hits : ndarray, shape (samples,), bool
        Whether that mixture is right; empty likewise.
    gradients : mapping of int to float
        Of each trained expert, the mean Euclidean norm of its gradient over the steps of the local training;
        empty where nothing was trained.
    """

    n_experts: int
    n_classes: int
    labels: npt.NDArray[np.int64]
    gate: Floats
    judged: tuple[int, ...]
    expert_losses: Floats
    losses: Floats
    hits: npt.NDArray[np.bool_]
    gradients: Mapping[int, float] = field(default_factory=dict)


def _expert_loss(seen: Observation) -> Floats:
    answer = np.full(seen.n_experts, np.nan)
    answer[list(seen.judged)] = seen.expert_losses.mean(axis=0)
    return answer


def _gradient(seen: Observation) -> Floats:
    answer = np.full(seen.n_experts, np.nan)
    for expert, norm in seen.gradients.items():
        answer[expert] = norm
    return answer


#: Name to what it makes of an observation: a number, one per expert (NaN where it cannot be told), or a vector.
SIGNALS: dict[str, Callable[[Observation], npt.ArrayLike]] = {
    # Samples of every class.
    "labels": lambda seen: np.bincount(seen.labels, minlength=seen.n_classes),
    # Number of samples.
    "samples": lambda seen: len(seen.labels),
    # Mean and largest gate probability of every expert over the client's samples.
    "gate_mean": lambda seen: seen.gate.mean(axis=0),
    "gate_max": lambda seen: seen.gate.max(axis=0),
    # Share of the samples that the gate ranks an expert first for.
    "activation": lambda seen: np.bincount(seen.gate.argmax(axis=1), minlength=seen.n_experts) / len(seen.gate),
    # Mean cross-entropy of each expert that was sent, over all samples of the client.
    "expert_loss": _expert_loss,
    # Mean norm of the gradient of each trained expert.
    "gradient": _gradient,
    # Of the mixture of the client's experts, before training.
    "loss": lambda seen: seen.losses.mean(),
    "accuracy": lambda seen: seen.hits.mean(),
    # Oort's statistical utility of the client.
    "oort_utility": lambda seen: oort_reward(len(seen.losses), float(np.square(seen.losses).mean())),
}


#: Those that need the answers of experts; the others are told by the gate and the labels alone.
_OF_MIXTURE = frozenset({"loss", "accuracy", "oort_utility"})
_OF_EXPERTS = frozenset({"expert_loss"})


def experts_needed(
    names: Iterable[str], held: Sequence[int], judged: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return which of the held and the judged experts have to be asked for some signals.

    >>> experts_needed(["gate_mean"], [0, 1], [0, 1, 2]), experts_needed(["loss"], [0, 1], [0, 1, 2])
    (([], []), ([0, 1], []))
    """
    asked = set(names)
    return list(held) if asked & _OF_MIXTURE else [], list(judged) if asked & _OF_EXPERTS else []


def refuse_unknown_signals(names: Iterable[str], who: str) -> None:
    """Refuse signals that this training loop does not know.

    Raises
    ------
    InputError
        Names the first.
    """
    for name in names:
        if name not in SIGNALS:
            msg = f"{who} asks clients for {name!r}: this training loop knows {', '.join(SIGNALS)}"
            raise InputError(msg)


def tell_signals(names: Iterable[str], seen: Observation) -> dict[str, npt.NDArray[np.float64]]:
    """Return the signals of those names."""
    return {name: np.asarray(SIGNALS[name](seen), dtype=np.float64) for name in names}


def signal_fault(
    names: Iterable[str],
    told: Mapping[str, npt.ArrayLike],
    *,
    n_experts: int,
    n_classes: int,
    judged: Sequence[int],
    trained: Sequence[int] = (),
    least: Mapping[str, float] | None = None,
) -> str | None:
    """Say what is wrong with the signals that a client told; None if nothing.

    Parameters
    ----------
    names : iterable of str
        What it was asked for.
    told : mapping of str to array_like
        By name; others than those are not looked at.
    n_experts : int
        m.
    n_classes : int
    judged, trained : sequence of int
        Experts that it was asked about, and trained; of others it can tell nothing (NaN).
    least : mapping of str to float, optional
        The least value of a signal that has one.

    Examples
    --------
    >>> signal_fault(["gate_mean"], {"gate_mean": [0.5, np.nan]}, n_experts=2, n_classes=10, judged=[])
    "signal 'gate_mean'[1] = nan: must be finite"
    """
    one, every = np.ones(1), np.full((1, n_experts), 1 / n_experts)
    norms = dict.fromkeys(trained, 1.0)
    labels, hits, losses = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.bool_), np.ones((1, len(judged)))
    example = Observation(n_experts, n_classes, labels, every, tuple(judged), losses, one, hits, norms)
    faults = (
        _signal_fault(name, told, expected, (least or {}).get(name))
        for name, expected in tell_signals(names, example).items()
    )
    return next((fault for fault in faults if fault is not None), None)


def _signal_fault(
    name: str, told: Mapping[str, npt.ArrayLike], expected: Floats, least: float | None
) -> str | None:
    """Compare a signal with one that a client could tell: of its shape, with numbers where that has numbers."""
    if name not in told:
        return f"lacks the signal {name!r}"
    try:
        value = np.asarray(told[name], dtype=np.float64)
    except (TypeError, ValueError) as error:
        return f"signal {name!r}: cannot be read as numbers ({error})"
    if value.shape != expected.shape:
        return f"signal {name!r}: has shape {value.shape}, must be {expected.shape}"
    for place in np.ndindex(value.shape):
        fault = _number_fault(float(value[place]), float(expected[place]), least)
        if fault is not None:
            return f"signal {name!r}{list(place) if place else ''} = {value[place]}: {fault}"
    return None


def _number_fault(number: float, expected: float, least: float | None) -> str | None:
    if np.isnan(expected):
        return None if np.isnan(number) else "must be nan, the client was not asked about this expert"
    if not np.isfinite(number):
        return "must be finite"
    if abs(number) > LARGEST:
        return "must be at most 2**53"
    return None if least is None or number >= least else f"must be >= {least:g}"


@torch.no_grad()
def observe(
    model: MixtureOfExperts,
    images: Tensor,
    labels: Tensor,
    held: Sequence[int],
    judged: Sequence[int],
    *,
    n_classes: int,
) -> Observation:
    """Look at a client's samples with its model.

    Parameters
    ----------
    model : MixtureOfExperts
        With the parameters of `held` and `judged` experts loaded.
    images : Tensor, shape (samples, channels, height, width)
    labels : Tensor, shape (samples,)
    held : sequence of int
        Experts of the client's mixture; with none `Observation.losses` and ``hits`` are empty.
    judged : sequence of int
        Experts to judge on their own.
    n_classes : int
    """
    model.eval()
    known = sorted({*held, *judged})
    own, asked = [known.index(j) for j in held], [known.index(j) for j in judged]
    gates, experts, losses, hits = [], [], [], []
    for start in range(0, len(labels), _BATCH):
        y = labels[start : start + _BATCH]
        part, rows = images[start : start + _BATCH], torch.arange(len(y))
        if not known:
            gates.append(model.gate_log(part).exp())
            continue
        seen = model(part, known)
        gates.append(seen.full_gate_log.exp())
        experts.append(-seen.expert_log_probabilities[rows, :, y][:, asked])
        if own:
            mixture = seen.log_probabilities if len(own) == len(known) else model.mixture(seen, own)
            losses.append(-mixture[rows, y])
            hits.append(mixture.argmax(dim=1) == y)
    return Observation(
        model.config.experts,
        n_classes,
        labels.cpu().numpy(),
        _joined(gates),
        tuple(judged),
        _joined(experts) if known else np.zeros((len(labels), 0)),
        _joined(losses),
        torch.cat(hits).cpu().numpy() if hits else np.zeros(0, dtype=np.bool_),
    )


def _joined(parts: Sequence[Tensor]) -> Floats:
    joined: Floats = torch.cat(list(parts)).double().cpu().numpy() if parts else np.zeros(0)
    return joined
