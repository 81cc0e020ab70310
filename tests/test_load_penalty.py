"""LoadPenalty: marginals, sums, conjugates and refusals, against plain loops over the clients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_prices_prove, brute_force, linear_program, load_penalties, marginal_cost, penalty_table

from fedmoe_sched import AssignmentProblem, InputError, LoadPenalty, schedule
from fedmoe_sched.scores import UsageOptions, UsageScores

MIXED = LoadPenalty([0, 2, 3], [1, 4, 1], [0.5, 2.0, -1.0], [0.25, 0.0, 1.0])


def of(penalty: LoadPenalty) -> AssignmentProblem:
    """Wrap a penalty in a problem, for the oracle."""
    return AssignmentProblem(np.zeros((1, penalty.n_experts)), 1, load_penalty=penalty)


def test_by_hand():
    """Expert 0 charges 0.5, 0.75, 1, then 2 each; expert 1 charges -1, 0, 1, ..."""
    assert MIXED.n_experts == 2
    assert [MIXED.marginal([load, load]).tolist() for load in (1, 3, 4, 9)] == [
        [0.5, -1.0],
        [1.0, 1.0],
        [2.0, 2.0],
        [2.0, 7.0],
    ]
    assert [MIXED.total([load, load]).tolist() for load in (0, 1, 3, 5)] == [
        [0.0, 0.0],
        [0.5, -1.0],
        [2.25, 0.0],
        [6.25, 5.0],
    ]
    assert MIXED.best_loads([1.0, 0.5], 0, 10).tolist() == [2, 2]
    assert MIXED.conjugate([1.0, 0.5], 0, 10).tolist() == [0.75, 2.0]
    assert repr(MIXED) == "LoadPenalty(2 experts, 3 segments)"


@given(penalty=load_penalties(3))
def test_marginals_and_sums_are_those_of_counting(penalty):
    table = penalty_table(of(penalty), 9)
    for load in range(10):
        np.testing.assert_allclose(penalty.total(load), table[:, load], rtol=1e-12, atol=1e-12)
        if load:
            assert penalty.marginal(load).tolist() == [marginal_cost(of(penalty), j, load) for j in range(3)]


@given(
    penalty=load_penalties(3),
    prices=st.lists(st.floats(-4, 4), min_size=3, max_size=3),
    low=st.integers(0, 3),
    width=st.integers(0, 5),
)
def test_best_loads_and_conjugate_are_the_best_of_all_loads(penalty, prices, low, width):
    table = penalty_table(of(penalty), low + width)
    best = penalty.best_loads(prices, low, low + width)
    worth = penalty.conjugate(prices, low, low + width)
    for j, price in enumerate(prices):
        values = [price * load - table[j, load] for load in range(low, low + width + 1)]
        assert worth[j] == pytest.approx(max(values), abs=1e-9)
        assert values[best[j] - low] == pytest.approx(max(values), abs=1e-9)


def test_of_equally_good_loads_the_smallest_is_taken():
    flat = LoadPenalty.from_marginals([[1.0, 1.0, 1.0, 2.0]])
    assert flat.best_loads([1.0], 0, 9).tolist() == [0]
    assert flat.best_loads([1.0], 2, 9).tolist() == [2]
    assert flat.best_loads([np.nextafter(1.0, 2)], 0, 9).tolist() == [3]


@pytest.mark.parametrize("history", [0.0, 4.0, -2.5])
def test_quadratic_is_its_formula(history):
    penalty = LoadPenalty.quadratic(0.3, history, n_experts=2)
    for load in (0, 1, 7, 10**7):
        expected = 0.15 * ((load + history) ** 2 - history**2)
        np.testing.assert_allclose(penalty.total(load), [expected] * 2, rtol=1e-13)


def test_quadratic_spreads_single_numbers():
    given_ = [
        LoadPenalty.quadratic([1.0, 2.0]),
        LoadPenalty.quadratic(1.0, [0.0, 3.0]),
        LoadPenalty.quadratic([1, 1]),
    ]
    assert [penalty.n_experts for penalty in given_] == [2, 2, 2]
    assert given_[0].total(2).tolist() == [2.0, 4.0]
    assert given_[1].total(2).tolist() == [2.0, 8.0]


@given(
    usage=st.lists(st.floats(0, 1e3), min_size=3, max_size=3),
    work=st.lists(st.sampled_from([0.0, 1.0, 12.5, 300.0]), min_size=3, max_size=3),
    weight=st.sampled_from([0.0, 1e-4, 2.0]),
    decay=st.sampled_from([0.1, 0.3, 1.0]),
)
def test_penalty_of_usage_is_what_the_usage_after_the_round_costs(usage, work, weight, decay):
    """The usage is that which `UsageScores` has once every client of an expert has done its work."""
    penalty = LoadPenalty.of_usage(weight, usage, work, decay=decay)
    costs = []
    for load in range(6):
        scores = UsageScores(3, UsageOptions(decay=decay, unit="compute"), expert_compute=work)
        scores.restore(usage)
        scores.update([load] * 3)
        costs.append(weight / 2 * scores.values**2)
    scale = 1 + np.max(costs)
    np.testing.assert_allclose(penalty.total(5), costs[5] - costs[0], rtol=1e-9, atol=1e-12 * scale)
    for load in range(1, 6):
        np.testing.assert_allclose(penalty.marginal(load), costs[load] - costs[load - 1], atol=1e-12 * scale)


def test_penalty_of_usage_is_quadratic_in_load_and_history():
    usage, work = np.array([40.0, 0.0, 90.0]), np.array([10.0, 20.0, 5.0])
    penalty = LoadPenalty.of_usage([0.1, 0.2, 0.3], usage, work, decay=0.4)
    gain = 0.4 * work
    same = LoadPenalty.quadratic([0.1, 0.2, 0.3] * gain**2, 0.6 * usage / gain)
    np.testing.assert_allclose(penalty.value, same.value)
    np.testing.assert_allclose(penalty.slope, same.slope)


def test_schedule_levels_usage_after_the_round():
    """Expert 0 keeps 60 of its usage; each client adds 15. Three to expert 1 make 60 and 45, four 60 and 60."""
    penalty = LoadPenalty.of_usage(1.0, [120, 0], 30, decay=0.5)
    answer = schedule(np.ones((4, 2)), [120, 0], 1, usage_weight=0, balance=None, load_penalty=penalty)
    assert answer.loads.tolist() == [0, 4]
    five = schedule(np.ones((6, 2)), [120, 0], 1, usage_weight=0, balance=None, load_penalty=penalty)
    assert five.loads.tolist() == [1, 5]


def test_sums_are_exact_at_ten_million_clients():
    ones = LoadPenalty.from_marginals([[0.0, 1.0]])
    assert ones.total(10**7).tolist() == [10**7 - 1]
    assert LoadPenalty.quadratic(1.0, n_experts=1).total(10**7).tolist() == [0.5e14]
    assert LoadPenalty.quadratic(1.0, n_experts=1).best_loads([1e6], 0, 2**53).tolist() == [10**6]


def test_table_merges_runs_and_goes_on_beyond_its_end():
    penalty = LoadPenalty.from_marginals(np.array([[0, 0, 1, 1], [2, 2, 2, 2]], dtype=np.float32))
    assert penalty.indptr.tolist() == [0, 2, 3]
    assert penalty.start.tolist() == [1, 3, 1]
    assert penalty.value.dtype == np.float64
    assert penalty.marginal(100).tolist() == [1.0, 2.0]


def test_arrays_are_frozen_and_the_input_is_left_alone():
    weight = np.array([1.0, 2.0])
    penalty = LoadPenalty.quadratic(weight)
    with pytest.raises(ValueError, match="read-only"):
        penalty.value[0] = 3.0
    weight[0] = 1.5
    assert weight.flags.writeable


def test_marginal_costs_that_overflow_are_infinite():
    steep = LoadPenalty.quadratic(1e300, n_experts=1)
    assert steep.marginal(2**53).tolist() == [math.inf]
    assert steep.best_loads([1e305], 0, 2**53).tolist() == [100_000]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoadPenalty([0], [], [], []), r"indptr: has 1 entries, needs at least 2"),
        (lambda: LoadPenalty([1, 2], [1, 2], [0, 0], [0, 0]), r"indptr\[0\] = 1: must be 0"),
        (lambda: LoadPenalty([0, 1], [1, 2], [0, 0], [0, 0]), r"indptr\[1\] = 1: must be 2"),
        (lambda: LoadPenalty([0, 1, 1, 2], [1, 1], [0, 0], [0, 0]), r"indptr\[2\] = 1: must be > indptr\[1\] = 1"),
        (lambda: LoadPenalty([[0, 1]], [1], [0], [0]), r"indptr: has shape \(1, 2\), must be one-dimensional"),
        (lambda: LoadPenalty([0, 1, 2], [1, 2], [0, 0], [0, 0]), r"start\[1\] = 2: must be 1, as the first"),
        (lambda: LoadPenalty([0, 2], [1, 1], [0, 0], [0, 0]), r"start\[1\] = 1: must be > start\[0\] = 1"),
        (lambda: LoadPenalty([0, 1], [1.5], [0], [0]), r"start\[0\] = 1.5: must be a whole number"),
        (lambda: LoadPenalty([0, 1], [1], [0, 1], [0]), r"value: has shape \(2,\), must be \(1,\)"),
        (lambda: LoadPenalty([0, 1], [1], [np.nan], [0]), r"value\[0\] = nan: must be finite"),
        (lambda: LoadPenalty([0, 1], [1], [0], [-0.5]), r"slope\[0\] = -0.5: must be >= 0"),
        (lambda: LoadPenalty([0, 1], [1], [0], [np.inf]), r"slope\[0\] = inf: must be finite"),
        (
            lambda: LoadPenalty([0, 2], [1, 4], [0, 1.5], [1, 0]),
            r"value\[1\] = 1.5: must be >= 2.0, what the last",
        ),
        (lambda: LoadPenalty.quadratic(1.0), "n_experts = None: must be given where weight and history are one"),
        (lambda: LoadPenalty.quadratic(1.0, n_experts=0), r"n_experts = 0: must be a whole number >= 1"),
        (lambda: LoadPenalty.quadratic(-1.0, n_experts=2), r"weight\[0\] = -1.0: must be >= 0"),
        (lambda: LoadPenalty.quadratic([1, -2]), r"weight\[1\] = -2.0: must be >= 0"),
        (lambda: LoadPenalty.quadratic([1, 2], [1, 2, 3]), r"history: has shape \(3,\), must be \(2,\)"),
        (lambda: LoadPenalty.quadratic([1, 2], n_experts=3), r"weight: has shape \(2,\), must be \(3,\)"),
        (lambda: LoadPenalty.quadratic(1, [0, np.inf]), r"history\[1\] = inf: must be finite"),
        (lambda: LoadPenalty.of_usage(1, [1, -2], 1, decay=0.5), r"usage\[1\] = -2.0: must be >= 0"),
        (
            lambda: LoadPenalty.of_usage(1, [1, 2], [1, 2, 3], decay=0.5),
            r"work_per_client: has shape \(3,\), must be",
        ),
        (
            lambda: LoadPenalty.of_usage(1, [1, 2], [1, -1], decay=0.5),
            r"work_per_client\[1\] = -1.0: must be >= 0",
        ),
        (lambda: LoadPenalty.of_usage(-1, [1, 2], 1, decay=0.5), r"weight\[0\] = -1.0: must be >= 0"),
        (lambda: LoadPenalty.of_usage(1, [1, 2], 1, decay=0), r"decay = 0: must be > 0 and <= 1"),
        (lambda: LoadPenalty.of_usage(1, 3.0, 1, decay=0.5), r"usage: has shape \(\), must be one-dimensional"),
        (lambda: LoadPenalty.quadratic("1", n_experts=1), "weight: holds <U1 values, not numbers"),
        (
            lambda: LoadPenalty.from_marginals([1, 2]),
            r"table: has shape \(2,\), must be two-dim.* \(experts, clients",
        ),
        (lambda: LoadPenalty.from_marginals([[], []]), "table: .* needs at least one expert and one client"),
        (
            lambda: LoadPenalty.from_marginals([[0, 1], [1, 0.5]]),
            r"table\[1, 1\] = 0.5: must be >= table\[1, 0\] = 1",
        ),
        (lambda: LoadPenalty.from_marginals([[0, np.nan]]), r"table\[0, 1\] = nan: must be finite"),
        (lambda: MIXED.marginal([1, 0]), r"loads\[1\] = 0: must be >= 1"),
        (lambda: MIXED.total([1, -1]), r"loads\[1\] = -1: must be >= 0"),
        (lambda: MIXED.best_loads([0, 0], [0, 3], 2), r"low\[1\] = 3: must be <= high\[1\] = 2"),
        (lambda: MIXED.best_loads([0, np.nan], 0, 2), r"prices\[1\] = nan: must be finite"),
    ],
)
def test_what_is_no_penalty_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_problem_refuses_a_penalty_of_other_experts():
    with pytest.raises(InputError, match="load_penalty: is of 2 experts, must be of 3"):
        AssignmentProblem(np.ones((4, 3)), 1, load_penalty=MIXED)
    with pytest.raises(InputError, match="load_penalty: is a float, must be a LoadPenalty or None"):
        AssignmentProblem(np.ones((4, 3)), 1, load_penalty=0.5)


def test_a_problem_shows_its_penalty():
    problem = AssignmentProblem(np.ones((4, 2)), 1, load_penalty=MIXED)
    assert repr(problem) == "AssignmentProblem(4 clients x 2 experts, 4 slots, load 0..4, penalised)"
    assert problem.replace(capacity=2).load_penalty is MIXED
    assert problem.replace(load_penalty=None).is_separable
    assert not problem.has_load_bounds
    assert not problem.is_separable


def test_schedule_balances_softly():
    """All like expert 0 best; loads of l cost 0.15 times the square of l, and every pair 0.1 for its usage."""
    fitness = [[0.9, 0.6], [0.9, 0.5], [0.9, 0.4], [0.9, 0.1], [0.9, 0.0]]
    penalty = LoadPenalty.quadratic(0.3, n_experts=2)
    alone = schedule(fitness, [1, 1], 1, balance=None, load_penalty=penalty)
    assert alone.loads.tolist() == [3, 2]
    assert alone.objective == pytest.approx(3 * 0.9 + 0.6 + 0.5 - 5 * 0.1 - 0.15 * (9 + 4))
    assert alone.problem.load_penalty is penalty
    assert schedule(fitness, [1, 1], 1, balance=None).loads.tolist() == [5, 0]
    hard = schedule(fitness, [1, 1], 1, load_max=[2, 4], load_penalty=penalty)
    assert hard.loads.tolist() == [2, 3]
    with pytest.raises(InputError, match="load_penalty: is of 3 experts, must be of 2"):
        schedule(fitness, [1, 1], 1, load_penalty=LoadPenalty.quadratic(0.1, n_experts=3))


# --- what the other tests judge penalties by --------------------------------------------------------------------

# Three clients gain 5, 3 and 2 by expert 0 and 1 by expert 1; the k-th client of an expert costs k - 1/2. Two and
# one are worth 5 + 3 + 1 - 2 - 0.5.
BY_HAND = AssignmentProblem(
    [[5.0, 1.0], [3.0, 1.0], [2.0, 1.0]], 1, min_experts=1, load_penalty=LoadPenalty.quadratic(1.0, n_experts=2)
)


def test_the_oracles_agree_with_an_example_by_hand():
    assert brute_force(BY_HAND) == 6.5
    assert linear_program(BY_HAND) == pytest.approx(6.5, abs=1e-6)
    assert brute_force(BY_HAND.replace(load_penalty=None)) == 10.0
    assert penalty_table(BY_HAND, 3).tolist() == [[0.0, 0.5, 2.0, 4.5]] * 2


@pytest.mark.parametrize(
    ("prices", "claim"),
    [
        ([2.6, 1.5], "expert 0 is not full but priced"),
        ([1.4, 0.5], "expert 0 is not scarce but priced"),
        ([2.0, 0.4], "expert 1 is not scarce"),
        ([2.0, 1.5], "client 2 would rather swap"),
    ],
)
def test_the_check_of_prices_can_fail(prices, claim):
    best = np.array([[True, False], [True, False], [False, True]])
    assert_prices_prove(BY_HAND, best, [1.5, 0.5], 1e-9)
    with pytest.raises(AssertionError, match=claim):
        assert_prices_prove(BY_HAND, best, prices, 1e-9)


@given(data=st.data())
def test_what_is_left_after_some_clients_is_the_rest_of_the_penalty(data):
    penalty = data.draw(load_penalties(3))
    had, more = (np.array(data.draw(st.lists(st.integers(0, 7), min_size=3, max_size=3))) for _ in range(2))
    rest = penalty.after(had).total(more)
    np.testing.assert_allclose(rest, penalty.total(had + more) - penalty.total(had), atol=1e-9)
