"""Methods: what is sent, trained, frozen, kept and merged around the assignment, and the signals of clients."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

import torch

from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.aggregate import Update
from fedmoe_sched.federated.client import train_client
from fedmoe_sched.federated.config import LocalConfig, ModelConfig
from fedmoe_sched.federated.methods import METHODS, Brief, Method, Setting, View, make_method, register_method
from fedmoe_sched.federated.model import build_model
from fedmoe_sched.federated.runs import RunFolder, is_timing
from fedmoe_sched.federated.signals import SIGNALS, experts_needed, observe, tell_signals
from fedmoe_sched.policies import POLICIES, StateVariable, register_policy
from fedmoe_sched.scheduler import Scheduler

pytestmark = pytest.mark.train

SMALL = {
    "policy": "personal-gate",
    "rounds": 4,
    "seed": 3,
    "data": {"train_samples": 160, "test_samples": 60},
    "clients": {"count": 6, "capacity": [1, 2], "participation": 0.75, "failure_rate": 0.1, "min_samples": 4},
    "model": {"experts": 4, "channels": [4], "expert_hidden": [4, 2]},
    "local": {"batch_size": 32},
}


class PersonalGate(Method):
    """Every client keeps a gate of its own, and is sent expert 0 to be asked about, not to train."""

    name = "personal-gate"
    signals = ("expert_loss",)
    seen: list = []  # noqa: RUF012

    def is_personal(self, name):
        return name.startswith("gate.")

    def brief(self, client, experts, state):
        plain = super().brief(client, experts, state)
        trained = tuple(j for j in experts if j != 0) or tuple(experts)
        judged = tuple(sorted({0, *experts}))
        return Brief(plain.experts, trained, judged, plain.parts, judged, trained)

    def before_plan(self, policy, state, clients):
        self.seen.append(list(clients))

    def merge(self, state, updates, briefs, policy):
        for update in updates:
            losses = update.signals["expert_loss"]
            known = np.flatnonzero(~np.isnan(losses)).tolist()
            assert known == list(briefs[update.client].judged)
            own = {int(name.split(".")[1]) for name in update.parameters if name.startswith("experts.")}
            assert own == set(briefs[update.client].trained) == set(update.expert_samples)
        return super().merge(state, updates, briefs, policy)

    def global_view(self):
        return View((0, 1))


class PersonalGatePolicy(Scheduler):
    """Asks for one signal of every kind."""

    name = "personal-gate"
    method = "personal-gate"
    variables = {  # noqa: RUF012
        "labels": StateVariable("vector", told="once"),
        "gate_mean": StateVariable("pair", told="before"),
        "loss": StateVariable("client", told="after"),
        "gradient": StateVariable("pair", told="after"),
    }


@pytest.fixture
def own():
    register_policy("personal-gate", f"{__name__}:PersonalGatePolicy")
    register_method("personal-gate", f"{__name__}:PersonalGate")
    PersonalGate.seen.clear()
    yield
    del POLICIES["personal-gate"], METHODS["personal-gate"]


def small(**changes):
    return TrainConfig.from_dict(SMALL).updated(changes)


def contents(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]


@pytest.mark.usefixtures("own")
def test_a_method_of_ones_own_trains_and_resumes_bit_for_bit(tmp_path):
    whole = run_training(small(), tmp_path / "whole")
    assert len(PersonalGate.seen) == 4
    run_training(small(rounds=2), tmp_path / "parts")
    again = run_training(small(), tmp_path / "parts", resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert all(torch.equal(value, again.state[name]) for name, value in whole.state.items())
    ours, theirs = (RunFolder(tmp_path / run).load_checkpoint()[0] for run in ("whole", "parts"))
    gates = [name for name in ours if name.startswith("method:")]
    assert len(gates) > 2
    assert all(np.array_equal(ours[name], theirs[name]) for name in gates)
    assert len({ours[name].tobytes() for name in gates if name.endswith("gate.weight")}) > 2


@pytest.mark.usefixtures("own")
def test_the_clock_counts_what_the_method_sends(tmp_path):
    config = small(rounds=1, **{"clients.failure_rate": 0.0, "clients.participation": 1.0})
    run = run_training(config, tmp_path / "run").run
    record, assignment = run.records[0], run.schedule_arrays("assignment")[0]
    sizes = {name: value.numel() * 4 for name, value in run_state(config).items()}
    expert = [sum(size for name, size in sizes.items() if name.startswith(f"experts.{j}.")) for j in range(4)]
    extractor = sum(size for name, size in sizes.items() if name.startswith("extractor."))
    judged, trained = assignment.copy(), assignment.copy()
    judged[:, 0] = True
    trained[assignment.sum(axis=1) > 1, 0] = False
    assert record["bytes_down"] == 6 * extractor + (judged @ expert).sum()
    assert record["bytes_up"] == 6 * extractor + (trained @ expert).sum()


def run_state(config):
    return build_model(config.model, 1, 10, seed=config.seed).state_dict()


@pytest.mark.usefixtures("own")
def test_names_that_nobody_knows(monkeypatch, tmp_path):
    with pytest.raises(InputError, match="method = 'magic': must be one of shared"):
        make_method("magic", Setting(("a",), 2))
    with pytest.raises(InputError, match="must read 'module:Class'"):
        register_method("magic", "nowhere")
    monkeypatch.setitem(PersonalGatePolicy.variables, "colour", StateVariable("client", told="after"))
    with pytest.raises(InputError, match="policy 'personal-gate' asks clients for 'colour': this"):
        run_training(small(), tmp_path / "run")


def test_what_is_personal_is_kept_per_client_and_averaged_for_newcomers():
    method = PersonalGate(Setting(("a", "b", "c"), 2))
    state = {"gate.bias": np.zeros(1), "extractor.bias": np.zeros(1), "experts.1.bias": np.zeros(1)}
    briefs = {name: Brief((1,), (1,), (1,)) for name in "abc"}

    def update(name, value):
        parameters = dict.fromkeys(state, np.array([value]))
        return Update(name, parameters, 1.0, {1: 1.0}, {"expert_loss": [np.nan, 0.5]})

    combined = method.merge(state, [update("a", 1.0), update("b", 3.0), update("c", np.inf)], briefs, None)
    assert [rejection.client for rejection in combined.rejected] == ["c"]
    assert {name: value.tolist() for name, value in combined.state.items()} == {name: [2.0] for name in state}
    assert [method.personal_parts(i) for i in range(3)] == [{"gate.bias": 1.0}, {"gate.bias": 3.0}, {}]
    other = PersonalGate(Setting(("a", "b", "c"), 2))
    other.restore(method.arrays())
    assert other.personal_parts(1) == {"gate.bias": 3.0}
    assert other.client_view(2, [1]) == View((1,), {})
    for key in ("0/extractor.bias", "3/gate.bias", "x"):
        with pytest.raises(StateFileError, match="has none of that name"):
            other.restore({key: np.zeros(1)})


# Signals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return build_model(ModelConfig(experts=3, channels=[], expert_hidden=0, pool=1), 2, 4, seed=0)


IMAGES = torch.tensor([[0.5, -1.0], [2.0, 0.0], [-1.0, 1.0]]).reshape(3, 2, 1, 1)
LABELS = torch.tensor([1, 3, 1])


def test_signals_by_hand(model):
    state = model.state_dict()
    for name, value in state.items():
        state[name] = torch.zeros_like(value)
    # Gate: expert 0 for a large first feature, expert 2 for a large second one. Experts say class 1 with certainty
    # e / (e + 3), or know nothing.
    state["gate.weight"] = torch.log(torch.tensor([[4.0, 1.0], [1.0, 1.0], [1.0, 4.0]]))
    state["experts.0.2.bias"] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    model.load_parts(state)
    seen = observe(model, IMAGES, LABELS, [0, 1], [0, 2], n_classes=4)
    gate = np.array([[2, 1, 0.25], [16, 1, 1], [0.25, 1, 4]])
    gate /= gate.sum(axis=1, keepdims=True)
    told = tell_signals([name for name in SIGNALS if name != "gradient"], seen)
    certain = np.e / (np.e + 3)
    other = 1 / (np.e + 3)
    assert told["labels"].tolist() == [0, 2, 0, 1]
    assert told["samples"] == 3
    assert told["gate_mean"] == pytest.approx(gate.mean(axis=0))
    assert told["gate_max"] == pytest.approx(gate.max(axis=0))
    assert told["activation"] == pytest.approx([2 / 3, 0, 1 / 3])
    losses = -np.log([certain, other, certain])
    assert told["expert_loss"] == pytest.approx([losses.mean(), np.nan, np.log(4)], nan_ok=True)
    # The mixture of experts 0 and 1 only.
    share = gate[:, 0] / (gate[:, 0] + gate[:, 1])
    mixed = -np.log(share * np.array([certain, other, certain]) + (1 - share) / 4)
    assert told["loss"] == pytest.approx(mixed.mean())
    assert told["accuracy"] == pytest.approx(2 / 3)
    assert told["oort_utility"] == pytest.approx(3 * np.sqrt((mixed**2).mean()))


@pytest.mark.parametrize("names", [["gate_mean", "labels"], ["loss", "gate_max"], ["expert_loss"]])
def test_only_the_experts_that_a_signal_needs_are_asked_and_it_is_the_same(model, names):
    every = [0, 1, 2]
    held, judged = experts_needed(names, every, every)
    few = tell_signals(names, observe(model, IMAGES, LABELS, held, judged, n_classes=4))
    all_ = tell_signals(names, observe(model, IMAGES, LABELS, every, every, n_classes=4))
    assert few.keys() == all_.keys() == set(names)
    assert all(np.array_equal(few[name], all_[name]) for name in names)
    assert (held, judged) == {"g": ([], []), "l": (every, []), "e": ([], every)}[names[0][0]]


def test_frozen_experts_stay_and_gradients_are_those_of_the_trained(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    config = LocalConfig(epochs=1, batch_size=3, learning_rate=0.5, clip_norm=0.0, train_gate=False)
    result = train_client(
        model, state, IMAGES, LABELS, [0, 2], config=config, client="a", seed=[1], trained=[2],
        signals=("gradient", "loss"),
    )  # fmt: skip
    assert set(result.update.parameters) == {n for n in state if n.startswith("experts.2.")}
    assert set(result.rewards) == set(result.update.expert_samples) == {2}
    assert torch.equal(model.state_dict()["experts.0.2.bias"], state["experts.0.2.bias"])
    # One step of plain gradient descent: the gradient is the step over the learning rate.
    steps = [(result.update.parameters[n] - state[n]) / 0.5 for n in state if n.startswith("experts.2.")]
    norm = float(torch.cat([step.flatten() for step in steps]).norm())
    assert result.update.signals["gradient"] == pytest.approx([np.nan, np.nan, norm], nan_ok=True, rel=1e-4)


def test_experts_of_different_size():
    model = build_model(ModelConfig(experts=3, channels=[2], expert_hidden=[4, 0]), 1, 10, seed=0)
    widths = [[p.shape for p in model.experts[str(j)].parameters()] for j in range(3)]
    assert widths[0] == widths[2] != widths[1]
    assert model.config.hidden_of(1) == 0
