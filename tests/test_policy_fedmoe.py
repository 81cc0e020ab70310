"""FedMoE: coverage, recommendation, trial and freeze by hand, and its life in files and in training."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_tools import assert_limits_hold, assert_resumes, assert_trains_and_resumes, worlds
from scheduler_tools import frozen

from fedmoe_sched import InputError
from fedmoe_sched.policies import load_policy, make_policy
from fedmoe_sched.policies.fedmoe import covering

ACTIVATION = {
    "anna": [0.5, 0.3, 0.1, 0.1, 0, 0],
    "ben": [0.4, 0.35, 0.25, 0, 0, 0],
    "carl": [0.4, 0.2, 0.1, 0.3, 0, 0],
    "dora": [0, 0, 0, 0, 1, 0],  # has nothing in common with the others
}
# With alpha = 0.5: {0, 1}, {0, 1, 2}, {0, 1, 3}, and {4}, which covers all.
CAPACITY = {"anna": 4, "ben": 6, "carl": 6, "dora": 6}


def ready(**options):
    """Return a policy whose clients keep their sets after one round."""
    options = {"alpha": 0.5, "coverage_rounds": 1, "patience": 2, "peers": 2} | options
    policy = make_policy("fedmoe", 6, **options)
    for client, capacity in CAPACITY.items():
        policy.add_client(client, capacity=capacity)
        policy.tell(client, {"gate_mean": ACTIVATION[client]})
    train(policy, dict.fromkeys(CAPACITY, 0.5))
    return policy


def train(policy, accuracies):
    """Run a round, and return the plan."""
    plan = policy.plan(list(accuracies)).experts_by_client()
    for client, experts in plan.items():
        policy.report(client, dict.fromkeys(experts, (10, 0.5)))
    policy.close_round()
    for client, accuracy in accuracies.items():
        policy.tell(client, {"accuracy": accuracy})
    return plan


def planned(policy, client):
    experts = policy.plan([client]).experts_by_client()[client]
    policy.cancel_round()
    return experts


# Coverage --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 6))
@settings(deadline=None)
def test_the_bisection_finds_the_best_of_all_choices(mass, budget):
    chosen = covering(np.array([mass], dtype=float), np.array([budget]))[0]
    sets = [s for size in range(budget + 1) for s in itertools.combinations(range(len(mass)), size)]
    most = max(sum(mass[j] for j in s) for s in sets)
    assert sum(np.array(mass)[chosen]) == most
    assert chosen.sum() == min(len(s) for s in sets if sum(mass[j] for j in s) == most)


def test_it_is_the_choice_of_most_mass():
    mass = np.random.default_rng(0).random((200, 7))
    budget = np.arange(200) % 8
    top = np.argsort(np.argsort(-mass, axis=1), axis=1) < budget[:, None]
    assert (covering(mass, budget) == top).all()


def test_the_budget_is_a_share_of_the_capacity():
    policy = ready()
    answer = policy.plan(list(CAPACITY))
    assert answer.experts_by_client() == {"anna": [0, 1], "ben": [0, 1, 2], "carl": [0, 1, 3], "dora": [4]}
    assert answer.objective == pytest.approx(0.8 + 1.0 + 0.9 + 1.0)
    assert answer.gap == pytest.approx(0)
    low = make_policy("fedmoe", 6, alpha=0.1)
    low.tell("anna", {"gate_mean": ACTIVATION["anna"]})
    assert low.plan({"anna": 4}).experts_by_client() == {"anna": [0]}


def test_the_set_follows_activation_for_some_rounds_and_is_kept_then():
    policy = make_policy("fedmoe", 2, coverage_rounds=2)
    sets = []
    for activation in ([1, 0], [0, 1], [1, 0]):
        policy.tell("anna", {"gate_mean": activation})
        sets.append(train(policy, {"anna": 0.5})["anna"])
    assert sets == [[0], [1], [1]]


def test_rounds_that_fail_do_not_count():
    policy = make_policy("fedmoe", 2, coverage_rounds=1)
    policy.tell("anna", {"gate_mean": [1, 0]})
    policy.plan(["anna"])
    policy.report("anna", failed=True)
    policy.close_round()
    policy.tell("anna", {"gate_mean": [0, 1]})
    assert planned(policy, "anna") == [1]


def test_silent_clients_train_random_experts():
    policy = make_policy("fedmoe", 4, alpha=1.0, seed=2)
    loads = policy.plan(range(4000)).loads
    assert abs(loads - 1000).max() < 5 * (4000 * 3 / 16) ** 0.5


# Recommendation, trial, freeze -----------------------------------------------------------------------------------


def test_a_stalled_client_gets_what_its_peers_have():
    # Cosines of anna with ben 0.936, with carl 0.913. Both have 3 experts, she has 2. Estimates, up to a factor:
    # expert 2 from ben 0.936 * 0.25 = 0.234, expert 3 from carl 0.913 * 0.3 = 0.274; her own 0.1 do not count.
    policy = ready()
    train(policy, {"anna": 0.5})
    assert planned(policy, "anna") == [0, 1]
    train(policy, {"anna": 0.4})
    assert planned(policy, "anna") == [0, 1, 3]
    assert [planned(policy, client) for client in ("ben", "carl", "dora")] == [[0, 1, 2], [0, 1, 3], [4]]


def test_the_number_of_peers_counts():
    policy = ready(peers=1, patience=1)
    train(policy, {"anna": 0.5})
    assert planned(policy, "anna") == [0, 1, 2]


def test_a_client_with_more_than_its_peers_drops_its_lowest():
    # The nearest to ben is anna, who has 2: he drops expert 2 with 0.25.
    policy = ready(peers=1, patience=1)
    train(policy, {"ben": 0.5})
    assert planned(policy, "ben") == [0, 1]


def test_no_peers_no_change_and_the_count_starts_anew():
    policy = ready(patience=2)
    for stalled in (1, 0, 1):
        train(policy, {"dora": 0.5})
        assert policy.variable("stalled", ["dora"]).tolist() == [stalled]
    assert planned(policy, "dora") == [4]


def test_nothing_is_added_beyond_capacity_or_eligibility():
    full = ready(patience=1)
    full.add_client("anna", capacity=2)
    train(full, {"anna": 0.5})
    assert planned(full, "anna") == [0, 1]
    barred = ready(patience=1)
    barred.add_client("anna", eligible=[0, 1, 2])
    train(barred, {"anna": 0.5})
    assert planned(barred, "anna") == [0, 1, 2]


def test_a_rise_confirms_the_new_set_and_no_rise_ends_it():
    for accuracy, after, phase in ((0.51, [0, 1, 3], 1), (0.5, [0, 1], 3)):
        policy = ready(patience=1)
        train(policy, {"anna": 0.5})
        assert policy.variable("phase", ["anna"]).tolist() == [2]
        train(policy, {"anna": accuracy})
        assert planned(policy, "anna") == after
        assert policy.variable("phase", ["anna"]).tolist() == [phase]


def test_who_went_back_stays_for_good():
    policy = ready(patience=1)
    for accuracy in (0.5, 0.5, 0.9, 0.1, 0.1, 0.1):
        train(policy, {"anna": accuracy})
    policy.tell("anna", {"gate_mean": ACTIVATION["dora"]})
    assert planned(policy, "anna") == [0, 1]


def test_a_confirmed_client_may_be_recommended_again():
    policy = ready(patience=1)
    for accuracy in (0.5, 0.6):
        train(policy, {"anna": accuracy})
    train(policy, {"anna": 0.6})  # peers have 3, like her: nothing to change
    assert policy.variable("phase", ["anna"]).tolist() == [1]
    assert planned(policy, "anna") == [0, 1, 3]
    for _ in range(2):  # eva, the nearest by far, keeps a single expert
        policy.tell("eva", {"gate_mean": ACTIVATION["anna"]})
        train(policy, {"eva": 0.5})
    policy.peers = 1
    train(policy, {"anna": 0.6})
    assert planned(policy, "anna") == [0]


def test_a_rise_within_the_tolerance_is_none():
    policy = ready(tolerance=0.02, patience=1)
    train(policy, {"anna": 0.515})
    assert policy.variable("best", ["anna"]).tolist() == [0.5]
    assert planned(policy, "anna") == [0, 1, 3]


def test_a_set_shrinks_and_comes_back_with_the_capacity():
    policy = ready()
    for capacity, experts in ((1, [0]), (2, [0, 1]), (0, []), (6, [0, 1, 2])):
        assert policy.plan({"ben": capacity}).experts_by_client() == {"ben": experts}
        policy.close_round()
    policy.add_client("ben", eligible=[3, 4])
    assert len(planned(policy, "ben")) == 1  # none of its own: coverage, and chance, choose among the two


def test_planning_changes_nothing():
    policy = ready(patience=1)
    train(policy, {"anna": 0.5})
    before = frozen(policy)
    first = policy.plan(list(CAPACITY)).experts_by_client()
    policy.cancel_round()
    assert frozen(policy) == before
    assert policy.plan(list(CAPACITY)).experts_by_client() == first


def test_a_trial_survives_the_file(tmp_path):
    policy = ready(patience=1)
    train(policy, {"anna": 0.5})
    policy.save(tmp_path / "state")
    again = load_policy(tmp_path / "state")
    assert again.options() == policy.options()
    for one in (policy, again):
        assert train(one, {"anna": 0.5}) == {"anna": [0, 1, 3]}
        assert planned(one, "anna") == [0, 1]


@given(worlds(), st.integers(1, 3))
@settings(max_examples=drawn(40), deadline=None)
def test_limits_hold(world, rounds):
    policy = assert_limits_hold("fedmoe", world, coverage_rounds=rounds, patience=1, peers=2)
    assert set(policy.variable("phase").tolist()) <= {0, 1, 2, 3}


def test_it_resumes_exactly(tmp_path):
    assert_resumes("fedmoe", tmp_path / "state", alpha=0.7, coverage_rounds=1, patience=1, peers=3, tolerance=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha = 1.5: must be from 0 to 1"),
        ({"patience": 0}, "patience = 0: must be >= 1"),
        ({"peers": 1.5}, "peers = 1.5: must be a whole number"),
        ({"coverage_rounds": 0}, "coverage_rounds = 0: must be >= 1"),
        ({"tolerance": -1}, "tolerance = -1: must be >= 0"),
        ({"fill": False}, "fill = False: policy 'fedmoe' has fill = True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        make_policy("fedmoe", 3, **options)


@pytest.mark.train
def test_it_trains(tmp_path, processes):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    policy = assert_trains_and_resumes("fedmoe", tmp_path, processes)
    assert (policy.variable("best") >= 0).sum() > 3  # they have told their accuracy
    told, chosen = policy.variable("gate_mean"), policy.variable("chosen") > 0
    assert chosen.any(axis=1).sum() > 3
    assert told.sum(axis=1)[chosen.any(axis=1)] == pytest.approx(1)
