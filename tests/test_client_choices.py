"""What a client with budgets and layers chooses, and its nearly best choices: against all sets of its experts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from fedmoe_sched import AssignmentProblem, ExpertLayers, ResourceBudget
from fedmoe_sched.solvers._budget_dual import Clients, Dual
from fedmoe_sched.solvers._choice_kernels import list_near


def one_client(seed):
    rng = np.random.default_rng(seed)
    m = int(rng.integers(2, 9))
    n_layers = int(rng.integers(1, min(m, 4) + 1))
    layer_of = rng.permutation(np.concatenate([np.arange(n_layers), rng.integers(n_layers, size=m - n_layers)]))
    experts = np.bincount(layer_of)
    low = np.minimum(experts, rng.choice([0, 0, 1, 2], n_layers))
    high = np.maximum(low, rng.integers(experts + 1))
    capacity = int(rng.integers(m + 1))
    whole = bool(rng.integers(2))
    budgets = []
    for number in range(int(rng.integers(1, 4))):
        sizes = rng.integers(1, 6, m).astype(float) if whole else rng.uniform(0.05, 1.05, m)
        budgets.append(ResourceBudget(f"resource {number}", sizes, [sizes.sum() * rng.uniform(0.1, 0.9)]))
    return AssignmentProblem(
        rng.integers(-3, 4, (1, m)).astype(float) if rng.integers(2) else rng.normal(size=(1, m)),
        capacity,
        min_experts=int(rng.integers(min(capacity, 2) + 1)),
        layers=ExpertLayers(layer_of, low, high) if rng.integers(5) else None,
        budgets=budgets,
    )


def every_choice(problem, short=None):
    """Map the sets of experts that the client may have, as bits, to what they are worth.

    With `short`, layers may lack experts, and are worth so much more for each that they do not.
    """
    [scores], m = problem.desirability, problem.n_experts
    choices = {}
    for bits in range(1 << m):
        held = np.array([bits >> j & 1 for j in range(m)], dtype=bool)
        good = problem.min_experts[0] <= held.sum() <= problem.capacity[0]
        good &= all(one.sizes_of(np.array([0]))[0, held].sum() <= one.allowed[0] for one in problem.budgets)
        if problem.layers is not None:
            counts = np.bincount(problem.layers.layer_of, weights=held)
            good &= bool((counts <= problem.layers.layer_max).all())
            good &= short is not None or bool((problem.layers.layer_min <= counts).all())
        if good:
            choices[bits] = float(scores[held].sum())
            if short is not None:
                choices[bits] += short * float(np.minimum(counts, problem.layers.layer_min).sum())
    return choices


def clients_with_floors(problem, short):
    """Return the client of a problem whose layers may lack experts."""
    layers = problem.layers
    free = problem.replace(layers=ExpertLayers(layers.layer_of, 0, layers.layer_max))
    return Clients.of(free).with_floors((layers.layer_min[None], short))


@settings(max_examples=drawn(400))
@given(st.integers(0, 2**32 - 1))
def test_a_client_chooses_best(seed):
    problem = one_client(seed)
    choices = every_choice(problem)
    dual, chosen = Dual.at(Clients.of(problem), np.zeros(problem.n_experts))
    best = max(choices.values(), default=-math.inf)
    assert dual.worth[0] == pytest.approx(best, abs=1e-9)
    if choices:
        assert choices[sum(1 << j for j in np.flatnonzero(chosen[0]).tolist())] == pytest.approx(best, abs=1e-9)


SHORT = st.sampled_from([0.0, 0.5, 1.0, 2.5, 100.0])


@settings(max_examples=drawn(400))
@given(st.integers(0, 2**32 - 1), SHORT)
def test_a_client_whose_layers_may_lack_experts_chooses_best(seed, short):
    problem = one_client(seed)
    if problem.layers is None:
        return
    choices, clients = every_choice(problem, short), clients_with_floors(problem, short)
    dual, chosen = Dual.at(clients, np.zeros(problem.n_experts))
    best = max(choices.values(), default=-math.inf)
    assert dual.worth[0] == pytest.approx(best, abs=1e-9)
    if choices:
        held = sum(1 << j for j in np.flatnonzero(chosen[0]).tolist())
        assert choices[held] == pytest.approx(best, abs=1e-9)
        worth = problem.desirability @ chosen[0] + clients.floor_worth(np.zeros(1, dtype=int), chosen)
        assert worth[0] == pytest.approx(best, abs=1e-9)


@settings(max_examples=drawn(400))
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0, 3.0]), st.just(np.inf) | SHORT)
def test_all_nearly_best_choices_are_listed_and_no_others(seed, limit, short):
    problem = one_client(seed)
    choices, clients, prices = every_choice(problem), Clients.of(problem), np.zeros(problem.n_experts)
    if short < np.inf and problem.layers is not None:
        choices, clients = every_choice(problem, short), clients_with_floors(problem, short)
    if not choices:
        return
    taken, _, whole = list_near(
        *clients.arrays, clients.short, prices, Dual.at(clients, prices)[0].worth, limit, 1 << 8
    )
    listed = [int(bits) for [bits] in taken]
    best = max(choices.values())
    assert whole
    assert len(listed) == len(set(listed))
    assert {bits for bits, worth in choices.items() if worth >= best - limit + 1e-9} <= set(listed)
    assert all(choices[bits] >= best - limit - 1e-8 for bits in listed)
