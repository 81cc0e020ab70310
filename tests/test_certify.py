"""The certificate is right, and every one of its checks can fail."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import TOLERANCE, brute_force, clustered, enumerate_assignments, penalty_table, tiny_problems

from fedmoe_sched import AssignmentProblem, InputError, LoadPenalty, Schedule, certify, dual_bound, solve
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import Violation, objective, violations

# Three clients, two experts, one slot each, at most two clients per expert. The first expert is better for all,
# by 4, 2 and 1: the third client has to leave it, for a total of 5 + 3 + 1. One more place there is worth 1.
SCORES = [[5.0, 1.0], [3.0, 1.0], [2.0, 1.0]]
BY_HAND = AssignmentProblem(SCORES, 1, min_experts=1, load_max=2)
BEST = Assignment.from_pairs([0, 1, 2], [0, 0, 1], (3, 2))

# The same without load bounds, but half the square of each load to pay: the k-th client of one costs k - 1/2.
# Two clients at the first expert and one at the second pay 2 + 0.5. A third at the first expert would gain 1 there
# and pay 2.5 in the place of 0.5. Prices lie between what the last client pays and what the next one would.
PENALISED = AssignmentProblem(SCORES, 1, min_experts=1, load_penalty=LoadPenalty.quadratic(1.0, n_experts=2))
ANY_PROBLEM = st.one_of(tiny_problems(), tiny_problems(penalised=True))


def test_by_hand_example_is_certified():
    proof = certify(BY_HAND, BEST, [1.0, 0.0])
    assert proof.objective == 9.0
    assert proof.bound == 9.0
    assert proof.gap == 0.0
    assert proof.violations == ()
    assert proof.optimal


def test_by_hand_example_with_a_penalty_is_certified():
    proof = certify(PENALISED, BEST, [1.5, 0.5])
    assert proof.objective == 9.0 - 2.5
    assert proof.bound == 6.5
    assert proof.optimal


@pytest.mark.parametrize("prices", [[0.0, 0.0], [3.5, 0.5], [1.5, 2.5], [1.4, 0.4], [-9.0, 0.5], [1e6, 1e6]])
def test_wrong_prices_prove_nothing_with_a_penalty(prices):
    proof = certify(PENALISED, BEST, prices)
    assert proof.bound > 6.5
    assert not proof.optimal


def test_without_the_penalty_the_same_claim_is_wrong():
    """A check that the penalty is in the objective and in the bound, not in one of them only."""
    free = PENALISED.replace(load_penalty=None)
    proof = certify(free, BEST, [1.5, 0.5])
    assert (proof.objective, proof.optimal) == (9.0, False)
    dearer = PENALISED.replace(load_penalty=LoadPenalty.quadratic(2.0, n_experts=2))
    proof = certify(dearer, BEST, [1.5, 0.5])
    assert (proof.objective, proof.optimal) == (4.0, False)


def test_a_penalty_of_zero_changes_nothing_in_the_bound():
    problem = clustered(30, 4, seed=3)
    free = problem.replace(load_penalty=LoadPenalty.quadratic(0.0, n_experts=4))
    prices = np.array([0.3, -0.2, 0.0, 1.1])
    assert dual_bound(free, prices) == pytest.approx(dual_bound(problem, prices), rel=1e-14)


def test_bound_with_a_penalty_has_no_use_for_more_places_than_clients():
    endless = PENALISED.replace(load_max=2**53)
    assert dual_bound(endless, [40.0, 40.0]) == pytest.approx(dual_bound(PENALISED, [40.0, 40.0]), rel=1e-14)


def test_bound_of_a_lower_bound_beyond_the_number_of_clients_is_no_error():
    assert np.isfinite(dual_bound(PENALISED.replace(load_min=7, load_max=9), [1.0, 0.0]))


@given(problem=ANY_PROBLEM, prices=st.lists(st.floats(-3, 3), min_size=4, max_size=4))
def test_dual_bound_is_never_below_the_optimum(problem, prices):
    optimum = brute_force(problem)
    if optimum is not None:
        assert dual_bound(problem, prices[: problem.n_experts]) >= optimum - TOLERANCE


@given(problem=ANY_PROBLEM)
def test_objective_and_violations_match_plain_counting(problem):
    """Over all assignments that keep the clients' bounds, only the load bounds may be reported."""
    values, loads, choices = enumerate_assignments(problem)
    for at in range(0, len(values), max(1, len(values) // 7)):
        picks = np.unravel_index(at, [len(options) for options in choices])
        chosen = [options[int(k)] for options, k in zip(choices, picks, strict=True)]
        pairs = [(i, j) for i, subset in enumerate(chosen) for j in subset]
        clients, experts = np.array(pairs, dtype=int).reshape(-1, 2).T
        assignment = Assignment.from_pairs(clients, experts, problem.shape)
        paid = penalty_table(problem, problem.n_clients)[np.arange(problem.n_experts), loads[at]].sum()
        assert objective(problem, assignment) == pytest.approx(values[at] - paid, abs=TOLERANCE)
        np.testing.assert_array_equal(assignment.loads, loads[at])
        found = {(v.constraint, v.position[0]) for v in violations(problem, assignment)}
        expected = {("load_max", j) for j in np.flatnonzero(loads[at] > problem.load_max)}
        expected |= {("load_min", j) for j in np.flatnonzero(loads[at] < problem.load_min)}
        assert found == expected


@pytest.mark.parametrize("prices", [[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [0.0, 1.0], [40.0, 0.0]])
def test_wrong_prices_give_a_weaker_bound_and_no_proof(prices):
    proof = certify(BY_HAND, BEST, prices)
    assert proof.bound > 9.0
    assert proof.gap == pytest.approx((proof.bound - 9.0) / 9.0)
    assert not proof.optimal


def test_pairs_are_the_same_however_they_are_asked_for():
    mask = np.random.default_rng(0).random((60, 5)) < 0.3
    mask[:2] = mask[30] = mask[-1] = False  # clients with nothing, at the ends too
    whole = Assignment.from_mask(mask)
    parts = Assignment.from_mask_blocks((mask[start : start + 7] for start in range(0, 60, 7)), 5)
    for one in (whole, parts):
        np.testing.assert_array_equal(one.mask(), mask)
        np.testing.assert_array_equal(one.counts, mask.sum(axis=1))
        for expert in range(5):
            np.testing.assert_array_equal(one.clients_of(expert), np.flatnonzero(mask[:, expert]))
        for block in (slice(0, 60), slice(28, 33), slice(59, 60)):
            rows, experts = one.pairs_of(block)
            np.testing.assert_array_equal(np.stack([rows, experts]), np.nonzero(mask[block]))
    assert Assignment.from_mask_blocks([], 5).n_clients == 0


def test_without_prices_nothing_is_proved():
    proof = certify(BY_HAND, BEST)
    assert proof.feasible
    assert proof.bound is None
    assert proof.gap is None
    assert not proof.optimal


@pytest.mark.parametrize("prices", [[1.0], [1.0, np.nan], [np.inf, 0.0]])
def test_prices_that_are_none_are_refused(prices):
    with pytest.raises(InputError, match="prices"):
        dual_bound(BY_HAND, prices)


def test_worse_assignment_is_not_optimal():
    worse = Assignment.from_pairs([0, 1, 2], [0, 1, 0], (3, 2))
    proof = certify(BY_HAND, worse, [1.0, 0.0])
    assert proof.objective == 8.0
    assert proof.gap == pytest.approx(1 / 8)
    assert proof.feasible
    assert not proof.optimal


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([(0, 0), (0, 1), (1, 0), (2, 1)], Violation("capacity", (0,), 2, 1)),
        ([(0, 0), (1, 0)], Violation("min_experts", (2,), 0, 1)),
        ([(0, 0), (1, 0), (2, 0)], Violation("load_max", (0,), 3, 2)),
    ],
)
def test_each_broken_constraint_is_found(pairs, expected):
    clients, experts = zip(*pairs, strict=True)
    proof = certify(BY_HAND, Assignment.from_pairs(clients, experts, (3, 2)), [1.0, 0.0])
    assert expected in proof.violations
    assert not proof.feasible
    assert not proof.optimal
    assert str(expected.limit) in str(expected)


def test_broken_load_min_and_eligibility_are_found():
    problem = BY_HAND.replace(load_min=[0, 2], eligible=[[True, True], [False, True], [True, True]])
    found = violations(problem, BEST)
    assert Violation("load_min", (1,), 1, 2) in found
    assert Violation("eligible", (1, 0), 1, 0) in found
    assert [str(v) for v in found] == ["1 is below load_min[1] = 2", "pair (1, 0) is assigned but not eligible"]


def test_more_demanded_than_eligible_has_a_bound_of_minus_infinity():
    problem = BY_HAND.replace(eligible=[[True, True], [False, False], [True, True]])
    assert dual_bound(problem, [0.0, 0.0]) == -np.inf


def tampered(answer: Schedule, **changes: object) -> Schedule:
    return dataclasses.replace(answer, **changes)


def test_verify_finds_a_tampered_schedule():
    answer = solve(clustered(30, 4))
    assert answer.verify().optimal
    mask = answer.assignment.toarray()
    client = int(np.flatnonzero(mask.any(axis=1) & ~mask.all(axis=1))[0])
    swapped = mask.copy()
    swapped[client, int(np.argmax(mask[client]))] = False
    swapped[client, int(np.argmin(mask[client]))] = True
    after = tampered(answer, pairs=Assignment.from_mask(swapped)).verify()
    assert after.objective != pytest.approx(answer.objective)
    assert not after.optimal
    dropped = mask.copy()
    dropped[client] = False
    assert not tampered(answer, pairs=Assignment.from_mask(dropped)).verify().feasible
    assert not tampered(answer, prices=answer.prices + 0.5).verify().optimal
    assert not tampered(answer, prices=-answer.prices).verify().optimal
    assert tampered(answer, prices=None).verify().bound is None
    assert not tampered(answer, prices=None).verify().optimal


def test_verify_does_not_believe_a_tampered_objective():
    answer = solve(clustered(30, 4))
    boast = dataclasses.replace(answer.certificate, objective=1e6, bound=1e6, gap=0.0)
    assert tampered(answer, certificate=boast).verify().objective == answer.objective


def test_bound_is_the_same_however_the_clients_are_cut_into_blocks(monkeypatch):
    problem = clustered(50, 4)
    prices = solve(problem).prices
    whole = dual_bound(problem, prices)
    monkeypatch.setattr("fedmoe_sched._arrays._BLOCK_CELLS", 28)
    assert len(list(problem.blocks())) == 8
    assert dual_bound(problem, prices) == pytest.approx(whole, rel=1e-12)


def test_an_assignment_that_breaks_bounds_has_a_bound_but_no_gap():
    problem = AssignmentProblem([[3.0, 1.0], [2.0, 0.5]], capacity=1, min_experts=1, load_max=1)
    answer = solve(problem, "greedy", certify=True)
    assert answer.objective == 5.0
    assert answer.bound == pytest.approx(3.5)
    assert answer.gap is None
    assert answer.verify().gap is None
