"""Figures of training runs: accuracy, load per expert, client x expert heat maps; needs the `plot` extra."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.runs import Run, read_run
from fedmoe_sched.pictures import COLOURS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DASHES",
    "accuracy_figure",
    "heat_map_figure",
    "load_figure",
    "run_labels",
    "save_figures",
    "whole_numbers",
]

Floats: TypeAlias = npt.NDArray[np.floating[Any]]
Values: TypeAlias = Literal["fitness", "training"]

_PANEL = 4.2  # inches
_PER_ROW = 4  # panels
_TITLE = 40  # letters per line
DASHES = ("-", "--", "-.", ":")


def save_figures(
    run_dirs: Sequence[str | PathLike[str]],
    out_dir: str | PathLike[str],
    *,
    formats: Sequence[str] = ("png",),
    target: float | None = None,
) -> list[Path]:
    """Draw all figures of one or several runs, side by side.

    Parameters
    ----------
    run_dirs : sequence of path
        Run folders.
    out_dir : path
        Made where it does not exist.
    formats : sequence of str
        File name suffixes that matplotlib knows: ``png``, ``pdf``, ``svg``.
    target : float, optional
        Accuracy to mark in the first figure.

    Returns
    -------
    list of Path
        ``accuracy``, ``load``, ``fitness`` and ``training``, in every format.

    Raises
    ------
    InputError
        No run, or a folder that holds none.
    MissingDependencyError
        matplotlib is not installed.
    """
    runs = [read_run(folder) for folder in run_dirs]
    figures = {
        "accuracy": accuracy_figure(runs, target=target),
        "load": load_figure(runs),
        "fitness": heat_map_figure(runs, "fitness"),
        "training": heat_map_figure(runs, "training"),
    }
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        for suffix in formats:
            paths.append(out / f"{name}.{suffix}")
            save_figure(figure, paths[-1], dpi=150)
    return paths


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Name runs by their policy; by their folder too where policies repeat."""
    policies = [run.policy for run in runs]
    return [
        run.policy if policies.count(run.policy) == 1 else f"{run.policy} ({run.path.resolve().name})"
        for run in runs
    ]


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side, in rows of the same length as far as they go."""
    rows = math.ceil(count / _PER_ROW)
    columns = math.ceil(count / rows)
    figure = new_figure(_PANEL * columns + 1.2, height * rows + 0.4)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def _label_rows(panels: Sequence[Axes], text: str) -> None:
    """Label the y axis of the first panel of every row."""
    for axes in panels:
        spec = axes.get_subplotspec()
        if spec is not None and spec.is_first_col():
            axes.set_ylabel(text)


def _colour_bar(figure: Figure, panels: Sequence[Axes], image: Any, words: str) -> None:
    """Put a colour bar of the same width beside any number of panels."""
    figure.colorbar(image, ax=panels, label=words, fraction=0.15 / min(len(panels), _PER_ROW))


def _titles(runs: Sequence[Run], labels: Sequence[str] | None) -> list[str]:
    return [textwrap.fill(label, _TITLE) for label in (run_labels(runs) if labels is None else labels)]


def _refuse_no_runs(runs: Sequence[Run]) -> None:
    if not runs:
        msg = "runs: there is none to draw"
        raise InputError(msg)


def accuracy_figure(runs: Sequence[Run], *, target: float | None = None) -> Figure:
    """Draw accuracy over rounds: of the global model, and of the clients with their experts.

    Parameters
    ----------
    runs : sequence of Run
    target : float, optional
        Accuracy to mark.

    Returns
    -------
    matplotlib.figure.Figure
    """
    _refuse_no_runs(runs)
    figure = new_figure(2 * _PANEL + 3.0, _PANEL)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
        rounds = run.series("round")
        left.plot(rounds, run.series("accuracy"), label=f"{label}: {run.records[-1]['accuracy']:.1%}", **style)
        right.plot(rounds, run.series("client_accuracy_mean"), label=f"{label}: mean", **style)
        worst = run.series("client_accuracy_worst_decile")
        right.plot(rounds, worst, label=f"{label}: worst decile", alpha=0.45, **style)
    if target is not None:
        left.axhline(target, color="0.5", linewidth=0.8, label=f"target {target:.0%}")
    left.set(title="Global model, whole test set", ylabel="accuracy", ylim=(0, 1.02))
    right.set(title="Clients: own experts, own class mix")
    for axes in (left, right):
        axes.set_xlabel("round")
        axes.grid(alpha=0.3)
        whole_numbers(axes)
    left.legend(loc="lower right", fontsize="small")
    # The worst clients' lines fill the whole panel: no legend on top of them.
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small")
    figure.suptitle(f"Accuracy over rounds ({_data_name(runs[0])})")
    return figure


def load_figure(runs: Sequence[Run], *, labels: Sequence[str] | None = None) -> Figure:
    """Draw the load of every expert over the rounds, one panel per run.

    Parameters
    ----------
    runs : sequence of Run
    labels : sequence of str, optional
        Titles of the panels, instead of `run_labels`.

    Returns
    -------
    matplotlib.figure.Figure
        Experts by rounds, colour is the number of clients.
    """
    _refuse_no_runs(runs)
    loads = [run.series("loads").T for run in runs]
    figure, panels = _panels(len(runs), 3.0)
    most = max(float(np.nanmax(load)) for load in loads)
    image: Any = None
    for axes, run, load, label in zip(panels, runs, loads, _titles(runs, labels), strict=True):
        rounds = load.shape[1]
        image = axes.imshow(
            load,
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            cmap="viridis",
            vmin=0,
            vmax=most,
            extent=(0.5, rounds + 0.5, -0.5, run.n_experts - 0.5),
        )
        spread = float(np.nanmean(run.series("load_cv")))
        axes.set(title=f"{label}\nmean load CV {spread:.2f}{_jain_text(run)}", xlabel="round")
        whole_numbers(axes)
    _label_rows(panels, "expert")
    _colour_bar(figure, panels, image, "load (clients)")
    figure.suptitle("Load per expert over rounds")
    return figure


def _jain_text(run: Run) -> str:
    """Name Jain's indices over all rounds, where the run has them."""
    indices = (("clients", run.records[-1].get("client_jain")), ("experts", run.expert_jain()))
    known = [f"{value:.2f} {over}" for over, value in indices if value is not None]
    return f"\nJain {', '.join(known)}" if known else ""


