"""The exact backend at sizes where it samples clients, runs in blocks and parts ties."""

from __future__ import annotations

import numpy as np
import pytest

from fedmoe_sched import AssignmentProblem, Limits, Status, solve
from fedmoe_sched.instances import clustered
from fedmoe_sched.solvers.successive_shortest_paths import SuccessiveShortestPaths

CLIENTS, EXPERTS = 12_000, 8  # one sampled level below all clients, two blocks of threads


def problem_of(kind: str) -> AssignmentProblem:
    problem = clustered(CLIENTS, EXPERTS, seed=1)
    scores = problem.desirability
    rounded = np.round(scores * 10) / 10
    load = int(problem.capacity.sum()) // EXPERTS
    eligible = np.random.default_rng(2).random(problem.shape) < 0.6
    changes = {
        "plain": {},
        "tied": {"desirability": rounded},
        "tied float32": {"desirability": rounded.astype(np.float32)},
        "filled": {"min_experts": problem.capacity, "load_min": load, "load_max": load + 1},
        "some eligible": {"eligible": eligible, "load_min": 0},
        "negative": {"desirability": scores - 1.0},
        "all equal": {"desirability": np.full(problem.shape, 0.5)},
        "all zero": {"desirability": np.zeros(problem.shape)},
    }
    return problem.replace(**changes[kind])


@pytest.mark.parametrize(
    "kind", ["plain", "tied", "tied float32", "filled", "some eligible", "negative", "all equal", "all zero"]
)
def test_the_optimum_is_proved_and_equals_that_of_the_flow(kind):
    problem = problem_of(kind)
    answer = solve(problem, "exact")
    assert answer.status is Status.OPTIMAL
    assert answer.verify().optimal
    assert answer.objective == pytest.approx(solve(problem, "flow-ortools").objective, rel=1e-9)


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_the_number_of_threads_changes_nothing(kind):
    problem = problem_of(kind)
    one, three = (solve(problem, "exact", limits=Limits(seed=5, threads=t)) for t in (1, 3))
    assert (one.pairs.indices == three.pairs.indices).all()
    assert (one.prices == three.prices).all()


def test_a_warm_start_reaches_the_same_optimum():
    problem = problem_of("plain")
    before = solve(problem, "exact")
    noise = np.random.default_rng(3).normal(0, 0.001, problem.shape)
    moved = problem.replace(desirability=problem.desirability + noise)
    warm = solve(moved, "exact", warm_start=before)
    assert warm.status is Status.OPTIMAL
    assert warm.objective == pytest.approx(solve(moved, "exact").objective, rel=1e-9)
    far = solve(moved, "exact", warm_start=np.linspace(-5, 5, EXPERTS))
    assert far.objective == pytest.approx(warm.objective, rel=1e-9)


def test_bounds_that_cannot_be_met_are_found_out_at_scale():
    problem = problem_of("plain").replace(load_min=CLIENTS - 1, load_max=CLIENTS)
    answer = solve(problem, "exact")
    assert answer.status is Status.INFEASIBLE
    assert answer.conflict.required > answer.conflict.available


def test_scores_at_the_edge_of_the_range_of_floats():
    tiny = AssignmentProblem(np.full((3, 2), 5e-324) * [[1, 0], [0, 1], [1, 1]], 1, min_experts=1, load_max=2)
    assert solve(tiny, "exact").verify().feasible


def test_more_experts_than_an_index_holds_are_refused():
    problem = AssignmentProblem(np.zeros((1, 40_000)), 1, load_max=0)
    assert "experts" in SuccessiveShortestPaths().supports(problem)
