"""Every bound of a conflict that `solve` names is needed: without any one of them, the others can be met."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import brute_force, layer_range, linear_program, tiny_problems
from test_feasibility import grouped, recount

from fedmoe_sched import AssignmentProblem, ExpertLayers, ResourceBudget, Status, solve
from fedmoe_sched.feasibility import budget_conflict, find_conflict
from fedmoe_sched.instances import generate
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


def keep(problem, bounds):
    """Keep some bounds, and what clients can do: capacities, layer_max, eligible pairs, budgets."""
    n, m = problem.shape
    kept = {"min_experts": np.zeros(n, int), "load_min": np.zeros(m, int), "load_max": np.full(m, 2**53)}
    layers = problem.layers
    least = None if layers is None else np.zeros((n, layers.n_layers), dtype=int)
    for kind, number, layer in bounds:
        if kind == "layer_min":
            least[number, layer] = layer_range(problem, number, layer)[0]
        else:
            kept[kind][number] = getattr(problem, kind)[number]
    if layers is not None:
        layers = ExpertLayers(layers.layer_of, least, layers.layer_max)
    return problem.replace(layers=layers, **kept)


def assert_every_bound_is_needed(problem, conflict):
    bounds = conflict.bounds
    assert conflict.minimal
    assert len(set(bounds)) == len(bounds) > 0
    assert brute_force(keep(problem, bounds)) is None
    for left_out in bounds:
        assert brute_force(keep(problem, [one for one in bounds if one != left_out])) is not None, str(left_out)
    for one in bounds:
        assert one.number in (conflict.experts if one.kind.startswith("load") else conflict.clients)


@settings(deadline=None, max_examples=drawn(300))
@given(
    problem=st.one_of(
        tiny_problems(),
        tiny_problems(with_layers=True),
        tiny_problems(budgeted=True),
        tiny_problems(with_layers=True, budgeted=True),
    )
)
def test_every_bound_is_needed_with_layers_and_budgets(problem):
    if brute_force(problem) is None:
        answer = solve(problem, "milp-scipy")
        assert answer.status is Status.INFEASIBLE
        assert_every_bound_is_needed(problem, answer.conflict)


def test_clients_that_their_layers_keep_away_are_named():
    """Both clients have one place, and must give it to the other layer: nobody is left for expert 1."""
    layers = ExpertLayers([1, 0], [0, 1], [1, 1])
    conflict = solve(AssignmentProblem(np.ones((2, 2)), 1, load_min=[0, 1], layers=layers)).conflict
    assert list(map(str, conflict.bounds)) == ["load_min[1]", "layer_min[0, 1]", "layer_min[1, 1]"]
    assert (conflict.clients, conflict.experts) == ((0, 1), (1,))


def test_clients_of_one_layer_alone_are_named():
    """Of two layers the second one has two places for five clients: three of them are one too many."""
    layers = ExpertLayers([0, 0, 1, 1], [1, 1], [2, 1])
    problem = AssignmentProblem(np.ones((5, 4)), 2, min_experts=2, load_max=[5, 5, 1, 1], layers=layers)
    conflict = solve(problem).conflict
    assert list(map(str, conflict.bounds)) == [
        "load_max[2]",
        "load_max[3]",
        "layer_min[0, 1]",
        "layer_min[1, 1]",
        "layer_min[2, 1]",
    ]
    assert conflict.message == (
        "clients {0, 1, 2} must take 3 places at experts {2, 3} of layer 1 (layer_min), "
        "only 2 are open to them (load_max)"
    )


def test_many_clients_with_layers():
    layers = ExpertLayers(np.arange(8) % 2, 1, 2)
    eligible = np.random.default_rng(0).random((3000, 8)) < 0.7
    problem = AssignmentProblem(np.zeros((3000, 8)), 4, load_max=[3000, 2] * 4, eligible=eligible, layers=layers)
    found = find_conflict(problem)
    conflict = minimal_conflict(problem, found, seconds=60)
    assert conflict.minimal
    assert len(conflict.clients) == conflict.required == conflict.available + 1 < len(found.clients)
    for left_out in conflict.bounds:
        rest = keep(problem, [one for one in conflict.bounds if one != left_out])
        assert linear_program(rest.replace(load_max=np.minimum(rest.load_max, 3000))) is not None


def test_alike_clients_with_layers_are_needed_together():
    layers = ExpertLayers([0, 0, 1, 1], [1, 1], [2, 1])
    problem = AssignmentProblem(
        np.ones((50_000, 4)), 2, min_experts=2, load_max=[50_000, 50_000, 500, 501], layers=layers
    )
    conflict = minimal_conflict(problem, find_conflict(problem), seconds=60)
    assert conflict.minimal
    assert conflict.clients == tuple(range(1002))
    assert {bound.kind for bound in conflict.bounds} == {"load_max", "layer_min"}


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


def test_every_bound_of_many_clients_is_needed_within_budgets():
    problem = generate("budgets", 100, 8, seed=6)
    problem = problem.replace(load_min=(0.75 * problem.load_max).astype(int))
    assert find_conflict(problem) is None
    conflict = minimal_conflict(problem, budget_conflict(problem, "lagrangian"), seconds=60.0)
    assert conflict.minimal
    assert {bound.kind for bound in conflict.bounds} == {"load_min"}
    wanted = [bound.number for bound in conflict.bounds]

    def possible(experts):
        kept = np.where(np.isin(np.arange(8), experts), problem.load_min, 0)
        alone = problem.replace(load_min=kept, load_max=100, min_experts=0)
        return solve(alone, "milp-scipy").status is Status.OPTIMAL

    assert not possible(wanted)
    assert all(possible([j for j in wanted if j != out]) for out in wanted)


def test_out_of_time_within_budgets_is_said():
    memory = ResourceBudget("memory", [3, 3, 3, 1], [5, 5])
    problem = AssignmentProblem(np.ones((2, 4)), 2, load_min=1, load_max=1, budgets=[memory])
    least = minimal_conflict(problem, budget_conflict(problem, "milp-scipy"), seconds=-1.0)
    assert not least.minimal
    assert len(least.bounds) == 8
    assert least.message.endswith("(perhaps fewer exclude one another too)")


@pytest.mark.parametrize("kind", ["experts", "clients"])
def test_out_of_time_is_said(kind):
    options = {"load_min": 4} if kind == "experts" else {"min_experts": 1, "load_max": [1, 1]}
    problem = AssignmentProblem(np.zeros((6, 2)), 1, **options)
    least = minimal_conflict(problem, find_conflict(problem), seconds=-1.0)
    assert least.message.endswith("(perhaps fewer exclude one another too)")
