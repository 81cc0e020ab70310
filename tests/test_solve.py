"""solve(): it believes no backend, explains refusals, and says what `auto` chose."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from oracle import brute_force, clustered, tiny_problems

from fedmoe_sched import (
    AssignmentProblem,
    Capability,
    InputError,
    Limits,
    LoadPenalty,
    MissingDependencyError,
    Solver,
    Status,
    StopReason,
    UnsupportedProblemError,
    register_solver,
    solve,
    solvers,
)
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.registry import _BACKENDS, pick, solver_class
from fedmoe_sched.solver import Answer, required_capabilities


class Scripted(Solver[AssignmentProblem]):
    """Answers whatever it was told to."""

    name: ClassVar[str] = "scripted"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = frozenset(Capability)
    summary: ClassVar[str] = "for tests"

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def build(self, problem: AssignmentProblem, limits: Limits, prices: Any) -> AssignmentProblem:
        self.prices = prices
        return problem

    def run(self, model: AssignmentProblem, limits: Limits) -> None:
        pass

    def read(self, model: AssignmentProblem) -> Answer:
        return self.answer


class ScriptedHeuristic(Scripted):
    exact: ClassVar[bool] = False


PROBLEM = AssignmentProblem([[3.0, 1.0], [2.0, 0.5]], 1, min_experts=1, load_max=1)
BEST = Assignment.from_pairs([0, 1], [0, 1], (2, 2))
WORSE = Assignment.from_pairs([0, 1], [1, 0], (2, 2))


def test_optimum_that_a_backend_proves_is_optimal():
    answer = solve(PROBLEM, Scripted(Answer(StopReason.COMPLETED, BEST, np.array([1.5, 0.0]))))
    assert answer.status is Status.OPTIMAL
    assert (answer.objective, answer.bound, answer.gap) == (3.5, 3.5, 0.0)


def test_poor_answer_of_a_completed_exact_backend_is_not_called_optimal():
    answer = solve(PROBLEM, Scripted(Answer(StopReason.COMPLETED, WORSE)))
    assert answer.status is Status.FEASIBLE
    assert (answer.objective, answer.bound) == (3.0, 3.5)


def test_wrong_prices_prove_nothing():
    answer = solve(PROBLEM, Scripted(Answer(StopReason.COMPLETED, BEST, np.array([9.0, 0.0]))))
    assert answer.status is Status.FEASIBLE
    assert answer.bound > answer.objective


def test_bound_of_a_backend_is_not_a_proof():
    answer = solve(PROBLEM, Scripted(Answer(StopReason.TIME_LIMIT, BEST, bound=3.5)))
    assert answer.status is Status.FEASIBLE
    assert answer.gap == 0.0
    assert answer.verify().bound is None


@pytest.mark.parametrize("pairs", [([0, 0, 1], [0, 1, 1]), ([0, 1], [0, 0])], ids=["capacity", "load_max"])
def test_broken_answer_of_an_exact_backend_is_thrown_away(pairs):
    broken = Assignment.from_pairs(*pairs, (2, 2))
    answer = solve(PROBLEM, Scripted(Answer(StopReason.COMPLETED, broken, np.zeros(2))))
    assert answer.status is Status.UNKNOWN
    assert answer.stop_reason is StopReason.FAILED
    assert answer.pairs is None
    assert "breaks constraints" in answer.message


def test_heuristic_may_break_load_bounds_but_not_capacity():
    crowded = Assignment.from_pairs([0, 1], [0, 0], (2, 2))
    answer = solve(PROBLEM, ScriptedHeuristic(Answer(StopReason.COMPLETED, crowded)))
    assert answer.status is Status.VIOLATED
    assert [str(v) for v in answer.violations] == ["2 exceeds load_max[0] = 1"]
    greedy = Assignment.from_pairs([0, 0], [0, 1], (2, 2))
    assert solve(PROBLEM, ScriptedHeuristic(Answer(StopReason.COMPLETED, greedy))).status is Status.UNKNOWN


def test_false_claim_of_infeasibility_is_a_failure():
    answer = solve(PROBLEM, Scripted(Answer(StopReason.PROVED_INFEASIBLE)))
    assert answer.status is Status.UNKNOWN
    assert answer.stop_reason is StopReason.FAILED
    assert answer.conflict is None


def test_infeasibility_is_proved_even_where_the_backend_gave_up():
    impossible = PROBLEM.replace(load_max=[1, 0])
    answer = solve(impossible, Scripted(Answer(StopReason.TIME_LIMIT)))
    assert answer.status is Status.INFEASIBLE
    assert answer.conflict.kind == "clients overflow"


# --- limits, warm starts ----------------------------------------------------------------------------------------


def test_backend_without_time_limit_says_so():
    class Unstoppable(Scripted):
        capabilities: ClassVar[frozenset[Capability]] = frozenset(Capability) - {Capability.TIME_LIMIT}

    words = Answer(StopReason.COMPLETED, BEST, np.array([1.5, 0.0]), message="fine")
    limits = Limits(time=1)
    assert solve(PROBLEM, Unstoppable(words), limits=limits).message == (
        "fine; scripted takes no time limit: it ran to its end"
    )
    assert solve(PROBLEM, Unstoppable(words)).message == "fine"
    assert solve(PROBLEM, Scripted(words), limits=limits).message == "fine"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"time": 0}, "time = 0: must be a finite number of seconds > 0"),
        ({"time": float("nan")}, "time = nan"),
        ({"time": float("inf")}, "time = inf"),
        ({"seed": -1}, "seed = -1: must be >= 0"),
        ({"seed": 2**31}, "seed = 2147483648"),
        ({"threads": 0}, "threads = 0: must be >= 1"),
    ],
)
def test_limits_out_of_range_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        Limits(**arguments)


def test_warm_start_hands_prices_to_the_backend():
    backend = Scripted(Answer(StopReason.COMPLETED, BEST, np.array([1.5, 0.0])))
    first = solve(PROBLEM, backend)
    assert backend.prices is None
    solve(PROBLEM, backend, warm_start=first)
    np.testing.assert_array_equal(backend.prices, [1.5, 0.0])
    solve(PROBLEM, backend, warm_start=[2, 0])
    np.testing.assert_array_equal(backend.prices, [2.0, 0.0])


def test_warm_start_of_another_size_is_refused():
    with pytest.raises(InputError, match=r"warm_start: has shape \(3,\), must be \(2,\)"):
        solve(PROBLEM, warm_start=[1, 2, 3])
    with pytest.raises(InputError, match="warm_start: a schedule of 3 experts, must be of 2"):
        solve(PROBLEM, warm_start=solve(clustered(9, 3), "flow-ortools"))


# --- registry and auto ------------------------------------------------------------------------------------------


@given(problem=tiny_problems())
def test_auto_solves_every_problem_to_the_proved_optimum(problem):
    answer = solve(problem)
    optimum = brute_force(problem)
    assert answer.solver_reason
    if optimum is None:
        assert answer.status is Status.INFEASIBLE
    else:
        assert answer.status is Status.OPTIMAL
        assert answer.objective == pytest.approx(optimum, abs=1e-9)


def test_auto_says_what_it_chose_and_why():
    answer = solve(clustered(20, 4))
    assert answer.solver == "flow-ortools"
    assert answer.solver_reason == "20 x 4 with load bounds: fastest exact backend"
    assert "[auto: 20 x 4 with load bounds" in repr(answer)
    assert solve(clustered(20, 4), "flow-ortools").solver_reason == ""


def test_auto_leaves_problems_without_load_bounds_to_the_clients():
    answer = solve(clustered(20, 4).replace(load_min=0, load_max=20))
    assert (answer.solver, answer.status) == ("greedy", Status.OPTIMAL)
    assert "each client's own best choice is optimal" in answer.solver_reason


def test_auto_optimises_where_loads_cost_something():
    free = clustered(20, 4).replace(load_min=0, load_max=20)
    penalty = LoadPenalty.quadratic(0.1, n_experts=4)
    answer = solve(free.replace(load_penalty=penalty))
    assert (answer.solver, answer.status) == ("flow-ortools", Status.OPTIMAL)
    assert answer.solver_reason == "20 x 4 with load penalty: fastest exact backend"
    bounded = solve(clustered(20, 4).replace(load_penalty=penalty))
    assert bounded.solver_reason == "20 x 4 with load bounds and load penalty: fastest exact backend"


def test_required_capabilities_name_what_a_problem_has():
    free = clustered(20, 4, fill=False).replace(load_min=0, load_max=20)
    assert required_capabilities(free) == set()
    assert required_capabilities(free.replace(load_penalty=LoadPenalty.quadratic(0.0, n_experts=4))) == {
        Capability.LOAD_PENALTY
    }


def test_auto_compiles_kernels_for_large_problems_only():
    assert pick(clustered(200, 16))[0] == "flow-ortools"
    assert pick(clustered(20_000, 16))[0] == "exact"


@pytest.mark.parametrize(("n", "m", "name"), [(8_192, 1_024, "exact"), (8_191, 1_024, "flow-ortools")])
def test_auto_builds_a_flow_for_many_experts_and_few_clients(n, m, name):
    problem = AssignmentProblem(np.broadcast_to(np.float32(1), (n, m)), 1, load_max=n // m + 1)
    assert pick(problem) == (name, f"{n} x {m} with load bounds: fastest exact backend")
    assert pick(AssignmentProblem(np.ones((400, 400)), 1, load_max=1))[0] == "flow-ortools"


def test_auto_falls_back_where_an_engine_is_missing(monkeypatch):
    problem = clustered(20, 4)
    flow = solver_class("flow-ortools")
    monkeypatch.setattr(flow, "requires", ("no_such_engine",))
    answer = solve(problem)
    assert answer.solver == "lp-scipy"
    assert answer.status is Status.OPTIMAL
    assert "flow-ortools needs no_such_engine: pip install no_such_engine" in answer.solver_reason
    monkeypatch.setattr(solver_class("lp-scipy"), "missing", classmethod(lambda cls: "no SciPy here"))
    assert solve(problem).solver == "flow-networkx"


def test_auto_without_any_engine_says_what_is_missing():
    with pytest.raises(UnsupportedProblemError, match="no backend takes this problem"):
        pick(clustered(20, 4), [])


def test_missing_engine_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(solver_class("ilp-ortools"), "requires", ("no_such_engine",))
    with pytest.raises(
        MissingDependencyError, match="ilp-ortools needs no_such_engine: pip install no_such_engine"
    ):
        solve(PROBLEM, "ilp-ortools")
    entry = next(entry for entry in solvers() if entry.name == "ilp-ortools")
    assert entry.available == "ilp-ortools needs no_such_engine: pip install no_such_engine"


@pytest.mark.parametrize("name", ["simplex", "", None, 3])
def test_unknown_solver_lists_the_known_ones(name):
    with pytest.raises(InputError, match=r"solver = .*: must be 'auto', a Solver, or one of random, greedy, "):
        solve(PROBLEM, name)


def test_backend_that_lacks_a_capability_refuses_with_the_reason():
    class Simple(Scripted):
        capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.ELIGIBILITY})

    with pytest.raises(UnsupportedProblemError, match="scripted does not take load bounds, min experts"):
        solve(PROBLEM, Simple(Answer(StopReason.COMPLETED)))


def test_own_backend_can_be_registered(monkeypatch):
    monkeypatch.setattr("fedmoe_sched.registry._BACKENDS", dict(_BACKENDS))
    register_solver("mine", "fedmoe_sched.solvers.greedy:Greedy")
    assert [entry.name for entry in solvers()][-1] == "mine"
    assert solve(PROBLEM, "mine").status is Status.VIOLATED
    with pytest.raises(InputError, match=r"path = 'nonsense': must read 'module:Class'"):
        register_solver("bad", "nonsense")


def test_registry_lists_every_backend_once():
    names = [entry.name for entry in solvers()]
    assert names == list(_BACKENDS)
    assert {"random", "greedy", "greedy-global", "flow-networkx", "flow-ortools"} <= set(names)
    assert {"lp-scipy", "ilp-ortools", "mip-ortools", "ilp-pulp"} <= set(names)


def test_options_belong_to_the_instance():
    class Tuned(Scripted):
        def __init__(self, depth: int) -> None:
            self.depth = depth
            self._hidden = 1

    assert repr(Tuned(3)) == "Tuned(depth=3)"
