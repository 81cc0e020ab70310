"""The global Mixture-of-Experts model: a shared feature extractor, m experts and a gate, in PyTorch.

With gate probabilities g_j(x) and expert predictions p_j(y | x) the model is the mixture of Jacobs, Jordan, Nowlan
and Hinton (Neural Computation 3, 1991), p(y | x) = sum_j g_j(x) p_j(y | x). A client that holds only some experts
uses the gate restricted to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.aggregate import expert_of
from fedmoe_sched.federated.config import ModelConfig

__all__ = ["MixtureOfExperts", "Prediction", "build_model", "mix", "parameter_counts"]


class Prediction(NamedTuple):
    """What the held experts say about a batch of B samples; k experts are held.

    Parameters
    ----------
    log_probabilities : Tensor, shape (B, classes)
        Log of the mixture.
    expert_log_probabilities : Tensor, shape (B, k, classes)
        Log prediction of every held expert, in the order of `held`.
    routing : Tensor, shape (B, k)
        Gate probabilities restricted to the held experts; rows sum to 1.
    gate_log : Tensor, shape (B, k)
        Log of the gate's probability, over all m experts, of every held one.
    held_log_mass : Tensor, shape (B,)
        Log of the gate's probability, over all m experts, of the held ones together; 0 where all are held.
    full_gate_log : Tensor, shape (B, m)
        Log of the gate's probability of every expert.
    """

    log_probabilities: Tensor
    expert_log_probabilities: Tensor
    routing: Tensor
    gate_log: Tensor
    held_log_mass: Tensor
    full_gate_log: Tensor


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    # GroupNorm: batch statistics of non-IID clients must not be averaged.
    groups = next(g for g in (4, 2, 1) if channels_out % g == 0)
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.GroupNorm(groups, channels_out),
        # ReLU grows with its argument: after the maximum it gives the same with a quarter of the work.
        nn.MaxPool2d(2, ceil_mode=True),
        nn.ReLU(),
    )


def _blocks(channels: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(_block(a, b) for a, b in pairwise(channels)))


class _Pooled(nn.Module):
    """Average a feature map to ``size x size`` and flatten it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, features: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(features, self.size).flatten(1)


