"""``fedmoe-sched train``, ``figures`` and ``demo``."""

from __future__ import annotations

import contextlib
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fedmoe_sched.cli._output import complain, console, duration_text, gap_text, plain_table, seconds_text
from fedmoe_sched.errors import InputError

if TYPE_CHECKING:
    from fedmoe_sched.federated import TrainConfig
    from fedmoe_sched.federated.runs import Run

__all__ = ["demonstrate", "draw_figures", "train_policy"]

Record = dict[str, Any]

_MOST_WIDENED = 3  # bounds that the line of a round names
_DEMO_POLICIES = ("random", "greedy", "balanced")


def train_policy(
    *,
    policy: Annotated[str | None, typer.Option(help="Alignment policy by name.", show_default="balanced")] = None,
    data: Annotated[
        str | None, typer.Option(help="digits, fashion-mnist or cifar10.", show_default="digits")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Folder of the publisher's files; else FEDMOE_SCHED_DATA. digits needs none."),
    ] = None,
    clients: Annotated[int | None, typer.Option(help="Number of clients.", show_default="20")] = None,
    experts: Annotated[int | None, typer.Option(help="Number of experts.", show_default="5")] = None,
    capacity: Annotated[int | None, typer.Option(help="Experts per client and round.", show_default="2")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds in all.", show_default="40")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", show_default="0")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that train clients side by side, one per core.", show_default="1"),
    ] = None,
    soft: Annotated[
        bool | None,
        typer.Option(
            "--soft/--no-soft",
            help="Where the bounds of a round exclude one another, widen them by the fewest places.",
            show_default="no-soft",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other setting, as in --set clients.alpha=0.1. Repeatable."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; the options above come on top of it.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for settings, metrics and checkpoints.", show_default="runs/POLICY-DATA-SEED"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last checkpoint in the run folder.")
    ] = False,
) -> None:
    """Train a federated Mixture-of-Experts model with one policy.

    The run folder gets the settings in full (config.toml), one line of metrics per round (metrics.jsonl), every
    schedule, and a checkpoint per round. An interrupted run goes on with --resume --run-dir FOLDER, and ends as if
    it had not been interrupted; a larger --rounds prolongs a finished one.
    """
    changes = {
        "policy": policy,
        "data.name": data,
        "data.dir": None if data_dir is None else str(data_dir),
        "clients.count": clients,
        "model.experts": experts,
        "clients.capacity": capacity,
        "rounds": rounds,
        "seed": seed,
        "workers": workers,
        "policy_options.soft": soft,
    }
    start = _run_settings(run_dir) if resume else None
    changes = {key: value for key, value in changes.items() if value is not None} | _parsed(settings or [])
    chosen = _settings(config or start).updated(changes)
    folder = run_dir or Path("runs") / f"{chosen.policy}-{chosen.data.name}-{chosen.seed}"
    run = _train(chosen, folder, resume=resume)
    console().print(_summary_table([run], None))
    typer.echo(f"run folder {folder}")


def draw_figures(
    runs: Annotated[list[Path], typer.Argument(show_default=False)],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the figures.")] = Path("figures"),
    target: Annotated[
        float | None, typer.Option(help="Accuracy to reach, for the column `rounds to target`.")
    ] = None,
) -> None:
    """Draw figures of finished or running runs, side by side; print how they compare.

    RUNS are run folders that train wrote. The figures: accuracy over rounds, load per expert over rounds, and the
    client x expert heat maps.
    """
    from fedmoe_sched.federated.runs import read_run

    loaded = [read_run(path) for path in runs]
    _draw(loaded, output, target)
    console().print(_summary_table(loaded, target))


def demonstrate(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for runs and figures.")] = Path(
        "demo-output"
    ),
    rounds: Annotated[int, typer.Option(help="Rounds per policy.")] = 40,
    seed: Annotated[int, typer.Option(help="Seed of data split, model and policies.")] = 0,
    target: Annotated[float, typer.Option(help="Accuracy to reach, for the column `rounds to target`.")] = 0.8,
) -> None:
    """Train random, greedy and balanced on digits from the same seed and split; compare them.

    The data of each client suit one expert: five domains of two digits each.

    Runs of an earlier demo in the same folder are replaced.
    """
    from fedmoe_sched.federated import TrainConfig

    runs = []
    for policy in _DEMO_POLICIES:
        folder = output / "runs" / policy
        if (folder / "config.toml").exists():
            shutil.rmtree(folder)
        # Random alignment has no bound of its own: all three are judged alike.
        # Data of every client suit one expert, as in figure 3 of Chen et al. 2025 (arXiv 2507.05685).
        changes = {"policy": policy, "rounds": rounds, "seed": seed, "clients.split": "domains"}
        config = TrainConfig().updated(changes | {"policy_options": {"certify": True}})
        runs.append(_train(config, folder, resume=False))
    _draw(runs, output / "figures", target)
    console().print(_summary_table(runs, target))


