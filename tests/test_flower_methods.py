"""Signals and methods over the wire: the run of the loop on one machine, and what becomes of bad answers."""

import logging
from functools import cache

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("flwr")

import torch
from flower_tools import FakeGrid, expired
from flwr.app import MetricRecord, RecordDict
from method_tools import checkpoint
from test_federated_coordinator import assert_same_records, assert_same_state, records

from fedmoe_sched.errors import WorkerError
from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.aggregate import expert_of
from fedmoe_sched.federated.runs import read_run
from fedmoe_sched.flower import FlowerConfig, client_app
from fedmoe_sched.flower.messages import state_record
from fedmoe_sched.flower.server import make_strategy
from fedmoe_sched.policies import POLICIES, make_policy

pytestmark = pytest.mark.train

N = 5
SMALL = {
    "rounds": 3,
    "seed": 3,
    "data": {"train_samples": 110, "test_samples": 40},
    "clients": {"count": N, "capacity": [1, 2], "min_samples": 4},
    "model": {"experts": 6, "channels": [3], "expert_hidden": 4},
    "local": {"batch_size": 32, "epochs": 1},
}
CHANGES = {
    "fedjets": {"model.experts": 3, "model.expert_hidden": [4, 2]},
    "fedmix": {"model.experts": 3, "model.expert_hidden": [4, 2]},
    "fedmoe-da": {"policy_options": {"refresh": 1}},
    "pfedmoe": {"clients.capacity": 2},
    "selection": {"policy": "balanced", "policy_options": {"selection": {"clients": 3}}},
}
MORE_THAN_ASSIGNMENT = ["fedjets", "fedmix", "fedmoe", "fedmoe-da", "flux", "hfedmoe", "pfedmoap", "pfedmoe"]


def small(policy, **changes):
    own = CHANGES.get(policy, {})
    name = own.get("policy", policy)
    return TrainConfig.from_dict(SMALL | {"policy": name}).updated({**own, **changes})


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def on_flower(config, folder, *, without=(), fault=None, question_fault=None, callback=None, **options):
    """Train on the grid in this process; return the strategy and the grid."""
    nodes = [{"partition-id": i} for i in (4, 0, 3, 1, 2) if i not in without]
    grid = FakeGrid(client_app(config), nodes, fault, question_fault)
    settings = {"min_clients": 1, "wait_timeout": 0.05, "round_timeout": 5.0} | options
    callbacks = (callback,) if callback else ()
    strategy = make_strategy(config, FlowerConfig(run_dir=str(folder), **settings), callbacks=callbacks)
    strategy.run(grid)
    return strategy, grid


def without_traffic(folder):
    """Records; personal parameters do travel, and the loop on one machine does not count them."""
    return [{k: v for k, v in record.items() if not k.startswith("bytes_")} for record in records(folder)]


