"""Faults of real processes: rounds end within their bound, the rest is used, the record names who failed."""

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("flwr")

from test_flower_engines import APP, SMALL, assert_same_run

from fedmoe_sched.federated import run_training
from fedmoe_sched.federated.runs import RunFolder, read_run
from fedmoe_sched.flower.loopback import Deployment
from fedmoe_sched.flower.settings import read_run_config

pytestmark = [pytest.mark.train, pytest.mark.flower]

CLIENTS = 3
LIMIT = 400.0  # seconds for a run, however slow the machine

# The app of the examples, whose clients do what a file says that is named after client and round.
FAULTY = """
import os, time
from pathlib import Path
from fedmoe_sched.flower import client_app, server_app

def fault(message, context, call_next):
    if message.metadata.message_type.startswith("train"):
        folder = Path(context.node_config["faults"])
        place = f"{context.node_config['partition-id']}-{message.metadata.group_id}"
        if (folder / place).exists():
            (folder / "pid").write_text(str(os.getpid()))
            (folder / "pid").rename(folder / f"{place}-pid")
            kind = (folder / place).read_text()
            if kind == "raise":
                raise RuntimeError("out of memory")
            time.sleep(float(kind))
    return call_next(message, context)

client = client_app(mods=[fault])
server = server_app()
"""


def wait_for(condition, what, limit=LIMIT):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A deployment of the faulty app, with a folder for faults."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copytree(APP, folder / "app", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "app" / "moe_app.py").write_text(FAULTY)
    (folder / "faults").mkdir()
    nodes = [{"partition-id": i, "faults": str(folder / "faults")} for i in range(CLIENTS)]
    with Deployment(folder / "deployment", folder / "app", nodes) as deployment:
        yield deployment, folder / "faults"


class FaultyRun:
    """A run with faults by (client, round)."""

    def __init__(self, place, folder, faults, *, rounds, timeout, min_clients=2):
        self.deployment, self.faults = place
        shutil.rmtree(self.faults)
        self.faults.mkdir()
        for (client, number), kind in faults.items():
            (self.faults / f"{client}-{number}").write_text(str(kind))
        self.folder = folder
        settings = SMALL | {"clients.count": CLIENTS, "rounds": rounds, "flower.run-dir": str(folder)}
        settings |= {"flower.round-timeout": timeout, "flower.min-clients": min_clients}
        self.deployment.wait_online(CLIENTS)
        self.run_id = self.deployment.submit(settings)

    def pid(self, client, number):
        """Wait until a client is in the middle of its fault, and return its process."""
        file = self.faults / f"{client}-{number}-pid"
        wait_for(file.exists, f"client {client} began round {number}")
        return int(file.read_text())

    def finish(self):
        """Wait for the end, check that the model is whole, and return the run."""
        found = self.deployment.wait_finished(self.run_id, LIMIT)
        log = (self.deployment.folder / "superlink.log").read_text()
        assert found["status"] == "finished:completed", log[-3000:]
        model = RunFolder(self.folder).load_checkpoint()[0]
        assert all(np.isfinite(value).all() for value in model.values())
        return read_run(self.folder)


def test_clients_that_raise_alone_and_all_together(place, tmp_path):
    faults = {(0, 1): "raise", **{(client, 2): "raise" for client in range(CLIENTS)}}
    run = FaultyRun(place, tmp_path / "run", faults, rounds=3, timeout=120, min_clients=3).finish()
    assert [r["failed_clients"] for r in run.records] == [["client-0"], ["client-0", "client-1", "client-2"], []]
    assert "out of memory" in run.records[0]["unanswered"]["client-0"]
    assert [r["enough"] for r in run.records] == [True, False, True]


def test_a_client_process_that_is_killed_in_the_middle_of_a_round(place, tmp_path):
    run = FaultyRun(place, tmp_path / "run", {(1, 1): 1000}, rounds=3, timeout=60)
    os.kill(run.pid(1, 1), signal.SIGKILL)
    records = run.finish().records
    assert [r["failed_clients"] for r in records] == [["client-1"], [], []]
    assert records[0]["answered"] == CLIENTS - 1
    assert set(records[0]["unanswered"]) == {"client-1"}


def test_a_straggler_is_left_alone_until_it_has_answered(place, tmp_path):
    run = FaultyRun(place, tmp_path / "run", {(2, 1): 75}, rounds=3, timeout=45).finish()
    assert run.records[0]["failed_clients"] == ["client-2"]
    assigned = run.schedule_arrays("assignment").any(axis=2)
    assert assigned[:2, 2].tolist() == [True, False]
    assert all(r["answered"] >= CLIENTS - 1 for r in run.records)


def test_a_supernode_that_is_killed_and_started_anew_comes_back_as_the_same_client(place, tmp_path):
    run = FaultyRun(place, tmp_path / "run", {(0, 1): 1000}, rounds=5, timeout=60)
    run.pid(0, 1)
    run.deployment.kill_supernode(0)
    run.deployment.start_supernode(0)
    finished = run.finish()
    assert finished.records[0]["failed_clients"] == ["client-0"]
    assigned = finished.schedule_arrays("assignment").any(axis=2)
    assert assigned[-1].all(), "it is back under its name"
    assert finished.records[-1]["failed_clients"] == []


def test_a_superlink_that_is_killed_and_a_new_run_that_goes_on(tmp_path):
    """Experts and gates are personal here; the new run has new nodes."""
    settings = SMALL | {"rounds": 4, "policy": "fedmoe-da"}
    expected = tmp_path / "local"
    run_training(read_run_config(settings)[0], expected)
    folder = tmp_path / "run"
    settings |= {"flower.run-dir": str(folder), "flower.round-timeout": 100}
    nodes = [{"partition-id": i} for i in range(2)]
    metrics = Path(folder / "metrics.jsonl")
    with Deployment(tmp_path / "first", APP, nodes) as deployment:
        deployment.submit(settings)
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, "two rounds")
        deployment.kill_superlink()
    with Deployment(tmp_path / "second", APP, nodes) as deployment:
        report = deployment.run(settings | {"flower.resume": True}, timeout=LIMIT)
    assert report.status == "finished:completed"
    assert_same_run(folder, expected, traffic=False)