def _run_settings(run_dir: Path | None) -> Path:
    """Return the settings file of the run that is to go on."""
    if run_dir is None:
        msg = "--resume: give the folder of the run with --run-dir"
        raise InputError(msg)
    if not (run_dir / "config.toml").exists():
        msg = f"--resume: run folder {run_dir} holds no run"
        raise InputError(msg)
    return run_dir / "config.toml"


def _settings(file: Path | None) -> TrainConfig:
    """Read the settings to start from; the defaults without a file."""
    from fedmoe_sched.federated import TrainConfig

    return TrainConfig() if file is None else TrainConfig.from_toml(file)


def _parsed(settings: Sequence[str]) -> dict[str, Any]:
    """Read KEY=VALUE with a value as in TOML; a bare word is text."""
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            msg = f"--set {setting}: must read KEY=VALUE"
            raise InputError(msg)
        try:
            changes[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            changes[key.strip()] = text.strip()
    return changes


def _train(config: TrainConfig, folder: Path, *, resume: bool) -> Run:
    from fedmoe_sched.federated import run_training

    show = _bar if sys.stdout.isatty() else _lines
    try:
        with show(config) as callback:
            return run_training(config, folder, resume=resume, callbacks=[callback]).run
    except KeyboardInterrupt:
        complain(f"interrupted; go on with: fedmoe-sched train --resume --run-dir {folder}")
        raise typer.Exit(130) from None


@contextlib.contextmanager
def _bar(config: TrainConfig) -> Iterator[Callable[[Record], None]]:
    columns = (
        TextColumn(f"{config.policy:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console()) as progress:
        task = progress.add_task("", total=config.rounds, note="")
        yield lambda record: progress.update(task, completed=record["round"], note=_note(record))


@contextlib.contextmanager
def _lines(config: TrainConfig) -> Iterator[Callable[[Record], None]]:
    def show(record: Record) -> None:
        typer.echo(f"{config.policy} round {record['round']}/{config.rounds} {_note(record)}")

    yield show


def _note(record: Record) -> str:
    return (
        f"accuracy {record['accuracy']:.3f} loss {record['loss']:.3f} load CV {record['load_cv']:.3f} "
        f"Jain {record['client_jain']:.3f} (clients) {record['expert_jain']:.3f} (experts) "
        f"gap {gap_text(record['gap'])} solve {seconds_text(record['solve_seconds'])}{_widened(record)}"
    )


def _widened(record: Record) -> str:
    """Say which bounds of a round were widened, the first of them by name."""
    told = record["relaxations"]
    more = f"; ... ({len(told) - _MOST_WIDENED} more)" if len(told) > _MOST_WIDENED else ""
    return f" widened {'; '.join(told[:_MOST_WIDENED])}{more}" if told else ""


def _draw(runs: Sequence[Run], folder: Path, target: float | None) -> None:
    from fedmoe_sched.figures import save_figures

    paths = save_figures([run.path for run in runs], folder, target=target)
    typer.echo(f"written {', '.join(str(path) for path in paths)}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{abs(value) if abs(value) < 5e-4 else value:.3f}"  # no -0.000


def _summary_table(runs: Sequence[Run], target: float | None) -> Any:
    summaries = [run.summary(target) for run in runs]
    rows = [_summary_cells(summary, target) for summary in summaries]
    # What no run has is no column: runs without devices have no simulated time.
    names = [name for name in rows[0] if any(row[name] is not None for row in rows)]
    table = plain_table("policy", *names, right=tuple(names))
    for summary, row in zip(summaries, rows, strict=True):
        table.add_row(summary["policy"], *("-" if row[name] is None else row[name] for name in names))
    return table


def _summary_cells(row: dict[str, Any], target: float | None) -> dict[str, str | None]:
    """Return the cells of a run by column; None for what a run may lack."""
    cells: dict[str, str | None] = {"rounds": str(row["rounds"]), "accuracy": f"{row['accuracy']:.3f}"}
    if target is not None:
        reached = row["rounds_to_target"]
        cells[f"rounds to {target:g}"] = "never" if reached is None else str(reached)
    cells |= {
        "best": f"{row['accuracy_best']:.3f}",
        "worst decile": _share(row["client_accuracy_worst_decile"]),
        "load CV": f"{row['load_cv']:.3f}",
        "Jain clients": _share(row["client_jain"]),
        "Jain experts": _share(row["expert_jain"]),
        "fitness given up": _share(row["fitness_given_up"]),
        "gap": gap_text(row["gap"]),
        "solve": seconds_text(row["solve_seconds"]),
        "seconds": f"{row['seconds']:.1f}",
        "MB down": _megabytes(row["bytes_down"]),
        "MB up": _megabytes(row["bytes_up"]),
    }
    if row["simulated_time"] is None:
        return cells | {"simulated": None} | ({} if target is None else {f"time to {target:g}": None})
    cells["simulated"] = duration_text(row["simulated_time"])
    if target is not None:
        time = row["simulated_time_to_target"]
        cells[f"time to {target:g}"] = "never" if time is None else duration_text(time)
    return cells


def _megabytes(size: int | None) -> str | None:
    return None if size is None else f"{size / 1e6:.1f}"
