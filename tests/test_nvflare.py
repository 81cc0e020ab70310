"""The example for NVFlare in its simulator: the run of the loop, and clients that raise, lie and are late."""

import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("nvflare", reason="NVFlare is not installed; make test-nvflare has an environment with it")
pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

import numpy as np
from test_federated_coordinator import assert_same_records, records

from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.runs import RunFolder, read_run

pytestmark = [pytest.mark.train, pytest.mark.nvflare]

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "nvflare"
LIMIT = 600.0  # seconds for a run, however slow the machine

# What is added to the file of the example, for faults by (client, round).
FAULTY = """

import dataclasses
import time

import numpy as np


class FaultyExecutor(ExpertExecutor):
    def __init__(self, settings):
        super().__init__(settings)

    def train(self, config, site, task):
        place = (site, task.meta["round"])
        if place == ("client-0", 1):
            raise RuntimeError("out of memory")
        result = super().train(config, site, task)
        if place == ("client-1", 2):
            spoilt = {name: np.full_like(value, np.nan) for name, value in result.update.parameters.items()}
            result = dataclasses.replace(result, update=dataclasses.replace(result.update, parameters=spoilt))
        if place == ("client-2", 3):
            time.sleep(150)
        return result
"""


@pytest.fixture
def example(monkeypatch):
    """Return the modules of the example."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield importlib.import_module("moe_flare"), importlib.import_module("demo")
    for name in ("moe_flare", "demo", "faulty"):
        sys.modules.pop(name, None)


def small(**changes):
    values = {
        "rounds": 2,
        "seed": 3,
        "data": {"train_samples": 160, "test_samples": 60},
        "clients": {"count": 3, "capacity": [1, 2], "min_samples": 4},
        "model": {"experts": 4, "channels": [4], "expert_hidden": 0},
    }
    return TrainConfig.from_dict(values).updated(changes)


def simulate(demo, job, config, folder):
    job.export_job(str(folder / "job"))
    status = demo.simulator(folder / "job" / job.name, folder, config, limit=LIMIT)
    return status, (folder / "simulator.log").read_text(errors="replace")


@pytest.mark.parametrize(
    "changes", [{}, {"policy": "random", "clients.participation": 0.7}], ids=["balanced", "random"]
)
def test_the_simulator_gives_the_run_of_the_loop_bit_for_bit(changes, example, tmp_path):
    moe_flare, demo = example
    config = small(**changes)
    expected = run_training(config, tmp_path / "local").state
    job = moe_flare.moe_job(config, str(tmp_path / "run"))
    status, log = simulate(demo, job, config, tmp_path)
    assert status == 0, log[-3000:]
    model = RunFolder(tmp_path / "run").load_checkpoint()[0]
    assert set(model) == set(expected)
    for name, value in model.items():
        assert np.array_equal(value, expected[name].numpy()), name
    assert_same_records(records(tmp_path / "run"), records(tmp_path / "local"))


def test_clients_that_raise_lie_and_are_late_have_failed_and_the_rest_is_used(example, tmp_path, monkeypatch):
    _, demo = example
    (tmp_path / "faulty.py").write_text((EXAMPLE / "moe_flare.py").read_text() + FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    faulty = importlib.import_module("faulty")
    config = small(rounds=5)
    job = faulty.moe_job(config, str(tmp_path / "run"), executor=faulty.FaultyExecutor, round_timeout=120)
    status, log = simulate(demo, job, config, tmp_path)
    assert status == 0, log[-3000:]
    run = read_run(tmp_path / "run")
    failed = [record["failed_clients"] for record in run.records]
    assert failed == [["client-0"], ["client-1"], ["client-2"], [], []]
    assert run.records[0]["unanswered"] == {"client-0": "EXECUTION_EXCEPTION: RuntimeError: out of memory"}
    assert "must be finite" in run.records[1]["rejected"][0]
    assert run.records[2]["unanswered"] == {"client-2": "no answer"}
    planned = run.schedule_arrays("assignment").any(axis=2)
    assert planned[:, 2].tolist() == [True, True, True, False, True], "left alone for a round"
    assert planned[:, :2].all()
    model = RunFolder(tmp_path / "run").load_checkpoint()[0]
    assert all(np.isfinite(value).all() for value in model.values())


def test_a_run_is_resumed_from_a_checkpoint_of_the_loop(example, tmp_path):
    moe_flare, demo = example
    run_training(small(rounds=1), tmp_path / "run")
    config = small()
    expected = run_training(config, tmp_path / "local").state
    job = moe_flare.moe_job(config, str(tmp_path / "run"), resume=True)
    status, log = simulate(demo, job, config, tmp_path)
    assert status == 0, log[-3000:]
    model = RunFolder(tmp_path / "run").load_checkpoint()[0]
    assert all(np.array_equal(value, expected[name].numpy()) for name, value in model.items())
