"""The exact backend at sizes where it samples clients, runs in blocks, parts ties and lets prices jump."""

from __future__ import annotations

import numpy as np
import pytest

from fedmoe_sched import AssignmentProblem, Limits, LoadPenalty, Status, solve
from fedmoe_sched.instances import clustered
from fedmoe_sched.solvers import _price_levels
from fedmoe_sched.solvers.successive_shortest_paths import SuccessiveShortestPaths

CLIENTS, EXPERTS = 12_000, 8  # one sampled level below all clients, two blocks of threads


def problem_of(kind: str) -> AssignmentProblem:
    problem = clustered(CLIENTS, EXPERTS, seed=1)
    scores = problem.desirability
    rounded = np.round(scores * 10) / 10
    load = int(problem.capacity.sum()) // EXPERTS
    rng = np.random.default_rng(2)
    eligible = rng.random(problem.shape) < 0.6
    changes = {
        "plain": {},
        "plain float16": {"desirability": scores.astype(np.float16)},
        "tied": {"desirability": rounded},
        "tied float32": {"desirability": rounded.astype(np.float32)},
        "whole numbers": {"desirability": np.round(scores * 5)},
        "differences tied, scores not": {"desirability": rounded + rng.random((CLIENTS, 1))},
        "tied, some eligible": {"desirability": rounded, "eligible": eligible, "load_min": 0},
        "tied, filled": {"desirability": rounded, "min_experts": problem.capacity, "load_min": load - 5},
        "filled": {"min_experts": problem.capacity, "load_min": load, "load_max": load + 1},
        "some eligible": {"eligible": eligible, "load_min": 0},
        "negative": {"desirability": scores - 1.0},
        "all equal": {"desirability": np.full(problem.shape, 0.5)},
        "all zero": {"desirability": np.zeros(problem.shape)},
        "one place fewer than clients": {"capacity": 1, "load_min": 0, "load_max": CLIENTS // EXPERTS - 1},
        "column-major": {"desirability": np.asfortranarray(scores)},
        "quadratic penalty": {"load_penalty": LoadPenalty.quadratic(1e-4, np.arange(EXPERTS) * 500.0)},
        "tied, quadratic penalty": {
            "desirability": rounded,
            "load_penalty": LoadPenalty.quadratic(1e-4, np.arange(EXPERTS) * 500.0),
            "load_min": 0,
            "load_max": CLIENTS,
        },
        "tied, scores and penalties cancel out": {
            "desirability": rounded - rounded.mean(),
            "load_penalty": LoadPenalty.quadratic(1e-5, -np.arange(EXPERTS) * 300.0),
            "load_min": 0,
            "load_max": CLIENTS,
        },
        "some clients have no choice": {
            "desirability": scores * 1e-3,
            "eligible": np.arange(CLIENTS)[:, None] % 3 + np.arange(EXPERTS) < EXPERTS + 1,
            "capacity": np.where(np.arange(CLIENTS) % 2, EXPERTS, 2),
            "min_experts": np.where(np.arange(CLIENTS) % 2, EXPERTS - 1, 1),
            "load_min": 0,
            "load_max": CLIENTS,
            "load_penalty": LoadPenalty.quadratic(1e-6, n_experts=EXPERTS),
        },
        "stepwise penalty": {
            "load_penalty": LoadPenalty.from_marginals(
                np.cumsum(rng.random((EXPERTS, 5000)) < 0.01, axis=1) * 0.05
            )
        },
    }
    return problem.replace(**changes[kind])


KINDS = [
    "plain",
    "plain float16",
    "tied",
    "tied float32",
    "whole numbers",
    "differences tied, scores not",
    "tied, some eligible",
    "tied, filled",
    "filled",
    "some eligible",
    "negative",
    "all equal",
    "all zero",
    "one place fewer than clients",
    "column-major",
    "quadratic penalty",
    "tied, quadratic penalty",
    "stepwise penalty",
    "tied, scores and penalties cancel out",
    "some clients have no choice",
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_is_proved_and_equals_that_of_the_flow(kind):
    problem = problem_of(kind)
    answer = solve(problem, "exact")
    assert answer.status is Status.OPTIMAL
    assert answer.verify().optimal
    assert answer.objective == pytest.approx(solve(problem, "flow-ortools").objective, rel=1e-9)


@pytest.mark.parametrize("kind", ["plain", "tied", "tied float32", "all equal"])
def test_the_number_of_threads_changes_nothing(kind):
    problem = problem_of(kind)
    one, three = (solve(problem, "exact", limits=Limits(seed=5, threads=t)) for t in (1, 3))
    assert (one.pairs.indices == three.pairs.indices).all()
    assert (one.prices == three.prices).all()


@pytest.mark.parametrize("kind", ["plain", "tied", "some eligible", "all equal", "quadratic penalty"])
def test_what_is_looked_at_first_changes_nothing_about_the_optimum(kind, monkeypatch):
    """Too few clients, too few arcs, no room for more, and jumps at once: all lead to the same objective."""
    problem = problem_of(kind)
    optimum = solve(problem, "exact").objective
    monkeypatch.setattr(_price_levels, "_MOST_NEWTON_STEPS", 2)
    monkeypatch.setattr(_price_levels, "_SPARE_ARCS", 0)
    monkeypatch.setattr(_price_levels, "_FIRST_ARCS", 1)
    narrow = solve(problem, "exact")
    monkeypatch.setattr(_price_levels.Level, "_wider", lambda *_: 0.0)
    jumping = solve(problem, "exact")
    for answer in (narrow, jumping):
        assert answer.status is Status.OPTIMAL
        assert answer.objective == pytest.approx(optimum, rel=1e-9)


@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_a_warm_start_reaches_the_same_optimum(kind):
    problem = problem_of(kind)
    before = solve(problem, "exact")
    noise = np.random.default_rng(3).normal(0, 0.001, problem.shape)
    moved = problem.replace(desirability=problem.desirability + noise)
    cold = solve(moved, "exact")
    for start in (before, np.linspace(-5, 5, EXPERTS), np.full(EXPERTS, 1e6)):
        warm = solve(moved, "exact", warm_start=start)
        assert warm.status is Status.OPTIMAL
        assert warm.objective == pytest.approx(cold.objective, rel=1e-9)
    again = solve(problem, "exact", warm_start=before)
    assert again.objective == pytest.approx(before.objective, rel=1e-9)


def test_a_warm_start_takes_clients_that_left_or_joined():
    problem = problem_of("plain")
    before = solve(problem, "exact")
    fewer = problem.restrict(np.arange(1000, CLIENTS), load_min=0)
    more = clustered(CLIENTS + 2000, EXPERTS, seed=1)
    for changed in (fewer, more):
        warm = solve(changed, "exact", warm_start=before)
        assert warm.status is Status.OPTIMAL
        assert warm.objective == pytest.approx(solve(changed, "exact").objective, rel=1e-9)


@pytest.mark.parametrize("kind", ["plain", "tied", "some eligible"])
def test_bounds_that_cannot_be_met_are_found_out_at_scale(kind):
    problem = problem_of(kind).replace(load_min=CLIENTS - 1, load_max=CLIENTS)
    answer = solve(problem, "exact")
    assert answer.status is Status.INFEASIBLE
    assert answer.conflict.required > answer.conflict.available


@pytest.mark.parametrize("scale", [1e-300, 1e-40, 1e40, 1e300])
@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_scores_beyond_the_range_of_float32(kind, scale):
    problem = problem_of(kind)
    scaled = solve(problem.replace(desirability=problem.desirability * scale), "exact")
    assert scaled.objective == pytest.approx(solve(problem, "exact").objective * scale, rel=1e-9)


def test_scores_at_the_edge_of_the_range_of_floats():
    tiny = AssignmentProblem(np.full((3, 2), 5e-324) * [[1, 0], [0, 1], [1, 1]], 1, min_experts=1, load_max=2)
    assert solve(tiny, "exact").verify().feasible


def test_more_experts_than_an_index_holds_are_refused():
    problem = AssignmentProblem(np.zeros((1, 40_000)), 1, load_max=0)
    assert "experts" in SuccessiveShortestPaths().supports(problem)
