"""What the heuristics in the registry must do: keep what they promise, and claim no more."""

from __future__ import annotations

import pytest
from contract_tools import assert_keeps_bounds, assert_refused, examples, shown
from oracle import TOLERANCE, brute_force

from fedmoe_sched import Schedule, Status, solve


def any_problems():
    return (*examples()[::3], *examples(penalised=True)[::3], *examples(with_layers=True)[::3])


@pytest.mark.hypothesis
def test_heuristic_keeps_capacity_and_eligibility_and_never_overclaims(heuristic):
    for problem in any_problems():
        with shown(problem):
            assert_modest(solve(problem, heuristic), brute_force(problem))


def assert_modest(answer: Schedule, optimum: float | None) -> None:
    problem = answer.problem
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


@pytest.mark.hypothesis
def test_heuristic_gets_a_true_bound_on_request(heuristic):
    for problem in any_problems():
        answer = solve(problem, heuristic, certify=True)
        optimum = brute_force(problem)
        if optimum is not None and answer.pairs is not None:
            with shown(problem):
                assert answer.bound == pytest.approx(optimum, abs=TOLERANCE)
                assert (answer.status is Status.OPTIMAL) == (not answer.violations and answer.gap <= TOLERANCE)
