"""Best choices of clients with budgets, against enumeration: within layers and counts, exact and cut short."""

import importlib
import itertools

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import clustered

import fedmoe_sched.knapsack_bound
from fedmoe_sched import AssignmentProblem, ExpertLayers, ResourceBudget, Status, solve
from fedmoe_sched.certify import dual_bound
from fedmoe_sched.instances import budgets
from fedmoe_sched.knapsack_bound import ChoiceBounds, Knapsacks, budgeted_responses


def optimum(reduced, bounds, resources, client):
    """Go through all choices of a client, and add up in order what they take."""
    best = -np.inf
    open_ = [j for j in range(reduced.shape[1]) if np.isfinite(reduced[client, j])]
    for count in range(int(bounds.least[client]), min(int(bounds.most[client]), len(open_)) + 1):
        for choice in map(list, itertools.combinations(open_, count)):
            inside = [len(np.intersect1d(members, choice)) for members in bounds.members]
            if not all(bounds.low[client] <= inside) or not all(inside <= bounds.high[client]):
                continue
            if all(sum(one.sizes[client, choice].tolist()) <= one.allowed[client] for one in resources):
                best = max(best, sum(reduced[client, choice].tolist()))
    return best


def knapsacks(seed):
    """Two clients: ties, large numbers, forced counts, layers, sizes like worths, budgets that are used up."""
    rng = np.random.default_rng(seed)
    n, m = 2, int(rng.integers(1, 9))
    shape = (n, m)
    reduced = [
        lambda: rng.normal(size=shape),
        lambda: rng.integers(-2, 6, shape).astype(float),
        lambda: np.round(4 * rng.random(shape)) / 4,
        lambda: 1e6 * rng.random(shape),
    ][rng.integers(4)]()
    gain = np.maximum(reduced, 0)
    if rng.random() < 0.3:
        reduced[rng.random(shape) < 0.2] = -np.inf
    layer_of = np.unique(rng.integers(0, rng.integers(1, 4), m), return_inverse=True)[1]
    members = tuple(np.flatnonzero(layer_of == layer) for layer in range(layer_of.max() + 1))
    least = rng.integers(0, 3, n) * rng.integers(0, 2)
    most = np.maximum(least, rng.integers(0, m + 1, n))
    high = rng.integers(0, 4, (n, len(members)))
    low = np.minimum(high, rng.integers(0, 4, high.shape) // 2)
    if len(members) == 1:
        low, high = least[:, None], most[:, None]
    resources = []
    for _ in range(rng.integers(1, 4)):
        size = [
            lambda: rng.integers(0, 6, shape).astype(float),
            lambda: rng.integers(0, 10, shape) / 10,
            lambda: 1e9 * rng.random(shape),
            lambda: gain + 0.1 * rng.random(shape),
        ][rng.integers(4)]()
        budget = np.array([row[rng.random(m) < rng.random()].sum() for row in size])
        budget[rng.random(n) < 0.1] = np.inf
        resources.append(Knapsacks(size, budget * (1 + 1e-9)))
    return reduced, ChoiceBounds(members, low, high, least, most), resources


@settings(max_examples=drawn(400), deadline=None)
@given(seed=st.integers(0, 2**32 - 1), states=st.sampled_from([1, 128]))
def test_best_choices_are_exact(seed, states):
    """With one state each, enumeration leaves clients of one budget in whole units to tables."""
    reduced, bounds, resources = knapsacks(seed)
    with pytest.MonkeyPatch.context() as patch:
        if states == 1:
            patch.setattr(fedmoe_sched.knapsack_bound, "_FEW", states)
            patch.setattr(fedmoe_sched.knapsack_bound, "_STEPS", (0, 0))
        found = budgeted_responses(reduced.copy(), bounds, resources)
    for client in range(len(reduced)):
        best = optimum(reduced, bounds, resources, client)
        assert found.upper[client] == pytest.approx(best, rel=1e-12, abs=1e-12)
        assert found.lower[client] == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(max_examples=drawn(300), deadline=None)
@given(seed=st.integers(0, 2**32 - 1), states=st.integers(1, 3), cells=st.sampled_from([0, 10**9]))
def test_what_is_cut_short_is_still_a_bound(seed, states, cells):
    reduced, bounds, resources = knapsacks(seed)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_FEW", states), ("_MANY", states), ("_CHEAP", cells), ("_STEPS", (1, 0))):
            patch.setattr(fedmoe_sched.knapsack_bound, name, value)
        found = budgeted_responses(reduced.copy(), bounds, resources)
    for client in range(len(reduced)):
        best = optimum(reduced, bounds, resources, client)
        noise = 1e-12 * max(1.0, abs(best)) if np.isfinite(best) else 0.0
        assert found.lower[client] - noise <= best <= found.upper[client] + noise


def test_fewer_states_prove_less():
    rng = np.random.default_rng(0)
    n, m = 20, 40
    worth, sizes = rng.random((n, m)), [rng.random((n, m)) for _ in range(3)]
    resources = [Knapsacks(size + worth, 0.3 * (size + worth).sum(axis=1)) for size in sizes]
    none, all_ = np.zeros(n, dtype=np.int64), np.full(n, m)
    bounds = ChoiceBounds((np.arange(m),), none[:, None], all_[:, None], none, all_)
    upper = []
    for most in (1, 30, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fedmoe_sched.knapsack_bound, "_FEW", most)
            patch.setattr(fedmoe_sched.knapsack_bound, "_MANY", most)
            found = budgeted_responses(worth.copy(), bounds, resources)
        assert (found.lower <= found.upper + 1e-12).all()
        upper.append(found.upper.sum())
    assert upper[0] > upper[1] > upper[2]


def test_prices_prove_optima_with_three_budgets():
    answer = solve(budgets(60, 8), "milp-scipy", certify=True)
    assert answer.status is Status.OPTIMAL
    assert dual_bound(answer.problem, np.zeros(8)) > answer.objective
    proved = solve(budgets(300, 12), "lagrangian")
    assert proved.certificate.optimal
    assert proved.bound_source == "prices"


def test_bound_with_budgets_and_layers_is_exact_for_one_client():
    """The best choices within budgets alone (0.9 + 0.5) and layers alone (0.9 + 0.8) are worth more."""
    problem = AssignmentProblem(
        [[0.9, 0.5, 0.8, 0.1]],
        2,
        layers=ExpertLayers([0, 0, 1, 1], layer_max=1),
        budgets=[ResourceBudget("memory", [2.0, 1.0, 2.0, 1.0], [3.0])],
    )
    assert dual_bound(problem, np.zeros(4)) == pytest.approx(0.5 + 0.8)


@pytest.mark.parametrize("blocks", [1, 7])
def test_threads_do_not_change_the_bound(monkeypatch, blocks):
    problem = budgets(500, 16, seed=1)
    step = -(-500 // blocks)
    cut = [slice(start, min(start + step, 500)) for start in range(0, 500, step)]
    module = importlib.import_module("fedmoe_sched.certify")
    monkeypatch.setattr(module, "row_blocks", lambda _: iter(cut))
    found = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(module, "_processors", lambda threads=threads: threads)
        found.add(dual_bound(problem, np.full(16, 0.1)))
    assert len(found) == 1


def test_sums_that_rounding_puts_above_a_budget_count_as_the_certificate_counts_them():
    """The sum in order is what a budget allows to the last bit; in another order, or as shares, it may be more."""
    rng = np.random.default_rng(5)
    sizes = rng.random((200, 12))
    allowed = np.array([sum(row[:7].tolist()) for row in sizes])
    worth = np.where(np.arange(12) < 7, 1.0, 0.9) + 0.0 * sizes
    none, most = np.zeros(200, dtype=np.int64), np.full(200, 7)
    bounds = ChoiceBounds((np.arange(12),), none[:, None], most[:, None], none, most)
    found = budgeted_responses(worth, bounds, [Knapsacks(sizes, allowed)])
    assert found.upper == pytest.approx(7.0)


def test_tables_are_used_where_enumeration_is_cut_short():
    problem = clustered(6, 30, low=0, high=9).replace(min_experts=0, capacity=30)
    rng = np.random.default_rng(2)
    sizes = rng.integers(20, 60, (6, 30)).astype(float)
    problem = problem.replace(budgets=[ResourceBudget("memory", sizes, np.full(6, 400.0))])
    exact = dual_bound(problem, np.zeros(30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fedmoe_sched.knapsack_bound, "_FEW", 1)
        patch.setattr(fedmoe_sched.knapsack_bound, "_MANY", 1)
        assert dual_bound(problem, np.zeros(30)) == pytest.approx(exact, rel=1e-12)
        patch.setattr(fedmoe_sched.knapsack_bound, "_CHEAP", 0)
        assert dual_bound(problem, np.zeros(30)) > exact * (1 + 1e-6)


def test_one_budget_in_whole_units_is_left_to_tables(monkeypatch):
    rng, n, m, solved = np.random.default_rng(0), 60, 11, []
    real = fedmoe_sched._knapsack_tables.Table.best
    monkeypatch.setattr(
        fedmoe_sched._knapsack_tables.Table, "best", lambda table: solved.append(table) or real(table)
    )
    monkeypatch.setattr(fedmoe_sched.knapsack_bound, "_FEW", 1)
    monkeypatch.setattr(fedmoe_sched.knapsack_bound, "_STEPS", (0, 0))
    sizes = rng.integers(20, 60, (n, m)).astype(float)
    least, most = rng.integers(0, 3, n), rng.integers(3, m + 1, n)
    bounds = ChoiceBounds((np.arange(m),), least[:, None], most[:, None], least, most)
    resources, worth = [Knapsacks(sizes, rng.integers(120, 240, n) + 0.5)], sizes + rng.integers(0, 9, (n, m))
    found = budgeted_responses(worth.copy(), bounds, resources)
    best = [optimum(worth, bounds, resources, client) for client in range(n)]
    assert found.lower == pytest.approx(best)
    assert found.upper == pytest.approx(best)
    assert len(solved) > n // 2


def test_budgets_next_to_nothing_take_next_to_nothing():
    bounds = ChoiceBounds((np.arange(2),), *(np.full((1, 1), k) for k in (0, 2)), np.zeros(1, int), np.full(1, 2))
    tiny = Knapsacks(np.array([[5e-324, 1e300]]), np.array([5e-324]))
    found = budgeted_responses(np.array([[1.0, 2.0]]), bounds, [tiny])
    assert found.upper[0] == 1.0


@settings(max_examples=drawn(200), deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_what_rounding_lets_into_a_budget_is_counted(seed):
    """Budgets that large and tiny sizes fill to the last bit: what large ones leave is rounding alone."""
    rng = np.random.default_rng(seed)
    n, m = 2, 8
    sizes = np.where(rng.random((n, m)) < 0.6, rng.random((n, m)), 1e-16 * rng.integers(1, 9, (n, m)))
    worth = rng.choice([1.0, 1e3, 1e-3], (n, m)) * rng.random((n, m))
    allowed = np.array([sum(row[rng.random(m) < 0.7].tolist()) for row in sizes])
    none, most = np.zeros(n, dtype=np.int64), np.full(n, m)
    bounds = ChoiceBounds((np.arange(m),), none[:, None], most[:, None], none, most)
    resources = [Knapsacks(sizes, allowed)]
    found = budgeted_responses(worth.copy(), bounds, resources)
    for client in range(n):
        best = optimum(worth, bounds, resources, client)
        assert found.lower[client] - 1e-9 <= best <= found.upper[client] + 1e-9
