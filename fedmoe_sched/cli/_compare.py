"""``fedmoe-sched compare``."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fedmoe_sched.cli._input import problem_of
from fedmoe_sched.cli._output import (
    bytes_text,
    complain,
    console,
    gap_text,
    number_text,
    plain_table,
    seconds_text,
)
from fedmoe_sched.compare import Row, compare, write_csv
from fedmoe_sched.errors import InputError
from fedmoe_sched.instances import FAMILIES, generate
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solver import Limits

__all__ = ["compare_backends"]

_DEFAULT_SIZES = ["100x8", "1000x16"]


def compare_backends(
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Problems or scores, as for `solve`; none: generated ones.", show_default=False),
    ] = None,
    *,
    family: Annotated[
        list[str] | None,
        typer.Option(help=f"Family to generate: {', '.join(FAMILIES)}. Repeatable. [default: clustered]"),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(help="Clients x experts to generate, as in 1000x16. Repeatable. [default: 100x8, 1000x16]"),
    ] = None,
    solver: Annotated[
        list[str] | None, typer.Option(help="Backend. Repeatable. [default: all that are available]")
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(
            help="Seconds per solve. Backends that cannot stop themselves are killed later, see --kill-after."
        ),
    ] = 60.0,
    kill_after: Annotated[
        float | None, typer.Option(help="Seconds per process. [default: 2 x time limit x repeat + 20]")
    ] = None,
    repeat: Annotated[int, typer.Option(help="Solves per backend; times are the median.")] = 1,
    threads: Annotated[
        int | None, typer.Option(help="Threads a backend may use [default: its own choice].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated problems and of the backends.")] = 0,
    certify: Annotated[
        bool,
        typer.Option("--certify/--no-certify", help="Judge all answers by the best bound that any prices prove."),
    ] = True,
    csv: Annotated[Path | None, typer.Option(help="Write the rows to this .csv file.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw gap against time to this .svg, .png or .pdf file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compare backends on problems: time, certified gap and peak memory, each in a process of its own.

    Refusals, failures and time-outs are rows too. Exit code 1 if no backend found a feasible assignment for some
    problem.
    """
    if plot is not None and plot.suffix.lower() not in (".svg", ".png", ".pdf"):
        msg = f"--plot {plot}: must end in .svg, .png or .pdf"
        raise InputError(msg)
    problems = _problems(files or [], family, size, seed)
    rows = compare(
        problems,
        solver or None,
        limits=Limits(time=time_limit, seed=seed, threads=threads),
        certify=certify,
        repeat=repeat,
        kill_after=kill_after,
        on_row=None if as_json else _progress(),
    )
    if csv is not None:
        write_csv(rows, csv)
    if plot is not None:
        from fedmoe_sched.compare_plot import plot_rows

        plot_rows(rows, plot)
    if as_json:
        typer.echo(json.dumps([row.to_dict() for row in rows], indent=1))
    else:
        console().print(_table(rows))
    unsolved = {row.instance for row in rows} - {row.instance for row in rows if row.usable}
    if unsolved:
        complain(f"no feasible assignment for {', '.join(sorted(unsolved))}")
        raise typer.Exit(1)


def _progress() -> Callable[[Row], None] | None:
    out = console()
    if not out.is_terminal:
        return None
    return lambda row: out.print(f"[dim]{row.instance} {row.solver}: {row.status} {seconds_text(row.seconds)}[/]")


def _problems(
    files: list[Path], families: list[str] | None, sizes: list[str] | None, seed: int
) -> dict[str, AssignmentProblem | Callable[[], AssignmentProblem]]:
    problems: dict[str, AssignmentProblem | Callable[[], AssignmentProblem]] = {}
    for path in files:
        problems[str(path)] = problem_of(path)
    if files and families is None and sizes is None:
        return problems
    for family in families or ["clustered"]:
        generate(family, 1, 1)  # a wrong name is an error now, not after the first solves
        for text in sizes or _DEFAULT_SIZES:
            n, m = _size(text)
            problems[f"{family} {n} x {m}"] = functools.partial(generate, family, n, m, seed=seed)
    return problems


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().replace("_", "").split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        msg = f"--size {text}: must read CLIENTSxEXPERTS, as in 1000x16"
        raise InputError(msg)
    return int(parts[0]), int(parts[1])


def _table(rows: list[Row]) -> Table:
    numbers = ("objective", "gap", "build", "solve", "certify", "memory")
    table = plain_table("instance", "solver", "status", *numbers, "remark", right=numbers)
    last = None
    for row in rows:
        broken = f"{row.violations} constraints broken" if row.violations else ""
        table.add_row(
            "" if row.instance == last else row.instance.replace("[", r"\["),
            row.solver,
            row.status,
            number_text(row.objective),
            gap_text(row.gap),
            seconds_text(row.build_seconds),
            seconds_text(row.solve_seconds),
            seconds_text(row.certify_seconds),
            bytes_text(row.peak_bytes),
            "; ".join(part for part in (broken, row.message.replace("[", r"\[")) if part),
        )
        last = row.instance
    return table
