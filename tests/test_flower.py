"""The strategy and the client app on a grid in this process: what is sent, what is averaged, and every fault."""

import importlib
import logging
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("flwr")

import torch
from flower_tools import FakeGrid, expired
from flwr.app import ArrayRecord, MetricRecord
from pydantic import BaseModel
from test_federated_coordinator import SPOILT, assert_same_records, assert_same_state, records, small

from fedmoe_sched.errors import InputError, WorkerError
from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.aggregate import Update, aggregate, expert_of
from fedmoe_sched.federated.runs import read_run
from fedmoe_sched.flower import FlowerConfig, client_app
from fedmoe_sched.flower.client import node_offer
from fedmoe_sched.flower.messages import read_offer, read_result, result_content
from fedmoe_sched.flower.server import make_strategy
from fedmoe_sched.flower.settings import read_run_config

pytestmark = pytest.mark.train

N = 6


@pytest.fixture(autouse=True)
def _quiet():
    """Flower's log of every round is of no use here."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def grid_of(config, fault=None, order=(4, 0, 3, 1, 5, 2), **node):
    return FakeGrid(client_app(config), [{"partition-id": i, **node} for i in order], fault)


def strategy_of(config, folder, **options):
    settings = {"min_clients": N, "wait_timeout": 0.05, "round_timeout": 5.0} | options
    return make_strategy(config, FlowerConfig(run_dir=str(folder), **settings))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    return folder, run_training(small(), folder)


def test_it_gives_the_run_of_the_loop_bit_for_bit(local, tmp_path):
    strategy = strategy_of(small(), tmp_path / "run")
    result = strategy.run(grid_of(small()))
    assert_same_state(strategy.coordinator.state, local[1].state)
    assert all(np.array_equal(result.arrays[name].numpy(), value) for name, value in local[1].state.items())
    assert_same_records(records(tmp_path / "run"), records(local[0]))
    assert read_run(tmp_path / "run").summary()["accuracy"] == local[1].records[-1]["accuracy"]


def test_every_client_gets_its_experts_and_the_shared_parts_only(tmp_path):
    strategy, grid = strategy_of(small(rounds=1), tmp_path / "run"), grid_of(small())
    strategy.run(grid)
    run = read_run(tmp_path / "run")
    assigned = run.schedule_arrays("assignment")[0]
    shared = {name for name in strategy.coordinator.state if expert_of(name) is None}
    assert len(grid.sent) == N
    sent = 0
    for node, message in grid.sent:
        client = grid.nodes[node].node_config["partition-id"]
        arrays = message.content["arrays"]
        sent += sum(value.numpy().nbytes for value in arrays.values())
        assert {expert_of(name) for name in arrays} == {None, *np.flatnonzero(assigned[client]).tolist()}
        assert shared < set(arrays)
        assert message.metadata.ttl == 5.0
        assert message.metadata.group_id == "1"
    assert sent == run.records[0]["bytes_down"]


def test_experts_are_averaged_by_their_own_samples(tmp_path):
    """Against `aggregate` on what the clients sent, and that against the formula for one parameter."""
    answers = {}

    def listen(client, number, reply):
        answers[f"client-{client}"] = read_result(f"client-{client}", reply.content).update
        return reply

    strategy = strategy_of(small(rounds=1), tmp_path / "run")
    before = strategy.coordinator.state
    strategy.run(grid_of(small(), listen))
    expected = aggregate(before, list(answers.values())).state
    assert_same_state(strategy.coordinator.state, expected)
    name = "experts.2.2.bias"
    trained = [u for u in answers.values() if 2 in u.expert_samples]
    weights = np.array([u.expert_samples[2] for u in trained])
    mean = sum(w / weights.sum() * u.parameters[name].astype(float) for w, u in zip(weights, trained, strict=True))
    assert strategy.coordinator.state[name].numpy() == pytest.approx(mean, rel=1e-6)


def test_errors_silence_and_expiry_are_failures_and_untrained_experts_stay(tmp_path):
    def fault(client, number, reply):
        if client == 0:
            raise RuntimeError("out of memory\nand more")
        return {1: None, 2: expired(reply)}.get(client, reply)

    strategy = strategy_of(small(rounds=1), tmp_path / "run")
    before = strategy.coordinator.state
    strategy.run(grid_of(small(), fault))
    record = read_run(tmp_path / "run").records[0]
    assert record["failed_clients"] == ["client-0", "client-1", "client-2"]
    assert record["unanswered"]["client-0"] == "RuntimeError: out of memory"
    assert record["unanswered"]["client-1"] == "no answer"
    assert "expired" in record["unanswered"]["client-2"]
    assert record["answered"] == 3
    untrained = [j for j, load in enumerate(record["trained_loads"]) if not load]
    for name, value in strategy.coordinator.state.items():
        if expert_of(name) in untrained:
            assert torch.equal(value, before[name])


def test_an_expert_that_nobody_trained_is_carried_over(tmp_path):
    config = small(rounds=2)
    strategy = strategy_of(config, tmp_path / "run", min_clients=1)
    before = strategy.coordinator.state
    result = strategy.run(
        grid_of(config, lambda client, number, reply: reply if client == 0 else None, capacity=1)
    )
    trained = set(np.flatnonzero(read_run(tmp_path / "run").schedule_arrays("samples").sum(axis=(0, 1))))
    assert 1 <= len(trained) < 4
    for name, value in result.arrays.items():
        kept = np.array_equal(value.numpy(), before[name])
        assert kept == (expert_of(name) is not None and expert_of(name) not in trained), name
    assert set(result.arrays) == set(before)


def test_a_busy_node_gets_no_work_until_it_answers(tmp_path):
    """The grid itself refuses work for busy nodes."""
    config = small(rounds=5)
    strategy = strategy_of(config, tmp_path / "run", min_clients=1)
    grid = grid_of(config, lambda client, number, reply: None if (client, number) == (3, 2) else reply)
    node = grid.started[2]

    def recover(record):
        if record["round"] == 4:
            grid.recover(node)

    strategy._callbacks = (recover,)
    strategy.run(grid)
    planned = read_run(tmp_path / "run").schedule_arrays("assignment").any(axis=2)
    assert planned[:, 3].tolist() == [True, True, False, False, True]
    assert planned[:, [0, 1, 2, 4, 5]].all()


def test_a_node_that_was_started_anew_is_the_same_client(local, tmp_path):
    grid = grid_of(small())
    strategy = strategy_of(small(), tmp_path / "run")
    strategy._callbacks = (lambda record: grid.restart(next(n for n in grid.nodes)),)
    strategy.run(grid)
    assert_same_state(strategy.coordinator.state, local[1].state)
    assert max(grid.nodes) > max(grid.started)


def test_a_node_that_died_and_is_still_listed_is_replaced_by_the_new_one(tmp_path):
    config = small(rounds=3)
    grid = grid_of(config, lambda client, number, reply: None if (client, number) == (5, 1) else reply)
    strategy = strategy_of(config, tmp_path / "run")
    strategy._callbacks = (lambda record: record["round"] == 1 and grid.add({"partition-id": 5}),)
    strategy.run(grid)
    run = read_run(tmp_path / "run")
    assert [r["failed_clients"] for r in run.records] == [["client-5"], [], []]


@pytest.mark.parametrize("kind", [k for k in SPOILT if k not in {"text", "stranger"}])
def test_a_malformed_update_over_the_wire_is_left_out_and_named(kind, tmp_path):
    spoil, reason = SPOILT[kind]

    def fault(client, number, reply):
        if client == 2:
            reply.content = result_content(spoil(read_result("client-2", reply.content)))
        return reply

    strategy = strategy_of(small(rounds=2), tmp_path / "run")
    strategy.run(grid_of(small(), fault))
    for record in read_run(tmp_path / "run").records:
        assert record["failed_clients"] == ["client-2"]
        assert len(record["rejected"]) == 1
        # Rewards go over the wire beside the experts: one without the other cannot be told apart.
        assert record["rejected"][0].startswith("client-2: ")
        assert reason in record["rejected"][0] or kind == "no reward"
    assert all(torch.isfinite(value).all() for value in strategy.coordinator.state.values())


@pytest.mark.parametrize("part", ["arrays", "metrics"])
def test_an_answer_that_cannot_be_read_is_a_failure(part, tmp_path):
    def fault(client, number, reply):
        if client == 4:
            reply.content[part] = ArrayRecord() if part == "arrays" else MetricRecord({"num-examples": 3})
        return reply

    strategy = strategy_of(small(rounds=1), tmp_path / "run")
    strategy.run(grid_of(small(), fault))
    record = read_run(tmp_path / "run").records[0]
    assert record["failed_clients"] == ["client-4"]
    if part == "metrics":
        assert "cannot be read (KeyError" in record["unanswered"]["client-4"]
    else:
        assert record["rejected"] == ["client-4: lacks the parameter 'extractor.0.0.weight'"]


def test_all_clients_failing_leaves_the_model_and_the_run_goes_on(local, tmp_path):
    def fault(client, number, reply):
        if number == 2:
            raise RuntimeError("power cut")
        return reply

    strategy = strategy_of(small(), tmp_path / "run")
    states = []
    strategy._callbacks = (lambda record: states.append(strategy.coordinator.state),)
    strategy.run(grid_of(small(), fault))
    first, second, third = records(tmp_path / "run")
    assert second["failed_clients"] == strategy.coordinator.names
    assert set(second["unanswered"].values()) == {"RuntimeError: power cut"}
    assert_same_state(states[0], states[1])
    assert_same_records([first], records(local[0])[:1])
    assert third["answered"] == N


def test_too_few_replies_leave_the_model_as_it_is(tmp_path):
    strategy = strategy_of(small(rounds=1), tmp_path / "run", min_replies=3)
    before = strategy.coordinator.state
    strategy.run(grid_of(small(), lambda client, number, reply: reply if client < 2 else expired(reply)))
    assert not read_run(tmp_path / "run").records[0]["enough"]
    assert_same_state(strategy.coordinator.state, before)


def test_waiting_for_clients_ends_and_says_who_is_busy(local, tmp_path):
    grid = grid_of(small(), lambda client, number, reply: None if (client, number) == (1, 1) else reply)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"round 2: 5 clients are idle .*min-clients = 6 \(busy: client-1\)"):
        strategy_of(small(), tmp_path / "run").run(grid)
    assert time.monotonic() - started < 60
    # What was finished is kept, and goes on with fewer.
    strategy = strategy_of(small(), tmp_path / "run", resume=True, min_clients=5)
    assert strategy.coordinator.round == 1
    strategy.run(grid)
    assert [r["available"] for r in records(tmp_path / "run")] == [6, 5, 5]


@pytest.mark.parametrize("done", [1, 2])
def test_a_new_run_goes_on_from_the_checkpoint(done, local, tmp_path):
    class KilledError(Exception):
        pass

    def kill(record):
        if record["round"] == done:
            raise KilledError

    strategy = strategy_of(small(), tmp_path / "run")
    strategy._callbacks = (kill,)
    with pytest.raises(KilledError):
        strategy.run(grid_of(small()))
    again = strategy_of(small(), tmp_path / "run", resume=True)
    again.run(grid_of(small(), order=(5, 4, 3, 2, 1, 0)))
    assert_same_state(again.coordinator.state, local[1].state)
    assert_same_records(records(tmp_path / "run"), records(local[0]))
    finished = strategy_of(small(), tmp_path / "run", resume=True)
    finished.run(grid_of(small()))
    assert_same_state(finished.coordinator.state, local[1].state)


def test_nodes_tell_capacity_and_profile(tmp_path):
    config = small(rounds=1)
    nodes = [
        {"partition-id": 0, "capacity": 4},
        {"partition-id": 1, "capacity": 4, "ms-per-sample": 1e6},
        {"partition-id": 2, "capacity": 3, "ms-per-sample": 0.001, "memory-bytes": 1e9},
    ]
    strategy = strategy_of(config, tmp_path / "run", min_clients=3)
    strategy.run(FakeGrid(client_app(config), nodes))
    assigned = read_run(tmp_path / "run").schedule_arrays("assignment")[0]
    assert assigned.sum(axis=1).tolist() == [4, 0, 3, 0, 0, 0]


def test_nodes_that_are_no_client_of_the_run_are_left_alone(tmp_path):
    config = small(rounds=1)
    nodes = [{"partition-id": 0}, {"partition-id": 6}, {"partition-id": "0"}, {}]
    grid = FakeGrid(client_app(config), nodes)
    strategy_of(config, tmp_path / "run", min_clients=1).run(grid)
    assert read_run(tmp_path / "run").records[0]["available"] == 1
    assert len(grid.sent) == 1


def test_nodes_with_names_of_another_run_are_left_alone(tmp_path):
    grid = FakeGrid(client_app(small(**{"clients.count": 20})), [{"partition-id": i} for i in range(3)])
    with pytest.raises(WorkerError, match="0 clients are idle"):
        strategy_of(small(), tmp_path / "run", min_clients=1).run(grid)


def test_node_configs_and_offers_that_make_no_sense_are_refused():
    with pytest.raises(
        InputError, match=r"partition-id = None: must be a whole number >= 0 and < clients.count = 4"
    ):
        node_offer({}, 4)
    with pytest.raises(InputError, match="capacity = -1"):
        node_offer({"partition-id": 0, "capacity": -1}, 4)
    with pytest.raises(InputError, match="ms-per-sample = 'fast': must be a number"):
        node_offer({"partition-id": 0, "ms-per-sample": "fast"}, 4)
    with pytest.raises(InputError, match="lacks 'client'"):
        read_offer(result_content(_result()))


def _result():
    from fedmoe_sched.federated.client import LocalResult

    return LocalResult(Update("a", {"gate.bias": np.zeros(2, np.float32)}, 3.0, {1: 2.5}), {1: 0.25}, 1.5, 0.125)


def test_results_go_over_the_wire_unchanged():
    result = _result()
    back = read_result("a", result_content(result))
    assert back.update.parameters["gate.bias"].dtype == np.float32
    assert (back.update.expert_samples, back.rewards, back.loss) == ({1: 2.5}, {1: 0.25}, 1.5)
    assert (back.update.samples, back.seconds) == (3.0, 0.125)


def test_run_configs_are_read():
    config, options = read_run_config(
        {
            "policy": "greedy",
            "policy-options": "{ fitness = { rate = 0.5 } }",
            "clients.capacity": "[1, 2, 3]",
            "data.dir": "",
            "flower.min-clients": 7,
            "flower.round-timeout": 30,
        }
    )
    assert config.policy == "greedy"
    assert config.policy_options == {"fitness": {"rate": 0.5}}
    assert config.clients.capacity == [1, 2, 3]
    assert config.data.dir is None
    assert (options.min_clients, options.round_timeout) == (7, 30.0)
    for key, message in (
        ("clients.cuont", "run config: clients.cuont: unknown setting"),
        ("flower.min-cleints", "run config: min_cleints: unknown setting"),
    ):
        with pytest.raises(InputError, match=message):
            read_run_config({key: 3})
    with pytest.raises(InputError, match=r"clients.capacity = '\[1, 2': is not TOML"):
        read_run_config({"clients.capacity": "[1, 2"})


APP = Path(__file__).resolve().parent.parent / "examples" / "flower"


def settings_of(model, values, prefix=""):
    """Flatten settings as Flower does."""
    for name in model.model_fields:
        key, value = f"{prefix}{name.replace('_', '-')}", getattr(values, name)
        if isinstance(value, BaseModel):
            yield from settings_of(type(value), value, f"{key}.")
        else:
            yield key, value


def declared(table, prefix=""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from declared(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def test_the_app_declares_every_setting_with_its_default_and_no_dependency():
    project = tomllib.loads((APP / "pyproject.toml").read_text())
    config = dict(declared(project["tool"]["flwr"]["app"]["config"]))
    ours = dict(settings_of(TrainConfig, TrainConfig()))
    engine = {f"flower.{key}": value for key, value in settings_of(FlowerConfig, FlowerConfig())}
    assert set(config) == set(ours) | set(engine)
    read, options = read_run_config(config)
    assert read == TrainConfig().updated({"rounds": 5, "clients.count": 4})
    assert options == FlowerConfig()
    assert project["project"]["dependencies"] == []


def test_the_app_has_the_two_halves_that_it_names(monkeypatch):
    components = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["components"]
    monkeypatch.syspath_prepend(APP)
    for component in components.values():
        module, _, name = component.partition(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_nodes_that_come_together_begin_together_and_one_that_says_nothing_does_not_hold_them_up(tmp_path):
    """Node 0 answers its query at once, node 1 at the third look, node 2 never."""

    class Slow(FakeGrid):
        looks = 0

        def pull_messages(self, message_ids):
            Slow.looks += 1
            if Slow.looks == 3:
                self.recover(self.started[1])
            return super().pull_messages(message_ids)

    config = small(rounds=1)
    for count, waits in ((2, 5.0), (3, 0.6)):
        grid = Slow(client_app(config), [{"partition-id": i} for i in range(count)])
        grid.busy.update(grid.started[1:])
        Slow.looks = 0
        strategy = strategy_of(config, tmp_path / str(count), min_clients=1, wait_timeout=waits)
        strategy.run(grid)
        assert read_run(tmp_path / str(count)).records[0]["available"] == 2
