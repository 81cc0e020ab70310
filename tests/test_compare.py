"""Comparing backends: isolation, judging, failures as rows, CSV and plot."""

from __future__ import annotations

import csv
import subprocess
import sys
import time

import numpy as np
import pytest

from fedmoe_sched import AssignmentProblem, InputError, Limits, LoadPenalty, register_solver, solve
from fedmoe_sched import registry as registry_module
from fedmoe_sched.compare import Row, compare, judge, read_csv, write_csv
from fedmoe_sched.instances import budgets, clustered
from fedmoe_sched.problem_files import save_problem
from fedmoe_sched.solvers.greedy import Greedy

ODD_BACKENDS = '''
"""Backends that misbehave, each in its own way."""
import os, time
from fedmoe_sched.solvers.greedy import Greedy

class Sleeps(Greedy):
    name = "sleeps"
    def run(self, model, limits):
        time.sleep(600)

class Throws(Greedy):
    name = "throws"
    def run(self, model, limits):
        raise ZeroDivisionError("in the engine")

class Dies(Greedy):
    name = "dies"
    def run(self, model, limits):
        os._exit(7)

class Needs(Greedy):
    name = "needs"
    requires = ("a_package_that_is_not_there",)

class Hungry(Greedy):
    name = "hungry"
    def run(self, model, limits):
        held = bytearray(200_000_000)
        super().run(model, limits)
        del held
'''


@pytest.fixture
def odd_backends(tmp_path, monkeypatch):
    """Register the backends above for one test."""
    (tmp_path / "odd_backends.py").write_text(ODD_BACKENDS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry_module, "_BACKENDS", dict(registry_module._BACKENDS))
    for cls in ("Sleeps", "Throws", "Dies", "Needs", "Hungry"):
        register_solver(cls.lower(), f"odd_backends:{cls}")
    yield
    sys.modules.pop("odd_backends", None)


class TestCompare:
    def test_rows_agree_with_solve_and_gaps_are_judged_by_the_best_bound(self):
        problem = clustered(60, 5, seed=3)
        rows = {row.solver: row for row in compare({"p": problem}, ["flow-ortools", "greedy", "greedy-global"])}
        exact = solve(problem, "flow-ortools")
        assert rows["flow-ortools"].objective == pytest.approx(exact.objective, rel=1e-12)
        assert rows["flow-ortools"].status == "optimal"
        assert rows["flow-ortools"].gap == pytest.approx(0, abs=1e-9)
        heuristic = rows["greedy-global"]
        assert heuristic.bound == pytest.approx(exact.objective, rel=1e-9)
        assert heuristic.gap == pytest.approx(
            (exact.objective - heuristic.objective) / heuristic.objective, abs=1e-9
        )
        assert rows["greedy"].violations == len(solve(problem, "greedy").violations) > 0
        assert rows["greedy"].gap is None
        assert not rows["greedy"].usable

    def test_without_certify_a_heuristic_has_no_bound(self):
        [row] = compare(clustered(20, 4), ["greedy-global"], certify=False)
        assert (row.bound, row.gap) == (None, None)

    def test_a_heuristic_alone_is_judged_by_an_extra_solve_that_is_no_row(self):
        problem = clustered(20, 4)
        rows = compare(problem, ["greedy-global"])
        assert len(rows) == 1
        assert rows[0].bound == pytest.approx(solve(problem).objective, rel=1e-9)

    def test_a_load_penalty_reaches_the_backends(self):
        problem = clustered(40, 4).replace(load_penalty=LoadPenalty.quadratic(0.05, n_experts=4))
        rows = {row.solver: row for row in compare({"p": problem}, ["flow-ortools", "greedy"])}
        assert rows["flow-ortools"].objective == pytest.approx(solve(problem).objective, rel=1e-12)
        assert rows["greedy"].objective == pytest.approx(solve(problem, "greedy").objective, rel=1e-12)
        assert rows["greedy"].bound == pytest.approx(rows["flow-ortools"].objective, rel=1e-9)

    def test_budgets_reach_those_that_take_them_and_the_others_say_that_they_do_not(self):
        problem = budgets(30, 4, seed=1)
        rows = {row.solver: row for row in compare({"p": problem}, ["greedy", "flow-ortools", "milp-scipy"])}
        for name in ("greedy", "flow-ortools"):
            assert (rows[name].status, rows[name].objective) == ("refused", None)
            assert rows[name].message == f"{name} does not take budgets"
        assert rows["milp-scipy"].status == "optimal"
        assert rows["milp-scipy"].objective == pytest.approx(solve(problem).objective, rel=1e-9)

    def test_names_labels_and_functions_as_problems(self):
        labelled = AssignmentProblem(np.eye(3), 1, client_labels=[("a", 1), ("b", 2), ("c", 3)])
        rows = compare([labelled, lambda: clustered(10, 2)], ["greedy"])
        assert [(row.instance, row.n_clients) for row in rows] == [("problem 0", 3), ("problem 1", 10)]
        assert rows[0].objective == 3

    def test_instances_are_taken_as_backends(self):
        [row] = compare({"p": clustered(50, 5)}, [Greedy()])
        assert (row.solver, row.status) == ("Greedy()", "violated")

    def test_rows_come_one_by_one(self):
        seen = []
        rows = compare(clustered(10, 2), ["greedy", "flow-ortools"], on_row=seen.append)
        assert [row.solver for row in seen] == ["greedy", "flow-ortools"] == [row.solver for row in rows]

    def test_an_infeasible_problem_is_a_row_with_its_conflict(self):
        problem = AssignmentProblem(np.ones((2, 2)), 1, load_min=2)
        [row] = compare(problem, ["flow-ortools"])
        assert (row.status, row.objective, row.usable) == ("infeasible", None, False)
        assert "need 4 clients" in row.message

    def test_repeats_end_with_their_seconds(self):
        problem = clustered(10, 2)
        [many] = compare(problem, ["greedy"], repeat=4, repeat_seconds=600)
        [one] = compare(problem, ["greedy"], repeat=4, repeat_seconds=0)
        assert (many.repeats, one.repeats) == (4, 1)
        assert min(many.build_seconds, many.solve_seconds, many.read_seconds, many.certify_seconds) >= 0

    def test_options_out_of_range(self):
        with pytest.raises(InputError, match="repeat = 0"):
            compare(clustered(5, 2), ["greedy"], repeat=0)
        with pytest.raises(InputError, match="kill_after = 0"):
            compare(clustered(5, 2), ["greedy"], kill_after=0)
        with pytest.raises(InputError, match="solver = 'nope'"):
            compare(clustered(5, 2), ["nope"])


