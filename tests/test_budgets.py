"""Resource budgets: the type, the certificate, refusals, files; the contract suite has the backends."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import brute_force, clustered, enumerate_assignments, tiny_problems

from fedmoe_sched import (
    AssignmentProblem,
    Capability,
    CapacityProfile,
    ExpertCost,
    ExpertLayers,
    InputError,
    LoadPenalty,
    ResourceBudget,
    Status,
    UnsupportedProblemError,
    certify,
    dual_bound,
    schedule,
    solve,
    solvers,
)
from fedmoe_sched._budgets import fitting_counts, fitting_pairs, network_relaxation
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import violations
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.instances import soft
from fedmoe_sched.problem_files import load_problem, save_problem
from fedmoe_sched.registry import solver_class
from fedmoe_sched.scores import resource_budgets, round_seconds

# Two clients, three experts; client 0 can hold expert 0 alone or experts 1 and 2, client 1 anything.
MEMORY = ResourceBudget("memory", [4, 2, 3], [5, np.inf])
PROBLEM = AssignmentProblem([[5, 3, 3], [1, 1, 1]], 2, budgets=[MEMORY])


def pairs(*chosen: tuple[int, int], problem: AssignmentProblem = PROBLEM) -> Assignment:
    return Assignment.from_pairs([i for i, _ in chosen], [j for _, j in chosen], problem.shape)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", [1.0], [1.0]), r"name = '': must be text"),
        (("memory", [1.0, -2.0], [1.0]), r"size\[1\] = -2.0: must be >= 0"),
        (("memory", [[1.0], [-2.0]], [1.0, 1.0]), r"size\[1, 0\] = -2.0: must be >= 0"),
        (("memory", [1.0, np.inf], [1.0]), r"size\[1\] = inf: must be finite"),
        (("memory", [1.0], [1.0, -1.0]), r"budget\[1\] = -1.0: must be >= 0"),
        (("memory", [1.0], [np.nan]), r"budget\[0\] = nan: must be finite"),
        (("memory", [1.0], 3.0), r"budget: has shape \(\), must be one-dimensional"),
        (("memory", [[1.0], [2.0]], [1.0]), r"budget: has shape \(1,\), must be \(2,\) \(one per client\)"),
    ],
)
def test_bad_budget_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ResourceBudget(*arguments)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([3], r"budgets\[0\]: is a int, must be a ResourceBudget"),
        ([ResourceBudget("a", [1, 1], [1, 1])], r"budgets\[0\]: is of 2 clients x 2 experts, must be of 2 x 3"),
        ([MEMORY, MEMORY], r"budgets\[1\]: there is another resource called 'memory'"),
    ],
)
def test_bad_budgets_of_a_problem_are_refused(budgets, message):
    with pytest.raises(InputError, match=message):
        PROBLEM.replace(budgets=budgets)


def test_budgets_are_frozen_and_shown():
    assert not MEMORY.size.flags.writeable
    assert not MEMORY.budget.flags.writeable
    assert repr(
        PROBLEM
    ) == "AssignmentProblem(2 clients x 3 experts, 4 slots, load [0-0]..2, memory budgets)".replace("[0-0]", "0")
    assert not PROBLEM.is_separable


def test_violation_names_resource_client_and_sum():
    broken = violations(PROBLEM, pairs((0, 0), (0, 1), (1, 0), (1, 1)))
    assert [str(violation) for violation in broken] == ["6 exceeds the memory budget[0] = 5"]
    assert violations(PROBLEM, pairs((0, 1), (0, 2))) == ()


def test_sum_that_rounding_puts_above_the_budget_is_kept():
    tenths = AssignmentProblem(np.ones((1, 2)), 2, budgets=[ResourceBudget("seconds", [0.1, 0.2], [0.3])])
    assert 0.1 + 0.2 > 0.3
    assert violations(tenths, pairs((0, 0), (0, 1), problem=tenths)) == ()


def test_bound_at_no_prices_is_the_sum_of_the_clients_own_knapsacks():
    assert dual_bound(PROBLEM, np.zeros(3)) == 6 + 2
    assert certify(PROBLEM, pairs((0, 1), (0, 2), (1, 0), (1, 1)), np.zeros(3)).optimal


def test_bound_of_whole_scores_is_rounded_down():
    assert dual_bound(PROBLEM, np.full(3, 0.1)) == 8
    half = PROBLEM.replace(desirability=[[5, 3, 3.5], [1, 1, 1]])
    assert dual_bound(half, np.full(3, 0.1)) == pytest.approx(6.5 + 2 - 0.4 + 0.6)


@given(problem=tiny_problems(budgeted=True), data=st.data())
def test_bound_is_never_below_an_optimum(problem, data):
    optimum = brute_force(problem)
    prices = data.draw(st.lists(st.floats(-2, 2), min_size=problem.n_experts, max_size=problem.n_experts))
    if optimum is not None:
        assert dual_bound(problem, prices) >= optimum - 1e-9


@given(problem=tiny_problems(budgeted=True, penalised=True), data=st.data())
def test_bound_is_never_below_an_optimum_with_load_penalties(problem, data):
    optimum = brute_force(problem)
    prices = data.draw(st.lists(st.floats(-2, 3), min_size=problem.n_experts, max_size=problem.n_experts))
    if optimum is not None:
        assert dual_bound(problem, prices) >= optimum - 1e-9


def test_bound_with_load_penalties_is_knapsacks_and_conjugates():
    """At price 1 client 0 keeps 4 of expert 0, or 2 + 2; the conjugates of l(l - 1)/2 at 1 are 1 each."""
    penalised = PROBLEM.replace(load_penalty=LoadPenalty.quadratic(1.0, -0.5, n_experts=3))
    assert dual_bound(penalised, np.ones(3)) == pytest.approx(4 + 0 + 3 * 1)
    answer = solve(penalised)
    assert answer.objective == brute_force(penalised) == 7
    assert dual_bound(penalised, np.ones(3)) == answer.objective


@pytest.mark.parametrize("seed", [10, 43])
@pytest.mark.parametrize("penalised", [False, True])
def test_cbc_does_not_cut_off_the_optimum(seed, penalised):
    """With its usual cuts CBC calls less than the optimum optimal in three of these four problems."""
    if solver_class("ilp-pulp").missing():
        pytest.skip("no PuLP")
    problem, rng = soft(40, 6, seed=seed), np.random.default_rng(seed)
    problem = problem.replace(
        desirability=8 * problem.desirability + 1,
        capacity=4,
        min_experts=1,
        load_max=None if penalised else 20,
        load_penalty=problem.load_penalty if penalised else None,
        budgets=[
            ResourceBudget("memory", rng.uniform(1, 3, 6), rng.uniform(3, 5, 40)),
            ResourceBudget("seconds", rng.integers(1, 9, (40, 6)), np.full(40, 12.0)),
        ],
    )
    assert solve(problem, "ilp-pulp").objective == pytest.approx(solve(problem, "milp-scipy").objective, rel=1e-9)


def test_auto_takes_the_backend_for_budgets_with_layers_too():
    answer = solve(PROBLEM.replace(layers=ExpertLayers([0, 0, 1], layer_max=1)), certify=True)
    assert answer.solver == "lagrangian"
    assert answer.solver_reason == "2 x 3 with budgets and layers: fastest exact backend"


def test_bound_is_exact_where_sizes_are_whole_numbers():
    """With one resource and no load bounds the clients' knapsacks are all there is, counts included."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        n, m = 3, 7
        problem = AssignmentProblem(
            np.round(rng.random((n, m)), 3),
            rng.integers(1, m + 1, n),
            budgets=[ResourceBudget("memory", rng.integers(1, 20, (n, m)), rng.integers(10, 50, n))],
        )
        assert dual_bound(problem, np.zeros(m)) == pytest.approx(brute_force(problem), abs=1e-9)


