"""The round loop: learning, run folders, seeds, failures, and resuming after a kill at any moment."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

from fedmoe_sched.errors import InfeasibleError, InputError, StateFileError
from fedmoe_sched.federated import TrainConfig, run_training, simulation, workers
from fedmoe_sched.federated.methods import Method
from fedmoe_sched.federated.runs import is_timing, read_run
from fedmoe_sched.scheduler import Scheduler
from fedmoe_sched.scores import FitnessOptions

pytestmark = pytest.mark.train

SMALL = {
    "policy": "balanced",
    "rounds": 4,
    "seed": 3,
    "data": {"train_samples": 160, "test_samples": 60},
    "clients": {"count": 8, "capacity": [1, 2], "participation": 0.75, "failure_rate": 0.1, "min_samples": 4},
    "model": {"experts": 4, "channels": [4], "expert_hidden": 0},
    "local": {"batch_size": 32},
}


def small(**changes):
    return TrainConfig.from_dict(SMALL).updated(changes)


def contents(folder):
    """Everything that a run measured, apart from wall times; lines must be whole and in order."""
    text = (Path(folder) / "metrics.jsonl").read_text()
    text = text[: text.rfind("\n") + 1]
    records = [json.loads(line) for line in text.splitlines()]
    assert [r["round"] for r in records] == list(range(1, len(records) + 1))
    return [{k: v for k, v in r.items() if not is_timing(k)} for r in records]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run to compare others with."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_training(small(), folder)


def test_a_run_folder_has_all_that_figures_and_tables_need(whole):
    folder, result = whole
    run = read_run(folder)
    assert TrainConfig.from_toml(folder / "config.toml") == small()
    record = run.records[-1]
    for key in ("accuracy", "loss", "client_accuracy_mean", "client_accuracy_worst_decile", "load_cv", "objective",
                "gap", "status", "solver", "fitness_given_up", "samples", "failed", "usage"):  # fmt: skip
        assert key in record
    assert {k for k in record if is_timing(k)} >= {
        "schedule_seconds", "solve_seconds", "train_seconds", "evaluate_seconds", "aggregate_seconds",
    }  # fmt: skip
    assert record["policy"] == "balanced"
    assert (record["status"], record["available"]) == ("optimal", 6)
    assert run.counts.shape == (8, 10)
    assert run.counts.sum() == 160
    assignment = run.schedule_arrays("assignment")
    assert assignment.shape == (4, 8, 4)
    assert [r["loads"] for r in run.records] == assignment.sum(axis=1).tolist()
    assert (assignment.sum(axis=2) <= run.capacity).all()
    assert run.schedule_arrays("fitness").shape == (4, 8, 4)
    samples = run.schedule_arrays("samples")
    assert (samples[~assignment] == 0).all()
    assert samples.sum(axis=(1, 2)) == pytest.approx([r["samples"] for r in run.records], rel=1e-4)
    assert list(result.records) == list(run.records)
    assert result.state["gate.weight"].shape[0] == 4
    # Only the latest checkpoint is kept.
    assert [p.name for p in (folder / "checkpoint").iterdir()] == ["round-000004"]


def test_some_clients_failed_and_only_they_were_left_out(whole):
    run = whole[1].run
    failed = sum(r["failed"] for r in run.records)
    assert failed == sum(len(r["failed_clients"]) for r in run.records) > 0
    trained = (run.schedule_arrays("samples").sum(axis=2) > 0).sum(axis=1)
    assert trained.tolist() == [r["answered"] for r in run.records]


def test_the_fitness_is_learnt_from_rewards_of_trained_pairs_only(whole):
    run = whole[1].run
    prior = FitnessOptions().prior
    fitness = np.nan_to_num(run.schedule_arrays("fitness"), nan=prior)  # of clients not seen yet
    trained = run.schedule_arrays("samples") > 0
    before = np.concatenate([np.full_like(fitness[:1], prior), fitness[:-1]])
    assert (fitness[~trained] == before[~trained]).all()
    assert (fitness[trained] != before[trained]).any()


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_run_with_any_number_of_workers(whole, tmp_path, count):
    state = run_training(small(workers=count), tmp_path / "run").state
    assert contents(tmp_path / "run") == contents(whole[0])
    assert all(np.array_equal(value, whole[1].state[name]) for name, value in state.items())


def test_another_seed_gives_another_run(whole, tmp_path):
    run_training(small(seed=4), tmp_path / "other")
    assert contents(tmp_path / "other") != contents(whole[0])


def test_callbacks_get_every_record_when_it_is_on_disk(tmp_path):
    seen = []

    def callback(record):
        assert contents(tmp_path / "run")[-1]["round"] == record["round"]
        seen.append(record["round"])

    run_training(small(rounds=2), tmp_path / "run", callbacks=[callback])
    assert seen == [1, 2]


class StopError(Exception):
    pass


# Steps of a round after each of which the process may end; the last one tears a line of the metrics.
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("moment", ["plan", "merge", "append", "write_schedule", "save_checkpoint", "torn line"])
def test_resuming_after_a_stop_at_every_step_of_a_round(whole, tmp_path, monkeypatch, moment, number):
    folder = tmp_path / "run"
    homes = {"plan": Scheduler, "merge": Method}
    name = "append" if moment == "torn line" else moment
    home = homes.get(moment, simulation.RunFolder)
    real, calls = getattr(home, name), []

    def stop_in_that_round(*args, **kwargs):
        answer = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == number:
            if moment == "torn line":
                file = folder / "metrics.jsonl"
                file.write_bytes(file.read_bytes()[:-20])
            raise StopError
        return answer

    monkeypatch.setattr(home, name, stop_in_that_round)
    with pytest.raises(StopError):
        run_training(small(), folder)
    monkeypatch.undo()
    run_training(small(), folder, resume=True)
    assert (folder / "metrics.jsonl").read_bytes().endswith(b"}\n")
    assert contents(folder) == contents(whole[0])
    ours, reference = read_run(folder), read_run(whole[0])
    for key in ("assignment", "fitness", "samples", "client_accuracy"):
        assert np.array_equal(ours.schedule_arrays(key), reference.schedule_arrays(key), equal_nan=True)


CHILD = """
import sys
from fedmoe_sched.federated import TrainConfig, run_training
config = TrainConfig.from_toml(sys.argv[1])
slow = {"torch._dynamo", "sklearn"}
run_training(config, sys.argv[2], resume=True, callbacks=[lambda r: print(*slow & set(sys.modules), flush=True)])
"""


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_a_killed_process_is_resumed_to_the_same_metrics(tmp_path, kills):
    """SIGKILL at moments drawn from a seed; then resume, and compare with an uninterrupted run.

    A run loads neither torch's compiler nor scikit-learn: each takes as long as torch itself.
    """
    config = small(rounds=4 * kills + 4)
    (tmp_path / "config.toml").write_text(config.to_toml())
    command = [sys.executable, "-c", CHILD, str(tmp_path / "config.toml"), str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    rng = np.random.default_rng(0)
    for _ in range(kills):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            for _ in range(2):
                assert child.stdout.readline() == "\n"  # some rounds are through
            time.sleep(rng.uniform(0, 0.1))
            child.kill()
        assert child.returncode == -signal.SIGKILL
    assert len(contents(tmp_path / "run")) < config.rounds
    run_training(config, tmp_path / "run", resume=True)
    run_training(config, tmp_path / "whole")
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing_and_more_rounds_extend_it(tmp_path):
    folder = tmp_path / "run"
    run_training(small(rounds=2), folder)
    before = (folder / "metrics.jsonl").read_bytes()
    run_training(small(rounds=2), folder, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == before
    run_training(small(rounds=4), folder, resume=True)
    run_training(small(rounds=4), tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_run_folder_in_use_and_other_settings_are_refused(whole):
    folder = whole[0]
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds a run already"):
        run_training(small(), folder)
    with pytest.raises(InputError, match=r"local\.batch_size = 8, but the run was started with 32"):
        run_training(small(**{"local.batch_size": 8}), folder, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_run_that_is_going_on_cannot_be_resumed(tmp_path):
    folder, refused = tmp_path / "run", []

    def resume(_):
        with pytest.raises(InputError, match=r"run folder .*run: is in use by another command") as error:
            run_training(small(rounds=2), folder, resume=True)
        refused.append(error)

    assert len(run_training(small(rounds=2), folder, callbacks=[resume]).run.records) == 2
    assert len(refused) == 2


def test_damaged_run_folders_are_told(tmp_path):
    folder = tmp_path / "run"
    run_training(small(rounds=2), folder)
    model = folder / "checkpoint" / "round-000002" / "model.npz"
    content = model.read_bytes()
    model.write_bytes(content[:-100])
    with pytest.raises(StateFileError, match=r"model\.npz"):
        run_training(small(), folder, resume=True)
    model.write_bytes(content)
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-1])
    with pytest.raises(
        StateFileError, match=r"metrics\.jsonl: has \d+ bytes, had \d+ at the checkpoint of round 2"
    ):
        run_training(small(), folder, resume=True)
    metrics.write_bytes(b"{}\n")
    with pytest.raises(StateFileError, match=r"metrics\.jsonl, line 1: must be the record of round 1"):
        read_run(folder)
    with pytest.raises(InputError, match=r"nowhere.*cannot be read"):
        read_run(tmp_path / "nowhere")


def test_a_round_that_cannot_be_scheduled_stops_the_run_with_the_reason(tmp_path):
    # 6 clients of capacity 1 or 2 cannot fill 4 x 4 places.
    with pytest.raises(InfeasibleError, match="need 12"):
        run_training(small(policy_options={"load_min": 4}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_with_soft_it_takes_place_with_bounds_that_give_way_by_the_fewest_places(tmp_path):
    config = small(policy_options={"load_min": 4, "balance": None, "soft": True})
    records = run_training(config, tmp_path / "run").records
    assert [record["round"] for record in records] == [1, 2, 3, 4]
    for record in records:
        # Every slot of the clients counts for an expert that lacks clients: the rest of 4 x 4 places gives way.
        lacking = [max(0, 4 - load) for load in record["loads"]]
        assert sum(lacking) == 16 - sum(record["loads"]) > 0
        told = [text.partition(" (one more place is worth")[0] for text in record["relaxations"]]
        assert told == [f"load_min[{j}]: 4 -> {4 - lack}" for j, lack in enumerate(lacking) if lack]
        assert record["relaxed"] == len(told)
    assert contents(tmp_path / "run")[0]["relaxations"] == records[0]["relaxations"]


def test_updates_that_are_not_finite_are_rejected_and_told_to_the_policy(tmp_path, monkeypatch):
    real = workers.train_client

    def broken(*args, **kwargs):
        result = real(*args, **kwargs)
        if kwargs["client"] == "client-2":
            result.update.parameters["gate.bias"][0] = float("nan")
        return result

    monkeypatch.setattr(workers, "train_client", broken)
    config = small(**{"rounds": 1, "clients.participation": 1.0, "clients.failure_rate": 0.0})
    record = run_training(config, tmp_path / "run").records[0]
    assert record["rejected"] == ["client-2: parameter 'gate.bias'[0] = nan: must be finite"]
    assert record["failed_clients"] == ["client-2"]
    assert record["accuracy"] > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "clever"}, "policy = 'clever': must be one of scheduler, random"),
        ({"policy_options": {"balanse": 1}}, "policy 'balanced'.*balanse"),
        ({"device": "cuda:99"}, "device = 'cuda:99': cannot be used here"),
        ({"device": "gpu"}, "device = 'gpu': cannot be used here"),
        ({"clients.count": 100}, r"clients\.count = 100"),
        ({"data.name": "cifar10", "data.dir": "no such folder"}, r"data_batch_1\.bin is missing"),
    ],
)
def test_wrong_settings_are_told_before_a_folder_is_made(tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        run_training(small(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_digits_are_learnt(tmp_path):
    config = TrainConfig().updated({"rounds": 5, "clients.split": "iid", "clients.count": 6, "local.epochs": 2})
    assert run_training(config, tmp_path / "run").records[-1]["accuracy"] > 0.8