@pytest.mark.usefixtures("odd_backends")
class TestMisbehaviour:
    def test_failures_are_rows_and_do_not_stop_the_others(self):
        rows = compare(clustered(10, 2), ["throws", "dies", "needs", "flow-ortools"])
        assert [(row.solver, row.status) for row in rows] == [
            ("throws", "failed"),
            ("dies", "failed"),
            ("needs", "unavailable"),
            ("flow-ortools", "optimal"),
        ]
        assert rows[0].message == "ZeroDivisionError: in the engine"
        assert rows[1].message == "the process died: ended with exit status 7"
        assert "a_package_that_is_not_there" in rows[2].message

    def test_a_process_over_its_time_is_killed(self):
        start = time.monotonic()
        [row] = compare(clustered(10, 2), ["sleeps"], kill_after=2)
        assert (row.status, row.message) == ("killed", "killed after 2 s")
        # Far below the ten minutes for which the backend would sleep.
        assert time.monotonic() - start < 300

    def test_the_time_limit_implies_a_kill(self, monkeypatch):
        import fedmoe_sched.compare as module

        waits = []

        def run_worker(request, kill_after, starting):
            waits.append((kill_after, starting))
            return -9, ""

        monkeypatch.setattr(module, "_run_worker", run_worker)
        [row] = compare(clustered(5, 2), ["greedy"], limits=Limits(time=10), repeat=3)
        assert waits == [(80, 120)]
        assert row.message == "the process died: killed by signal 9"

    def test_a_process_that_is_not_ready_yet_has_more_time(self, monkeypatch, tmp_path):
        from fedmoe_sched import _compare_worker
        from fedmoe_sched.compare import _run_worker

        save_problem(clustered(6, 3), tmp_path / "problem.npz")
        files = str(tmp_path / "problem.npz"), str(tmp_path / "result.json")
        request = _compare_worker.Request(*files, "greedy", None, Limits(), 1)
        code, _ = _run_worker(request, 0.01, 120.0)  # no process starts in a hundredth of a second
        assert (code, request.ready.exists()) == (0, True)
        with pytest.raises(subprocess.TimeoutExpired):
            _run_worker(request, 0.01, 120.0)

    def test_memory_is_that_of_each_process_alone(self):
        ballast = np.ones(40_000_000)  # 320 MB here must not show up there
        rows = {row.solver: row for row in compare(clustered(10, 2), ["hungry", "greedy"])}
        del ballast
        if rows["greedy"].peak_bytes is None:
            pytest.skip("no memory figures on this system")
        more = rows["hungry"].peak_bytes - rows["greedy"].peak_bytes
        assert rows["greedy"].peak_bytes < 200_000_000
        assert 150_000_000 < more < 250_000_000


