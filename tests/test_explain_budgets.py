"""Explanations where there are budgets, against enumeration: exact margins, bounds, what is missing, summaries."""

import itertools
import math
import re

import numpy as np
import pytest
from drawn import drawn
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import (
    brute_force,
    contended,
    enumerate_assignments,
    layered,
    load_penalties,
    penalty_paid,
    tiny_problems,
)

from fedmoe_sched import AssignmentProblem, ExpertLayers, InputError, ResourceBudget, Status, schedule, solve
from fedmoe_sched._fixed_pair import with_pair
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import certify, violations
from fedmoe_sched.result import Schedule, StopReason

BONUS = 1024.0


def turned(problem, client, expert, chosen):
    """Optimum with the decision on an eligible pair turned round, by enumeration; -inf where there is none."""
    if chosen:
        eligible = np.ones(problem.shape, bool) if problem.eligible is None else problem.eligible.copy()
        eligible[client, expert] = False
        best = brute_force(problem.replace(eligible=eligible))
        return -math.inf if best is None else best
    scores = problem.desirability.astype(float)
    scores[client, expert] += BONUS
    best = brute_force(problem.replace(desirability=scores))
    return best - BONUS if best is not None and best > BONUS / 2 else -math.inf


def eligible_pairs(problem):
    return np.argwhere(np.ones(problem.shape, bool) if problem.eligible is None else problem.eligible).tolist()


budgeted = tiny_problems(budgeted=True) | tiny_problems(budgeted=True, penalised=True) | tiny_problems(
    budgeted=True, with_layers=True
)  # fmt: skip


def widened(problem, client, expert, bounds, amounts):
    """The problem with some bounds wider: by one, and budgets by the amount that is missing."""
    changes = {"budgets": []}
    for name, at in (("capacity", client), ("load_max", expert)):
        if name in bounds:
            changes[name] = getattr(problem, name) + (np.arange(len(getattr(problem, name))) == at)
    for resource in problem.budgets:
        budget = resource.budget.copy()
        if f"budget:{resource.name}" in bounds:
            budget[client] += amounts[resource.name]
        changes["budgets"].append(ResourceBudget(resource.name, resource.size, budget))
    if "layer_max" in bounds:
        layers, n = problem.layers, problem.n_clients
        low, high = (np.array(part) for part in layers.bounds_of(slice(0, n), n))
        high[client, layers.layer_of[expert]] += 1
        changes["layers"] = ExpertLayers(layers.layer_of, low, high)
    return problem.replace(**changes)


def brings_in(problem, client, expert, bounds, found):
    """Whether every optimum of the wider problem has the pair, by enumeration."""
    wider = widened(problem, client, expert, bounds, {use.name: use.missing for use in found.resources})
    lead = turned(wider, client, expert, chosen=False) - turned(wider, client, expert, chosen=True)
    assume(not 1e-11 < abs(lead) < 1e-5)  # what a backend may take for nothing
    return lead > 1e-6


def assert_brought_in(problem, client, expert, found):
    """What is said to bring a pair in does, and no part of it is listed too."""
    assert not (found.chosen and found.brought_in_by)
    for bounds in found.brought_in_by:
        assert brings_in(problem, client, expert, bounds, found)
        assert not any(set(other) < set(bounds) for other in found.brought_in_by)


@settings(max_examples=drawn(20), deadline=None)
@given(problem=budgeted)
def test_all_that_brings_a_pair_of_a_small_problem_in_is_named(problem):
    answer = solve(problem)
    if answer.status is Status.INFEASIBLE:
        return
    held = answer.pairs.mask()
    for i, j in eligible_pairs(problem)[:6]:
        if held[i, j]:
            continue
        found = answer.explain(i, j, time_limit=30)
        assert_brought_in(problem, i, j, found)
        full = {
            "capacity": held[i].sum() == problem.capacity[i],
            "load_max": held[:, j].sum() == problem.load_max[j],
        }
        full |= {f"budget:{use.name}": use.missing > 0 for use in found.resources}
        if problem.layers is not None:
            inside = problem.layers.layer_of == problem.layers.layer_of[j]
            high = problem.layers.bounds_of(slice(i, i + 1), 1)[1][0, problem.layers.layer_of[j]]
            full["layer_max"] = held[i, inside].sum() == high
        names = [name for name, binds in full.items() if binds]
        every = [b for k in range(1, len(names) + 1) for b in itertools.combinations(names, k)]
        does = [set(b) for b in every if brings_in(problem, i, j, b, found)]
        least = [b for b in does if not any(other < b for other in does)]
        assert sorted(map(sorted, found.brought_in_by)) == sorted(map(sorted, least))


