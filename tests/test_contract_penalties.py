"""What backends in the registry must do with load penalties, which the exact ones take or refuse."""

from __future__ import annotations

import numpy as np
import pytest
from contract_tools import assert_finds, examples, needs, share
from oracle import TOLERANCE, brute_force, clustered, contended, linear_program, penalty_paid

from fedmoe_sched import AssignmentProblem, Capability, LoadPenalty, UnsupportedProblemError, solve, solvers

# Steps that jump, stay, and jump again: many loads cost the same, and bounds and scores decide.
STEPS = LoadPenalty.from_marginals([[0.0] * 20 + [0.1] * 10 + [0.1, 0.2, 0.4]] * 8)

# Clients of earlier rounds count: expert 0 is worn out, expert 1 is owed eight clients.
HISTORY = LoadPenalty.quadratic(0.02, [60, -8, 0, 0, 20, 0, 0, 5])

PENALISED = {
    "soft balance alone": lambda: clustered(200, 8, low=0, high=9).replace(
        load_penalty=LoadPenalty.quadratic(0.005, n_experts=8)
    ),
    "history, free to take fewer": lambda: clustered(200, 8, seed=1, fill=False, low=0, high=9).replace(
        load_penalty=HISTORY
    ),
    "history within load bounds": lambda: clustered(200, 8, seed=2).replace(load_penalty=HISTORY),
    "steps within load bounds": lambda: clustered(100, 8, seed=3).replace(load_penalty=STEPS),
    "steps, ties, few eligible pairs": lambda: clustered(
        80, 8, seed=4, decimals=1, eligible_share=0.5, low=0.2, high=1.5
    ).replace(load_penalty=STEPS),
    "whole numbers, ties of scores and penalties": lambda: AssignmentProblem(
        np.random.default_rng(5).integers(-3, 4, (80, 6)), 3, load_penalty=LoadPenalty.quadratic(0.1, n_experts=6)
    ),
    "float32": lambda: AssignmentProblem(
        clustered(80, 8, seed=6).desirability.astype(np.float32), 2, min_experts=1, load_penalty=HISTORY
    ),
    "penalties dwarf the scores": lambda: clustered(60, 8, seed=7, low=0, high=9).replace(
        load_penalty=LoadPenalty.quadratic(1e5, n_experts=8)
    ),
    "scores of zero": lambda: AssignmentProblem(np.zeros((40, 8)), 2, min_experts=1, load_penalty=HISTORY),
    "nothing to pay": lambda: clustered(60, 8, seed=8).replace(load_penalty=LoadPenalty.quadratic(0, n_experts=8)),
    "infeasible": lambda: clustered(60, 8, seed=9).replace(load_max=11, load_min=0, load_penalty=STEPS),
}


@pytest.mark.hypothesis
def test_exact_backend_agrees_with_brute_force_on_load_penalties(exact_backend):
    needs(exact_backend, Capability.LOAD_PENALTY)
    for problem in share(exact_backend, examples(penalised=True)):
        assert_finds(exact_backend, problem, brute_force(problem))


def test_exact_backend_agrees_with_brute_force_where_load_penalties_and_bounds_bite(exact_backend):
    needs(exact_backend, Capability.LOAD_PENALTY)
    for seed in share(exact_backend, range(150)):
        problem = contended(seed, penalised=True)
        assert_finds(exact_backend, problem, brute_force(problem))


@pytest.mark.parametrize("name", PENALISED)
def test_exact_backend_agrees_with_linear_program_on_load_penalties(exact_backend, name):
    needs(exact_backend, Capability.LOAD_PENALTY)
    problem = PENALISED[name]()
    assert_finds(exact_backend, problem, linear_program(problem))


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e9, 1e200])
def test_exact_backend_solves_load_penalties_of_any_magnitude(exact_backend, scale):
    needs(exact_backend, Capability.LOAD_PENALTY)
    problem = clustered(30, 4, seed=11, fill=False)
    plain = problem.replace(load_penalty=LoadPenalty.quadratic(0.02, n_experts=4))
    scaled = problem.replace(
        desirability=problem.desirability * scale, load_penalty=LoadPenalty.quadratic(0.02 * scale, n_experts=4)
    )
    answer = solve(scaled, exact_backend)
    assert answer.objective == pytest.approx(linear_program(plain) * scale, rel=1e-9)


def test_backend_takes_load_penalties_or_refuses_them_with_a_reason(backend):
    problem = clustered(20, 4).replace(load_penalty=LoadPenalty.quadratic(0.1, n_experts=4))
    entry = next(entry for entry in solvers() if entry.name == backend)
    if entry.exact and Capability.LOAD_PENALTY not in entry.capabilities:
        with pytest.raises(UnsupportedProblemError, match=f"{backend} does not take load penalty"):
            solve(problem, backend)
    else:
        answer = solve(problem, backend)
        mask = answer.assignment.toarray()
        paid = penalty_paid(problem, mask.sum(axis=0))
        assert paid > 1
        assert answer.objective == pytest.approx(problem.desirability[mask].sum() - paid, abs=TOLERANCE)
