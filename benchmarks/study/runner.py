"""Run a plan row by row: each row is on disk as soon as it is known, and is not made again."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.study.families import instance
from benchmarks.study.peers import register_peers
from benchmarks.study.plan import THREADED, Case, Plan, case_of
from fedmoe_sched import AssignmentProblem, Limits
from fedmoe_sched.compare import Row, compare, read_csv
from fedmoe_sched.registry import solver_class

__all__ = ["NOT_RUN", "RowLog", "run_plan", "why_not_run"]

#: Status of rows for solvers that were not started, because of what they took at smaller sizes.
NOT_RUN = "not run"

# A solver is not started where its own growth puts it so far beyond the limit.
_HOPELESS = 1.5

# What a process may take beside the solve: start and imports, then per pair loading, prices and certificate.
_START_SECONDS = 15.0
_PAIR_SECONDS = 1.5e-6


class RowLog:
    """The rows of a CSV file, appended to one by one.

    Parameters
    ----------
    path : Path
        Made if it is not there. A last line that was cut off by a kill is dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fields = [field.name for field in dataclasses.fields(Row)]
        if not path.exists():
            path.write_text(self._line(self._fields), encoding="utf-8", newline="")
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            path.write_text(whole, encoding="utf-8", newline="")
        self.rows = read_csv(path)

    @staticmethod
    def _line(cells: Iterable[object]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(cells)
        return text.getvalue()

    def append(self, row: Row) -> None:
        """Add a row, on the disk before this returns."""
        # A message of several lines would make the end of a cut-off file ambiguous.
        row = dataclasses.replace(row, message=" ".join(row.message.split()))
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(self._line(row.to_dict().values()))
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)

    def find(self, case: Case, solver: str) -> Row | None:
        """Return the row of a solver on an instance, if it is there."""
        return next((row for row in self.rows if (row.instance, row.solver) == (case.name, solver)), None)

    def earlier(self, case: Case, solver: str) -> list[Row]:
        """Rows of a solver on smaller instances of the same family, by ascending size."""
        rows = [row for row in self.rows if row.solver == solver and case_of(row.instance).family == case.family]
        smaller = [row for row in rows if case_of(row.instance).pairs < case.pairs]
        return sorted(smaller, key=lambda row: case_of(row.instance).pairs)


def why_not_run(case: Case, earlier: Sequence[Row], limit_of: Callable[[Case], float]) -> str | None:
    """Return why a solver need not be started on an instance, or None.

    Parameters
    ----------
    case : Case
    earlier : sequence of Row
        Of the same solver on smaller instances of the family, by ascending size.
    limit_of : callable
        Seconds that a solve of a case may take.

    Returns
    -------
    str or None
        It ran out of time or memory at a smaller size; or the growth between its last two sizes (at least linear
        in the number of pairs, at most quadratic) puts it beyond one and a half times the limit.
    """
    for row in earlier:
        before = case_of(row.instance)
        if row.status == NOT_RUN:
            return row.message
        if row.status == "killed" or row.stop_reason == "time limit" or (row.seconds or 0) > limit_of(before):
            return f"timed out at {before.size}"
        if row.status == "failed":
            return f"failed at {before.size}"
    solved = [row for row in earlier if row.seconds]
    if not solved:
        return None
    last = solved[-1]
    at, seconds = case_of(last.instance), last.seconds or 0.0
    growth = 1.0
    if len(solved) > 1:
        ratio = seconds / (solved[-2].seconds or seconds)
        growth = min(2.0, max(1.0, math.log(ratio) / math.log(at.pairs / case_of(solved[-2].instance).pairs)))
    expected = seconds * (case.pairs / at.pairs) ** growth
    if expected <= _HOPELESS * limit_of(case):
        return None
    return f"{seconds:.3g} s at {at.size}: some {expected:.2g} s expected, limit {limit_of(case):g} s"


def run_plan(plan: Plan, log: RowLog, *, seed: int = 0, on_row: Callable[[Row], None] | None = None) -> None:
    """Run what of a plan is not in the log yet.

    Parameters
    ----------
    plan : Plan
    log : RowLog
    seed : int, default 0
        Of instances and solvers.
    on_row : callable, optional
        Called with each new row.
    """
    register_peers()
    for case in plan.cases():
        missing = [solver for solver in plan.solvers(case) if log.find(case, solver) is None]
        problem: AssignmentProblem | None = None
        for solver in missing:
            reason = why_not_run(case, log.earlier(case, solver), plan.limit)
            if reason is None and problem is None:
                problem = instance(case.family, case.n_clients, case.n_experts, seed=seed)
            row = _run(plan, case, solver, problem, seed) if reason is None else _not_run(case, solver, reason)
            log.append(row)
            if on_row is not None:
                on_row(log.rows[-1])


def _not_run(case: Case, solver: str, reason: str) -> Row:
    exact = solver_class(solver).exact
    return Row(case.name, case.n_clients, case.n_experts, solver, exact, NOT_RUN, message=reason)


def _run(plan: Plan, case: Case, solver: str, problem: AssignmentProblem | None, seed: int) -> Row:
    if problem is None:
        msg = f"{case.name}: no problem was drawn"
        raise RuntimeError(msg)
    limit = plan.limit(case)
    [row] = compare(
        {case.name: problem},
        [solver],
        limits=Limits(time=limit, seed=seed, threads=None if solver == THREADED else 1),
        certify=False,  # judged later by all rows together
        repeat=plan.repeats,
        repeat_seconds=plan.repeat_seconds,
        kill_after=math.ceil(limit + plan.repeat_seconds + _START_SECONDS + _PAIR_SECONDS * case.pairs),
    )
    return row
