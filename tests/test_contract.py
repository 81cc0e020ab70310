"""What every backend in the registry must do; the tests are made from the registry (``--solvers`` chooses).

Load penalties, layers, budgets, and what heuristics promise, have files of their own: ``test_contract_*.py``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from contract_tools import assert_finds, assert_proved, assert_refused, examples, share, takes
from oracle import TOLERANCE, brute_force, clustered, contended, linear_program

from fedmoe_sched import AssignmentProblem, Capability, Limits, Solver, Status, StopReason, solve, solvers
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


@pytest.mark.hypothesis
def test_exact_backend_agrees_with_brute_force(exact_backend):
    for problem in share(exact_backend, examples()):
        assert_finds(exact_backend, problem, brute_force(problem))


def test_exact_backend_agrees_with_brute_force_where_load_bounds_bite(exact_backend):
    """Drawn problems are good at corners; half of these problems cannot give every client its own best choice."""
    for seed in share(exact_backend, range(150)):
        problem = contended(seed)
        assert_finds(exact_backend, problem, brute_force(problem))


@pytest.mark.parametrize("name", MID_SIZE)
def test_exact_backend_agrees_with_linear_program(exact_backend, name):
    problem = MID_SIZE[name]()
    assert_finds(exact_backend, problem, linear_program(problem))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("decimals", [None, 1, 2])
def test_exact_backend_agrees_with_linear_program_at_scale(exact_backend, seed, decimals):
    problem = clustered(1000, 16, seed=10 + seed, decimals=decimals)
    assert_proved(solve(problem, exact_backend), linear_program(problem))


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
    unheeded = not takes(backend, Capability.TIME_LIMIT)
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
    if not takes(backend, Capability.TIME_LIMIT):
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
