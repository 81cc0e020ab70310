"""schedule(): inputs of all kinds, labels, balance, and the table of bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_sched import (
    AssignmentProblem,
    InfeasibleError,
    InputError,
    MissingDependencyError,
    NoAssignmentError,
    Schedule,
    Status,
    StopReason,
    schedule,
)
from fedmoe_sched.registry import solver_class
from fedmoe_sched.schedule import balanced_load_bounds, desirability, usage_share

pd = pytest.importorskip("pandas")

FITNESS = [[0.9, 0.1, 0.3], [0.8, 0.3, 0.2], [0.7, 0.6, 0.1], [0.6, 0.1, 0.5], [0.9, 0.2, 0.4], [0.5, 0.4, 0.3]]
USAGE = [4.0, 1.0, 1.0]
CAPACITY = [1, 1, 2, 1, 1, 2]
CLIENTS = ["ann", "bob", "cid", "dee", "eve", "fay"]
EXPERTS = ["cats", "dogs", "cars"]


@pytest.fixture
def plain() -> Schedule:
    return schedule(FITNESS, USAGE, CAPACITY)


def test_three_arguments_fill_and_balance(plain):
    """Eight slots over three experts: 2.67 each, a quarter either way is 2.0 to 3.33, rounded outwards 2 to 4."""
    assert plain.status is Status.OPTIMAL
    assert plain.assignment.shape == (6, 3)
    assert plain.assignment.dtype == np.bool_
    assert plain.assignment.sum(axis=1).tolist() == CAPACITY
    assert plain.loads.sum() == 8
    assert (plain.problem.load_min.tolist(), plain.problem.load_max.tolist()) == ([2] * 3, [4] * 3)
    assert plain.relaxed == ()
    assert plain.gap == pytest.approx(0, abs=1e-9)


# --- inputs of all kinds ----------------------------------------------------------------------------------------


def as_torch(value: list) -> object:
    torch = pytest.importorskip("torch")
    return torch.tensor(value)


@pytest.mark.parametrize(
    "convert",
    [
        np.array,
        lambda value: np.array(value, dtype=np.float64),
        np.asfortranarray,
        lambda value: tuple(tuple(row) if isinstance(row, list) else row for row in value),
        pytest.param(as_torch, marks=pytest.mark.train),
    ],
    ids=["arrays", "floats", "Fortran order", "tuples", "torch"],
)
def test_every_array_like_gives_the_same_schedule(plain, convert):
    answer = schedule(convert(FITNESS), convert(USAGE), convert(CAPACITY))
    np.testing.assert_array_equal(answer.assignment.toarray(), plain.assignment.toarray())
    assert answer.objective == pytest.approx(plain.objective, rel=1e-6)


def test_float32_stays_float32_without_a_copy_of_the_input(plain):
    single = np.array(FITNESS, dtype=np.float32)
    before = single.copy()
    answer = schedule(single, USAGE, CAPACITY)
    assert answer.problem.desirability.dtype == np.float32
    np.testing.assert_array_equal(answer.assignment.toarray(), plain.assignment.toarray())
    np.testing.assert_array_equal(single, before)


def test_problem_keeps_a_float_matrix_as_it_is():
    scores = np.random.default_rng(0).random((5, 2), dtype=np.float32)
    problem = AssignmentProblem(scores, 1)
    assert np.shares_memory(problem.desirability, scores)
    assert not problem.desirability.flags.writeable
    assert scores.flags.writeable


def test_one_capacity_stands_for_all():
    assert schedule(FITNESS, USAGE, 2).assignment.sum(axis=1).tolist() == [2] * 6


def test_more_capacity_than_experts_is_cut_to_what_there_is():
    assert schedule(FITNESS, USAGE, 99).loads.tolist() == [6, 6, 6]


# --- labels -----------------------------------------------------------------------------------------------------


def frame() -> pd.DataFrame:
    return pd.DataFrame(FITNESS, index=CLIENTS, columns=EXPERTS)


def test_labels_are_kept_and_usable_in_the_answer(plain):
    answer = schedule(frame(), pd.Series(USAGE, EXPERTS), pd.Series(CAPACITY, CLIENTS))
    np.testing.assert_array_equal(answer.assignment.toarray(), plain.assignment.toarray())
    for i, client in enumerate(CLIENTS):
        assert answer.experts_of(client) == [EXPERTS[j] for j in plain.experts_of(i)]
    for j, expert in enumerate(EXPERTS):
        assert answer.clients_of(expert) == [CLIENTS[i] for i in plain.clients_of(j)]
    assert answer.experts_by_client() == {client: answer.experts_of(client) for client in CLIENTS}


@pytest.mark.parametrize("seed", range(3))
def test_series_and_frames_are_aligned_by_label(seed):
    """Vectors and masks come in another order than fitness; the answer is that of the right order."""
    rng = np.random.default_rng(seed)
    eligible = pd.DataFrame(rng.random((6, 3)) < 0.8, index=CLIENTS, columns=EXPERTS) | (frame() > 0.5)
    usage, capacity = pd.Series(USAGE, EXPERTS), pd.Series(CAPACITY, CLIENTS)
    straight = schedule(frame(), USAGE, CAPACITY, eligible=eligible.to_numpy())
    clients, experts = rng.permutation(CLIENTS), rng.permutation(EXPERTS)
    aligned = schedule(frame(), usage[experts], capacity[clients], eligible=eligible.loc[clients, experts])
    assert aligned.experts_by_client() == straight.experts_by_client()
    shuffled = schedule(frame().loc[clients, experts], usage, capacity, eligible=eligible)
    assert list(shuffled.experts_by_client()) == list(clients)
    assert shuffled.objective == pytest.approx(aligned.objective, rel=1e-12)


def test_load_bounds_are_aligned_by_label_too():
    high = pd.Series([1, 8, 8], ["dogs", "cars", "cats"])
    assert schedule(frame(), USAGE, CAPACITY, load_max=high).problem.load_max.tolist() == [8, 1, 8]
    low = pd.Series([3, 0, 0], ["cars", "cats", "dogs"])
    assert schedule(frame(), USAGE, CAPACITY, load_min=low).problem.load_min.tolist() == [0, 0, 3]
    with pytest.raises(InputError, match="load_max: has no entry labelled 'cats', which fitness has"):
        schedule(frame(), USAGE, CAPACITY, load_max=pd.Series([1, 1], ["dogs", "cars"]))


def test_labels_may_be_any_hashable():
    table = pd.DataFrame(FITNESS, index=[("site", i) for i in range(6)], columns=[10, 20, 30])
    answer = schedule(table, USAGE, CAPACITY)
    assert set(answer.experts_of(("site", 0))) <= {10, 20, 30}
    assert sum(len(answer.clients_of(expert)) for expert in (10, 20, 30)) == 8


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda s: s.experts_of("zoe"), "client = 'zoe': there is no client of that name"),
        (lambda s: s.clients_of(0), "expert = 0: there is no expert of that name"),
        (lambda s: s.experts_of(["ann"]), r"client = \['ann'\]: there is no client"),
    ],
)
def test_unknown_labels_are_named(ask, words):
    with pytest.raises(InputError, match=words):
        ask(schedule(frame(), USAGE, CAPACITY))


@pytest.mark.parametrize("client", [6, -1, "ann", 1.0])
def test_without_labels_only_numbers_will_do(plain, client):
    with pytest.raises(InputError, match="must be a number from 0 to 5"):
        plain.experts_of(client)


def test_numpy_integers_are_numbers(plain):
    assert plain.experts_of(np.int64(2)) == plain.experts_of(2)


# --- scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_scores_that_need_no_arithmetic_are_not_copied(dtype):
    fitness = np.array(FITNESS, dtype=dtype)
    answer = schedule(fitness, USAGE, CAPACITY, usage_weight=0)
    assert np.shares_memory(answer.problem.desirability, fitness)
    assert not np.shares_memory(schedule(fitness, USAGE, CAPACITY).problem.desirability, fitness)


def test_float16_is_not_computed_with():
    """2048 and 2049 are the same number in float16, and so would be the scores."""
    fitness = np.array([[2048.0]], dtype=np.float16)
    scores = desirability(fitness, [1.0], usage_weight=-1.0)
    assert scores.dtype == np.float32
    assert scores[0, 0] == 2049.0


def test_desirability_is_the_formula():
    fitness = np.array(FITNESS)
    expected = 2.0 * fitness - 0.5 * (np.array(USAGE) / 2.0)
    np.testing.assert_allclose(desirability(fitness, USAGE, fitness_weight=2.0, usage_weight=0.5), expected)
    answer = schedule(FITNESS, USAGE, CAPACITY, fitness_weight=2.0, usage_weight=0.5)
    np.testing.assert_allclose(answer.problem.desirability, expected)


def test_usage_share_is_relative_to_the_fair_share():
    np.testing.assert_allclose(usage_share([4, 1, 1]), [2.0, 0.5, 0.5])
    np.testing.assert_array_equal(usage_share([0, 0]), [1.0, 1.0])


def test_usage_drives_clients_away_from_busy_experts():
    fitness = np.full((4, 2), 0.5)
    answer = schedule(fitness, [9, 1], 1, balance=None, usage_weight=0.1)
    assert answer.loads.tolist() == [0, 4]
    assert schedule(fitness, [1, 9], 1, balance=None, usage_weight=0.1).loads.tolist() == [4, 0]


# --- balance, fill, bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "experts", "balance", "low", "high"),
    [
        ([1] * 10, 2, 0.0, 5, 5),
        ([1] * 20, 2, 0.1, 9, 11),
        ([1] * 20, 2, 0.05, 9, 11),
        ([2] * 5, 3, 0.0, 3, 4),
        ([1] * 100, 10, 0.25, 7, 13),
        ([1] * 4, 2, 3.0, 0, 8),
        ([0, 0], 2, 0.25, 0, 0),
    ],
)
def test_balance_is_a_tolerance_around_the_mean_rounded_outwards(slots, experts, balance, low, high):
    load_min, load_max = balanced_load_bounds(slots, experts, balance)
    assert load_min.tolist() == [low] * experts
    assert load_max.tolist() == [high] * experts


@st.composite
def rounds(draw: st.DrawFn) -> dict:
    n, m = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.0, 0.2, 0.7, 1.0]))
    return {
        "fitness": rng.random((n, m)) - draw(st.sampled_from([0.0, 0.5])),
        "usage": rng.random(m),
        "capacity": rng.integers(0, m + 2, n),
        "eligible": draw(st.sampled_from([None, rng.random((n, m)) < share])),
        "balance": draw(st.sampled_from([0.0, 0.1, 0.25, 2.0])),
        "fill": draw(st.booleans()),
    }


@given(case=rounds())
def test_balance_never_makes_a_round_fail(case):
    answer = schedule(**case)
    assert answer.status is Status.OPTIMAL
    mask = answer.assignment.toarray()
    if case["fill"]:
        open_ = mask.shape[1] if case["eligible"] is None else case["eligible"].sum(axis=1)
        np.testing.assert_array_equal(mask.sum(axis=1), np.minimum(case["capacity"], open_))
    asked_min, asked_max = balanced_load_bounds(answer.problem.slots, mask.shape[1], case["balance"])
    for name, asked in (("load_min", asked_min), ("load_max", asked_max)):
        moved = {r.expert: r.used for r in answer.relaxed if r.bound == name}
        for j, bound in enumerate(getattr(answer.problem, name)):
            assert bound == moved.get(j, asked[j])


def test_widened_bounds_are_listed():
    eligible = np.ones((6, 3), dtype=bool)
    eligible[1:, 2] = False
    answer = schedule(FITNESS, USAGE, 1, eligible=eligible, balance=0.0)
    assert answer.status is Status.OPTIMAL
    assert answer.loads[2] == 1
    assert "load_min[2]: 2 -> 1" in [str(r) for r in answer.relaxed]
    assert " bounds widened: load_min[2]: 2 -> 1" in repr(answer)


def test_explicit_bounds_are_hard_and_balance_gives_way_to_them():
    answer = schedule(FITNESS, USAGE, CAPACITY, load_max=[8, 1, 8], balance=0.0)
    assert answer.status is Status.OPTIMAL
    assert answer.loads[1] <= 1
    assert answer.problem.load_max.tolist() == [8, 1, 8]
    assert all(r.bound == "load_min" for r in answer.relaxed)
    answer = schedule(FITNESS, USAGE, CAPACITY, load_min=[0, 0, 5], balance=0.0)
    assert answer.loads[2] >= 5
    assert answer.problem.load_min.tolist() == [0, 0, 5]


def test_both_explicit_bounds_leave_nothing_to_balance():
    answer = schedule(FITNESS, USAGE, CAPACITY, load_min=1, load_max=6, balance=0.0)
    assert answer.problem.load_min.tolist() == [1, 1, 1]
    assert answer.problem.load_max.tolist() == [6, 6, 6]


def test_without_balance_every_client_gets_its_best():
    answer = schedule(FITNESS, [1, 1, 1], 1, balance=None)
    assert answer.loads.tolist() == [6, 0, 0]
    assert answer.solver == "greedy"


def test_without_fill_only_positive_pairs_are_taken():
    fitness = np.array([[0.5, -0.2], [-0.1, -0.3], [0.4, 0.6]])
    answer = schedule(fitness, [1, 1], 2, fill=False, balance=None, usage_weight=0)
    assert answer.experts_by_client() == {0: [0], 1: [], 2: [0, 1]}
    filled = schedule(fitness, [1, 1], 2, balance=None, usage_weight=0)
    assert filled.loads.tolist() == [3, 3]


def test_infeasible_hard_bounds_are_an_answer_that_names_the_conflict():
    answer = schedule(frame(), USAGE, CAPACITY, load_max=[2, 2, 2])
    assert answer.status is Status.INFEASIBLE
    assert answer.stop_reason is StopReason.PROVED_INFEASIBLE
    assert answer.conflict.required == 7  # of the eight places: one more than there is room for
    assert answer.conflict.available == 6
    words = "clients {ann, bob, cid, dee, fay} must take 7 places (min_experts), only 6 are open to them"
    assert answer.conflict.message.startswith(words)
    assert words in repr(answer)
    assert answer.objective is None
    assert answer.bound is None
    for ask in (lambda: answer.loads, lambda: answer.assignment, lambda: answer.experts_of("ann"), answer.verify):
        with pytest.raises(InfeasibleError, match="infeasible: clients"):
            ask()


def test_starving_experts_are_named_by_their_labels():
    eligible = pd.DataFrame(True, index=CLIENTS, columns=EXPERTS)
    eligible.loc["bob":, "dogs"] = False
    answer = schedule(frame(), USAGE, CAPACITY, eligible=eligible, load_min=[0, 3, 0])
    assert answer.conflict.message == "expert dogs needs 3 clients (load_min), only 1 eligible slots reach it"


# --- solver arguments -------------------------------------------------------------------------------------------


def test_heuristic_has_no_bound_unless_asked():
    answer = schedule(FITNESS, USAGE, CAPACITY, solver="greedy-global")
    assert (answer.bound, answer.gap, answer.prices) == (None, None, None)
    assert "bound none, gap none" in repr(answer)
    certified = schedule(FITNESS, USAGE, CAPACITY, solver="greedy-global", certify=True)
    assert certified.bound >= certified.objective - 1e-9
    assert certified.gap is not None


def test_warm_start_is_last_rounds_schedule(plain):
    assert schedule(FITNESS, USAGE, CAPACITY, warm_start=plain).objective == plain.objective


def test_time_limit_reaches_the_backend():
    answer = schedule(FITNESS, USAGE, CAPACITY, time_limit=5.0, solver="flow-ortools")
    assert answer.message == "flow-ortools takes no time limit: it ran to its end"


def test_nothing_found_in_time_says_so_when_asked_for():
    rng = np.random.default_rng(0)
    answer = schedule(rng.random((1000, 16)), np.ones(16), 2, time_limit=1e-3, solver="lp-scipy", balance=0.0)
    assert answer.status is Status.UNKNOWN
    with pytest.raises(NoAssignmentError, match=r"no assignment: unknown \(time limit\)"):
        _ = answer.loads


# --- output -----------------------------------------------------------------------------------------------------


def test_to_json_round_trips(plain):
    answer = json.loads(plain.to_json())
    assert answer == plain.to_dict()
    assert answer["status"] == "optimal"
    assert answer["loads"] == {str(j): int(load) for j, load in enumerate(plain.loads)}
    assert answer["assignment"]["2"] == plain.experts_of(2)
    assert answer["gap"] == plain.gap
    assert len(answer["prices"]) == 3


def test_to_dict_uses_labels_as_text():
    answer = schedule(frame(), USAGE, CAPACITY).to_dict()
    assert set(answer["assignment"]) == set(CLIENTS)
    assert set(answer["loads"]) == set(EXPERTS)
    assert {expert for experts in answer["assignment"].values() for expert in experts} <= set(EXPERTS)


def test_to_dict_of_an_infeasible_round():
    answer = json.loads(schedule(FITNESS, USAGE, CAPACITY, load_max=0).to_json(indent=1))
    assert answer["status"] == "infeasible"
    assert answer["assignment"] is None
    assert answer["loads"] is None
    assert "client 0 must take 1 places (min_experts), only 0 are open to it" in answer["conflict"]


def test_repr_shows_status_objective_bound_and_gap(plain):
    text = repr(plain)
    assert text.startswith(f"Schedule: optimal (completed) by {plain.solver}, 6 clients x 3 experts [auto: ")
    assert f"objective {plain.objective:.6g}, bound {plain.bound:.6g}, gap " in text
    assert "8 pairs, loads 2 to " in text
    assert "build " in text


def test_every_status_and_stop_reason_has_advice():
    assert all(status.advice.endswith(".") for status in Status)
    assert all(reason.advice.endswith(".") for reason in StopReason)


# --- bad input --------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        # shapes
        ({"fitness": [1, 2, 3]}, r"fitness: has shape \(3,\), must be two-dimensional \(clients, experts\)"),
        ({"fitness": [[[1.0]]]}, r"fitness: has shape \(1, 1, 1\), must be two-dimensional"),
        ({"fitness": 3.0}, r"fitness: has shape \(\), must be two-dimensional"),
        ({"fitness": [[1, 2], [3]]}, "fitness: cannot be read as an array of numbers"),
        ({"usage": [1, 1]}, r"usage: has shape \(2,\), must be \(3,\) \(one per expert\)"),
        ({"usage": 1.0}, r"usage: has shape \(\), must be \(3,\)"),
        ({"capacity": [1, 2]}, r"capacity: has shape \(2,\), must be \(6,\) \(one per client\)"),
        ({"eligible": np.ones((3, 6))}, r"eligible: has shape \(3, 6\), must be \(6, 3\) \(clients, experts\)"),
        ({"load_max": [1, 2]}, r"load_max: has shape \(2,\), must be \(3,\) \(one per expert\)"),
        ({"load_min": [[1, 2, 3]]}, r"load_min: has shape \(1, 3\), must be \(3,\)"),
        # empty problems
        ({"fitness": []}, r"fitness: has shape \(0,\), must be two-dimensional"),
        ({"fitness": np.zeros((0, 3))}, r"fitness: has shape \(0, 3\), needs at least one client and one expert"),
        ({"fitness": np.zeros((3, 0))}, r"fitness: has shape \(3, 0\), needs at least one client and one expert"),
        # values
        ({"fitness": np.where(np.eye(6, 3) > 0, NAN, 1)}, r"fitness\[0, 0\] = nan: must be finite"),
        ({"fitness": [[1, 2, 3]] * 5 + [[1, -INF, 3]]}, r"fitness\[5, 1\] = -inf: must be finite"),
        ({"fitness": [["a", "b", "c"]] * 6}, "fitness: holds <U1 values, not numbers"),
        ({"fitness": [[1j, 2, 3]] * 6}, "fitness: holds complex128 values, not numbers"),
        ({"fitness": None}, "fitness: holds object values, not numbers"),
        ({"usage": [1, NAN, 1]}, r"usage\[1\] = nan: must be finite"),
        ({"usage": [1, 1, -0.5]}, r"usage\[2\] = -0.5: must be >= 0"),
        ({"capacity": [1, 1, -2, 1, 1, 1]}, r"capacity\[2\] = -2: must be >= 0"),
        ({"capacity": [1, 1, 1, 1.5, 1, 1]}, r"capacity\[3\] = 1.5: must be a whole number"),
        ({"capacity": [1, NAN, 1, 1, 1, 1]}, r"capacity\[1\] = nan: must be finite"),
        ({"capacity": -1}, "capacity = -1: must be >= 0"),
        ({"capacity": 0.5}, "capacity = 0.5: must be a whole number"),
        ({"capacity": 1e300}, "capacity = 1e.300: must be <= 9007199254740992"),
        ({"capacity": "many"}, "capacity: holds <U4 values, not numbers"),
        ({"eligible": np.full((6, 3), 2)}, r"eligible\[0, 0\] = 2: must be True or False"),
        ({"eligible": [[1, 0, NAN]] * 6}, r"eligible\[0, 2\] = nan: must be True or False"),
        # bounds
        ({"load_min": 3, "load_max": 2}, r"load_min\[0\] = 3: must be <= load_max\[0\] = 2"),
        ({"load_min": [0, 5, 0], "load_max": [9, 4, 9]}, r"load_min\[1\] = 5: must be <= load_max\[1\] = 4"),
        ({"load_min": -1}, "load_min = -1: must be >= 0"),
        ({"load_max": [1, 2, 2.5]}, r"load_max\[2\] = 2.5: must be a whole number"),
        # options
        ({"balance": -0.1}, "balance = -0.1: must be finite and >= 0, or None"),
        ({"balance": NAN}, "balance = nan: must be finite"),
        ({"fitness_weight": INF}, "fitness_weight = inf: must be finite"),
        ({"usage_weight": NAN}, "usage_weight = nan: must be finite"),
        ({"time_limit": 0}, "time = 0: must be a finite number of seconds > 0"),
        ({"seed": -3}, "seed = -3: must be >= 0"),
        ({"solver": "gurobi"}, "solver = 'gurobi': must be 'auto', a Solver, or one of random, greedy"),
    ],
)
def test_bad_input_is_refused_with_what_and_where(arguments, words):
    good = {"fitness": FITNESS, "usage": USAGE, "capacity": CAPACITY}
    with pytest.raises(InputError, match=words):
        schedule(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"fitness": pd.DataFrame(FITNESS, index=["a", "b", "a", "c", "d", "e"], columns=EXPERTS)},
            r"client_labels\[2\] = 'a': already the label at position 0",
        ),
        (
            {"fitness": pd.DataFrame(FITNESS, index=CLIENTS, columns=["x", "y", "y"])},
            r"expert_labels\[2\] = 'y': already the label at position 1",
        ),
        (
            {"capacity": pd.Series(CAPACITY, [*CLIENTS[:-1], "gus"])},
            "capacity: has no entry labelled 'fay', which fitness has",
        ),
        ({"usage": pd.Series(USAGE, ["cats", "dogs", "boats"])}, "usage: has no entry labelled 'cars'"),
        (
            {"capacity": pd.Series([*CAPACITY, 1], [*CLIENTS, "gus"])},
            r"capacity: has 7 entries, fitness has 6 \(first surplus: 'gus'\)",
        ),
        (
            {"usage": pd.Series([*USAGE, 1.0], [*EXPERTS, "cats"])},
            r"usage: has 4 entries, fitness has 3 \(first surplus: 'cats'\)",
        ),
        (
            {"eligible": pd.DataFrame(True, index=CLIENTS, columns=["cats", "dogs", "boats"])},
            r"eligible \(experts\): has no entry labelled 'cars'",
        ),
        (
            {"eligible": pd.DataFrame(True, index=[*CLIENTS[:-1], "gus"], columns=EXPERTS)},
            r"eligible \(clients\): has no entry labelled 'fay'",
        ),
    ],
)
def test_bad_labels_are_refused_with_what_and_where(arguments, words):
    good = {"fitness": frame(), "usage": USAGE, "capacity": CAPACITY}
    with pytest.raises(InputError, match=words):
        schedule(**(good | arguments))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"min_experts": 2}, r"min_experts\[0\] = 2: must be <= capacity\[0\] = 1"),
        ({"desirability": [[NAN]]}, r"desirability\[0, 0\] = nan: must be finite"),
        ({"client_labels": ["a"]}, "client_labels: has 1 labels, must be 2"),
        ({"expert_labels": ["x", "x"]}, r"expert_labels\[1\] = 'x': already the label at position 0"),
        ({"load_min": 2, "load_max": 1}, r"load_min\[0\] = 2: must be <= load_max\[0\] = 1"),
    ],
)
def test_bad_problems_are_refused_with_what_and_where(arguments, words):
    good = {"desirability": [[1.0, 2.0], [3.0, 4.0]], "capacity": 1}
    with pytest.raises(InputError, match=words):
        AssignmentProblem(**(good | arguments))


def test_replace_knows_its_arguments():
    with pytest.raises(InputError, match="replace: no argument called 'capacities'; there are desirability, "):
        AssignmentProblem([[1.0]], 1).replace(capacities=2)


def test_missing_engine_is_named_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(solver_class("ilp-pulp"), "requires", ("no_such_engine",))
    with pytest.raises(MissingDependencyError, match="ilp-pulp needs no_such_engine: pip install no_such_engine"):
        schedule(FITNESS, USAGE, CAPACITY, solver="ilp-pulp")


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (5, 1)])
def test_single_clients_and_experts(n, m):
    answer = schedule(np.full((n, m), 0.5), np.ones(m), 1)
    assert answer.status is Status.OPTIMAL
    assert answer.loads.sum() == n
    assert repr(answer)
    assert answer.to_json()


def test_nobody_can_train_anything():
    answer = schedule(FITNESS, USAGE, 0)
    assert answer.status is Status.OPTIMAL
    assert answer.loads.tolist() == [0, 0, 0]
    assert answer.objective == 0


@pytest.mark.parametrize("balance", [None, 0.25])
def test_a_load_min_above_the_number_of_clients_is_a_conflict_and_no_bad_input(balance):
    arguments = ([[0.5, 0.2]] * 2, [0, 0], 1)
    answer = schedule(*arguments, load_min=[0, 3], balance=balance)
    assert answer.status is Status.INFEASIBLE
    assert "expert 1 needs 3 clients (load_min), only 2" in answer.conflict.message
    answer = schedule(*arguments, load_min=[0, 3], balance=balance, soft=True)
    assert answer.loads.tolist() == [0, 2]
    [widened] = answer.relaxed
    assert (widened.bound, widened.expert, widened.asked, widened.used) == ("load_min", 1, 3, 2)
    with pytest.raises(InputError, match=r"load_min\[1\] = 3: must be <= load_max\[1\] = 2"):
        schedule(*arguments, load_min=[0, 3], load_max=2, balance=balance)
