"""The tables of the study as Markdown, for the documentation to include."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.families import SINGLE
from benchmarks.study.peers import PEERS
from benchmarks.study.plan import Case, case_of
from benchmarks.study.runner import NOT_RUN
from fedmoe_sched.certify import OPTIMALITY_GAP
from fedmoe_sched.compare import Row

__all__ = ["markdown_table", "seconds_text", "write_tables"]

_OURS = "exact"
_DETAILED = ("exact", "flow-pruned", "flow-ortools", "flow-pylmcf")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table with its first column to the left and all others to the right.

    Examples
    --------
    >>> print(markdown_table(["a", "b"], [["x", "1"]]), end="")
    | a | b |
    |---|---:|
    | x | 1 |
    """
    rule = "|".join(["---", *["---:"] * (len(header) - 1)])
    lines = [" | ".join(header), *(" | ".join(row) for row in rows)]
    return f"| {lines[0]} |\n|{rule}|\n" + "".join(f"| {line} |\n" for line in lines[1:])


def seconds_text(seconds: float | None) -> str:
    """Return two or three significant digits.

    Examples
    --------
    >>> [seconds_text(s) for s in (None, 0.000123, 0.0456, 1.234, 83.4)]
    ['', '0.12 ms', '46 ms', '1.2 s', '83 s']
    """
    if seconds is None:
        return ""
    if seconds < 0.0995:
        return f"{1e3 * seconds:.2g} ms"
    return f"{seconds:.2g} s" if seconds < 99.5 else f"{seconds:.0f} s"


def _size_text(case: Case) -> str:
    return f"{case.n_clients:,} x {case.n_experts}"


def _outcome(row: Row | None) -> str:
    """Say in one cell how long a solver took, or why there is no time."""
    if row is None:
        return ""
    if row.status in (NOT_RUN, "refused", "unavailable"):
        return {NOT_RUN: "-"}.get(row.status, row.status)
    if row.status == "killed":
        return f"> {row.message.removeprefix('killed after ')}"
    if row.seconds is None:
        return row.status
    text = seconds_text(row.seconds)
    return text if row.status == "optimal" or not row.exact else f"{text} ({_shortfall(row)})"


def _shortfall(row: Row) -> str:
    if row.status == "feasible" and row.gap is not None:
        return f"gap {_percent(row.gap)}"
    return str(row.status)


