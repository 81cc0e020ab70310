"""Layers of experts: the class, the certificate, conflicts, prices, explanations, files, and `schedule`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    TOLERANCE,
    brute_force,
    clustered,
    enumerate_assignments,
    keeps_layers,
    layered,
    tiny_problems,
)

from fedmoe_sched import (
    AssignmentProblem,
    Capability,
    ExpertLayers,
    InputError,
    LoadPenalty,
    ResourceBudget,
    Status,
    certify,
    dual_bound,
    schedule,
    solve,
)
from fedmoe_sched._layers import layer_bounds, layers_interact
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import Violation
from fedmoe_sched.exchange import polish
from fedmoe_sched.feasibility import find_conflict, widen_load_bounds
from fedmoe_sched.problem_files import load_problem, save_problem
from fedmoe_sched.solver import required_capabilities

LAYERED = st.one_of(tiny_problems(with_layers=True), tiny_problems(with_layers=True, penalised=True))

# Two layers of two experts; both clients like the first layer better, and must train one expert of each. Expert 1
# has one place, which is worth 0.8 to either of them.
BY_HAND = AssignmentProblem(
    [[0.9, 0.8, 0.3, 0.1], [0.7, 0.8, 0.2, 0.3]],
    3,
    load_max=[2, 1, 2, 2],
    layers=ExpertLayers([0, 0, 1, 1], layer_min=1, layer_max=[2, 1]),
)


class TestTheClass:
    def test_defaults_are_no_bounds(self):
        layers = ExpertLayers([1, 0, 1])
        assert (layers.n_experts, layers.n_layers, layers.n_clients) == (3, 2, None)
        assert layers.layer_min.tolist() == [0, 0]
        assert layers.layer_max.tolist() == [1, 2]
        assert [experts.tolist() for experts in layers.members] == [[1], [0, 2]]

    def test_bounds_by_client(self):
        layers = ExpertLayers([0, 1], [[0, 1], [1, 1]], 1)
        assert layers.n_clients == 2
        low, high = layers.bounds_of(slice(1, 2), 1)
        assert (low.tolist(), high.tolist()) == ([[1, 1]], [[1, 1]])
        assert repr(layers) == "ExpertLayers(2 experts in 2 layers, of each layer [0-1]..1)"

    def test_arrays_are_frozen(self):
        layers = ExpertLayers([0, 0])
        with pytest.raises(ValueError, match="read-only"):
            layers.layer_of[0] = 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([0, 5],), r"layer_of\[1\] = 5: must be below the number of experts, 2"),
            (([0, 0, 2],), "layer_of: has no expert in layer 1, but some in layer 2"),
            (([],), "layer_of: has no entries"),
            (([[0, 1]],), r"layer_of: has shape \(1, 2\), must be one-dimensional"),
            (([0, -1],), r"layer_of\[1\] = -1: must be >= 0"),
            (([0, 1], [1, 1, 1]), r"layer_min: has shape \(3,\), must be \(2,\)"),
            (([0, 1], [[0, 0.5]]), r"layer_min\[0, 1\] = 0.5: must be a whole number"),
            (([0, 1], [[0, 0, 0]]), r"layer_min: has shape \(1, 3\), must be \(1, 2\)"),
            (([0, 1], 0, -1), "layer_max = -1: must be >= 0"),
            (([0, 1], [0, 2], [[1, 2], [1, 1]]), r"layer_min\[1\] = 2: must be <= layer_max\[1, 1\] = 1"),
            (([0, 1], [[0, 0]], [[1, 1], [1, 1]]), "layer_max: has 2 rows, layer_min has 1"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(InputError, match=message):
            ExpertLayers(*arguments)

    @pytest.mark.parametrize(
        ("layers", "message"),
        [
            ([0, 1], "layers: is a list, must be an ExpertLayers or None"),
            (ExpertLayers([0, 1, 1]), "layers: is of 3 experts, must be of 2"),
            (ExpertLayers([0, 1], np.zeros((2, 2), int)), "layers: is of 2 clients, must be of 3"),
        ],
    )
    def test_problem_refuses_what_does_not_fit(self, layers, message):
        with pytest.raises(InputError, match=message):
            AssignmentProblem(np.ones((3, 2)), 1, layers=layers)


class TestTheProblem:
    def test_slots_keep_the_maxima_and_demands_the_minima(self):
        eligible = [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
        problem = AssignmentProblem(
            np.ones((3, 4)), [4, 2, 4], min_experts=[0, 2, 0], eligible=eligible,
            layers=ExpertLayers([0, 0, 1, 1], [0, 1], [1, 2]),
        )  # fmt: skip
        assert problem.slots.tolist() == [2, 2, 1]
        assert problem.demands.tolist() == [1, 2, 1]
        assert problem.overstretched.tolist() == [False, False, True]
        assert problem.eligible_counts.tolist() == [3, 4, 1]
        assert "2 layers" in repr(problem)
        assert problem.replace(capacity=3).layers is problem.layers
        assert Capability.LAYERS in required_capabilities(problem)
        assert Capability.LAYERS not in required_capabilities(problem.replace(layers=None))

    @settings(max_examples=drawn(60))
    @given(problem=tiny_problems(with_layers=True, bounded=False))
    def test_slots_and_tight_bounds_are_what_choices_reach(self, problem):
        """Over all choices that keep everything but the lower bounds; and over all that keep everything."""
        m = problem.n_experts
        free = problem.replace(
            min_experts=0, layers=ExpertLayers(problem.layers.layer_of, 0, problem.layers.layer_max)
        )
        options = enumerate_assignments(free).choices
        assert problem.slots.tolist() == [max(map(len, sets)) for sets in options]
        tight = layer_bounds(problem, slice(0, problem.n_clients))
        for i, sets in enumerate(enumerate_assignments(problem).choices):
            assert bool(problem.overstretched[i]) == (not sets)
            if sets:
                mask = np.array([[j in chosen for j in range(m)] for chosen in sets])
                counts = problem.layers.count(mask)
                np.testing.assert_array_equal(tight.low[i], counts.min(axis=0))
                np.testing.assert_array_equal(tight.high[i], counts.max(axis=0))
                assert (tight.least[i], tight.most[i]) == (mask.sum(axis=1).min(), mask.sum(axis=1).max())

    def test_layers_interact_only_through_capacity_and_min_experts(self):
        problem = AssignmentProblem(np.ones((3, 4)), 3, layers=ExpertLayers([0, 0, 1, 1], 1, 2))
        assert layers_interact(problem)
        assert layers_interact(problem.replace(capacity=4, min_experts=3))
        for changes in ({"capacity": 4}, {"capacity": 2}, {"capacity": 4, "min_experts": 4}):
            assert not layers_interact(problem.replace(**changes))


class TestTheCertificate:
    def test_by_hand_example(self):
        best = Assignment.from_pairs([0, 0, 1, 1, 1], [0, 2, 0, 1, 3], (2, 4))
        proof = certify(BY_HAND, best, [0.0, 0.8, 0.0, 0.0])
        assert proof.objective == pytest.approx(3.0)
        assert proof.optimal
        assert not certify(BY_HAND, best, [0.0, 0.7, 0.0, 0.0]).optimal

    def test_without_the_layers_the_same_claim_is_wrong(self):
        best = Assignment.from_pairs([0, 0, 1, 1, 1], [0, 2, 0, 1, 3], (2, 4))
        assert not certify(BY_HAND.replace(layers=None), best, [0.0, 0.8, 0.0, 0.0]).optimal

    def test_broken_layer_bounds_are_listed(self):
        bad = Assignment.from_pairs([0, 0, 1, 1, 1], [0, 1, 0, 2, 3], (2, 4))
        assert certify(BY_HAND, bad).violations == (
            Violation("layer_max", (1, 1), 2, 1),
            Violation("layer_min", (0, 1), 0, 1),
        )

    @settings(max_examples=drawn(60))
    @given(problem=LAYERED, data=st.data())
    def test_bound_holds_for_any_prices(self, problem, data):
        prices = data.draw(st.lists(st.floats(-2, 2), min_size=problem.n_experts, max_size=problem.n_experts))
        optimum, bound = brute_force(problem), dual_bound(problem, prices)
        assert optimum is None or bound >= optimum - TOLERANCE
        assert (bound == -math.inf) == bool(problem.overstretched.any())

    @settings(max_examples=drawn(60))
    @given(problem=tiny_problems(with_layers=True, bounded=False))
    def test_bound_of_separate_clients_is_their_optimum(self, problem):
        optimum = brute_force(problem)
        expected = -math.inf if optimum is None else pytest.approx(optimum, abs=TOLERANCE)
        assert dual_bound(problem, np.zeros(problem.n_experts)) == expected

    @settings(max_examples=drawn(25))
    @given(problem=tiny_problems(with_layers=True, budgeted=True), data=st.data())
    def test_bound_with_budgets_too_is_valid_and_no_weaker_than_either(self, problem, data):
        prices = data.draw(st.lists(st.floats(-2, 2), min_size=problem.n_experts, max_size=problem.n_experts))
        optimum, bound = brute_force(problem), dual_bound(problem, prices)
        assert optimum is None or bound >= optimum - TOLERANCE
        assert bound <= dual_bound(problem.replace(budgets=()), prices) + TOLERANCE
        if not problem.overstretched.any():
            assert bound <= dual_bound(problem.replace(layers=None), prices) + TOLERANCE


def feasible_masks(problem: AssignmentProblem) -> list[np.ndarray]:
    """Every assignment of a tiny problem that keeps all bounds."""
    _, loads, choices = enumerate_assignments(problem)
    masks = []
    for at in np.flatnonzero(((loads >= problem.load_min) & (loads <= problem.load_max)).all(axis=1)):
        mask = np.zeros(problem.shape, dtype=bool)
        for i, k in enumerate(np.unravel_index(at, [len(options) for options in choices])):
            mask[i, list(choices[i][int(k)])] = True
        masks.append(mask)
    return masks


@settings(max_examples=drawn(60))
@given(problem=LAYERED, data=st.data())
def test_polish_reaches_the_optimum_from_any_feasible_assignment(problem, data):
    masks = feasible_masks(problem)
    if not masks:
        return
    start = masks[data.draw(st.integers(0, len(masks) - 1))]
    polished = polish(problem, Assignment.from_mask(start))
    proof = certify(problem, polished.assignment, polished.prices)
    assert proof.objective == pytest.approx(brute_force(problem), abs=TOLERANCE)
    assert proof.optimal


def test_polish_splits_cycles_that_use_a_client_twice():
    """From the worst schedules: many cycles at once, in wide layers whose bounds are tight."""
    rng = np.random.default_rng(3)
    for _ in range(12):
        layers = ExpertLayers(rng.permutation([0, 0, 0, 1, 1, 1, 2, 2, 2]), 1, [2, 1, 2])
        problem = AssignmentProblem(rng.integers(0, 9, (6, 9)).astype(float), 4, min_experts=3, layers=layers)
        problem = problem.replace(load_max=3, load_min=1)
        worst = solve(problem.replace(desirability=-problem.desirability), "flow-networkx").pairs
        polished = polish(problem, worst)
        assert certify(problem, polished.assignment, polished.prices).optimal


def recount(problem: AssignmentProblem, conflict) -> tuple[int, int]:
    """Count the places demanded and those that exist from all choices of every client."""
    experts, clients = set(conflict.experts), set(conflict.clients)
    choices = enumerate_assignments(problem).choices
    at_cut = [[len(experts & set(chosen)) for chosen in sets] for sets in choices]
    if conflict.kind == "experts starve":
        assert clients == {i for i, counts in enumerate(at_cut) if max(counts) > 0}
        return sum(int(problem.load_min[j]) for j in experts), sum(map(max, at_cut))
    assert clients == {i for i, counts in enumerate(at_cut) if min(counts) > 0}
    places = sum(min(int(problem.load_max[j]), problem.n_clients) for j in experts)
    return sum(map(min, at_cut)), places


class TestConflicts:
    @settings(max_examples=drawn(60))
    @given(problem=tiny_problems(with_layers=True))
    def test_conflict_is_found_exactly_where_there_is_one(self, problem):
        conflict = find_conflict(problem)
        assert (conflict is not None) == (brute_force(problem) is None)
        if conflict is None:
            return
        assert conflict.required > conflict.available
        assert str(conflict.required) in conflict.message
        assert str(conflict.available) in conflict.message
        if conflict.experts and not problem.overstretched.any():
            assert recount(problem, conflict) == (conflict.required, conflict.available)

    def test_clients_and_layers_are_named(self):
        problem = AssignmentProblem(np.ones((3, 4)), [2, 1, 0], layers=ExpertLayers([0, 0, 1, 1], 1))
        message = "clients {1, 2} must take 4 places (layer_min), only 1 are open to them"
        assert find_conflict(problem).message == message
        barred = problem.replace(capacity=2, eligible=[[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
        message = "client 1 must take 1 places in layer 1 (layer_min), only 0 are open to it"
        assert find_conflict(barred).message == message

    def test_full_and_starving_experts_are_named_with_their_layer(self):
        layers = ExpertLayers([0, 0, 1, 1], [0, 1], [1, 1])
        problem = AssignmentProblem(np.ones((5, 4)), 2, layers=layers)
        answer = solve(problem.replace(load_max=[5, 5, 2, 2]))
        assert answer.status is Status.INFEASIBLE
        assert answer.conflict.message == (
            "clients {0, 1, 2, 3, 4} must take 5 places at experts {2, 3} of layer 1 (layer_min), "
            "only 4 are open to them (load_max)"
        )
        assert find_conflict(problem.replace(load_min=[3, 3, 0, 0])).message == (
            "experts {0, 1} of layer 0 need 6 clients (load_min), only 5 eligible slots (layer_max) reach them"
        )

    @settings(max_examples=drawn(60))
    @given(problem=tiny_problems(with_layers=True))
    def test_load_bounds_are_widened_by_the_fewest_places(self, problem):
        hard = np.zeros_like(problem.load_min), np.full_like(problem.load_max, problem.n_clients)
        widened, relaxed = widen_load_bounds(problem, hard)
        _, loads, choices = enumerate_assignments(problem)
        if not all(choices):
            assert not relaxed
            return
        assert find_conflict(widened) is None
        below, above = np.maximum(problem.load_min - loads, 0), np.maximum(loads - problem.load_max, 0)
        fewest = int((below + above).sum(axis=1).min())
        assert sum(abs(one.asked - one.used) for one in relaxed) == fewest


class TestExplanations:
    @settings(max_examples=drawn(60))
    @given(seed=st.integers(0, 400))
    def test_margins_and_worths_are_those_of_solving_anew(self, seed):
        problem = layered(seed)
        problem = problem.replace(desirability=np.round(problem.desirability * 8))
        answer = solve(problem, "flow-networkx")
        if answer.status is Status.INFEASIBLE:
            return
        held = answer.pairs.mask()

        def best(changed: AssignmentProblem) -> float:
            found = brute_force(changed)
            return -math.inf if found is None else found

        n, m = problem.shape
        for i in range(n):
            for j in range(m):
                if problem.eligible is not None and not problem.eligible[i, j]:
                    continue
                eligible = np.ones((n, m), bool) if problem.eligible is None else problem.eligible.copy()
                if held[i, j]:
                    eligible[i, j] = False
                    turned = best(problem.replace(eligible=eligible))
                else:
                    scores = problem.desirability.copy()
                    scores[i, j] += 1000.0
                    turned = best(problem.replace(desirability=scores)) - 1000.0
                    turned = turned if turned > -500 else -math.inf
                found = answer.explain(i, j)
                assert found.margin == pytest.approx(answer.objective - turned, abs=1e-9), (i, j)
        worth = answer.sensitivity()
        for i in range(n):
            more = problem.capacity + (np.arange(n) == i)
            gain = best(problem.replace(capacity=more)) - answer.objective
            assert gain == pytest.approx(worth.capacity[i], abs=1e-9)
            if problem.min_experts[i]:
                less = problem.min_experts - (np.arange(n) == i)
                gain = best(problem.replace(min_experts=less)) - answer.objective
                assert gain == pytest.approx(worth.min_experts[i], abs=1e-9)

    def test_layers_are_among_the_reasons(self):
        text = str(solve(BY_HAND).explain(0, 2))
        assert "client 0 trains 1 expert of layer 1, as many as it may" in text
        assert "client 0 trains 1 expert of layer 1, the fewest it must" in text


@pytest.mark.parametrize("by_client", [False, True])
def test_problem_files_keep_layers(tmp_path, by_client):
    low = np.array([[0, 1], [1, 0]]) if by_client else [1, 0]
    problem = AssignmentProblem(np.ones((2, 3)), 2, layers=ExpertLayers([0, 1, 1], low, 1))
    save_problem(problem, tmp_path / "p.npz")
    back = load_problem(tmp_path / "p.npz").layers
    for name in ("layer_of", "layer_min", "layer_max"):
        np.testing.assert_array_equal(getattr(back, name), getattr(problem.layers, name))


def test_problem_files_name_missing_and_wrong_arrays(tmp_path):
    arrays = {"desirability": np.ones((2, 2)), "capacity": [1, 1], "layer_of": [0, 1]}
    np.savez(tmp_path / "p.npz", **arrays)
    with pytest.raises(InputError, match="has no array called 'layer_min'"):
        load_problem(tmp_path / "p.npz")
    np.savez(tmp_path / "p.npz", **arrays, layer_min=[0, 2], layer_max=[1, 1])
    with pytest.raises(InputError, match=r"p\.npz: layer_min\[1\] = 2: must be <= layer_max\[1\] = 1"):
        load_problem(tmp_path / "p.npz")


class TestSchedule:
    FITNESS = np.random.default_rng(5).random((40, 8))
    LAYERS = ExpertLayers([0, 0, 0, 0, 0, 0, 1, 1], 1, 2)

    def test_fill_takes_as_many_as_layers_allow(self):
        answer = schedule(self.FITNESS, np.ones(8), 5, layers=self.LAYERS)
        assert answer.status is Status.OPTIMAL
        counts = self.LAYERS.count(answer.pairs.mask())
        assert (counts == 2).all()

    def test_without_fill_layers_demand_what_is_not_worth_it(self):
        answer = schedule(self.FITNESS - 5, np.ones(8), 5, layers=self.LAYERS, fill=False, balance=None)
        counts = self.LAYERS.count(answer.pairs.mask())
        assert (counts == 1).all()

    def test_balance_goes_by_the_mean_of_the_layer(self):
        """Two of six experts, or of two, for 40 clients: a mean of 13 1/3, and of 40."""
        answer = schedule(self.FITNESS, np.ones(8), 5, layers=self.LAYERS, balance=0.1)
        assert answer.problem.load_min.tolist() == [12] * 6 + [36] * 2
        assert answer.problem.load_max.tolist() == [15] * 6 + [44] * 2
        assert not answer.relaxed

    def test_places_between_layers_are_shared_by_their_room(self):
        """One of each layer, and a third place for which both have one place of room: 60 places for each layer."""
        answer = schedule(self.FITNESS, np.ones(8), 3, layers=self.LAYERS, balance=0)
        assert answer.loads.tolist() == [10] * 6 + [30] * 2
        assert answer.status is Status.OPTIMAL

    def test_layers_and_balance_within_budgets(self):
        """Not any two experts fit, but one of each layer does, and that is what every client must take."""
        memory = ResourceBudget("memory", [3, 3, 3, 1, 1, 1, 1, 1], np.full(40, 4.0))
        answer = schedule(self.FITNESS, np.ones(8), 4, layers=self.LAYERS, budgets=[memory], balance=0.3)
        assert answer.status is Status.OPTIMAL
        assert answer.problem.min_experts.tolist() == [2] * 40
        assert answer.problem.load_max.tolist() == [9] * 6 + [26] * 2
        mask = answer.pairs.mask()
        assert all(keeps_layers(answer.problem, i, np.flatnonzero(row)) for i, row in enumerate(mask))
        assert (memory.used(answer.pairs) <= 4).all()

    def test_a_client_that_cannot_keep_the_minima_is_named_with_budgets_too(self):
        memory = ResourceBudget("memory", np.ones(8), np.full(40, 4.0))
        capacity = np.where(np.arange(40) == 7, 1, 4)
        answer = schedule(self.FITNESS, np.ones(8), capacity, layers=self.LAYERS, budgets=[memory])
        assert answer.status is Status.INFEASIBLE
        assert answer.conflict.message == "client 7 must take 2 places (layer_min), only 1 are open to it"


def test_penalties_and_layers_together():
    problem = clustered(30, 6).replace(
        layers=ExpertLayers([0, 1, 2] * 2, 1, 2), capacity=4, min_experts=0, load_min=0, load_max=30,
        load_penalty=LoadPenalty.quadratic(0.05, n_experts=6),
    )  # fmt: skip
    answers = [solve(problem, name) for name in ("flow-networkx", "lp-scipy", "flow-ortools")]
    assert all(answer.status is Status.OPTIMAL for answer in answers)
    assert answers[0].objective == pytest.approx(answers[1].objective, abs=TOLERANCE)