def test_bound_is_close_where_sizes_are_large_or_no_whole_numbers():
    rng = np.random.default_rng(1)
    sizes = rng.random((2, 6)) * 1e9
    problem = AssignmentProblem(
        rng.random((2, 6)), 4, min_experts=1, budgets=[ResourceBudget("memory", sizes, [1.5e9, 2e9])]
    )
    optimum = brute_force(problem)
    assert optimum <= dual_bound(problem, np.zeros(6)) <= optimum * 1.01


@given(problem=tiny_problems(bounded=False, budgeted=True))
def test_counts_of_what_fits_bound_every_choice(problem):
    fits = fitting_pairs(problem)
    surely, at_most = fitting_counts(problem, fits)
    open_ = problem.replace(min_experts=0)
    for i, options in enumerate(enumerate_assignments(open_).choices):
        assert all(fits[i, list(option)].all() for option in options)
        assert max(map(len, options)) <= at_most[i]
        of_size = [option for option in options if len(option) == surely[i]]
        number = int(fits[i].sum())
        assert len(of_size) == np.prod(range(number - surely[i] + 1, number + 1)) // np.prod(
            range(1, surely[i] + 1)
        )


def test_relaxation_keeps_what_counting_can_keep():
    relaxed = network_relaxation(PROBLEM.replace(capacity=3))
    assert relaxed.budgets == ()
    assert relaxed.capacity.tolist() == [2, 3]
    assert network_relaxation(relaxed) is relaxed


