"""Flux: utility by hand, exploration by the round's seed, and its life in files and in training."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from policy_tools import assert_limits_hold, assert_resumes, assert_trains_and_resumes, worlds

from fedmoe_sched import InputError
from fedmoe_sched.policies import make_policy

NAN = float("nan")


def trained(policy, client, results):
    """Let a client train just these experts: {expert: (samples, gradient)}."""
    m = len(policy.experts)
    policy.add_client(client, capacity=len(results), eligible=results)
    policy.plan([client])
    policy.report(client, {expert: (samples, 0.5) for expert, (samples, _) in results.items()})
    policy.close_round()
    policy.tell(client, {"gradient": [results[e][1] if e in results else NAN for e in range(m)]})
    policy.add_client(client, capacity=1, eligible=range(m))


# Utilities 40 * 0.5 = 20, 10 * 3 = 30, 100 * 0.1 = 10.
THREE = {0: (40, 0.25), 1: (10, 9.0), 2: (100, 0.01)}


def test_the_utility_is_maximised_within_the_budget():
    policy = make_policy("flux", 4, epsilon=0, epsilon_min=0)
    trained(policy, "anna", THREE)
    assert policy.utility(["anna", "new"]) == pytest.approx(np.array([[20, 30, 10, 0], [0, 0, 0, 0]]))
    for capacity, experts, total in ((1, [1], 30), (2, [0, 1], 50), (3, [0, 1, 2], 60), (4, [0, 1, 2, 3], 60)):
        answer = policy.plan({"anna": capacity})
        assert answer.experts_by_client() == {"anna": experts}
        assert (answer.objective, answer.gap) == (pytest.approx(total), pytest.approx(0))
        policy.cancel_round()


def test_a_utility_stands_until_the_pair_is_trained_again():
    policy = make_policy("flux", 4, epsilon=0, epsilon_min=0)
    trained(policy, "anna", THREE)
    trained(policy, "anna", {1: (20, 0.01)})
    assert policy.utility(["anna"]) == pytest.approx(np.array([[20, 2, 10, 0]]))
    assert policy.variable("tries").tolist() == [[1, 2, 1, 0]]
    assert policy.variable("rounds").tolist() == [2]


def test_exploration_takes_the_least_tried_first():
    policy = make_policy("flux", 4, epsilon=1, epsilon_decay=1)
    trained(policy, "anna", THREE)
    trained(policy, "anna", {0: (1, 1.0), 2: (1, 1.0)})
    for capacity, experts in ((1, [3]), (2, [1, 3]), (4, [0, 1, 2, 3])):
        assert policy.plan({"anna": capacity}).experts_by_client() == {"anna": experts}
        policy.cancel_round()


def test_ties_in_exploration_and_new_clients_are_random():
    policy = make_policy("flux", 4, epsilon=0, epsilon_min=0, seed=1)
    loads = policy.plan(range(4000)).loads
    assert loads.sum() == 4000
    assert abs(loads - 1000).max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize(("decay", "least", "share"), [(1.0, 0.0, 0.4), (0.5, 0.0, 0.2), (0.5, 0.3, 0.3)])
def test_epsilon_fades_with_the_rounds_of_the_client(decay, least, share):
    policy = make_policy("flux", 2, epsilon=0.4, epsilon_decay=decay, epsilon_min=least)
    names = [*range(3000)]
    for name in names:
        policy.add_client(name, eligible=[0])
    policy.plan(names)
    for name in names:
        policy.report(name, {0: (10, 0.5)})
    policy.close_round()
    for name in names:
        policy.tell(name, {"gradient": [1.0, NAN]})
        policy.add_client(name, eligible=[0, 1])
    explored = policy.plan(names).loads[1] / 3000
    assert explored == pytest.approx(share, abs=5 * (0.25 / 3000) ** 0.5)


def test_a_plan_depends_on_the_round_and_the_seed_alone():
    def plans(seed):
        policy = make_policy("flux", 5, default_capacity=2, seed=seed)
        first = policy.plan(range(30)).experts_by_client()
        policy.cancel_round()
        again = policy.plan(range(30)).experts_by_client()
        policy.close_round()
        return first, again, policy.plan(range(30)).experts_by_client()

    first, again, second = plans(1)
    assert first == again != second
    assert plans(1) == (first, again, second)
    assert plans(2)[0] != first


@given(worlds())
@settings(max_examples=drawn(40), deadline=None)
def test_limits_hold(world):
    assert_limits_hold("flux", world)


def test_it_resumes_exactly(tmp_path):
    assert_resumes("flux", tmp_path / "state", epsilon=0.3, epsilon_decay=0.8, epsilon_min=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 1.5}, "epsilon = 1.5: must be from 0 to 1"),
        ({"epsilon_decay": -1}, "epsilon_decay = -1: must be from 0 to 1"),
        ({"epsilon_min": "x"}, "epsilon_min = 'x': must be a finite number"),
        ({"balance": 0.25}, "balance = 0.25: policy 'flux' has balance = None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        make_policy("flux", 3, **options)


def test_a_gradient_below_zero_is_refused():
    policy = make_policy("flux", 2)
    with pytest.raises(InputError, match=r"client 'a': signal 'gradient'\[1\] = -1.0: must be >= 0"):
        policy.tell("a", {"gradient": [1.0, -1.0]})
    assert policy.clients == ()


@pytest.mark.train
def test_it_trains(tmp_path, processes):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    policy = assert_trains_and_resumes("flux", tmp_path, processes)
    utility = policy.utility(policy.clients)
    assert (utility[policy.variable("tries") > 0] > 0).all()
    assert (utility > 0).sum() > 6
