"""The anytime backend for budgets: what it claims, and what it must not claim."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import oracle
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")
pytest.importorskip("ortools")

from fedmoe_sched import AssignmentProblem, ExpertLayers, Limits, ResourceBudget, Status, StopReason, solve
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import violations
from fedmoe_sched.solver import Answer
from fedmoe_sched.solvers import _budget_search as search
from fedmoe_sched.solvers._budget_dual import Clients
from fedmoe_sched.solvers._insertion_kernels import insert


def tight(seed=0, share=0.65):
    """Every one of 20 jobs to one of 4 agents with a budget; at a share of 0.65 prices prove no optimum."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 26, (4, 20)).astype(float)
    scores = 120 - sizes + rng.uniform(-3, 3, sizes.shape)
    budget = ResourceBudget("resource", sizes, np.floor(share * sizes.sum(axis=1) / 4))
    return AssignmentProblem(scores, 20, load_min=1, load_max=1, budgets=[budget])


def without_recombination(monkeypatch):
    """Leave all proofs to the engine."""
    monkeypatch.setattr(search.Parts, "improve", lambda self: (0.0, np.inf))


@pytest.mark.parametrize(("seed", "share"), [(0, 0.65), (1, 0.75), (2, 0.75)])
def test_it_finds_and_claims_the_optimum(seed, share):
    problem = tight(seed, share)
    ours, reference = solve(problem, "lagrangian"), solve(problem, "milp-scipy")
    assert ours.status is reference.status is Status.OPTIMAL
    assert ours.objective == pytest.approx(reference.objective)
    assert ours.verify().feasible
    assert ours.verify().bound >= ours.objective


@pytest.mark.parametrize("how", ["gives up", "breaks a budget"])
def test_an_engine_that_proves_nothing_is_not_taken_for_a_proof(monkeypatch, how):
    problem = tight()

    def engine(part, seconds):
        if how == "gives up":
            return Answer(StopReason.FAILED, message="no licence")
        best = np.argmax(part.desirability, axis=0)  # every job to its best agent, whatever its budget
        return Answer(StopReason.COMPLETED, Assignment.from_pairs(best, np.arange(part.n_experts), part.shape))

    monkeypatch.setattr(search, "_solve", engine)
    without_recombination(monkeypatch)
    answer = solve(problem, "lagrangian", limits=Limits(time=0.3))
    assert answer.status is not Status.OPTIMAL
    assert answer.stop_reason is StopReason.TIME_LIMIT
    if answer.objective is not None:
        assert answer.verify().feasible
        assert answer.bound > answer.objective
    monkeypatch.undo()
    assert solve(problem, "milp-scipy").objective <= answer.bound


def test_a_single_client_whose_engine_never_ends(monkeypatch):
    sizes = np.arange(3.0, 15.0)
    problem = AssignmentProblem(sizes[None] + 0.5, 12, budgets=[ResourceBudget("memory", sizes, [40.0])])
    best = solve(problem, "milp-scipy").objective
    one = Assignment.from_pairs([0], [4], problem.shape)
    monkeypatch.setattr(search, "_solve", lambda part, seconds: Answer(StopReason.TIME_LIMIT, one))
    monkeypatch.setattr(search.Search, "insert", lambda self: None)
    monkeypatch.setattr(search.Search, "start", lambda self: None)
    monkeypatch.setattr(search.Search, "descend", lambda self, seconds, first: None)
    without_recombination(monkeypatch)
    answer = solve(problem, "lagrangian", limits=Limits(time=0.2))
    assert (answer.status, answer.objective) == (Status.FEASIBLE, 7.5)
    assert answer.bound >= best > 7.5


@settings(max_examples=drawn(150))
@given(st.data(), oracle.tiny_problems(budgeted=True) | oracle.tiny_problems(budgeted=True, with_layers=True))
def test_insertion_keeps_budgets_and_says_what_is_missing(data, problem):
    if not problem.budgets:
        return
    clients = Clients.of(problem)
    n, m = problem.shape
    possible = np.isfinite(clients.gain)
    order = np.flatnonzero(possible & data.draw(hnp.arrays(np.bool_, (n, m))))
    held = np.zeros((n, m), dtype=np.int8)
    low = np.minimum(clients.load_min, clients.load_max)
    ranked = np.ascontiguousarray(np.argsort(-clients.gain, axis=0).T)
    missing = insert(*clients.arrays[:7], low, clients.load_max, ranked, order, held)
    assert possible[held > 0].all()
    assert (held.sum(axis=0) <= clients.load_max).all()
    assert missing == (low - held.sum(axis=0)).clip(0).sum()
    layers = problem.layers
    if layers is not None:
        layers = ExpertLayers(layers.layer_of, 0, layers.layer_max)
    left_out = problem.replace(min_experts=0, load_min=0, load_max=n, layers=layers)
    assert not violations(left_out, Assignment.from_mask(held > 0))


def test_there_is_an_answer_where_there_is_no_time():
    problem = tight(share=0.8)
    answer = solve(problem, "lagrangian", limits=Limits(time=1e-6))
    assert answer.status is Status.FEASIBLE
    assert answer.verify().feasible