@settings(max_examples=drawn(25), deadline=None)
@given(problem=budgeted)
def test_margins_of_small_problems_are_exact(problem):
    answer = solve(problem)
    if answer.status is Status.INFEASIBLE:
        return
    assert answer.status is Status.OPTIMAL
    held = answer.pairs.mask()
    for i, j in eligible_pairs(problem):
        found = answer.explain(i, j, time_limit=30)
        loss = answer.objective - turned(problem, i, j, held[i, j])
        assert found.exact
        assert found.chosen == held[i, j]
        assert found.margin == found.margin_most == pytest.approx(loss, abs=1e-6)


def by_somebody(problem, mask, prices=None):
    """A schedule of whatever quality."""
    pairs = Assignment.from_mask(mask)
    known = {"pairs": pairs, "certificate": certify(problem, pairs, prices), "prices": prices}
    return Schedule(problem, "somebody", Status.FEASIBLE, StopReason.COMPLETED, **known)


@settings(max_examples=drawn(40), deadline=None)
@given(problem=budgeted, data=st.data())
def test_margins_of_any_schedule_lie_between_their_bounds(problem, data):
    """With any feasible assignment and any prices, or none, and without solving anew."""
    mask = any_feasible(problem, data)
    if mask is None:
        return
    m = problem.n_experts
    prices = data.draw(st.none() | st.lists(st.floats(-1, 2), min_size=m, max_size=m).map(np.array))
    answer = by_somebody(problem, mask, prices)
    for i, j in eligible_pairs(problem):
        found = answer.explain(i, j, time_limit=0)
        loss = answer.objective - turned(problem, i, j, mask[i, j])
        assert found.margin <= loss + 1e-6
        assert found.margin_most >= loss - 1e-6
        assert str(found).startswith(f"client {i} and expert {j}")
        assert_brought_in(problem, i, j, found)


@settings(max_examples=drawn(30), deadline=None)
@given(problem=budgeted)
def test_what_is_missing_lets_a_pair_fit_beside_the_others(problem):
    answer = solve(problem)
    if answer.status is Status.INFEASIBLE:
        return
    held = answer.pairs.mask()
    for i, j in eligible_pairs(problem):
        with_it = held.copy()
        with_it[i, j] = True
        uses = answer.explain(i, j, time_limit=0).resources
        assert [use.name for use in uses] == [resource.name for resource in problem.budgets]
        for use, resource in zip(uses, problem.budgets, strict=True):
            assert use.used == pytest.approx(resource.sizes_of([i])[0] @ held[i])
            assert (use.missing > 0) <= (not held[i, j])
            for part, fits in ((1.0, True), (0.999, use.missing == 0)):
                budget = resource.budget.copy()
                budget[i] += part * use.missing
                changed = problem.replace(budgets=[ResourceBudget(use.name, resource.size, budget)])
                broken = violations(changed, Assignment.from_mask(with_it))
                over = any(v.constraint == "budget" and v.position == (i,) for v in broken)
                if part == 1.0 or use.missing == 0 or use.missing > 1e-4 * max(1, budget[i]):
                    assert over != fits


@settings(max_examples=drawn(30), deadline=None)
@given(problem=budgeted)
def test_places_are_worth_no_more_than_the_summary_says(problem):
    answer = solve(problem)
    if answer.status is Status.INFEASIBLE:
        return
    lines = answer.summary().splitlines()[-problem.n_experts - len(problem.budgets) :]
    for j, line in enumerate(lines[: problem.n_experts]):
        for pattern, name, step in (("one more place", "load_max", 1), ("one less", "load_min", -1)):
            told = re.search(rf"{pattern} is worth (\S+) at most \(a bound by prices\)", line)
            if told:
                bounds = getattr(problem, name).copy()
                bounds[j] += step
                gain = brute_force(problem.replace(**{name: bounds})) - answer.objective
                assert gain <= float(told[1]) * (1 + 1e-5) + 1e-6


def assert_between(problem, objective, most, least):
    """The gain of a wider problem, by enumeration, is between the bounds."""
    gain = brute_force(problem) - objective
    assert least - 1e-6 <= gain <= most + 1e-6


