"""The study's own code: families, resuming, what is skipped, profiles, tables and figures."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from benchmarks.study import runner
from benchmarks.study.families import FITNESS_FILE, SINGLE, instance, single, trained
from benchmarks.study.plan import FULL, QUICK, Case, Plan, case_of
from benchmarks.study.profile import profile, share_within, solved_seconds
from benchmarks.study.runner import NOT_RUN, RowLog, run_plan, why_not_run
from benchmarks.study.tables import markdown_table, seconds_text, write_tables
from fedmoe_sched import InputError, Status, registry, solve
from fedmoe_sched.compare import Row, judge


def a_row(case, solver="exact", **changes):
    values = {
        "instance": case.name,
        "n_clients": case.n_clients,
        "n_experts": case.n_experts,
        "solver": solver,
        "exact": True,
        "status": "optimal",
        "objective": 1.0,
        "certified_bound": 1.0,
        "build_seconds": 0.25,
        "solve_seconds": 0.75,
        "read_seconds": 0.1,
        "certify_seconds": 0.1,
        "repeats": 1,
        "peak_bytes": 2**26,
    }
    return Row(**(values | changes))


class TestFamilies:
    def test_trained_is_seeded_and_has_the_bounds_of_the_other_families(self):
        one, same, other = trained(300, 8, seed=1), trained(300, 8, seed=1), trained(300, 8, seed=2)
        np.testing.assert_array_equal(one.desirability, same.desirability)
        assert not np.array_equal(one.desirability, other.desirability)
        total = int(one.capacity.sum())
        assert set(one.load_min) == {total // 16}
        assert set(one.load_max) == {-(-11 * total // 80)}
        assert solve(one, "flow-ortools").status is Status.OPTIMAL

    def test_trained_rows_scatter_about_real_clients(self):
        with np.load(FITNESS_FILE) as file:
            correct, client = file["correct"], file["client"]
        fitness = np.stack([correct[client == i].mean(axis=0) for i in np.unique(client)])
        problem = trained(20_000, 64)
        # All columns, in another order: compare what does not depend on it.
        np.testing.assert_allclose(
            np.sort(problem.desirability.mean(axis=0)), np.sort(fitness.mean(axis=0)), atol=0.01
        )
        assert len(np.unique(problem.desirability[:, 0])) > 19_000
        assert problem.desirability.min() >= 0
        assert problem.desirability.max() <= 1

    def test_the_noise_is_that_of_a_mean_over_so_few_samples(self):
        # Flat Dirichlet weights over k values: variance of the mean is their variance over k + 1 (Rubin 1981).
        from benchmarks.study.families import _weights

        values = np.array([0.0, 0.0, 1.0, 1.0, 1.0])
        means = _weights(40_000, 5, np.random.default_rng(0)) @ values
        assert means.mean() == pytest.approx(0.6, abs=0.01)
        assert means.var() == pytest.approx(values.var() / 6, rel=0.05)

    def test_the_matrix_of_the_run_is_contended_and_varied(self):
        problem = trained(5000, 64)
        best = np.bincount(problem.desirability.argmax(axis=1), minlength=64)
        assert best.max() > 3 * best.mean()
        assert problem.desirability.std(axis=0).min() > 0.05

    @pytest.mark.parametrize("shape", [(0, 8), (5, 0), (5, 65)])
    def test_trained_out_of_range(self, shape):
        with pytest.raises(InputError, match="experts 1 to 64"):
            trained(*shape)

    def test_single_gives_each_client_one_expert(self):
        problem = instance("clustered" + SINGLE, 50, 4)
        np.testing.assert_array_equal(problem.desirability, instance("clustered", 50, 4).desirability)
        assert set(problem.capacity) == set(problem.min_experts) == {1}
        assert (set(problem.load_min), set(problem.load_max)) == ({0}, {14})
        assert single(problem).shape == (50, 4)

    def test_large_instances_are_in_single_precision(self, monkeypatch):
        import benchmarks.study.families as module

        monkeypatch.setattr(module, "FLOAT32_PAIRS", 100)
        assert instance("tied", 50, 2).desirability.dtype == np.float32
        assert instance("tied", 49, 2).desirability.dtype == np.float64


class TestPlan:
    def test_the_full_study_has_the_documented_instances(self):
        names = [case.name for case in FULL.cases()]
        assert names[:4] == ["uniform 100x8", "clustered 100x8", "tied 100x8", "trained 100x8"]
        assert "trained 1000000x64" in names
        assert names[-1] == "clustered-single 100000x64"
        assert [FULL.limit(Case("tied", n, 64)) for n in (20_000, 100_000, 1_000_000)] == [30, 60, 240]

    def test_rivals_are_measured_one_after_another(self):
        order = FULL.solvers(Case("tied", 10, 2))
        assert order[-4:] == ("flow-pruned", "exact", "flow-ortools", "flow-pylmcf")
        assert len(set(order)) == len(order)
        assert {entry.name for entry in registry.solvers()} <= set(order)

    def test_names_are_read_back(self):
        for case in QUICK.cases():
            assert case_of(case.name) == case


SMALL, MIDDLE, LARGE = Case("tied", 100, 10), Case("tied", 1000, 10), Case("tied", 10_000, 10)


def limit_of(case):
    return 10.0


class TestSkipping:
    def test_nothing_is_known_at_first(self):
        assert why_not_run(SMALL, [], limit_of) is None

    @pytest.mark.parametrize(
        "changes",
        [
            {"status": "killed", "build_seconds": None, "solve_seconds": None},
            {"status": "feasible", "stop_reason": "time limit"},
            {"solve_seconds": 11.0},
        ],
    )
    def test_what_timed_out_is_not_run_again(self, changes):
        assert why_not_run(LARGE, [a_row(MIDDLE, **changes)], limit_of) == "timed out at 1000x10"

    def test_the_reason_is_passed_on(self):
        rows = [a_row(SMALL, status="killed"), a_row(MIDDLE, status=NOT_RUN, message="timed out at 100x10")]
        assert why_not_run(LARGE, rows, limit_of) == "timed out at 100x10"
        assert why_not_run(LARGE, [a_row(SMALL, status="failed")], limit_of) == "failed at 100x10"

    def test_growth_is_measured_over_the_last_two_sizes(self):
        # 0.2 s and then 1 s for ten times the pairs: 5 s expected, within 1.5 times the limit of 10 s.
        slow = [a_row(SMALL, solve_seconds=0.2, build_seconds=0.0), a_row(MIDDLE)]
        assert why_not_run(LARGE, slow, limit_of) is None  # at least linear: 10 s
        # 0.05 s and then 1 s: exponent 1.3, 20 s expected.
        steep = [a_row(SMALL, solve_seconds=0.05, build_seconds=0.0), a_row(MIDDLE)]
        assert why_not_run(LARGE, steep, limit_of) == "1 s at 1000x10: some 20 s expected, limit 10 s"


TINY = Plan(sizes=((30, 3),), families=("uniform", "tied"), seconds=60.0, repeats=1)


@pytest.fixture
def two_solvers(monkeypatch):
    monkeypatch.setattr(Plan, "solvers", lambda self, case: ("greedy", "flow-ortools"))
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))


@pytest.mark.usefixtures("two_solvers")
class TestResuming:
    def test_rows_are_kept_and_not_made_again(self, tmp_path, monkeypatch):
        seen = []
        run_plan(TINY, RowLog(tmp_path / "rows.csv"), on_row=seen.append)
        assert [(row.instance, row.solver) for row in seen] == [
            (f"{family} 30x3", solver) for family in ("uniform", "tied") for solver in ("greedy", "flow-ortools")
        ]
        assert all(row.objective is not None for row in seen)
        assert RowLog(tmp_path / "rows.csv").rows == seen
        monkeypatch.setattr(runner, "compare", None)  # calling it would fail
        run_plan(TINY, RowLog(tmp_path / "rows.csv"), on_row=seen.append)
        assert len(seen) == 4

    def test_a_line_cut_off_by_a_kill_is_made_again(self, tmp_path):
        path = tmp_path / "rows.csv"
        run_plan(TINY, RowLog(path))
        whole = path.read_bytes()
        path.write_bytes(whole[:-20])
        assert len(RowLog(path).rows) == 3
        seen = []
        run_plan(TINY, RowLog(path), on_row=seen.append)
        assert [(row.instance, row.solver) for row in seen] == [("tied 30x3", "flow-ortools")]

    def test_what_is_hopeless_is_a_row(self, tmp_path):
        log = RowLog(tmp_path / "rows.csv")
        log.append(a_row(Case("tied", 10, 3), "flow-ortools", status="killed", objective=None))
        run_plan(TINY, log)
        row = log.find(Case("tied", 30, 3), "flow-ortools")
        assert (row.status, row.message, row.exact) == (NOT_RUN, "timed out at 10x3", True)

    def test_messages_of_several_lines_stay_on_one(self, tmp_path):
        log = RowLog(tmp_path / "rows.csv")
        log.append(a_row(SMALL, message="one\ntwo"))
        assert RowLog(tmp_path / "rows.csv").rows[0].message == "one two"


class TestProfile:
    def test_a_hand_worked_case(self):
        # p: a 1 s, b 4 s, c 2 s; q: a 6 s, b 2 s, c unsolved. Ratios: a 1 and 3, b 4 and 1, c 2 and infinite.
        times = {"a": {"p": 1.0, "q": 6.0}, "b": {"p": 4.0, "q": 2.0}, "c": {"p": 2.0}, "d": {}}
        ratios = profile(times)
        assert ratios == {"a": [1, 3], "b": [1, 4], "c": [2, math.inf], "d": [math.inf, math.inf]}
        assert [share_within(ratios["a"], tau) for tau in (1, 2.9, 3)] == [0.5, 0.5, 1.0]
        assert share_within(ratios["c"], 1e9) == 0.5
        assert share_within([], 2.0) == 0.0

    def test_only_proved_optima_of_exact_solvers_count(self):
        rows = [
            a_row(SMALL),
            a_row(SMALL, "late", status="feasible"),
            a_row(SMALL, "heuristic", exact=False),
        ]
        assert solved_seconds(rows) == {"exact": {"tied 100x10": 1.0}, "late": {}}


def some_rows():
    rows = []
    for family in ("clustered", "tied", "trained"):
        for n in (100, 1000):
            case = Case(family, n, 8)
            rows += [
                a_row(case, "greedy", exact=False, status="violated", violations=3, certified_bound=None),
                a_row(case, "greedy-global", exact=False, status="feasible", objective=0.99, certified_bound=None),
                a_row(case, "flow-pruned", solve_seconds=1.75),
                a_row(case),
                a_row(case, "flow-ortools", solve_seconds=3.75),
                a_row(case, "ilp-pulp", status="killed", message="killed after 60 s", build_seconds=None),
            ]
    rows.append(a_row(Case("clustered-single", 100, 8)))
    return judge(rows)


DESCRIPTION = {
    "date": "2026-01-02",
    "machine": {"processor": "CPU", "cores": 2, "memory_gib": 24.0, "system": "Linux", "python": "3.11"},
    "versions": {"numpy": "2.0", "POT": None},
    "settings": dataclasses.asdict(QUICK) | {"seed": 0, "solver_with_threads": "exact"},
    "seconds": 120.0,
}


class TestOutput:
    def test_tables_hold_what_was_measured(self, tmp_path):
        text = {path.stem: path.read_text("utf-8") for path in write_tables(some_rows(), DESCRIPTION, tmp_path)}
        assert "| `exact` | 1 s | 1 s |" in text["times"]
        assert "| `ilp-pulp` | > 60 s | > 60 s |" in text["times"]
        assert "| clustered, 100 x 8 | 1 s | `flow-ortools` | 4 | 2 |" in text["ratios"]
        assert "| clustered, `greedy-global` | 1 % | 1 % |" in text["heuristics"]
        assert "| tied, `greedy` | breaks 3 | breaks 3 |" in text["heuristics"]
        assert "0.1 s | 0.1 s | 64 MiB | 0e+00 | 1 |" in text["details"]
        assert "**clustered**" in text["single"]
        assert "numpy 2.0" in text["machine"]
        assert "POT" not in text["machine"]

    def test_figures_are_the_same_from_the_same_rows(self, tmp_path):
        pytest.importorskip("matplotlib")
        from benchmarks.study.plots import write_plots

        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            paths = write_plots(some_rows(), tmp_path / name)
        assert [path.name for path in paths] == ["times.svg", "profile.svg", "gap.svg"]
        for path in paths:
            assert path.read_bytes() == (tmp_path / "one" / path.name).read_bytes()
        assert "flow-pruned" in paths[0].read_text("utf-8")
        assert "greedy" not in paths[1].read_text("utf-8")

    def test_numbers_in_words(self):
        assert seconds_text(0.0996) == "0.1 s"
        assert markdown_table(["a"], [["x"]]) == "| a |\n|---|\n| x |\n"


def test_a_penalty_on_usage_oscillates_and_bounds_do_not():
    from benchmarks.study.oscillation import Rule, simulate

    problem = instance("clustered", 400, 8)
    bound = problem.load_max[0] / (problem.slots.sum() / 8)
    penalty = simulate(problem, Rule("", "greedy", 1.0, bounded=False), 8)
    exact = simulate(problem, Rule("", "flow-ortools", 0.1, bounded=True), 8)
    assert max(each.largest for each in exact) <= bound < max(each.largest for each in penalty)
    assert all(0 < each.given_up < 1 for each in exact)
    free = simulate(problem, Rule("", "greedy", 0.0, bounded=False), 2)
    assert [each.given_up for each in free] == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.train
def test_the_fitness_run_writes_what_the_family_reads(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    import benchmarks.study.families as module
    from benchmarks.study import fitness_run

    path = tmp_path / "trained.npz"
    fitness_run.main(["--clients", "12", "--experts", "4", "--rounds", "2", "--output", str(path)])
    with np.load(path) as file:
        assert file["correct"].shape[1] == 4
        assert file["correct"].dtype == np.float32
        # Prior 0.5, rate 0.3, two rounds: right or wrong in each of them.
        assert {round(float(value), 6) for value in np.unique(file["correct"])} <= {0.245, 0.455, 0.545, 0.755}
        assert set(file["client"]) == set(range(12))
    monkeypatch.setattr(module, "FITNESS_FILE", path)
    module._sample_scores.cache_clear()
    try:
        assert trained(50, 3).shape == (50, 3)
    finally:
        module._sample_scores.cache_clear()


@pytest.mark.usefixtures("two_solvers")
class TestCommand:
    def run(self, tmp_path, monkeypatch, *arguments):
        from benchmarks.study import __main__ as command

        monkeypatch.setattr(command, "QUICK", TINY)
        monkeypatch.setattr(command, "_compile_kernels", lambda: None)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        command.main(["--quick", "--output", str(tmp_path), *arguments])
        return {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}

    def test_one_command_writes_rows_tables_and_figures(self, tmp_path, monkeypatch):
        pytest.importorskip("matplotlib")
        files = self.run(tmp_path, monkeypatch)
        assert set(files) == {
            *(f"{name}.md" for name in ("machine", "times", "single", "ratios", "details", "heuristics")),
            *(f"oscillation.{suffix}" for suffix in ("csv", "md", "svg")),
            *("rows.csv", "machine.json", "times.svg", "profile.svg", "gap.svg"),
        }
        assert (tmp_path / "oscillation.csv").read_text("utf-8").count("\n") == 1 + 2 * 5 * 30
        again = self.run(tmp_path, monkeypatch, "--tables-only")
        assert again["rows.csv"] == files["rows.csv"]
        assert again["times.md"] > files["times.md"]

    def test_rows_of_other_settings_are_not_mixed_with_new_ones(self, tmp_path, monkeypatch):
        for name in ("write_oscillation", "_write_results"):
            monkeypatch.setattr(f"benchmarks.study.__main__.{name}", lambda *_: None)
        monkeypatch.setattr(f"{__name__}.TINY", dataclasses.replace(TINY, families=("tied",)))
        self.run(tmp_path, monkeypatch)
        with pytest.raises(SystemExit, match="--fresh starts over"):
            self.run(tmp_path, monkeypatch, "--seed", "1")
        self.run(tmp_path, monkeypatch, "--seed", "1", "--fresh")
        assert RowLog(tmp_path / "rows.csv").rows

    def test_without_rows_there_are_no_tables(self, tmp_path, monkeypatch):
        with pytest.raises(SystemExit, match="there is no study"):
            self.run(tmp_path, monkeypatch, "--tables-only")


def test_ratios_are_printed(capsys, monkeypatch):
    from benchmarks import ratios

    monkeypatch.setattr(ratios, "_SECONDS", 0.001)
    ratios.main(["--largest", "1000"])
    printed = capsys.readouterr().out
    for text in ("flow-ortools", "clustered 100 x 8", "tied 1000 x 16", "tied over clustered, 1000 x 16: "):
        assert text in printed
