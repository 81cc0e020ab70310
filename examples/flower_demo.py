"""One training run four times: the loop on one machine, Flower's simulation, and two deployments on 127.0.0.1.

Prints how far the final models are apart, and what went over the wire by the engine's own count. Called by
``make flower-demo``; ``--data-dir`` takes the folder of CIFAR-10 instead of the digits of scikit-learn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.runs import RunFolder, read_run
from fedmoe_sched.flower import FlowerConfig, client_app, server_app
from fedmoe_sched.flower.loopback import Deployment, RunReport, flower_environment
from fedmoe_sched.flower.settings import read_run_config

APP = Path(__file__).resolve().parent / "flower"
CLIENTS = 4
SETTINGS: dict[str, Any] = {
    "rounds": 3,
    "clients.count": CLIENTS,
    "clients.capacity": "[1, 2]",
    "model.experts": 8,
    "model.expert-hidden": 256,
    "local.epochs": 1,
}
TIMEOUT = 600.0  # seconds for each of the four


@dataclass(frozen=True)
class Line:
    """One row of the table; `report` is what the engine says of a deployment."""

    name: str
    folder: Path
    seconds: float
    report: RunReport | None = None


def main() -> None:
    """Run all four and print the table."""
    arguments = _arguments()
    if arguments.simulate:
        simulate(Path(arguments.simulate), Path(arguments.output))
        return
    output = Path(arguments.output).resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    settings = SETTINGS | {"rounds": arguments.rounds}
    if arguments.data_dir is not None:
        folder = str(Path(arguments.data_dir).resolve())
        settings |= {"data.name": "cifar10", "data.dir": folder, "data.train-samples": 4000}
    config = read_run_config(settings)[0]
    lines = [
        _local(config, output / "local"),
        _simulation(config, output),
        _deployment(settings, output, "deployment", tls=False),
        _deployment(settings, output, "deployment-tls", tls=True),
    ]
    print(table(lines))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", default="flower-demo-output", help="folder for runs and logs; emptied first")
    parser.add_argument("--data-dir", help="folder of CIFAR-10; digits, which need none, by default")
    parser.add_argument("--rounds", type=int, default=SETTINGS["rounds"])
    parser.add_argument("--simulate", help=argparse.SUPPRESS)
    return parser.parse_args()


def _local(config: TrainConfig, folder: Path) -> Line:
    print("the loop on one machine ...", flush=True)
    started = time.monotonic()
    run_training(config, folder)
    return Line("loop on one machine", folder, time.monotonic() - started)


def _simulation(config: TrainConfig, output: Path) -> Line:
    """Run in a process of its own: Ray leaves nothing behind, and prints into a log."""
    print("Flower's simulation ...", flush=True)
    settings, log = output / "settings.toml", output / "simulation.log"
    settings.write_text(config.to_toml(), encoding="utf-8")
    started = time.monotonic()
    command = [sys.executable, __file__, "--simulate", str(settings), "--output", str(output / "simulation")]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=flower_environment(output / "flwr"),
            start_new_session=True,
        )
        try:
            status = process.wait(timeout=TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if status:
        sys.exit(f"the simulation ended with exit status {status}, see {log}")
    return Line("Flower, simulation", output / "simulation", time.monotonic() - started)


def simulate(settings: Path, folder: Path) -> None:
    """Run in Flower's simulation engine, in this process."""
    from flwr.simulation import run_simulation

    config = TrainConfig.from_toml(settings)
    run_simulation(
        server_app(config, FlowerConfig(run_dir=str(folder), min_clients=config.clients.count)),
        client_app(config),
        num_supernodes=config.clients.count,
        backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


def _deployment(settings: dict[str, Any], output: Path, name: str, *, tls: bool) -> Line:
    title = "Flower, TLS and node keys" if tls else "Flower, deployment"
    print(f"{title}: SuperLink and {CLIENTS} SuperNodes on 127.0.0.1 ...", flush=True)
    nodes = [{"partition-id": i, "num-partitions": CLIENTS} for i in range(CLIENTS)]
    folder = output / name
    engine = {"flower.run-dir": str(folder / "run"), "flower.min-clients": CLIENTS}
    with Deployment(folder, APP, nodes, tls=tls) as deployment:
        report = deployment.run(settings | engine, timeout=TIMEOUT)
    if report.status != "finished:completed":
        sys.exit(f"{title}: run {report.run_id} is {report.status}, see {folder / 'superlink.log'}")
    return Line(title, folder / "run", report.seconds, report)


def parameters(folder: Path) -> dict[str, np.ndarray]:
    """Return the final parameters of a run."""
    found = RunFolder(folder).load_checkpoint()
    assert found is not None
    return found[0]


def table(lines: list[Line]) -> str:
    """Compare all runs with the first."""
    rows = [f"\n{'run':26s} {'max difference':>14s} {'accuracy':>8s} {'seconds':>8s}  by the engine's count"]
    expected = parameters(lines[0].folder)
    for line in lines:
        run, found = read_run(line.folder), parameters(line.folder)
        difference = max(float(np.abs(found[name] - value).max()) for name, value in expected.items())
        row = f"{line.name:26s} {difference:14g} {run.records[-1]['accuracy']:8.4f} {line.seconds:8.1f}"
        if line.report is not None:
            row += f"  {line.report.bytes_sent:,} B down, {line.report.bytes_received:,} B up"
        rows.append(row)
    run = read_run(lines[0].folder)
    model = sum(value.nbytes for value in expected.values())
    planned = sum(record["planned"] for record in run.records)
    rows.append(f"assigned experts and shared parts: {run.summary()['bytes_down']:,} B down")
    rows.append(f"the whole model to the same {planned} clients: {planned * model:,} B down")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
