"""What backends in the registry must do with resource budgets, which they take or refuse."""

from __future__ import annotations

import numpy as np
import pytest
from contract_tools import assert_finds, examples, needs, share, takes
from oracle import brute_force, clustered, contended

from fedmoe_sched import (
    AssignmentProblem,
    Capability,
    Limits,
    LoadPenalty,
    ResourceBudget,
    Status,
    UnsupportedProblemError,
    solve,
)
from fedmoe_sched.registry import solver_class


def budgeted(seed: int, *, penalised: bool = False) -> AssignmentProblem:
    """Make a random tiny problem whose budgets bite as much as its load bounds; few have no answer."""
    rng = np.random.default_rng(seed)
    problem = contended(seed, penalised=penalised)
    shape = problem.shape if rng.random() < 0.5 else problem.shape[1:]
    kinds = (rng.integers(1, 10, shape), np.round(rng.uniform(0.1, 1, shape), 1), rng.uniform(1e8, 1e9, shape))
    size = kinds[rng.integers(3)]
    most = np.broadcast_to(size, problem.shape).sum(axis=1)
    budgets = [ResourceBudget("memory", size, most * rng.uniform(0.3, 1.0, problem.n_clients))]
    if rng.random() < 0.3:
        budgets.append(ResourceBudget("seconds", rng.integers(1, 4, problem.shape), rng.integers(2, 8, len(most))))
    return problem.replace(budgets=budgets, min_experts=np.minimum(problem.min_experts, 1))


@pytest.mark.hypothesis
def test_exact_backend_agrees_with_brute_force_on_budgets(exact_backend):
    needs(exact_backend, Capability.BUDGETS)
    for problem in share(exact_backend, examples(budgeted=True)):
        assert_finds(exact_backend, problem, brute_force(problem))


def test_exact_backend_agrees_with_brute_force_where_budgets_and_load_bounds_bite(exact_backend):
    needs(exact_backend, Capability.BUDGETS)
    for seed in share(exact_backend, range(100)):
        problem = budgeted(seed)
        assert_finds(exact_backend, problem, brute_force(problem))


@pytest.mark.slow
def test_exact_backend_agrees_with_brute_force_on_many_budgets(exact_backend):
    needs(exact_backend, Capability.BUDGETS)
    for problem in (*examples(budgeted=True), *map(budgeted, range(300))):
        assert_finds(exact_backend, problem, brute_force(problem))


@pytest.mark.hypothesis
def test_exact_backend_agrees_with_brute_force_on_budgets_and_load_penalties(exact_backend):
    needs(exact_backend, Capability.BUDGETS, Capability.LOAD_PENALTY)
    for problem in share(exact_backend, examples(penalised=True, budgeted=True)):
        assert_finds(exact_backend, problem, brute_force(problem))


def test_exact_backend_agrees_with_brute_force_where_budgets_and_load_penalties_bite(exact_backend):
    needs(exact_backend, Capability.BUDGETS, Capability.LOAD_PENALTY)
    for seed in range(40):
        problem = budgeted(seed, penalised=True)
        assert_finds(exact_backend, problem, brute_force(problem))


def test_exact_backend_refuses_budgets_with_load_penalties_unless_it_takes_both(exact_backend):
    problem = budgeted(1, penalised=True)
    missing = {Capability.BUDGETS, Capability.LOAD_PENALTY} - solver_class(exact_backend).capabilities
    if missing:
        with pytest.raises(UnsupportedProblemError, match=f"{exact_backend} does not take {min(missing)}"):
            solve(problem, exact_backend)
    else:
        assert solve(problem, exact_backend).status is Status.OPTIMAL


def test_backend_refuses_budgets_with_a_reason_or_keeps_them(backend):
    problem = clustered(20, 4)
    problem = problem.replace(budgets=[ResourceBudget("memory", [3, 1, 2, 2], np.full(20, 4.5))], min_experts=0)
    if not takes(backend, Capability.BUDGETS):
        with pytest.raises(UnsupportedProblemError, match=f"{backend} does not take budgets"):
            solve(problem, backend)
        return
    answer = solve(problem, backend, limits=Limits(time=30))
    assert answer.status is Status.OPTIMAL
    assert (problem.budgets[0].used(answer.pairs) <= 4.5).all()
    # The budgets bite: without them more could be had.
    assert answer.objective < solve(problem.replace(budgets=()), "flow-ortools").objective - 0.1


@pytest.mark.parametrize("penalty", [None, LoadPenalty.quadratic(0.01, n_experts=3)])
def test_exact_backend_is_held_to_budgets_more_tightly_than_engines_are(exact_backend, penalty):
    """Two experts exceed the budget together by less than engines notice; the second client may hold both."""
    needs(exact_backend, Capability.BUDGETS)
    if penalty is not None:
        needs(exact_backend, Capability.LOAD_PENALTY)
    size = [0.5, 0.5 + 1e-7, 0.25]
    problem = AssignmentProblem(
        [[3.0, 2.0, 0.5]] * 2,
        3,
        load_penalty=penalty,
        budgets=[ResourceBudget("memory", size, [1.0, 1.0 + 2e-7])],
    )
    answer = solve(problem, exact_backend)
    assert answer.status is Status.OPTIMAL
    assert answer.experts_by_client() == {0: [0, 2], 1: [0, 1]}
