"""Published generalised assignment problems: the reader, and the benchmark that runs over them."""

from __future__ import annotations

import csv
import gzip

import pytest

from benchmarks.gap import main
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
        "gap, 5 s, ilp-ortools: 2 proved, 2 within 0.1 % of 2",
        "gap, 5 s: milp-scipy at least as good as ilp-ortools on 2 of 2",
        "gap, 5 s: milp-scipy at least as good as every other on 2 of 2",
    ]
