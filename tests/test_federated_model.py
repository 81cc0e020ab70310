"""The Mixture-of-Experts model and local training: masked gate, untouched parts, seeds, feedback."""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")

import torch

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.aggregate import expert_of
from fedmoe_sched.federated.client import expert_feedback, train_client
from fedmoe_sched.federated.config import LocalConfig, ModelConfig
from fedmoe_sched.federated.model import MixtureOfExperts, build_model, mix, parameter_counts

pytestmark = pytest.mark.train

CONFIG = ModelConfig(experts=4, channels=[4, 8], expert_hidden=6)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def random_gate(model, scale=0.2):
    with torch.no_grad():
        model.gate.weight.normal_(std=scale, generator=torch.Generator().manual_seed(3))
    return model


@pytest.fixture
def model():
    torch.set_num_threads(1)
    return random_gate(build_model(CONFIG, 1, 10, seed=0))


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(24, 1, 8, 8)).astype(np.float32)
    labels = np.repeat(np.arange(3), 8)
    corners = [(slice(4), slice(4)), (slice(4), slice(4, 8)), (slice(4, 8), slice(4))]
    for image, label in zip(images, labels, strict=True):
        image[0][corners[label]] += 3  # another bright corner for each class: easy to learn
    return torch.from_numpy(images), torch.from_numpy(labels)


def test_the_gate_is_restricted_to_the_held_experts(model, batch):
    x, _ = batch
    whole, part = model(x), model(x, [1, 3])
    assert torch.allclose(part.routing.sum(dim=1), torch.ones(len(x)))
    expected = whole.routing[:, [1, 3]] / whole.routing[:, [1, 3]].sum(dim=1, keepdim=True)
    assert torch.allclose(part.routing, expected, atol=1e-6)
    assert torch.allclose(part.held_log_mass.exp(), whole.routing[:, [1, 3]].sum(dim=1), atol=1e-6)
    mixture = (part.routing[:, :, None] * part.expert_log_probabilities.exp()).sum(dim=1)
    assert torch.allclose(part.log_probabilities.exp(), mixture, atol=1e-6)
    assert torch.allclose(mixture.sum(dim=1), torch.ones(len(x)), atol=1e-5)


def test_one_expert_alone_is_not_routed(model, batch):
    answer = model(batch[0], [2])
    assert torch.equal(answer.log_probabilities, answer.expert_log_probabilities[:, 0])


def test_top_k_uses_the_experts_that_the_gate_ranks_highest():
    gate = torch.log(torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]]))
    log_experts = torch.log(torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0)))
    log_experts = torch.log_softmax(log_experts, dim=2)
    mixture, routing = mix(gate, log_experts, 1)
    assert routing.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert torch.allclose(mixture, log_experts[[0, 1], [1, 0]])
    _, routing = mix(gate, log_experts, 2)
    assert torch.allclose(routing, torch.tensor([[0, 2 / 3, 1 / 3], [5 / 8, 0, 3 / 8]]))


def test_top_k_gradients_are_finite(batch):
    model = random_gate(build_model(CONFIG.model_copy(update={"routing": "top-k", "top_k": 1}), 1, 10, seed=0))
    model(batch[0])[0][:, 0].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_model_is_seeded_and_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    one, same, other = (state_of(build_model(CONFIG, 1, 10, seed=s)) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    # Experts must not start out as copies of one another.
    assert not torch.equal(one["experts.0.2.weight"], one["experts.1.2.weight"])


def test_parameter_counts_by_hand():
    counts = parameter_counts(
        build_model(ModelConfig(experts=3, channels=[4], expert_hidden=0, pool=2), 1, 10, seed=0)
    )
    extractor = 4 * 9 + 4 + 2 * 4  # 3 x 3 convolution with bias, GroupNorm
    gate = 16 * 3 + 3
    expert = 16 * 10 + 10
    assert counts == {"shared": extractor + gate, "expert": expert, "total": extractor + gate + 3 * expert}


@pytest.mark.parametrize("size", [8, 28, 32, 5])
def test_image_sizes_and_expert_blocks(size):
    model = build_model(ModelConfig(channels=[4, 6], expert_channels=[5], experts=2), 3, 7, seed=0)
    assert model(torch.zeros(2, 3, size, size)).log_probabilities.shape == (2, 7)


def test_a_client_may_build_only_its_experts(model, batch):
    part = MixtureOfExperts(CONFIG, 1, 10, experts=[3, 1])
    part.load_parts(state_of(model))
    assert {expert_of(n) for n in part.state_dict()} == {None, 1, 3}
    model.eval()
    assert torch.equal(part(batch[0]).log_probabilities, model(batch[0], [1, 3]).log_probabilities)
    with pytest.raises(InputError, match=r"lacks the parameter 'experts\.3\."):
        part.load_parts({n: v for n, v in state_of(model).items() if expert_of(n) != 3})


def train(model, state, batch, held=(1, 3), seed=(0, 1, 2), **options):
    config = LocalConfig(**{"epochs": 3, "batch_size": 8} | options)
    return train_client(model, state, *batch, list(held), config=config, client="anna", seed=seed)


def test_only_assigned_experts_and_shared_parts_are_trained_and_sent(model, batch):
    state = state_of(model)
    result = train(model, state, batch)
    assert {expert_of(n) for n in result.update.parameters} == {None, 1, 3}
    assert all(not torch.equal(v, state[n]) for n, v in result.update.parameters.items() if v.ndim > 1)
    now = model.state_dict()
    assert all(torch.equal(now[n], state[n]) for n in state if expert_of(n) in {0, 2})
    assert result.update.samples == 24
    assert sum(result.update.expert_samples.values()) == pytest.approx(24)
    assert set(result.rewards) == {1, 3}


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"train_extractor": False}, {"gate", "experts"}),
        ({"train_gate": False}, {"extractor", "experts"}),
        ({"train_gate": False, "train_extractor": False}, {"experts"}),
    ],
)
def test_shared_parts_are_trained_as_configured(model, batch, options, moved):
    state = state_of(model)
    result = train(model, state, batch, weight_decay=0.1, **options)
    changed = {n.split(".")[0] for n, v in result.update.parameters.items() if not torch.equal(v, state[n])}
    assert changed == moved
    assert {n.split(".")[0] for n in result.update.parameters} == moved  # nothing else is sent


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_are_those_of_the_formula(model, batch, momentum):
    """v <- momentum v + gradient + decay w, w <- w - rate v; a batch holds all samples, in whatever order."""
    x, y = batch
    state, velocity = state_of(model), {}
    options = {"epochs": 4, "batch_size": 24, "momentum": momentum, "weight_decay": 0.05, "clip_norm": 0.0}
    rates = {"learning_rate": 0.05, "gate_learning_rate": 0.2}
    sent = train(model, state, batch, **options, **rates).update.parameters
    model.load_state_dict(state)
    trained = {name: p for name, p in model.named_parameters() if expert_of(name) in {None, 1, 3}}
    for _ in range(4):
        prediction = model(x, [1, 3])
        picked = prediction.log_probabilities[torch.arange(len(y)), y]
        loss = -picked.mean() - prediction.held_log_mass.mean()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for (name, p), gradient in zip(trained.items(), gradients, strict=True):
                velocity[name] = momentum * velocity.get(name, 0.0) + gradient + 0.05 * p
                trained[name] -= (0.2 if name.startswith("gate") else 0.05) * velocity[name]
    assert sent.keys() == trained.keys()
    for name, p in trained.items():
        assert torch.allclose(sent[name], p, atol=1e-6), name
        assert not torch.allclose(sent[name], state[name], atol=1e-4), name


