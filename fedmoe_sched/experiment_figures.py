"""Figures of an experiment: arms over rounds and seeds, what balance costs, heat maps; needs the `plot` extra."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmoe_sched.federated.experiment import Experiment
from fedmoe_sched.federated.experiment_table import RunRow
from fedmoe_sched.federated.runs import Run
from fedmoe_sched.figures import DASHES, Floats, heat_map_figure, load_figure, whole_numbers
from fedmoe_sched.pictures import COLOURS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "balance_figure",
    "final_figure",
    "rounds_figure",
    "save_experiment_figures",
    "simulated_time_figure",
]

#: Label to the finished runs of one arm, seed by seed.
Arms = Mapping[str, Sequence[RunRow]]

_MARKERS = "oDs^vPX*hp"
_CURVES = {
    "accuracy": "Global model, whole test set",
    "client_accuracy_mean": "Clients: own experts, own class mix",
}
_ENDS = {
    "accuracy_last5": "global model",
    "client_accuracy_mean": "clients: mean",
    "client_accuracy_worst_decile": "clients: worst decile",
}
_PRICES = {"load_cv": "load CV (0: all experts alike)", "fitness_given_up": "fitness given up (share)"}


def save_experiment_figures(
    experiment: Experiment, rows: Sequence[RunRow], folder: Path, *, formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Draw all figures of an experiment, one set per grid entry; only finished runs are drawn.

    Parameters
    ----------
    experiment : Experiment
    rows : sequence of RunRow
        As `fedmoe_sched.federated.experiment_table.collect` returns them.
    folder : Path
        Made where it does not exist; grid entries have folders of their own in it.
    formats : sequence of str
        File name suffixes that matplotlib knows.

    Returns
    -------
    list of Path
        ``accuracy``, ``accuracy-time`` (where the runs have simulated times), ``final``, ``balance``, and of the
        first seed ``training``, ``fitness`` and ``load``.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    paths = []
    for entry in experiment.grid:
        here = [row for row in rows if row.grid == entry.label and row.status == "finished"]
        arms = {
            label: [row for row in here if row.arm == label] for label in dict.fromkeys(row.arm for row in here)
        }
        if not arms:
            continue
        title = textwrap.fill(experiment.title + (f": {entry.label}" if entry.label else ""), 90)
        for name, figure in _figures(arms, title, experiment.target).items():
            paths += _save(figure, folder / entry.slug, name, formats)
    return paths


def _figures(arms: Arms, title: str, target: float | None) -> dict[str, Figure]:
    figures = {"accuracy": rounds_figure(arms, title, target=target)}
    if all("simulated_round" in record for rows in arms.values() for row in rows for record in _run(row).records):
        figures["accuracy-time"] = simulated_time_figure(arms, title, target=target)
    figures["final"] = final_figure(arms, title)
    figures["balance"] = balance_figure(arms, title)
    first = {label: _run(rows[0]) for label, rows in arms.items()}
    runs, labels = list(first.values()), list(first)
    seeds = sorted({rows[0].seed for rows in arms.values()})
    words = f"{title} (seed {', '.join(map(str, seeds))})"
    figures["training"] = heat_map_figure(runs, "training", labels=labels)
    figures["fitness"] = heat_map_figure(runs, "fitness", labels=labels)
    figures["load"] = load_figure(runs, labels=labels)
    for name in ("training", "fitness", "load"):
        figures[name].suptitle(f"{figures[name].get_suptitle()}\n{words}")
    return figures


def _save(figure: Figure, folder: Path, name: str, formats: Sequence[str]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in formats]
    for path in paths:
        save_figure(figure, path, dpi=130)
    return paths


def _run(row: RunRow) -> Run:
    assert row.run is not None  # finished
    return row.run


def _style(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}


def _marker(number: int) -> dict[str, Any]:
    return {"color": COLOURS[number % len(COLOURS)], "marker": _MARKERS[number % len(_MARKERS)], "linestyle": ""}


# Over rounds, over time ----------------------------------------------------------------------------------------


def rounds_figure(arms: Arms, title: str, *, target: float | None = None) -> Figure:
    """Draw accuracy over rounds: per arm the mean over the seeds, in a band of one standard deviation.

    Parameters
    ----------
    arms : mapping of str to sequence of RunRow
        Label to the finished runs of an arm.
    title : str
    target : float, optional
        Accuracy to mark.

    Returns
    -------
    matplotlib.figure.Figure
        Global accuracy to the left, the mean over the clients to the right.
    """
    shade = 0.15 if len(arms) < 5 else 0.08

    def draw(axes: Axes, rows: Sequence[RunRow], key: str, style: dict[str, Any]) -> None:
        rounds, values = _run(rows[0]).series("round"), np.array([_run(row).series(key) for row in rows])
        mean = values.mean(axis=0)
        axes.plot(rounds, mean, linewidth=1.6, **style)
        if len(rows) > 1:
            spread = values.std(axis=0, ddof=1)
            low, high = np.clip([mean - spread, mean + spread], 0, 1)
            axes.fill_between(rounds, low, high, color=style["color"], alpha=shade, linewidth=0)

    figure = _curve_figure(arms, draw, target)
    for axes in figure.axes:
        axes.set_xlabel("round")
        whole_numbers(axes)
    figure.suptitle(f"{title}\naccuracy over rounds, mean ± one standard deviation over the seeds")
    return figure


def simulated_time_figure(arms: Arms, title: str, *, target: float | None = None) -> Figure:
    """Draw accuracy over simulated time, a line per run: seeds differ in how long their rounds take and wait.

    Parameters
    ----------
    arms : mapping of str to sequence of RunRow
        Label to the finished runs of an arm; all rounds have ``simulated_round``.
    title : str
    target : float, optional
        Accuracy to mark.

    Returns
    -------
    matplotlib.figure.Figure
        Global accuracy to the left, the mean over the clients to the right.
    """

    def draw(axes: Axes, rows: Sequence[RunRow], key: str, style: dict[str, Any]) -> None:
        for row in rows:
            hours = np.cumsum(_run(row).series("simulated_round")) / 3600
            axes.plot(hours, _run(row).series(key), linewidth=1.1, **style)

    figure = _curve_figure(arms, draw, target)
    for axes in figure.axes:
        axes.set_xlabel("simulated time (h)")
    figure.suptitle(f"{title}\naccuracy over simulated time, each seed")
    return figure


def _curve_figure(
    arms: Arms, draw: Callable[[Axes, Sequence[RunRow], str, dict[str, Any]], None], target: float | None
) -> Figure:
    figure = new_figure(10.5, 4.4 + _legend_height(arms))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (key, name) in zip(panels, _CURVES.items(), strict=True):
        for number, rows in enumerate(arms.values()):
            # The first arms on top: dashes show a later arm's solid line of the same values below them.
            draw(axes, rows, key, {"zorder": 4 - number / len(arms), **_style(number)})
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy")
    if target is not None:
        _mark(panels[0], target)
    _legend(figure, {label: {"linewidth": 1.6, **_style(n)} for n, label in enumerate(arms)})
    return figure


def _mark(axes: Axes, target: float) -> None:
    """Draw the target accuracy, with its name at the edge: curves are rarely there at the start."""
    axes.axhline(target, color="0.5", linewidth=0.8)
    axes.annotate(
        f"target {target:g}",
        (0, target),
        (3, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color="0.4",
        fontsize="small",
    )


def _legend_height(arms: Arms) -> float:
    """Inches that the legend below the panels takes."""
    lines = max(_wrapped(label).count("\n") + 1 for label in arms)
    return 0.2 * lines * -(-len(arms) // _columns(arms))


def _columns(labels: Iterable[str]) -> int:
    longest = max(len(line) for label in labels for line in _wrapped(label).split("\n"))
    return int(np.clip(120 // (longest + 8), 1, 4))


def _wrapped(label: str) -> str:
    return textwrap.fill(label, 40)


def _legend(figure: Figure, styles: Mapping[str, Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=_wrapped(label), **style) for label, style in styles.items()]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=_columns(styles),
        frameon=False,
        fontsize="small",
        handlelength=3.0,
    )


# Ends ----------------------------------------------------------------------------------------------------------


def final_figure(arms: Arms, title: str) -> Figure:
    """Draw the accuracy over the last rounds: every seed as a dot, the mean as a bar.

    Parameters
    ----------
    arms : mapping of str to sequence of RunRow
        Label to the finished runs of an arm.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        Global model, mean over the clients, worst decile of the clients; one line per arm.
    """
    labels = [textwrap.fill(label, 30) for label in arms]
    figure = new_figure(11.0, 1.7 + sum(0.22 + 0.2 * (1 + label.count("\n")) for label in labels))
    panels = figure.subplots(1, len(_ENDS), sharey=True)
    for axes, (key, name) in zip(panels, _ENDS.items(), strict=True):
        for number, rows in enumerate(arms.values()):
            values = _values(rows, key)
            axes.barh(number, values.mean(), height=0.62, color=_style(number)["color"], alpha=0.35)
            axes.plot([values.mean()] * 2, [number - 0.31, number + 0.31], color=_style(number)["color"])
            axes.plot(
                values, _apart(number, len(values)), "o", color="black", markersize=4, alpha=0.7, clip_on=False
            )
        axes.set(xlim=(0, 1), xlabel="accuracy")
        axes.set_title(name, fontsize="medium")
        axes.grid(alpha=0.3, axis="x")
    panels[0].set_yticks(range(len(labels)), labels, fontsize="small")
    panels[0].invert_yaxis()
    figure.suptitle(f"{title}\naccuracy over the last 5 rounds: mean, and each seed as a dot")
    return figure


def _values(rows: Sequence[RunRow], key: str) -> Floats:
    return np.array([np.nan if row.values[key] is None else row.values[key] for row in rows], dtype=np.float64)


def _apart(centre: float, count: int) -> Floats:
    """Spread dots a little, always the same way, so that equal values are seen as several."""
    return np.asarray(centre + (np.arange(count) - (count - 1) / 2) * min(0.12, 0.5 / count))


def balance_figure(arms: Arms, title: str) -> Figure:
    """Draw accuracy against load CV and against the fitness given up: what balance costs and buys.

    Parameters
    ----------
    arms : mapping of str to sequence of RunRow
        Label to the finished runs of an arm.
    title : str

    Returns
    -------
    matplotlib.figure.Figure
        Small markers are seeds, large ones their means. Above the accuracy of the global model, below that of the
        clients.
    """
    figure = new_figure(10.0, 6.6 + _legend_height(arms))
    grid = figure.subplots(2, len(_PRICES), sharex="col", sharey="row")
    for line, key in zip(grid, ("accuracy_last5", "client_accuracy_mean"), strict=True):
        for axes, price in zip(line, _PRICES, strict=True):
            for number, rows in enumerate(arms.values()):
                _cloud(axes, _values(rows, price), _values(rows, key), _marker(number))
            axes.grid(alpha=0.3)
        line[0].set_ylabel(f"accuracy, {_ENDS[key]}")
    for axes, words in zip(grid[-1], _PRICES.values(), strict=True):
        axes.set_xlabel(words)
    _legend(figure, {label: _marker(number) for number, label in enumerate(arms)})
    figure.suptitle(f"{title}\nwhat balance costs and buys; large markers are means over the seeds")
    return figure


def _cloud(axes: Axes, x: Floats, y: Floats, style: Mapping[str, Any]) -> None:
    axes.plot(x, y, markersize=4, alpha=0.45, **style)
    axes.plot(x.mean(), y.mean(), markersize=10, markeredgecolor="white", zorder=4, **style)
