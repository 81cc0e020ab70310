"""The backends that take budgets, on published instances of the generalised assignment problem.

Usage::

    python -m benchmarks.gap DATA_DIR --time-limit 10
    python -m benchmarks.gap DATA_DIR --time-limit 1 10 60 --files "[cde]*" --output gap.csv

DATA_DIR holds files in the format of `fedmoe_sched.gap_files`, and ``optima.csv`` with the columns ``file``,
``index`` (of the instance within its file), ``kind`` (rows of other kinds than ``gap`` are passed over), ``sense``
and ``optimum``. Each solve runs in a process of its own, with engines imported and kernels compiled before; all
get the same time limit, and one thread where they take that. ``gap`` is (optimum - objective) / optimum, in
absolute value; ``seconds`` are build and solve.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, cast

from fedmoe_sched import Limits
from fedmoe_sched.compare import Row, compare
from fedmoe_sched.gap_files import read_gap
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["Result", "main", "summary"]

_SOLVERS = ("lagrangian", "ilp-ortools", "mip-ortools", "milp-scipy")
_CLOSE = 1e-3


@dataclass(frozen=True)
class Result:
    """One line of the output: what a backend reached within a time limit.

    Parameters
    ----------
    instance, sense : str
    n_clients, n_experts : int
    solver : str
    time_limit : float
    status : str
    objective : float or None
        In the signs of the file.
    optimum : float
    gap : float or None
        None where nothing was found.
    bound, proved_bound : float or None
        The best bound, and what prices prove of it.
    seconds : float or None
    message : str
    """

    instance: str
    sense: str
    n_clients: int
    n_experts: int
    solver: str
    time_limit: float
    status: str
    objective: float | None
    optimum: float
    gap: float | None
    bound: float | None
    proved_bound: float | None
    seconds: float | None
    message: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _options(arguments)
    results: list[Result] = []
    for seconds in options.time_limit:
        for name, sense, optimum, problem in _instances(options.data_dir, options.files):
            limits = Limits(time=seconds, threads=options.threads)
            for row in compare({name: problem}, options.solvers, limits=limits, certify=False):
                results.append(_result(row, sense, optimum, seconds))
                print(_line(results[-1]), flush=True)
            if options.output is not None:  # whole after each instance: hours of them may be interrupted
                _write(results, options.output)
    print("\n".join(summary(results)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gap", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_dir", type=Path, help="folder of the instances, with optima.csv")
    parser.add_argument("--time-limit", type=float, nargs="+", default=[10.0], help="seconds; several are a sweep")
    parser.add_argument("--files", default="*", help="pattern of file names, such as '[cde]*'")
    parser.add_argument("--solvers", nargs="+", default=list(_SOLVERS), help="backends, the first one to judge")
    parser.add_argument("--threads", type=int, default=1, help="threads of backends that take a number")
    parser.add_argument("--output", type=Path, help="CSV to write")
    return parser.parse_args(arguments)


def _instances(folder: Path, pattern: str) -> Iterator[tuple[str, str, float, AssignmentProblem]]:
    """Read (name, sense, optimum, problem) of all instances with a known optimum."""
    with (folder / "optima.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("kind", "gap") == "gap"]
    for row in rows:
        if fnmatch.fnmatch(row["file"], pattern):
            sense = cast("Literal['min', 'max']", row["sense"])
            problem = read_gap(folder / row["file"], sense)[int(row["index"])]
            name = f"{row['file'].partition('.')[0]}/{row['index']}/{sense}"
            yield name, sense, float(row["optimum"]), problem


def _result(row: Row, sense: str, optimum: float, seconds: float) -> Result:
    sign = 1.0 if sense == "max" else -1.0
    objective, bound, proved = (
        None if value is None else sign * value for value in (row.objective, row.bound, row.certified_bound)
    )
    gap = None if objective is None or not row.usable else sign * (optimum - objective) / max(1.0, abs(optimum))
    return Result(
        row.instance,
        sense,
        row.n_clients,
        row.n_experts,
        row.solver,
        seconds,
        row.status,
        objective,
        optimum,
        gap,
        bound,
        proved,
        row.seconds,
        row.message,
    )


def _line(result: Result) -> str:
    gap = "-" if result.gap is None else f"{100 * result.gap:.3f} %"
    taken = "-" if result.seconds is None else f"{result.seconds:.2f} s"
    return (
        f"{result.instance:<14} {result.time_limit:>4g} s {result.solver:<12} {result.status:<9} {gap:>9}"
        f" {taken:>8}  objective {result.objective}, bound {result.bound}, optimum {result.optimum:g}"
    )


def _write(results: Sequence[Result], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def summary(results: Sequence[Result]) -> list[str]:
    """Count, per time limit, who proved optima or came close, and where the first backend is as good as any."""
    lines = []
    for seconds in sorted({result.time_limit for result in results}):
        here = [result for result in results if result.time_limit == seconds]
        solvers = list(dict.fromkeys(result.solver for result in here))
        gaps = {(result.solver, result.instance): _gap(result) for result in here}
        for solver in solvers:
            own = [result for result in here if result.solver == solver]
            close = sum(_gap(result) <= _CLOSE for result in own)
            proved = sum(result.status == "optimal" for result in own)
            lines.append(f"{seconds:g} s, {solver}: {proved} proved, {close} within 0.1 % of {len(own)}")
        instances = list(dict.fromkeys(result.instance for result in here))
        for other in solvers[1:]:
            good = sum(_as_good(gaps[solvers[0], name], gaps[other, name]) for name in instances)
            lines.append(f"{seconds:g} s: {solvers[0]} at least as good as {other} on {good} of {len(instances)}")
        good = sum(
            _as_good(gaps[solvers[0], name], min(gaps[other, name] for other in solvers)) for name in instances
        )
        lines.append(f"{seconds:g} s: {solvers[0]} at least as good as every other on {good} of {len(instances)}")
    return lines


def _as_good(one: float, other: float) -> bool:
    """Whether there is an answer, and no worse one."""
    return one < float("inf") and one <= other + 1e-12


def _gap(result: Result) -> float:
    return float("inf") if result.gap is None else result.gap


if __name__ == "__main__":
    main(sys.argv[1:])