def test_training_learns(model, batch):
    state = state_of(model)
    first = train(model, state, batch, epochs=1)
    assert train(model, state, batch, epochs=20).loss < 0.7 * first.loss
    assert train(model, state, batch, held=[1], epochs=20, reward_at="after").rewards[1] > 0.9


def test_the_result_depends_on_the_seed_and_on_nothing_else(model, batch):
    state = state_of(model)
    one = train(model, state, batch)
    train(model, state, batch, held=[0, 1, 2], seed=(5,))  # other work in the same workspace
    torch.manual_seed(99)
    same, other = train(model, state, batch, held=[3, 1]), train(model, state, batch, seed=(0, 1, 3))
    assert all(torch.equal(v, same.update.parameters[n]) for n, v in one.update.parameters.items())
    assert one.rewards == same.rewards
    assert any(not torch.equal(v, other.update.parameters[n]) for n, v in one.update.parameters.items())


def test_the_routing_loss_draws_the_gate_to_the_held_experts(model, batch):
    state = state_of(model)

    def mass(weight):
        train(model, state, batch, epochs=10, routing_weight=weight)
        with torch.no_grad():
            return float(model(batch[0], [1, 3]).held_log_mass.exp().mean())

    assert mass(1.0) > mass(0.0) + 0.1


def test_feedback_by_hand(model, batch):
    x, y = batch
    feedback = expert_feedback(model, x, y, [0, 2])
    with torch.no_grad():
        answer = model(x, [0, 2])
    for k, j in enumerate((0, 2)):
        weights = answer.routing[:, k].double()
        right = (answer.expert_log_probabilities[:, k].argmax(dim=1) == y).double()
        losses = -answer.expert_log_probabilities[torch.arange(24), k, y].double()
        assert feedback[j].samples == pytest.approx(float(weights.sum()))
        assert feedback[j].accuracy == pytest.approx(float((weights * right).sum() / weights.sum()))
        assert feedback[j].loss == pytest.approx(float((weights * losses).sum() / weights.sum()))
        assert feedback[j].frequency == pytest.approx(float(answer.gate_log[:, k].exp().mean()))


def test_an_expert_that_gets_less_than_a_sample_is_judged_on_all(model, batch):
    alone = expert_feedback(model, *batch, [1])[1]
    for bias in (-100.0, -9.0):
        with torch.no_grad():
            model.gate.weight.zero_()
            model.gate.bias.copy_(torch.tensor([0.0, bias, 0.0, 0.0]))
        feedback = expert_feedback(model, *batch, [0, 1])[1]
        assert 0 <= feedback.samples < 0.01
        assert (feedback.accuracy, feedback.loss) == pytest.approx((alone.accuracy, alone.loss))


@pytest.mark.parametrize(("reward", "attribute"), [("accuracy", "accuracy"), ("frequency", "frequency")])
def test_rewards_are_those_asked_for(model, batch, reward, attribute):
    state = state_of(model)
    feedback = expert_feedback(model, *batch, [1, 3])
    rewards = train(model, state, batch, reward=reward).rewards
    assert rewards == {j: getattr(feedback[j], attribute) for j in (1, 3)}
    losses = train(model, state, batch, reward="loss").rewards
    assert losses == pytest.approx({j: np.exp(-feedback[j].loss) for j in (1, 3)})
    assert train(model, state, batch, reward=reward, reward_at="after").rewards != rewards


def test_a_client_needs_experts_and_samples(model, batch):
    with pytest.raises(InputError, match="client 'anna': has 0 experts and 24 samples"):
        train(model, state_of(model), batch, held=[])
