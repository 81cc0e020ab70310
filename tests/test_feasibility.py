"""Conflicts are real and named in full; widening is minimal and never touches a hard bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import brute_force, clustered, enumerate_assignments, linear_program, tiny_problems

from fedmoe_sched import AssignmentProblem, Conflict, InfeasibleError, solve
from fedmoe_sched._dealing import group_clients
from fedmoe_sched.feasibility import find_conflict, widen_load_bounds


def recount(problem: AssignmentProblem, conflict: Conflict) -> tuple[int, int]:
    """Count places demanded and places that exist in the cut, one client at a time."""
    experts, clients = set(conflict.experts), set(conflict.clients)
    required = available = 0
    for i in range(problem.n_clients):
        can = {j for j in range(problem.n_experts) if problem.eligible is None or problem.eligible[i, j]}
        if conflict.kind == "experts starve":
            reach = min(len(can & experts), int(problem.capacity[i]), len(can))
            available += reach
            assert (i in clients) == (reach > 0)
        elif i in clients:
            required += int(problem.min_experts[i])
            available += len(can - experts)
    for j in experts:
        if conflict.kind == "experts starve":
            required += int(problem.load_min[j])
        else:
            available += min(int(problem.load_max[j]), problem.n_clients)
    return required, available


@given(problem=tiny_problems())
def test_conflict_is_found_exactly_where_there_is_one(problem):
    conflict = find_conflict(problem)
    assert (conflict is not None) == (brute_force(problem) is None)
    if conflict is not None:
        assert conflict.required > conflict.available
        assert recount(problem, conflict) == (conflict.required, conflict.available)
        assert str(conflict.required) in conflict.message
        assert str(conflict.available) in conflict.message


def test_starving_experts_are_named():
    eligible = np.ones((10, 4), dtype=bool)
    eligible[3:, [1, 3]] = False
    problem = AssignmentProblem(np.ones((10, 4)), 1, load_min=[1, 2, 1, 2], eligible=eligible)
    conflict = find_conflict(problem)
    assert conflict.kind == "experts starve"
    assert conflict.experts == (1, 3)
    assert conflict.clients == (0, 1, 2)
    assert conflict.message == ("experts {1, 3} need 4 clients (load_min), only 3 eligible slots reach them")
    with pytest.raises(InfeasibleError, match=r"experts \{1, 3\} need 4 clients"):
        _ = solve(problem).loads


def test_overflowing_clients_are_named_by_their_labels():
    problem = AssignmentProblem(
        np.ones((3, 2)),
        2,
        min_experts=[2, 1, 0],
        load_max=[1, 1],
        client_labels=["ann", "bob", "cid"],
        expert_labels=["x", "y"],
    )
    conflict = find_conflict(problem)
    assert conflict.kind == "clients overflow"
    assert conflict.clients == (0, 1)
    assert (conflict.required, conflict.available) == (3, 2)
    assert "clients {ann, bob} must take 3 places" in conflict.message
    assert "experts {x, y}: load_max 2 together" in conflict.message


def grouped(seed: int) -> AssignmentProblem:
    """Make a problem near the edge of feasibility, of a few hundred clients of few kinds or of many."""
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(20, 300)), int(rng.integers(3, 9))
    kinds = rng.random((int(rng.choice([2, 5, n])), m)) < rng.uniform(0.2, 0.9, m)
    eligible = kinds[rng.integers(0, len(kinds), n)]
    slots = np.minimum(rng.integers(0, 4, n), eligible.sum(axis=1))
    least = rng.integers(0, slots + 1) if rng.random() < 0.5 else slots
    even = np.minimum(eligible.sum(axis=0), slots.sum() / m)
    return AssignmentProblem(
        np.zeros((n, m)),
        slots,
        min_experts=least,
        load_min=np.floor(even * rng.uniform(0.4, 1.05)).astype(int),
        load_max=np.ceil(even * rng.uniform(1.05, 1.8)).astype(int),
        eligible=eligible,
    )


def test_conflicts_among_many_clients_are_those_of_a_linear_program():
    found = {"none": 0}
    for seed in range(120):
        problem = grouped(seed)
        conflict = find_conflict(problem)
        assert (conflict is None) == (linear_program(problem) is not None)
        if conflict is not None:
            assert conflict.required > conflict.available
            assert recount(problem, conflict) == (conflict.required, conflict.available)
        kind = "none" if conflict is None else conflict.kind
        found[kind] = found.get(kind, 0) + 1
    assert all(found[kind] >= 10 for kind in ("none", "experts starve", "clients overflow")), found


def test_all_experts_that_starve_are_named():
    eligible = np.ones((50, 5), dtype=bool)
    eligible[2:, 1] = eligible[3:, 4] = False
    problem = AssignmentProblem(np.zeros((50, 5)), 1, load_min=[4, 4, 4, 4, 4], eligible=eligible)
    assert find_conflict(problem).experts == (1, 4)


@pytest.mark.parametrize("mix", [None, 0])
def test_groups_hold_equal_clients_even_where_their_numbers_collide(monkeypatch, mix):
    """Multiplied by zero all clients get one number: the rows themselves must then be compared."""
    if mix is not None:
        monkeypatch.setattr("fedmoe_sched._dealing._MIX", np.uint64(mix))
    rng = np.random.default_rng(0)
    eligible = np.concatenate([rng.random((40, 70)) < 0.5] * 3)
    eligible[100, 69] ^= True
    problem = AssignmentProblem(np.zeros((120, 70)), 2, eligible=eligible)
    groups = group_clients(problem)
    assert len(groups.size) == 41
    np.testing.assert_array_equal(groups.open[groups.member], eligible)
    np.testing.assert_array_equal(np.bincount(groups.member), groups.size)


def test_long_lists_are_cut_short():
    conflict = find_conflict(AssignmentProblem(np.ones((40, 2)), 1, min_experts=1, load_max=3))
    assert len(conflict.clients) == 40
    assert "... (40 in all)" in conflict.message


def test_demands_beyond_all_measure_are_a_conflict_too():
    conflict = find_conflict(AssignmentProblem(np.ones((3000, 4)), 2**53, min_experts=2**53))
    assert conflict.kind == "clients overflow"
    assert conflict.available == 12_000
    conflict = find_conflict(AssignmentProblem(np.ones((3, 4)), 1, load_min=2**53, load_max=2**53))
    assert conflict.kind == "experts starve"


@st.composite
def soft_and_hard(draw: st.DrawFn) -> tuple[AssignmentProblem, tuple[np.ndarray, np.ndarray]]:
    problem = draw(tiny_problems())
    n, m = problem.shape
    slack = st.lists(st.integers(0, 5), min_size=m, max_size=m)
    hard_min = np.maximum(problem.load_min - draw(slack), 0)
    hard_max = np.maximum(problem.load_max, np.minimum(problem.load_max + draw(slack), n))
    return problem, (hard_min, hard_max)


def least_widening(problem: AssignmentProblem, hard: tuple[np.ndarray, np.ndarray]) -> int | None:
    """Total widening that the best assignment needs, over all assignments; None if the hard bounds exclude all."""
    _, loads, _ = enumerate_assignments(problem)
    loads = loads[((loads >= hard[0]) & (loads <= hard[1])).all(axis=1)]
    if not len(loads):
        return None
    missing = np.maximum(problem.load_min - loads, 0) + np.maximum(loads - problem.load_max, 0)
    return int(missing.sum(axis=1).min())


@given(case=soft_and_hard())
def test_widening_is_least_and_never_passes_the_hard_bounds(case):
    problem, hard = case
    least = least_widening(problem, hard)
    widened, relaxed = widen_load_bounds(problem, hard)
    assert (widened.load_min >= hard[0]).all()
    assert (widened.load_max <= hard[1]).all()
    if least is None:
        np.testing.assert_array_equal(widened.load_min, hard[0])
        np.testing.assert_array_equal(widened.load_max, hard[1])
        assert relaxed == ()
        assert brute_force(widened) is None
        return
    assert (widened.load_min <= problem.load_min).all()
    assert (widened.load_max >= problem.load_max).all()
    moved = (problem.load_min - widened.load_min).sum() + (widened.load_max - problem.load_max).sum()
    assert moved == least
    assert brute_force(widened) is not None
    assert (widened is problem) == (least == 0)
    assert sum(abs(r.used - r.asked) for r in relaxed) == least
    for r in relaxed:
        assert int(getattr(problem, r.bound)[r.expert]) == r.asked
        assert int(getattr(widened, r.bound)[r.expert]) == r.used


def least_widening_by_linear_program(problem: AssignmentProblem) -> float:
    """Minimise the total of what loads miss or exceed; the hard bounds are 0 and n."""
    from scipy.optimize import linprog
    from scipy.sparse import bmat, identity, kron

    n, m = problem.shape
    by_client = kron(identity(n), np.ones((1, m)))
    by_expert = kron(np.ones((1, n)), identity(m))
    rows = bmat(
        [
            [by_client, None, None],
            [-by_client, None, None],
            [by_expert, -identity(m), None],
            [-by_expert, None, -identity(m)],
        ],
        format="csr",
    )
    sides = np.concatenate([problem.capacity, -problem.min_experts, problem.load_max, -problem.load_min])
    top = np.concatenate([problem.eligible.astype(float).ravel(), np.full(2 * m, np.inf)])
    costs = np.concatenate([np.zeros(n * m), np.ones(2 * m)])
    return float(linprog(costs, A_ub=rows, b_ub=sides, bounds=np.stack([np.zeros(len(top)), top], axis=1)).fun)


@pytest.mark.parametrize("seed", range(5))
def test_widening_is_least_at_scale(seed):
    """Few eligible pairs, some experts that hardly anybody can train: hundreds of places are missing."""
    rng = np.random.default_rng(seed)
    n, m = 400, 8
    share = rng.uniform(0.3, 0.9, m)
    share[:3] = 0.02, 0.05, 0.1
    eligible = rng.random((n, m)) < share
    slots = np.minimum(rng.integers(1, 4, n), eligible.sum(axis=1))
    mean = slots.sum() / m
    problem = AssignmentProblem(
        np.zeros((n, m)),
        3,
        min_experts=slots,
        load_min=int(0.9 * mean),
        load_max=int(1.1 * mean),
        eligible=eligible,
    )
    hard = np.zeros(m, dtype=np.int64), np.full(m, n)
    widened, relaxed = widen_load_bounds(problem, hard)
    total = sum(abs(r.used - r.asked) for r in relaxed)
    assert total == pytest.approx(least_widening_by_linear_program(problem), abs=1e-6)
    assert total > 100
    assert find_conflict(problem) is not None
    assert find_conflict(widened) is None


def test_missing_places_are_spread_over_the_experts():
    problem = AssignmentProblem(np.zeros((30, 4)), 1, load_min=10)
    widened, relaxed = widen_load_bounds(problem, (np.zeros(4, dtype=np.int64), np.full(4, 30)))
    assert widened.load_min.sum() == 30
    assert widened.load_min.min() >= 7
    assert [str(r) for r in relaxed] == [f"load_min[{j}]: 10 -> {widened.load_min[j]}" for j in range(4)]


def test_bounds_that_fit_are_left_alone():
    problem = clustered(100, 5)
    assert widen_load_bounds(problem, (problem.load_min, problem.load_max)) == (problem, ())
