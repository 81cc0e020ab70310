"""``fedmoe-sched experiment``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedmoe_sched.cli._output import complain, console, plain_table
from fedmoe_sched.errors import InputError, MissingDependencyError

if TYPE_CHECKING:
    from fedmoe_sched.federated.experiment import Experiment, PlannedRun
    from fedmoe_sched.federated.experiment_runs import Event
    from fedmoe_sched.federated.experiment_table import RunRow

__all__ = ["run_experiment"]

# Columns on the screen; summary.md has them all.
_SHOWN = {
    "accuracy_last5": "accuracy",
    "client_accuracy_mean": "clients",
    "client_accuracy_worst_decile": "worst decile",
    "rounds_to_converge": "converged",
    "rounds_to_target": "to target",
    "load_cv": "load CV",
    "client_jain": "Jain clients",
    "expert_jain": "Jain experts",
    "fitness_given_up": "given up (%)",
}


def run_experiment(
    file: Annotated[Path, typer.Argument(show_default=False)],
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for runs, tables and figures.", show_default=False)
    ],
    jobs: Annotated[int, typer.Option(help="Runs at the same time, each in a process of its own.")] = 2,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds, as in 0,1,2.", show_default="those of the file")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Label of an arm or grid entry to run. Repeatable.", show_default="all"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds of every run, for a quick look.", show_default="those of the file")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder of the publisher's files; else FEDMOE_SCHED_DATA.")
    ] = None,
) -> None:
    """Run an experiment: several arms, each with several seeds, and what came out as tables and figures.

    FILE is a TOML file with the settings of all runs. Every run has a folder of its own below OUTPUT/runs.
    Finished runs are kept and begun ones go on: the same command continues an interrupted experiment.

    Exit code 1 if some run failed; it is a row with its error, and is tried again the next time.
    """
    from fedmoe_sched.federated import Experiment
    from fedmoe_sched.federated.experiment_runs import refuse_missing_data, refuse_other_settings, run_all

    experiment = Experiment.from_toml(file)
    numbers = None if seeds is None else _numbers(seeds)
    given = {"rounds": rounds, "data.dir": None if data_dir is None else str(data_dir)}
    changes = {key: value for key, value in given.items() if value is not None}
    plans = experiment.plan(seeds=numbers, only=only or (), changes=changes)
    everything = experiment.plan(seeds=[*experiment.seeds, *(numbers or ())], changes=changes)
    refuse_other_settings(everything, output)
    refuse_missing_data(plans, output)
    show = _bars if sys.stdout.isatty() else _lines
    try:
        with show(plans) as on_event:
            run_all(plans, output, jobs=jobs, on_event=on_event)
    except KeyboardInterrupt:
        complain("interrupted; the same command goes on")
        raise typer.Exit(130) from None
    _report(experiment, output, everything)


def _numbers(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        msg = f"--seeds {text}: must read NUMBER,NUMBER,..., as in 0,1,2"
        raise InputError(msg)
    return [int(part) for part in parts]


def _report(experiment: Experiment, output: Path, plans: Sequence[PlannedRun]) -> None:
    from fedmoe_sched.federated.experiment_table import collect, write_results

    rows = collect(experiment, output, plans)
    paths = write_results(experiment, rows, output)
    try:
        from fedmoe_sched.experiment_figures import save_experiment_figures

        paths += save_experiment_figures(experiment, rows, output / "figures")
    except MissingDependencyError as error:
        typer.echo(f"no figures: {error}")
    console().print(_table(experiment, rows))
    typer.echo(f"written {len(paths)} tables and figures, among them {output / 'summary.md'}")
    failed = [row for row in rows if row.error]
    if failed:
        complain(f"{len(failed)} of {len(rows)} runs failed; the errors are in {output / 'runs.csv'}")
        raise typer.Exit(1)


def _table(experiment: Experiment, rows: Sequence[RunRow]) -> Any:
    from fedmoe_sched.federated.experiment_table import MEASURES, summarise, value_text

    shown = [one for one in MEASURES if one.key in _SHOWN]
    titles = tuple(_SHOWN[one.key] for one in shown)
    crossed = any(entry.label for entry in experiment.grid)
    table = plain_table(*(["grid"] if crossed else []), "arm", "seeds", *titles, right=("seeds", *titles))
    for row in summarise(rows):
        labels = [row.grid, row.arm] if crossed else [row.arm]
        cells = [*map(escape, labels), str(row.finished), *(value_text(one, row) for one in shown)]
        table.add_row(*cells)
    return table


# Progress ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _lines(plans: Sequence[PlannedRun]) -> Iterator[Callable[[Event], None]]:
    def show(event: Event) -> None:
        typer.echo(f"{event.plan.name}: {_words(event)}")

    typer.echo(f"{len(plans)} runs")
    yield show


def _words(event: Event) -> str:
    count = f"{event.round}/{event.plan.config.rounds}"
    if event.kind == "round":
        return f"round {count} accuracy {event.accuracy:.3f}"
    if event.kind == "started":
        return f"goes on after round {count}" if event.round else "started"
    return {
        "skipped": "is there already",
        "finished": "finished",
        "failed": f"failed after round {count}: {event.message}",
    }[event.kind]


@contextlib.contextmanager
def _bars(plans: Sequence[PlannedRun]) -> Iterator[Callable[[Event], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console()) as progress:
        whole = progress.add_task("[bold]runs", total=len(plans), note="")
        bars: dict[Path, TaskID] = {}

        def show(event: Event) -> None:
            plan, key, name = event.plan, event.plan.folder, escape(event.plan.name)
            if event.kind == "started":
                bars[key] = progress.add_task(name, total=plan.config.rounds, completed=event.round, note="")
            elif event.kind == "round":
                progress.update(bars[key], completed=event.round, note=f"accuracy {event.accuracy:.3f}")
            else:
                progress.advance(whole)
                if key in bars:
                    progress.remove_task(bars.pop(key))
            if event.kind == "failed":
                progress.console.print(f"{name}: {escape(_words(event))}")

        yield show
