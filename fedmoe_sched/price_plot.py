"""The picture of a schedule: loads within their bounds, and what one place more or less would be worth."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from fedmoe_sched.errors import InputError
from fedmoe_sched.pictures import COLOURS, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fedmoe_sched.result import Schedule

__all__ = ["plot_prices", "price_figure"]

_BLUE, _VERMILION, _GREEN = COLOURS[:3]
_GREY = "0.82"
_INCHES, _LEAST_WIDTH, _MOST_WIDTH = 0.28, 5.5, 16.0
_MOST_NAMES = 48  # experts whose names find room below the axis
_LETTER = 0.1  # inches, with the space around


def plot_prices(schedule: Schedule, path: str | os.PathLike[str]) -> None:
    """Draw the loads of the experts, their bounds and their prices into a file; see `price_figure`.

    Parameters
    ----------
    schedule : Schedule
    path : path-like
        Ends in .svg, .png or .pdf.

    Raises
    ------
    InputError
        The schedule has no assignment.
    MissingDependencyError
        matplotlib is not installed.
    """
    save_figure(price_figure(schedule), path)


def price_figure(schedule: Schedule) -> Figure:
    """Return the picture of a schedule, one column per expert.

    Above are the loads within their bounds: those at a bound have a colour. Below are the prices: positive where
    clients compete for the expert, negative where it had to be given clients. Experts stand in the order of their
    numbers.

    Parameters
    ----------
    schedule : Schedule
        With an assignment. Without prices the lower panel is left out.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    InputError
        The schedule has no assignment.
    MissingDependencyError
        matplotlib is not installed.
    """
    if schedule.pairs is None:
        msg = f"schedule: is {schedule.status}, there is no assignment to draw"
        raise InputError(msg)
    m = schedule.problem.n_experts
    width = min(max(_LEAST_WIDTH, 2.4 + _INCHES * m), _MOST_WIDTH)
    names = _names(schedule)
    longest = max(map(len, names), default=0)
    upright = _LETTER * longest > 0.8 * width / m
    room = 0.07 * longest if upright else 0.0
    if schedule.prices is None:
        figure = new_figure(width, 2.8 + room)
        panels = [figure.subplots()]
    else:
        figure = new_figure(width, 4.3 + room)
        panels = list(figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2]}))
        _draw_prices(panels[1], schedule)
    _draw_loads(panels[0], schedule)
    _name_experts(panels[-1], names, m, upright=upright)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize="small")
    return figure


def _draw_loads(axes: Axes, schedule: Schedule) -> None:
    from matplotlib.ticker import MaxNLocator

    problem, loads = schedule.problem, schedule.loads
    experts = np.arange(problem.n_experts)
    outside = (loads > problem.load_max) | (loads < problem.load_min)
    full = (loads == problem.load_max) & (problem.load_max < problem.n_clients)
    least = (loads == problem.load_min) & (problem.load_min > 0) & ~full
    top = 1.12 * max(1, int(loads.max()), int(problem.load_min.max()))
    if (problem.load_max < problem.n_clients).any():
        top = max(top, 1.12 * int(problem.load_max[problem.load_max < problem.n_clients].max()))
    high = np.minimum(problem.load_max, top)
    if problem.has_load_bounds:
        axes.bar(experts, high - problem.load_min, bottom=problem.load_min, color=_GREY, label="allowed load")
    size = max(2.0, min(7.0, 260.0 / len(experts)))
    for mask, colour, marker, label in (
        (full, _VERMILION, "^", "full"),
        (least, _BLUE, "v", "at its least"),
        (outside, "black", "X", "breaks a bound"),
        (~(full | least | outside), "black", "o", "between its bounds" if problem.has_load_bounds else "load"),
    ):
        if mask.any():
            axes.plot(experts[mask], loads[mask], marker, color=colour, markersize=size, label=label)
    axes.set_ylim(0, top)
    axes.set_ylabel("load (clients)")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _draw_prices(axes: Axes, schedule: Schedule) -> None:
    assert schedule.prices is not None
    prices = schedule.prices
    axes.bar(np.arange(len(prices)), prices, color=np.where(prices < 0, _BLUE, _VERMILION))
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("price (desirability)")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _names(schedule: Schedule) -> list[str]:
    """Return the names of the experts; none where there is no room for them."""
    problem = schedule.problem
    return (
        [str(problem.expert_name(j)) for j in range(problem.n_experts)] if problem.n_experts <= _MOST_NAMES else []
    )


def _name_experts(axes: Axes, names: list[str], n_experts: int, *, upright: bool) -> None:
    axes.set_xlim(-0.7, n_experts - 0.3)
    axes.set_xlabel("expert")
    if names:
        axes.set_xticks(range(n_experts), names, rotation=90 if upright else 0)