class _Rows:
    """Rows by instance and solver."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._by_key = {(row.instance, row.solver): row for row in rows}
        self.cases = [case_of(name) for name in dict.fromkeys(row.instance for row in rows)]

    def find(self, case: Case, solver: str) -> Row | None:
        return self._by_key.get((case.name, solver))

    def solvers(self, *, exact: bool, family: str) -> list[str]:
        chosen = [row for row in self.rows if row.exact == exact and case_of(row.instance).family == family]
        return list(dict.fromkeys(row.solver for row in chosen))

    def families(self, *, single: bool) -> list[str]:
        names = dict.fromkeys(case.family for case in self.cases)
        return [name for name in names if name.endswith(SINGLE) == single]

    def of(self, family: str) -> list[Case]:
        return [case for case in self.cases if case.family == family]


def times_table(rows: _Rows, *, single: bool) -> str:
    """Return build and solve times of the exact solvers: one table per family, one column per size."""
    parts = []
    for family in rows.families(single=single):
        cases = rows.of(family)
        body = [
            [f"`{solver}`", *(_outcome(rows.find(case, solver)) for case in cases)]
            for solver in rows.solvers(exact=True, family=family)
        ]
        table = markdown_table(["solver", *(_size_text(case) for case in cases)], body)
        parts.append(f"**{family.removesuffix(SINGLE)}**\n\n{table}")
    return "\n".join(parts)


def details_table(rows: _Rows) -> str:
    """Return every measured step and the memory of the fastest solvers, at the three largest sizes."""
    body = []
    for case in (case for family in rows.families(single=False) for case in rows.of(family)[-3:]):
        for row in (rows.find(case, solver) for solver in _DETAILED):
            if row is None or row.seconds is None:
                continue
            steps = (row.build_seconds, row.solve_seconds, row.read_seconds, row.certify_seconds)
            memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f} MiB"
            gap = "" if row.gap is None else f"{abs(row.gap):.0e}"
            name = f"{case.family}, {_size_text(case)}"
            body.append([name, f"`{row.solver}`", *map(seconds_text, steps), memory, gap, str(row.repeats)])
    header = ["instance", "solver", "build", "solve", "read", "certify", "peak memory", "gap", "solves"]
    return markdown_table(header, body)


def ratios_table(rows: _Rows) -> str:
    """Return how many times as long as `exact` its fastest rivals take."""
    body = []
    for case in (case for family in rows.families(single=False) for case in rows.of(family)):
        ours = _optimal_seconds(rows.find(case, _OURS))
        found = {s: _optimal_seconds(rows.find(case, s)) for s in rows.solvers(exact=True, family=case.family)}
        shelf = {s: t for s, t in found.items() if t is not None and s not in {_OURS, "flow-pruned"}}
        best = min(shelf, key=lambda solver: shelf[solver], default=None)
        name = f"{case.family}, {_size_text(case)}"
        cells = ["", ""] if best is None else [f"`{best}`", _ratio(shelf[best], ours)]
        body.append([name, seconds_text(ours), *cells, _ratio(found.get("flow-pruned"), ours)])
    return markdown_table(
        ["instance", "`exact`", "fastest off the shelf", "takes x", "`flow-pruned` takes x"], body
    )


def _optimal_seconds(row: Row | None) -> float | None:
    return row.seconds if row is not None and row.status == "optimal" else None


def _ratio(seconds: float | None, ours: float | None) -> str:
    if seconds is None or not ours:
        return ""
    ratio = seconds / ours
    return f"{ratio:.2g}" if ratio < 99.5 else f"{ratio:.0f}"


def heuristics_table(rows: _Rows) -> str:
    """Return gap and broken bounds of the heuristics."""
    body = []
    for family in rows.families(single=False):
        for solver in rows.solvers(exact=False, family=family):
            cells = [_given_up(rows.find(case, solver)) for case in rows.of(family)]
            body.append([f"{family}, `{solver}`", *cells])
    sizes = dict.fromkeys(_size_text(case) for case in rows.cases if not case.family.endswith(SINGLE))
    return markdown_table(["family, solver", *sizes], body)


def _given_up(row: Row | None) -> str:
    if row is None or row.objective is None:
        return "" if row is None else _outcome(row)
    if row.violations:
        return f"breaks {row.violations}"
    return "" if row.gap is None else _percent(row.gap)


def _percent(gap: float) -> str:
    percent = 100 * gap if gap > OPTIMALITY_GAP else 0.0
    return f"{percent:.0f} %" if percent >= 99.5 else f"{percent:.2g} %"


def machine_table(description: dict[str, Any]) -> str:
    """Return machine, versions and limits."""
    machine, settings = description["machine"], description["settings"]
    packages = ", ".join(f"{name} {number}" for name, number in description["versions"].items() if number)
    limits = f"{settings['seconds']:g} s; {settings['large_seconds']:g} s at 100,000 x 64; "
    limits += f"{settings['largest_seconds']:g} s at 1,000,000 x 64"
    threads = f"1; `{settings['solver_with_threads']}` as many as there are cores"
    body = [
        ["date", description["date"]],
        ["machine", f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"],
        ["system", f"{machine['system']}, Python {machine['python']}"],
        ["versions", packages],
        ["time limit per solve", limits],
        ["threads per solver", threads],
        ["solves", f"median of up to {settings['repeats']}, none begun after {settings['repeat_seconds']:g} s"],
        ["seed", str(settings["seed"])],
        ["the whole study took", f"{description['seconds'] / 60:.0f} min"],
    ]
    return "| what | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in body)


def write_tables(rows: Sequence[Row], description: dict[str, Any], folder: Path) -> list[Path]:
    """Write all tables as Markdown files.

    Parameters
    ----------
    rows : sequence of Row
        Judged by the best bounds, see `fedmoe_sched.compare.judge`.
    description : dict
        See `benchmarks.study.machine`.
    folder : Path

    Returns
    -------
    list of Path
    """
    table = _Rows(_in_order(rows))
    makers: dict[str, Callable[[], str]] = {
        "machine": lambda: machine_table(description),
        "times": lambda: times_table(table, single=False),
        "single": lambda: times_table(table, single=True),
        "ratios": lambda: ratios_table(table),
        "details": lambda: details_table(table),
        "heuristics": lambda: heuristics_table(table),
    }
    written = []
    for name, make in makers.items():
        written.append(folder / f"{name}.md")
        written[-1].write_text(make(), encoding="utf-8")
    return written


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """Put ours first, then the registry's backends, then the peers."""
    return sorted(rows, key=lambda row: (row.solver != _OURS) + (row.solver in PEERS))
