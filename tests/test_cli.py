"""The command line: answers, files, exit codes and messages of solvers, solve and compare."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from fedmoe_sched import __version__, schedule, solve, solvers
from fedmoe_sched.cli import app
from fedmoe_sched.instances import clustered, save_problem

TABLE = """client,vision,speech,text,capacity
ann,0.9,0.1,,1
bob,0.8,0.3,0.2,2
cat,0.7,0.6,0.1,1
dan,0.6,0.1,0.3,1
"""


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run the command line in an empty folder; return its result."""
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def table(tmp_path):
    (tmp_path / "scores.csv").write_text(TABLE, encoding="utf-8")
    return "scores.csv"


@pytest.fixture
def problem(tmp_path):
    problem = clustered(100, 8)
    save_problem(problem, tmp_path / "problem.npz")
    return problem


class TestGroup:
    def test_version(self, cli):
        assert cli("--version").output == f"fedmoe-sched {__version__}\n"

    @pytest.mark.parametrize("command", [[], ["solvers"], ["solve"], ["compare"]])
    def test_every_help_page_reads(self, cli, command):
        result = cli(*command, "--help")
        assert result.exit_code == 0
        assert "Usage" in result.output

    def test_solvers_lists_every_backend(self, cli):
        result = cli("solvers")
        assert result.exit_code == 0
        lines = {line.split()[0]: line for line in result.output.splitlines()[1:]}
        assert list(lines) == [entry.name for entry in solvers()]
        assert " yes " in lines["flow-ortools"]
        assert lines["greedy"].split()[1] == "no"

    def test_unknown_command_and_option(self, cli):
        for arguments, words in (
            (["frobnicate"], "No such command 'frobnicate' (see fedmoe-sched --help)"),
            (["solve", "x.npz", "--bogus"], "No such option"),
            (["solve"], "Missing argument 'FILE'"),
            (["solve", "x.npz", "--capacity", "x"], "Invalid value for '--capacity'"),
        ):
            result = cli(*arguments)
            assert result.exit_code == 2
            assert result.stderr.startswith("error: ")
            assert words in result.stderr.replace("root", "fedmoe-sched")
            assert result.stderr.count("\n") == 1


