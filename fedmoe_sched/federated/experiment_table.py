"""What came out of an experiment: one row per run, mean and standard deviation per arm, as CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fedmoe_sched._files import write_text
from fedmoe_sched.federated.experiment import Experiment, PlannedRun
from fedmoe_sched.federated.experiment_runs import error_of, finished_rounds
from fedmoe_sched.federated.runs import PHASES, Run, read_run

__all__ = ["MEASURES", "ArmRow", "Measure", "RunRow", "Value", "collect", "measure", "summarise", "write_results"]

_LAST = 5  # rounds that the accuracy is averaged over


@dataclass(frozen=True)
class Measure:
    """A column of the tables.

    Parameters
    ----------
    key : str
        In the CSV files, in plain units: shares from 0 to 1, seconds, MB.
    title : str
        In the Markdown tables.
    table : {"Accuracy", "Speed", "Balance", "Cost"}
        Which of them it is in.
    digits : int
        Decimals there.
    percent : bool
        Whether a share is shown in percent there.
    """

    key: str
    title: str
    table: Literal["Accuracy", "Speed", "Balance", "Cost"]
    digits: int
    percent: bool = False

    @property
    def to_target(self) -> bool:
        """Whether a run without a value never reached the target accuracy."""
        return self.key.endswith("_to_target")


MEASURES = (
    Measure("accuracy_last5", "global, last 5 rounds", "Accuracy", 3),
    Measure("accuracy_best", "global, best", "Accuracy", 3),
    Measure("client_accuracy_mean", "clients, mean", "Accuracy", 3),
    Measure("client_accuracy_worst_decile", "clients, worst decile", "Accuracy", 3),
    Measure("rounds_to_converge", "rounds to converge", "Speed", 1),
    Measure("client_rounds_to_converge", "rounds to converge, clients", "Speed", 1),
    Measure("rounds_to_target", "rounds to target", "Speed", 1),
    Measure("client_rounds_to_target", "rounds to target, clients", "Speed", 1),
    Measure("simulated_seconds_to_target", "simulated time to target (s)", "Speed", 1),
    Measure("megabytes_to_target", "traffic to target (MB)", "Speed", 1),
    Measure("load_cv", "load CV", "Balance", 3),
    Measure("expert_jain", "Jain index, experts", "Balance", 3),
    Measure("client_jain", "Jain index, clients", "Balance", 3),
    Measure("fitness_given_up", "fitness given up (%)", "Balance", 2, percent=True),
    Measure("gap", "mean gap (%)", "Balance", 2, percent=True),
    Measure("schedule_seconds", "scheduling (s)", "Cost", 3),
    Measure("schedule_share", "scheduling (% of the round time)", "Cost", 2, percent=True),
    Measure("simulated_seconds", "simulated time (s)", "Cost", 1),
    Measure("megabytes_up", "up (MB)", "Cost", 1),
    Measure("megabytes_down", "down (MB)", "Cost", 1),
    Measure("megabytes_saved", "saved by copies (MB)", "Cost", 1),
    Measure("experts_resent", "experts new to clients, per round", "Cost", 1),
    Measure("wall_seconds", "wall time (s)", "Cost", 1),
)

_NOTES = f"""\
Mean ± sample standard deviation over the seeds; "(2 of 3)": two of three seeds have a value.

