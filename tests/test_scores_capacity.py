"""Capacity: FedScale's time model by hand, experts per round against enumeration, correction of profiles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_sched import CapacityProfile, ExpertCost, InputError
from fedmoe_sched.scores import (
    capacity_and_eligibility,
    corrected_speed,
    estimate_profile,
    profile_table,
    round_seconds,
)

PHONE = CapacityProfile(ms_per_sample=20, memory_bytes=1e9, down_bandwidth=4e6, up_bandwidth=1e6, latency=0.5)


def test_round_seconds_is_fedscales_model():
    cost = ExpertCost(expert_bytes=2e6, samples=200)
    # 3 * 200 * 20 / 1000 = 12 s per expert; 2 MB / 4 MB/s + 2 MB / 1 MB/s = 2.5 s per expert; 0.5 s latency
    assert round_seconds([PHONE], cost, [[1, 0, 0]]).tolist() == [15.0]
    assert round_seconds([PHONE], cost, [[1, 0, 1]]).tolist() == [29.5]


def test_round_seconds_with_a_shared_part_and_unequal_experts():
    cost = ExpertCost(
        expert_bytes=[1e6, 3e6], expert_compute=[0.5, 2.0], shared_bytes=4e6, shared_compute=1.5, samples=100
    )
    # 6 s per unit of compute, 1.25 s per MB
    expected = 0.5 + 6 * (1.5 + 2.0) + 1.25 * (4 + 3)
    assert round_seconds([PHONE], cost, [[0, 1]])[0] == pytest.approx(expected)
    assert round_seconds([PHONE], cost, [[0, 1]], correction=2.0)[0] == pytest.approx(2 * expected)


def test_frozen_shared_parts_are_not_sent_back():
    cost = ExpertCost(expert_bytes=2e6, shared_bytes=4e6, shared_up_bytes=1e6)
    # 4 MB and 2 MB down at 4 MB/s, 1 MB and 2 MB up at 1 MB/s, 0.5 s latency
    assert round_seconds([PHONE], cost, [[1, 0]]).tolist() == [1.5 + 3.0 + 0.5]
    assert capacity_and_eligibility([PHONE], cost, 2, deadline=5.0)[0].tolist() == [1]
    assert ExpertCost(**cost.to_dict()) == cost


def test_an_unlimited_profile_takes_no_time():
    assert round_seconds([CapacityProfile()], ExpertCost(expert_bytes=1e9, samples=100), [[1, 1]]).tolist() == [
        0.0
    ]


def test_memory_sets_capacity():
    cost = ExpertCost(expert_bytes=100.0, shared_bytes=50.0, memory_overhead=4)
    sizes = [600, 999, 1000, 599, 199, math.inf]
    profiles = [CapacityProfile(memory_bytes=size) for size in sizes]
    capacity, eligible = capacity_and_eligibility(profiles, cost, 5)
    # 200 bytes for the shared part, 400 for each expert
    assert capacity.tolist() == [1, 1, 2, 0, 0, 5]
    assert eligible.all(axis=1).tolist() == [True, True, True, False, False, True]


def test_deadline_sets_capacity():
    cost = ExpertCost(expert_bytes=2e6, samples=200)  # 14.5 s per expert and 0.5 s latency
    for deadline, expected in [(14.9, 0), (15.0, 1), (29.5, 2), (29.4, 1), (None, 4)]:
        capacity, eligible = capacity_and_eligibility([PHONE], cost, 4, deadline=deadline)
        assert capacity.tolist() == [expected]
        assert eligible.all() == (expected > 0)


def test_a_slower_client_than_its_profile_says_gets_fewer():
    cost = ExpertCost(expert_bytes=2e6, samples=200)
    capacity, _ = capacity_and_eligibility([PHONE, PHONE], cost, 4, deadline=60.0, correction=[1.0, 2.0])
    assert capacity.tolist() == [4, 2]  # 58.5 s; 2 * 29.5 = 59 s


def test_unequal_sizes_make_big_experts_ineligible():
    cost = ExpertCost(expert_bytes=[10, 20, 80], memory_overhead=1)
    capacity, eligible = capacity_and_eligibility([CapacityProfile(memory_bytes=35)], cost, 3)
    assert eligible.tolist() == [[True, True, False]]
    assert capacity.tolist() == [2]
    capacity, _ = capacity_and_eligibility([CapacityProfile(memory_bytes=85)], cost, 3)
    assert capacity.tolist() == [1]  # 10 + 20 would fit, 20 + 80 would not: any choice has to


positive = st.floats(0.1, 50)


@settings(max_examples=drawn(200))
@given(
    sizes=st.lists(positive, min_size=1, max_size=5),
    memory=st.floats(1, 300),
    speed=st.floats(0, 100),
    deadline=st.one_of(st.none(), st.floats(0.5, 100)),
    data=st.data(),
)
def test_capacity_is_the_largest_count_of_which_any_choice_fits(sizes, memory, speed, deadline, data):
    m, correction = len(sizes), data.draw(st.floats(0.2, 3))
    compute = data.draw(st.lists(positive, min_size=m, max_size=m))
    cost = ExpertCost(sizes, compute, shared_bytes=2, shared_compute=0.1, memory_overhead=1.5, samples=10)
    profile = CapacityProfile(speed, memory, down_bandwidth=20, up_bandwidth=5, latency=0.1)

    def fits(chosen: tuple[int, ...]) -> bool:
        mask = np.isin(np.arange(m), chosen)[None, :]
        seconds = round_seconds([profile], cost, mask, correction=correction)[0]
        needed = 1.5 * (2 + sum(sizes[j] for j in chosen))
        return needed <= memory * (1 + 1e-9) and (deadline is None or seconds <= deadline * (1 + 1e-9))

    capacity, eligible = capacity_and_eligibility([profile], cost, m, deadline=deadline, correction=correction)
    alone = [fits((j,)) for j in range(m)]
    assert eligible[0].tolist() == alone
    able = [j for j in range(m) if alone[j]]
    best = max(k for k in range(len(able) + 1) if k == 0 or all(map(fits, itertools.combinations(able, k))))
    # A choice may exceed memory and another the deadline: the two limits are counted apart, and both hold.
    assert capacity[0] == best


def test_profiles_as_a_table_and_as_objects_agree():
    cost = ExpertCost(expert_bytes=2e6, samples=200)
    table = profile_table([PHONE, CapacityProfile()])
    assert table.shape == (2, 5)
    for given_ in (table, [PHONE, CapacityProfile()]):
        assert capacity_and_eligibility(given_, cost, 3, deadline=30)[0].tolist() == [2, 3]


def test_correction_by_hand():
    learned = corrected_speed([1.0, 2.0, 1.5], observed=[20, 10, 7], estimated=[10, 10, 0], rate=0.25)
    assert learned.tolist() == [1.25, 1.75, 1.5]


def test_correction_converges_to_the_true_ratio():
    generator = np.random.default_rng(5)
    true = np.array([0.4, 1.0, 3.0])
    factor = np.ones(3)
    errors = []
    for _ in range(40):
        factor = corrected_speed(factor, 12.0 * true, np.full(3, 12.0), rate=0.3)
        errors.append(np.abs(factor - true).max())
    np.testing.assert_allclose(errors[10] / errors[0], 0.7**10, rtol=1e-6)  # the error shrinks by 1 - rate
    np.testing.assert_allclose(factor, true, rtol=1e-5)
    noisy = np.ones(3)
    for _ in range(300):
        noisy = corrected_speed(noisy, 12.0 * true * generator.lognormal(0, 0.1, 3), np.full(3, 12.0), rate=0.05)
    np.testing.assert_allclose(noisy, true, rtol=0.1)


def test_estimate_profile_recovers_a_device():
    generator = np.random.default_rng(2)
    compute, down, up = (
        generator.uniform(50, 500, 30),
        generator.uniform(1e5, 1e7, 30),
        generator.uniform(1e5, 1e7, 30),
    )
    seconds = 3 * 20 / 1000 * compute + down / 4e6 + up / 1e6 + 0.5
    found = estimate_profile(seconds, compute, down, up, memory_bytes=1e9)
    np.testing.assert_allclose(profile_table([found]), profile_table([PHONE]), rtol=1e-6)


def test_estimate_profile_from_one_round_reproduces_its_time():
    found = estimate_profile([30.0], [100], [1e6], [1e6])
    cost = ExpertCost(expert_bytes=1e6, samples=100)
    assert round_seconds([found], cost, [[1]])[0] == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CapacityProfile(ms_per_sample=-1), "ms_per_sample = -1"),
        (lambda: CapacityProfile(ms_per_sample=math.inf), "ms_per_sample = inf"),
        (lambda: CapacityProfile(memory_bytes=0), "memory_bytes = 0"),
        (lambda: CapacityProfile(memory_bytes=math.nan), "memory_bytes = nan"),
        (lambda: CapacityProfile(up_bandwidth=-3), "up_bandwidth = -3"),
        (lambda: CapacityProfile(latency=math.nan), "latency = nan"),
        (lambda: ExpertCost(expert_bytes=-1), r"expert_bytes\[0\] = -1"),
        (lambda: ExpertCost(expert_bytes=[1, math.inf]), r"expert_bytes\[1\] = inf"),
        (lambda: ExpertCost(memory_overhead=0.5), r"memory_overhead\[0\] = 0.5"),
        (lambda: ExpertCost(samples=[1, 2]), "samples: has shape"),
        (lambda: ExpertCost(expert_bytes=[1, 2]).bytes_of(3), r"expert_bytes: has shape \(2,\), must be \(3,\)"),
        (lambda: capacity_and_eligibility([PHONE], ExpertCost(), 2, deadline=0), "deadline = 0"),
        (lambda: capacity_and_eligibility(np.zeros((2, 3)), ExpertCost(), 2), "profiles: has shape"),
        (lambda: capacity_and_eligibility([PHONE], ExpertCost(), 2, correction=[1, 1]), "correction: has shape"),
        (lambda: corrected_speed([1], [1], [1], rate=0), "rate = 0"),
        (lambda: corrected_speed([1], [-1], [1]), r"observed\[0\] = -1"),
        (lambda: estimate_profile([], [], [], []), "no observation"),
        (lambda: estimate_profile([1.0], [1], [1, 2], [1]), "down_bytes: has shape"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(InputError, match=message):
        make()
