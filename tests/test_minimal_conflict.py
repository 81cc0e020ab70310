"""Every bound of a conflict that `solve` names is needed: without any one of them, the others can be met."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from oracle import brute_force, linear_program, tiny_problems
from test_feasibility import grouped, recount

from fedmoe_sched import AssignmentProblem, ResourceBudget, Status, solve
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.minimal_conflict import minimal_conflict


def only(problem, kind, clients, experts):
    """Keep the named bounds alone; capacities are facts about clients where experts starve, and no bound else."""
    n, m = problem.shape
    some_experts, some_clients = np.isin(np.arange(m), experts), np.isin(np.arange(n), clients)
    if kind == "experts starve":
        return problem.replace(min_experts=0, load_min=np.where(some_experts, problem.load_min, 0), load_max=2**53)
    return problem.replace(
        capacity=np.maximum(problem.min_experts, m),
        min_experts=np.where(some_clients, problem.min_experts, 0),
        load_min=0,
        load_max=np.where(some_experts, problem.load_max, n),
    )


def assert_minimal(problem, conflict, feasible):
    kind, clients, experts = conflict.kind, conflict.clients, conflict.experts
    assert conflict.required > conflict.available
    assert not feasible(only(problem, kind, clients, experts))
    for left_out in experts:
        assert feasible(only(problem, kind, clients, [j for j in experts if j != left_out])), (kind, left_out)
    for left_out in clients if kind == "clients overflow" else ():
        assert feasible(only(problem, kind, [i for i in clients if i != left_out], experts)), (kind, left_out)


@given(problem=tiny_problems())
def test_every_bound_of_a_conflict_is_needed(problem):
    conflict = find_conflict(problem)
    if conflict is not None:
        least = minimal_conflict(problem, conflict)
        assert_minimal(problem, least, lambda p: brute_force(p) is not None)
        assert recount(problem, least) == (least.required, least.available)


def test_conflicts_among_many_clients_are_minimal():
    checked = set()
    for seed in range(120):
        problem = grouped(seed)
        conflict = find_conflict(problem)
        if conflict is not None and problem.n_clients < 100:
            least = minimal_conflict(problem, conflict)
            assert set(least.experts) <= set(conflict.experts)
            assert_minimal(problem, least, lambda p: find_conflict(p) is None)
            assert linear_program(only(problem, least.kind, least.clients, least.experts)) is None
            checked.add(least.kind)
    assert checked == {"experts starve", "clients overflow"}


def test_one_starving_expert_is_enough():
    eligible = np.ones((50, 5), dtype=bool)
    eligible[2:, 1] = eligible[3:, 4] = False
    problem = AssignmentProblem(np.zeros((50, 5)), 1, load_min=4, eligible=eligible)
    assert find_conflict(problem).experts == (1, 4)
    conflict = solve(problem).conflict
    assert conflict.message == "expert 4 needs 4 clients (load_min), only 3 eligible slots reach it"


def test_as_many_of_many_alike_clients_as_it_takes():
    conflict = solve(AssignmentProblem(np.zeros((100_000, 3)), 1, min_experts=1, load_max=2)).conflict
    assert (conflict.clients, conflict.experts) == (tuple(range(7)), (0, 1, 2))
    assert (conflict.required, conflict.available) == (7, 6)


def test_pairs_that_budgets_exclude_are_part_of_it():
    memory = ResourceBudget("memory", [4, 2, 3], [3, 3])
    answer = solve(AssignmentProblem(np.ones((2, 3)), 2, load_min=[1, 0, 2], budgets=[memory]), "milp-scipy")
    assert answer.status is Status.INFEASIBLE
    assert answer.conflict.message == "expert 0 needs 1 clients (load_min), only 0 eligible slots reach it"


@pytest.mark.parametrize("kind", ["experts", "clients"])
def test_out_of_time_is_said(kind):
    options = {"load_min": 4} if kind == "experts" else {"min_experts": 1, "load_max": [1, 1]}
    problem = AssignmentProblem(np.zeros((6, 2)), 1, **options)
    least = minimal_conflict(problem, find_conflict(problem), seconds=-1.0)
    assert least.message.endswith("(perhaps fewer exclude one another too)")
