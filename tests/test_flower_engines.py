"""The run of the loop on Flower's two engines: simulated with Ray, and deployed on the loopback interface."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("flwr")

from test_federated_coordinator import assert_same_records, records

from fedmoe_sched.errors import WorkerError
from fedmoe_sched.federated import run_training
from fedmoe_sched.federated.runs import RunFolder
from fedmoe_sched.flower.loopback import Deployment, flower_environment
from fedmoe_sched.flower.settings import read_run_config

pytestmark = pytest.mark.train

APP = Path(__file__).resolve().parent.parent / "examples" / "flower"
SMALL = {
    "rounds": 2,
    "seed": 3,
    "data.train-samples": 160,
    "data.test-samples": 60,
    "clients.count": 2,
    "clients.min-samples": 4,
    "model.experts": 4,
    "model.channels": "[4]",
    "model.expert-hidden": 0,
}
SIMULATION = """
import sys
from flwr.simulation import run_simulation
from fedmoe_sched.federated import TrainConfig
from fedmoe_sched.flower import FlowerConfig, client_app, server_app

config = TrainConfig.from_toml(sys.argv[1])
server = server_app(config, FlowerConfig(run_dir=sys.argv[2]))
resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
run_simulation(server, client_app(config), num_supernodes=2, backend_config=resources)
"""


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local") / "run"
    run_training(read_run_config(SMALL)[0], folder)
    return folder


def assert_same_run(folder, expected, *, traffic=True):
    """Compare final parameters, personal ones included, and records; traffic differs where there are such."""
    model, other = (RunFolder(path).load_checkpoint()[0] for path in (folder, expected))
    assert set(model) == set(other)
    for name, value in model.items():
        assert np.array_equal(value, other[name]), name
    ours, theirs = (
        [{k: v for k, v in record.items() if traffic or not k.startswith("bytes_")} for record in records(path)]
        for path in (folder, expected)
    )
    assert_same_records(ours, theirs)


@pytest.mark.flower
def test_the_simulation_gives_the_run_of_the_loop_bit_for_bit(tmp_path):
    """With a policy that asks clients before it plans."""
    pytest.importorskip("ray")
    settings, folder, log = tmp_path / "settings.toml", tmp_path / "run", tmp_path / "log"
    config = read_run_config(SMALL | {"policy": "fedjets"})[0]
    run_training(config, tmp_path / "local")
    settings.write_text(config.to_toml())
    # A process of its own, so that neither Ray nor a hang outlives the test.
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", SIMULATION, settings, folder],
            stdout=stream,
            stderr=stream,
            env=flower_environment(tmp_path / "flwr"),
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=300)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert status == 0, log.read_text()[-3000:]
    assert_same_run(folder, tmp_path / "local")


@pytest.mark.flower
def test_a_deployment_gives_the_run_of_the_loop_bit_for_bit(local, tmp_path):
    folder = tmp_path / "run"
    nodes = [{"partition-id": i, "num-partitions": 2} for i in range(2)]
    with Deployment(tmp_path / "deployment", APP, nodes) as deployment:
        settings = SMALL | {"flower.run-dir": str(folder), "flower.round-timeout": 100}
        report = deployment.run(settings, timeout=250)
        processes = [deployment.superlink, *deployment.supernodes.values()]
        with pytest.raises(WorkerError, match=r"flwr run: refused: .*Invalid run configuration"):
            deployment.submit({"clients.cuont": 3})
    log = (tmp_path / "deployment" / "superlink.log").read_text()
    assert report.status == "finished:completed", log[-3000:]
    assert_same_run(folder, local)
    assert all(process.poll() is not None for process in processes)
    # The engine counts what we say is sent, and what messages cost beside the parameters.
    down = sum(record["bytes_down"] for record in records(folder))
    assert down < report.bytes_sent < down + 100_000


def test_what_does_not_start_is_told_with_its_log(tmp_path):
    deployment = Deployment(tmp_path / "d", APP, [{"partition-id": 0}], start_timeout=0.0)
    with pytest.raises(
        WorkerError, match=r"waiting for the SuperLink to listen: time is over, see .*superlink\.log"
    ):
        deployment.__enter__()
    assert deployment.superlink.poll() is not None
