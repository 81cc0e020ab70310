"""The server's side of a run with clients elsewhere: the run of the loop, and what becomes of bad answers."""

import dataclasses
import json
import math

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

import torch

from fedmoe_sched import CapacityProfile
from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.coordinator import ClientOffer, Coordinator
from fedmoe_sched.federated.runs import is_timing, read_run
from fedmoe_sched.federated.workers import LocalTrainer

pytestmark = pytest.mark.train

SMALL = {
    "policy": "balanced",
    "rounds": 3,
    "seed": 3,
    "data": {"train_samples": 160, "test_samples": 60},
    "clients": {"count": 6, "capacity": [1, 2], "min_samples": 4},
    "model": {"experts": 4, "channels": [4], "expert_hidden": 0},
}


def small(**changes):
    return TrainConfig.from_dict(SMALL).updated(changes)


def everybody(coordinator):
    return dict.fromkeys(coordinator.names, ClientOffer())


class Clients:
    """All clients, in this process."""

    def __init__(self, coordinator):
        prepared = coordinator.prepared
        self.trainer = LocalTrainer(coordinator.config, prepared.data, prepared.partition.samples)

    def train(self, coordinator, jobs):
        """Train with only the parameters that are sent."""
        return [
            self.trainer.train(
                {part: coordinator.state[part] for part in coordinator.parts(job.brief.experts)}, job
            )
            for job in jobs
        ]


def run_rounds(coordinator, count):
    clients = Clients(coordinator)
    for _ in range(count):
        results = clients.train(coordinator, coordinator.plan(everybody(coordinator)))
        coordinator.close(results[::-1])
    return coordinator


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]


