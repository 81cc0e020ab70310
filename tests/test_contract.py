"""What every backend in the registry must do; the tests are made from the registry (``--solvers`` chooses)."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    TOLERANCE,
    affords,
    assert_prices_prove,
    brute_force,
    clustered,
    contended,
    keeps_layers,
    layered,
    linear_program,
    penalty_paid,
    tiny_problems,
)

from fedmoe_sched import (
    AssignmentProblem,
    Capability,
    ExpertLayers,
    Limits,
    LoadPenalty,
    ResourceBudget,
    Schedule,
    Solver,
    Status,
    StopReason,
    UnsupportedProblemError,
    solve,
    solvers,
)
from fedmoe_sched.registry import solver_class

MID_SIZE = {
    "clustered 200x8": lambda: clustered(200, 8),
    "clustered 200x8, free to take fewer": lambda: clustered(200, 8, seed=1, fill=False),
    "ties 60x12": lambda: clustered(60, 12, seed=2, decimals=1),
    "ties 60x12, few eligible pairs": lambda: clustered(
        60, 12, seed=3, decimals=1, eligible_share=0.5, low=0.2, high=1.5
    ),
    "integers 80x6, exact loads": lambda: AssignmentProblem(
        np.random.default_rng(4).integers(-3, 4, (80, 6)), 3, min_experts=3, load_min=40, load_max=40
    ),
    "infeasible 60x12": lambda: clustered(60, 12, seed=5).replace(load_max=11, load_min=0),
}

# Steps that jump, stay, and jump again: many loads cost the same, and bounds and scores decide.
STEPS = LoadPenalty.from_marginals([[0.0] * 20 + [0.1] * 10 + [0.1, 0.2, 0.4]] * 8)
# Clients of earlier rounds count: expert 0 is worn out, expert 1 is owed eight clients.
HISTORY = LoadPenalty.quadratic(0.02, [60, -8, 0, 0, 20, 0, 0, 5])
PENALISED = {
    "soft balance alone": lambda: clustered(200, 8, low=0, high=9).replace(
        load_penalty=LoadPenalty.quadratic(0.005, n_experts=8)
    ),
    "history, free to take fewer": lambda: clustered(200, 8, seed=1, fill=False, low=0, high=9).replace(
        load_penalty=HISTORY
    ),
    "history within load bounds": lambda: clustered(200, 8, seed=2).replace(load_penalty=HISTORY),
    "steps within load bounds": lambda: clustered(100, 8, seed=3).replace(load_penalty=STEPS),
    "steps, ties, few eligible pairs": lambda: clustered(
        80, 8, seed=4, decimals=1, eligible_share=0.5, low=0.2, high=1.5
    ).replace(load_penalty=STEPS),
    "whole numbers, ties of scores and penalties": lambda: AssignmentProblem(
        np.random.default_rng(5).integers(-3, 4, (80, 6)), 3, load_penalty=LoadPenalty.quadratic(0.1, n_experts=6)
    ),
    "float32": lambda: AssignmentProblem(
        clustered(80, 8, seed=6).desirability.astype(np.float32), 2, min_experts=1, load_penalty=HISTORY
    ),
    "penalties dwarf the scores": lambda: clustered(60, 8, seed=7, low=0, high=9).replace(
        load_penalty=LoadPenalty.quadratic(1e5, n_experts=8)
    ),
    "scores of zero": lambda: AssignmentProblem(np.zeros((40, 8)), 2, min_experts=1, load_penalty=HISTORY),
    "nothing to pay": lambda: clustered(60, 8, seed=8).replace(load_penalty=LoadPenalty.quadratic(0, n_experts=8)),
    "infeasible": lambda: clustered(60, 8, seed=9).replace(load_max=11, load_min=0, load_penalty=STEPS),
}


def in_layers(problem, low=1, high=2, **changes) -> AssignmentProblem:
    """Deal the experts out to layers of about four."""
    m = problem.n_experts
    layers = ExpertLayers(np.arange(m) % max(1, m // 4), low, high)
    return problem.replace(**{"layers": layers, "min_experts": 0, "load_min": 0, "load_max": 9999} | changes)


LAYERED = {
    "independent layers": lambda: in_layers(clustered(200, 8), capacity=4, load_min=70, load_max=110),
    "capacity couples layers": lambda: in_layers(clustered(200, 8, seed=1), capacity=3, load_max=85),
    "capacities and fewest experts couple layers": lambda: in_layers(
        clustered(99, 16, seed=2), capacity=np.arange(99) % 3 + 5, min_experts=np.arange(99) % 3 + 4, load_max=42
    ),
    "bounds by client, scores negative": lambda: in_layers(
        AssignmentProblem(clustered(120, 12, seed=3).desirability - 0.3, 5),
        np.arange(360).reshape(120, 3) % 2,
        np.arange(360).reshape(120, 3) % 3 + 1,
        load_min=9,
        load_max=25,
    ),
    "ties, few eligible pairs": lambda: in_layers(
        clustered(80, 12, seed=4, decimals=1, eligible_share=0.6), 0, 2, capacity=4, min_experts=1, load_max=26
    ),
    "whole numbers": lambda: in_layers(
        AssignmentProblem(np.random.default_rng(5).integers(-3, 4, (80, 8)), 3), 1, 3, load_min=28, load_max=32
    ),
    "infeasible": lambda: in_layers(clustered(60, 8, seed=6), capacity=4, load_max=[14] * 2 + [60] * 4 + [14] * 2),
    "infeasible in one layer": lambda: in_layers(clustered(60, 8, seed=6), capacity=4, load_max=[14, 60] * 4),
}


def needs_layers(name: str) -> None:
    if Capability.LAYERS not in solver_class(name).capabilities:
        pytest.skip(f"{name} takes no layers")


def needs_budgets(name: str) -> None:
    if Capability.BUDGETS not in solver_class(name).capabilities:
        pytest.skip(f"{name} takes no budgets")


def budgeted(seed: int, *, penalised: bool = False) -> AssignmentProblem:
    """Make a random tiny problem whose budgets bite as much as its load bounds; few have no answer."""
    rng = np.random.default_rng(seed)
    problem = contended(seed, penalised=penalised)
    shape = problem.shape if rng.random() < 0.5 else problem.shape[1:]
    kinds = (rng.integers(1, 10, shape), np.round(rng.uniform(0.1, 1, shape), 1), rng.uniform(1e8, 1e9, shape))
    size = kinds[rng.integers(3)]
    most = np.broadcast_to(size, problem.shape).sum(axis=1)
    budgets = [ResourceBudget("memory", size, most * rng.uniform(0.3, 1.0, problem.n_clients))]
    if rng.random() < 0.3:
        budgets.append(ResourceBudget("seconds", rng.integers(1, 4, problem.shape), rng.integers(2, 8, len(most))))
    return problem.replace(budgets=budgets, min_experts=np.minimum(problem.min_experts, 1))


def assert_searched(answer: Schedule, optimum: float) -> None:
    """Assert that an answer to a problem with budgets is the optimum, and that its bound is true."""
    problem = answer.problem
    assert answer.status is Status.OPTIMAL
    assert answer.stop_reason is StopReason.COMPLETED
    mask = answer.assignment.toarray()
    assert_keeps_bounds(problem, mask)
    assert all(affords(problem, i, np.flatnonzero(row)) for i, row in enumerate(mask))
    total = float(problem.desirability.astype(np.float64)[mask].sum()) - penalty_paid(problem, mask.sum(axis=0))
    scale = max(1.0, abs(optimum))
    assert total == pytest.approx(optimum, abs=TOLERANCE * scale)
    assert answer.objective == pytest.approx(total, abs=TOLERANCE * scale)
    assert answer.bound == pytest.approx(total, abs=2 * TOLERANCE * scale)
    assert answer.bound_source in {"prices", "backend"}
    proved = answer.verify().bound
    assert proved is None or proved >= optimum - TOLERANCE * scale
    assert answer.bound_source == "backend" or proved is not None


def needs_load_penalty(name: str) -> None:
    if Capability.LOAD_PENALTY not in solver_class(name).capabilities:
        pytest.skip(f"{name} takes no load penalty")


@cache
def mid_size(name: str) -> tuple[AssignmentProblem, float | None]:
    problem = (MID_SIZE | PENALISED | {f"layers: {k}": v for k, v in LAYERED.items()})[name]()
    return problem, linear_program(problem)


def assert_proved(answer: Schedule, optimum: float) -> None:
    """Assert that an answer is the optimum, by checks that share no code with the package."""
    problem = answer.problem
    assert answer.status is Status.OPTIMAL
    assert answer.stop_reason is StopReason.COMPLETED
    mask = answer.assignment.toarray()
    assert mask.dtype == np.bool_
    total = float(problem.desirability.astype(np.float64)[mask].sum()) - penalty_paid(problem, mask.sum(axis=0))
    scale = max(1.0, abs(optimum))
    assert total == pytest.approx(optimum, abs=TOLERANCE * scale)
    assert answer.objective == pytest.approx(total, abs=TOLERANCE * scale)
    assert answer.bound == pytest.approx(total, abs=TOLERANCE * scale)
    assert_keeps_bounds(problem, mask)
    assert answer.prices is not None
    assert answer.verify().optimal
    if problem.layers is not None:
        return  # complementary slackness is that of nested bounds
    assert_prices_prove(problem, mask, answer.prices, 1e-7)


def assert_keeps_bounds(problem: AssignmentProblem, mask: np.ndarray) -> None:
    assert (mask.sum(axis=1) <= problem.capacity).all()
    assert (mask.sum(axis=1) >= problem.min_experts).all()
    assert (mask.sum(axis=0) <= problem.load_max).all()
    assert (mask.sum(axis=0) >= problem.load_min).all()
    assert problem.eligible is None or not mask[~problem.eligible].any()
    assert all(keeps_layers(problem, i, np.flatnonzero(row)) for i, row in enumerate(mask))


def assert_refused(answer: Schedule) -> None:
    assert answer.status is Status.INFEASIBLE
    assert answer.stop_reason is StopReason.PROVED_INFEASIBLE
    assert answer.pairs is None
    assert answer.conflict is not None


@given(problem=tiny_problems())
def test_exact_backend_agrees_with_brute_force(exact_backend, problem):
    optimum = brute_force(problem)
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_proved(answer, optimum)


def test_exact_backend_agrees_with_brute_force_where_load_bounds_bite(exact_backend):
    """Hypothesis is good at corners; half of these problems cannot give every client its own best choice."""
    for seed in range(150):
        problem = contended(seed)
        optimum = brute_force(problem)
        answer = solve(problem, exact_backend)
        if optimum is None:
            assert_refused(answer)
        else:
            assert_proved(answer, optimum)


@pytest.mark.parametrize("name", MID_SIZE)
def test_exact_backend_agrees_with_linear_program(exact_backend, name):
    problem, optimum = mid_size(name)
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_proved(answer, optimum)


@given(problem=tiny_problems(penalised=True))
def test_exact_backend_agrees_with_brute_force_on_load_penalties(exact_backend, problem):
    needs_load_penalty(exact_backend)
    optimum = brute_force(problem)
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_proved(answer, optimum)


def test_exact_backend_agrees_with_brute_force_where_load_penalties_and_bounds_bite(exact_backend):
    needs_load_penalty(exact_backend)
    # The integer programs are slower, and have problems with budgets besides.
    for seed in range(50 if Capability.BUDGETS in solver_class(exact_backend).capabilities else 150):
        problem = contended(seed, penalised=True)
        optimum = brute_force(problem)
        answer = solve(problem, exact_backend)
        if optimum is None:
            assert_refused(answer)
        else:
            assert_proved(answer, optimum)


@pytest.mark.parametrize("name", PENALISED)
def test_exact_backend_agrees_with_linear_program_on_load_penalties(exact_backend, name):
    needs_load_penalty(exact_backend)
    problem, optimum = mid_size(name)
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_proved(answer, optimum)


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e9, 1e200])
def test_exact_backend_solves_load_penalties_of_any_magnitude(exact_backend, scale):
    needs_load_penalty(exact_backend)
    problem = clustered(30, 4, seed=11, fill=False)
    plain = problem.replace(load_penalty=LoadPenalty.quadratic(0.02, n_experts=4))
    scaled = problem.replace(
        desirability=problem.desirability * scale, load_penalty=LoadPenalty.quadratic(0.02 * scale, n_experts=4)
    )
    answer = solve(scaled, exact_backend)
    assert answer.objective == pytest.approx(linear_program(plain) * scale, rel=1e-9)


@settings(max_examples=40)
@given(problem=st.one_of(tiny_problems(with_layers=True), tiny_problems(with_layers=True, penalised=True)))
def test_exact_backend_agrees_with_brute_force_on_layers(exact_backend, problem):
    needs_layers(exact_backend)
    if problem.load_penalty is not None:
        needs_load_penalty(exact_backend)
    optimum = brute_force(problem)
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_proved(answer, optimum)


def test_exact_backend_agrees_with_brute_force_where_layers_and_load_bounds_bite(exact_backend):
    needs_layers(exact_backend)
    penalised = Capability.LOAD_PENALTY in solver_class(exact_backend).capabilities
    for seed in range(40):
        problem = layered(seed, penalised=penalised and seed % 2 == 1)
        optimum = brute_force(problem)
        answer = solve(problem, exact_backend)
        if optimum is None:
            assert_refused(answer)
        else:
            assert_proved(answer, optimum)


@pytest.mark.parametrize("name", LAYERED)
def test_exact_backend_agrees_with_linear_program_on_layers(exact_backend, name):
    needs_layers(exact_backend)
    problem, optimum = mid_size(f"layers: {name}")
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_proved(answer, optimum)


@settings(max_examples=15)
@given(problem=tiny_problems(with_layers=True, budgeted=True))
def test_exact_backend_agrees_with_brute_force_on_layers_and_budgets(exact_backend, problem):
    needs_layers(exact_backend)
    needs_budgets(exact_backend)
    optimum = brute_force(problem)
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_searched(answer, optimum)


def test_backend_takes_layers_or_refuses_them_with_a_reason(backend):
    problem = in_layers(clustered(40, 8), capacity=3)
    if Capability.LAYERS not in solver_class(backend).capabilities:
        with pytest.raises(UnsupportedProblemError, match=f"{backend} does not take layers"):
            solve(problem, backend)
        return
    answer = solve(problem, backend)
    assert answer.status in {Status.OPTIMAL, Status.FEASIBLE}
    assert_keeps_bounds(problem, answer.pairs.mask())


@given(problem=tiny_problems(budgeted=True))
def test_exact_backend_agrees_with_brute_force_on_budgets(exact_backend, problem):
    needs_budgets(exact_backend)
    optimum = brute_force(problem)
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_searched(answer, optimum)


def test_exact_backend_agrees_with_brute_force_where_budgets_and_load_bounds_bite(exact_backend):
    needs_budgets(exact_backend)
    for seed in range(100):
        problem = budgeted(seed)
        optimum = brute_force(problem)
        answer = solve(problem, exact_backend)
        if optimum is None:
            assert_refused(answer)
        else:
            assert_searched(answer, optimum)


@settings(max_examples=60)  # one of the backends starts a process for each
@given(problem=tiny_problems(penalised=True, budgeted=True))
def test_exact_backend_agrees_with_brute_force_on_budgets_and_load_penalties(exact_backend, problem):
    needs_budgets(exact_backend)
    needs_load_penalty(exact_backend)
    optimum = brute_force(problem)
    answer = solve(problem, exact_backend)
    if optimum is None:
        assert_refused(answer)
    else:
        assert_searched(answer, optimum)


def test_exact_backend_agrees_with_brute_force_where_budgets_and_load_penalties_bite(exact_backend):
    needs_budgets(exact_backend)
    needs_load_penalty(exact_backend)
    for seed in range(40):
        problem = budgeted(seed, penalised=True)
        optimum = brute_force(problem)
        answer = solve(problem, exact_backend)
        if optimum is None:
            assert_refused(answer)
        else:
            assert_searched(answer, optimum)


def test_exact_backend_refuses_budgets_with_load_penalties_unless_it_takes_both(exact_backend):
    problem = budgeted(1, penalised=True)
    missing = {Capability.BUDGETS, Capability.LOAD_PENALTY} - solver_class(exact_backend).capabilities
    if missing:
        with pytest.raises(UnsupportedProblemError, match=f"{exact_backend} does not take {min(missing)}"):
            solve(problem, exact_backend)
    else:
        assert solve(problem, exact_backend).status is Status.OPTIMAL


def test_backend_refuses_budgets_with_a_reason_or_keeps_them(backend):
    problem = clustered(20, 4)
    problem = problem.replace(budgets=[ResourceBudget("memory", [3, 1, 2, 2], np.full(20, 4.5))], min_experts=0)
    if Capability.BUDGETS not in solver_class(backend).capabilities:
        with pytest.raises(UnsupportedProblemError, match=f"{backend} does not take budgets"):
            solve(problem, backend)
        return
    answer = solve(problem, backend, limits=Limits(time=30))
    assert answer.status is Status.OPTIMAL
    assert (problem.budgets[0].used(answer.pairs) <= 4.5).all()
    # The budgets bite: without them more could be had.
    assert answer.objective < solve(problem.replace(budgets=()), "flow-ortools").objective - 0.1


@pytest.mark.parametrize("penalty", [None, LoadPenalty.quadratic(0.01, n_experts=3)])
def test_exact_backend_is_held_to_budgets_more_tightly_than_engines_are(exact_backend, penalty):
    """Two experts exceed the budget together by less than engines notice; the second client may hold both."""
    needs_budgets(exact_backend)
    if penalty is not None:
        needs_load_penalty(exact_backend)
    size = [0.5, 0.5 + 1e-7, 0.25]
    problem = AssignmentProblem(
        [[3.0, 2.0, 0.5]] * 2,
        3,
        load_penalty=penalty,
        budgets=[ResourceBudget("memory", size, [1.0, 1.0 + 2e-7])],
    )
    answer = solve(problem, exact_backend)
    assert answer.status is Status.OPTIMAL
    assert answer.experts_by_client() == {0: [0, 2], 1: [0, 1]}


def test_backend_takes_load_penalties_or_refuses_them_with_a_reason(backend):
    problem = clustered(20, 4).replace(load_penalty=LoadPenalty.quadratic(0.1, n_experts=4))
    entry = next(entry for entry in solvers() if entry.name == backend)
    if entry.exact and Capability.LOAD_PENALTY not in entry.capabilities:
        with pytest.raises(UnsupportedProblemError, match=f"{backend} does not take load penalty"):
            solve(problem, backend)
    else:
        answer = solve(problem, backend)
        mask = answer.assignment.toarray()
        paid = penalty_paid(problem, mask.sum(axis=0))
        assert paid > 1
        assert answer.objective == pytest.approx(problem.desirability[mask].sum() - paid, abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decimals", [None, 1, 2])
def test_exact_backend_agrees_with_linear_program_at_scale(exact_backend, seed, decimals):
    problem = clustered(1000, 16, seed=10 + seed, decimals=decimals)
    assert_proved(solve(problem, exact_backend), linear_program(problem))


ANY_PROBLEM = st.one_of(tiny_problems(), tiny_problems(penalised=True), tiny_problems(with_layers=True))


@given(problem=ANY_PROBLEM)
def test_heuristic_keeps_capacity_and_eligibility_and_never_overclaims(heuristic, problem):
    optimum = brute_force(problem)
    answer = solve(problem, heuristic)
    if answer.pairs is None:
        assert optimum is None
        assert_refused(answer)
        return
    mask = answer.assignment.toarray()
    assert (mask.sum(axis=1) <= problem.capacity).all()
    assert problem.eligible is None or not mask[~problem.eligible].any()
    if problem.layers is not None:
        assert not {"layer_max"} & {violation.constraint for violation in answer.violations}
    if answer.status is Status.VIOLATED:
        assert answer.violations
        return
    assert_keeps_bounds(problem, mask)
    assert optimum is not None
    assert answer.objective <= optimum + TOLERANCE
    if answer.status is Status.OPTIMAL:
        assert answer.objective == pytest.approx(optimum, abs=TOLERANCE)
        assert answer.verify().optimal
    else:
        assert answer.bound is None
        assert answer.gap is None


@given(problem=ANY_PROBLEM)
def test_heuristic_gets_a_true_bound_on_request(heuristic, problem):
    answer = solve(problem, heuristic, certify=True)
    optimum = brute_force(problem)
    if optimum is None or answer.pairs is None:
        return
    assert answer.bound == pytest.approx(optimum, abs=TOLERANCE)
    assert (answer.status is Status.OPTIMAL) == (not answer.violations and answer.gap <= TOLERANCE)


def test_backend_repeats_itself_for_a_seed(backend):
    problem = clustered(60, 6, seed=6, decimals=1)
    one, two = (solve(problem, backend, limits=Limits(seed=3)) for _ in range(2))
    np.testing.assert_array_equal(one.assignment.toarray(), two.assignment.toarray())
    assert one.objective == two.objective
    np.testing.assert_array_equal(one.prices, two.prices)


def test_backend_accepts_every_limit(backend):
    """With time to spare limits change nothing about the worth of an answer."""
    problem = clustered(40, 5, seed=7)
    plain = solve(problem, backend)
    limited = solve(problem, backend, limits=Limits(time=60, seed=0, threads=2))
    assert limited.status is plain.status
    assert limited.objective == pytest.approx(plain.objective, abs=TOLERANCE)
    unheeded = Capability.TIME_LIMIT not in solver_class(backend).capabilities
    assert ("takes no time limit" in limited.message) == unheeded
    assert "takes no time limit" not in plain.message


def test_backend_leaves_its_input_alone(backend):
    made = clustered(30, 4, seed=8, eligible_share=0.8, low=0.2, high=1.6)
    names = ("desirability", "capacity", "min_experts", "load_min", "load_max", "eligible")
    given_ = {name: np.array(getattr(made, name)) for name in names}
    before = {name: array.copy() for name, array in given_.items()}
    solve(AssignmentProblem(**given_), backend)
    for name, array in given_.items():
        np.testing.assert_array_equal(array, before[name])
        assert array.flags.writeable


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_backend_takes_narrow_scores_for_what_they_are(backend, dtype):
    narrow = clustered(50, 5, seed=9).desirability.astype(dtype)
    arguments = {"capacity": 2, "min_experts": 2, "load_min": 15, "load_max": 25}
    from_narrow = solve(AssignmentProblem(narrow, **arguments), backend)
    from_double = solve(AssignmentProblem(narrow.astype(np.float64), **arguments), backend)
    assert from_narrow.problem.desirability.dtype == dtype
    assert from_narrow.objective == pytest.approx(from_double.objective, rel=1e-12)
    assert from_narrow.status is from_double.status


@pytest.mark.parametrize("scale", [1e-200, 1e-9, 1e9, 1e200])
def test_exact_backend_solves_scores_of_any_magnitude(exact_backend, scale):
    problem = clustered(30, 4, seed=11, fill=False)
    scaled = problem.replace(desirability=problem.desirability * scale)
    answer = solve(scaled, exact_backend)
    assert answer.objective == pytest.approx(linear_program(problem) * scale, rel=1e-9)


def test_backend_takes_bounds_that_stand_for_no_limit(backend):
    endless = 2**53
    problem = AssignmentProblem(np.random.default_rng(12).random((2000, 3)), endless, load_max=endless)
    answer = solve(problem, backend)
    assert answer.pairs is not None
    assert len(answer.pairs.indices) == 6000


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1)])
def test_backend_takes_single_clients_and_experts(backend, shape):
    answer = solve(AssignmentProblem(np.ones(shape), 1, min_experts=1), backend)
    assert answer.objective == shape[0]
    assert answer.experts_of(0) in ([0], [1], [2], [3])


@pytest.mark.parametrize(
    "problem",
    [
        AssignmentProblem(np.ones((3, 2)), 0),
        AssignmentProblem(np.ones((3, 2)), 2, eligible=np.zeros((3, 2))),
        AssignmentProblem(np.ones((3, 2)), 2, load_max=0),
    ],
    ids=["no capacity", "nothing eligible", "no places"],
)
def test_exact_backend_takes_problems_with_nothing_to_give(exact_backend, problem):
    answer = solve(problem, exact_backend)
    assert_proved(answer, 0.0)
    assert answer.assignment.nnz == 0


def test_nothing_eligible_but_something_demanded_is_infeasible(exact_backend):
    problem = AssignmentProblem(np.ones((3, 2)), 2, eligible=np.zeros((3, 2)), load_min=[0, 1])
    assert_refused(solve(problem, exact_backend))


@cache
def large() -> tuple[AssignmentProblem, float]:
    problem = clustered(1500, 32, seed=13)
    answer = solve(problem, "flow-ortools")
    assert answer.verify().optimal
    return problem, answer.objective


@pytest.mark.parametrize("seconds", [1e-3, 0.15])
def test_time_limit_is_never_called_optimal_without_proof(backend, seconds):
    if Capability.TIME_LIMIT not in solver_class(backend).capabilities:
        pytest.skip(f"{backend} takes no time limit")
    problem, optimum = large()
    answer = solve(problem, backend, limits=Limits(time=seconds))
    if seconds < 0.01:
        assert answer.stop_reason is StopReason.TIME_LIMIT
    if answer.status is Status.OPTIMAL:
        assert answer.verify().optimal
    elif answer.pairs is None:
        assert answer.status is Status.UNKNOWN
        assert answer.stop_reason is StopReason.TIME_LIMIT
        assert answer.objective is None
        assert answer.gap is None
    else:
        assert answer.status is Status.FEASIBLE
        assert answer.stop_reason is StopReason.TIME_LIMIT
        assert answer.objective <= optimum + TOLERANCE * optimum
    assert answer.bound is None or answer.bound >= optimum * (1 - TOLERANCE)


def test_entry_tells_the_truth_about_its_class(backend):
    entry = next(entry for entry in solvers() if entry.name == backend)
    cls = solver_class(backend)
    assert issubclass(cls, Solver)
    assert cls.name == backend
    assert (entry.exact, entry.capabilities, entry.summary) == (cls.exact, cls.capabilities, cls.summary)
    assert entry.summary
    assert cls().supports(clustered(10, 3)) is None
    if entry.exact:
        assert Capability.LOAD_BOUNDS in entry.capabilities
        assert (Capability.PRICES in entry.capabilities) == (solve(clustered(10, 3), backend).prices is not None)
