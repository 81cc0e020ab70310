"""What backends in the registry must do with layers of experts, which they take or refuse."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from contract_tools import assert_finds, assert_keeps_bounds, examples, needs, share, takes
from oracle import brute_force, clustered, layered, linear_program

from fedmoe_sched import (
    AssignmentProblem,
    Capability,
    ExpertLayers,
    Limits,
    Status,
    UnsupportedProblemError,
    instances,
    solve,
)


def in_layers(problem: AssignmentProblem, low=1, high=2, **changes) -> AssignmentProblem:
    """Deal the experts out to layers of about four."""
    m = problem.n_experts
    layers = ExpertLayers(np.arange(m) % max(1, m // 4), low, high)
    return problem.replace(**{"layers": layers, "min_experts": 0, "load_min": 0, "load_max": 9999} | changes)


LAYERED = {
    "independent layers": lambda: in_layers(clustered(200, 8), capacity=4, load_min=70, load_max=110),
    "capacity couples layers": lambda: in_layers(clustered(200, 8, seed=1), capacity=3, load_max=85),
    "capacities and fewest experts couple layers": lambda: in_layers(
        clustered(99, 16, seed=2), capacity=np.arange(99) % 3 + 5, min_experts=np.arange(99) % 3 + 4, load_max=42
    ),
    "bounds by client, scores negative": lambda: in_layers(
        AssignmentProblem(clustered(120, 12, seed=3).desirability - 0.3, 5),
        np.arange(360).reshape(120, 3) % 2,
        np.arange(360).reshape(120, 3) % 3 + 1,
        load_min=9,
        load_max=25,
    ),
    "ties, few eligible pairs": lambda: in_layers(
        clustered(80, 12, seed=4, decimals=1, eligible_share=0.6), 0, 2, capacity=4, min_experts=1, load_max=26
    ),
    "whole numbers": lambda: in_layers(
        AssignmentProblem(np.random.default_rng(5).integers(-3, 4, (80, 8)), 3), 1, 3, load_min=28, load_max=32
    ),
    "infeasible": lambda: in_layers(clustered(60, 8, seed=6), capacity=4, load_max=[14] * 2 + [60] * 4 + [14] * 2),
    "infeasible in one layer": lambda: in_layers(clustered(60, 8, seed=6), capacity=4, load_max=[14, 60] * 4),
}


@pytest.mark.hypothesis
@pytest.mark.parametrize("penalised", [False, True])
def test_exact_backend_agrees_with_brute_force_on_layers(exact_backend, penalised):
    needs(exact_backend, Capability.LAYERS)
    if penalised:
        needs(exact_backend, Capability.LOAD_PENALTY)
    for problem in share(exact_backend, examples(with_layers=True, penalised=penalised)[::2]):
        assert_finds(exact_backend, problem, brute_force(problem))


def test_exact_backend_agrees_with_brute_force_where_layers_and_load_bounds_bite(exact_backend):
    needs(exact_backend, Capability.LAYERS)
    penalised = takes(exact_backend, Capability.LOAD_PENALTY)
    for seed in share(exact_backend, range(40)):
        problem = layered(seed, penalised=penalised and seed % 2 == 1)
        assert_finds(exact_backend, problem, brute_force(problem))


@pytest.mark.parametrize("name", LAYERED)
def test_exact_backend_agrees_with_linear_program_on_layers(exact_backend, name):
    needs(exact_backend, Capability.LAYERS)
    problem = LAYERED[name]()
    assert_finds(exact_backend, problem, linear_program(problem))


@pytest.mark.hypothesis
def test_exact_backend_agrees_with_brute_force_on_layers_and_budgets(exact_backend):
    needs(exact_backend, Capability.LAYERS, Capability.BUDGETS)
    for problem in examples(with_layers=True, budgeted=True)[::4]:
        assert_finds(exact_backend, problem, brute_force(problem))


def test_backend_takes_layers_or_refuses_them_with_a_reason(backend):
    problem = in_layers(clustered(40, 8), capacity=3)
    if not takes(backend, Capability.LAYERS):
        with pytest.raises(UnsupportedProblemError, match=f"{backend} does not take layers"):
            solve(problem, backend)
        return
    answer = solve(problem, backend)
    assert answer.status in {Status.OPTIMAL, Status.FEASIBLE}
    assert_keeps_bounds(problem, answer.pairs.mask())


def crowded():
    """Give clients an expert of each of two layers, if two of them fit."""
    problem = instances.budgets(300, 12)
    fits = np.ones((300, 6, 6), dtype=np.bool_)
    for resource in problem.budgets:
        sizes = resource.sizes_of(np.arange(300))
        fits &= sizes[:, :6, None] + sizes[:, None, 6:] <= resource.budget[:, None, None]
    needed = (fits.any(axis=(1, 2)) & (problem.capacity > 1))[:, None] * np.ones(2, dtype=np.int64)
    layers = ExpertLayers(np.arange(12) // 6, needed, np.full((300, 2), 2))
    return problem.replace(layers=layers, load_min=9 * problem.load_min // 10)


@cache
def solved_crowd():
    return solve(crowded(), "milp-scipy")


def test_no_exact_backend_calls_a_problem_infeasible_that_has_an_assignment(exact_backend):
    needs(exact_backend, Capability.LAYERS, Capability.BUDGETS)
    best = solved_crowd()
    assert best.verify().feasible
    answer = solve(crowded(), exact_backend, limits=Limits(time=120.0))
    assert answer.status is Status.OPTIMAL
    assert answer.objective == pytest.approx(best.objective)