def any_feasible(problem, data):
    """A feasible assignment of whatever quality; None where there is none."""
    everything = enumerate_assignments(problem)
    fits = ((everything.loads >= problem.load_min) & (everything.loads <= problem.load_max)).all(axis=1)
    if not fits.any():
        return None
    at = data.draw(st.sampled_from(np.flatnonzero(fits).tolist()))
    places = np.unravel_index(at, [len(options) for options in everything.choices])
    mask = np.zeros(problem.shape, dtype=bool)
    for i, (options, place) in enumerate(zip(everything.choices, places, strict=True)):
        mask[i, list(options[place])] = True
    return mask


@settings(max_examples=drawn(60), deadline=None)
@given(problem=budgeted, data=st.data())
def test_what_wider_bounds_are_worth_is_between_bounds(problem, data):
    """Of optimal schedules, and of any with any prices, or none."""
    answer = solve(problem)
    if answer.status is Status.INFEASIBLE:
        return
    if data.draw(st.booleans()):
        prices = st.lists(st.floats(-1, 2), min_size=problem.n_experts, max_size=problem.n_experts)
        answer = by_somebody(problem, any_feasible(problem, data), data.draw(st.none() | prices.map(np.array)))
    worth, objective = answer.sensitivity(), answer.objective
    (n, m), most, least = problem.shape, worth.at_most, worth.at_least
    for name, step, size in (("load_max", 1, m), ("load_min", -1, m), ("capacity", 1, n), ("min_experts", -1, n)):
        assert getattr(most, name).shape == getattr(least, name).shape == (size,)
        for at in range(size):
            bounds = np.maximum(getattr(problem, name) + step * (np.arange(size) == at), 0)
            wider = problem.replace(**{name: bounds})
            assert_between(wider, objective, getattr(most, name)[at], getattr(least, name)[at])
    for r, resource in enumerate(problem.budgets):
        for some in [*range(n), slice(None)]:
            budget = resource.budget.copy()
            budget[some] = np.inf
            budgets = list(problem.budgets)
            budgets[r] = ResourceBudget(resource.name, resource.size, budget)
            above = worth.without_at_most[r] if some == slice(None) else worth.unlimited_at_most[r, some]
            below = 0.0 if some == slice(None) else worth.unlimited_at_least[r, some]
            assert_between(problem.replace(budgets=budgets), objective, above, below)


@settings(max_examples=drawn(60), deadline=None)
@given(problem=budgeted, data=st.data())
def test_with_the_smallest_step_one_expert_more_or_another_one_pays(problem, data):
    mask = any_feasible(problem, data)
    if mask is None:
        return
    answer = by_somebody(problem, mask)
    steps = answer.sensitivity().smallest_step
    for i, r in itertools.product(range(problem.n_clients), range(len(problem.budgets))):
        resource = problem.budgets[r]
        needed = []
        for j in np.flatnonzero(~mask[i]).tolist():
            for k in [None, *np.flatnonzero(mask[i]).tolist()]:
                other = mask.copy()
                other[i, j] = True
                if k is not None:
                    other[i, k] = False
                taken = certify(problem, Assignment.from_mask(other))
                broken = [v for v in taken.violations if v.resource != resource.name]
                over = [v.value - resource.budget[i] for v in taken.violations if v.resource == resource.name]
                if not broken and taken.objective > answer.objective + 1e-7:
                    needed.append(max([0.0, *over]))
        assert steps[r, i] == pytest.approx(min(needed, default=np.inf), abs=1e-7)


def test_sensitivity_by_hand():
    """Anna holds x, which fills its place; 1e6 more would let her add y, and no limit z too."""
    answer = by_hand()
    worth = answer.sensitivity()
    assert worth.smallest_step.tolist() == [[1e6, np.inf]]
    assert worth.unlimited_at_least[0].tolist() == [pytest.approx(0.5 + 0.3), 0.0]
    assert worth.at_least.capacity.tolist() == [0.0, 0.0]
    assert worth.at_least.load_max.tolist() == [0.0, 0.0, 0.0]
    priced = by_somebody(answer.problem, answer.pairs.mask(), np.array([0.1, 0.0, 0.0]))
    assert priced.sensitivity().unlimited_at_most[0].tolist() == [pytest.approx(0.8), 0.0]
    slot = by_hand(budgets=[ResourceBudget("memory", [2.0, 1.0, 1.0], [3.0, 3.0])], capacity=1).sensitivity()
    assert slot.at_least.capacity == pytest.approx([0.5, 0.5])
    text = by_hand(capacity=[1, 1], load_max=[1, 1, 1]).summary()
    assert "one more place is worth" in text


