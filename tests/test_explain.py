"""Explanations and sensitivities, against solving anew with a pair turned round, or a bound moved by one."""

import itertools
import math
import re

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import brute_force, contended, layer_range, layered, tiny_problems

from fedmoe_sched import (
    AssignmentProblem,
    ExpertLayers,
    InfeasibleError,
    InputError,
    ResourceBudget,
    Status,
    schedule,
    solve,
)
from fedmoe_sched._network_explain import Explainer
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.policies import make_policy

SOLVER = "flow-networkx"  # exact on whole numbers


@st.composite
def problems(draw, penalties=True):
    n, m = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    whole = st.integers(-6, 12)
    rows = draw(st.lists(st.lists(whole, min_size=m, max_size=m), min_size=n, max_size=n))
    capacity = draw(st.lists(st.integers(0, m), min_size=n, max_size=n))
    least = [draw(st.integers(0, c)) for c in capacity]
    high = draw(st.lists(st.integers(0, n), min_size=m, max_size=m))
    low = [draw(st.integers(0, h)) for h in high]
    eligible = draw(st.none() | st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=n, max_size=n))
    penalty = None
    if penalties and draw(st.booleans()):
        steps = draw(st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=m, max_size=m))
        penalty = LoadPenalty.from_marginals(np.cumsum(steps, axis=1).astype(float))
    return AssignmentProblem(
        np.array(rows, dtype=float), capacity, min_experts=least, load_min=low, load_max=high, eligible=eligible,
        load_penalty=penalty,
    )  # fmt: skip


def optimum(problem):
    answer = solve(problem, SOLVER)
    return -math.inf if answer.status is Status.INFEASIBLE else answer.objective


def turned(problem, client, expert, chosen):
    """Optimum with the decision on one pair turned round, by solving another problem."""
    if chosen:
        eligible = np.ones(problem.shape, bool) if problem.eligible is None else problem.eligible.copy()
        eligible[client, expert] = False
        if eligible[client].sum() < problem.min_experts[client]:
            return -math.inf
        return optimum(problem.replace(eligible=eligible))
    bonus = 10_000.0
    scores = problem.desirability.copy()
    scores[client, expert] += bonus
    best = optimum(problem.replace(desirability=scores))
    return best - bonus if best > bonus / 2 else -math.inf


@settings(max_examples=drawn(80), deadline=None)
@given(problem=problems())
def test_margins_are_what_turning_a_decision_round_costs(problem):
    answer = solve(problem, SOLVER)
    if answer.status is Status.INFEASIBLE:
        with pytest.raises(InfeasibleError):
            answer.explain(0, 0)
        return
    held = answer.pairs.mask()
    for i in range(problem.n_clients):
        for j in range(problem.n_experts):
            found = answer.explain(i, j)
            assert found.chosen == held[i, j]
            assert found.desirability == problem.desirability[i, j]
            if problem.eligible is not None and not problem.eligible[i, j]:
                assert not found.eligible
                assert math.isinf(found.margin)
                continue
            loss = answer.objective - turned(problem, i, j, found.chosen)
            assert found.margin == pytest.approx(loss, abs=1e-9), (i, j)
            assert str(found).startswith(f"client {i} and expert {j}")


@settings(max_examples=drawn(80), deadline=None)
@given(problem=problems())
def test_sensitivities_are_what_one_unit_of_a_bound_is_worth(problem):
    answer = solve(problem, SOLVER)
    if answer.status is Status.INFEASIBLE:
        return
    worth = answer.sensitivity()
    n, m = problem.shape

    def gain(**changes):
        return optimum(problem.replace(**changes)) - answer.objective

    for j in range(m):
        if problem.load_max[j] < n:
            assert worth.load_max[j] == pytest.approx(
                gain(load_max=problem.load_max + np.eye(m, dtype=int)[j]), abs=1e-9
            )
        if problem.load_min[j] > 0:
            assert worth.load_min[j] == pytest.approx(
                gain(load_min=problem.load_min - np.eye(m, dtype=int)[j]), abs=1e-9
            )
    for i in range(n):
        one = np.eye(n, dtype=int)[i]
        assert worth.capacity[i] == pytest.approx(gain(capacity=problem.capacity + one), abs=1e-9)
        if problem.min_experts[i] > 0:
            assert worth.min_experts[i] == pytest.approx(gain(min_experts=problem.min_experts - one), abs=1e-9)


