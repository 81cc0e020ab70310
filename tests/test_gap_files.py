"""Generalised assignment problems, published and drawn: the reader, and the benchmark that runs over them."""

from __future__ import annotations

import csv
import gzip
import math
from fractions import Fraction

import numpy as np
import pytest

from benchmarks.gap import Result, judged, main
from benchmarks.gap_types import TYPES, draw
from fedmoe_sched import InputError, solve
from fedmoe_sched.gap_files import read_gap

# Two agents, three jobs. Agent 0 has room for jobs 0 and 1, or for job 2; agent 1 for any two.
ONE = "2 3  1 5 2  4 4 9  2 3 5  2 2 2  5 4"
# Least: jobs 2 and 0/1 cannot share agent 0: 2 + (4 + 4) = 10 against 1 + 5 + 9 = 15, and 1 + 4 + 9 = 14.
LEAST, MOST = 10.0, 18.0  # most: jobs 1 (5) at agent 0, 0 (4) and 2 (9) at agent 1


@pytest.mark.parametrize(("sense", "sign", "optimum"), [("min", -1, LEAST), ("max", 1, MOST)])
def test_single_instance_is_read_and_solved(tmp_path, sense, sign, optimum):
    path = tmp_path / "one.txt"
    path.write_text(ONE.replace("  ", "\n"))
    [problem] = read_gap(path, sense)
    assert problem.shape == (2, 3)
    assert problem.desirability.tolist() == [[sign * 1, sign * 5, sign * 2], [sign * 4, sign * 4, sign * 9]]
    assert problem.budgets[0].size.tolist() == [[2, 3, 5], [2, 2, 2]]
    assert problem.budgets[0].budget.tolist() == [5, 4]
    assert problem.load_min.tolist() == problem.load_max.tolist() == [1, 1, 1]
    assert solve(problem, "milp-scipy").objective == sign * optimum


def test_several_compressed_instances_are_read(tmp_path):
    path = tmp_path / "two.txt.gz"
    path.write_bytes(gzip.compress(f"2 {ONE} 1 1 7 3 9".encode()))
    first, second = read_gap(path)
    assert first.shape == (2, 3)
    assert (second.shape, second.desirability.tolist(), second.budgets[0].budget.tolist()) == ((1, 1), [[-7]], [9])


@pytest.mark.parametrize("text", ["", "5", "2 3 1 2", f"2 {ONE}", f"1 {ONE} 4", "1 0 0", "a b", "nan 3 1 2 4"])
def test_anything_else_is_refused(tmp_path, text):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bad\.txt: not (a file of|numbers)"):
        read_gap(path)


def test_sense_is_checked(tmp_path):
    with pytest.raises(InputError, match="sense = 'least': must be 'min' or 'max'"):
        read_gap(tmp_path / "none.txt", "least")


def test_benchmark_writes_a_row_per_backend_and_a_summary(tmp_path, capsys):
    (tmp_path / "one.txt").write_text(ONE)
    (tmp_path / "optima.csv").write_text(
        f"file,index,kind,sense,optimum\none.txt,0,gap,min,{LEAST}\none.txt,0,gap,max,{MOST}\nother.txt,0,mincostflow,min,1\n"
    )
    output = tmp_path / "rows.csv"
    solvers = ["--solvers", "milp-scipy", "ilp-ortools"]
    main([str(tmp_path), "--time-limit", "5", *solvers, "--output", str(output)])
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["instance"], row["solver"], float(row["objective"]), float(row["gap"])) for row in rows] == [
        ("one/0/min", "milp-scipy", LEAST, 0.0),
        ("one/0/min", "ilp-ortools", LEAST, 0.0),
        ("one/0/max", "milp-scipy", MOST, 0.0),
        ("one/0/max", "ilp-ortools", MOST, 0.0),
    ]
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "gap, 5 s, ilp-ortools: 2 of 2 proved, 2 within 0.1 % of the optimum",
        "gap, 5 s: milp-scipy at least as good as ilp-ortools on 2 of 2",
        "gap, 5 s: milp-scipy at least as good as every other on 2 of 2",
    ]