def assert_same_records(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for key in set(a) & set(b):
            assert a[key] == pytest.approx(b[key], rel=1e-12) if isinstance(a[key], float) else a[key] == b[key], (
                key
            )


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same run by the loop on one machine."""
    folder = tmp_path_factory.mktemp("local") / "run"
    return folder, run_training(small(), folder)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clients.participation": 0.5, "policy": "random"},
        {"local.train_gate": False, "policy": "flex-moe", "local.reward": "loss"},
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()) or "plain",
)
def test_it_gives_the_run_of_the_loop_bit_for_bit(changes, tmp_path):
    config = small(**changes)
    expected = run_training(config, tmp_path / "local")
    coordinator = run_rounds(Coordinator(config, tmp_path / "elsewhere"), 3)
    assert_same_state(coordinator.state, expected.state)
    assert_same_records(records(tmp_path / "elsewhere"), records(tmp_path / "local"))
    assert set(records(tmp_path / "elsewhere")[0]) - set(records(tmp_path / "local")[0]) == {
        "unanswered",
        "enough",
        "bytes_asked",
    }
    for file in sorted((tmp_path / "local" / "schedules").iterdir()):
        with np.load(file) as ours, np.load(tmp_path / "elsewhere" / "schedules" / file.name) as theirs:
            for key in ("assignment", "samples", "fitness", "client_accuracy"):
                assert np.array_equal(ours[key], theirs[key], equal_nan=True)


def test_readers_of_run_folders_take_its_folder(tmp_path):
    run_rounds(Coordinator(small(), tmp_path / "run"), 2)
    run = read_run(tmp_path / "run")
    assert run.summary()["rounds"] == 2
    assert run.schedule_arrays("assignment").shape == (2, 6, 4)
    assert run.counts.sum() == 160
    assert [p.name for p in (tmp_path / "run" / "checkpoint").iterdir()] == ["round-000002"]


def test_it_goes_on_from_a_checkpoint_of_its_own_and_of_the_loop(local, tmp_path):
    run_rounds(Coordinator(small(), tmp_path / "own"), 1)
    run_training(small(rounds=2), tmp_path / "loop")
    for name, done in (("own", 1), ("loop", 2)):
        again = Coordinator(small(), tmp_path / name, resume=True)
        assert again.round == done
        assert_same_state(run_rounds(again, 3 - done).state, local[1].state)
        assert_same_records(records(tmp_path / name), records(local[0]))


def test_the_loop_goes_on_from_its_checkpoint(local, tmp_path):
    run_rounds(Coordinator(small(), tmp_path / "run"), 2)
    assert_same_state(run_training(small(), tmp_path / "run", resume=True).state, local[1].state)


def test_rounds_that_were_not_closed_are_made_again(local, tmp_path):
    coordinator = run_rounds(Coordinator(small(), tmp_path / "run"), 1)
    coordinator.plan(everybody(coordinator))
    (tmp_path / "run" / "metrics.jsonl").open("a").write('{"round": 2, "half": ')
    again = run_rounds(Coordinator(small(), tmp_path / "run", resume=True), 2)
    assert_same_state(again.state, local[1].state)


def test_other_settings_are_refused_and_so_is_a_folder_in_use(local, tmp_path):
    run_rounds(Coordinator(small(), tmp_path / "run"), 1)
    with pytest.raises(InputError, match="holds a run already"):
        Coordinator(small(), tmp_path / "run")
    with pytest.raises(InputError, match="seed = 4, but the run was started with 3"):
        Coordinator(small(seed=4), tmp_path / "run", resume=True)
    model = next((tmp_path / "run" / "checkpoint").glob("*/model.npz"))
    model.write_bytes(model.read_bytes()[:100])
    with pytest.raises(StateFileError, match=r"model\.npz"):
        Coordinator(small(), tmp_path / "run", resume=True)


def test_simulated_devices_and_failures_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"devices.source = 'synthetic'"):
        Coordinator(small(**{"devices.source": "synthetic"}), tmp_path / "run")
    with pytest.raises(InputError, match=r"clients.failure_rate = 0.1"):
        Coordinator(small(**{"clients.failure_rate": 0.1}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_experts_that_nobody_trained_and_clients_that_were_lost(tmp_path):
    coordinator = Coordinator(small(), tmp_path / "run")
    clients, before = Clients(coordinator), coordinator.state
    jobs = coordinator.plan(everybody(coordinator))
    results = clients.train(coordinator, jobs[:2])
    record = coordinator.close(results, unanswered={jobs[2].client: "it rained"})
    trained = {expert for job in jobs[:2] for expert in job.brief.experts}
    assert trained < set(range(4))
    for name, value in coordinator.state.items():
        expert = name.split(".")[1] if name.startswith("experts.") else None
        assert torch.equal(value, before[name]) == (expert is not None and int(expert) not in trained), name
    assert record["unanswered"] == {job.client: "it rained" if job is jobs[2] else "no answer" for job in jobs[2:]}
    assert record["failed_clients"] == [job.client for job in jobs[2:]]
    assert record["answered"] == 2


def changed(result, **fields):
    """Return a result whose update, or which itself, has other fields."""
    ours = {k: v for k, v in fields.items() if k in {f.name for f in dataclasses.fields(result)}}
    theirs = {k: v for k, v in fields.items() if k not in ours}
    return dataclasses.replace(result, update=dataclasses.replace(result.update, **theirs), **ours)


def own_expert(result):
    """Return an expert of the client, one that it does not have, and a parameter of the former."""
    own = min(result.rewards)
    other = next(j for j in range(4) if j not in result.rewards)
    return own, other, next(name for name in result.update.parameters if name.startswith(f"experts.{own}."))


def with_parameter(result, value, name=None):
    """Replace a parameter of the client's expert, or add one."""
    known = result.update.parameters
    name = name or own_expert(result)[2]
    return changed(result, parameters=known | {name: value(known[own_expert(result)[2]])})


def with_weight(result, value):
    return changed(result, expert_samples=result.update.expert_samples | {own_expert(result)[0]: value})


def of_another_expert(result):
    own, other, name = own_expert(result)
    return with_parameter(result, np.copy, name.replace(f"experts.{own}.", f"experts.{other}."))


# What makes a good result a malformed one, and a part of what is said of it.
SPOILT = {
    "nan": (lambda r: with_parameter(r, lambda v: np.full_like(v, np.nan)), "must be finite"),
    "shape": (lambda r: with_parameter(r, lambda v: v[:1]), "has shape"),
    "text": (lambda r: with_parameter(r, lambda v: np.full(v.shape, "x")), "cannot be read as numbers"),
    "unknown": (lambda r: with_parameter(r, np.copy, "experts.77.0"), "there is none of that name"),
    "wrong expert": (of_another_expert, "was not assigned to this client"),
    "negative count": (lambda r: with_weight(r, -1.0), "= -1.0: must be finite and >= 0"),
    "too many": (lambda r: with_weight(r, 1e300), "2**53"),
    "negative samples": (lambda r: changed(r, samples=-5.0), "samples = -5.0: must be finite and >= 0"),
    "reward": (lambda r: changed(r, rewards=dict.fromkeys(r.rewards, math.nan)), "must be finite"),
    "no reward": (lambda r: changed(r, rewards={}), "rewards of experts []"),
    "large reward": (lambda r: changed(r, rewards=dict.fromkeys(r.rewards, -1e300)), "rewards of more than 2**53"),
    "loss": (lambda r: changed(r, loss=math.nan), "loss = nan: must be finite"),
    "seconds": (lambda r: changed(r, seconds=math.inf), "seconds = inf"),
    "stranger": (lambda r: changed(r, client="client-9"), "no expert was assigned to it"),
}


def without_second(folder, spoil=None):
    """Run two rounds, the first without the second answer or with it spoilt: (record, client, answer, state)."""
    coordinator = Coordinator(small(), folder)
    jobs = coordinator.plan(everybody(coordinator))
    results = Clients(coordinator).train(coordinator, jobs)
    wrong = [] if spoil is None else [spoil(results[1])]
    record = coordinator.close([*results[:1], *wrong, *results[2:]])
    return record, jobs[1].client, wrong, run_rounds(coordinator, 1).state


@pytest.fixture(scope="module")
def unanswered(tmp_path_factory):
    record, client, _, state = without_second(tmp_path_factory.mktemp("unanswered") / "run")
    assert (record["failed_clients"], record["rejected"]) == ([client], [])
    return state


@pytest.mark.parametrize("kind", SPOILT)
def test_a_malformed_update_is_left_out_and_named_and_the_rest_is_used(kind, unanswered, tmp_path):
    """The run goes on as if the client had not answered at all."""
    spoil, reason = SPOILT[kind]
    record, client, [wrong], state = without_second(tmp_path / "run", spoil)
    assert record["failed_clients"] == [client]
    [text] = record["rejected"]
    assert reason in text
    assert str(wrong.update.client) in text
    assert_same_state(state, unanswered)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_what_a_client_was_not_to_train_it_cannot_change(tmp_path):
    coordinator = Coordinator(small(**{"local.train_gate": False}), tmp_path / "run")
    before = coordinator.state["gate.bias"]
    results = Clients(coordinator).train(coordinator, coordinator.plan(everybody(coordinator)))
    theirs = {**results[0].update.parameters, "gate.bias": np.ones(before.shape)}
    record = coordinator.close([changed(results[0], parameters=theirs), *results[1:]])
    assert record["rejected"] == [f"{results[0].update.client}: parameter 'gate.bias': was not to be trained"]
    assert torch.equal(coordinator.state["gate.bias"], before)


def test_a_second_answer_of_a_client_is_not_used(tmp_path):
    states = []
    for count in (1, 2):
        coordinator = Coordinator(small(), tmp_path / str(count))
        results = Clients(coordinator).train(coordinator, coordinator.plan(everybody(coordinator)))
        record = coordinator.close([*results, *results[: count - 1]])
        assert record["failed"] == 0
        assert len(record["rejected"]) == count - 1
        states.append(coordinator.state)
    assert_same_state(*states)


def test_too_few_answers_leave_the_model_as_it_is_and_teach_what_they_can(tmp_path):
    coordinator = Coordinator(small(), tmp_path / "run", min_replies=3)
    clients, before = Clients(coordinator), coordinator.state
    jobs = coordinator.plan(everybody(coordinator))
    record = coordinator.close(clients.train(coordinator, jobs[:2]))
    assert_same_state(coordinator.state, before)
    assert (record["enough"], record["answered"], record["samples"]) == (False, 2, 0.0)
    assert record["usage"] == [0.0] * 4
    fitness = read_run(tmp_path / "run").schedule_arrays("fitness")[0]
    assert (fitness[:2] < 1.0).any(axis=1).all(), "those that answered have been learnt from"
    assert (fitness[2:] == 1.0).all()
    record = coordinator.close(clients.train(coordinator, coordinator.plan(everybody(coordinator))[:3]))
    assert record["enough"]
    assert not torch.equal(coordinator.state["gate.weight"], before["gate.weight"])


def test_a_round_without_any_answer_changes_no_parameter(tmp_path):
    coordinator = Coordinator(small(), tmp_path / "run")
    before = coordinator.state
    coordinator.plan(everybody(coordinator))
    record = coordinator.close([])
    assert_same_state(coordinator.state, before)
    assert (record["answered"], record["failed"], record["train_loss"]) == (0, 6, None)
    assert run_rounds(coordinator, 2).round == 3


def test_clients_come_and_go_and_say_what_they_can_do(tmp_path):
    coordinator = Coordinator(small(), tmp_path / "run", deadline=10.0)
    slow = CapacityProfile(ms_per_sample=1000.0)  # tens of samples, three passes, two epochs: minutes
    offers = {"client-4": ClientOffer(3), "client-1": ClientOffer(4), "client-2": ClientOffer(4, slow)}
    jobs = coordinator.plan(offers)
    assert [job.client for job in jobs] == ["client-1", "client-4"]
    assert [len(job.brief.experts) for job in jobs] == [4, 3]
    coordinator.close(Clients(coordinator).train(coordinator, jobs))
    with pytest.raises(InputError, match=r"available\['eve'\]: the run has clients client-0 to client-5"):
        coordinator.plan({"eve": ClientOffer()})
    with pytest.raises(InputError, match="names no client"):
        coordinator.plan({})
    with pytest.raises(InputError, match="no round is open"):
        coordinator.close([])


def test_clients_that_are_away_are_replaced_by_the_next_that_were_drawn(tmp_path):
    coordinator = Coordinator(small(**{"clients.participation": 0.5}), tmp_path / "run")
    first = [job.client for job in coordinator.plan(everybody(coordinator))]
    coordinator.close([])
    assert len(first) == 3
    other = Coordinator(small(**{"clients.participation": 0.5}), tmp_path / "other")
    offers = everybody(other)
    del offers[first[0]]
    second = [job.client for job in other.plan(offers)]
    assert len(second) == 3
    assert set(first) - set(second) == {first[0]}