def test_conflict_names_clients_that_cannot_afford_what_they_must_take():
    conflict = find_conflict(PROBLEM.replace(capacity=3, min_experts=[3, 0]))
    assert (conflict.clients, conflict.required, conflict.available) == ((0,), 3, 2)
    assert conflict.message == ("client 0 must take 3 places (min_experts), only 2 fit the budgets of memory")


def test_conflict_counts_only_pairs_that_fit():
    tight = PROBLEM.replace(budgets=[ResourceBudget("memory", [4, 2, 3], [3, 3])], load_min=[1, 0, 0])
    assert find_conflict(tight).message == ("expert 0 needs 1 clients (load_min), only 0 eligible slots reach it")


def test_backends_without_budgets_refuse_with_a_reason():
    for entry in solvers():
        if Capability.BUDGETS not in entry.capabilities:
            with pytest.raises(UnsupportedProblemError, match=f"{entry.name} does not take budgets"):
                solve(PROBLEM, entry.name)


@pytest.mark.parametrize("size", [[4.0, 2.5, 3.0], [[4, 2, 3], [1, 2, 0.5]]])
def test_budgets_survive_a_file(tmp_path, size):
    budgets = [ResourceBudget("memory", size, [5, np.inf]), ResourceBudget("seconds", [1, 1, 1], [2, 1])]
    save_problem(PROBLEM.replace(budgets=budgets), tmp_path / "problem.npz")
    read = load_problem(tmp_path / "problem.npz").budgets
    assert [resource.name for resource in read] == ["memory", "seconds"]
    for one, other in zip(read, budgets, strict=True):
        np.testing.assert_array_equal(one.size, other.size)
        np.testing.assert_array_equal(one.budget, other.budget)


def test_file_with_a_bad_or_incomplete_budget_is_refused(tmp_path):
    path = tmp_path / "problem.npz"
    plain = {"desirability": np.ones((2, 3)), "capacity": [1, 1], "budget_names": ["memory"]}
    np.savez(path, **plain, budget_0_size=[1, 1, 1])
    with pytest.raises(InputError, match="has no array called 'budget_0_limit'"):
        load_problem(path)
    np.savez(path, **plain, budget_0_size=[1, 1, 1], budget_0_limit=[-1, 1])
    with pytest.raises(InputError, match=r"problem.npz: budget_0: budget\[0\] = -1.0: must be >= 0"):
        load_problem(path)


def test_widely_different_clients_are_bounded_without_tables():
    """Hundreds of experts, budgets of bytes that are no multiples of anything: tables would be too large."""
    problem = clustered(40, 60, low=0, high=2)
    rng = np.random.default_rng(2)
    sizes = rng.lognormal(0, 1, 60)
    budgets = [
        ResourceBudget("memory", sizes, rng.uniform(0.5, 2, 40)),
        ResourceBudget("s", sizes[::-1], np.ones(40)),
    ]
    tight = problem.replace(budgets=budgets, min_experts=0)
    free = network_relaxation(tight)
    assert 0 < dual_bound(tight, np.zeros(60)) < dual_bound(free, np.zeros(60))


