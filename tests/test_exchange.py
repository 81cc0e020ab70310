"""Polishing reaches the optimum from anywhere, and its prices prove it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import TOLERANCE, assert_prices_prove, brute_force, clustered, enumerate_assignments, tiny_problems

from fedmoe_sched import AssignmentProblem, LoadPenalty, certify, dual_bound
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import objective
from fedmoe_sched.exchange import polish, recover_prices


def feasible_masks(problem: AssignmentProblem) -> list[np.ndarray]:
    """Every assignment of a tiny problem that keeps all bounds."""
    _, loads, choices = enumerate_assignments(problem)
    fits = ((loads >= problem.load_min) & (loads <= problem.load_max)).all(axis=1)
    masks = []
    for at in np.flatnonzero(fits):
        mask = np.zeros(problem.shape, dtype=bool)
        picks = np.unravel_index(at, [len(options) for options in choices])
        for i, k in enumerate(picks):
            mask[i, list(choices[i][int(k)])] = True
        masks.append(mask)
    return masks


@given(problem=st.one_of(tiny_problems(), tiny_problems(penalised=True)), data=st.data())
def test_polish_reaches_the_optimum_from_any_feasible_assignment(problem, data):
    masks = feasible_masks(problem)
    if not masks:
        return
    start = masks[data.draw(st.integers(0, len(masks) - 1))]
    polished = polish(problem, Assignment.from_mask(start))
    proof = certify(problem, polished.assignment, polished.prices)
    assert proof.feasible
    assert proof.objective == pytest.approx(brute_force(problem), abs=TOLERANCE)
    assert proof.optimal
    assert_prices_prove(problem, polished.assignment.mask(), polished.prices, 1e-7)
    improved = proof.objective > objective(problem, Assignment.from_mask(start)) + TOLERANCE
    assert polished.cycles > 0 or not improved


def scattered(problem: AssignmentProblem, seed: int) -> Assignment:
    """Make a feasible but poor assignment: the optimum for random scores, whatever the loads cost."""
    from fedmoe_sched import solve

    noise = np.random.default_rng(seed).random(problem.shape)
    return solve(problem.replace(desirability=noise, load_penalty=None), "flow-ortools").pairs


PENALTIES = {
    "no penalty": None,
    "quadratic": LoadPenalty.quadratic(0.02, [0, 10, 20, 0, -5, 3]),
    "steps": LoadPenalty.from_marginals([[0.0] * 15 + [0.1] * 5 + [0.3]] * 6),
}


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("decimals", [None, 1])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_polish_reaches_the_optimum_from_far_away(fill, decimals, penalty):
    problem = clustered(80, 6, seed=1, fill=fill, decimals=decimals).replace(load_penalty=PENALTIES[penalty])
    polished = polish(problem, scattered(problem, 0))
    assert polished.cycles > 10
    assert certify(problem, polished.assignment, polished.prices).optimal
    assert_prices_prove(problem, polished.assignment.mask(), polished.prices, 1e-9)


def test_a_penalty_that_nobody_pays_does_not_blur_the_scores():
    """The third client of an expert costs 1e12: what rounding that number loses is no excuse for a lost 1e-6."""
    scores = np.array([[1.0, 0.5], [1.0 + 1e-6, 0.5], [0.9, 0.4], [0.9, 0.4 + 1e-6]])
    wall = LoadPenalty.from_marginals([[0.0, 0.0, 1e12]] * 2)
    problem = AssignmentProblem(scores, 1, min_experts=1, load_penalty=wall)
    start = Assignment.from_pairs([0, 1, 2, 3], [0, 1, 0, 1], problem.shape)
    polished = polish(problem, start)
    proof = certify(problem, polished.assignment, polished.prices)
    assert proof.objective == pytest.approx(brute_force(problem), abs=1e-12)
    assert proof.optimal


def test_loads_fall_back_where_their_penalty_exceeds_what_clients_gain():
    problem = AssignmentProblem(np.ones((6, 1)), 1, load_penalty=LoadPenalty.quadratic(0.45, n_experts=1))
    everybody = Assignment.from_pairs(np.arange(6), np.zeros(6, dtype=int), (6, 1))
    polished = polish(problem, everybody)
    assert polished.assignment.loads.tolist() == [2]  # the third would cost 1.125
    assert polished.cycles == 4
    assert certify(problem, polished.assignment, polished.prices).optimal


def test_optimal_assignment_is_returned_as_it_is():
    problem = clustered(40, 5, seed=2)
    best = polish(problem, scattered(problem, 0)).assignment
    again = polish(problem, best)
    assert again.cycles == 0
    assert again.assignment is best


def test_recovered_prices_prove_the_optimum_of_a_nearly_optimal_assignment():
    problem = clustered(40, 5, seed=3)
    start = scattered(problem, 0)
    best = polish(problem, start)
    prices = recover_prices(problem, start)
    bound = objective(problem, best.assignment)
    assert dual_bound(problem, prices) == pytest.approx(bound, rel=1e-12)


def test_scores_of_any_magnitude():
    problem = clustered(40, 5, seed=5)
    start = scattered(problem, 0)
    plain = polish(problem, start)
    for scale in (1e-150, 1e150):
        scaled = polish(problem.replace(desirability=problem.desirability * scale), start)
        np.testing.assert_array_equal(scaled.assignment.mask(), plain.assignment.mask())
        np.testing.assert_allclose(scaled.prices / scale, plain.prices, rtol=1e-9, atol=1e-12)
