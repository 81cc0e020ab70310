"""How close backends come to the optima of published instances, or to proved bounds of drawn ones, and how fast.

Usage::

    python -m benchmarks.gap DATA_DIR --time-limit 10
    python -m benchmarks.gap DATA_DIR --time-limit 1 10 60 --files "[cde]*" --output gap.csv
    python -m benchmarks.gap DATA_DIR --kinds assign assign_sparse --solvers exact flow-ortools
    python -m benchmarks.gap --generate c d e --agents 20 --jobs 400 --seed 0 1 --time-limit 10

DATA_DIR holds the files, and ``optima.csv`` with the columns ``file``, ``index`` (of the instance within its
file), ``kind``, ``sense`` and ``optimum``. Kinds are ``gap``, generalised assignment as `fedmoe_sched.gap_files`
reads it, for the backends that take budgets; ``assign`` and ``assign_sparse``, linear assignment as
`fedmoe_sched.linear_files` reads it, for those that solve networks. Rows of other kinds are passed over.

--generate needs no files: it draws generalised assignment problems of the published types, see
`benchmarks.gap_types`, one per type and seed. Their kind is ``drawn``.

Each solve runs in a process of its own, with engines imported and kernels compiled before; all get the same time
limit, and one thread where they take that. A backend that does not keep it is killed after twice the limit and
20 s.
``gap`` is (target - objective) / target, in absolute value. The target is the optimum; of drawn instances,
whose optimum is not known, the best bound that any backend has proved or claimed by then, within any of the time
limits: lines are printed with the bounds so far, file and summary have those of the whole run. A gap below 0 would
show that a claimed bound is wrong. ``seconds`` are build and solve.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import cast

from benchmarks.gap_types import TYPES, draw
from fedmoe_sched import Limits, Status
from fedmoe_sched._number_files import Sense
from fedmoe_sched.compare import Row, compare
from fedmoe_sched.gap_files import read_gap
from fedmoe_sched.linear_files import read_linear, read_linear_sparse
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["Result", "judged", "main", "summary"]

_FOR_BUDGETS = ("lagrangian", "ilp-ortools", "mip-ortools", "milp-scipy")
_FOR_NETWORKS = ("exact", "flow-ortools", "flow-networkx", "lp-scipy")
_CLOSE = 1e-3
_DRAWN = "drawn"  # the kind of generated instances


@dataclass(frozen=True)
class _Kind:
    """What the rows of a kind in optima.csv are."""

    read: Callable[[Path, Sense], Sequence[AssignmentProblem]]
    solvers: tuple[str, ...]


_KINDS = {
    "gap": _Kind(read_gap, _FOR_BUDGETS),
    "assign": _Kind(lambda path, sense: [read_linear(path, sense)], _FOR_NETWORKS),
    "assign_sparse": _Kind(lambda path, sense: [read_linear_sparse(path, sense)], _FOR_NETWORKS),
}


@dataclass(frozen=True)
class Result:
    """One line of the output: what a backend reached within a time limit.

    Parameters
    ----------
    instance, kind, sense : str
    n_clients, n_experts : int
    solver : str
    time_limit : float
    status : str
    objective : float or None
        In the signs of the file.
    optimum : float or None
        None where it is not known.
    target : float or None
        What the gap is measured against: the optimum, or the best bound of all backends; None if there is none.
    gap : float or None
        None where nothing was found.
    bound, proved_bound : float or None
        The best bound, and what prices prove of it.
    seconds : float or None
    message : str
    """

    instance: str
    kind: str
    sense: str
    n_clients: int
    n_experts: int
    solver: str
    time_limit: float
    status: str
    objective: float | None
    optimum: float | None
    target: float | None
    gap: float | None
    bound: float | None
    proved_bound: float | None
    seconds: float | None
    message: str


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _options(arguments)
    results: list[Result] = []
    print(_line(None))
    for seconds in options.time_limit:
        for instance in _instances(options):
            limits = Limits(time=seconds, threads=options.threads)
            chosen = options.solvers or instance.solvers
            rows = compare({instance.name: instance.problem}, chosen, limits=limits, certify=False)
            results = judged([*results, *(_result(row, instance, seconds) for row in rows)])
            print("\n".join(map(_line, results[-len(rows) :])), flush=True)
            if options.output is not None:  # whole after each instance: hours of them may be interrupted
                _write(results, options.output)
    print("\n".join(summary(results)))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gap", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data_dir", type=Path, nargs="?", help="folder of the instances, with optima.csv")
    parser.add_argument("--generate", nargs="+", choices=list(TYPES), help="draw instances of these types instead")
    parser.add_argument("--agents", type=_size, help="agents (clients) of those")
    parser.add_argument("--jobs", type=_size, help="jobs (experts) of those")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="one instance per type and seed")
    parser.add_argument("--time-limit", type=float, nargs="+", default=[10.0], help="seconds; several are a sweep")
    parser.add_argument("--files", default="*", help="pattern of file names, such as '[cde]*'")
    parser.add_argument(
        "--kinds", nargs="+", choices=list(_KINDS), default=list(_KINDS), help="kinds of instances"
    )
    parser.add_argument("--solvers", nargs="+", help="backends, the first one to judge; default: by kind")
    parser.add_argument("--threads", type=int, default=1, help="threads of backends that take a number")
    parser.add_argument("--output", type=Path, help="CSV to write")
    options = parser.parse_args(arguments)
    if (options.data_dir is None) == (options.generate is None):
        parser.error("either DATA_DIR or --generate is needed")
    if options.generate is not None and None in {options.agents, options.jobs}:
        parser.error("--generate needs --agents and --jobs")
    return options


def _size(text: str) -> int:
    number = int(text)
    if number < 1:
        msg = f"{number}: must be >= 1"
        raise argparse.ArgumentTypeError(msg)
    return number


@dataclass(frozen=True)
class _Instance:
    name: str
    kind: str
    sense: Sense
    optimum: float | None
    problem: AssignmentProblem
    solvers: tuple[str, ...]


def _instances(options: argparse.Namespace) -> Iterator[_Instance]:
    """Read or draw the instances, one at a time."""
    if options.generate is None:
        yield from _published(options.data_dir, options.files, options.kinds)
        return
    for kind in options.generate:
        for seed in options.seed:
            problem = draw(kind, options.agents, options.jobs, seed)
            name = f"{kind}{options.agents}x{options.jobs}/{seed}/min"
            yield _Instance(name, _DRAWN, "min", None, problem, _FOR_BUDGETS)


def _published(folder: Path, pattern: str, kinds: Sequence[str]) -> Iterator[_Instance]:
    """Read all instances with a known optimum."""
    with (folder / "optima.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        kind = row.get("kind", "gap")
        if kind in kinds and fnmatch.fnmatch(row["file"], pattern):
            sense = cast("Sense", row["sense"])
            problem = _KINDS[kind].read(folder / row["file"], sense)[int(row["index"])]
            name = f"{row['file'].partition('.')[0]}/{row['index']}/{sense}"
            yield _Instance(name, kind, sense, float(row["optimum"]), problem, _KINDS[kind].solvers)


def _result(row: Row, instance: _Instance, seconds: float) -> Result:
    """Put a row into the signs of the file, not yet judged."""
    sign = 1.0 if instance.sense == "max" else -1.0
    objective, bound, proved = (
        None if value is None else sign * value for value in (row.objective, row.bound, row.certified_bound)
    )
    return Result(
        row.instance,
        instance.kind,
        instance.sense,
        row.n_clients,
        row.n_experts,
        row.solver,
        seconds,
        row.status,
        objective,
        instance.optimum,
        instance.optimum,
        None,
        bound,
        proved,
        row.seconds,
        row.message,
    )


def judged(results: Sequence[Result]) -> list[Result]:
    """Set the gaps, of instances without a known optimum to the best bound that any of the results has."""
    bounds: dict[str, list[float]] = {}
    for result in results:
        if result.optimum is None and result.bound is not None:
            bounds.setdefault(result.instance, []).append(result.bound)
    return [_judged(result, bounds.get(result.instance, [])) for result in results]


def _judged(result: Result, bounds: Sequence[float]) -> Result:
    target = result.optimum
    if target is None and bounds:
        target = min(bounds) if result.sense == "max" else max(bounds)
    if target is None or result.objective is None or result.status == Status.VIOLATED:
        return replace(result, target=target, gap=None)
    short = target - result.objective if result.sense == "max" else result.objective - target
    return replace(result, target=target, gap=short / max(1.0, abs(target)))


def _line(result: Result | None) -> str:
    """Return the line of a result, or the head of all lines."""
    if result is None:
        return f"{'instance':<16} {'limit':>6} {'backend':<13} {'status':<9} {'gap':>9} {'seconds':>8}"
    gap = "-" if result.gap is None else f"{100 * result.gap:.3f} %"
    taken = "-" if result.seconds is None else f"{result.seconds:.2f} s"
    target = "no bound" if result.target is None else f"{_target_of(result.kind)} {result.target:.10g}"
    return (
        f"{result.instance:<16} {result.time_limit:>4g} s {result.solver:<13} {result.status:<9} {gap:>9}"
        f" {taken:>8}  objective {result.objective}, bound {result.bound}, {target}"
    )


def _target_of(kind: str) -> str:
    return "best bound" if kind == _DRAWN else "optimum"


def _write(results: Sequence[Result], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)


def summary(results: Sequence[Result]) -> list[str]:
    """Count, per time limit and kind, who proved optima or came close, and where the first is as good as any.

    Close is a gap of 0.1 % at most: to the optimum, or of drawn instances to the best bound of the run.
    """
    groups = dict.fromkeys((result.time_limit, result.kind) for result in results)
    return [
        line
        for seconds, kind in groups
        for line in _summary_of(
            f"{kind}, {seconds:g} s", [r for r in results if (r.time_limit, r.kind) == (seconds, kind)]
        )
    ]


def _summary_of(title: str, here: Sequence[Result]) -> Iterator[str]:
    solvers = list(dict.fromkeys(result.solver for result in here))
    gaps = {(result.solver, result.instance): _gap(result) for result in here}
    for solver in solvers:
        own = [result for result in here if result.solver == solver]
        close = sum(_gap(result) <= _CLOSE for result in own)
        proved = sum(result.status == "optimal" for result in own)
        of = _target_of(own[0].kind)
        yield f"{title}, {solver}: {proved} of {len(own)} proved, {close} within 0.1 % of the {of}"
    first = solvers[0]
    instances = list(dict.fromkeys(result.instance for result in here))
    for other in solvers[1:]:
        good = sum(_as_good(gaps[first, name], gaps[other, name]) for name in instances)
        yield f"{title}: {first} at least as good as {other} on {good} of {len(instances)}"
    good = sum(_as_good(gaps[first, name], min(gaps[other, name] for other in solvers)) for name in instances)
    yield f"{title}: {first} at least as good as every other on {good} of {len(instances)}"


def _as_good(one: float, other: float) -> bool:
    """Whether there is an answer, and no worse one."""
    return one < float("inf") and one <= other + 1e-12


def _gap(result: Result) -> float:
    return float("inf") if result.gap is None else result.gap


if __name__ == "__main__":
    main(sys.argv[1:])