@settings(max_examples=drawn(60), deadline=None)
@given(data=st.data())
def test_penalties_after_some_clients(data):
    m = data.draw(st.integers(1, 3))
    penalty = data.draw(load_penalties(m))
    there, more = (np.array(data.draw(st.lists(st.integers(0, 6), min_size=m, max_size=m))) for _ in range(2))
    after = penalty.after(there)
    blank = AssignmentProblem(np.zeros((1, m)), 0)
    paid = [
        penalty_paid(blank.replace(load_penalty=one), loads)
        for one, loads in ((after, more), (penalty, there + more), (penalty, there))
    ]
    assert paid[0] == pytest.approx(paid[1] - paid[2], abs=1e-9)


def by_hand(**changes):
    """Anna holds the large expert; the two small ones do not fit beside it, and one of them only just."""
    memory = ResourceBudget("memory", size=[8e6, 3e6, 4e6], budget=[10e6, 7e6])
    problem = AssignmentProblem(
        [[0.9, 0.5, 0.3], [0.1, 0.5, 0.6]], 3, load_max=[1, 2, 2], budgets=[memory],
        client_labels=["anna", "ben"], expert_labels=["x", "y", "z"],
    )  # fmt: skip
    return solve(problem.replace(**changes))


def test_an_explanation_by_hand():
    answer = by_hand()
    assert answer.experts_by_client() == {"anna": ["x"], "ben": ["y", "z"]}
    why_not = answer.explain("anna", "y")
    # With y she keeps 7e6: z goes with it, and x is lost.
    assert (why_not.exact, why_not.instead, why_not.besides) == (True, ("x",), ("z",))
    assert why_not.margin == pytest.approx(0.1)
    price = "" if answer.prices is None else f", price {answer.prices[1]:.6g}"
    assert str(why_not) == (
        f"client 'anna' and expert 'y' (desirability 0.5{price}): not chosen; with it in place of expert 'x', "
        "taking expert 'z' too the objective would be 0.1 less: so much its desirability would have to rise\n"
        "  1e+06 more memory for client 'anna' would bring it in\n"
        "  client 'anna' uses 8e+06 of 1e+07 memory; expert 'y' takes 3e+06: 1e+06 more would let it fit"
    )
    use = why_not.resources[0]
    assert (use.budget, use.used, use.size, use.missing) == (1e7, 8e6, 3e6, 1e6)
    why = answer.explain("anna", "x")
    assert (why.chosen, why.exact, set(why.instead), why.besides) == (True, True, {"y", "z"}, ())
    assert "client 'anna' uses 8e+06 of 1e+07 memory, 8e+06 of it for expert 'x'" in str(why)
    never = answer.explain("ben", "x")
    assert math.isinf(never.margin)
    assert "with it no assignment keeps all bounds" in str(never)
    barred = by_hand(eligible=[[True, False, True], [True] * 3]).explain("anna", "y")
    assert str(barred).endswith("not chosen: the pair is not eligible")


def test_a_summary_by_hand():
    answer = by_hand()
    lines = answer.summary().splitlines()
    told = "memory: 88.2% of 1.7e+07 used; for 2 of 2 clients an expert does not fit that they have a slot for"
    assert lines[-1].startswith(told)
    if answer.prices is not None:
        worth = answer.sensitivity().without_at_most[0]
        assert lines[-1] == f"{told}; no limit on it is worth {worth:.6g} at most (a bound by prices)"
    full = next(line for line in lines if line.startswith("x"))
    assert "full" in full
    endless = ResourceBudget("seconds", size=[1.0, 1.0, 1.0], budget=[np.inf, np.inf])
    free = by_hand(budgets=[endless])
    assert free.summary().splitlines()[-1].startswith("seconds: nobody has any, or a limit; for 0 of 2 clients")


