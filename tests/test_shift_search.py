"""Local search within the bounds on numbers, budgets at a price: against every assignment of tiny problems."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
pytest.importorskip("ortools")

import numba

from fedmoe_sched import AssignmentProblem, ExpertLayers, Limits, ResourceBudget, solve
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import violations
from fedmoe_sched.solvers._budget_dual import Clients, Dual, weigh
from fedmoe_sched.solvers._budget_relaxation import linear_relaxation
from fedmoe_sched.solvers._budget_search import Search
from fedmoe_sched.solvers._shift_kernels import shift_search

BUDGETED = oracle.tiny_problems(budgeted=True) | oracle.tiny_problems(budgeted=True, with_layers=True)


def feasible(problem, held):
    return not violations(problem, Assignment.from_mask(held.astype(np.bool_)))


def search(clients, current, *, price=1.0, effort=3000, seed=0):
    """Search with all clients of each expert; return the worth, and the best assignment."""
    n, m = clients.gain.shape
    order = np.argsort(-clients.gain, axis=0, kind="stable").T
    near = np.where(np.isfinite(np.take_along_axis(clients.gain.T, order, axis=1)), order, -1)
    fans = np.tile(np.arange(m), (n, 1))
    prices, best = np.full((len(clients.size), n), price), np.zeros_like(current)
    record = shift_search(
        *clients.arrays[:7], clients.load_min, clients.load_max, near, fans, prices, np.ones_like(prices), current,
        best, -np.inf, effort, seed,
    )  # fmt: skip
    return record, best


@settings(max_examples=150)
@given(st.data(), BUDGETED, st.sampled_from([0.0, 0.3, 5.0]))
def test_all_but_budgets_is_kept_and_answers_keep_these_too(data, problem, price):
    if not problem.budgets:
        return
    around = oracle.every_mask(problem.replace(budgets=()))
    clients = Clients.of(problem)
    around = [mask for mask in around if np.isfinite(clients.gain[mask > 0]).all()]
    if not around:
        return
    current = data.draw(st.sampled_from(around)).copy()
    record, best = search(clients, current, price=price)
    assert feasible(problem.replace(budgets=()), current)
    masks = oracle.every_mask(problem)
    scores = np.where(np.isfinite(problem.desirability), problem.desirability, 0.0)
    if record == -np.inf:
        return
    assert feasible(problem, best)
    assert record == pytest.approx((scores * best).sum(), abs=1e-6)
    assert record <= max((scores * mask).sum() for mask in masks) + 1e-6


def layered(seed, n=4, m=12, share=0.85):
    """Place every expert of two layers once: clients take two or one of each, from a random start."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 26, (n, m)).astype(float)
    scores = 40 - sizes + rng.uniform(-3, 3, sizes.shape)
    budget = ResourceBudget("resource", sizes, np.floor(share * sizes.sum(axis=1) / n))
    layers = ExpertLayers(np.arange(m) % 2, 1, 2)
    return AssignmentProblem(scores, m, load_min=1, load_max=1, budgets=[budget], layers=layers)


@pytest.mark.parametrize("seed", range(6))
def test_it_finds_the_best_answer_within_layers(seed):
    problem = layered(seed)
    best = solve(problem, "milp-scipy")
    held = np.zeros(problem.shape, dtype=np.int8)
    # Clients 0 and 1 get two of each layer, 2 and 3 one: bounds that a plain shift would often break.
    held[np.array([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3]), np.arange(12)] = 1
    record, found = search(Clients.of(problem), held, price=20.0, effort=300_000)
    assert record == pytest.approx(best.objective)
    assert feasible(problem, found)


def test_places_are_filled_and_freed_where_loads_are_not_fixed():
    budget = ResourceBudget("memory", [2.0, 3.0, 4.0], [5.0, 5.0])
    problem = AssignmentProblem([[3.0, -1.0, 5.0], [1.0, 2.0, 1.0]], 2, budgets=[budget])
    held = np.array([[0, 1, 0], [1, 0, 0]], dtype=np.int8)
    record, best = search(Clients.of(problem), held)
    assert (record, best.tolist()) == (8.0 - 0.0, [[0, 0, 1], [1, 1, 0]])


