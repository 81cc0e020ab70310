"""Compare backends on the same problems: time, certified gap and memory, each solve in a process of its own."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import pickle
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedmoe_sched._compare_worker import Request
from fedmoe_sched._processes import kill_session, start_module
from fedmoe_sched.certify import relative_gap
from fedmoe_sched.errors import InputError
from fedmoe_sched.instances import save_problem
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.registry import solver_class, solvers
from fedmoe_sched.solver import Limits, Solver

__all__ = ["Row", "compare", "judge", "read_csv", "write_csv"]

_STARTING = 120.0  # seconds: kernels never compiled before take three quarters of a minute, or more

#: A problem, or a function that makes it when its turn comes, so that large ones need not exist side by side.
ProblemSource: TypeAlias = AssignmentProblem | Callable[[], AssignmentProblem]


@dataclass(frozen=True)
class Row:
    """What one backend did with one problem.

    Parameters
    ----------
    instance : str
    n_clients, n_experts : int
    solver : str
    exact : bool
        Whether a completed run of this backend is optimal.
    status : str
        A `Status`; or ``"refused"`` (the backend does not take this problem), ``"unavailable"`` (a package is
        missing), ``"killed"`` (over the time limit), ``"failed"`` (an exception, or the process died).
    stop_reason : str
    objective : float or None
    bound : float or None
        The best bound known for this instance: of all backends' prices where `certify` was asked for, else this
        backend's own.
    gap : float or None
        Of the objective to `bound`; None where there are violations, because it would say nothing.
    certified_bound : float or None
        The bound that this backend's prices prove; None for a backend without prices.
    violations : int
        Broken constraints.
    build_seconds, solve_seconds, read_seconds, certify_seconds : float or None
        Wall time to build the model, solve it, read the answer back and certify it: medians over the repeats. The
        engine was imported and used once before.
    repeats : int
        Solves that the times are medians of.
    peak_bytes : int or None
        Peak resident memory of the process over the first solve: interpreter, engine and problem included.
    message : str
        Why there is no answer, or the backend's own words.
    client_jain, expert_jain : float or None
        Jain's index of the experts of each client, and of the loads.
    """

    instance: str
    n_clients: int
    n_experts: int
    solver: str
    exact: bool
    status: str
    stop_reason: str = ""
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    certified_bound: float | None = None
    violations: int = 0
    build_seconds: float | None = None
    solve_seconds: float | None = None
    read_seconds: float | None = None
    certify_seconds: float | None = None
    repeats: int = 0
    peak_bytes: int | None = None
    message: str = ""
    client_jain: float | None = None
    expert_jain: float | None = None

    @property
    def seconds(self) -> float | None:
        """Build and solve time together."""
        if self.build_seconds is None or self.solve_seconds is None:
            return None
        return self.build_seconds + self.solve_seconds

    @property
    def usable(self) -> bool:
        """Whether there is an assignment that keeps every constraint."""
        return self.objective is not None and not self.violations

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return dataclasses.asdict(self)


def compare(
    problems: ProblemSource | Mapping[str, ProblemSource] | Iterable[ProblemSource],
    solvers: Sequence[str | Solver[Any]] | None = None,
    *,
    limits: Limits | None = None,
    certify: bool = True,
    repeat: int = 1,
    repeat_seconds: float | None = None,
    kill_after: float | None = None,
    on_row: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Run backends on problems, one after another, each solve in a process of its own.

    Parameters
    ----------
    problems : AssignmentProblem, mapping of name to problem, or iterable of problems
        A function of no arguments may stand for a problem.
    solvers : sequence of str or Solver, optional
        Backends by name or instance; None is every one that is available.
    limits : Limits, optional
        ``limits.time`` goes to the backends that can stop themselves.
    certify : bool, default True
        Judge every answer, heuristics included, by the best bound that any backend's prices prove; where none of
        the chosen backends has prices, one more solve by ``"auto"`` provides them.
    repeat : int, default 1
        Solves per process, at most; the times are medians.
    repeat_seconds : float, optional
        Begin no further repeat once the solves, certificates included, have taken so long together.
    kill_after : float, optional
        Wall seconds after which a process is killed. None is twice ``limits.time`` per solve plus 20 s for start
        and certificate, and up to two minutes more while kernels are still being compiled; no limit if there is no
        ``limits.time`` either.
    on_row : callable, optional
        Called with each row as soon as it is there, before gaps to other backends' bounds are known.

    Returns
    -------
    list of Row
        Problem by problem, in the order of `solvers`. Refusals, failures and time-outs are rows too.

    Raises
    ------
    InputError
        An unknown backend, or an option out of range.

    Examples
    --------
    >>> from fedmoe_sched.instances import clustered
    >>> rows = compare({"small": clustered(20, 4)}, ["greedy", "flow-ortools"])
    >>> [(row.solver, row.status) for row in rows]
    [('greedy', 'violated'), ('flow-ortools', 'optimal')]
    """
    limits = limits or Limits()
    if repeat < 1:
        msg = f"repeat = {repeat}: must be >= 1"
        raise InputError(msg)
    if kill_after is not None and not kill_after > 0:
        msg = f"kill_after = {kill_after}: must be a number of seconds > 0, or None"
        raise InputError(msg)
    starting = 0.0
    if kill_after is None and limits.time is not None:
        kill_after, starting = 2 * limits.time * repeat + 20, _STARTING
    backends = [_Backend.of(solver) for solver in (_available() if solvers is None else solvers)]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="fedmoe-sched-") as folder:
        for name, source in _named(problems):
            problem = source() if callable(source) else source
            task = _Task(name, problem, Path(folder), limits, repeat, repeat_seconds, kill_after, starting)
            rows += _compare_one(task, backends, certify=certify, on_row=on_row)
    return rows


