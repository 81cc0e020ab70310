"""What is special to single backends: rounding, interrupted runs, the order of greedy choices."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from oracle import brute_force, clustered, linear_program, tiny_problems

from fedmoe_sched import (
    AssignmentProblem,
    Limits,
    LoadPenalty,
    ResourceBudget,
    Schedule,
    Status,
    StopReason,
    solve,
)
from fedmoe_sched.registry import solver_class
from fedmoe_sched.solvers._load_steps import load_steps
from fedmoe_sched.solvers._matrix import clipped_bounds, eligible_pairs, largest_cost
from fedmoe_sched.solvers._rounding import fine_costs, unrounded_bound, whole_scores, whole_steps
from fedmoe_sched.solvers.greedy_global import GreedyGlobal
from fedmoe_sched.solvers.ilp_ortools import CpSat
from fedmoe_sched.solvers.ilp_pulp import PulpCbc
from fedmoe_sched.solvers.lp_scipy import SciPyLP
from fedmoe_sched.solvers.mip_ortools import OrToolsMIP


def needs(*backends: str) -> None:
    for name in backends:
        missing = solver_class(name).missing()
        if missing is not None:
            pytest.skip(missing)


# --- rounding ---------------------------------------------------------------------------------------------------


@given(problem=tiny_problems())
def test_bound_from_rounded_scores_is_never_below_the_true_optimum(problem):
    optimum = brute_force(problem)
    if optimum is None:
        return
    scores, unit = whole_scores(problem)
    rounded = brute_force(problem.replace(desirability=scores.astype(np.float64)))
    bound = unrounded_bound(problem, rounded, unit)
    assert bound >= optimum
    assert bound <= optimum + 1e-6


@pytest.mark.parametrize("name", ["flow-networkx", "flow-ortools", "ilp-ortools"])
def test_differences_that_rounding_hides_are_found_again(name):
    """All scores round to the same whole number; exact ones differ in the eleventh digit."""
    needs(name)
    rng = np.random.default_rng(0)
    scores = 1 + 1e-11 * rng.integers(0, 9, (4, 4))
    problem = AssignmentProblem(scores, 1, min_experts=1, load_max=1)
    whole, _ = whole_scores(problem)
    assert len(np.unique(whole)) == 1
    steps = np.rint((scores - 1) * 1e11)
    found = solve(problem, name).assignment.toarray()
    assert steps[found].sum() == brute_force(problem.replace(desirability=steps))


@pytest.mark.parametrize("name", ["flow-networkx", "flow-ortools"])
def test_differences_of_penalties_that_rounding_hides_are_found_again(name):
    """All experts seem to cost the same; exact marginal costs differ in the eleventh digit."""
    needs(name)
    steps = np.sort(np.random.default_rng(1).integers(0, 30, (3, 5)), axis=1)
    problem = AssignmentProblem(
        np.ones((5, 3)), 1, min_experts=1, load_penalty=LoadPenalty.from_marginals(0.5 + 1e-11 * steps)
    )
    assert len(np.unique(whole_steps(problem, clipped_bounds(problem)).costs)) == 1
    cheapest = np.sort(steps, axis=None)[:5].sum()
    loads = solve(problem, name).loads
    assert sum(steps[j, :load].sum() for j, load in enumerate(loads)) == cheapest


def test_steps_of_the_loads_are_those_between_the_bounds():
    table = [[0.0, 0.5, 0.5, 0.5, 2.0], [-1.0, 0.0, 1.0, 1.0, 1.0]]
    problem = AssignmentProblem(
        np.full((6, 2), 4.0),
        1,
        load_min=[1, 0],
        load_max=[5, 99],
        load_penalty=LoadPenalty.from_marginals(table),
    )
    steps = whole_steps(problem, clipped_bounds(problem))
    assert steps.experts.tolist() == [0, 0, 1, 1, 1]
    assert steps.sizes.tolist() == [3, 1, 1, 1, 4]
    np.testing.assert_allclose(steps.costs, [1.25e8, 5e8, -2.5e8, 0, 2.5e8])
    free = load_steps(problem.replace(load_penalty=None), clipped_bounds(problem))
    assert (free.sizes.tolist(), free.costs.tolist()) == ([4, 6], [0.0, 0.0])


@pytest.mark.parametrize(
    ("score", "weight", "expected"),
    [
        (2.0, 0.0, 2.0),
        (2.0, 1.0, 2.0),
        (-2.0, 1e6, 3.5e3),
        (0.0, 1.0, 3.5),
        (0.0, 0.0, 0.0),
        (1e-200, 1e300, 3.5e297),
    ],
)
def test_penalties_leave_the_scores_their_digits_until_they_are_a_thousand_times_larger(score, weight, expected):
    """Of the four clients of an expert the last one costs 3.5 times the weight."""
    penalty = LoadPenalty.quadratic(weight, n_experts=2)
    problem = AssignmentProblem(np.full((4, 2), score), 1, load_penalty=penalty)
    assert largest_cost(problem) == pytest.approx(expected)
    assert np.abs(whole_scores(problem)[0]).max() <= 1e9
    assert np.abs(whole_steps(problem, clipped_bounds(problem)).costs).max() <= 1e12


def test_scores_of_zero_and_of_any_magnitude_are_rounded_without_overflow():
    for scores in ([[0.0]], [[5e-324]], [[1e308, -1e308]], [[np.float32(1e38)]]):
        whole, unit = whole_scores(AssignmentProblem(scores, 1))
        assert np.abs(whole).max() <= 1e9
        np.testing.assert_allclose(whole * unit, scores, atol=1e-300)


# --- interrupted runs -------------------------------------------------------------------------------------------


class FirstOfCpSat(CpSat):
    """Stops at the first assignment, as a time limit would."""

    def build(self, problem: AssignmentProblem, limits: Limits, prices: Any) -> Any:
        model = super().build(problem, limits, prices)
        model.engine.parameters.stop_after_first_solution = True
        return model


class FirstOfScip(OrToolsMIP):
    """Stops at the first assignment, as a time limit would."""

    def build(self, problem: AssignmentProblem, limits: Limits, prices: Any) -> Any:
        model = super().build(problem, limits, prices)
        model.parameters = dataclasses.replace(model.parameters, solution_limit=1)
        return model


class IncumbentOfCbc(PulpCbc):
    """Finds the solution file and the log that CBC leaves when its time is up, with a poor assignment in it."""

    words = "Stopped on time - objective value 1.0"
    bound: str | None = "Upper bound:                    1.250"

    def run(self, model: Any, limits: Limits) -> None:
        model.limited, model.return_code = True, 0
        order = {name: k for k, name in enumerate(model.mps_names)}
        poor = solve(model.problem.replace(desirability=-model.problem.desirability)).assignment.toarray()
        lines = [self.words]
        for name, mps_name in model.mps_names.items():
            k = int(name.removeprefix("x"))
            taken = poor[model.pairs.clients[k], model.pairs.experts[k]]
            lines.append(f"{order[name]:7d} {mps_name} {float(taken):15.8g} {0:15.8g}")
        (model.folder / "round.sol").write_text("\n".join(lines) + "\n")
        log = "Continuous objective value is 1.25 - 0.12 seconds\n" + (f"{self.bound}\n" if self.bound else "")
        (model.folder / "cbc.log").write_text(log)


def assert_unproved_incumbent(answer: Schedule, optimum: float) -> None:
    assert answer.status is Status.FEASIBLE
    assert answer.stop_reason is StopReason.TIME_LIMIT
    assert answer.verify().feasible
    assert answer.objective < optimum
    assert answer.prices is None


@pytest.mark.parametrize("cls", [FirstOfCpSat, FirstOfScip])
def test_incumbent_of_an_interrupted_run_is_feasible_with_a_true_bound(cls):
    needs(cls.name)
    problem = clustered(200, 8, seed=1)
    answer = solve(problem, cls())
    optimum = linear_program(problem)
    assert_unproved_incumbent(answer, optimum)
    assert answer.bound >= optimum - 1e-9 * optimum
    assert answer.gap > 0


@pytest.mark.parametrize("cls", [FirstOfCpSat, FirstOfScip])
@pytest.mark.parametrize("budgets", [(), [ResourceBudget("memory", np.ones(8), np.full(200, 9.0))]])
def test_bound_of_an_interrupted_run_is_true_with_a_load_penalty(cls, budgets):
    """The budgets reach for everything; with them costs are rounded more finely."""
    needs(cls.name)
    problem = clustered(200, 8, seed=1).replace(load_penalty=LoadPenalty.quadratic(0.02, np.arange(8) * 3.0))
    optimum = linear_program(problem)
    answer = solve(problem.replace(budgets=budgets), cls())
    assert answer.objective <= optimum + 1e-9 * abs(
        optimum
    )  # CP-SAT's first assignment may be that of its relaxation
    assert answer.bound >= optimum - 1e-9 * abs(optimum)


def test_fine_costs_leave_room_for_the_sum_of_all_steps():
    steep = LoadPenalty.quadratic([1.0, 2.0, 3.0, 4.0])
    problem = AssignmentProblem(np.random.default_rng(0).random((5000, 4)), 1, load_penalty=steep)
    pairs, bounds = eligible_pairs(problem), clipped_bounds(problem)
    scores, steps, unit = fine_costs(problem, pairs, bounds)
    assert 2.0**59 < float(np.abs(scores).sum() + (steps.sizes * np.abs(steps.costs)).sum()) < 2.0**60.1
    np.testing.assert_allclose(scores * unit, problem.desirability.ravel(), atol=0.5 * unit)
    first = steps.costs[np.searchsorted(steps.experts, np.arange(4))]
    np.testing.assert_allclose(first * unit, [0.5, 1.0, 1.5, 2.0], atol=unit)


def test_incumbent_of_cbc_is_feasible_whatever_pulp_calls_it():
    needs("ilp-pulp")
    problem = clustered(30, 4, seed=2)
    answer = solve(problem, IncumbentOfCbc())
    assert_unproved_incumbent(answer, linear_program(problem))
    assert answer.bound == pytest.approx(1.2505 * np.abs(problem.desirability).max())


def test_cbc_without_a_bound_in_its_log_has_none():
    needs("ilp-pulp")
    engine = IncumbentOfCbc()
    engine.bound = None
    answer = solve(clustered(30, 4, seed=2), engine)
    assert answer.status is Status.FEASIBLE
    assert answer.bound is None
    assert answer.gap is None


@pytest.mark.parametrize(
    "words",
    [
        "Stopped on time (no integer solution - continuous used) - objective value 1.0",
        "Integer infeasible - objective value 1.0",
    ],
)
def test_cbc_without_an_incumbent_has_no_assignment_and_proves_nothing(words):
    """CBC calls a feasible problem "Integer infeasible" when its time runs out in the preprocessing."""
    needs("ilp-pulp")
    engine = IncumbentOfCbc()
    engine.words = words
    answer = solve(clustered(30, 4, seed=2), engine)
    assert answer.pairs is None
    assert answer.status is Status.UNKNOWN
    assert answer.stop_reason is StopReason.TIME_LIMIT
    assert words.partition(" - objective")[0] in answer.message


def test_cbc_that_cannot_run_has_failed(monkeypatch):
    needs("ilp-pulp")

    def broken(*args: Any, **options: Any) -> Any:
        return dataclasses.make_dataclass("Ended", [("returncode", int)])(3)

    monkeypatch.setattr("fedmoe_sched.solvers.ilp_pulp.subprocess.run", broken)
    answer = solve(clustered(10, 3), "ilp-pulp")
    assert answer.status is Status.UNKNOWN
    assert answer.stop_reason is StopReason.FAILED
    assert answer.message == "CBC ended with code 3"


def test_cbc_that_overruns_its_time_is_stopped(monkeypatch):
    """The engine is replaced by a program that sleeps: only the limit can end it."""
    needs("ilp-pulp")
    monkeypatch.setattr("fedmoe_sched.solvers.ilp_pulp._GRACE", 0.05)
    original = PulpCbc.run

    def sleeping(self: PulpCbc, model: Any, limits: Limits) -> None:
        run = subprocess.run
        command = [sys.executable, "-c", "import time; time.sleep(20)"]
        with monkeypatch.context() as patch:
            patch.setattr(
                "fedmoe_sched.solvers.ilp_pulp.subprocess.run", lambda _, **options: run(command, **options)
            )
            original(self, model, limits)

    monkeypatch.setattr(PulpCbc, "run", sleeping)
    answer = solve(clustered(10, 3), "ilp-pulp", limits=Limits(time=0.1))
    assert answer.status is Status.UNKNOWN
    assert answer.stop_reason is StopReason.TIME_LIMIT


def test_cbc_leaves_no_files_behind(tmp_path):
    """In a process of its own, because importing PuLP for the first time is part of it."""
    needs("ilp-pulp")
    code = (
        f"import pathlib, sys; sys.path[:0] = {sys.path!r}\n"
        "from fedmoe_sched import AssignmentProblem, solve\n"
        "print(solve(AssignmentProblem([[1.0, 2.0], [3.0, 5.0]], 1, load_max=1), 'ilp-pulp').status)\n"
        f"print([p.name for p in pathlib.Path({str(tmp_path)!r}).iterdir()])\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert run.stdout.split() == ["optimal", "[]"]


def test_linear_program_with_loose_duals_falls_back_on_the_exchange_graph(monkeypatch):
    problem = clustered(40, 4, seed=3)
    monkeypatch.setattr("fedmoe_sched.solvers.lp_scipy._prices", lambda model: np.full(4, 0.123))
    answer = solve(problem, SciPyLP())
    assert answer.status is Status.OPTIMAL
    assert not np.allclose(answer.prices, 0.123)


def test_duals_of_the_linear_program_are_the_prices(monkeypatch):
    """Without the exchange graph to fall back on, the duals alone must prove the optimum."""
    monkeypatch.setattr("fedmoe_sched.solvers.lp_scipy.polished_answer", None)
    priced = 0
    for seed in range(10):
        problem = clustered(60, 6, seed=seed, decimals=1 if seed % 2 else None, fill=seed % 3 > 0)
        answer = solve(problem, SciPyLP())
        assert answer.status is Status.OPTIMAL
        priced += int((answer.prices != 0).any())
    assert priced >= 5


def test_duals_of_lower_load_bounds_are_negative_prices(monkeypatch):
    """Four clients would all take expert 0; the two that lose least must take expert 1, which costs 0.5."""
    monkeypatch.setattr("fedmoe_sched.solvers.lp_scipy.polished_answer", None)
    problem = AssignmentProblem([[1.0, 0.8], [1.0, 0.5], [1.0, 0.1], [1.0, 0.0]], 1, load_min=[0, 2])
    answer = solve(problem, SciPyLP())
    assert answer.status is Status.OPTIMAL
    assert answer.prices[0] == 0
    assert -0.9 <= answer.prices[1] <= -0.5


def test_duals_with_a_load_penalty_are_prices_without_polishing(monkeypatch):
    """Three clients gain 3, 2 and 1 by expert 0, whose clients cost 1, 2, 3: two go there, at a price of 2."""
    monkeypatch.setattr("fedmoe_sched.solvers.lp_scipy.polished_answer", None)
    penalty = LoadPenalty.from_marginals([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    problem = AssignmentProblem([[3.5, 0.0], [2.5, 0.0], [1.5, 0.0]], 1, min_experts=1, load_penalty=penalty)
    answer = solve(problem, SciPyLP())
    assert answer.status is Status.OPTIMAL
    assert answer.loads.tolist() == [2, 1]
    assert answer.objective == 3.0
    assert 2 <= answer.prices[0] <= 2.5
    assert answer.prices[1] == 0


def test_lp_does_not_look_for_dependent_bounds():
    """One to one, 400 by 400, a third of the pairs: with presolve, and no time limit, HiGHS takes minutes."""
    rng = np.random.default_rng(0)
    problem = AssignmentProblem(
        rng.integers(1, 100, (400, 400)),
        1,
        min_experts=1,
        load_min=1,
        load_max=1,
        eligible=rng.random((400, 400)) < 0.3,
    )
    assert solve(problem, "lp-scipy").objective == solve(problem, "flow-ortools").objective


@pytest.mark.parametrize("bound", [{"load_min": [0, 1]}, {"min_experts": 1}, {}])
def test_lp_without_pairs_knows_penalties_and_demands(bound):
    reward = LoadPenalty.from_marginals([[-1.0], [2.0]])
    problem = AssignmentProblem(np.ones((2, 2)), 1, eligible=np.zeros((2, 2)), load_penalty=reward, **bound)
    answer = solve(problem, "lp-scipy")
    assert answer.status is (Status.INFEASIBLE if bound else Status.OPTIMAL)


# --- greedy -----------------------------------------------------------------------------------------------------


def test_greedy_takes_each_clients_best():
    scores = [[0.9, 0.8, 0.1], [0.9, 0.2, 0.3], [-1.0, -2.0, -3.0], [0.0, 0.5, 0.5]]
    problem = AssignmentProblem(scores, [2, 1, 2, 1], min_experts=[0, 0, 1, 0], load_max=1)
    answer = solve(problem, "greedy")
    assert answer.experts_by_client() == {0: [0, 1], 1: [0], 2: [0], 3: [1]}
    assert answer.status is Status.VIOLATED
    assert [str(v) for v in answer.violations] == ["3 exceeds load_max[0] = 1", "2 exceeds load_max[1] = 1"]


@given(problem=tiny_problems())
def test_greedy_takes_the_first_of_equally_desirable_experts(problem):
    """One expert after another, by desirability, then by number; only positive ones beyond the fewest."""
    answer = solve(problem, "greedy")
    if answer.pairs is None:
        return
    for i in range(problem.n_clients):
        scores = problem.desirability[i].tolist()
        can = [j for j in range(problem.n_experts) if problem.eligible is None or problem.eligible[i, j]]
        ranked = sorted(can, key=lambda j: (-scores[j], j))[: int(problem.capacity[i])]
        least = int(problem.min_experts[i])
        assert answer.experts_of(i) == sorted(j for k, j in enumerate(ranked) if k < least or scores[j] > 0)


@given(problem=tiny_problems(bounded=False))
def test_greedy_is_proved_optimal_without_load_bounds(problem):
    answer = solve(problem, "greedy")
    optimum = brute_force(problem)
    if optimum is None:
        assert answer.status is Status.INFEASIBLE
    else:
        assert answer.status is Status.OPTIMAL
        assert answer.objective == pytest.approx(optimum, abs=1e-9)


def test_greedy_global_goes_by_desirability_and_respects_load_max():
    scores = [[0.9, 0.8], [0.95, 0.1], [0.7, 0.6]]
    answer = solve(AssignmentProblem(scores, 1, load_max=[1, 2]), "greedy-global")
    assert answer.experts_by_client() == {0: [1], 1: [0], 2: [1]}
    assert answer.status is Status.FEASIBLE


def test_greedy_global_sets_slots_aside_for_experts_below_load_min():
    """All three clients prefer expert 0, but expert 1 needs two of them: only the best one may have expert 0."""
    problem = AssignmentProblem([[0.9, 0.1], [0.8, 0.2], [0.7, 0.1]], 1, load_min=[0, 2])
    answer = solve(problem, "greedy-global")
    assert answer.experts_by_client() == {0: [0], 1: [1], 2: [1]}


def test_greedy_global_sets_places_aside_for_clients_below_min_experts():
    """Client 0 likes both experts best, but there are two places, and the others must have one each."""
    problem = AssignmentProblem([[9.0, 8.0], [1.0, 1.0], [1.0, 1.0]], 2, min_experts=[0, 1, 1], load_max=1)
    answer = solve(problem, "greedy-global")
    assert answer.experts_by_client() == {0: [], 1: [0], 2: [1]}


def test_greedy_claims_nothing_where_loads_cost_something():
    problem = AssignmentProblem([[3.0, 2.0]] * 4, 1, load_penalty=LoadPenalty.quadratic(1.0, n_experts=2))
    answer = solve(problem, "greedy")
    assert (answer.status, answer.objective, answer.bound) == (Status.FEASIBLE, 4.0, None)
    judged = solve(problem, "greedy", certify=True)
    assert (judged.status, judged.bound) == (Status.FEASIBLE, 6.0)


@given(problem=tiny_problems())
def test_greedy_global_never_breaks_load_max_and_takes_nothing_needless(problem):
    answer = solve(problem, "greedy-global")
    if answer.pairs is None:
        return
    mask = answer.assignment.toarray()
    loads, counts = mask.sum(axis=0), mask.sum(axis=1)
    assert (loads <= problem.load_max).all()
    for i, j in np.argwhere(mask):
        needless = counts[i] > problem.min_experts[i] and loads[j] > problem.load_min[j]
        # A pair taken for a lower bound may turn out needless later, but only if both ends got more, worse pairs.
        if problem.desirability[i, j] <= 0 and needless:
            worse_here = problem.desirability[i][mask[i]].min() <= problem.desirability[i, j]
            worse_there = problem.desirability[mask[:, j], j].min() <= problem.desirability[i, j]
            assert worse_here or worse_there


def test_greedy_global_takes_no_pair_that_is_worth_nothing_unless_forced():
    problem = AssignmentProblem([[0.0, -1.0, 2.0], [-0.5, 0.0, -3.0]], 3)
    assert solve(problem, "greedy-global").experts_by_client() == {0: [2], 1: []}
    forced = problem.replace(min_experts=[2, 1], load_min=[0, 1, 0])
    assert solve(forced, "greedy-global").experts_by_client() == {0: [0, 2], 1: [1]}


def test_greedy_global_is_the_same_in_small_chunks(monkeypatch):
    problem = clustered(60, 5, seed=4, decimals=1, fill=False)
    problem = problem.replace(desirability=problem.desirability - 0.2)
    whole = solve(problem, GreedyGlobal()).assignment.toarray()
    monkeypatch.setattr("fedmoe_sched.solvers.greedy_global._CHUNK", 7)
    np.testing.assert_array_equal(solve(problem, GreedyGlobal()).assignment.toarray(), whole)
