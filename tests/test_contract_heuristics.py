"""What the heuristics in the registry must do: keep what they promise, and claim no more."""

from __future__ import annotations

import pytest
from contract_tools import assert_keeps_bounds, assert_refused
from hypothesis import given
from hypothesis import strategies as st
from oracle import TOLERANCE, brute_force, tiny_problems

from fedmoe_sched import Status, solve

ANY_PROBLEM = st.one_of(tiny_problems(), tiny_problems(penalised=True), tiny_problems(with_layers=True))


@given(problem=ANY_PROBLEM)
def test_heuristic_keeps_capacity_and_eligibility_and_never_overclaims(heuristic, problem):
    optimum = brute_force(problem)
    answer = solve(problem, heuristic)
    if answer.pairs is None:
        assert optimum is None
        assert_refused(answer)
        return
    mask = answer.assignment.toarray()
    assert (mask.sum(axis=1) <= problem.capacity).all()
    assert problem.eligible is None or not mask[~problem.eligible].any()
    if problem.layers is not None:
        assert not {"layer_max"} & {violation.constraint for violation in answer.violations}
    if answer.status is Status.VIOLATED:
        assert answer.violations
        return
    assert_keeps_bounds(problem, mask)
    assert optimum is not None
    assert answer.objective <= optimum + TOLERANCE
    if answer.status is Status.OPTIMAL:
        assert answer.objective == pytest.approx(optimum, abs=TOLERANCE)
        assert answer.verify().optimal
    else:
        assert answer.bound is None
        assert answer.gap is None


@given(problem=ANY_PROBLEM)
def test_heuristic_gets_a_true_bound_on_request(heuristic, problem):
    answer = solve(problem, heuristic, certify=True)
    optimum = brute_force(problem)
    if optimum is None or answer.pairs is None:
        return
    assert answer.bound == pytest.approx(optimum, abs=TOLERANCE)
    assert (answer.status is Status.OPTIMAL) == (not answer.violations and answer.gap <= TOLERANCE)
