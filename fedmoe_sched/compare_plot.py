"""The optimality-versus-speed plot of a comparison; needs matplotlib."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedmoe_sched.compare import Row
from fedmoe_sched.errors import InputError
from fedmoe_sched.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_rows"]

_MARKERS = "oDs^vPX*hp<>"
_LEAST_GAP = 1e-4  # percent: below it the axis is linear, so that 0 has a place on it
_LEAST_SECONDS = 1e-7
_MOST_GAP = 1e3  # percent: what is worse is drawn here


def plot_rows(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Draw gap (percent, 0 at the bottom) against build and solve time, one panel per instance.

    Answers that break a constraint have no gap: they are hollow, in a strip of their own above the axis. Backends
    that do not take the problem or have no answer are named below the panel.

    Parameters
    ----------
    rows : sequence of Row
        As `fedmoe_sched.compare.compare` returns them.
    path : path-like
        Ends in .svg, .png or .pdf.

    Raises
    ------
    InputError
        No row has a time to draw.
    MissingDependencyError
        matplotlib is not installed.
    """
    drawn = [row for row in rows if row.seconds is not None and row.objective is not None]
    if not drawn:
        msg = "rows: none has an answer to draw"
        raise InputError(msg)
    styles = _styles([row.solver for row in drawn])
    instances = list(dict.fromkeys(row.instance for row in rows))
    figure = new_figure(1.6 + 3.4 * len(instances), 3.6)
    grid = figure.subplots(
        2,
        len(instances),
        squeeze=False,
        sharex="col",
        sharey="row",
        gridspec_kw={"height_ratios": [1, 6], "hspace": 0.02},
    )
    for column, instance in enumerate(instances):
        strip, axes = grid[:, column]
        here = [row for row in drawn if row.instance == instance]
        _panel(axes, [row for row in here if not row.violations], styles)
        _strip(strip, [row for row in here if row.violations], styles)
        strip.set_title(instance, fontsize="medium")
        _time_axis(axes, [row.seconds for row in here if row.seconds is not None])
        absent = _absent([row for row in rows if row.instance == instance and row not in here])
        axes.set_xlabel("\n".join(["build + solve (s)", *absent]))
    grid[1, 0].set_ylabel("gap to the best bound (%)")
    grid[0, 0].set_ylabel("breaks\nbounds", rotation=0, ha="right", va="center", fontsize="small")
    _legend(figure, styles)
    save_figure(figure, path)


def _styles(solvers: Sequence[str]) -> dict[str, dict[str, Any]]:
    names = list(dict.fromkeys(solvers))
    return {
        name: {"color": f"C{number % 10}", "marker": _MARKERS[number % len(_MARKERS)]}
        for number, name in enumerate(names)
    }


def _panel(axes: Axes, rows: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    for row in rows:
        if row.gap is not None and row.seconds is not None:
            percent = min(max(0.0, 100 * row.gap), _MOST_GAP)
            axes.plot(row.seconds, percent, linestyle="", markersize=8, **styles[row.solver])
    axes.set_yscale("symlog", linthresh=_LEAST_GAP)
    ticks = [0, 1e-3, 1e-2, 0.1, 1, 10, 100, _MOST_GAP]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_ylim(-0.5 * _LEAST_GAP, 2.5 * _MOST_GAP)
    axes.grid(alpha=0.3)


def _time_axis(axes: Axes, seconds: Sequence[float]) -> None:
    axes.set_xscale("log")
    # A decade at least, so that there are a few round numbers on the axis: 1, 2, 5 where it is short.
    low, high = max(min(seconds, default=1.0), _LEAST_SECONDS), max(seconds, default=1.0)
    margin = max(1.3, (10 * low / high) ** 0.5)
    axes.set_xlim(low / margin, high * margin)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    few = high * margin**2 < 100 * low
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if few and f"{value:e}"[0] in "25" else "")


def _absent(rows: list[Row]) -> list[str]:
    """Return lines that name the backends of rows without a point."""
    refused = [row.solver for row in rows if row.status == "refused"]
    silent = [row.solver for row in rows if row.status != "refused"]
    parts = [("does not take it: ", refused), ("no answer: ", silent)]
    return [
        textwrap.fill(head + ", ".join(solvers), 40, break_on_hyphens=False) for head, solvers in parts if solvers
    ]


def _strip(axes: Axes, rows: list[Row], styles: dict[str, dict[str, Any]]) -> None:
    for row in rows:
        axes.plot(row.seconds or 0.0, 0, linestyle="", markersize=8, fillstyle="none", **styles[row.solver])
    axes.set_yticks([])
    axes.tick_params(axis="x", length=0, which="both")
    axes.grid(alpha=0.3)


def _legend(figure: Any, styles: dict[str, dict[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linestyle="", label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize="small")