- Accuracy: mean over the last {_LAST} rounds, except "best"; clients have their own experts and class mix.
- Speed: of the global model, and of the clients on average where said. A run has converged in the first round \
whose accuracy, averaged over the 5 rounds around it, is within \
0.01 of the best such average. "never": no seed reached the target.
- Balance: load CV, fitness given up and gap are means over the rounds. The Jain index is 1 where all experts (by \
clients that trained them) or all clients (by rounds answered) got the same.
- Cost: round time is scheduling, training and aggregation, without evaluation."""


@dataclass(frozen=True)
class RunRow:
    """One run.

    Parameters
    ----------
    grid, arm : str
        Labels.
    seed : int
    status : {"finished", "begun", "failed"}
    rounds : int
        Finished rounds, at most those asked for.
    error : str
        Why it failed.
    values : dict of str to float or None
        By `Measure.key`; empty where no round is finished.
    run : Run or None
        Its records, up to the rounds asked for.
    """

    grid: str
    arm: str
    seed: int
    status: Literal["finished", "begun", "failed"]
    rounds: int
    error: str
    values: dict[str, float | None]
    run: Run | None = field(repr=False)


@dataclass(frozen=True)
class Value:
    """Mean over the seeds that have a value.

    Parameters
    ----------
    mean : float or None
        None where no seed has one.
    deviation : float or None
        Sample standard deviation; None for fewer than two.
    count : int
        Seeds that have one.
    """

    mean: float | None
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Value:
        """Summarise the values of several seeds.

        Examples
        --------
        >>> Value.of([1.0, None, 3.0])
        Value(mean=2.0, deviation=1.4142135623730951, count=2)
        """
        known = [value for value in values if value is not None]
        return cls(
            statistics.fmean(known) if known else None,
            statistics.stdev(known) if len(known) > 1 else None,
            len(known),
        )


@dataclass(frozen=True)
class ArmRow:
    """One arm over its seeds.

    Parameters
    ----------
    grid, arm : str
        Labels.
    finished, failed, begun : int
        Runs; only finished ones count in `values`.
    values : dict of str to Value
        By `Measure.key`.
    """

    grid: str
    arm: str
    finished: int
    failed: int
    begun: int
    values: dict[str, Value]


def collect(experiment: Experiment, output: Path, plans: Iterable[PlannedRun]) -> list[RunRow]:
    """Read the runs that there are.

    Parameters
    ----------
    experiment : Experiment
    output : Path
        Folder of the experiment.
    plans : iterable of PlannedRun
        Those that were not begun yet, and have no error, give no row.

    Returns
    -------
    list of RunRow
        By grid entry, arm and seed, in the order of the file.

    Raises
    ------
    InputError, StateFileError
        A run folder cannot be read.
    """
    grid = [entry.label for entry in experiment.grid]
    arms = [arm.label for arm in experiment.arms]
    ordered = sorted(plans, key=lambda plan: (grid.index(plan.grid), arms.index(plan.arm), plan.seed))
    rows = (_row(plan, output / plan.folder, experiment.target) for plan in ordered)
    return [row for row in rows if row.rounds or row.error]


def _row(plan: PlannedRun, folder: Path, target: float | None) -> RunRow:
    wanted = plan.config.rounds
    rounds = min(wanted, finished_rounds(folder))
    run = read_run(folder) if rounds else None
    if run is not None:
        # An earlier, longer run of the same settings is compared with the others at the same round.
        run = dataclasses.replace(run, records=run.records[:wanted])
    error = error_of(folder) if rounds < wanted else ""
    status: Literal["finished", "begun", "failed"] = "failed" if error else "begun"
    values = {} if run is None else measure(run, target)
    return RunRow(
        plan.grid, plan.arm, plan.seed, "finished" if rounds == wanted else status, rounds, error, values, run
    )


def measure(run: Run, target: float | None) -> dict[str, float | None]:
    """Return the figures of one run.

    Parameters
    ----------
    run : Run
    target : float or None
        Accuracy to reach.

    Returns
    -------
    dict of str to float or None
        One per `MEASURES`; None where the records say nothing of it.
    """
    reached = None if target is None else run.rounds_to(target)
    seconds, up, down = (_totals(run, key) for key in ("simulated_round", "bytes_up", "bytes_down"))
    saved = _totals(run, "bytes_saved") if run.config["clients"].get("cache", "none") != "none" else None
    traffic = None if up is None or down is None else up + down
    training = run.total(*(phase for phase in PHASES if phase != "evaluate_seconds"))
    scheduling = run.total("schedule_seconds")
    values = run.summary(target)
    return {
        "accuracy_last5": _mean(run, "accuracy", _LAST),
        "accuracy_best": values["accuracy_best"],
        "client_accuracy_mean": _mean(run, "client_accuracy_mean", _LAST),
        "client_accuracy_worst_decile": _mean(run, "client_accuracy_worst_decile", _LAST),
        "rounds_to_converge": run.rounds_to_converge(),
        "client_rounds_to_converge": run.rounds_to_converge("client_accuracy_mean"),
        "rounds_to_target": reached,
        "client_rounds_to_target": None if target is None else run.rounds_to(target, "client_accuracy_mean"),
        "simulated_seconds_to_target": _until(seconds, reached),
        "megabytes_to_target": _until(traffic, reached, 1e-6),
        "load_cv": values["load_cv"],
        "expert_jain": run.expert_jain(),
        "client_jain": run.records[-1].get("client_jain"),  # counts all rounds so far
        "fitness_given_up": values["fitness_given_up"],
        "gap": values["gap"],
        "schedule_seconds": scheduling,
        "schedule_share": scheduling / training if training > 0 else None,
        "simulated_seconds": _until(seconds, len(run.records)),
        "megabytes_up": _until(up, len(run.records), 1e-6),
        "megabytes_down": _until(down, len(run.records), 1e-6),
        "megabytes_saved": _until(saved, len(run.records), 1e-6),
        "experts_resent": _mean(run, "experts_resent", len(run.records)),
        "wall_seconds": values["seconds"],
    }


def _mean(run: Run, key: str, rounds: int) -> float | None:
    values = run.series(key)[-rounds:]
    return None if np.isnan(values).any() else float(values.mean())


def _totals(run: Run, key: str) -> Any:
    """Return the running total of a metric that counts each round; None if a round has none."""
    values = run.series(key)
    return None if np.isnan(values).any() else np.cumsum(values)


def _until(totals: Any, rounds: int | None, factor: float = 1.0) -> float | None:
    return None if totals is None or rounds is None else factor * float(totals[rounds - 1])


def summarise(rows: Sequence[RunRow]) -> list[ArmRow]:
    """Put the seeds of every arm together.

    Parameters
    ----------
    rows : sequence of RunRow
        As `collect` returns them.
    """
    answer = []
    for grid, arm in dict.fromkeys((row.grid, row.arm) for row in rows):
        here = [row for row in rows if (row.grid, row.arm) == (grid, arm)]
        done = [row for row in here if row.status == "finished"]
        values = {one.key: Value.of(row.values[one.key] for row in done) for one in MEASURES}
        failed = sum(row.status == "failed" for row in here)
        answer.append(ArmRow(grid, arm, len(done), failed, len(here) - len(done) - failed, values))
    return answer


# Files ---------------------------------------------------------------------------------------------------------


def write_results(experiment: Experiment, rows: Sequence[RunRow], output: Path) -> list[Path]:
    """Write ``runs.csv``, ``summary.csv`` and ``summary.md``.

    Parameters
    ----------
    experiment : Experiment
    rows : sequence of RunRow
    output : Path
        Folder of the experiment.
    """
    arms = summarise(rows)
    texts = {
        "runs.csv": _csv(_run_cells(row) for row in rows),
        "summary.csv": _csv(_arm_cells(row) for row in arms),
        "summary.md": markdown(experiment, rows, arms),
    }
    for name, text in texts.items():
        write_text(output / name, text)
    return [output / name for name in texts]


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = list(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _run_cells(row: RunRow) -> dict[str, Any]:
    return {
        "grid": row.grid,
        "arm": row.arm,
        "seed": row.seed,
        "status": row.status,
        "rounds": row.rounds,
        **{one.key: row.values.get(one.key) for one in MEASURES},
        "error": row.error,
    }


def _arm_cells(row: ArmRow) -> dict[str, Any]:
    cells: dict[str, Any] = {name: getattr(row, name) for name in ("grid", "arm", "finished", "failed", "begun")}
    for one in MEASURES:
        value = row.values[one.key]
        cells |= {one.key: value.mean, f"{one.key}_sd": value.deviation, f"{one.key}_n": value.count}
    return cells


def markdown(experiment: Experiment, rows: Sequence[RunRow], arms: Sequence[ArmRow]) -> str:
    """Return all tables, one set per grid entry."""
    target = "" if experiment.target is None else f"Target accuracy {experiment.target:g}. "
    parts = [f"# {experiment.title}\n\n{target}{_NOTES}\n"]
    for grid in dict.fromkeys(row.grid for row in arms):
        if grid:
            parts.append(f"## {grid}\n")
        here = [row for row in arms if row.grid == grid]
        for name in dict.fromkeys(one.table for one in MEASURES):
            shown = shown_measures(here, name, experiment.target)
            header = [name, "seeds", *(one.title for one in shown)]
            parts.append(_table(header, [_line(row, shown) for row in here]))
    failures = [row for row in rows if row.error]
    if failures:
        lines = (f"- {_name(row)}, after {row.rounds} rounds: {row.error}\n" for row in failures)
        parts.append("## Failed runs\n\n" + "".join(lines))
    return "\n".join(parts)


def shown_measures(rows: Sequence[ArmRow], table: str, target: float | None) -> list[Measure]:
    """Return the columns of one table; those that no arm has a value of are left out."""
    return [
        one
        for one in MEASURES
        if one.table == table
        and (
            any(row.values[one.key].count for row in rows)
            or (one.key == "rounds_to_target" and target is not None)  # "never" says something too
        )
    ]


def value_text(one: Measure, row: ArmRow) -> str:
    """Return a cell such as ``0.612 ± 0.008``."""
    value = row.values[one.key]
    if value.mean is None:
        return "never" if one.to_target and row.finished else "-"
    scale = 100 if one.percent else 1
    text = _number(scale * value.mean, one.digits)
    if value.deviation is not None:
        text += f" ± {_number(scale * value.deviation, one.digits)}"
    return text if value.count == row.finished else f"{text} ({value.count} of {row.finished})"


def _number(value: float, digits: int) -> str:
    return f"{value:z.{digits}f}" if math.isfinite(value) else str(value)


def _line(row: ArmRow, shown: Sequence[Measure]) -> list[str]:
    lacking = [f"{count} {word}" for count, word in ((row.failed, "failed"), (row.begun, "begun")) if count]
    seeds = str(row.finished) + (f" ({', '.join(lacking)})" if lacking else "")
    return [row.arm, seeds, *(value_text(one, row) for one in shown)]


def _name(row: RunRow) -> str:
    return ", ".join(part for part in (row.grid, row.arm, f"seed {row.seed}") if part)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = "|".join(["---", *["---:"] * (len(header) - 1)])
    lines = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in (header, *rows)]
    return f"| {lines[0]} |\n|{rule}|\n" + "".join(f"| {line} |\n" for line in lines[1:])
