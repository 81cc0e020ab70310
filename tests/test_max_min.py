"""Max-min fairness against brute force, its certificate, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import clustered, contended, enumerate_assignments, layered, tiny_problems

from fedmoe_sched import (
    AssignmentProblem,
    ExpertLayers,
    InfeasibleError,
    InputError,
    LoadPenalty,
    ResourceBudget,
    Status,
    solve,
)
from fedmoe_sched.max_min import Level, max_min


def fairest(problem):
    """Return the values of the pairs of a best assignment, ascending, by trying all; None if there is none."""
    everything = enumerate_assignments(problem)
    fits = ((everything.loads >= problem.load_min) & (everything.loads <= problem.load_max)).all(axis=1)
    values = np.unique(problem.desirability).tolist()
    best = None
    for ok, choice in zip(fits, itertools.product(*everything.choices), strict=True):
        if ok:
            chosen = [float(problem.desirability[i, j]) for i, experts in enumerate(choice) for j in experts]
            counts = [chosen.count(value) for value in values]
            best = counts if best is None else min(best, counts)
    return None if best is None else [(value, count) for value, count in zip(values, best, strict=True) if count]


def judge(problem, solver="auto"):
    fair, wanted = max_min(problem, solver), fairest(problem)
    if wanted is None:
        assert fair.schedule.status is Status.INFEASIBLE
        assert fair.conflict is not None
        assert fair.levels == ()
        return
    assert [(level.value, level.count) for level in fair.levels] == wanted
    assert fair.verify()
    assert not fair.schedule.violations
    assert (fair.conflict is None) == (fair.bottleneck is None) == (not wanted)
    if wanted:
        assert fair.bottleneck == wanted[0][0]
        assert fair.conflict.required > fair.conflict.available


@given(tiny_problems())
def test_no_assignment_is_fairer(problem):
    judge(problem)


@settings(deadline=None, max_examples=drawn(150))
@given(problem=st.one_of(tiny_problems(with_layers=True), st.integers(0, 2000).map(layered)))
def test_no_assignment_is_fairer_with_layers(problem):
    judge(problem)


def test_layers_by_hand():
    """Both clients need one of each layer; who goes without expert 2 has 0.1 or 0.2 at expert 3."""
    layers = ExpertLayers([0, 0, 1, 1], layer_min=1, layer_max=1)
    problem = AssignmentProblem([[0.9, 0.5, 0.6, 0.1], [0.8, 0.7, 0.9, 0.2]], 2, load_max=1, layers=layers)
    fair = max_min(problem)
    assert [(level.value, level.count) for level in fair.levels] == [(0.2, 1), (0.6, 1), (0.7, 1), (0.9, 1)]
    assert fair.schedule.experts_by_client() == {0: [0, 2], 1: [1, 3]}
    assert fair.verify()
    assert fair.conflict.required > fair.conflict.available


@pytest.mark.parametrize(
    "solver", ["exact", "flow-ortools", "flow-networkx", "lp-scipy", "ilp-ortools", "milp-scipy"]
)
def test_any_exact_backend_will_do(solver):
    for seed in range(8):
        judge(contended(seed), solver)


def by_hand():
    # The best sum is 9 + 8 + 1. Without the 1, client 2 has expert 0 (3) or 1 (4, and client 1 has 4 at expert 2).
    return AssignmentProblem(
        [[9, 2, 5], [3, 8, 4], [3, 4, 1]], capacity=1, min_experts=1, load_max=1, expert_labels=["a", "b", "c"]
    )


def test_by_hand():
    problem = by_hand()
    assert solve(problem).objective == 18
    fair = max_min(problem)
    assert [(level.value, level.count) for level in fair.levels] == [(4, 2), (9, 1)]
    assert fair.schedule.experts_by_client() == {0: ["a"], 1: ["c"], 2: ["b"]}
    assert fair.schedule.objective == 17


def test_the_cut_names_who_cannot_have_more():
    problem = AssignmentProblem([[0.9, 0.1], [0.8, 0.2], [0.7, 0.6]], capacity=1, min_experts=1, load_max=[1, 2])
    fair = max_min(problem)
    assert [(level.value, level.count) for level in fair.levels] == [(0.2, 1), (0.6, 1), (0.9, 1)]
    # Without 0.2 and less, clients 0 and 1 both need the one place of expert 0.
    assert fair.conflict.clients == (0, 1)
    assert fair.conflict.experts == (0,)
    assert (fair.conflict.required, fair.conflict.available) == (2, 1)


def test_nobody_who_need_not_trains():
    fair = max_min(AssignmentProblem([[0.9, 0.8]], capacity=2))
    assert fair.levels == ()
    assert fair.bottleneck is None
    assert fair.conflict is None
    assert fair.schedule.loads.tolist() == [0, 0]
    assert fair.verify()


def test_a_lie_is_found_out():
    fair = max_min(by_hand())
    first = fair.levels[0]
    assert first.prices is not None
    lies = [
        Level(first.value, first.count + 1, first.prices),
        Level(first.value - 1, first.count, first.prices),
        Level(first.value, first.count, first.prices * np.array([3, 0, 0]) + 1),
        Level(first.value, first.count, None),
    ]
    for lie in lies:
        assert not dataclasses.replace(fair, levels=(lie, *fair.levels[1:])).verify()
    worse = solve(fair.schedule.problem)
    assert worse.objective > fair.schedule.objective
    assert not dataclasses.replace(fair, schedule=worse).verify()


def test_clustered_problems_of_some_size():
    problem = clustered(60, 6, seed=1, decimals=2)
    best = solve(problem)
    fair = max_min(problem)
    assert fair.verify()
    pairs = best.pairs
    assert fair.bottleneck >= problem.desirability[pairs.clients, pairs.indices].min()
    assert sum(level.count for level in fair.levels) == len(pairs.indices)
    assert fair.schedule.objective <= best.objective


def test_what_it_refuses():
    scores, wide = [[1.0, 2.0]], {"capacity": 1, "min_experts": 1}
    with pytest.raises(InputError, match="load_penalty: max_min takes problems without any"):
        max_min(AssignmentProblem(scores, load_penalty=LoadPenalty.quadratic(1.0, n_experts=2), **wide))
    with pytest.raises(InputError, match="budgets: max_min takes problems without any"):
        max_min(AssignmentProblem(scores, budgets=[ResourceBudget("memory", [1, 1], [1])], **wide))
    with pytest.raises(InputError, match="solver = 'greedy': max_min needs an exact backend, or 'auto'"):
        max_min(AssignmentProblem(scores, **wide), "greedy")
    with pytest.raises(InfeasibleError):
        max_min(AssignmentProblem(scores, capacity=1, load_min=1)).verify()
