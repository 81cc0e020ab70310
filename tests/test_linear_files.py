"""Published linear assignment problems: the readers, and the benchmark that runs over them."""

from __future__ import annotations

import csv
import gzip
from itertools import permutations

import pytest

from benchmarks.gap import main
from fedmoe_sched import InputError, Status, solve
from fedmoe_sched.linear_files import read_linear, read_linear_sparse

COSTS = [[7, 2, 1], [3, 8, 4], [5, 6, 2]]
ORDERS = list(permutations(range(3)))
DENSE = "3\n7 2\n1 3\n8 4 5\n6 2\n"  # rows go on over line ends, as in the published files
SPARSE = "3\n1 1 7\n1 3 1\n2 1 3\n2 2 8\n2 3 4\n3 1 5\n3 2 6\n3 3 2\n"  # all but row 1, column 2
TOTALS = [sum(COSTS[i][j] for i, j in enumerate(order)) for order in ORDERS]
LEAST, MOST = min(TOTALS), max(TOTALS)
SPARSE_TOTALS = [total for order, total in zip(ORDERS, TOTALS, strict=True) if order[0] != 1]
SPARSE_LEAST, SPARSE_MOST = min(SPARSE_TOTALS), max(SPARSE_TOTALS)


@pytest.mark.parametrize(("sense", "sign", "optimum"), [("min", -1, LEAST), ("max", 1, MOST)])
def test_every_pair_has_its_cost(tmp_path, sense, sign, optimum):
    path = tmp_path / "dense.txt"
    path.write_text(DENSE)
    problem = read_linear(path, sense)
    assert problem.desirability.tolist() == [[sign * cost for cost in row] for row in COSTS]
    assert problem.eligible is None
    answer = solve(problem)
    assert (answer.status, answer.objective) == (Status.OPTIMAL, sign * optimum)
    assert sorted(answer.pairs.indices) == [0, 1, 2]


@pytest.mark.parametrize(("sense", "sign", "optimum"), [("min", -1, SPARSE_LEAST), ("max", 1, SPARSE_MOST)])
def test_pairs_that_are_not_listed_are_not_eligible(tmp_path, sense, sign, optimum):
    path = tmp_path / "sparse.txt.gz"
    path.write_bytes(gzip.compress(SPARSE.encode()))
    problem = read_linear_sparse(path, sense)
    assert problem.eligible.tolist() == [[True, False, True], [True] * 3, [True] * 3]
    assert problem.desirability[problem.eligible].tolist() == [sign * cost for cost in (7, 1, 3, 8, 4, 5, 6, 2)]
    answer = solve(problem)
    assert (answer.status, answer.objective) == (Status.OPTIMAL, sign * optimum)


def test_a_row_without_pairs_is_a_conflict(tmp_path):
    path = tmp_path / "row.txt"
    path.write_text("2\n1 1 4\n1 2 5\n")
    assert solve(read_linear_sparse(path)).status is Status.INFEASIBLE


@pytest.mark.parametrize(
    ("read", "text", "reason"),
    [
        (read_linear, "", "the first number is missing"),
        (read_linear, "0", "the first number is 0, must be n"),
        (read_linear, "1.5 2", r"the first number is 1\.5"),
        (read_linear, "2 1 2 3", "3 numbers after n = 2, must be 2 x 2 = 4 costs"),
        (read_linear, "2 1 2 3 4 5", "5 numbers after n = 2"),
        (read_linear, "2 1 2 x 4", "not numbers parted by blanks"),
        (read_linear, "2 1 2 inf 4", r"not numbers parted by blanks \(number 4 is inf\)"),
        (read_linear_sparse, "-1", "the first number is -1"),
        (read_linear_sparse, "2 1 1 3 2", "4 numbers after n = 2, must be three for each pair"),
        (read_linear_sparse, "2 1 1 3 0 1 2", "pair 2: row is 0, must be one of 1 to 2"),
        (read_linear_sparse, "2 1 1 3 1 3 2", "pair 2: column is 3"),
        (read_linear_sparse, "2 1.5 1 3", r"pair 1: row is 1\.5"),
        (read_linear_sparse, "2 1 2 3 2 1 3 1 2 3", "pair 3: row 1, column 2 is pair 1 too"),
    ],
)
def test_anything_else_is_refused(tmp_path, read, text, reason):
    path = tmp_path / "bad.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"bad\.txt: {reason}"):
        read(path)


def test_damaged_compression_is_refused(tmp_path):
    path = tmp_path / "bad.gz"
    whole = bytearray(gzip.compress(DENSE.encode()))
    whole[14] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"bad\.gz: not numbers"):
        read_linear(path)


@pytest.mark.parametrize("read", [read_linear, read_linear_sparse])
def test_sense_is_checked(tmp_path, read):
    with pytest.raises(InputError, match="sense = 'least': must be 'min' or 'max'"):
        read(tmp_path / "none.txt", "least")


def test_benchmark_runs_the_network_backends(tmp_path, capsys):
    (tmp_path / "dense.txt").write_text(DENSE)
    (tmp_path / "sparse.txt").write_text(SPARSE)
    (tmp_path / "optima.csv").write_text(
        "file,index,kind,sense,optimum\n"
        f"dense.txt,0,assign,max,{MOST}\nsparse.txt,0,assign_sparse,min,{SPARSE_LEAST}\ngap.txt,0,gap,min,1\n"
    )
    output = tmp_path / "rows.csv"
    run = [str(tmp_path), "--time-limit", "5", "--output", str(output)]

    def rows():
        with output.open(newline="") as file:
            return [
                (
                    row["instance"],
                    row["kind"],
                    row["solver"],
                    row["status"],
                    float(row["objective"]),
                    float(row["gap"]),
                )
                for row in csv.DictReader(file)
            ]

    main([*run, "--kinds", "assign_sparse"])
    assert rows() == [
        ("sparse/0/min", "assign_sparse", solver, "optimal", SPARSE_LEAST, 0.0)
        for solver in ("exact", "flow-ortools", "flow-networkx", "lp-scipy")
    ]
    lines = capsys.readouterr().out.splitlines()
    assert "assign_sparse, 5 s, exact: 1 of 1 proved, 1 within 0.1 % of the optimum" in lines
    assert lines[-1] == "assign_sparse, 5 s: exact at least as good as every other on 1 of 1"

    main([*run, "--kinds", "assign", "--solvers", "flow-ortools"])
    assert rows() == [("dense/0/max", "assign", "flow-ortools", "optimal", MOST, 0.0)]
