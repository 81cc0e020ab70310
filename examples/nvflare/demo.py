"""One training run in the loop on one machine and in NVFlare's simulator, and how far the models are apart.

``python examples/nvflare/demo.py``, or ``make nvflare-demo``. Digits of scikit-learn, four clients, two of them at
a time.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from moe_flare import moe_job

from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.bookkeeping import client_names
from fedmoe_sched.federated.runs import RunFolder, read_run

TIMEOUT = 600.0  # seconds for the simulator


def main() -> None:
    """Run both and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", default="nvflare-demo-output", help="folder for runs and logs; emptied first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", default="balanced")
    parser.add_argument("--config", help="settings (TOML) instead of those of this demonstration")
    arguments = parser.parse_args()
    output = Path(arguments.output).resolve()
    config = TrainConfig.from_toml(arguments.config) if arguments.config else settings(arguments)
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    print("the loop on one machine ...", flush=True)
    started = time.monotonic()
    run_training(config, output / "local")
    between = time.monotonic()
    print("NVFlare's simulator ...", flush=True)
    run_simulator(config, output)
    print(table(output, between - started, time.monotonic() - between))


def settings(arguments: argparse.Namespace) -> TrainConfig:
    """Return the settings of this demonstration."""
    values = {
        "policy": arguments.policy,
        "rounds": arguments.rounds,
        "clients": {"count": 4, "capacity": [1, 2]},
        "model": {"experts": 8, "expert_hidden": 256},
        "local": {"epochs": 1},
    }
    return TrainConfig.from_dict(values)


def run_simulator(config: TrainConfig, output: Path) -> None:
    """Export the job and run it with two threads, for a limited time."""
    job = moe_job(config, str(output / "nvflare"))
    job.export_job(str(output / "job"))
    status = simulator(output / "job" / job.name, output, config, limit=TIMEOUT)
    found = RunFolder(output / "nvflare").load_checkpoint() if (output / "nvflare").exists() else None
    if status or found is None or found[1]["round"] != config.rounds:
        sys.exit(f"the simulator ended with status {status} before the last round, see {output / 'simulator.log'}")


def simulator(job: Path, output: Path, config: TrainConfig, *, limit: float) -> int:
    """Run ``nvflare simulator``; whatever it started is killed after `limit` seconds. Returns its exit status."""
    names = ",".join(client_names(config.clients.count))
    command = [sys.executable, "-m", "nvflare.cli", "simulator", str(job)]
    command += ["--workspace", str(output / "workspace"), "--clients", names, "--threads", "2"]
    with (output / "simulator.log").open("wb") as stream:
        process = psutil.Popen(command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT)
        try:
            status: int = process.wait(timeout=limit)
        except psutil.TimeoutExpired:
            # Clients are processes in sessions of their own, so that there is no group to kill.
            for child in [*process.children(recursive=True), process]:
                child.kill()
            status = process.wait()
    return status


def table(output: Path, *seconds: float) -> str:
    """Compare the two runs."""
    rows = [f"\n{'run':24s} {'max difference':>14s} {'accuracy':>8s} {'seconds':>8s} {'bytes down':>12s}"]
    expected = parameters(output / "local")
    for name, place, spent in zip(
        ("loop on one machine", "NVFlare, simulator"), ("local", "nvflare"), seconds, strict=True
    ):
        run, found = read_run(output / place), parameters(output / place)
        difference = max(float(np.abs(found[part] - value).max()) for part, value in expected.items())
        accuracy, down = run.records[-1]["accuracy"], run.summary()["bytes_down"]
        rows.append(f"{name:24s} {difference:14g} {accuracy:8.4f} {spent:8.1f} {down:12,}")
    planned = sum(record["planned"] for record in run.records)
    model = sum(value.nbytes for value in expected.values())
    rows.append(f"the whole model to the same {planned} clients: {planned * model:,} B down")
    return "\n".join(rows)


def parameters(folder: Path) -> dict[str, np.ndarray]:
    """Return the final parameters of a run."""
    found = RunFolder(folder).load_checkpoint()
    assert found is not None
    return found[0]


if __name__ == "__main__":
    main()
