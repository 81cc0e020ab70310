"""The figures of the study; needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.study.families import SINGLE
from benchmarks.study.plan import case_of
from benchmarks.study.profile import profile, share_within, solved_seconds
from fedmoe_sched.compare import Row
from fedmoe_sched.compare_plot import plot_rows
from fedmoe_sched.pictures import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["write_plots"]

_OURS = "exact"
_MARKERS = "oDs^vPX*hp<>d8"
_MOST_FACTOR = 1e4

Style = dict[str, Any]


def write_plots(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw all figures from judged rows.

    Parameters
    ----------
    rows : sequence of Row
    folder : Path

    Returns
    -------
    list of Path
        Times over sizes, performance profile, gap over time.
    """
    main = [row for row in rows if not case_of(row.instance).family.endswith(SINGLE)]
    styles = _styles(main)
    paths = [folder / name for name in ("times.svg", "profile.svg", "gap.svg")]
    save_figure(times_figure(main, styles), paths[0])
    save_figure(profile_figure(main, styles), paths[1])
    plot_rows(_rows_of_gap(main), paths[2])
    return paths


def _styles(rows: Sequence[Row]) -> dict[str, Style]:
    """Give every solver one look in all figures: ours bold, heuristics grey."""
    exact = list(dict.fromkeys(row.solver for row in rows if row.exact))
    heuristics = list(dict.fromkeys(row.solver for row in rows if not row.exact))
    styles: dict[str, Style] = {}
    if _OURS in exact:
        exact.remove(_OURS)
        styles[_OURS] = {"color": "black", "marker": "o", "linewidth": 2.4, "markersize": 6, "zorder": 5}
    for number, name in enumerate(exact, 1):
        marker = _MARKERS[number % len(_MARKERS)]
        styles[name] = {"color": f"C{number % 10}", "marker": marker, "linewidth": 1.2, "markersize": 5}
    for number, name in enumerate(heuristics):
        styles[name] = {"color": "0.6", "linestyle": [":", "--", "-."][number % 3], "linewidth": 1.0}
    return styles


def _legend(figure: Figure, styles: Mapping[str, Style]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(handles=handles, loc="outside right center", frameon=False, fontsize="small")


def times_figure(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Draw build and solve time over the number of pairs, one panel per family.

    A hollow marker is a solve that stopped at a limit, at the time it had.
    """
    families = list(dict.fromkeys(case_of(row.instance).family for row in rows))
    columns = 2
    figure = new_figure(10.5, 3.6 * math.ceil(len(families) / columns))
    panels = figure.subplots(math.ceil(len(families) / columns), columns, squeeze=False, sharex=True, sharey=True)
    for axes in panels.flat[len(families) :]:
        axes.set_visible(False)
    for axes, family in zip(panels.flat, families, strict=False):
        here = [row for row in rows if case_of(row.instance).family == family]
        for solver, style in styles.items():
            _draw_times(axes, [row for row in here if row.solver == solver], style)
        _size_axis(axes, here)
        axes.set_title(family, fontsize="medium")
    for axes in panels[:, 0]:
        axes.set_ylabel("build + solve (s)")
    _legend(figure, styles)
    return figure


def _draw_times(axes: Axes, rows: Sequence[Row], style: Style) -> None:
    rows = sorted(rows, key=lambda row: case_of(row.instance).pairs)
    done = [row for row in rows if row.seconds and not _stopped(row)]
    axes.plot([case_of(row.instance).pairs for row in done], [row.seconds or 0.0 for row in done], **style)
    for row in rows:
        seconds = _seconds_until_stop(row)
        if seconds is not None:
            hollow = {"linestyle": "", "markerfacecolor": "white", "zorder": 6}
            axes.plot(case_of(row.instance).pairs, seconds, **(style | hollow))


def _stopped(row: Row) -> bool:
    return row.exact and (row.status == "killed" or row.stop_reason == "time limit")


def _seconds_until_stop(row: Row) -> float | None:
    """Return the time after which a solve was stopped; None for one that was not."""
    if not _stopped(row):
        return None
    if row.seconds is not None:
        return row.seconds
    words = row.message.removeprefix("killed after ").split()
    return float(words[0]) if words else None


def _size_axis(axes: Axes, rows: Sequence[Row]) -> None:
    cases = sorted({case_of(row.instance) for row in rows}, key=lambda case: case.pairs)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([case.pairs for case in cases], [_short(case.n_clients, case.n_experts) for case in cases])
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize="small", labelbottom=True)
    axes.grid(alpha=0.3)


def _short(n: int, m: int) -> str:
    text = f"{n // 1_000_000}M" if n >= 1_000_000 else f"{n // 1000}k" if n >= 1000 else str(n)
    return f"{text}\nx {m}"


def profile_figure(rows: Sequence[Row], styles: Mapping[str, Style]) -> Figure:
    """Draw the performance profile of the exact solvers over all instances."""
    ratios = profile(solved_seconds(rows))
    figure = new_figure(8.5, 4.2)
    axes = figure.subplots()
    finite = [ratio for mine in ratios.values() for ratio in mine if math.isfinite(ratio)]
    most = min(_MOST_FACTOR, 2 * max(finite, default=1.0))
    for solver, style in styles.items():
        if solver not in ratios:
            continue
        steps = [1.0, *(ratio for ratio in ratios[solver] if ratio <= most), most]
        look = {key: value for key, value in style.items() if key not in {"marker", "markersize"}}
        axes.step(steps, [share_within(ratios[solver], step) for step in steps], where="post", **look)
    axes.set_xscale("log")
    axes.set(xlim=(1, most), ylim=(-0.02, 1.02))
    axes.set_xlabel("factor of the fastest solver's time")
    axes.set_ylabel("share of the instances\nsolved to proven optimality")
    axes.grid(alpha=0.3)
    _legend(figure, {name: style | {"marker": ""} for name, style in styles.items() if name in ratios})
    return figure


def _rows_of_gap(rows: Sequence[Row]) -> list[Row]:
    """Choose the contended families at the largest size that most solvers still finish: up to 10,000 clients."""
    chosen: list[Row] = []
    for family in ("clustered", "tied", "trained"):
        here = [row for row in rows if case_of(row.instance).family == family]
        sizes = sorted({case_of(row.instance) for row in here}, key=lambda case: case.pairs)
        middle = [case for case in sizes if case.n_clients <= 10_000][-1:]
        chosen += [row for row in here if case_of(row.instance) in middle]
    return chosen


def oscillation_figure(series: Mapping[tuple[str, str], Sequence[float]], bound: float) -> Figure:
    """Draw the largest load over the mean load, round by round.

    Parameters
    ----------
    series : mapping of (family, rule) to one number per round
    bound : float
        Upper load bound over the mean load.
    """
    families = list(dict.fromkeys(family for family, _ in series))
    figure = new_figure(4.4 * len(families) + 1.6, 3.6)
    panels = figure.subplots(1, len(families), squeeze=False, sharey=True)[0]
    rules = list(dict.fromkeys(rule for _, rule in series))
    looks = {
        rule: {"color": "black", "linewidth": 2.4} if number == len(rules) - 1 else {"color": f"C{number}"}
        for number, rule in enumerate(rules)
    }
    for axes, family in zip(panels, families, strict=True):
        for rule in rules:
            values = series[family, rule]
            axes.plot(np.arange(1, len(values) + 1), values, **looks[rule])
        axes.axhline(bound, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_yscale("log")
        ticks = [1, 2, 5, 10, 20]
        axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set(title=family, xlabel="round")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("largest load / mean load")
    _legend(figure, looks)
    return figure
