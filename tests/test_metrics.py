"""Balance, fairness, fitness given up: by hand, by brute force, and at their limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_sched import InfeasibleError, InputError, schedule
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.metrics import fitness_given_up, jain_index, load_cv


def test_load_cv():
    # mean 4, deviations -2, 0, 2: standard deviation sqrt(8 / 3)
    assert load_cv([2, 4, 6]) == pytest.approx(math.sqrt(8 / 3) / 4)
    assert load_cv([5, 5, 5]) == 0
    assert load_cv([0, 0]) == 0
    assert load_cv([7, 0, 0, 0, 0]) == pytest.approx(2)  # sqrt(m - 1)


def test_jain_index():
    assert jain_index([3, 1]) == pytest.approx(16 / 20)
    assert jain_index([2, 2, 2]) == 1
    assert jain_index([0, 0]) == 1
    assert jain_index([9, 0, 0, 0]) == 0.25
    assert jain_index([1e200, 1e200]) == 1  # squares would overflow


def test_load_cv_does_not_depend_on_the_unit():
    for unit in (5e-324, 4e-217, 1.0, 3e307):
        assert load_cv([0.0, unit]) == pytest.approx(1.0)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20))
def test_jain_index_and_cv_say_the_same(amounts):
    # J = 1 / (1 + cv^2)
    assert jain_index(amounts) == pytest.approx(1 / (1 + load_cv(amounts) ** 2), rel=1e-6)


@pytest.mark.parametrize("bad", [[], [[1, 2]], [1, -1], [math.nan], [math.inf]])
def test_bad_amounts(bad):
    with pytest.raises(InputError, match="loads"):
        load_cv(bad)
    with pytest.raises(InputError, match="amounts"):
        jain_index(bad)


def test_fitness_given_up_by_hand():
    fitness = [[0.9, 0.5, 0.1], [0.8, 0.6, 0.1]]
    # best with capacity 1: 0.9 + 0.8
    assert fitness_given_up(fitness, 1, [[1, 0, 0], [1, 0, 0]]) == 0
    assert fitness_given_up(fitness, 1, [[1, 0, 0], [0, 1, 0]]) == pytest.approx(0.2 / 1.7)
    assert fitness_given_up(fitness, [2, 1], [[1, 0, 0], [0, 1, 0]]) == pytest.approx(0.7 / 2.2)
    assert fitness_given_up(fitness, 1, np.zeros((2, 3))) == 1
    eligible = [[True, True, True], [False, True, True]]
    assert fitness_given_up(fitness, 1, [[1, 0, 0], [0, 1, 0]], eligible=eligible) == 0


def test_fitness_given_up_without_positive_fitness():
    assert fitness_given_up([[0.0, -1.0]], 1, [[1, 0]]) == 0
    assert fitness_given_up([[1.0, -0.5]], 2, [[1, 1]]) == pytest.approx(0.5)  # filling costs fitness too


def test_fitness_given_up_takes_a_schedule():
    fitness = np.array([[0.9, 0.1], [0.8, 0.3], [0.7, 0.6], [0.6, 0.1]])
    answer = schedule(fitness, [1, 1], 1, load_min=2, load_max=2)
    best = fitness.max(axis=1).sum()
    assert fitness_given_up(fitness, 1, answer) == pytest.approx(0.6 / best)  # 0.1 and 0.5 lost
    with pytest.raises(InfeasibleError):
        fitness_given_up(fitness, 1, schedule(fitness, [1, 1], 1, load_min=3))
    with pytest.raises(InputError, match=r"assignment: has shape \(2, 2\), must be \(4, 2\)"):
        fitness_given_up(fitness, 1, Assignment.from_mask(np.eye(2, dtype=bool)))


@settings(max_examples=drawn(100))
@given(st.integers(0, 2**32 - 1))
def test_best_is_that_of_brute_force(seed):
    generator = np.random.default_rng(seed)
    n, m = 2, 3
    fitness, eligible = generator.uniform(-1, 1, (n, m)).round(2), generator.random((n, m)) < 0.8
    capacity = generator.integers(0, m + 1, n)
    masks = [np.array(bits, dtype=bool).reshape(n, m) for bits in itertools.product([0, 1], repeat=n * m)]
    legal = [x for x in masks if (x.sum(axis=1) <= capacity).all() and not (x & ~eligible).any()]
    best = max((fitness * x).sum() for x in legal)
    shares = [fitness_given_up(fitness, capacity, x, eligible=eligible) for x in legal]
    if best > 0:
        assert min(shares) == pytest.approx(0, abs=1e-12)
        for x, share in zip(legal, shares, strict=True):
            assert share == pytest.approx((best - (fitness * x).sum()) / best)
    else:
        assert shares == [0] * len(shares)
