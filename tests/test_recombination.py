"""Some clients anew, all others fixed: against every assignment of tiny problems."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import oracle
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from fedmoe_sched import AssignmentProblem, ResourceBudget, solve
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import violations
from fedmoe_sched.solvers._budget_dual import Clients, Dual
from fedmoe_sched.solvers._budget_relaxation import linear_relaxation
from fedmoe_sched.solvers._knapsack_kernels import respond
from fedmoe_sched.solvers._recombination import Parts, rounded
from fedmoe_sched.solvers._recombination_kernels import recombine

PRICES = st.floats(-1.0, 1.0)
BUDGETED = oracle.tiny_problems(budgeted=True) | oracle.tiny_problems(budgeted=True, with_layers=True)


def finite_scores(problem):
    return np.where(np.isfinite(problem.desirability), problem.desirability, 0.0).astype(np.float64)


def call(clients, held, some, prices, *, allowed=-1.0, ascent=10, listed=10_000, effort=10_000_000):
    loads = held.sum(axis=0, dtype=np.int64)
    gained, slack = recombine(
        *clients.arrays, clients.load_min, clients.load_max, prices, held, loads, np.array(some), 1e-9, allowed,
        ascent, listed, effort,
    )  # fmt: skip
    assert (loads == held.sum(axis=0)).all()
    return gained, slack


@settings(max_examples=drawn(150))
@given(st.data(), BUDGETED)
def test_the_best_answer_for_a_part_is_found_and_proved(data, problem):
    masks = oracle.every_mask(problem)
    if not masks or not problem.budgets:
        return
    held = data.draw(st.sampled_from(masks)).copy()
    n, m = problem.shape
    some = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    others = [i for i in range(n) if i not in some]
    scores = finite_scores(problem)
    best = max((scores * mask).sum() for mask in masks if (mask[others] == held[others]).all())
    before = (scores * held).sum()
    prices = data.draw(hnp.arrays(np.float64, m, elements=PRICES))
    fixed = held[others].copy()
    gained, slack = call(Clients.of(problem), held, some, prices)
    assert (held[others] == fixed).all()
    assert not violations(problem, Assignment.from_mask(held.astype(np.bool_)))
    assert (scores * held).sum() == pytest.approx(best, abs=1e-6)
    assert gained == pytest.approx(best - before, abs=1e-6)
    assert slack == pytest.approx(0.0, abs=1e-6)


def test_who_must_take_experts_may_take_some_that_cost_more_than_a_choice_may_lose():
    budget = ResourceBudget("memory", np.zeros(3), np.zeros(3))
    problem = AssignmentProblem(
        [[1.0, 1.0, 1.0], [0.5, 1.0, 1.0], [0.75, 0.25, 1.0]],
        [0, 3, 1],
        min_experts=[0, 3, 1],
        load_max=[1, 2, 3],
        budgets=[budget],
    )
    held = np.array([[0, 0, 0], [1, 1, 1], [0, 1, 0]], dtype=np.int8)
    gained, slack = call(Clients.of(problem), held, range(3), np.ones(3))
    assert held.tolist() == [[0, 0, 0], [1, 1, 1], [0, 0, 1]]
    assert (gained, slack) == (pytest.approx(0.75), 0.0)


@settings(max_examples=drawn(100))
@given(st.data(), BUDGETED)
def test_a_search_that_is_cut_off_claims_no_more_than_is_true(data, problem):
    masks = oracle.every_mask(problem)
    if not masks or not problem.budgets:
        return
    held = data.draw(st.sampled_from(masks)).copy()
    scores = finite_scores(problem)
    best = max((scores * mask).sum() for mask in masks)
    prices = data.draw(hnp.arrays(np.float64, problem.n_experts, elements=PRICES))
    listed, effort = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 60))
    before = (scores * held).sum()
    gained, slack = call(
        Clients.of(problem), held, range(problem.n_clients), prices, ascent=2, listed=listed, effort=effort
    )
    assert not violations(problem, Assignment.from_mask(held.astype(np.bool_)))
    assert (scores * held).sum() == pytest.approx(before + gained, abs=1e-6)
    assert best <= before + gained + slack + 1e-6


@settings(max_examples=drawn(100))
@given(st.data(), BUDGETED)
def test_what_is_missing_is_placed_if_the_bounds_can_be_kept(data, problem):
    masks = oracle.every_mask(problem)
    if not problem.budgets:
        return
    held = np.zeros(problem.shape, dtype=np.int8)
    gained, _ = call(
        Clients.of(problem), held, range(problem.n_clients), np.zeros(problem.n_experts), allowed=1e6, ascent=0
    )
    feasible = not violations(problem, Assignment.from_mask(held.astype(np.bool_)))
    assert feasible == bool(masks)
    assert feasible == (gained > 0.0 or bool(masks and not held.any()))


def jobs(seed, n=6, m=40, kinds=1):
    rng = np.random.default_rng(seed)
    budgets = []
    for r in range(kinds):
        sizes = rng.integers(5, 60, (n, m)).astype(float)
        budgets.append(
            ResourceBudget(f"resource {r}", sizes, np.floor((0.5 + 0.1 * kinds) * sizes.sum(axis=1) / n))
        )
    scores = 120 - budgets[0].size + rng.integers(-3, 4, (n, m))
    return AssignmentProblem(scores, m, load_min=1, load_max=1, budgets=budgets)


@pytest.mark.parametrize("kinds", [1, 2])
def test_parts_start_from_shares_and_end_at_the_optimum(kinds):
    problem = jobs(3, kinds=kinds)
    clients = Clients.of(problem)
    relaxed, _ = linear_relaxation(problem, None)
    assert relaxed is not None
    dual = Dual.at(clients, relaxed.prices)[0].estimate(clients, relaxed.multipliers)
    parts = Parts(clients, dual, rounded(clients, relaxed.shares), np.random.default_rng(0), lambda: 10.0)
    assert (parts.loads < 1).any()  # shares of a half are no assignment
    assert parts.fill()
    worths, slack = [parts.worth], np.inf
    for _ in range(2000):
        _, slack = parts.improve()
        worths.append(parts.worth)
        assert not violations(problem, Assignment.from_mask(parts.held.astype(np.bool_)))
        if slack == 0.0:
            break
    assert slack == 0.0
    assert worths == sorted(worths)
    assert worths[-1] == pytest.approx(solve(problem, "milp-scipy").objective)


@settings(max_examples=drawn(200))
@given(hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(-2.0, 5.0)), st.integers(0, 60), st.randoms())
def test_a_client_with_whole_sizes_chooses_best(gain, budget, random):
    m = len(gain)
    units = np.array([[random.randrange(20) for _ in range(m)]])
    worth, chosen = np.empty(1), np.empty((1, m), dtype=np.int8)
    size = units[None] / max(budget, 1)
    gain = np.where(units[0] <= budget, gain, -np.inf)[None]
    layers = np.zeros(m, np.int64), np.zeros((1, 1), np.int64), np.full((1, 1), m)
    counts = np.zeros(1, np.int64), np.full(1, m)
    respond(gain, size, *counts, *layers, units, np.array([budget]), np.inf, np.zeros(m), chosen, worth)
    table = np.zeros(budget + 1)
    for value, unit in zip(gain[0], units[0], strict=True):
        if value > 0:
            shifted = np.concatenate([np.full(unit, -np.inf), table[: budget + 1 - unit]])
            table = np.maximum(table, shifted + value)
    assert worth[0] == pytest.approx(table[budget], abs=1e-7)
    held = chosen[0].astype(bool)
    assert units[0, held].sum() <= budget
    assert gain[0, held].sum() == pytest.approx(table[budget], abs=1e-7)