def _expert(config: ModelConfig, number: int, in_channels: int, n_classes: int) -> nn.Sequential:
    channels = [in_channels, *config.expert_channels]
    width = channels[-1] * config.pool**2
    head: list[nn.Module] = []
    hidden = config.hidden_of(number)
    if hidden:
        head = [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(_blocks(channels), _Pooled(config.pool), *head, nn.Linear(width, n_classes))


def mix(gate_log: Tensor, log_experts: Tensor, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Mix experts' predictions by the gate restricted to them.

    Parameters
    ----------
    gate_log : Tensor, shape (B, k)
        Log gate probabilities of the experts to mix, up to a constant per sample.
    log_experts : Tensor, shape (B, k, classes)
        Log predictions of the same experts.
    top_k : int or None
        Use only so many of them per sample, those that the gate ranks highest; None for all.

    Returns
    -------
    log_probabilities : Tensor, shape (B, classes)
    routing : Tensor, shape (B, k)
        Weights of the mixture; rows sum to 1.
    """
    if top_k is not None and top_k < gate_log.shape[1]:
        kept = torch.zeros_like(gate_log, dtype=torch.bool)
        kept.scatter_(1, gate_log.topk(top_k, dim=1).indices, value=True)
        gate_log = gate_log.masked_fill(~kept, -torch.inf)
    routing_log = functional.log_softmax(gate_log, dim=1)
    return torch.logsumexp(log_experts + routing_log.unsqueeze(2), dim=1), routing_log.exp()


class MixtureOfExperts(nn.Module):
    """Shared convolutional extractor, experts and a linear gate.

    Parameters of expert j are named ``experts.{j}.*``; all others (``extractor.*``, ``gate.*``) are shared.

    Parameters
    ----------
    config : ModelConfig
    in_channels, n_classes : int
    experts : iterable of int, optional
        The experts to build; a client needs only those it holds. All of them by default.
    """

    def __init__(
        self, config: ModelConfig, in_channels: int, n_classes: int, *, experts: Iterable[int] | None = None
    ) -> None:
        super().__init__()
        self.config, self.n_classes = config, n_classes
        self.extractor = _blocks([in_channels, *config.channels])
        width = [in_channels, *config.channels][-1]
        self.gate = nn.Linear(width * config.pool**2, config.experts)
        # An even start: before it has learnt anything the gate prefers no expert.
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        numbers = range(config.experts) if experts is None else sorted(experts)
        self.pooled = _Pooled(config.pool)
        self.experts = nn.ModuleDict({str(j): _expert(config, j, width, n_classes) for j in numbers})
        # Convolutions and, above all, pooling are several times faster on CPUs with the channels innermost.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor, held: Sequence[int] | None = None) -> Prediction:
        """Predict with the held experts only.

        Parameters
        ----------
        images : Tensor, shape (B, channels, height, width)
        held : sequence of int, optional
            Distinct expert numbers; all experts that were built by default.

        Returns
        -------
        Prediction
        """
        numbers = [int(j) for j in self.experts] if held is None else list(held)
        features = self.extractor(images.contiguous(memory_format=torch.channels_last))
        pooled = self.pooled(features)
        full_gate_log = self._gate_log(pooled)
        gate_log = full_gate_log[:, numbers]
        answers = torch.stack([self._answer(j, features, pooled) for j in numbers], dim=1)
        log_experts = functional.log_softmax(answers, dim=2)
        mixture, routing = mix(gate_log, log_experts, self.config.routed)
        whole = len(numbers) == self.config.experts
        mass = gate_log.new_zeros(len(images)) if whole else torch.logsumexp(gate_log, dim=1)
        return Prediction(mixture, log_experts, routing, gate_log, mass, full_gate_log)

    def gate_log(self, images: Tensor) -> Tensor:
        """Return the log of the gate's probability of every expert, shape (B, m), without asking any expert."""
        features = self.extractor(images.contiguous(memory_format=torch.channels_last))
        return self._gate_log(self.pooled(features))

    def _gate_log(self, pooled: Tensor) -> Tensor:
        return functional.log_softmax(self.gate(pooled), dim=1)

    def mixture(self, seen: Prediction, columns: Sequence[int]) -> Tensor:
        """Return the log mixture of some of the experts of a prediction, by their columns in it."""
        chosen = list(columns)
        return mix(seen.gate_log[:, chosen], seen.expert_log_probabilities[:, chosen], self.config.routed)[0]

    def _answer(self, expert: int, features: Tensor, pooled: Tensor) -> Tensor:
        """Logits of one expert; one without blocks of its own takes what is pooled for all, gate and experts."""
        blocks, pool, *head = self.experts[str(expert)].children()
        answer = pool(blocks(features)) if self.config.expert_channels else pooled
        for layer in head:
            answer = layer(answer)
        return answer

    def load_parts(self, state: Mapping[str, Tensor], held: Iterable[int] | None = None) -> None:
        """Take over global parameters: the shared ones, and those of the held experts.

        Parameters
        ----------
        state : mapping of str to Tensor
            The global parameters; may hold experts that are not built here.
        held : iterable of int, optional
            All that are built here by default; the others keep what they have.

        Raises
        ------
        InputError
            A parameter is missing.
        """
        parts = None if held is None else {None, *held}
        for name, own in self.state_dict().items():
            if parts is None or expert_of(name) in parts:
                if name not in state:
                    msg = f"state: lacks the parameter {name!r}"
                    raise InputError(msg)
                own.copy_(state[name])


def build_model(config: ModelConfig, in_channels: int, n_classes: int, *, seed: int) -> MixtureOfExperts:
    """Build the global model with seeded initial parameters; torch's own random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtureOfExperts(config, in_channels, n_classes)


def parameter_counts(model: MixtureOfExperts) -> dict[str, int]:
    """Count parameters.

    Returns
    -------
    dict
        ``shared`` (extractor and gate), ``expert`` (the largest expert), ``total``.
    """
    counts: dict[int | None, int] = {}
    for name, parameter in model.named_parameters():
        part = expert_of(name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    shared = counts.pop(None, 0)
    return {"shared": shared, "expert": max(counts.values(), default=0), "total": shared + sum(counts.values())}