def assert_same_checkpoints(one, other):
    ours, theirs = checkpoint(one), checkpoint(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name


def test_no_policy_is_left_out():
    asking = [
        name
        for name in POLICIES
        for policy in [make_policy(name, 6)]
        if policy.method != "shared" or any(policy.signals(when) for when in ("once", "before", "after"))
    ]
    assert sorted(asking) == MORE_THAN_ASSIGNMENT


@pytest.mark.parametrize("policy", [*MORE_THAN_ASSIGNMENT, "selection"])
def test_every_policy_gives_the_run_of_the_loop_bit_for_bit(policy, tmp_path):
    config = small(policy, **({"clients.participation": 0.8} if policy in {"fedjets", "hfedmoe"} else {}))
    run_training(config, tmp_path / "local")
    on_flower(config, tmp_path / "flower", min_clients=N)
    assert_same_checkpoints(tmp_path / "flower", tmp_path / "local")
    assert_same_records(without_traffic(tmp_path / "flower"), without_traffic(tmp_path / "local"))


@pytest.mark.parametrize("policy", ["fedjets", "fedmoe-da", "pfedmoap"])
def test_a_run_goes_from_flower_to_the_loop_and_back(policy, tmp_path):
    """What is personal, told once or known to the method only is in the checkpoint."""
    run_training(small(policy), tmp_path / "whole")
    on_flower(small(policy, rounds=1), tmp_path / "parts")
    run_training(small(policy, rounds=2), tmp_path / "parts", resume=True)
    on_flower(small(policy), tmp_path / "parts", resume=True)
    assert_same_checkpoints(tmp_path / "parts", tmp_path / "whole")


def test_clients_are_asked_once_or_before_every_round_with_the_parameters_that_it_takes(tmp_path):
    strategy, grid = on_flower(small("fedjets"), tmp_path / "run")
    asked = [list(message.content["question"]["signals"]) for _, message in grid.asked]
    assert asked == [["labels", "gate_mean"]] * N + [["gate_mean"]] * 2 * N
    shared = {name for name in strategy.coordinator.state if expert_of(name) is None}
    assert all(set(message.content["arrays"]) == shared for _, message in grid.asked)
    sent = sum(value.numpy().nbytes for _, m in grid.asked[:N] for value in m.content["arrays"].values())
    assert read_run(tmp_path / "run").records[0]["bytes_asked"] == sent > 0


def test_what_is_personal_travels_to_its_client_in_the_place_of_the_global_parameters(tmp_path):
    strategy, grid = on_flower(small("pfedmoe", rounds=2), tmp_path / "run")
    gates = {
        grid.nodes[node].node_config["partition-id"]: message.content["arrays"]["gate.weight"].numpy()
        for node, message in grid.sent[N:]
    }
    initial = strategy.coordinator.state["gate.weight"].numpy()
    assert len({gate.tobytes() for gate in gates.values()} - {initial.tobytes()}) == N
    record = read_run(tmp_path / "run").records[1]
    sent = sum(value.numpy().nbytes for _, m in grid.sent[N:] for value in m.content["arrays"].values())
    assert record["bytes_down"] == sent


# Bad answers -----------------------------------------------------------------------------------------------------


def changed_signals(change):
    """Make a fault that changes the signals in a reply."""

    def fault(reply):
        told = dict(reply.content["signals"])
        change(told)
        reply.content["signals"] = MetricRecord(told)
        return reply

    return fault


def broken(reply):
    raise RuntimeError("sensor lost\nand more")


def emptied(reply):
    reply.content = RecordDict()
    return reply


QUESTION_FAULTS = {
    "missing": (changed_signals(lambda told: told.pop("gate_max")), "client-2: lacks the signal 'gate_max'"),
    "nan": (
        changed_signals(lambda told: told.update(gate_mean=[0.5, np.nan, *[0.1] * 4])),
        "client-2: signal 'gate_mean'[1] = nan: must be finite",
    ),
    "shape": (
        changed_signals(lambda told: told.update(gate_mean=[0.5, 0.5])),
        "client-2: signal 'gate_mean': has shape (2,), must be (6,)",
    ),
    "number": (
        changed_signals(lambda told: told.update(gate_max=0.5)),
        "client-2: signal 'gate_max': has shape (), must be (6,)",
    ),
    "negative": (
        changed_signals(lambda told: told.update(gate_max=[-0.5] * 6)),
        "client-2: signal 'gate_max'[0] = -0.5: must be >= 0",
    ),
    "large": (
        changed_signals(lambda told: told.update(gate_max=[1e300] * 6)),
        "client-2: signal 'gate_max'[0] = 1e+300: must be at most 2**53",
    ),
    "empty": (emptied, "cannot be read (KeyError: 'signals')"),
    "raises": (broken, "RuntimeError: sensor lost"),
    "late": (expired, "the message has expired"),
    "silent": (lambda reply: None, "did not tell what it was asked for"),
}


@pytest.fixture(scope="module")
def without_client_2(tmp_path_factory):
    return on_flower(small("hfedmoe", rounds=2), tmp_path_factory.mktemp("without") / "run", without=(2,))[0]


@pytest.mark.parametrize("kind", QUESTION_FAULTS)
def test_a_client_that_does_not_tell_is_left_out_of_the_round_and_named(kind, without_client_2, tmp_path):
    """The rest of the run is that of clients among which it is not."""
    spoil, line = QUESTION_FAULTS[kind]
    config = small("hfedmoe", rounds=2)
    strategy, grid = on_flower(
        config, tmp_path / "run", question_fault=lambda client, _, reply: spoil(reply) if client == 2 else reply
    )
    assert_same_state(strategy.coordinator.state, without_client_2.coordinator.state)
    first = read_run(tmp_path / "run").records[0]
    wrong = {"rejected": [], "unanswered": {}, "failed_clients": []}
    if line.startswith("client-2"):
        wrong["rejected"] = [line]
    else:
        wrong["unanswered"] = {"client-2": line}
    assert {key: first[key] for key in wrong} == wrong
    assert first["answered"] == N - 1
    assert len(grid.sent) == 2 * (N - 1)


def test_a_round_for_which_nobody_tells_is_asked_for_again_and_then_the_run_ends(tmp_path):
    silent = []

    def fault(client, number, reply):
        silent.append(client)
        return reply if len(silent) > N else emptied(reply)

    config = small("hfedmoe", rounds=1)
    _, grid = on_flower(config, tmp_path / "again", question_fault=fault, wait_timeout=5.0)
    assert len(grid.asked) == 2 * N
    assert read_run(tmp_path / "again").records[0]["answered"] == N
    with pytest.raises(
        WorkerError,
        match=r"^round 1: no client told what policy 'hfedmoe' asks for \(client-0: cannot .*; finished rounds",
    ):
        on_flower(config, tmp_path / "run", question_fault=lambda client, number, reply: emptied(reply))


def changed_arrays(change):
    """Make a fault that changes the parameters in a reply."""

    def fault(reply):
        arrays = {name: array.numpy().copy() for name, array in reply.content["arrays"].items()}
        change(arrays)
        reply.content["arrays"] = state_record(arrays)
        return reply

    return fault


def first_expert(arrays):
    return next(name for name in arrays if expert_of(name) is not None)


TASK_FAULTS = {
    ("fedmix", "missing"): (
        changed_signals(lambda told: told.update(expert_loss=told.pop("expert_loss")[:2])),
        "signal 'expert_loss': has shape (2,), must be (3,)",
    ),
    ("fedmix", "nan"): (
        changed_signals(lambda told: told.update(expert_loss=[0.5, 0.5, np.nan])),
        "signal 'expert_loss'[2] = nan: must be finite",
    ),
    ("flux", "lost"): (lambda reply: reply.content.pop("signals") and reply, "lacks the signal 'gradient'"),
    ("flux", "too much"): (
        changed_signals(lambda told: told.update(gradient=[0.5] * 6)),
        "must be nan, the client was not asked about this expert",
    ),
    ("selection", "infinite"): (
        changed_signals(lambda told: told.update(oort_utility=float("inf"))),
        "signal 'oort_utility' = inf: must be finite",
    ),
    ("pfedmoe", "missing"): (
        changed_arrays(lambda arrays: arrays.pop("gate.weight")),
        "lacks the parameter 'gate.weight'",
    ),
    ("pfedmoe", "nan"): (
        changed_arrays(lambda arrays: arrays["gate.weight"].fill(np.nan)),
        "parameter 'gate.weight'[0, 0] = nan: must be finite",
    ),
    ("fedmoe-da", "missing"): (
        changed_arrays(lambda arrays: arrays.pop(first_expert(arrays))),
        "lacks the parameter 'experts.",
    ),
    ("pfedmoap", "shape"): (
        changed_arrays(lambda arrays: arrays.update({first_expert(arrays): np.zeros(1)})),
        "has shape (1,), must be",
    ),
}


def with_fault(policy, change, folder):
    """Train with a client whose answer in the first round is changed."""

    def fault(client, number, reply):
        return change(reply) if (client, number) == (2, 1) else reply

    return on_flower(small(policy, rounds=2), folder, fault=fault)[0]


@pytest.fixture(scope="module")
def where_it_raises(tmp_path_factory):
    """Return the folder of the run of a policy in which the client raises."""

    @cache
    def folder_of(policy):
        folder = tmp_path_factory.mktemp("raises") / "run"
        with_fault(policy, broken, folder)
        return folder

    return folder_of


@pytest.mark.parametrize(("policy", "kind"), TASK_FAULTS)
def test_a_malformed_answer_to_a_method_fails_that_client_alone(policy, kind, where_it_raises, tmp_path):
    """The run is that in which the client raises instead."""
    spoil, reason = TASK_FAULTS[policy, kind]
    strategy = with_fault(policy, spoil, tmp_path / "run")
    run, expected = records(tmp_path / "run"), records(where_it_raises(policy))
    assert run[0]["failed_clients"] == expected[0]["failed_clients"] == ["client-2"]
    assert len(run[0]["rejected"]) == 1
    assert run[0]["rejected"][0].startswith("client-2: ")
    assert reason in run[0]["rejected"][0]
    assert run[1]["failed_clients"] == []
    assert_same_checkpoints(tmp_path / "run", where_it_raises(policy))
    assert all(torch.isfinite(value).all() for value in strategy.coordinator.state.values())


def test_with_too_few_answers_what_is_personal_stays_as_well(tmp_path):
    def fault(client, number, reply):
        return reply if client == 0 or number == 1 else broken(reply)

    config, kept = small("fedmoe-da", rounds=2), []
    strategy, _ = on_flower(
        config,
        tmp_path / "run",
        fault=fault,
        min_replies=3,
        callback=lambda record: kept.append(checkpoint(tmp_path / "run")),
    )
    assert [record["enough"] for record in records(tmp_path / "run")] == [True, False]
    # Who is whose neighbour is found when a round is planned.
    first, second = ({k: v for k, v in arrays.items() if "nearest/" not in k} for arrays in kept)
    assert any(name.startswith("method:0/") for name in first)
    assert first.keys() == second.keys()
    assert all(np.array_equal(value, second[name]) for name, value in first.items())
    assert strategy.coordinator.round == 2
