"""The round loop with devices: simulated time and traffic in the records, who is left out, and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from device_tools import write_flash, write_measurements

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated import TrainConfig, run_training, simulation, workers
from fedmoe_sched.federated.methods import Method
from fedmoe_sched.federated.runs import is_timing, read_run
from fedmoe_sched.policies import load_policy

pytestmark = pytest.mark.train

SMALL = {
    "rounds": 4,
    "seed": 3,
    "data": {"train_samples": 160, "test_samples": 60},
    "clients": {"count": 10, "capacity": [1, 2], "min_samples": 4},
    "model": {"experts": 4, "channels": [4], "expert_hidden": 0},
    "local": {"batch_size": 32},
    "devices": {"source": "synthetic"},
}
# All that can happen: clients come and go within a minute or so, are early or late, and fail.
EVENTFUL = {
    "rounds": 6,
    "clients.participation": 0.8,
    "clients.failure_rate": 0.1,
    "devices.source": "phones",
    "devices.availability": True,
    "devices.min_available": 3,
    "devices.deadline": 15.0,
    "devices.jitter": 0.8,
}
BUSY = {
    "trace_start": [0, 0],
    "trace_end": [100, 130],
    "offset": [0, 2, 4],
    "start": [0, 50, 10, 100],
    "end": [35, 90, 70, 120],
}
SIMULATED = ("simulated_round", "simulated_time", "stragglers", "dropouts", "unavailable")


def small(**changes):
    return TrainConfig.from_dict(SMALL).updated(changes)


def contents(folder):
    records = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not is_timing(k)} for r in records]


@pytest.fixture(scope="module")
def eventful(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eventful")
    phones = folder / "phones"
    phones.mkdir()
    write_measurements(phones)
    write_flash(phones, **BUSY)
    config = small(**EVENTFUL, **{"devices.dir": str(phones)})
    return folder / "run", run_training(config, folder / "run"), config


def test_records_add_up(eventful):
    run = eventful[1].run
    lengths, time = run.series("simulated_round"), run.series("simulated_time")
    assert (lengths > 0).all()
    assert lengths.max() > 15.0  # a wait before the round
    assert time == pytest.approx(np.cumsum(lengths), abs=1e-5)
    for record in run.records:
        assert not any(is_timing(key) for key in SIMULATED)
        assert record["available"] + record["unavailable"] == 8
        assert record["stragglers"] + record["dropouts"] <= record["failed"]
        assert record["failed"] + record["answered"] == record["planned"]
        assert record["failed"] == 0 or record["simulated_round"] >= 15.0
        assert record["available"] >= 3
    for key in ("stragglers", "dropouts", "unavailable"):
        assert run.series(key).sum() > 0
    assert run.series("failed").sum() > run.series("stragglers").sum() + run.series("dropouts").sum()
    assert run.schedule_arrays("assignment").any(axis=2).sum(axis=1).tolist() == run.series("planned").tolist()
    trained = (run.schedule_arrays("samples").sum(axis=2) > 0).sum(axis=1)
    assert trained.tolist() == run.series("answered").tolist()


def test_the_clients_file_has_the_profiles(eventful):
    with np.load(eventful[0] / "clients.npz") as archive:
        profiles = archive["profiles"]
    assert profiles.shape == (10, 5)
    assert (profiles[:, :4] > 0).all()


def test_the_same_seed_gives_the_same_times_with_any_number_of_workers(eventful, tmp_path, processes):
    run_training(eventful[2].updated({"workers": processes}), tmp_path / "run")
    assert contents(tmp_path / "run") == contents(eventful[0])
    run_training(eventful[2].updated({"seed": 4}), tmp_path / "other")
    times = [read_run(folder).series("simulated_time").tolist() for folder in (tmp_path / "other", eventful[0])]
    assert times[0] != times[1]


class StopError(Exception):
    pass


@pytest.mark.parametrize("number", [2, 5])
@pytest.mark.parametrize("moment", ["plan", "append", "save_checkpoint"])
def test_resuming_continues_the_clock(eventful, tmp_path, monkeypatch, moment, number):
    folder = tmp_path / "run"
    home = simulation.RunFolder if moment != "plan" else type(load_policy(checkpoint(eventful[0]) / "policy.npz"))
    real, calls = getattr(home, moment), []

    def stop_in_that_round(*args, **kwargs):
        answer = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            raise StopError
        return answer

    monkeypatch.setattr(home, moment, stop_in_that_round)
    with pytest.raises(StopError):
        run_training(eventful[2], folder)
    monkeypatch.undo()
    run_training(eventful[2], folder, resume=True)
    assert contents(folder) == contents(eventful[0])
    ours, reference = (load_policy(checkpoint(f) / "policy.npz").state_dict() for f in (folder, eventful[0]))
    assert ours["arrays"].keys() == reference["arrays"].keys()
    for name, array in ours["arrays"].items():
        assert np.array_equal(array, reference["arrays"][name], equal_nan=True), name


def checkpoint(folder):
    [found] = (Path(folder) / "checkpoint").iterdir()
    return found


def test_without_devices_there_are_bytes_and_no_times(tmp_path):
    changes = {"devices.source": "none", "rounds": 2, "clients.failure_rate": 0.3}
    run = run_training(small(**changes), tmp_path / "run").run
    assert not set(SIMULATED) & set(run.records[0])
    summary = run.summary(target=0.01)
    assert summary["simulated_time"] is summary["simulated_time_to_target"] is None
    assert summary["bytes_down"] == run.series("bytes_down").sum() > summary["bytes_up"] > 0


@pytest.mark.parametrize("frozen", [(), ("local.train_gate",), ("local.train_extractor", "local.train_gate")])
def test_bytes_are_those_of_the_updates(tmp_path, monkeypatch, frozen):
    sent, real = [], Method.merge

    def weigh(self, state, updates, *args):
        sent.append(sum(value.nbytes for update in updates for value in update.parameters.values()))
        return real(self, state, updates, *args)

    monkeypatch.setattr(Method, "merge", weigh)
    changes = {"devices.source": "none", "rounds": 2, "clients.failure_rate": 0.3} | dict.fromkeys(frozen, False)
    result = run_training(small(**changes), tmp_path / "run")
    assert result.run.series("bytes_up").tolist() == sent
    sizes = {name: value.numel() * 4 for name, value in result.state.items()}
    shared = sum(size for name, size in sizes.items() if "experts" not in name)
    expert = sum(size for name, size in sizes.items() if "experts.0." in name)
    for record in result.records:
        assert record["failed"] > 0
        assert record["bytes_down"] == record["planned"] * shared + sum(record["loads"]) * expert


def test_times_are_fedscales_model_of_the_clients_own_samples(tmp_path):
    run = run_training(small(rounds=1, **{"devices.speed_scale": 2.0}), tmp_path / "run").run
    with np.load(tmp_path / "run" / "clients.npz") as archive:
        ms, _, down, up, _ = archive["profiles"].T
    samples = run.counts.sum(axis=1) * 2  # epochs
    experts = run.schedule_arrays("assignment")[0].sum(axis=1)
    # Every client trains alike: bytes per client from those of the round.
    record = run.records[0]
    total = record["bytes_down"]
    shared = 4 * sum(np.prod(shape) for shape in [(4, 1, 3, 3), (4,), (4,), (4,), (4, 16), (4,)])
    size = shared + experts * (total - 10 * shared) / experts.sum()
    seconds = 3 * samples * ms / 1000 * experts + size / down + size / up
    assert record["simulated_round"] == pytest.approx(seconds.max())


def test_the_policy_plans_within_deadline_and_memory(tmp_path):
    # A tenth of 2 to 12 GB of RAM; experts of 50 MB with their gradients and moments need 200 MB each.
    changes = {"devices.expert_bytes": 5e7, "devices.memory_share": 0.1, "devices.expert_compute": 0.01}
    run = run_training(small(rounds=2, **changes), tmp_path / "memory").run
    with np.load(tmp_path / "memory" / "clients.npz") as archive:
        memory = archive["profiles"][:, 1]
    most = np.minimum(run.capacity, memory // 2.001e8)
    assert run.schedule_arrays("assignment").sum(axis=2).tolist() == [most.tolist()] * 2
    assert (most < run.capacity).any()
    run = run_training(small(rounds=2, **{"devices.deadline": 10.0}), tmp_path / "deadline").run
    assert (run.series("simulated_round") <= 10).all()
    assert run.series("stragglers").sum() == 0
    planned = run.schedule_arrays("assignment").sum(axis=2)
    assert (planned < run.capacity).any()
    assert (planned <= run.capacity).all()


def test_a_policy_that_ignores_the_deadline_has_stragglers_on_whom_no_training_is_spent(tmp_path, monkeypatch):
    calls, real = [], workers.train_client

    def count(*args, **kwargs):
        calls.append(kwargs["client"])
        return real(*args, **kwargs)

    monkeypatch.setattr(workers, "train_client", count)
    options = {"fitness": {"prior": 0.5}, "deadline": None}
    config = small(rounds=2, policy_options=options, **{"devices.deadline": 10.0})
    run = run_training(config, tmp_path / "run").run
    assert (run.series("simulated_round") == 10).all()
    for record in run.records:
        assert 0 < record["stragglers"] == record["failed"]
        assert record["bytes_up"] < record["bytes_down"]
    assert len(calls) == run.series("answered").sum()
    assert not set(calls) & set(run.records[0]["failed_clients"])
    fitness, samples = run.schedule_arrays("fitness")[-1], run.schedule_arrays("samples").sum(axis=0)
    assert (fitness[samples == 0] == 0.5).all()  # nothing was learnt of stragglers


def test_the_policy_learns_simulated_times(tmp_path):
    run_training(small(rounds=2), tmp_path / "exact")
    policy = load_policy(checkpoint(tmp_path / "exact") / "policy.npz")
    assert [policy.speed_correction_of(name) for name in policy.clients] == pytest.approx([1.0] * 10)
    run = run_training(small(rounds=1, **{"devices.jitter": 0.5}), tmp_path / "jitter").run
    policy = load_policy(checkpoint(tmp_path / "jitter") / "policy.npz")
    corrections = np.array([policy.speed_correction_of(name) for name in policy.clients])
    assert (corrections != 1).all()
    assert run.records[0]["slowest_seconds"] == run.records[0]["simulated_round"]


@pytest.fixture
def measurements(tmp_path):
    folder = tmp_path / "phones"
    folder.mkdir()
    write_measurements(folder)
    return folder


def test_a_resumed_run_must_find_its_devices_but_may_find_them_elsewhere(tmp_path, measurements):
    phones = {"devices.source": "phones", "devices.availability": True, "devices.dir": str(measurements)}
    run_training(small(rounds=1, **phones), tmp_path / "run")
    before = contents(tmp_path / "run")
    measurements.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"phones_spec\.csv: is missing"):
        run_training(small(rounds=2, **phones), tmp_path / "run", resume=True)
    phones["devices.dir"] = str(tmp_path / "moved")
    write_flash(tmp_path / "moved", trace_end=[1100, 50, 1600])
    with pytest.raises(InputError, match="was started with other devices"):
        run_training(small(rounds=2, **phones), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before
    write_flash(tmp_path / "moved")
    run_training(small(rounds=2, **phones), tmp_path / "run", resume=True)
    run_training(small(rounds=2, **phones), tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"devices.source": "phones", "devices.dir": "nowhere"}, r"nowhere.phones_spec\.csv: is missing"),
        ({"devices.deadline": 0.01}, r"no client can train an expert .* devices\.deadline = 0\.01 s"),
        ({"devices.expert_bytes": 1e12}, r"within its memory"),
    ],
)
def test_wrong_devices_are_told_before_a_folder_is_made(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        run_training(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_simulated_time_to_a_target(eventful):
    run = eventful[1].run
    accuracy, time = run.series("accuracy"), run.series("simulated_time")
    target = accuracy[2]
    first = int(np.argmax(accuracy >= target))
    assert run.time_to(target) == time[first]
    assert run.time_to(2.0) is None
    summary = run.summary(target=target)
    assert summary["simulated_time_to_target"] == time[first]
    assert summary["simulated_time"] == time[-1]
    assert summary["bytes_up"] == run.series("bytes_up").sum()