def write_csv(rows: Iterable[Row], path: str | os.PathLike[str]) -> None:
    """Write rows as a table with one column per field of `Row`; None becomes an empty cell."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        writer.writeheader()
        writer.writerows(row.to_dict() for row in rows)


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """Read rows that `write_csv` wrote.

    Raises
    ------
    InputError
        The columns are not the fields of `Row`, or a cell cannot be read.
    """
    fields = [field.name for field in dataclasses.fields(Row)]
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames not in (fields, fields[:-2]):  # files of older versions have no Jain indices
            msg = f"{os.fspath(path)}: the columns must be {', '.join(fields)}"
            raise InputError(msg)
        try:
            return [_row_of(cells) for cells in reader]
        except (KeyError, TypeError, ValueError) as error:
            msg = f"{os.fspath(path)}, line {reader.line_num}: cannot be read ({error})"
            raise InputError(msg) from error


def _row_of(cells: dict[str, str]) -> Row:
    """Turn the text of one line into what `Row` declares."""
    readers: dict[str, Callable[[str], Any]] = {
        "str": str,
        "int": int,
        "bool": {"True": True, "False": False}.__getitem__,
        "float | None": lambda text: float(text) if text else None,
        "int | None": lambda text: int(text) if text else None,
    }
    return Row(
        **{field.name: readers[str(field.type)](cells.get(field.name, "")) for field in dataclasses.fields(Row)}
    )


@dataclass(frozen=True)
class _Backend:
    solver: str | Solver[Any]
    cls: type[Solver[Any]] | None = None  # None for "auto": the worker picks

    @classmethod
    def of(cls, solver: str | Solver[Any]) -> _Backend:
        if isinstance(solver, Solver):
            return cls(solver, type(solver))
        return cls(solver, None if solver == "auto" else solver_class(solver))

    @property
    def label(self) -> str:
        return self.solver if isinstance(self.solver, str) else repr(self.solver)

    @property
    def exact(self) -> bool:
        return self.cls is None or self.cls.exact

    @property
    def path(self) -> str | None:
        """Where the worker finds a named backend, which this process may have registered itself."""
        if self.cls is None or isinstance(self.solver, Solver):
            return None
        return f"{self.cls.__module__}:{self.cls.__qualname__}"

    def refusal(self, problem: AssignmentProblem) -> tuple[str, str] | None:
        """Return (status, reason) where there is no point in starting a process."""
        if self.cls is None:
            return None
        missing = self.cls.missing()
        if missing is not None:
            return "unavailable", missing
        instance = self.cls() if isinstance(self.solver, str) else self.solver
        reason = instance.supports(problem)
        return None if reason is None else ("refused", reason)


@dataclass(frozen=True)
class _Task:
    instance: str
    problem: AssignmentProblem
    folder: Path
    limits: Limits
    repeat: int
    repeat_seconds: float | None
    kill_after: float | None
    starting: float  # seconds that a process may take on top, as long as it is not ready

    @property
    def file(self) -> Path:
        return self.folder / "problem.npz"


def _available() -> list[str]:
    return [entry.name for entry in solvers() if entry.available is True]


def _named(
    problems: ProblemSource | Mapping[str, ProblemSource] | Iterable[ProblemSource],
) -> Iterable[tuple[str, ProblemSource]]:
    if isinstance(problems, AssignmentProblem) or callable(problems):
        problems = [problems]
    if isinstance(problems, Mapping):
        return problems.items()
    return ((f"problem {number}", problem) for number, problem in enumerate(problems))


def _compare_one(
    task: _Task, backends: list[_Backend], *, certify: bool, on_row: Callable[[Row], None] | None
) -> list[Row]:
    # Labels may be anything hashable, and cost no solver any time.
    save_problem(task.problem.replace(client_labels=None, expert_labels=None), task.file)
    rows: list[Row] = []
    for backend in backends:
        rows.append(_solve_apart(task, backend))
        if on_row is not None:
            on_row(rows[-1])
    if not certify:
        return rows
    proved = any(row.certified_bound is not None for row in rows)
    if not proved and any(row.objective is not None for row in rows):
        return judge([*rows, _solve_apart(task, _Backend("auto"))])[:-1]
    return judge(rows)


def judge(rows: Iterable[Row]) -> list[Row]:
    """Set bound and gap of every row by the best bound that any prices prove for its instance.

    Parameters
    ----------
    rows : iterable of Row
        Of one or several comparisons; equal instance names stand for equal instances.

    Returns
    -------
    list of Row
        In the same order; rows of instances without a proved bound keep their own.
    """
    rows = list(rows)
    bounds: dict[str, float] = {}
    for row in rows:
        if row.certified_bound is not None:
            bounds[row.instance] = min(row.certified_bound, bounds.get(row.instance, math.inf))
    return [_judged(row, bounds[row.instance]) if row.instance in bounds else row for row in rows]


def _judged(row: Row, bound: float) -> Row:
    if row.objective is None:
        return row
    gap = None if row.violations else relative_gap(bound, row.objective)
    return dataclasses.replace(row, bound=bound, gap=gap)


def _solve_apart(task: _Task, backend: _Backend) -> Row:
    """Return the row of one backend, judged by its own bound."""
    row = Row(task.instance, *task.problem.shape, backend.label, backend.exact, "failed")
    refusal = backend.refusal(task.problem)
    if refusal is not None:
        return dataclasses.replace(row, status=refusal[0], message=refusal[1])
    row = dataclasses.replace(row, **_in_process(task, backend))
    return row if row.bound is None else _judged(row, row.bound)


def _in_process(task: _Task, backend: _Backend) -> dict[str, Any]:
    """Run the worker and return what it says of its row."""
    output = task.folder / "result.json"
    request = Request(
        str(task.file), str(output), backend.solver, backend.path, task.limits, task.repeat, task.repeat_seconds
    )
    for file in (output, request.ready):
        file.unlink(missing_ok=True)
    try:
        code, errors = _run_worker(request, task.kill_after, task.starting)
    except subprocess.TimeoutExpired as expired:
        return {"status": "killed", "message": f"killed after {expired.timeout:g} s"}
    if not output.exists():
        last = errors.strip().splitlines()[-1:] or [f"ended with exit status {code}"]
        reason = f"killed by signal {-code}" if code < 0 else last[0]
        return {"status": "failed", "message": f"the process died: {reason}"}
    result: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return result


def _run_worker(request: Request, kill_after: float | None, starting: float) -> tuple[int, str]:
    """Start the worker in a session of its own, so that engines it starts as programs can be ended with it."""
    process = start_module("fedmoe_sched._compare_worker", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        try:
            _, errors = process.communicate(pickle.dumps(request), timeout=kill_after)
        except subprocess.TimeoutExpired as expired:
            if not starting or request.ready.exists():
                raise
            try:
                _, errors = process.communicate(timeout=starting)
            except subprocess.TimeoutExpired:
                raise subprocess.TimeoutExpired(expired.cmd, expired.timeout + starting) from None
    except BaseException:
        kill_session(process)
        process.communicate()
        raise
    return process.returncode, errors.decode(errors="replace")
