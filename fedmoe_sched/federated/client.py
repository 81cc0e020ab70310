"""Local training of one client in one round: its assigned experts, and the shared parts where configured."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.sgd import sgd

from fedmoe_sched._arrays import IntArray
from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.aggregate import Update
from fedmoe_sched.federated.config import LocalConfig
from fedmoe_sched.federated.cost import is_trained
from fedmoe_sched.federated.model import MixtureOfExperts
from fedmoe_sched.federated.signals import experts_needed, observe, tell_signals
from fedmoe_sched.scores import accuracy_reward, loss_reward

__all__ = ["ExpertFeedback", "LocalResult", "expert_feedback", "train_client"]

_EVALUATION_BATCH = 128


@dataclass(frozen=True)
class ExpertFeedback:
    """How one expert does on one client's data.

    Parameters
    ----------
    samples : float
        Samples that the client's router sends to the expert (a sum of routing weights).
    accuracy, loss : float
        Over those samples, the expert alone: share of right answers, mean cross-entropy in nats.
    frequency : float
        Mean probability of the expert in the gate over all experts, 0 to 1.
    """

    samples: float
    accuracy: float
    loss: float
    frequency: float


@dataclass(frozen=True)
class LocalResult:
    """What a client answers.

    Parameters
    ----------
    update : Update
        For the aggregation.
    rewards : dict of int to float
        Reward of every expert that it trained, for the scheduler.
    loss : float
        Mean training loss over the local steps.
    seconds : float
        Wall time.
    """

    update: Update
    rewards: dict[int, float]
    loss: float
    seconds: float


def train_client(
    model: MixtureOfExperts,
    state: Mapping[str, Tensor],
    images: Tensor,
    labels: Tensor,
    held: Sequence[int],
    *,
    config: LocalConfig,
    client: Hashable,
    seed: Sequence[int],
    trained: Sequence[int] | None = None,
    judged: Sequence[int] = (),
    signals: Sequence[str] = (),
) -> LocalResult:
    """Train the assigned experts on the client's own samples.

    Parameters
    ----------
    model : MixtureOfExperts
        A workspace; its parameters are overwritten.
    state : mapping of str to Tensor
        Global parameters; not changed.
    images : Tensor, shape (samples, channels, height, width), float32
    labels : Tensor, shape (samples,), int64
    held : sequence of int
        Experts assigned to the client, at least one.
    config : LocalConfig
    client : hashable
        Its name.
    seed : sequence of int
        E.g. (run seed, round, client number): the result depends on nothing else.
    trained : sequence of int, optional
        Those of the held experts to train, the others stay frozen; all by default. Only they get rewards.
    judged : sequence of int
        Experts, held or not, for the signal ``expert_loss``.
    signals : sequence of str
        What else to tell, see `fedmoe_sched.federated.signals`.

    Raises
    ------
    InputError
        No experts or no samples.
    """
    if not len(held) or not len(labels):
        msg = f"client {client!r}: has {len(held)} experts and {len(labels)} samples, needs at least one of each"
        raise InputError(msg)
    started = time.perf_counter()
    held = sorted(int(j) for j in held)
    own = held if trained is None else sorted(int(j) for j in trained)
    model.load_parts(state, {*held, *judged})
    seen = None
    if signals:
        mixed, asked = experts_needed(signals, held, judged)
        seen = observe(model, images, labels, mixed, asked, n_classes=model.n_classes)
    before = expert_feedback(model, images, labels, held)
    norms: dict[int, list[Tensor]] | None = {j: [] for j in own} if "gradient" in signals else None
    rng = np.random.default_rng(list(seed))
    loss = _train(model, images, labels, held, own, config=config, rng=rng, norms=norms)
    feedback = before if config.reward_at == "before" else expert_feedback(model, images, labels, held)
    parameters = {
        name: value.detach().clone() for name, value in model.state_dict().items() if is_trained(name, own, config)
    }
    told = {}
    if seen is not None:
        gradients = {j: float(torch.stack(steps).double().mean()) for j, steps in (norms or {}).items()}
        told = tell_signals(signals, replace(seen, gradients=gradients))
    update = Update(client, parameters, float(len(labels)), {j: feedback[j].samples for j in own}, told)
    rewards = {j: _reward(config.reward, feedback[j]) for j in own}
    return LocalResult(update, rewards, loss, time.perf_counter() - started)


def _train(
    model: MixtureOfExperts,
    images: Tensor,
    labels: Tensor,
    held: Sequence[int],
    trained: Sequence[int],
    *,
    config: LocalConfig,
    rng: np.random.Generator,
    norms: dict[int, list[Tensor]] | None = None,
) -> float:
    """Run the local epochs of stochastic gradient descent; return the mean loss, and collect gradient norms."""
    rates = _learning_rates(model, trained, config)
    parameters = [p for group, _ in rates for p in group]
    momenta: dict[Tensor, Tensor | None] = {}
    model.train()
    losses = []
    for _ in range(config.epochs):
        order = rng.permutation(len(labels)).astype(np.int64)
        for batch in _batches(order, config.batch_size):
            rows = torch.from_numpy(batch).to(labels.device)
            prediction = model(images[rows], held)
            loss = functional.nll_loss(prediction.log_probabilities, labels[rows])
            total = loss - config.routing_weight * prediction.held_log_mass.mean()
            for parameter in parameters:
                parameter.grad = None
            total.backward()
            for expert, steps in (norms or {}).items():
                steps.append(_gradient_norm(model.experts[str(expert)]))
            if config.clip_norm:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm, foreach=True)
            _step(rates, momenta, config)
            losses.append(loss.detach())
    return float(torch.stack(losses).double().mean())


def _gradient_norm(expert: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in expert.parameters() if p.grad is not None])


def _batches(order: IntArray, size: int) -> list[IntArray]:
    """Cut into batches of nearly equal length, so that no last batch of one sample makes a wild step."""
    return np.array_split(order, -(-len(order) // size))


def _learning_rates(
    model: MixtureOfExperts, trained: Sequence[int], config: LocalConfig
) -> list[tuple[list[nn.Parameter], float]]:
    """List the parameters that are trained, with their learning rates; freeze all others."""
    # Parts that are not trained are left out, so that weight decay does not touch them either.
    rates = [([p for j in trained for p in model.experts[str(j)].parameters()], config.learning_rate)]
    if config.train_extractor:
        rates.append((list(model.extractor.parameters()), config.learning_rate))
    if config.train_gate:
        rates.append((list(model.gate.parameters()), config.gate_learning_rate or config.learning_rate))
    for parameter in model.parameters():
        parameter.requires_grad = False
    for group, _ in rates:
        for parameter in group:
            parameter.requires_grad = True
    return rates


@torch.no_grad()
def _step(
    rates: list[tuple[list[nn.Parameter], float]], momenta: dict[Tensor, Tensor | None], config: LocalConfig
) -> None:
    """Take the step of `torch.optim.SGD`; that class would import torch's compiler, as slow as torch itself."""
    for group, rate in rates:
        moved: list[Tensor] = [p for p in group if p.grad is not None]
        gradients = [p.grad for p in moved if p.grad is not None]
        buffers = [momenta.get(p) for p in moved]
        sgd(
            moved,
            gradients,
            buffers,
            foreach=True,  # one call for all parameters, not one each: they are small
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            lr=rate,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        momenta.update(zip(moved, buffers, strict=True))


@torch.no_grad()
def expert_feedback(
    model: MixtureOfExperts, images: Tensor, labels: Tensor, held: Sequence[int]
) -> dict[int, ExpertFeedback]:
    """Judge every held expert on the samples that the router sends to it.

    Parameters
    ----------
    model : MixtureOfExperts
    images : Tensor, shape (samples, channels, height, width)
    labels : Tensor, shape (samples,)
    held : sequence of int

    Returns
    -------
    dict of int to ExpertFeedback
        An expert that gets less than one sample is judged on all of them: a sliver of them says nothing.
    """
    model.eval()
    sums = torch.zeros(4, len(held), dtype=torch.float64)
    plain = torch.zeros(2, len(held), dtype=torch.float64)
    for start in range(0, len(labels), _EVALUATION_BATCH):
        y = labels[start : start + _EVALUATION_BATCH]
        prediction = model(images[start : start + _EVALUATION_BATCH], held)
        routing = prediction.routing.double()
        losses = -prediction.expert_log_probabilities[torch.arange(len(y)), :, y].double()
        right = (prediction.expert_log_probabilities.argmax(dim=2) == y[:, None]).double()
        parts = (routing, routing * right, routing * losses, prediction.gate_log.double().exp())
        sums += torch.stack([part.sum(dim=0) for part in parts]).cpu()
        plain += torch.stack([right.sum(dim=0), losses.sum(dim=0)]).cpu()
    n = len(labels)
    answer = {}
    for k, j in enumerate(held):
        samples, right_sum, loss_sum, mass = (float(v) for v in sums[:, k])
        weight = samples
        if samples < 1:
            weight, right_sum, loss_sum = n, float(plain[0, k]), float(plain[1, k])
        # Rounding of the routing weights may put the sum of all right answers a hair above that of all samples.
        accuracy = float(accuracy_reward(min(right_sum, weight), weight))
        answer[int(j)] = ExpertFeedback(samples, accuracy, loss_sum / weight, mass / n)
    return answer


def _reward(kind: str, feedback: ExpertFeedback) -> float:
    if kind == "accuracy":
        return feedback.accuracy
    return float(loss_reward(feedback.loss)) if kind == "loss" else feedback.frequency