def test_bounds_are_named_as_such_where_nothing_was_proved():
    rng = np.random.default_rng(3)
    sizes = rng.integers(20, 60, 8).astype(float)
    problem = AssignmentProblem(
        rng.random((16, 8)),
        5,
        load_min=5,
        load_max=7,
        budgets=[ResourceBudget("seconds", sizes, np.full(16, 120.0))],
    )
    answer = solve(problem, "lagrangian")
    held = answer.pairs.mask()
    told = {True: set(), False: set()}
    for i, j in np.argwhere(np.ones(problem.shape, bool)).tolist()[:20]:
        quick = answer.explain(i, j, time_limit=0)
        text = str(quick).splitlines()[0]
        told[quick.exact].add((i, j))
        assert quick.exact or text.endswith("(a bound)")
        assert quick.chosen == held[i, j]
    assert told[False]
    for i, j in sorted(told[False])[:3]:
        quick, slow = answer.explain(i, j, time_limit=0), answer.explain(i, j, time_limit=5)
        assert quick.margin - 1e-9 <= slow.margin <= slow.margin_most <= quick.margin_most + 1e-9


def test_a_schedule_that_is_not_optimal_says_what_turning_round_gains():
    memory = ResourceBudget("memory", size=[5.0, 3.0, 3.0], budget=[6.0])
    problem = AssignmentProblem([[0.6, 0.5, 0.5]], 2, budgets=[memory])
    found = by_somebody(problem, np.array([[True, False, False]])).explain(0, 1)
    assert found.exact
    assert found.margin == pytest.approx(-0.4)
    assert "the objective would be 0.4 more: the schedule is not optimal" in str(found)
    assert found.instead == (0,)
    assert found.besides == (2,)


def test_budgets_with_layers_and_fitness():
    layers = ExpertLayers([0, 0, 1], layer_min=[0, 1], layer_max=1)
    memory = ResourceBudget("memory", size=[2.0, 1.0, 1.0], budget=[2.0])
    answer = schedule(
        [[0.9, 0.2, 0.4]],
        [0, 0, 0],
        2,
        fitness_weight=2.0,
        balance=None,
        budgets=[memory],
        layers=layers,
        fill=False,
        usage_weight=0,
    )
    assert answer.experts_by_client() == {0: [1, 2]}
    found = answer.explain(0, 0)
    assert math.isinf(found.margin)  # with it the layer that must have one has none
    assert found.resources[0].missing == 2.0
    assert "client 0 trains 1 expert of layer 0, as many as it may" in str(found)
    why = answer.explain(0, 1)
    assert (why.margin, why.fitness_change) == (pytest.approx(0.4), pytest.approx(-0.2))


@settings(max_examples=drawn(200), deadline=None)
@given(
    problem=budgeted
    | tiny_problems(with_layers=True)
    | st.builds(contended, st.integers(0, 2**20), penalised=st.booleans())
    | st.builds(layered, st.integers(0, 2**20), penalised=st.booleans())
)
def test_a_pair_that_is_taken_leaves_a_problem_of_the_same_optimum(problem):
    for i, j in eligible_pairs(problem)[:6]:
        fixed, best = with_pair(problem, i, j), turned(problem, i, j, chosen=False)
        rest = None if fixed is None else brute_force(fixed.rest)
        found = -math.inf if rest is None else rest + fixed.worth
        assert found == pytest.approx(best, abs=1e-6)


def test_a_pair_that_is_taken_leaves_nothing_where_a_bound_is_too_narrow():
    memory = ResourceBudget("memory", size=[2.0, 1.0], budget=[1.5, 5.0])
    problem = AssignmentProblem(np.ones((2, 2)), [2, 0], load_max=[2, 0], budgets=[memory])
    assert with_pair(problem, 0, 0) is None  # the budget
    assert with_pair(problem, 0, 1) is None  # load_max
    assert with_pair(problem, 1, 0) is None  # capacity
    layers = ExpertLayers([0, 1], layer_max=[0, 1])
    assert with_pair(problem.replace(budgets=(), layers=layers), 0, 0) is None


def test_schedules_that_break_bounds_are_not_explained():
    memory = ResourceBudget("memory", size=[1.0, 1.0], budget=[2.0, 2.0])
    problem = AssignmentProblem([[0.9, 0.1], [0.8, 0.1]], 1, min_experts=1, load_max=1, budgets=[memory])
    broken = by_somebody(problem, np.array([[True, False], [True, False]]), np.zeros(2))
    with pytest.raises(InputError, match="schedule: breaks 1 constraints"):
        broken.explain(0, 0)
    with pytest.raises(InputError, match="schedule: breaks 1 constraints"):
        broken.sensitivity()
    assert "worth" not in broken.summary()
