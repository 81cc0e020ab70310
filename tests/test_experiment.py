"""Experiments: what a file may say, running and resuming, tables and figures."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

pytest.importorskip("pydantic")
pytest.importorskip("tomli_w")

from fedmoe_sched._files import locked_folder, write_archive
from fedmoe_sched.cli import app
from fedmoe_sched.cli._experiment import _bars
from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.experiment import Experiment
from fedmoe_sched.federated.experiment_runs import Event, run_all
from fedmoe_sched.federated.experiment_table import MEASURES, collect, summarise, write_results
from fedmoe_sched.federated.runs import RunFolder

pytestmark = pytest.mark.train
QUICK = Path(__file__).resolve().parent.parent / "benchmarks" / "experiments" / "quick.toml"

VALUES = {
    "name": "e",
    "seeds": [0, 1],
    "target": 0.4,
    "base": {"rounds": 3, "clients": {"count": 4, "alpha": 0.5}, "model": {"experts": 3}},
    "arms": [
        {"label": "random", "policy": "random"},
        {"label": "balanced, 0.1", "policy": "balanced", "set": {"policy-options.balance": 0.1}},
    ],
}
GRID = [
    {"label": "few classes", "set": {"clients": {"split": "classes"}}},
    {"label": "iid", "set": {"clients.split": "iid"}},
]


def experiment(**changes):
    return Experiment.from_dict({**VALUES, **changes}, source="e.toml")


class TestFile:
    def test_runs_are_grid_by_arm_by_seed_each_with_its_settings(self):
        plans = experiment(grid=GRID).plan()
        assert [(plan.seed, plan.grid, plan.arm) for plan in plans[:4]] == [
            (0, "few classes", "random"),
            (0, "few classes", "balanced, 0.1"),
            (0, "iid", "random"),
            (0, "iid", "balanced, 0.1"),
        ]
        assert [plan.seed for plan in plans] == [0] * 4 + [1] * 4
        assert plans[7].folder == Path("runs/iid--balanced-0.1/seed-1")
        assert len({plan.folder for plan in plans}) == 8
        config = plans[7].config
        assert (config.policy, config.seed, config.rounds, config.clients.split) == ("balanced", 1, 3, "iid")
        assert config.policy_options == {"balance": 0.1}

    def test_a_table_of_changes_leaves_its_other_settings_alone(self):
        plan = experiment(grid=GRID).plan()[0]
        assert (plan.config.clients.split, plan.config.clients.count, plan.config.clients.alpha) == (
            "classes",
            4,
            0.5,
        )

    def test_a_part_of_the_runs_and_changes_to_all(self):
        whole = experiment(grid=GRID)
        plans = whole.plan(seeds=[7, 7], only=["random", "iid"], changes={"rounds": 1})
        assert [(p.grid, p.arm, p.seed, p.config.rounds) for p in plans] == [("iid", "random", 7, 1)]
        assert len(whole.plan(only=["iid"])) == 4
        with pytest.raises(InputError, match=r"e\.toml: 'radnom': must be the label of .*random, balanced, 0\.1"):
            whole.plan(only=["radnom"])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"arms": []}, "e.toml: arms = []"),
            ({"arm": []}, "e.toml: arm: unknown setting (did you mean 'arms'?)"),
            ({"seeds": [-1]}, "e.toml: seeds.0 = -1"),
            ({"target": 2}, "e.toml: target = 2"),
            ({"base": {"clients": {"cuont": 3}}}, "e.toml: base: clients.cuont: unknown setting (did you mean"),
            ({"base": {"seed": 3}}, "e.toml: base.seed = 3: give seeds"),
            (
                {"arms": [{"label": "x", "polcy": "random"}]},
                "e.toml: arms[0] 'x': polcy: unknown setting (did you mean 'policy'?)",
            ),
            ({"arms": [{"policy": "random"}]}, "e.toml: arms[0]: label"),
            (
                {"arms": [{"label": "x", "policy": "radnom"}]},
                "e.toml: arm 'x': policy = 'radnom': must be one of scheduler, random",
            ),
            (
                {"arms": [{"label": "x", "set": {"policy-options.balanse": 1}}]},
                "e.toml: arm 'x': policy 'balanced'",
            ),
            ({"arms": [{"label": "x", "set": {"clients.alpha": -1}}]}, "e.toml: arm 'x': clients.alpha = -1"),
            (
                {"arms": [{"label": "x", "set": {"rounds.last": 1}}]},
                "e.toml: arm 'x': rounds.last = 1: rounds holds no settings",
            ),
            ({"arms": [{"label": "x", "set": {"seed": 1}}]}, "e.toml: arms[0] 'x': set.seed = 1: give seeds"),
            (
                {"arms": [{"label": "x", "set": {"clients.alpha": 1, "clients": {"alpha": 2}}}]},
                "set.clients.alpha: is given twice",
            ),
            (
                {"arms": [{"label": "a b"}, {"label": "A-b"}]},
                "e.toml: arms[1] 'A-b': label = 'A-b': would share the run folders of 'a b'",
            ),
            ({"arms": [{"label": "?"}]}, "label = '?': must have a letter"),
            ({"grid": [{"label": "g", "policy": "random"}]}, "e.toml: grid[0] 'g': policy: unknown setting"),
            (
                {"grid": [{"label": "g", "set": {"model.experts": 0}}]},
                "e.toml: arm 'random', grid 'g': model.experts = 0",
            ),
        ],
    )
    def test_every_mistake_is_one_line_with_key_and_value(self, changes, words):
        with pytest.raises(InputError) as error:
            experiment(**changes)
        assert words in str(error.value)
        assert "\n" not in str(error.value)

    def test_the_published_files_are_valid(self):
        for path in QUICK.parent.glob("*.toml"):
            assert Experiment.from_toml(path).plan()

    def test_reading_an_experiment_needs_no_torch(self):
        code = "import sys; from fedmoe_sched.federated import experiment_table as table;"
        code += f"table.Experiment.from_toml({str(QUICK)!r}); sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Runs that were not trained --------------------------------------------------------------------------------------


def write_run(output, plan, accuracies, **more):
    """Write the run folder of a plan, with given accuracies."""
    folder = RunFolder(output / plan.folder)
    folder.begin(plan.config.to_toml())
    arrays = {
        "counts": np.ones((4, 10), dtype=np.int64),
        "groups": np.arange(4),
        "capacity": np.ones(4, dtype=int),
    }
    write_archive(folder.clients_file, arrays, {})
    for number, accuracy in enumerate(accuracies, 1):
        assignment = np.eye(4, 3, dtype=bool)
        folder.write_schedule(number, {"assignment": assignment, "fitness": 0.5 * assignment.astype(np.float32)})
        record = {
            "round": number,
            "accuracy": accuracy,
            "client_accuracy_mean": accuracy + 0.1,
            "client_accuracy_worst_decile": accuracy / 2,
            "loads": [2, 1, 1],
            "trained_loads": [2, 1, 0],
            "load_cv": 0.25 * number,
            "client_jain": 1 / number,
            "fitness_given_up": 0.01,
            "gap": None,
            "solve_seconds": 0.5,
            "schedule_seconds": 1.0,
            "train_seconds": 8.0,
            "aggregate_seconds": 1.0,
            "evaluate_seconds": 10.0,
        }
        folder.append(record | more)


def results(output, whole):
    """Write the tables; return the rows, and those of both CSV files."""
    rows = collect(whole, output, whole.plan())
    write_results(whole, rows, output)
    tables = [list(csv.DictReader((output / name).open(encoding="utf-8"))) for name in ("runs.csv", "summary.csv")]
    return rows, *tables


class TestTables:
    def test_mean_and_deviation_over_seeds(self, tmp_path):
        whole = experiment()
        accuracies = {
            ("random", 0): [0.1, 0.2, 0.3],
            ("random", 1): [0.3, 0.4, 0.5],
            ("balanced, 0.1", 0): [0.2, 0.1, 0.3],
        }
        for plan in whole.plan():
            if (plan.arm, plan.seed) in accuracies:
                write_run(tmp_path, plan, accuracies[plan.arm, plan.seed])
        rows, runs, summary = results(tmp_path, whole)
        assert [(row.arm, row.seed, row.status) for row in rows] == [
            ("random", 0, "finished"), ("random", 1, "finished"), ("balanced, 0.1", 0, "finished"),
        ]  # fmt: skip
        one = runs[1]
        expected = {
            "accuracy_last5": 0.4, "accuracy_best": 0.5, "client_accuracy_mean": 0.5, "rounds_to_target": 2,
            "client_accuracy_worst_decile": 0.2, "load_cv": 0.5, "client_jain": 1 / 3,
            "expert_jain": 9 / 15, "fitness_given_up": 0.01, "schedule_seconds": 3, "schedule_share": 0.1,
            "wall_seconds": 60,
        }  # fmt: skip
        assert {key: float(one[key]) for key in expected} == pytest.approx(expected)
        assert one["gap"] == one["simulated_seconds_to_target"] == ""  # unknown: no number is made up
        random, balanced = summary
        assert float(random["accuracy_last5"]) == pytest.approx(0.3)
        assert float(random["accuracy_last5_sd"]) == pytest.approx(np.sqrt(0.02))  # 0.2 and 0.4, n - 1
        assert (random["finished"], random["rounds_to_target_n"]) == ("2", "1")
        assert (balanced["accuracy_last5_sd"], balanced["rounds_to_target"]) == ("", "")
        text = (tmp_path / "summary.md").read_text(encoding="utf-8")
        assert "| random | 2 | 0.300 ± 0.141 | 0.400 ± 0.141 |" in text
        assert "| balanced, 0.1 | 1 | 0.200 | 0.300 |" in text
        assert "| random | 2 | 1.0 ± 0.0 | 1.0 ± 0.0 | 2.0 (1 of 2) | 2.0 ± 1.4 |" in text
        assert "| balanced, 0.1 | 1 | 1.0 | 1.0 | never | 3.0 |" in text
        assert "simulated" not in text
        assert "mean gap" not in text

    def test_simulated_time_and_traffic_where_records_have_them(self, tmp_path):
        whole = experiment()
        write_run(tmp_path, whole.plan()[0], [0.1, 0.5, 0.6], simulated_round=30.0, bytes_up=2e6, bytes_down=5e6)
        _, [run], _ = results(tmp_path, whole)
        assert float(run["simulated_seconds_to_target"]) == 60
        assert float(run["megabytes_to_target"]) == pytest.approx(14)
        assert [float(run[key]) for key in ("simulated_seconds", "megabytes_up", "megabytes_down")] == [90, 6, 15]
        assert "simulated time to target (s)" in (tmp_path / "summary.md").read_text(encoding="utf-8")

    def test_failed_and_begun_runs_are_rows_that_count_in_no_mean(self, tmp_path):
        whole = experiment()
        done, begun, failed, never = whole.plan()
        write_run(tmp_path, done, [0.1, 0.2, 0.3])
        write_run(tmp_path, begun, [0.9])
        write_run(tmp_path, failed, [0.9])
        for plan in (failed, never):
            (tmp_path / plan.folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / plan.folder / "error.txt").write_text(
                "Traceback:\n\nValueError: no | luck\n", encoding="utf-8"
            )
        _, runs, summary = results(tmp_path, whole)
        assert [(run["arm"], run["seed"], run["status"], run["rounds"], run["error"]) for run in runs] == [
            ("random", "0", "finished", "3", ""),
            ("random", "1", "failed", "1", "ValueError: no | luck"),
            ("balanced, 0.1", "0", "begun", "1", ""),
            ("balanced, 0.1", "1", "failed", "0", "ValueError: no | luck"),
        ]
        assert float(summary[0]["accuracy_last5"]) == pytest.approx(0.2)
        assert [(row["finished"], row["failed"], row["begun"]) for row in summary] == [
            ("1", "1", "0"),
            ("0", "1", "1"),
        ]
        text = (tmp_path / "summary.md").read_text(encoding="utf-8")
        assert "| random | 1 (1 failed) |" in text
        assert "- random, seed 1, after 1 rounds: ValueError: no | luck" in text

    def test_a_longer_run_is_judged_at_the_rounds_asked_for(self, tmp_path):
        whole = experiment()
        write_run(tmp_path, whole.plan()[0], [0.1, 0.2, 0.3])
        [row] = collect(whole, tmp_path, whole.plan(changes={"rounds": 2}))
        assert (row.status, row.rounds, row.values["accuracy_best"]) == ("finished", 2, 0.2)

    def test_every_measure_has_a_value_or_says_that_it_is_unknown(self, tmp_path):
        whole = experiment()
        write_run(tmp_path, whole.plan()[0], [0.1, 0.2, 0.3])
        rows = collect(whole, tmp_path, whole.plan())
        assert list(rows[0].values) == [one.key for one in MEASURES] == list(summarise(rows)[0].values)


# Figures -------------------------------------------------------------------------------------------------------


class TestFigures:
    @pytest.fixture
    def rows(self, tmp_path):
        pytest.importorskip("matplotlib")
        whole = experiment(grid=GRID)
        for number, plan in enumerate(whole.plan(only=["iid"])):
            write_run(tmp_path, plan, [0.1, 0.2, 0.3 + 0.1 * number], simulated_round=10.0 + number)
        return whole, collect(whole, tmp_path, whole.plan())

    def test_a_set_per_grid_entry_that_has_runs(self, rows, tmp_path):
        from fedmoe_sched.experiment_figures import save_experiment_figures

        paths = save_experiment_figures(*rows, tmp_path / "figures", formats=("svg",))
        names = {"accuracy", "accuracy-time", "balance", "final", "fitness", "load", "training"}
        folder = tmp_path / "figures" / "iid"
        assert set(paths) == {folder / f"{name}.svg" for name in names}
        assert all(path.read_bytes().startswith(b"<?xml") for path in paths)

    def test_curves_over_rounds_are_means_in_a_band_and_over_time_each_seed(self, rows):
        from fedmoe_sched.experiment_figures import rounds_figure, simulated_time_figure

        arms = {"random": [row for row in rows[1] if row.arm == "random"]}  # 0.3 and 0.5 in the last round
        left, right = rounds_figure(arms, "title", target=0.4).axes
        assert left.lines[0].get_ydata() == pytest.approx([0.1, 0.2, 0.4])
        assert right.lines[0].get_ydata() == pytest.approx([0.2, 0.3, 0.5])
        band = left.collections[0].get_paths()[0].vertices
        assert band[band[:, 0] == 3][:, 1].max() == pytest.approx(0.4 + np.sqrt(0.02))
        assert left.lines[1].get_ydata() == [0.4, 0.4]
        time_axes = simulated_time_figure(arms, "title").axes[0]
        # Rounds of seed 0 take 10 s, of seed 1 12 s.
        assert time_axes.lines[0].get_xdata() * 3600 == pytest.approx([10, 20, 30])
        assert time_axes.lines[1].get_xdata() * 3600 == pytest.approx([12, 24, 36])
        assert [line.get_ydata()[-1] for line in time_axes.lines] == pytest.approx([0.3, 0.5])

    def test_ends_and_balance_show_every_seed(self, rows):
        from fedmoe_sched.experiment_figures import balance_figure, final_figure

        arms = {name: [row for row in rows[1] if row.arm == name] for name in ("random", "balanced, 0.1")}
        axes = final_figure(arms, "title").axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["random", "balanced, 0.1"]
        assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.7 / 3, 0.8 / 3])
        dots = [line.get_xdata().tolist() for line in axes.lines if line.get_marker() == "o"]
        assert dots == [pytest.approx([0.2, 0.8 / 3]), pytest.approx([0.7 / 3, 0.3])]
        cloud = balance_figure(arms, "title").axes[0]
        assert cloud.lines[0].get_xdata().tolist() == [0.5, 0.5]
        assert cloud.lines[1].get_ydata() == pytest.approx([0.7 / 3])


# Runs that are trained -----------------------------------------------------------------------------------------

TINY = """
name = "tiny"
seeds = [0]
[base]
rounds = 2
data = { train-samples = 120, test-samples = 40 }
clients = { count = 4, min-samples = 4 }
model = { experts = 3, channels = [4], expert-hidden = 0 }
[[arms]]
label = "random"
policy = "random"
[[arms]]
label = "cannot"
policy = "balanced"
set = { policy-options.load_min = 4, policy-options.balance = "none" }
"""


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run the command line in a folder with an experiment file; return its result."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, ["experiment", *map(str, arguments)])


class TestRunning:
    def test_runs_fail_go_on_and_are_skipped(self, cli, tmp_path, monkeypatch):
        pytest.importorskip("torch")
        drawn = []  # figures have tests of their own

        def draw(experiment, rows, folder):
            drawn.append((experiment.name, len(rows), folder))
            return []

        monkeypatch.setattr("fedmoe_sched.experiment_figures.save_experiment_figures", draw)
        result = cli("tiny.toml", "--output", "out", "--rounds", 1)
        assert result.exit_code == 1
        assert "error: 1 of 2 runs failed" in result.stderr
        lines = result.output.splitlines()
        assert "random / seed 0: round 1/1 accuracy" in result.output
        assert any(line.startswith("cannot / seed 0: failed after round 0/1: infeasible") for line in lines)
        runs = list(csv.DictReader((tmp_path / "out" / "runs.csv").open(encoding="utf-8")))
        assert [(run["arm"], run["status"]) for run in runs] == [("random", "finished"), ("cannot", "failed")]
        assert runs[1]["error"].startswith("infeasible")
        assert drawn == [("tiny", 2, Path("out/figures"))]

        again = cli("tiny.toml", "-o", "out", "--only", "random", "--jobs", 1)
        assert "random / seed 0: goes on after round 1/2" in again.output
        assert "round 1/2 accuracy" not in again.output
        assert "random / seed 0: round 2/2 accuracy" in again.output
        assert again.exit_code == 1  # the table still has the failed run
        skipped = cli("tiny.toml", "-o", "out", "--only", "random")
        assert "random / seed 0: is there already" in skipped.output

        (tmp_path / "tiny.toml").write_text(TINY.replace("count = 4", "count = 5"), encoding="utf-8")
        other = cli("tiny.toml", "-o", "out")
        assert other.exit_code == 2
        assert "runs/random/seed-0: clients.count = 5, but the run was started with 4" in other.stderr

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["none.toml"], "experiment file none.toml: cannot be read"),
            (["tiny.toml", "--only", "x"], "'x': must be the label"),
            (["tiny.toml", "--seeds", "0;1"], "--seeds 0;1: must read NUMBER"),
            (["tiny.toml", "--jobs", "0"], "jobs = 0: must be >= 1"),
            (["tiny.toml", "--rounds", "0"], "rounds = 0"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, cli, tmp_path, arguments, message):
        result = cli(*arguments, "--output", "out")
        assert result.exit_code == 2, result.output
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_data_that_are_missing_are_told_once_before_anything_runs(self, cli, tmp_path, monkeypatch):
        monkeypatch.delenv("FEDMOE_SCHED_DATA", raising=False)
        (tmp_path / "tiny.toml").write_text(TINY + '[[grid]]\nlabel = "c"\nset = { data.name = "cifar10" }\n')
        result = cli("tiny.toml", "--output", "out")
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: data set 'cifar10': needs the folder of its files")
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()

    def test_an_output_folder_in_use_is_one_line_before_anything_runs(self, cli, tmp_path):
        with locked_folder(tmp_path / "out", "output folder"):
            result = cli("tiny.toml", "--output", "out")
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: output folder out: is in use by another command")
        assert result.stderr.count("\n") == 1
        assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]

    # Processes of one run that is killed outright are looked at in test_federated_workers.
    @pytest.mark.parametrize("sign", ["SIGINT", pytest.param("SIGKILL", marks=pytest.mark.slow)])
    def test_when_it_ends_its_processes_end_and_it_can_go_on(self, tmp_path, monkeypatch, sign):
        pytest.importorskip("torch")
        if not hasattr(signal, sign) or os.name != "posix":
            pytest.skip("no such signal here")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        program = [sys.executable, "-c", "from fedmoe_sched.cli import main; main()"]
        arguments = ["experiment", "tiny.toml", "-o", "out", "--only", "random", "--rounds", "1000000"]
        process = subprocess.Popen(
            [*program, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        metrics = tmp_path / "out" / "runs" / "random" / "seed-0" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        [child] = psutil.Process(process.pid).children()
        [plan] = Experiment.from_toml("tiny.toml").plan(only=["random"], changes={"rounds": 1})
        with pytest.raises(InputError, match=r"output folder .*out: is in use"):
            run_all([plan], tmp_path / "out")
        process.send_signal(getattr(signal, sign))
        _, errors = process.communicate(timeout=60)
        psutil.wait_procs([child], timeout=60)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        if sign == "SIGINT":
            assert process.returncode == 130
            assert errors.decode().strip() == "error: interrupted; the same command goes on"
        rounds = metrics.read_bytes().count(b"\n")
        [plan] = Experiment.from_toml("tiny.toml").plan(only=["random"], changes={"rounds": rounds + 1})
        run_all([plan], tmp_path / "out")
        records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        assert [record["round"] for record in records] == list(range(1, rounds + 2))

    def test_progress_on_a_terminal(self, capsys):
        one, two = experiment().plan(seeds=[0])
        with _bars([one, two]) as show:
            for event in (Event(one, "skipped", 3), Event(two, "started", 1), Event(two, "round", 2, 0.5)):
                show(event)
            show(Event(two, "failed", 2, message="no [luck]"))
        text = capsys.readouterr().out
        assert "balanced, 0.1 / seed 0: failed after round 2/3: no [luck]" in text
        assert "runs" in text
        assert "2/2" in text

    def test_a_process_that_dies_is_a_failed_run(self, tmp_path, monkeypatch):
        from fedmoe_sched.federated import experiment_runs

        monkeypatch.setattr(experiment_runs, "_WORKER", "fedmoe_sched.no_such_worker")
        events = []
        run_all(experiment().plan(seeds=[0]), tmp_path, jobs=2, on_event=events.append)
        failed = [event for event in events if event.kind == "failed"]
        assert sorted(event.plan.arm for event in failed) == ["balanced, 0.1", "random"]
        assert all("No module named fedmoe_sched.no_such_worker" in event.message for event in failed)
