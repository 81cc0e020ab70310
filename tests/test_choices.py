"""Column generation and integer programs over choices of clients: against every assignment of tiny problems."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
pytest.importorskip("ortools")

from fedmoe_sched import (
    AssignmentProblem,
    ExpertLayers,
    Limits,
    LoadPenalty,
    ResourceBudget,
    Status,
    instances,
    solve,
)
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import objective, violations
from fedmoe_sched.solvers import _choice_program
from fedmoe_sched.solvers._budget_dual import Clients, Dual
from fedmoe_sched.solvers._choice_kernels import list_near
from fedmoe_sched.solvers._choice_master import generate
from fedmoe_sched.solvers._choice_program import choose

BUDGETED = st.one_of(
    oracle.tiny_problems(budgeted=True),
    oracle.tiny_problems(budgeted=True, penalised=True),
    oracle.tiny_problems(budgeted=True, with_layers=True),
)


def contended(n, m, *, seed=0, resources=2, step=0.0, exactly=None):
    """Clients of different budgets crowd onto the good experts; with a step, scores are tied."""
    rng = np.random.default_rng(seed)
    base = instances.clustered(n, m, seed=seed)
    scores = np.rint(base.desirability / step) * step if step else base.desirability
    sizes = [rng.integers(20, 61, (n, m)).astype(float), rng.uniform(5, 20, m)]
    budgets = [np.maximum(60, rng.lognormal(math.log(120), 0.4, n)), rng.uniform(20, 60, n)]
    return AssignmentProblem(
        scores,
        base.capacity,
        load_min=base.load_min if exactly is None else exactly,
        load_max=base.load_max if exactly is None else exactly,
        budgets=[ResourceBudget(f"resource {r}", sizes[r], budgets[r]) for r in range(resources)],
    )


def generated(clients, seconds=60.0, known=None):
    return generate(clients, np.random.default_rng(0), lambda: seconds, known)


@settings(max_examples=drawn(150))
@given(BUDGETED)
def test_the_bound_holds_and_infeasible_is_only_what_is(problem):
    clients = Clients.of(problem)
    if not problem.budgets or not np.isfinite(clients.gain).any():
        return
    best = oracle.brute_force(problem)
    found = generated(clients)
    if found.infeasible:
        assert best is None
    elif best is not None:
        assert found.dual.bound >= best - 1e-6
        assert found.dual.bound == pytest.approx(Dual.at(clients, found.dual.prices)[0].bound)


@pytest.mark.parametrize("seed", [0, 1])
def test_shares_are_worth_the_bound_and_keep_all_bounds(seed):
    problem = contended(120, 8, seed=seed)
    clients = Clients.of(problem)
    found = generated(clients)
    assert (np.where(found.shares > 0, problem.desirability, 0.0) * found.shares).sum() == pytest.approx(
        found.dual.bound, rel=1e-6
    )
    loads = found.shares.sum(axis=0)
    assert (loads >= problem.load_min - 1e-6).all()
    assert (loads <= problem.load_max + 1e-6).all()
    for resource in problem.budgets:
        used = (resource.sizes_of(np.arange(120)) * found.shares).sum(axis=1)
        assert (used <= resource.budget * (1 + 1e-9)).all()
    torn = ((found.shares > 1e-6) & (found.shares < 1 - 1e-6)).any(axis=1)
    assert torn.sum() <= 8  # a row per expert


def test_a_penalty_is_weighed_against_the_shares():
    problem = penalised(contended(120, 8), 0.05)
    found = generated(Clients.of(problem))
    gained = (np.where(found.shares > 0, problem.desirability, 0.0) * found.shares).sum()
    loads = found.shares.sum(axis=0)
    below = np.floor(loads).astype(int)
    paid = problem.load_penalty.total(below) + (loads - below) * problem.load_penalty.marginal(below + 1)
    assert gained - paid.sum() == pytest.approx(found.dual.bound, rel=1e-5)


def test_samples_keep_their_share_of_bounds_and_penalties():
    problem = contended(120, 8)
    some = np.arange(0, 120, 2)
    half = Clients.of(problem).sample(some)
    assert half.load_max.tolist() == np.ceil(problem.load_max / 2).tolist()
    costly = Clients.of(penalised(problem, 0.05))
    prices = np.full(8, 0.2)
    assert costly.sample(some).places(prices) == pytest.approx(costly.places(prices) / 2)


def test_prices_of_a_similar_problem_lead_to_the_same_bound():
    clients = Clients.of(contended(120, 8))
    first = generated(clients)
    again = generated(clients, known=first.dual.prices * 1.1)
    assert again.dual.bound == pytest.approx(first.dual.bound, rel=1e-6)


def test_without_time_there_is_a_bound_all_the_same():
    clients = Clients.of(contended(120, 8))
    assert generated(clients, seconds=0.0).dual.bound >= generated(clients).dual.bound - 1e-6


@settings(max_examples=drawn(150))
@given(st.data(), BUDGETED)
def test_choices_that_lose_little_hold_the_best_or_the_bound_says_so(data, problem):
    if not problem.budgets or not np.isfinite(Clients.of(problem).gain).any():
        return
    clients = Clients.of(problem)
    prices = np.array(
        data.draw(st.lists(st.floats(-1, 1), min_size=problem.n_experts, max_size=problem.n_experts))
    )
    dual = Dual.at(clients, prices)[0]
    best = oracle.brute_force(problem)
    found = choose(clients, dual, data.draw(st.sampled_from([0.0, 0.5, 100.0])), None, 10.0)
    worth = -math.inf
    if found.held is not None:
        assignment = Assignment.from_mask(found.held)
        assert not violations(problem, assignment)
        worth = objective(problem, assignment)
    if best is not None:
        assert best <= max(worth, found.bound) + 1e-6


def test_only_some_clients_choose_anew():
    problem = contended(60, 6)
    clients = Clients.of(problem)
    best = solve(problem, "milp-scipy")
    held = best.assignment.toarray().astype(bool)
    some = np.arange(10, 30)
    tangled = held.copy()
    tangled[some] = False
    dual = generated(clients).dual
    found = choose(clients, dual, 10.0, tangled, 10.0, some)
    others = np.setdiff1d(np.arange(60), some)
    assert (found.held[others] == held[others]).all()
    assert not violations(problem, Assignment.from_mask(found.held))
    assert found.bound == math.inf
    assert np.where(found.held, problem.desirability, 0.0).sum() == pytest.approx(best.objective)


def penalised(problem, weight):
    n, m = problem.shape
    history = np.random.default_rng(0).integers(0, 1 + n // m, m)
    return problem.replace(load_penalty=LoadPenalty.quadratic(weight, history), load_min=0, load_max=n)


def in_layers(problem):
    """Let clients take an expert of each of two layers, if two of them fit, and no more than two."""
    n, m = problem.shape
    layer_of = np.arange(m) % 2
    fits = np.ones((n, m, m), dtype=np.bool_)
    for resource in problem.budgets:
        sizes = resource.sizes_of(np.arange(n))
        fits &= sizes[:, :, None] + sizes[:, None, :] <= resource.budget[:, None, None]
    pairs = fits[:, layer_of == 0][:, :, layer_of == 1].any(axis=(1, 2)) & (problem.capacity > 1)
    layers = ExpertLayers(layer_of, np.repeat(pairs[:, None], 2, axis=1).astype(int), np.full((n, 2), 2))
    return problem.replace(layers=layers, load_min=problem.load_min // 2)


@pytest.mark.parametrize(
    "problem",
    [
        contended(60, 6),
        contended(60, 6, step=0.05),
        contended(80, 10, resources=1, exactly=8),
        contended(60, 6, seed=1, step=0.1, exactly=7),
        penalised(contended(60, 6), 0.05),
        penalised(contended(60, 6, step=0.05), 0.01),
        penalised(contended(8, 12, resources=1), 0.1),
        in_layers(contended(60, 6)),
        in_layers(penalised(contended(60, 6), 0.05)),
        in_layers(contended(12, 16)),
    ],
    ids=[
        *["spread", "tied", "exact loads", "tied, exact loads", "penalised", "tied, penalised", "few, penalised"],
        *["layers", "layers, penalised", "few, layers"],
    ],
)
def test_many_clients_are_solved_to_the_optimum(problem):
    ours, reference = solve(problem, "lagrangian", limits=Limits(time=20.0)), solve(problem, "milp-scipy")
    assert ours.status is reference.status is Status.OPTIMAL
    assert ours.objective == pytest.approx(reference.objective)
    assert ours.verify().feasible


def test_too_little_room_for_many_clients_is_infeasible():
    problem = contended(60, 6, exactly=40)
    assert solve(problem, "milp-scipy").status is Status.INFEASIBLE
    assert solve(problem, "lagrangian").status is Status.INFEASIBLE


def test_choices_of_another_objective_are_a_start():
    """With all of them there is nothing left to generate but what the scores of the second problem ask for."""
    problem = contended(120, 8)
    first = generated(Clients.of(problem.replace(desirability=0.5 * problem.desirability)))
    clients = Clients.of(problem)
    alone, helped = (
        generated(clients),
        generate(clients, np.random.default_rng(0), lambda: 60.0, 2.0 * first.dual.prices, first.pool),
    )
    assert helped.dual.bound == pytest.approx(alone.dual.bound, rel=1e-6)
    owners, choices = helped.pool
    known = {(owner, choice.tobytes()) for owner, choice in zip(*first.pool, strict=True)}
    assert known <= {(owner, choice.tobytes()) for owner, choice in zip(owners, choices, strict=True)}
    assert len(owners) < len(alone.pool[0]) + len(first.pool[0])


def test_clients_with_too_many_nearly_best_choices_have_their_best_one():
    problem = contended(40, 10, step=10.0)  # all scores are 0: every choice is as good as any
    clients = Clients.of(problem.replace(load_min=0, load_max=40, capacity=6))
    dual = Dual.at(clients, np.full(10, -1e-3))[0]
    listed = list_near(*clients.arrays, np.inf, dual.prices, dual.worth, 1.0, 1)
    assert (np.diff(listed[1]) == 0).any()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_choice_program, "_EACH", 1)
        found = choose(clients, dual, 1.0, None, 30.0)
    assert found.held is not None
    assert found.bound == math.inf
    assert (found.held.sum(axis=1) > 0).all()