def heat_map_figure(
    runs: Sequence[Run], values: Values = "fitness", *, labels: Sequence[str] | None = None
) -> Figure:
    """Draw the client x expert heat map, as in figure 3 of Chen et al. 2025 (arXiv 2507.05685).

    Parameters
    ----------
    runs : sequence of Run
        One panel each.
    values : {"fitness", "training"}
        Fitness after the last round, or the share of the rounds in which the client trained the expert.
    labels : sequence of str, optional
        Titles of the panels, instead of `run_labels`.

    Returns
    -------
    matplotlib.figure.Figure
        Clients with alike data are neighbours; lines part the groups. Experts are in an order that puts those of
        the first groups first, which is free since their numbers mean nothing.

    Raises
    ------
    InputError
        No run, or other `values`.
    """
    _refuse_no_runs(runs)
    if values not in ("fitness", "training"):
        msg = f"values = {values!r}: must be 'fitness' or 'training'"
        raise InputError(msg)
    tables = [_table(run, values) for run in runs]
    known = [table[np.isfinite(table)] for table in tables]
    top = max((float(k.max()) for k in known if len(k)), default=1.0)
    bottom = min(0.0, *(float(k.min()) for k in known if len(k))) if any(len(k) for k in known) else 0.0
    figure, panels = _panels(len(runs), 4.8)
    image: Any = None
    for axes, run, table, label in zip(panels, runs, tables, _titles(runs, labels), strict=True):
        clients = np.argsort(run.groups, kind="stable")
        experts = _expert_order(table[clients])
        image = axes.imshow(
            table[np.ix_(clients, experts)],
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmin=bottom,
            vmax=max(top, bottom + 1e-9),
        )
        _mark_groups(axes, run.groups[clients])
        axes.set(title=label, xlabel="expert")
        axes.set_xticks(range(len(experts)) if len(experts) <= 20 else [])
        if len(experts) <= 20:
            axes.set_xticklabels([str(j) for j in experts])
    _label_rows(panels, f"client group ({_group_name(runs[0])})")
    words = "fitness after the last round" if values == "fitness" else "share of rounds trained"
    _colour_bar(figure, panels, image, words)
    figure.suptitle(f"Client x expert: {words}")
    return figure


def _table(run: Run, values: Values) -> Floats:
    if values == "fitness":
        return np.asarray(run.schedule_arrays("fitness")[-1], dtype=np.float64)
    return np.asarray(run.schedule_arrays("assignment").mean(axis=0), dtype=np.float64)


def _expert_order(table: Floats) -> npt.NDArray[np.int64]:
    """Order experts by where, from top to bottom, the clients are that have most of them."""
    weights = np.nan_to_num(table)
    weights = np.maximum(weights - weights.mean(axis=1, keepdims=True), 0) ** 2
    total = weights.sum(axis=0)
    rows = np.arange(len(table), dtype=np.float64)[:, None]
    centre = np.where(total > 0, (weights * rows).sum(axis=0) / np.maximum(total, 1e-300), np.inf)
    return np.argsort(centre, kind="stable")


def _mark_groups(axes: Axes, groups: npt.NDArray[np.int64]) -> None:
    """Label each group once, at its middle, and draw lines between groups."""
    starts = np.flatnonzero(np.r_[True, groups[1:] != groups[:-1]])
    ends = np.r_[starts[1:], len(groups)]
    for start in starts[1:]:
        axes.axhline(start - 0.5, color="white", linewidth=1.0)
    axes.set_yticks((starts + ends - 1) / 2)
    axes.set_yticklabels([str(groups[start]) for start in starts])


def _group_name(run: Run) -> str:
    return "domain" if run.config["clients"]["split"] == "domains" else "most frequent class"


def _data_name(run: Run) -> str:
    clients = run.config["clients"]
    return f"{run.config['data']['name']}, {clients['count']} clients, split: {clients['split']}"


def whole_numbers(axes: Axes) -> None:
    """Let the ticks of rounds and experts be whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not axes.get_ylabel() and axes.images:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