def a_row(**changes):
    values = {
        "instance": "p",
        "n_clients": 10,
        "n_experts": 2,
        "solver": "greedy",
        "exact": False,
        "status": "feasible",
        "objective": 1.5,
        "gap": 0.01,
        "build_seconds": 0.25,
        "solve_seconds": 0.5,
    }
    return Row(**(values | changes))


class TestOutput:
    def test_csv_holds_every_field(self, tmp_path):
        rows = [a_row(), a_row(solver="x", status="killed", objective=None, gap=None, message="a, b")]
        write_csv(rows, tmp_path / "rows.csv")
        with (tmp_path / "rows.csv").open(newline="", encoding="utf-8") as file:
            first, second = csv.DictReader(file)
        assert float(first["objective"]) == 1.5
        assert (second["objective"], second["message"]) == ("", "a, b")
        assert set(first) == set(rows[0].to_dict())

    def test_csv_is_read_back_to_the_same_rows(self, tmp_path):
        rows = [a_row(exact=True, peak_bytes=10, gap=0.1 + 0.2), a_row(objective=None, message='a, "b"\nc')]
        write_csv(rows, tmp_path / "rows.csv")
        assert read_csv(tmp_path / "rows.csv") == rows

    def test_a_table_from_before_there_were_jain_indices_can_be_read(self, tmp_path):
        rows = [a_row(client_jain=0.5, expert_jain=0.25)]
        write_csv(rows, tmp_path / "rows.csv")
        lines = (tmp_path / "rows.csv").read_text(encoding="utf-8").splitlines()
        older = "\n".join(line.rsplit(",", 2)[0] for line in lines)
        (tmp_path / "rows.csv").write_text(older, encoding="utf-8")
        assert read_csv(tmp_path / "rows.csv") == [a_row()]

    def test_a_table_of_something_else_is_named(self, tmp_path):
        (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
        with pytest.raises(InputError, match=r"other\.csv: the columns must be instance,"):
            read_csv(tmp_path / "other.csv")
        write_csv([a_row()], tmp_path / "rows.csv")
        text = (tmp_path / "rows.csv").read_text(encoding="utf-8")
        (tmp_path / "rows.csv").write_text(text.replace("False", "no"), encoding="utf-8")
        with pytest.raises(InputError, match=r"rows\.csv, line 2: cannot be read"):
            read_csv(tmp_path / "rows.csv")

    def test_rows_are_judged_by_the_best_bound_of_their_own_instance(self):
        rows = [
            a_row(objective=8.0, certified_bound=12.0),
            a_row(objective=10.0, certified_bound=10.0),
            a_row(objective=9.0, violations=1),
            a_row(instance="q", objective=9.0, bound=9.9, gap=0.1),
        ]
        judged = judge(rows)
        assert [(row.bound, row.gap) for row in judged] == [(10.0, 0.25), (10.0, 0.0), (10.0, None), (9.9, 0.1)]

    def test_seconds_add_up(self):
        assert a_row().seconds == 0.75
        assert a_row(solve_seconds=None).seconds is None

    def test_plot_shows_every_solver_and_is_reproducible(self, tmp_path):
        pytest.importorskip("matplotlib")
        from fedmoe_sched.compare_plot import plot_rows

        rows = [
            a_row(),
            a_row(solver="exact", gap=0.0),
            a_row(solver="breaks", gap=None, violations=2),
            a_row(solver="tardy", status="killed", objective=None, build_seconds=None),
            a_row(solver="unfit", status="refused", objective=None, build_seconds=None),
        ]
        for name in ("one.svg", "two.svg"):
            plot_rows(rows, tmp_path / name)
        text = (tmp_path / "one.svg").read_text(encoding="utf-8")
        assert text == (tmp_path / "two.svg").read_text(encoding="utf-8")
        for word in ("greedy", "exact", "breaks", "no answer: tardy", "does not take it: unfit"):
            assert word in text
        for word in ("tardy", "unfit"):  # in the panel only: the legend lists what is drawn
            assert text.count(word) == 1

    def test_nothing_to_draw_is_an_error(self, tmp_path):
        pytest.importorskip("matplotlib")
        from fedmoe_sched.compare_plot import plot_rows

        with pytest.raises(InputError, match="none has an answer to draw"):
            plot_rows([a_row(objective=None)], tmp_path / "p.svg")