class TestSolve:
    def test_a_table_gives_named_experts(self, cli, table):
        result = cli("solve", table)
        assert result.exit_code == 0
        assert "optimal" in result.output
        assert "recomputed from the prices" in result.output
        rows = dict(line.split(maxsplit=1) for line in result.output.split("experts", 2)[2].strip().splitlines())
        assert {name: experts.strip() for name, experts in rows.items()} == {
            "ann": "vision",
            "bob": "vision, text",
            "cat": "speech",
            "dan": "vision",
        }

    def test_json_is_what_schedule_returns(self, cli, table):
        answer = json.loads(cli("solve", table, "--json", "--balance", 0.1).output)
        scores = [[0.9, 0.1, 0.0], [0.8, 0.3, 0.2], [0.7, 0.6, 0.1], [0.6, 0.1, 0.3]]
        eligible = np.ones((4, 3), dtype=bool)
        eligible[0, 2] = False
        same = schedule(scores, [0, 0, 0], [1, 2, 1, 1], usage_weight=0.0, eligible=eligible, balance=0.1)
        assert answer["objective"] == pytest.approx(same.objective)
        assert list(answer["loads"].values()) == same.loads.tolist()
        names = ["vision", "speech", "text"]
        assert answer["assignment"]["bob"] == [names[expert] for expert in same.experts_of(1)]

    @pytest.mark.parametrize("suffix", ["json", "csv"])
    def test_the_answer_of_last_round_is_kept_unless_a_change_pays(self, cli, table, tmp_path, suffix):
        first = json.loads(cli("solve", table, "--output", f"answer.{suffix}", "--json").output)["assignment"]
        turned = TABLE.replace("0.7,0.6,0.1", "0.7,0.6,0.65")
        (tmp_path / "next.csv").write_text(turned + "eve,0.1,0.2,0.3,1\n", encoding="utf-8")
        arguments = ["solve", "next.csv", "--no-balance", "--held", f"answer.{suffix}", "--json"]
        plans = {}
        for cost in (0, 0.05, 0.5):
            answer = json.loads(cli(*arguments, "--switching-cost", cost).output)
            plans[cost] = answer["assignment"]["cat"], answer["objective"]
        assert first["cat"] == ["speech"]
        # ann and dan hold vision, bob vision and text, of which speech would be the better one; eve holds nothing.
        assert plans[0] == (["vision"], pytest.approx(0.9 + (0.8 + 0.3) + 0.7 + 0.6 + 0.3))
        assert plans[0.05] == (["vision"], pytest.approx(0.9 + (0.8 + 0.25) + 0.65 + 0.6 + 0.25))
        assert plans[0.5] == (["speech"], pytest.approx(0.9 + (0.8 + 0.2) + 0.6 + 0.6 - 0.2))

    def test_what_is_held_may_stand_in_the_scores_or_be_numbers(self, cli, tmp_path):
        rng = np.random.default_rng(0)
        fitness, held = rng.random((12, 3)), rng.random((12, 3)) < 0.4
        np.savez(
            tmp_path / "f.npz", fitness=fitness, usage=[1, 1, 1], capacity=1, held=held, switching_cost=[1, 2, 3]
        )
        same = schedule(fitness, [1, 1, 1], 1, held=held, switching_cost=[1, 2, 3])
        assert json.loads(cli("solve", "f.npz", "--json").output)["objective"] == pytest.approx(same.objective)
        cli("solve", "f.npz", "--output", "answer.json")
        again = json.loads(cli("solve", "f.npz", "--held", "answer.json", "--json").output)
        then = schedule(fitness, [1, 1, 1], 1, held=same, switching_cost=[1, 2, 3])
        assert again["objective"] == pytest.approx(then.objective)

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("{}", "held.json: is no answer of 'fedmoe-sched solve --output' with an assignment"),
            ('{"assignment": null}', "held.json: is no answer"),
            ('{"assignment": {"ann": ["smell"]}}', "held['ann']: expert 'smell' is not among the 3 of this round"),
        ],
    )
    def test_a_file_that_holds_no_answer_is_named(self, cli, table, tmp_path, text, words):
        (tmp_path / "held.json").write_text(text, encoding="utf-8")
        result = cli("solve", table, "--held", "held.json", "--switching-cost", 1)
        assert result.exit_code == 2
        assert words in result.stderr

    def test_names_for_scores_without_names_are_refused(self, cli, tmp_path):
        np.save(tmp_path / "scores.npy", np.ones((3, 2)))
        (tmp_path / "held.csv").write_text("client,expert\nann,0\n", encoding="utf-8")
        result = cli("solve", "scores.npy", "--capacity", 1, "--held", "held.csv")
        assert "held.csv: 'ann': must be a number, since the scores have no names" in result.stderr

    def test_a_problem_keeps_its_own_bounds(self, cli, problem):
        answer = json.loads(cli("solve", "problem.npz", "--json").output)
        assert answer["objective"] == pytest.approx(solve(problem).objective)

    def test_scores_with_usage(self, cli, tmp_path):
        fitness = np.random.default_rng(0).random((30, 4))
        usage = [4.0, 0.0, 0.0, 0.0]
        np.savez(tmp_path / "f.npz", fitness=fitness, usage=usage, capacity=2, expert_labels=list("abcd"))
        arguments = ["solve", "f.npz", "--json", "--usage-weight", 0.5, "--no-balance", "--fitness-weight", 2]
        answer = json.loads(cli(*arguments).output)
        same = schedule(fitness, usage, 2, usage_weight=0.5, fitness_weight=2.0, balance=None)
        assert answer["objective"] == pytest.approx(same.objective)
        assert answer["loads"] == dict(zip("abcd", same.loads.tolist(), strict=True))

    @pytest.mark.parametrize("dtype", [np.float16, np.float32])
    def test_a_matrix_is_solved_where_it_lies(self, cli, tmp_path, dtype):
        scores = np.random.default_rng(0).random((30, 4)).astype(dtype)
        np.save(tmp_path / "scores.npy", scores)
        answer = json.loads(cli("solve", "scores.npy", "--capacity", 2, "--balance", 0.1, "--json").output)
        same = schedule(scores.astype(np.float64), [0] * 4, 2, usage_weight=0, balance=0.1)
        assert answer["status"] == "optimal"
        assert answer["objective"] == pytest.approx(same.objective, rel=1e-12)

    def test_capacity_replaces_the_column(self, cli, table):
        answer = json.loads(cli("solve", table, "--json", "--capacity", 2, "--no-balance").output)
        assert sum(answer["loads"].values()) == 8

    def test_no_fill_leaves_out_what_is_not_worth_it(self, cli, tmp_path):
        (tmp_path / "s.csv").write_text("client,a,b\nx,1,-1\n", encoding="utf-8")
        for option, count in (("--fill", 2), ("--no-fill", 1)):
            answer = json.loads(cli("solve", "s.csv", "--capacity", 2, "--no-balance", "--json", option).output)
            assert sum(answer["loads"].values()) == count

    def test_output_files(self, cli, table, tmp_path):
        assert cli("solve", table, "-o", "a.csv").exit_code == 0
        with (tmp_path / "a.csv").open(encoding="utf-8") as file:
            pairs = list(csv.reader(file))
        assert pairs[:3] == [["client", "expert"], ["ann", "vision"], ["bob", "vision"]]
        assert cli("solve", table, "-o", "a.json").exit_code == 0
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))["status"] == "optimal"

    def test_infeasible_names_the_conflict_and_exits_1(self, cli, table):
        result = cli("solve", table, "--load-min", 3)
        assert result.exit_code == 1
        assert "experts {speech, text} need 6 clients" in result.output
        answer = json.loads(cli("solve", table, "--load-min", 3, "--json").output)
        assert answer["conflict_bounds"] == ["load_min[1]", "load_min[2]"]

    def test_soft_widens_what_excludes_one_another(self, cli, table, tmp_path):
        result = cli("solve", table, "--load-min", 3, "--soft", "--json")
        assert result.exit_code == 0
        relaxed = json.loads(result.output)["relaxed"]
        assert relaxed
        assert all("one more place is worth" in line for line in relaxed)
        assert "4 places: load_min[" in cli("solve", table, "--load-min", 3, "--soft").output
        tight = clustered(20, 4).replace(min_experts=1, load_min=0, load_max=1)
        save_problem(tight, tmp_path / "tight.npz")
        assert cli("solve", "tight.npz").exit_code == 1
        result = cli("solve", "tight.npz", "--soft")
        assert result.exit_code == 0
        assert "widened" in result.output

    def test_a_broken_bound_exits_1(self, cli, problem):
        result = cli("solve", "problem.npz", "--solver", "greedy")
        assert result.exit_code == 1
        assert "violated" in result.output
        assert f"exceeds load_max[0] = {problem.load_max[0]}" in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["none.npz"], "none.npz: No such file or directory"),
            (["scores.txt"], "scores.txt: must be an .npz, .npy or .csv file"),
            (["cut.npz"], "cut.npz: not a complete .npz file"),
            (["scores.csv", "--solver", "nope"], "solver = 'nope': must be 'auto'"),
            (["scores.csv", "--time-limit", "-1"], "time = -1.0: must be"),
            (["scores.csv", "--balance", "-0.5"], "--balance -0.5: must be >= 0"),
            (["scores.csv", "--balance", "1", "--no-balance"], "--no-balance and --balance exclude one another"),
            (["scores.csv", "-o", "answer.txt"], "--output answer.txt: must end in .json or .csv"),
            (["scores.csv", "-o", "no/answer.csv"], "--output no/answer.csv: there is no folder no"),
            (["bare.csv"], "bare.csv: has no capacities; give one for all clients with --capacity"),
            (["bare.npy"], "bare.npy: has no capacities; give one for all clients with --capacity"),
            (["cut.npy", "--capacity", "1"], "cut.npy: not a complete .npy file"),
            (["flat.npy", "--capacity", "1"], "fitness: has shape (3,), must be two-dimensional"),
            (["twice.csv"], "client_labels[1] = 'x': already the label at position 0"),
            (["problem.npz", "--balance", "0.1"], "--balance: problem.npz is a ready problem"),
            (["problem.npz", "--no-balance"], "--no-balance: problem.npz is a ready problem"),
            (["problem.npz", "--load-min", "1"], "--load-min: problem.npz is a ready problem"),
            (["odd.npz"], "odd.npz: array 'extra' is not known"),
            (["shape.npz"], "fitness: has shape (3,), must be two-dimensional"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, cli, table, problem, tmp_path, arguments, message):
        whole = (tmp_path / "problem.npz").read_bytes()
        (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "bare.csv").write_text("client,a\nx,1\n", encoding="utf-8")
        np.save(tmp_path / "bare.npy", np.eye(20))
        np.save(tmp_path / "flat.npy", np.ones(3))
        (tmp_path / "cut.npy").write_bytes((tmp_path / "bare.npy").read_bytes()[:200])
        (tmp_path / "twice.csv").write_text("client,a,capacity\nx,1,1\nx,2,1\n", encoding="utf-8")
        np.savez(tmp_path / "odd.npz", fitness=np.eye(2), usage=[0, 0], capacity=1, extra=1)
        np.savez(tmp_path / "shape.npz", fitness=[1.0, 2.0, 3.0], usage=[0], capacity=1, client_labels=["a"])
        result = cli("solve", *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {message}")
        assert result.stderr.count("\n") == 1
        assert result.stdout == ""

    def test_plot_draws_the_prices(self, cli, problem, tmp_path):
        pytest.importorskip("matplotlib")
        result = cli("solve", "problem.npz", "--plot", "prices.svg")
        assert result.exit_code == 0
        assert result.output.splitlines()[-1] == "written to prices.svg"
        assert "price (desirability)" in (tmp_path / "prices.svg").read_text(encoding="utf-8")

    def test_plot_of_another_kind_is_refused(self, cli, problem):
        assert cli("solve", "problem.npz", "--plot", "prices.txt").exit_code == 2


class TestCompare:
    def test_table_csv_and_plot(self, cli, tmp_path):
        pytest.importorskip("matplotlib")
        result = cli(
            *("compare", "--family", "tied", "--family", "uniform", "--size", "30x4", "--seed", 5),
            *("--solver", "flow-ortools", "--solver", "greedy", "--csv", "rows.csv", "--plot", "plot.svg"),
        )
        assert result.exit_code == 0, result.output
        assert "tied 30 x 4" in result.output
        with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [(row["instance"], row["solver"]) for row in rows] == [
            ("tied 30 x 4", "flow-ortools"),
            ("tied 30 x 4", "greedy"),
            ("uniform 30 x 4", "flow-ortools"),
            ("uniform 30 x 4", "greedy"),
        ]
        assert "uniform 30 x 4" in (tmp_path / "plot.svg").read_text(encoding="utf-8")

    def test_files_and_json(self, cli, table, problem):
        result = cli("compare", table, "problem.npz", "--solver", "flow-ortools", "--json")
        rows = json.loads(result.output)
        assert [row["instance"] for row in rows] == ["scores.csv", "problem.npz"]
        assert rows[1]["objective"] == pytest.approx(solve(problem).objective)

    def test_no_feasible_answer_exits_1(self, cli, problem):
        result = cli("compare", "problem.npz", "--solver", "greedy")
        assert result.exit_code == 1
        assert result.stderr == "error: no feasible assignment for problem.npz\n"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--size", "100"], "--size 100: must read CLIENTSxEXPERTS, as in 1000x16"),
            (["--size", "0x4"], "--size 0x4: must read"),
            (["--family", "zipf"], "family = 'zipf': must be one of"),
            (["--solver", "nope"], "solver = 'nope'"),
            (["--plot", "plot.txt"], "--plot plot.txt: must end in .svg or .png or .pdf"),
            (["--csv", "no/rows.csv"], "--csv no/rows.csv: there is no folder no"),
            (["bad.csv"], "bad.csv: line 2, column 'a': 'x' is not a finite number"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, cli, tmp_path, arguments, message):
        (tmp_path / "bad.csv").write_text("client,a\nc,x\n", encoding="utf-8")
        result = cli("compare", *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {message}")
        assert result.stderr.count("\n") == 1


class TestProcess:
    """The real program, in a process of its own."""

    def run(self, *arguments, **options):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        program = [sys.executable, "-c", "from fedmoe_sched.cli import main; main()", *arguments]
        return subprocess.run(
            program, capture_output=True, text=True, env=environment, timeout=120, check=False, **options
        )

    def test_errors_go_to_standard_error_without_a_traceback(self, tmp_path):
        result = self.run("solve", "none.csv", cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == "error: none.csv: No such file or directory\n"

    def test_output_of_a_pipe_is_plain(self, tmp_path):
        (tmp_path / "scores.csv").write_text(TABLE, encoding="utf-8")
        result = self.run("solve", "scores.csv", cwd=tmp_path)
        assert result.returncode == 0
        assert "\x1b" not in result.stdout
        assert "objective    3.1" in result.stdout

    def test_starting_it_loads_no_engine(self):
        code = (
            "import sys, fedmoe_sched.cli; "
            "heavy = {'torch', 'ortools', 'pulp', 'networkx', 'matplotlib', 'scipy', 'pydantic', 'sklearn'}; "
            "print(sorted(heavy & set(sys.modules)))"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120, check=True
        )
        assert result.stdout == "[]\n"
