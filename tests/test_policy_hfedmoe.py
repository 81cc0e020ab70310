"""HFedMoE: the score by hand, silent clients, and its life in files and in training."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tools import assert_limits_hold, assert_resumes, assert_trains_and_resumes, worlds

from fedmoe_sched import InputError
from fedmoe_sched.policies import make_policy
from fedmoe_sched.policies.hfedmoe import divergence

MEAN = {"anna": [0.5, 0.3, 0.2], "ben": [0.1, 0.3, 0.6]}
LARGEST = {"anna": [0.6, 0.9, 0.3], "ben": [0.2, 0.8, 0.9]}
# q = (0.3, 0.3, 0.4); anna: 0.5 ln(5/3) - 0.2, 0, 0.2 ln(1/2) + 0.2
PENALTY = [0.5 * np.log(5 / 3) - 0.2, 0.0, 0.2 * np.log(0.5) + 0.2]


def ready(**options):
    policy = make_policy("hfedmoe", 3, **options)
    for client, mean in MEAN.items():
        policy.tell(client, {"gate_mean": mean, "gate_max": LARGEST[client]})
    return policy


@pytest.mark.parametrize(
    ("mix", "expected"),
    [(0.0, [0.6, 0.9, 0.3]), (1.0, [0.5, 0.3, 0.2]), (0.5, [0.55, 0.6, 0.25])],
)
def test_mean_and_largest_gate_are_mixed(mix, expected):
    assert ready(mix=mix, beta=0).scores(["anna"])[0] == pytest.approx(expected)


def test_the_penalty_by_hand():
    score = ready(mix=0.5, beta=2.0).scores(["anna"])[0]
    assert score == pytest.approx(np.array([0.55, 0.6, 0.25]) - 2 * np.array(PENALTY))
    assert pytest.approx([0.055413, 0, 0.061371], abs=1e-6) == PENALTY


def test_gates_that_do_not_sum_to_one_are_scaled():
    policy = ready(beta=2.0)
    before = policy.scores(["ben"])
    policy.tell("anna", {"gate_mean": [5, 3, 2]})
    assert policy.scores(["ben"]) == pytest.approx(before)


def test_the_penalty_turns_clients_to_experts_that_many_share():
    # anna with beta = 4: 0.5 - 0.2217 < 0.3; ben: 0.6 - 4 * (0.6 ln 1.5 - 0.2) = 0.427 > 0.3.
    for beta, experts in ((0, 0), (4, 1)):
        answer = ready(mix=1.0, beta=beta).plan(list(MEAN))
        assert answer.experts_by_client() == {"anna": [experts], "ben": [2]}
        assert answer.gap == pytest.approx(0)
    assert answer.objective == pytest.approx(0.3 + 0.6 - 4 * (0.6 * np.log(1.5) - 0.2))


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5))
@settings(deadline=None)
def test_the_penalties_are_parts_of_a_divergence(rows):
    gates = np.array(rows) + 1e-6
    shares = gates / gates.sum(axis=1, keepdims=True)
    average = shares.mean(axis=0)
    parts = divergence(shares, average)
    assert (parts >= 0).all()
    assert parts.sum(axis=1) == pytest.approx((shares * np.log(shares / average)).sum(axis=1), abs=1e-9)
    assert parts.max() <= np.log(len(rows)) + 1e-12


def test_clients_that_are_alike_pay_nothing():
    policy = make_policy("hfedmoe", 3, mix=1.0, beta=9.0)
    for client in "abc":
        policy.tell(client, {"gate_mean": MEAN["ben"]})
    assert policy.scores("abc") == pytest.approx(np.array([MEAN["ben"]] * 3))


def test_silent_clients_train_random_experts_and_pay_nothing():
    policy = ready(seed=4)
    names = [*range(3000)]
    answer = policy.plan([*MEAN, *names])
    chosen = answer.experts_by_client()
    loads = np.bincount([chosen[name][0] for name in names], minlength=3)
    assert abs(loads - 1000).max() < 5 * (3000 * 2 / 9) ** 0.5
    policy.cancel_round()
    assert policy.plan([*MEAN, *names]).experts_by_client() == chosen
    assert answer.objective == pytest.approx(policy.scores(MEAN).max(axis=1).sum())


@given(worlds())
@settings(max_examples=drawn(40), deadline=None)
def test_limits_hold(world):
    assert_limits_hold("hfedmoe", world)


def test_it_resumes_exactly(tmp_path):
    assert_resumes("hfedmoe", tmp_path / "state", mix=0.3, beta=0.7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": 1.5}, "mix = 1.5: must be from 0 to 1"),
        ({"beta": -1}, "beta = -1: must be >= 0"),
        ({"solver": "exact"}, "solver = 'exact': policy 'hfedmoe' has solver = 'greedy'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        make_policy("hfedmoe", 3, **options)


@pytest.mark.train
def test_it_trains(tmp_path, processes):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    policy = assert_trains_and_resumes("hfedmoe", tmp_path, processes)
    told = policy.variable("gate_mean")
    told = told[told.any(axis=1)]
    assert len(told) > 3
    assert told.sum(axis=1) == pytest.approx(np.ones(len(told)))


@pytest.mark.parametrize("name", ["hfedmoe", "fedmoe"])
def test_an_even_gate_sends_clients_everywhere(name):
    policy = make_policy(name, 4)
    clients = {f"c{i}": 2 for i in range(40)}
    for client in clients:
        policy.tell(client, {signal: [0.25] * 4 for signal in policy.signals("before")})
    answer = policy.plan(clients)
    assert answer.loads.min() >= 4
    first = answer.experts_by_client()
    policy.cancel_round()
    assert policy.plan(clients).experts_by_client() == first