@settings(max_examples=drawn(200), deadline=None)
@given(
    problem=tiny_problems(penalised=True)
    | tiny_problems(with_layers=True)
    | st.builds(contended, st.integers(0, 2**20))
    | st.builds(layered, st.integers(0, 2**20), penalised=st.booleans())
)
def test_what_brings_a_pair_in_does_so_in_every_optimum(problem):
    answer = solve(problem)
    if answer.status is Status.INFEASIBLE:
        return
    held, (n, m) = answer.pairs.mask(), problem.shape
    for i, j in np.argwhere(~held).tolist():
        found = answer.explain(i, j)
        if not found.eligible:
            assert found.brought_in_by == ()
            continue
        counts = {"capacity": held[i].sum(), "load_max": held[:, j].sum()}
        most = {"capacity": problem.capacity[i], "load_max": problem.load_max[j]}
        if problem.layers is not None:
            layer = problem.layers.layer_of[j]
            counts["layer_max"] = held[i][problem.layers.layer_of == layer].sum()
            most["layer_max"] = layer_range(problem, i, layer)[1]
        full = [name for name in counts if counts[name] == most[name]]
        enough, close = [], False
        for size in range(1, len(full) + 1):
            for bounds in itertools.combinations(full, size):
                wide = widened(problem, i, j, bounds)
                eligible = np.ones((n, m), dtype=bool) if wide.eligible is None else wide.eligible.copy()
                eligible[i, j] = False
                without = brute_force(wide.replace(eligible=eligible))
                gain = math.inf if without is None else brute_force(wide) - without
                close |= 0 < gain < 1e-9  # whether that is a tie is a matter of rounding
                if gain >= 1e-9 and not any(set(known) <= set(bounds) for known in enough):
                    enough.append(bounds)
        if not close:
            assert list(found.brought_in_by) == enough, (i, j)
            assert str(found).count("would bring it in") == len(enough)


def widened(problem, client, expert, bounds):
    """The problem with some bounds of a pair wider by one."""
    (n, m), changes = problem.shape, {}
    if "capacity" in bounds:
        changes["capacity"] = problem.capacity + np.eye(n, dtype=int)[client]
    if "load_max" in bounds:
        changes["load_max"] = problem.load_max + np.eye(m, dtype=int)[expert]
    if "layer_max" in bounds:
        layers = problem.layers
        high = np.array([[layer_range(problem, i, g)[1] for g in range(layers.n_layers)] for i in range(n)])
        high[client, layers.layer_of[expert]] += 1
        changes["layers"] = ExpertLayers(layers.layer_of, layers.layer_min, high)
    return problem.replace(**changes)


def test_margins_in_units_of_fitness():
    """Desirability is twice the fitness: a margin of 0.2 is 0.1 of fitness."""
    rules = {"usage": [1, 1], "capacity": 1, "load_max": [1, 2], "balance": None, "usage_weight": 0}
    fitness = [[0.9, 0.5], [0.8, 0.5]]
    answer = schedule(fitness, fitness_weight=2.0, **rules)
    why_not, why = answer.explain(1, 0), answer.explain(0, 0)
    assert (why_not.chosen, why.chosen) == (False, True)
    assert (why_not.margin, why_not.fitness_change) == (pytest.approx(0.2), pytest.approx(0.1))
    assert (why.margin, why.fitness_change) == (pytest.approx(0.2), pytest.approx(-0.1))
    assert "would have to rise (its fitness by +0.1)\n" in str(why_not)
    assert "would have to fall (its fitness by -0.1)\n" in str(why)
    for change, chosen in ((0.101, True), (0.099, False)):
        better = [fitness[0], [0.8 + change, 0.5]]
        assert (0 in schedule(better, fitness_weight=2.0, **rules).experts_of(1)) == chosen
    assert math.isinf(schedule(fitness, fitness_weight=0, **rules).explain(1, 0).fitness_change)
    against = schedule(fitness, fitness_weight=-1.0, **rules | {"load_max": [2, 1]})
    assert against.experts_by_client() == {0: [1], 1: [0]}
    assert against.explain(1, 1).fitness_change == pytest.approx(-0.1)
    assert solve(answer.problem).explain(1, 0).fitness_change is None
    assert make_policy("fedmix", 2).plan(["a"]).fitness_weight is None
    assert make_policy("greedy", 2).plan(["a"]).fitness_weight == 1.0