@settings(max_examples=150)
@given(BUDGETED, st.floats(0.0, 1.0))
def test_the_linear_relaxation_keeps_the_pairs_of_good_answers(problem, part):
    if not problem.budgets or not np.isfinite(Clients.of(problem).gain).any():
        return
    relaxed, infeasible = linear_relaxation(problem, None)
    masks = oracle.every_mask(problem)
    assert not (infeasible and masks)
    if relaxed is None or not masks:
        return
    scores = np.where(np.isfinite(problem.desirability), problem.desirability, 0.0).astype(np.float64)
    worths = np.array([(scores * mask).sum() for mask in masks])
    assert relaxed.bound >= worths.max() - 1e-9
    value = float(worths.min() + part * (worths.max() - worths.min()))
    kept = relaxed.keep(value)
    for mask, worth in zip(masks, worths, strict=True):
        if worth >= value:
            assert kept[mask > 0].all()


def test_layers_need_no_kernels_of_their_own():
    plain = Clients.of(layered(0).replace(layers=None))
    for problem in (layered(0), layered(0).replace(layers=ExpertLayers(np.arange(12) % 2, [[1, 1]] * 4, [2, 2]))):
        clients = Clients.of(problem)
        assert [numba.typeof(a) for a in clients.arrays] == [numba.typeof(a) for a in plain.arrays]


@pytest.mark.parametrize("kinds", [1, 2])
def test_programs_of_the_most_promising_pairs_get_wider(monkeypatch, kinds):
    monkeypatch.setattr("fedmoe_sched.solvers._budget_search._SMALL", 0)
    problem = layered(7, share=1.2)
    more = ResourceBudget("other", np.arange(3.0, 15.0), np.full(4, 40.0))
    problem = problem.replace(budgets=[*problem.budgets, more][:kinds])
    best = solve(problem, "milp-scipy").objective
    assert best is not None
    found = Search(problem, Limits(time=10.0))
    assert found.price(None)
    found._number = 1
    sizes = []
    solver = found.solve
    monkeypatch.setattr(
        found, "solve", lambda pairs, seconds: (sizes.append(pairs.sum()), solver(pairs, seconds))[1]
    )
    while found.core(5.0):
        assert found.worth <= best + 1e-9
    assert sizes == sorted(sizes)
    assert sizes
    assert found.try_all(5.0)
    assert found.worth == pytest.approx(best)


def test_an_answer_that_is_there_is_not_forgotten(monkeypatch):
    problem = layered(3, share=1.2)
    monkeypatch.setattr(Search, "descend", lambda self, seconds, first: None)
    monkeypatch.setattr(Search, "_filled", lambda self, relaxed, share: None)
    found = Search(problem, Limits(time=10.0))
    found.spare = found.insert()
    assert found.spare is not None
    assert found.price(None)
    parts = found.start()
    assert parts is not None
    assert feasible(problem, parts.held)


@settings(max_examples=150)
@given(BUDGETED, st.booleans(), st.integers(0, 60))
def test_prices_that_come_from_what_budgets_are_worth_prove_a_bound(problem, known, steps):
    masks = oracle.every_mask(problem)
    if not problem.budgets or not masks:
        return
    clients = Clients.of(problem)
    scores = np.where(np.isfinite(problem.desirability), problem.desirability, 0.0).astype(np.float64)
    best = max((scores * mask).sum() for mask in masks)
    prices, multipliers = weigh(clients, float(best) if known else None, steps, 1.0)
    assert multipliers.shape == (len(problem.budgets), problem.n_clients)
    assert (multipliers >= 0).all()
    assert np.isfinite(prices).all()
    assert Dual.at(clients, prices)[0].bound >= best - 1e-6


def test_they_are_close_to_the_linear_relaxation_where_experts_are_many():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 101, (8, 160)).astype(float)
    budget = ResourceBudget("resource", sizes, np.floor(0.8 * sizes.sum(axis=1) / 8))
    scores = sizes - 111 + rng.integers(-10, 11, sizes.shape)
    problem = AssignmentProblem(scores, 160, load_min=1, load_max=1, budgets=[budget])
    relaxed, _ = linear_relaxation(problem, None)
    assert relaxed is not None
    clients = Clients.of(problem)
    prices, _ = weigh(clients, 2 * relaxed.bound, 400, 10.0)
    assert Dual.at(clients, prices)[0].bound <= relaxed.bound + 0.002 * abs(relaxed.bound)