def test_schedule_takes_budgets_and_fills_only_what_fits_for_sure():
    budgets = [ResourceBudget("memory", [1, 1, 3], [4, 2, 3])]
    answer = schedule(
        [[0.1, 0.2, 0.9], [0.1, 0.2, 0.9], [0.1, -0.2, -0.9]], [1] * 3, 3,
        usage_weight=0, balance=None, budgets=budgets,
    )  # fmt: skip
    # Any two fit client 0 and one fits client 2, whichever they are; client 1 cannot hold expert 2 at all.
    assert answer.problem.min_experts.tolist() == [2, 2, 1]
    assert answer.experts_by_client() == {0: [1, 2], 1: [0, 1], 2: [0]}


def test_schedule_balances_within_what_budgets_allow():
    rng = np.random.default_rng(3)
    budgets = [ResourceBudget("memory", [1, 2, 4, 8], rng.integers(1, 12, 30))]
    answer = schedule(rng.random((30, 4)), np.ones(4), 4, balance=0.1, budgets=budgets)
    assert answer.status is Status.OPTIMAL
    assert (budgets[0].used(answer.pairs) <= budgets[0].budget).all()
    assert answer.relaxed
    assert (answer.loads <= answer.problem.load_max).all()


def test_budgets_of_profiles_allow_what_the_time_model_allows():
    """Brute force over all choices of a client: within budgets exactly if memory and time suffice."""
    cost = ExpertCost(
        expert_bytes=[2e5, 3e5, 5e5, 1e5], expert_compute=[1, 2, 0.5, 1], shared_bytes=1e5, samples=50
    )
    profiles = [
        CapacityProfile(20, 4e6, 1e5, 5e4, 1.0),
        CapacityProfile(200, 2e6, 1e6, 1e6),
        CapacityProfile(5, 1e5, 1e5, 1e5),
    ]
    budgets = resource_budgets(profiles, cost, 4, deadline=30.0, upload_bytes=[8e5, 1e9, 1e9])
    assert [resource.name for resource in budgets] == ["memory", "seconds", "upload"]
    for choice in itertools.product([0, 1], repeat=4):
        trained = np.tile(np.array(choice, dtype=bool), (3, 1))
        seconds = round_seconds(profiles, cost, trained)
        size = 1e5 + trained @ np.array([2e5, 3e5, 5e5, 1e5])
        fits = (seconds <= 30.0) & (4 * size <= [4e6, 2e6, 1e5]) & (size <= [8e5, 1e9, 1e9])
        used = [(resource.sizes_of(slice(None)) * trained).sum(axis=1) <= resource.budget for resource in budgets]
        if any(choice):
            np.testing.assert_array_equal(np.all(used, axis=0), fits)


def test_certify_proves_a_bound_for_an_answer_with_budgets():
    answer = solve(PROBLEM, "milp-scipy", certify=True)
    assert answer.certificate.bound == 8
    assert answer.bound_source == "prices"
    assert answer.verify().optimal


def test_bound_that_a_backend_vouches_for_is_called_so():
    contested = PROBLEM.replace(load_max=1)
    answer = solve(contested, "ilp-ortools")
    assert (answer.status, answer.bound_source) == (Status.OPTIMAL, "backend")
    assert "(the backend's word)" in repr(answer)
    assert answer.to_dict()["bound_source"] == "backend"
    assert answer.verify().bound is None


def test_infeasible_budgets_without_a_cut_are_an_answer():
    """Both clients can hold two of the smaller experts, and four have to go somewhere; but three of them are 3."""
    problem = AssignmentProblem(
        np.ones((2, 4)), 2, load_min=1, load_max=1, budgets=[ResourceBudget("memory", [3, 3, 3, 1], [5, 5])]
    )
    answer = solve(problem, "milp-scipy")
    assert (answer.status, answer.conflict.kind) == (Status.INFEASIBLE, "budgets")
    assert answer.conflict.message == (
        "load_min of experts {0, 1, 2}: no assignment keeps all of them within the budgets of memory "
        "(a search says so, no cut shows it)"
    )