def by_hand():
    """Two places at x for three clients: anna and ben gain 4 and 3 by x over y, carl only 1."""
    rows = [[5.0, 1.0], [4.0, 1.0], [3.0, 2.0]]
    problem = AssignmentProblem(
        rows, 1, min_experts=1, load_max=[2, 3], client_labels=["anna", "ben", "carl"], expert_labels=["x", "y"]
    )
    return solve(problem, "flow-ortools")


def test_an_explanation_by_hand():
    answer = by_hand()
    why_not = answer.explain("carl", "x")
    # Carl would take the place of ben, who gains 3 by it, to gain 1.
    assert (why_not.chosen, why_not.margin, why_not.instead) == (False, 2.0, ("y",))
    assert str(why_not) == (
        f"client 'carl' and expert 'x' (desirability 3, price {answer.prices[0]:.6g}): not chosen; with it in "
        "place of expert 'y' the objective would be 2 less: so much its desirability would have to rise\n"
        "  client 'carl' trains 1 expert, as many as it can\n"
        "  client 'carl' trains 1 expert, the fewest it must\n"
        "  expert 'x' has 2 clients, the most it may; one more place is worth 1\n"
        "  one more place at expert 'x' would bring it in"
    )
    assert why_not.brought_in_by == (("load_max",),)
    # Ben would gain 1 by a second expert: y has room, so that more places change nothing.
    assert answer.explain("ben", "y").brought_in_by == (("capacity",),)
    why = answer.explain("ben", "x")
    assert (why.chosen, why.margin, why.instead) == (True, 2.0, ("y",))  # carl would have the place
    worth = answer.sensitivity()
    assert worth.load_max.tolist() == [1.0, 0.0]
    # Anna and ben would take y too; carl gains 3 by x, but ben loses that.
    assert worth.capacity.tolist() == [1.0, 1.0, 0.0]
    table = answer.summary().splitlines()
    assert re.split("  +", table[-2]) == [
        "x", "2", "0..2", f"{answer.prices[0]:.6g}", "full, one more place is worth 1"
    ]  # fmt: skip
    assert table[-1].split()[:3] == ["y", "1", "0..3"]


def test_a_pair_without_which_nothing_holds_and_one_that_changes_nothing():
    answer = solve(AssignmentProblem([[1.0], [1.0]], 1, min_experts=[1, 0], load_max=1), "flow-ortools")
    assert "without it no assignment keeps all bounds" in str(answer.explain(0, 0))
    assert "with it no assignment keeps all bounds" in str(answer.explain(1, 0))
    tied = solve(AssignmentProblem([[1.0], [1.0]], 1, load_max=1), "flow-ortools")
    assert {tied.explain(i, 0).margin for i in (0, 1)} == {0.0}
    assert "the objective would be the same" in str(tied.explain(0, 0))


def test_what_cannot_be_explained():
    tried = (
        schedule([[0.9, 0.8], [0.9, 0.1]], [0, 0], 1, load_max=1, balance=None, solver="random", seed=seed)
        for seed in range(20)
    )
    bad = next(answer for answer in tried if answer.experts_by_client() == {0: [0], 1: [1]})
    with pytest.raises(InputError, match="schedule: is not optimal, so that there is no reason for it"):
        bad.explain(0, 0)
    assert "worth" not in bad.summary()
    with pytest.raises(InputError, match="client = 7: there is no client of that name"):
        by_hand().explain(7, "x")
    with pytest.raises(InputError, match="time_limit = -1: must be >= 0 seconds"):
        by_hand().explain("ben", "x", time_limit=-1)
    budget = ResourceBudget("memory", [1.0, 1.0], [1.0])
    answer = solve(AssignmentProblem([[1.0, 2.0]], 2, budgets=[budget]), "milp-scipy")
    with pytest.raises(InputError, match="problem: has budgets"):
        Explainer(answer.problem, answer.pairs)
