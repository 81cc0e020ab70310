"""The command line: train, figures and demo."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib

import pytest
from device_tools import write_measurements
from typer.testing import CliRunner

from fedmoe_sched.cli import app
from fedmoe_sched.cli._output import duration_text

pytest.importorskip("torch")

from fedmoe_sched.federated.workers import client_pool

pytestmark = pytest.mark.train

# Small enough for a second, large enough to learn something.
SMALL = ("--clients", "4", "--experts", "3", "--rounds", "2", "--set", "data.train-samples=200")


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run the command line in an empty folder; return its result."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


def metrics(folder):
    """Return the records of a run without measured times."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in lines]


class TestTrain:
    def test_a_run_folder_with_settings_and_metrics(self, cli, tmp_path):
        result = cli("train", *SMALL, "--policy", "greedy", "--seed", 3, "--set", "clients.split=iid")
        assert result.exit_code == 0, result.output
        folder = tmp_path / "runs" / "greedy-digits-3"
        lines = result.output.splitlines()
        assert [line.split(" accuracy")[0] for line in lines[:2]] == ["greedy round 1/2", "greedy round 2/2"]
        assert lines[-1] == "run folder runs/greedy-digits-3"
        config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        assert (config["policy"], config["rounds"], config["seed"]) == ("greedy", 2, 3)
        assert config["clients"]["split"] == "iid"
        assert config["data"]["train-samples"] == 200
        assert [record["round"] for record in metrics(folder)] == [1, 2]

    def test_options_come_on_top_of_the_config_file(self, cli, tmp_path):
        text = 'policy = "random"\nrounds = 9\n[clients]\ncount = 4\n[data]\ntrain-samples = 200\n'
        (tmp_path / "run.toml").write_text(text, encoding="utf-8")
        result = cli("train", "--config", "run.toml", "--rounds", 1, "--run-dir", "here")
        assert result.exit_code == 0, result.output
        assert [record["policy"] for record in metrics(tmp_path / "here")] == ["random"]

    @pytest.mark.parametrize(("policy", "workers"), [("balanced", 2), ("flex-moe", 1), ("fedamole", 1)])
    def test_resume_goes_on_with_the_settings_of_the_run(self, cli, tmp_path, monkeypatch, policy, workers):
        pools = []

        def pool_of(config, *arguments):
            pools.append(config.workers)  # workers have tests of their own
            return client_pool(config.updated({"workers": 1}), *arguments)

        monkeypatch.setattr("fedmoe_sched.federated.simulation.client_pool", pool_of)
        whole, part = tmp_path / "whole", tmp_path / "part"
        options = (*SMALL, "--policy", policy, "--set", "clients.failure-rate=0.3")
        assert cli("train", *options, "--run-dir", whole).exit_code == 0
        assert cli("train", *options, "--rounds", 1, "--run-dir", part).exit_code == 0
        result = cli("train", "--resume", "--run-dir", part, "--rounds", 2, "--workers", workers)
        assert result.exit_code == 0, result.output
        assert metrics(part) == metrics(whole)
        assert pools == [1, 1, workers]

    def test_soft_widens_the_bounds_of_rounds_and_says_which(self, cli, tmp_path):
        # Four clients of capacity 1 or 2 have six slots for nine places.
        options = (*SMALL, "--set", "policy-options.load-min=3", "--set", "policy-options.balance=none")
        result = cli("train", *options, "--run-dir", "hard")
        assert result.exit_code != 0
        assert "need 9 clients" in result.stderr
        result = cli("train", *options, "--soft", "--run-dir", "soft")
        assert result.exit_code == 0, result.output
        records = metrics(tmp_path / "soft")
        assert len(records) == 2
        for record, line in zip(records, result.output.splitlines(), strict=False):
            assert sum(record["loads"]) == 6
            used = [re.match(r"load_min\[\d\]: 3 -> (\d) ", told).group(1) for told in record["relaxations"]]
            assert sum(3 - int(places) for places in used) == 3
            assert line.endswith(f" widened {'; '.join(record['relaxations'])}")
        config = tomllib.loads((tmp_path / "soft" / "config.toml").read_text(encoding="utf-8"))
        assert config["policy-options"]["soft"] is True
        result = cli("train", "--resume", "--no-soft", "--run-dir", "soft", "--rounds", 3)
        assert "policy_options.soft = False, but the run was started with True" in result.stderr

    def test_a_finished_folder_is_not_overwritten(self, cli, tmp_path):
        assert cli("train", *SMALL, "--rounds", 1, "--run-dir", "run").exit_code == 0
        before = metrics(tmp_path / "run")
        result = cli("train", *SMALL, "--run-dir", "run")
        assert result.exit_code == 2
        assert "run folder run: holds a run already; resume it (--resume)" in result.stderr
        assert metrics(tmp_path / "run") == before

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--policy", "gredy"], "policy = 'gredy': must be one of scheduler, random, greedy"),
            (["--data", "mnist"], "data.name"),
            (["--clients", "0"], "clients.count"),
            (["--rounds", "-1"], "rounds"),
            (["--workers", "0"], "workers = 0"),
            (["--workers", "2", "--set", "device=meta"], "workers = 2: must be 1 on device 'meta'"),
            (["--set", "clients.alfa=1"], "clients.alfa"),
            (["--resume"], "--resume: give the folder of the run with --run-dir"),
            (["--resume", "--run-dir", "nowhere"], "--resume: run folder nowhere holds no run"),
            (["--set", "alpha"], "--set alpha: must read KEY=VALUE"),
            (["--set", "clients.split=zipf"], "clients.split"),
            (["--set", "devices.source=phones", "--data-dir", "nowhere"], "phones_spec.csv: is missing"),
            (["--set", "devices.deadline=5"], "devices.deadline = 5"),
            (["--config", "none.toml"], "none.toml"),
            (["--config", "broken.toml"], "broken.toml: is not TOML"),
            (["--data", "cifar10", "--data-dir", "nowhere"], "nowhere"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, cli, tmp_path, arguments, message):
        (tmp_path / "broken.toml").write_text("rounds = = 3", encoding="utf-8")
        result = cli("train", *arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "runs").exists()

    def test_a_damaged_checkpoint_is_one_line_and_loses_nothing(self, cli, tmp_path):
        assert cli("train", *SMALL, "--rounds", 1, "--run-dir", "run").exit_code == 0
        before = metrics(tmp_path / "run")
        [state] = (tmp_path / "run" / "checkpoint").glob("*/policy.npz")
        state.write_bytes(state.read_bytes()[:-50])
        result = cli("train", "--resume", "--run-dir", "run", "--rounds", 2)
        assert result.exit_code == 2
        assert "policy.npz: truncated" in result.stderr
        assert result.stderr.count("\n") == 1
        assert metrics(tmp_path / "run") == before

    # What is killed and resumed by the interface instead, in test_federated_simulation, is in the fast suite.
    @pytest.mark.slow
    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no such signal here")
    def test_killed_and_resumed_it_ends_the_same(self, cli, tmp_path):
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        arguments = ["train", *SMALL, "--rounds", "6"]
        assert cli(*arguments, "--run-dir", whole).exit_code == 0
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        program = [sys.executable, "-c", "from fedmoe_sched.cli import main; main()"]
        process = subprocess.Popen(
            [*program, *arguments, "--run-dir", str(killed)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while not (killed / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        result = cli("train", "--resume", "--run-dir", killed)
        assert result.exit_code == 0, result.output
        assert metrics(killed) == metrics(whole)


class TestDevices:
    def test_times_and_traffic_are_columns_where_there_are_any(self, cli, tmp_path, monkeypatch):
        monkeypatch.setattr("fedmoe_sched.figures.save_figures", lambda *_, **__: [])
        phones = tmp_path / "data" / "device_traces"
        phones.mkdir(parents=True)
        write_measurements(phones)
        result = cli("train", *SMALL, "--data-dir", "data", "--set", "devices.source=phones", "--run-dir", "with")
        assert result.exit_code == 0, result.output
        assert re.search(r"MB down +MB up +simulated", result.output)
        simulated = metrics(tmp_path / "with")[-1]["simulated_time"]
        result = cli("train", *SMALL, "--run-dir", "without")
        assert "MB up" in result.output
        assert "simulated" not in result.output
        result = cli("figures", "with", "without", "--target", 0.01)
        header, first, second = result.output.splitlines()[-3:]
        assert header.endswith("simulated  time to 0.01")
        assert first.split()[-4:] == [*duration_text(simulated).split(), *first.split()[-2:]]
        assert second.split()[-2:] == ["-", "-"]
        result = cli("figures", "with", "--target", 1.0)
        assert result.output.split()[-1] == "never"

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(None, "-"), (0.25, "0.2 s"), (119, "119.0 s"), (150, "2.5 min"), (7200, "2.0 h"), (200000, "2.3 d")],
    )
    def test_durations_in_the_unit_that_suits_them(self, seconds, text):
        assert duration_text(seconds) == text


class TestFigures:
    def test_pictures_and_table_of_several_runs(self, cli, tmp_path):
        pytest.importorskip("matplotlib")
        for policy in ("random", "balanced"):
            assert cli("train", *SMALL, "--policy", policy, "--run-dir", policy).exit_code == 0
        result = cli("figures", "random", "balanced", "--output", "pictures", "--target", 0.01)
        assert result.exit_code == 0, result.output
        pictures = sorted(path.name for path in (tmp_path / "pictures").iterdir())
        assert "accuracy.png" in pictures
        assert all((tmp_path / "pictures" / name).read_bytes()[:4] == b"\x89PNG" for name in pictures)
        header, *rows = result.output.splitlines()[-3:]
        assert "rounds to 0.01" in header
        assert [row.split()[0] for row in rows] == ["random", "balanced"]
        assert [row.split()[3] for row in rows] == ["1", "1"]

    def test_what_is_no_run_folder(self, cli, tmp_path):
        (tmp_path / "empty").mkdir()
        for name in ("nowhere", "empty"):
            result = cli("figures", name)
            assert result.exit_code == 2
            assert result.stderr.startswith(f"error: run folder {name}: ")
            assert result.stderr.count("\n") == 1


class TestDemo:
    def test_three_policies_from_the_same_start(self, cli, tmp_path):
        pytest.importorskip("matplotlib")
        earlier = tmp_path / "out" / "runs" / "greedy"  # is replaced
        assert cli("train", *SMALL, "--policy", "greedy", "--run-dir", earlier).exit_code == 0
        result = cli("demo", "--rounds", 1, "--output", "out")
        assert result.exit_code == 0, result.output
        rows = [line.split() for line in result.output.splitlines()[-3:]]
        assert [row[0] for row in rows] == ["random", "greedy", "balanced"]
        records = {name: metrics(tmp_path / "out" / "runs" / name) for name in ("random", "greedy", "balanced")}
        assert all(len(record) == 1 for record in records.values())
        assert all(record[0]["gap"] is not None for record in records.values())
        assert (tmp_path / "out" / "figures" / "accuracy.png").exists()