class TestDrawnInstances:
    @pytest.mark.parametrize("kind", TYPES)
    def test_same_seed_same_instance_of_whole_numbers(self, kind):
        one, two, other = (draw(kind, 4, 30, seed) for seed in (5, 5, 6))
        assert one.shape == (4, 30)
        assert one.load_min.tolist() == one.load_max.tolist() == [1] * 30
        for take in (lambda p: p.desirability, lambda p: p.budgets[0].size, lambda p: p.budgets[0].budget):
            np.testing.assert_array_equal(take(one), take(two))
            np.testing.assert_array_equal(take(one), np.rint(take(one)))
            assert not np.array_equal(take(one), take(other))

    @pytest.mark.parametrize("kind", "abc")
    def test_sizes_and_costs_of_a_to_c_are_uniform_over_their_ranges(self, kind):
        problem = draw(kind, 10, 1000)
        values, counts = np.unique(problem.budgets[0].size, return_counts=True)
        assert values.tolist() == list(range(5, 26))
        assert counts.min() > 0.7 * counts.mean()
        values, counts = np.unique(-problem.desirability, return_counts=True)
        assert values.tolist() == list(range(10, 51))
        assert counts.min() > 0.7 * counts.mean()

    def test_costs_of_d_fall_with_the_size(self):
        problem = draw("d", 10, 1000)
        size = problem.budgets[0].size
        assert np.unique(size).tolist() == list(range(1, 101))
        assert np.unique(-problem.desirability - 111 + size).tolist() == list(range(-10, 11))

    def test_sizes_of_e_are_exponential_and_costs_their_inverse(self):
        problem = draw("e", 10, 1000)
        size = problem.budgets[0].size
        assert size.min() == 1
        # Rounded down, 1 - 10 ln U exceeds k where U < exp(-k / 10).
        for least in (2, 8, 31):
            assert (size >= least).mean() == pytest.approx(math.exp(-(least - 1) / 10), abs=0.02)
        off = -problem.desirability - 1000 / size
        assert off.min() > -11
        assert off.max() <= 0
        assert np.mean(off) == pytest.approx(-5.5, abs=0.2)

    @pytest.mark.parametrize("kind", TYPES)
    def test_budgets_keep_the_published_rule(self, kind):
        for seed in range(5):
            problem = draw(kind, 6, 25, seed)
            costs, [resource] = -problem.desirability, problem.budgets
            sizes = resource.size.astype(int).tolist()
            if kind in "ab":
                taken = [0] * 6
                for j in range(25):
                    cheapest = min(range(6), key=lambda i: costs[i, j])
                    taken[cheapest] += sizes[cheapest][j]
                right = Fraction(6, 10) * Fraction(25, 6) * 15 + Fraction(4, 10) * max(taken)
                wanted = [right * (1 if kind == "a" else Fraction(7, 10))] * 6
            else:
                wanted = [Fraction(8, 10) * sum(row) / 6 for row in sizes]
            if kind == "e":
                wanted = [max(one, *row) for one, row in zip(wanted, sizes, strict=True)]
            assert resource.budget.tolist() == [math.floor(one) for one in wanted]

    def test_the_benchmark_draws_and_measures_gaps_to_the_best_bound(self, tmp_path, capsys):
        output = tmp_path / "rows.csv"
        sizes = ["--agents", "3", "--jobs", "12", "--seed", "1", "2"]
        others = ["--time-limit", "5", "--solvers", "milp-scipy", "--output", str(output)]
        main(["--generate", "c", "e", *sizes, *others])
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["instance"] for row in rows] == [f"{t}3x12/{s}/min" for t in "ce" for s in (1, 2)]
        for row in rows:
            best = -solve(draw(row["instance"][0], 3, 12, int(row["instance"][6])), "mip-ortools").objective
            assert (row["kind"], row["optimum"]) == ("drawn", "")
            assert float(row["objective"]) == float(row["target"]) == pytest.approx(best)
            assert float(row["gap"]) == pytest.approx(0, abs=1e-9)
        lines = capsys.readouterr().out.splitlines()
        assert "best bound" in lines[1]
        assert lines[-2] == "drawn, 5 s, milp-scipy: 4 of 4 proved, 4 within 0.1 % of the best bound"

    def test_gaps_are_to_the_best_bound_of_the_same_instance_at_any_limit(self):
        def result(instance, objective, bound, status="feasible", sense="min", optimum=None):
            middle = (objective, optimum, None, None, bound, None, 1.0, "")
            return Result(instance, "drawn", sense, 2, 3, "s", 1.0, status, *middle)

        results = judged(
            [
                result("p", 110.0, 90.0),
                result("p", 125.0, 100.0),
                result("p", 90.0, None, "violated"),
                result("p", None, 80.0, "unknown"),
                result("q", 10.0, None),
                result("r", 90.0, 120.0, sense="max"),
                result("r", 80.0, 100.0, sense="max"),
                result("s", 110.0, 10.0, optimum=88.0),
            ]
        )
        assert [r.gap for r in results] == pytest.approx([0.1, 0.25, None, None, None, 0.1, 0.2, 0.25])
        assert [r.target for r in results] == [100.0] * 4 + [None, 100.0, 100.0, 88.0]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("", "either DATA_DIR or --generate"),
            ("folder --generate c --agents 2 --jobs 3", "either DATA_DIR or --generate"),
            ("--generate c --jobs 3", "--generate needs --agents and --jobs"),
            ("--generate f --agents 2 --jobs 3", "invalid choice: 'f'"),
            ("--generate c --agents 0 --jobs 3", "--agents: 0: must be >= 1"),
        ],
    )
    def test_wrong_options_are_named(self, capsys, arguments, message):
        with pytest.raises(SystemExit):
            main(arguments.split())
        assert message in capsys.readouterr().err
