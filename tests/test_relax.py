"""Soft mode: the least relaxation is that of brute force, keeps what is hard, and its prices are gains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import brute_force, layer_range, penalty_table, tiny_problems
from test_feasibility import grouped, least_widening_by_linear_program

from fedmoe_sched import (
    AssignmentProblem,
    ExpertLayers,
    InputError,
    Relaxation,
    ResourceBudget,
    Schedule,
    Status,
    StopReason,
    _elastic_choices,
    schedule,
    solve,
)
from fedmoe_sched import relax as relax_module
from fedmoe_sched._elastic_choices import relax_by_choices
from fedmoe_sched._elastic_program import BudgetRelaxation, relax_by_program
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import objective, violations
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.instances import generate
from fedmoe_sched.relax import priced, relax, solve_soft

SOFT = {kind: st.sampled_from([1, 2, 0.75]) for kind in ("min_experts", "load_min", "load_max")}
KINDS = ("min_experts", "load_min", "load_max", "capacity", "layer_min", "layer_max")


def least_cost(problem: AssignmentProblem, weights: dict[str, float]) -> tuple[float, float] | None:
    """Weigh what every subset of the eligible pairs lacks or exceeds; None if none keeps what is hard.

    Returns
    -------
    cost, objective : float
        The least cost, and the best objective of all subsets that need no more.
    """
    n, m = problem.shape
    open_ = np.ones((n, m), bool) if problem.eligible is None else problem.eligible
    options = [
        [row for row in itertools.product((0, 1), repeat=m) if not (np.array(row) > open_[i]).any()]
        for i in range(n)
    ]
    chosen = np.array(list(itertools.product(*options))).reshape(-1, n, m)
    counts, loads = chosen.sum(axis=2), chosen.sum(axis=1)
    missing = {
        "min_experts": problem.min_experts - counts,
        "load_min": problem.load_min - loads,
        "load_max": loads - problem.load_max,
        "capacity": counts - problem.capacity,
    }
    if problem.layers is not None:
        layers = range(problem.layers.n_layers)
        low, high = np.array([[layer_range(problem, i, g) for g in layers] for i in range(n)]).transpose(2, 0, 1)
        within = chosen @ np.eye(problem.layers.n_layers, dtype=int)[problem.layers.layer_of]
        missing["layer_min"] = (low - within).reshape(len(chosen), -1)
        missing["layer_max"] = (within - high).reshape(len(chosen), -1)
    cost = np.zeros(len(chosen))
    for kind, short in missing.items():
        total = np.maximum(short, 0).sum(axis=1)
        cost += total * weights[kind] if kind in weights else np.where(total > 0, np.inf, 0)
    for resource in problem.budgets:
        used = (chosen * np.broadcast_to(resource.size, (n, m))).sum(axis=2)
        cost[(used > resource.budget * (1 + 1e-9)).any(axis=1)] = np.inf
    if np.isinf(cost.min()):
        return None
    worth = (chosen * problem.desirability).sum(axis=(1, 2))
    worth -= penalty_table(problem, n)[np.arange(m), loads].sum(axis=1)
    return float(cost.min()), float(worth[cost <= cost.min() + 1e-9].max())


SMALL = st.one_of(tiny_problems(), tiny_problems(with_layers=True), tiny_problems(penalised=True)).filter(
    lambda p: p.n_clients * p.n_experts <= 12
)


@settings(deadline=None, max_examples=drawn(150))
@given(
    problem=SMALL,
    weights=st.dictionaries(st.sampled_from(KINDS), st.sampled_from([1, 2, 3, 0.1, 0.75, 1 / 3])),
)
def test_relaxation_is_least_and_of_those_the_best(problem, weights):
    check_least_and_best(problem, weights)


def check_least_and_best(problem, weights):
    expected = least_cost(problem, weights)
    relaxed = relax(problem, weights)
    widened = relaxed.problem
    assert relaxed.proved
    if expected is None:
        assert (widened, relaxed.relaxations, relaxed.total) == (problem, (), np.inf)
        assert brute_force(problem) is None
        return
    least, best = expected
    rounding = 1e-5 * max(weights.values(), default=0)  # weights are whole millionths of the largest
    assert relaxed.total == pytest.approx(least, rel=1e-5, abs=rounding)
    assert relaxed.bound == pytest.approx(least, rel=1e-5, abs=rounding)
    paid = sum(weights[one.bound] * abs(one.used - one.asked) for one in relaxed.relaxations)
    assert paid == pytest.approx(relaxed.total)
    assert brute_force(widened) == pytest.approx(best, abs=1e-6)
    assert (widened is problem) == (least == 0)
    for one in relaxed.relaxations:
        assert one.asked == bound_of(problem, one)
        assert one.used == bound_of(widened, one)


def bound_of(problem: AssignmentProblem, one: Relaxation) -> int:
    if one.layer is None:
        return int(getattr(problem, one.bound)[one.expert if one.client is None else one.client])
    return layer_range(problem, one.client, one.layer)[one.bound == "layer_max"]


def test_relaxation_of_many_clients_is_that_of_a_linear_program():
    relaxed_ones = 0
    for seed in range(24):
        problem = grouped(seed)
        relaxed = relax(problem, {"load_min": 1, "load_max": 1})
        assert relaxed.total == pytest.approx(least_widening_by_linear_program(problem), abs=1e-6)
        assert find_conflict(relaxed.problem) is None
        relaxed_ones += relaxed.total > 0
    assert relaxed_ones >= 3


@settings(deadline=None, max_examples=drawn(100))
@given(problem=st.one_of(tiny_problems(), tiny_problems(with_layers=True)))
def test_prices_are_what_one_more_place_gains(problem):
    relaxed = relax(problem, dict.fromkeys(KINDS, 1.0))
    widened = relaxed.problem
    for one in priced(solve(widened, "flow-networkx"), relaxed.relaxations):
        if one.used == 0 and one.asked > 0:
            assert one.price == 0
            continue
        gain = brute_force(moved(widened, one)) - brute_force(widened)
        assert one.price == pytest.approx(gain, abs=1e-6)


def moved(problem: AssignmentProblem, one: Relaxation) -> AssignmentProblem:
    """Let a bound give way by one place more."""
    step = 1 if one.used > one.asked else -1
    if one.layer is None:
        bound = getattr(problem, one.bound).copy()
        bound[one.expert if one.client is None else one.client] += step
        return problem.replace(**{one.bound: bound})
    layers, n = problem.layers, problem.n_clients
    bounds = dict(zip(("layer_min", "layer_max"), map(np.array, layers.bounds_of(slice(0, n), n)), strict=True))
    bounds[one.bound][one.client, one.layer] += step
    return problem.replace(layers=ExpertLayers(layers.layer_of, **bounds))


def test_demands_beyond_all_measure_are_lowered_to_what_there_is():
    problem = AssignmentProblem(
        np.zeros((3, 2)), 2**53, min_experts=[2**53, 2**52, 1], load_min=2**53, load_max=2**53
    )
    relaxed = relax(problem)
    assert relaxed.problem.min_experts.tolist() == [2, 2, 1]
    assert relaxed.problem.load_min.tolist() == [3, 3]
    assert len(relaxed.relaxations) == 4
    assert relaxed.proved
    assert relax(problem, {"load_min": 1}).problem is problem


def test_soft_schedule_by_hand():
    """Three clients must train one expert each, there are two places: one more at expert 1 is worth 0.2 more."""
    rows = [[0.9, 0.1], [0.8, 0.7], [0.7, 0.6]]
    options = {"load_max": [1, 1], "load_min": [0, 0], "balance": None, "usage_weight": 0}
    assert schedule(rows, [0, 0], 1, **options).status is Status.INFEASIBLE
    answer = schedule(rows, [0, 0], 1, soft=True, **options)
    assert answer.status is Status.OPTIMAL
    assert len(answer.relaxed) == 1
    (one,) = answer.relaxed
    assert abs(one.used - one.asked) == 1
    assert one.price is not None
    assert f"one more place is worth {one.price:.6g}" in str(one)
    kept = schedule(rows, [0, 0], 1, soft=True, balance=None)
    assert kept.relaxed == ()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"budget": 1.0}, "weights: no bound called 'budget'"),
        ({"load_min": 0.0}, r"weights\['load_min'\] = 0.0: must be finite and > 0"),
    ],
)
def test_bad_weights_are_refused(weights, message):
    with pytest.raises(InputError, match=message):
        relax(AssignmentProblem([[1.0]], 1), weights)


def test_layers_by_hand():
    """Three clients need an expert of each layer, the second layer has one place: client 0 gains most by it."""
    layers = ExpertLayers([0, 0, 1], layer_min=1)
    rows = [[0.9, 0.1, 0.5], [0.8, 0.7, 0.2], [0.7, 0.6, 0.8]]
    problem = AssignmentProblem(rows, 2, load_max=[3, 3, 1], layers=layers)
    answer = relax(problem, {"layer_min": 1})
    assert [str(one) for one in answer.relaxations] == ["layer_min[1, 1]: 1 -> 0", "layer_min[2, 1]: 1 -> 0"]
    assert [one.price for one in priced(solve(answer.problem), answer.relaxations)] == [0, 0]
    both = relax(problem, {"layer_min": 2, "load_max": 1})
    assert [str(one) for one in both.relaxations] == ["load_max[2]: 1 -> 3"]


BUDGETED = st.one_of(
    tiny_problems(budgeted=True),
    tiny_problems(budgeted=True, with_layers=True),
    tiny_problems(budgeted=True, penalised=True),
).filter(lambda p: p.n_clients * p.n_experts <= 12)


@settings(deadline=None, max_examples=drawn(60))
@given(problem=BUDGETED, weights=st.dictionaries(st.sampled_from(KINDS), st.sampled_from([1, 2, 0.1, 0.75])))
def test_budgets_are_kept_and_the_relaxation_is_least_and_the_best(problem, weights):
    check_least_and_best(problem, weights)


@settings(deadline=None, max_examples=drawn(40))
@given(
    problem=tiny_problems(budgeted=True, with_layers=True).filter(lambda p: p.n_clients * p.n_experts <= 12),
    weights=st.fixed_dictionaries({"layer_min": st.sampled_from([1, 0.1])}, optional=SOFT),
)
def test_choices_prove_the_least_relaxation_of_layers_by_themselves(problem, weights):
    if not problem.budgets or problem.layers is None:
        return
    found, expected = relax_by_choices(problem, weights, 60.0), least_cost(problem, weights)
    if expected is None:
        assert (found.assignment, found.bound) == (None, np.inf)
        return
    least, best = expected
    assert found.bound == pytest.approx(least)
    lacking = relax_module._widened(problem, found.assignment, weights, found.bound)
    assert lacking.total == pytest.approx(least)
    assert objective(problem, found.assignment) == pytest.approx(best, abs=1e-6)


def scarce(n_clients: int, n_experts: int, seed: int, layers: int = 0) -> AssignmentProblem:
    """Ask for more than the budgets allow: two experts for each client, and nearly as many places as there are."""
    problem = generate("budgets", n_clients, n_experts, seed=seed)
    return problem.replace(
        load_min=(0.9 * problem.load_max).astype(int),
        min_experts=np.minimum(problem.capacity, 2),
        layers=ExpertLayers(np.arange(n_experts) % layers, layer_min=1, layer_max=2) if layers else None,
    )


@pytest.mark.parametrize(("seed", "layers"), [(0, 0), (1, 0), (2, 0), (3, 2), (4, 3)])
def test_choices_of_many_clients_need_as_little_as_the_integer_program(seed, layers):
    problem, weights = scarce(40, 6, seed, layers), {"min_experts": 1.0, "load_min": 2.0, "load_max": 1.5}
    weights |= {"layer_min": 1.2} if layers else {}
    relaxed = relax(problem, weights)
    assert relaxed.proved
    program = relax_by_program(problem, weights, 60.0)
    assert relaxed.bound == pytest.approx(program.bound)
    assert relaxed.total == pytest.approx(program.bound)
    assert not violations(relaxed.problem, relaxed.assignment)
    assert objective(problem, relaxed.assignment) >= objective(problem, program.assignment) - 1e-6


@pytest.mark.parametrize("layers", [0, 3])
def test_least_total_of_hundreds_of_clients_is_proved_within_budgets(layers):
    relaxed = relax(scarce(300, 12, 0, layers))
    assert relaxed.proved
    assert relaxed.total > 0
    assert not violations(relaxed.problem, relaxed.assignment)


def test_what_choices_leave_open_is_asked_of_the_integer_program(monkeypatch):
    memory = ResourceBudget("memory", [3.0, 2.0], [4.0, 4.0])
    problem = AssignmentProblem([[0.9, 0.5], [0.8, 0.1]], 2, load_min=[1, 2], budgets=[memory])
    poor = Assignment.from_pairs([], [], problem.shape)
    monkeypatch.setattr(_elastic_choices, "relax_by_choices", lambda *_: BudgetRelaxation(poor, 0.0))
    relaxed = relax(problem)
    assert (relaxed.total, relaxed.bound) == (1, 1)


def test_budgets_by_hand():
    """Both experts together are too large: each client can serve one, and three places are asked for."""
    memory = ResourceBudget("memory", [3.0, 2.0], [4.0, 4.0])
    problem = AssignmentProblem([[0.9, 0.5], [0.8, 0.1]], 2, load_min=[1, 2], budgets=[memory])
    assert solve(problem, "milp-scipy").status is Status.INFEASIBLE
    answer = solve_soft(problem)
    assert answer.status is Status.OPTIMAL
    assert [str(one) for one in answer.relaxed] == ["load_min[1]: 2 -> 1 (one more place is worth 0.4)"]
    assert answer.relaxed_proved
    assert answer.experts_by_client() == {0: [1], 1: [0]}
    assert solve_soft(problem.replace(load_min=1)).relaxed_proved is None


def test_out_of_time_is_said():
    rng = np.random.default_rng(0)
    memory = ResourceBudget("memory", rng.integers(20, 60, 12), rng.integers(60, 120, 200))
    problem = AssignmentProblem(
        rng.random((200, 12)), 6, min_experts=2, load_min=45, load_max=60, budgets=[memory]
    )
    relaxed = relax(problem, {"min_experts": 1, "load_min": 1.7}, seconds=1e-3)
    assert not relaxed.proved
    assert relaxed.bound < relaxed.total
    answer = Schedule(problem, "x", Status.FEASIBLE, StopReason.COMPLETED, relaxed_proved=False)
    assert answer.to_dict()["relaxed_proved"] is False


@pytest.mark.parametrize("seconds", [1e-3, 20.0])
def test_without_a_time_limit_what_can_be_kept_is_solved_to_the_end(monkeypatch, seconds):
    """A first look that is too short for an answer, or for its proof, is no answer."""
    monkeypatch.setattr("fedmoe_sched.relax.SECONDS", seconds)
    problem = generate("budgets", 60, 8)
    answer = solve_soft(problem)
    assert answer.status is Status.OPTIMAL
    assert answer.relaxed == ()
    assert answer.objective == pytest.approx(solve(problem, "milp-scipy").objective)


def test_prices_within_budgets_are_what_one_more_place_gains():
    priced_ = []

    @settings(deadline=None, max_examples=drawn(120))
    @given(problem=tiny_problems(budgeted=True) | tiny_problems(budgeted=True, with_layers=True))
    def check(problem):
        relaxed = relax(problem)
        if not problem.budgets or not relaxed.relaxations:
            return
        best = brute_force(relaxed.problem)
        for one in priced(solve(relaxed.problem, "lagrangian"), relaxed.relaxations):
            if one.price is None:
                continue
            if one.used == 0 and one.asked > 0:
                assert one.price == 0
                continue
            priced_.append(one)
            wider = moved(relaxed.problem, one)
            assert one.price == pytest.approx(brute_force(wider) - best, abs=1e-6)

    check()
    assert {one.bound for one in priced_} >= {"load_min", "min_experts"}


def test_prices_of_layers_within_budgets_by_hand():
    """One of two experts of layer 0 fits, and then not the best one, of layer 1: 5 could be had for 0.5."""
    memory = ResourceBudget("memory", [3.0, 3.0, 2.0], [4.0])
    layers = ExpertLayers([0, 0, 1], layer_min=[2, 0])
    answer = solve_soft(AssignmentProblem([[0.5, 0.4, 5.0]], 3, layers=layers, budgets=[memory]), "lagrangian")
    assert answer.experts_by_client() == {0: [0]}
    assert [str(one) for one in answer.relaxed] == ["layer_min[0, 0]: 2 -> 1 (one more place is worth 4.5)"]
