"""Soft mode: the least relaxation is that of brute force, keeps what is hard, and its prices are gains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import brute_force, tiny_problems
from test_feasibility import grouped, least_widening_by_linear_program

from fedmoe_sched import AssignmentProblem, ExpertLayers, InputError, ResourceBudget, Status, schedule, solve
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.relax import priced, relax

KINDS = ("min_experts", "load_min", "load_max")


def least_cost(problem: AssignmentProblem, weights: dict[str, int]) -> float | None:
    """Weigh what every subset of the eligible pairs lacks or exceeds; None if none keeps what is hard."""
    n, m = problem.shape
    open_ = np.ones((n, m), bool) if problem.eligible is None else problem.eligible
    options = [
        [row for row in itertools.product((0, 1), repeat=m) if not (np.array(row) > open_[i]).any()]
        for i in range(n)
    ]
    chosen = np.array(list(itertools.product(*options))).reshape(-1, n, m)
    counts, loads = chosen.sum(axis=2), chosen.sum(axis=1)
    missing = {
        "min_experts": problem.min_experts - counts,
        "load_min": problem.load_min - loads,
        "load_max": loads - problem.load_max,
        "capacity": counts - problem.capacity,
    }
    cost = np.zeros(len(chosen))
    for kind, short in missing.items():
        total = np.maximum(short, 0).sum(axis=1)
        cost += np.where(total > 0, total * weights.get(kind, np.inf), 0) if kind in weights else np.where(
            total > 0, np.inf, 0
        )  # fmt: skip
    return None if np.isinf(cost.min()) else float(cost.min())


@settings(deadline=None, max_examples=60)
@given(
    problem=tiny_problems().filter(lambda p: p.n_clients * p.n_experts <= 12),
    weights=st.dictionaries(st.sampled_from([*KINDS, "capacity"]), st.integers(1, 3)),
)
def test_relaxation_is_least(problem, weights):
    least = least_cost(problem, weights)
    widened, relaxed = relax(problem, weights)
    if least is None:
        assert (widened, relaxed) == (problem, ())
        assert brute_force(problem) is None
        return
    assert brute_force(widened) is not None
    assert sum(weights[one.bound] * abs(one.used - one.asked) for one in relaxed) == least
    assert (widened is problem) == (least == 0)
    for one in relaxed:
        number = one.expert if one.client is None else one.client
        assert one.asked == getattr(problem, one.bound)[number]
        assert one.used == getattr(widened, one.bound)[number]


def test_relaxation_of_many_clients_is_that_of_a_linear_program():
    relaxed_ones = 0
    for seed in range(24):
        problem = grouped(seed)
        widened, relaxed = relax(problem, {"load_min": 1, "load_max": 1})
        total = sum(abs(one.used - one.asked) for one in relaxed)
        assert total == pytest.approx(least_widening_by_linear_program(problem), abs=1e-6)
        assert find_conflict(widened) is None
        relaxed_ones += total > 0
    assert relaxed_ones >= 3


@settings(deadline=None, max_examples=40)
@given(problem=tiny_problems())
def test_prices_are_what_one_more_place_gains(problem):
    widened, relaxed = relax(problem)
    answer = solve(widened, "flow-networkx")
    for one in priced(answer, relaxed):
        bound = getattr(widened, one.bound).copy()
        number = one.expert if one.client is None else one.client
        bound[number] += 1 if one.used > one.asked else -1
        if (bound < 0).any():
            assert one.price == 0
            continue
        gain = brute_force(widened.replace(**{one.bound: bound})) - brute_force(widened)
        assert one.price == pytest.approx(gain, abs=1e-6)


def test_demands_beyond_all_measure_are_lowered_to_what_there_is():
    problem = AssignmentProblem(
        np.zeros((3, 2)), 2**53, min_experts=[2**53, 2**52, 1], load_min=2**53, load_max=2**53
    )
    widened, relaxed = relax(problem)
    assert widened.min_experts.tolist() == [2, 2, 1]
    assert widened.load_min.tolist() == [3, 3]
    assert len(relaxed) == 4
    assert relax(problem, {"load_min": 1}) == (problem, ())


def test_soft_schedule_by_hand():
    """Three clients must train one expert each, there are two places: one more at expert 1 is worth 0.2 more."""
    rows = [[0.9, 0.1], [0.8, 0.7], [0.7, 0.6]]
    options = {"load_max": [1, 1], "load_min": [0, 0], "balance": None, "usage_weight": 0}
    assert schedule(rows, [0, 0], 1, **options).status is Status.INFEASIBLE
    answer = schedule(rows, [0, 0], 1, soft=True, **options)
    assert answer.status is Status.OPTIMAL
    assert len(answer.relaxed) == 1
    (one,) = answer.relaxed
    assert abs(one.used - one.asked) == 1
    assert one.price is not None
    assert f"one more place is worth {one.price:.6g}" in str(one)
    kept = schedule(rows, [0, 0], 1, soft=True, balance=None)
    assert kept.relaxed == ()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"budget": 1.0}, "weights: no bound called 'budget'"),
        ({"load_min": 0.0}, r"weights\['load_min'\] = 0.0: must be finite and > 0"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        relax(AssignmentProblem([[1.0]], 1), weights)


def test_layers_are_refused():
    problem = AssignmentProblem([[1.0]], 1, layers=ExpertLayers([0]))
    with pytest.raises(InputError, match="problem: has layers"):
        relax(problem)


def test_budgets_are_refused():
    problem = AssignmentProblem([[1.0]], 1, budgets=[ResourceBudget("memory", [1.0], [1.0])])
    with pytest.raises(InputError, match="problem: has budgets"):
        relax(problem)
