"""Fitness: the moving average, idle pairs, exploration, and the rewards, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe_sched import InputError
from fedmoe_sched._growing import GrowingRows
from fedmoe_sched.scores import (
    FitnessOptions,
    FitnessScores,
    accuracy_reward,
    flux_reward,
    loss_reward,
    oort_reward,
    router_frequency_reward,
)


def two_by_three(**options) -> FitnessScores:
    fitness = FitnessScores(3, FitnessOptions(**options))
    fitness.add(2)
    return fitness


def test_ema_moves_trained_pairs_and_keeps_the_others():
    fitness = two_by_three(rate=0.25, prior=0.4)
    fitness.update([0, 1], [2, 0], [1.0, 0.0])
    # 0.75 * 0.4 + 0.25 * 1 = 0.55;  0.75 * 0.4 = 0.3
    np.testing.assert_allclose(fitness.values, [[0.4, 0.4, 0.55], [0.3, 0.4, 0.4]], rtol=1e-15)
    fitness.update([0], [2], [1.0])
    assert fitness.values[0, 2] == pytest.approx(0.75 * 0.55 + 0.25)


def test_idle_pairs_decay_towards_the_prior_and_trained_ones_do_not():
    fitness = two_by_three(rate=0.5, prior=(0.0, 0.2, 1.0), on_idle="decay", idle_decay=0.1)
    fitness.put(0, [1.0, 1.0, 1.0])
    fitness.update([0], [1], [0.0])
    # expert 0: 0.9 * 1 + 0.1 * 0; expert 1: trained, 0.5 * 1; expert 2: at its prior already
    np.testing.assert_allclose(fitness.values[0], [0.9, 0.5, 1.0], rtol=1e-15)
    np.testing.assert_allclose(fitness.values[1], [0.0, 0.2, 1.0], rtol=1e-15)


def test_decay_converges_to_the_prior():
    fitness = two_by_three(prior=0.3, on_idle="decay", idle_decay=0.2)
    fitness.put(0, [5.0, -5.0, 0.0])
    for _ in range(100):
        fitness.update([], [], [])
    np.testing.assert_allclose(fitness.values, 0.3, atol=1e-8)


def test_exploration_bonus_by_hand():
    fitness = two_by_three(rate=1.0, exploration=2.0, prior=0.0)
    assert (fitness.bonus([0, -1]) == 0).all()  # ln(1 + 0) = 0: nothing to go by in the first round
    fitness.update([0], [1], [0.5])
    fitness.update([0], [1], [0.5])
    root = math.sqrt(math.log(3))  # two rounds
    np.testing.assert_allclose(
        fitness.bonus([0, -1]), [[2 * root, 2 * root / math.sqrt(3), 2 * root], [2 * root] * 3]
    )
    np.testing.assert_allclose(fitness.scores([0])[0], [2 * root, 0.5 + 2 * root / math.sqrt(3), 2 * root])
    assert fitness.trials is not None
    assert fitness.trials.tolist() == [[0, 2, 0], [0, 0, 0]]


def test_exploration_is_off_by_default_and_costs_no_memory():
    fitness = two_by_three()
    fitness.update([0], [0], [1.0])
    assert fitness.trials is None
    assert (fitness.scores([0, 1]) == fitness.values).all()


def test_unknown_clients_have_the_prior():
    fitness = FitnessScores(2, FitnessOptions(prior=(0.1, 0.9)))
    assert fitness.of([-1]).tolist() == [[0.1, 0.9]]
    fitness.add(1)
    fitness.put(0, [0.5, 0.5])
    assert fitness.of([-1, 0, -1]).tolist() == [[0.1, 0.9], [0.5, 0.5], [0.1, 0.9]]


def test_copies_do_not_write_through():
    fitness = two_by_three()
    fitness.of([0])[:] = 9
    assert (fitness.values == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        fitness.values[0, 0] = 1


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (([0], [0], [np.nan]), r"rewards\[0\] = nan: must be finite"),
        (([0, 1], [0, 0], [0.5, np.inf]), r"rewards\[1\] = inf"),
        (([2], [0], [0.5]), r"pair\[0\] = \(2, 0\)"),
        (([-1], [0], [0.5]), r"pair\[0\] = \(-1, 0\)"),
        (([0], [3], [0.5]), r"pair\[0\] = \(0, 3\)"),
        (([0, 0], [1, 1], [0.5, 0.5]), r"pair \(0, 1\): occurs twice"),
        (([0, 0], [1], [0.5, 0.5]), "experts: has shape"),
        (([0], [1], [0.5, 0.5]), "rewards: has shape"),
    ],
)
def test_bad_update_changes_nothing(pairs, message):
    fitness = two_by_three(on_idle="decay", prior=0.1)
    fitness.put(0, [1.0, 2.0, 3.0])
    before = fitness.values.copy()
    with pytest.raises(InputError, match=message):
        fitness.update(*pairs)
    assert (fitness.values == before).all()
    assert fitness.rounds == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0}, "rate = 0"),
        ({"rate": 1.1}, "rate = 1.1"),
        ({"rate": float("nan")}, "rate = nan"),
        ({"idle_decay": -0.1}, "idle_decay = -0.1"),
        ({"exploration": -1}, "exploration = -1"),
        ({"exploration": float("inf")}, "exploration = inf"),
        ({"on_idle": "forget"}, "on_idle = 'forget'"),
        ({"prior": float("nan")}, r"prior\[0\] = nan"),
        ({"prior": "high"}, "prior"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        FitnessOptions(**options)


def test_prior_of_another_number_of_experts():
    with pytest.raises(InputError, match=r"prior: has shape \(2,\), must be \(3,\)"):
        FitnessScores(3, FitnessOptions(prior=(0.1, 0.2)))


@given(st.lists(st.integers(0, 5), max_size=12))
def test_growing_rows_equal_a_plain_concatenation(sizes):
    store, plain = GrowingRows(np.zeros((0, 2))), np.zeros((0, 2))
    for number, size in enumerate(sizes):
        rows = np.full((size, 2), float(number))
        store.append(rows)
        plain = np.concatenate([plain, rows])
        assert (store.rows == plain).all()
        assert len(store) == len(plain)


def test_growth_is_amortised():
    store = GrowingRows(np.zeros((0, 1)))
    moves, where = 0, store.rows.__array_interface__["data"][0]
    for _ in range(1000):
        store.append(np.ones((1, 1)))
        now = store.rows.__array_interface__["data"][0]
        moves, where = moves + (now != where), now
    assert moves <= 12  # doublings up to 1024, not one move per row


def test_state_round_trip_is_exact():
    fitness = two_by_three(exploration=0.5, on_idle="decay")
    fitness.update([0, 1], [2, 0], [1 / 3, 0.1])
    again = two_by_three(exploration=0.5, on_idle="decay")
    again.restore(fitness.arrays())
    for scores in (fitness, again):
        scores.add(1)
        scores.update([2, 0], [1, 1], [0.7, 0.2])
    assert (again.scores([0, 1, 2]) == fitness.scores([0, 1, 2])).all()


@pytest.mark.parametrize("name", ["values", "trials"])
def test_restore_refuses_what_does_not_fit(name):
    fitness = two_by_three(exploration=0.5)
    arrays = fitness.arrays()
    arrays[name] = arrays[name][:, :2]
    with pytest.raises(InputError, match=name):
        two_by_three(exploration=0.5).restore(arrays)


def test_accuracy_reward():
    np.testing.assert_array_equal(accuracy_reward([3, 0, 0], [4, 5, 0]), [0.75, 0.0, np.nan])
    with pytest.raises(InputError, match=r"correct\[1\] = 6: must be <= samples\[1\] = 5"):
        accuracy_reward([1, 6], [4, 5])
    with pytest.raises(InputError, match=r"samples\[0\] = -4.0: must be >= 0"):
        accuracy_reward([1], [-4])


def test_loss_reward():
    np.testing.assert_allclose(loss_reward([0.0, math.log(2), 2.0], alpha=2.0), [1.0, 0.25, math.exp(-4)])
    with pytest.raises(InputError, match="alpha = 0"):
        loss_reward([1.0], alpha=0)
    with pytest.raises(InputError, match=r"mean_loss\[0\] = nan"):
        loss_reward([np.nan])


def test_router_frequency_reward():
    np.testing.assert_array_equal(
        router_frequency_reward([[6, 2, 0], [0, 0, 0]]), [[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]
    )
    with pytest.raises(InputError, match=r"counts\[1\] = -1"):
        router_frequency_reward([1, -1])


def test_oort_reward():
    # Losses 3 and 4: mean square 12.5; two samples.
    assert float(oort_reward(2, (9 + 16) / 2)) == pytest.approx(2 * math.sqrt(12.5))


def test_flux_reward():
    np.testing.assert_allclose(flux_reward([4, 0], [0.09, 5.0]), [1.2, 0.0])
