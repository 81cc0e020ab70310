"""The picture of a schedule: what is at a bound, and prices."""

from __future__ import annotations

import numpy as np
import pytest

from fedmoe_sched import AssignmentProblem, InputError, solve
from fedmoe_sched.instances import clustered

pytest.importorskip("matplotlib")

from fedmoe_sched.price_plot import plot_prices, price_figure

# Expert a is full, b must be given a client, c is in between, nobody asks for d.
SCORES = [[9.0, 0, 1, -1], [8, 0, 2, -1], [7, 1, 3, -1], [6, 1, 3, -1]]


@pytest.fixture
def answer():
    labels = ["attention", "b", "c", "d"]
    bounds = {"load_min": [0, 1, 0, 0], "load_max": [2, 3, 3, 3]}
    return solve(AssignmentProblem(SCORES, 1, min_experts=1, expert_labels=labels, **bounds))


def drawn(axes):
    """Return {label: [(expert, load), ...]} of the markers."""
    return {str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_experts_at_a_bound_are_marked(answer):
    assert answer.loads.tolist() == [2, 1, 1, 0]
    above, below = price_figure(answer).axes
    assert drawn(above) == {
        "full": [(0, 2)],
        "at its least": [(1, 1)],
        "between its bounds": [(2, 1), (3, 0)],
    }
    heights = [bar.get_height() for bar in below.patches]
    assert heights == pytest.approx(answer.prices.tolist())
    assert [label.get_text() for label in below.get_xticklabels()] == ["attention", "b", "c", "d"]


def test_broken_bounds_are_marked_and_prices_left_out_where_there_are_none():
    answer = solve(AssignmentProblem(SCORES, 1, min_experts=1, load_max=3), "greedy")
    [axes] = price_figure(answer).axes
    assert drawn(axes)["breaks a bound"] == [(0, 4)]


def test_without_bounds_there_are_loads_alone():
    [above, _] = price_figure(solve(AssignmentProblem(SCORES, 1), "lp-scipy")).axes
    assert list(drawn(above)) == ["load"]


def test_hundreds_of_experts_have_numbers_instead_of_names(tmp_path):
    answer = solve(clustered(400, 200, seed=1))
    figure = price_figure(answer)
    assert figure.get_figwidth() <= 16
    for name in ("one.svg", "two.svg"):
        plot_prices(answer, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_no_assignment_is_an_error(tmp_path):
    answer = solve(AssignmentProblem(np.ones((2, 2)), 1, load_min=2))
    with pytest.raises(InputError, match="schedule: is infeasible, there is no assignment to draw"):
        plot_prices(answer, tmp_path / "p.svg")
