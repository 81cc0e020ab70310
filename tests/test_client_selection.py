"""Client selection in front of the assignment: Oort's score by hand, the draw, and the scheduler that uses it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_tools import finish, frozen, record_values

from fedmoe_sched.errors import InputError
from fedmoe_sched.policies import load_policy, make_policy
from fedmoe_sched.scores import CapacityProfile, ExpertCost, SelectionOptions, select_clients, selection_scores

# Scores ----------------------------------------------------------------------------------------------------------


def test_scores_by_hand():
    options = SelectionOptions(2, seconds=10.0, time_exponent=2.0, staleness=0.5)
    # 21 clients, so that the 95 % quantile is the second largest: 4 of [4, 4, 8, 1, 0 ...].
    utility = np.zeros(21)
    utility[:4] = [4, 4, 8, 1]
    seconds = np.full(21, 5.0)
    seconds[1] = 20.0
    last = np.full(21, 4.0)
    last[3] = 1.0
    scores = selection_scores(utility, seconds, last, 4, options)
    bonus = math.sqrt(0.5 * math.log(4) / 4)
    assert scores[:5] == pytest.approx([1 + bonus, (1 + bonus) / 4, 1 + bonus, 0.25 + 2 * bonus, bonus])


def test_scores_without_any_utility_or_client():
    options = SelectionOptions(2, staleness=0.0)
    assert selection_scores([0.0, 0.0], [0, 0], [1, 1], 5, options).tolist() == [1.0, 1.0]
    assert selection_scores([], [], [], 5, options).tolist() == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"clients": 0}, "selection: clients = 0: must be a whole number >= 1"),
        ({"clients": 2.0}, "selection: clients = 2.0: must be a whole number >= 1"),
        ({"clients": 2, "exploration": 1.5}, "selection: exploration = 1.5: must be from 0 to 1"),
        ({"clients": 2, "staleness": math.inf}, "selection: staleness = inf: must be finite and >= 0"),
        ({"clients": 2, "seconds": 0.0}, "selection: seconds = 0.0: must be > 0, or None"),
        ({"clients": 2, "colour": 1}, "selection: .*unexpected keyword argument 'colour'"),
        ({}, "selection: .*missing 1 required positional argument: 'clients'"),
        (7, "selection = 7: must be a SelectionOptions or a mapping of its fields"),
    ],
)
def test_wrong_options(wrong, message):
    with pytest.raises(InputError, match=message):
        make_policy("balanced", 3, selection=wrong)


# The draw --------------------------------------------------------------------------------------------------------


@given(
    known=st.lists(st.booleans(), min_size=1, max_size=30),
    places=st.integers(1, 40),
    exploration=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_the_draw_fills_the_places(known, places, exploration, seed):
    options = SelectionOptions(places, exploration=exploration, least_exploration=0.0)
    mask = np.array(known)
    scores = np.random.default_rng(seed).random(len(mask))
    chosen = select_clients(scores, mask, np.ones(len(mask)), 1, options, seed)
    assert len(chosen) == len(set(chosen.tolist())) == min(places, len(mask))
    assert chosen.tolist() == sorted(chosen)
    new = int((~mask[chosen]).sum())
    wanted = min((~mask).sum(), math.floor(exploration * min(places, len(mask)) + 0.5))
    assert new == wanted or mask[chosen].sum() == mask.sum()  # the places that known clients could not fill
    again = select_clients(scores, mask, np.ones(len(mask)), 1, options, seed)
    assert again.tolist() == chosen.tolist()


def test_only_scores_near_the_top_have_a_chance_and_larger_ones_a_larger_chance():
    options = SelectionOptions(2, exploration=0.0, least_exploration=0.0, cutoff=0.5)
    scores = np.array([1.0, 4.0, 2.0, 0.9, 8.0])  # the second is 4: 2 and above may be drawn
    known, speed = np.ones(5, dtype=bool), np.ones(5)
    counts = np.zeros(5)
    for seed in range(600):
        counts[select_clients(scores, known, speed, 1, options, seed)] += 1
    assert counts[[0, 3]].tolist() == [0, 0]
    assert counts[4] > counts[1] > counts[2] > 0
    # Two of three in proportion to 4, 2 and 8, without replacement.
    left_out = {
        1: 2 / 14 * 8 / 12 + 8 / 14 * 2 / 6,
        2: 4 / 14 * 8 / 10 + 8 / 14 * 4 / 6,
        4: 4 / 14 * 2 / 10 + 2 / 14 / 3,
    }
    for client, share in left_out.items():
        assert 1 - counts[client] / 600 == pytest.approx(share, abs=0.07)


def test_faster_newcomers_have_the_higher_chance():
    options = SelectionOptions(1)
    counts = np.zeros(3)
    for seed in range(300):
        counts[
            select_clients(np.zeros(3), np.zeros(3, dtype=bool), np.array([1.0, 8.0, 1.0]), 1, options, seed)
        ] += 1
    assert counts[1] / 300 == pytest.approx(0.8, abs=0.08)


# In a scheduler --------------------------------------------------------------------------------------------------


def test_the_client_with_the_highest_loss_comes_back_and_the_slow_one_does_not():
    options = SelectionOptions(
        2, exploration=1.0, exploration_decay=0.0, least_exploration=0.0, staleness=0.0, seconds=10.0
    )
    policy = make_policy("greedy", 2, selection=options)
    utility = {"a": 1.0, "b": 9.0, "c": 9.0, "d": 2.0}
    seconds = {"a": 1.0, "b": 100.0, "c": 10.0, "d": 5.0}
    met = set()
    while met != set(utility):
        met |= set(finish_all(policy, policy.plan([c for c in utility if c not in met]), utility, seconds))
    assert list(policy.plan(list(utility)).experts_by_client()) == ["c", "d"]


def finish_all(policy, plan, utility, seconds):
    clients = list(plan.experts_by_client())
    for client, experts in plan.experts_by_client().items():
        policy.report(client, dict.fromkeys(experts, (10, 0.5)), seconds=seconds[client])
    policy.close_round()
    for client in clients:
        policy.tell(client, {"oort_utility": utility[client]})
    return clients


@pytest.mark.parametrize("name", ["random", "balanced", "flex-moe", "fedamole"])
def test_selection_in_front_of_a_policy_survives_saving(tmp_path, name):
    policy = make_policy(name, 3, default_capacity=2, selection=SelectionOptions(3), seed=4)
    assert policy.signals("after")[-1] == "oort_utility"
    generator = np.random.default_rng(0)

    def play(one, rng, first):
        answer = one.plan({f"c{i}": i % 3 for i in range(first, first + 9)})
        finish(one, rng)
        for client, experts in answer.experts_by_client().items():
            if experts:
                one.tell(client, {"oort_utility": float(rng.random())})
        planned = {client: experts for client, experts in answer.experts_by_client().items() if experts}
        return planned, record_values(one.close_round())

    for first in (0, 2):
        plan, record = play(policy, generator, first)
        assert len(plan) == record["planned"] == 3
        assert record["available"] == 9
    policy.save(tmp_path / "state")
    again = load_policy(tmp_path / "state")
    rounds = [play(one, np.random.default_rng(1), 1) for one in (policy, again)]
    assert rounds[0] == rounds[1]
    assert frozen(policy) == frozen(again)


def test_a_cancelled_plan_chooses_the_same_again_and_nobody_able_is_no_error():
    policy = make_policy("random", 3, selection={"clients": 2})
    first = policy.plan(range(6)).experts_by_client()
    policy.cancel_round()
    assert policy.plan(range(6)).experts_by_client() == first
    policy.cancel_round()
    assert policy.clients == tuple(range(6))
    assert policy.plan(dict.fromkeys(range(6), 0)).loads.tolist() == [0, 0, 0]


def test_fast_phones_are_tried_first():
    cost = ExpertCost(expert_bytes=1e6, samples=100)
    fast, slow = CapacityProfile(ms_per_sample=1), CapacityProfile(ms_per_sample=1e4)
    first = 0
    for seed in range(20):
        policy = make_policy("random", 2, expert_cost=cost, selection={"clients": 1}, seed=seed)
        (client,) = policy.plan({"slow": slow, "fast": fast}).experts_by_client()
        first += client == "fast"
    assert first >= 19


@pytest.mark.train
def test_a_training_run_asks_for_the_utility_and_resumes(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("pydantic")
    pytest.importorskip("sklearn")
    from fedmoe_sched.federated import TrainConfig, run_training

    config = TrainConfig.from_dict(
        {
            "policy": "balanced",
            "policy_options": {"selection": {"clients": 3}},
            "rounds": 4,
            "data": {"train_samples": 160, "test_samples": 40},
            "clients": {"count": 8, "min_samples": 4},
            "model": {"experts": 3, "channels": [4], "expert_hidden": 0},
        }
    )
    whole = run_training(config, tmp_path / "whole").records
    run_training(config.updated({"rounds": 2}), tmp_path / "parts")
    parts = run_training(config, tmp_path / "parts", resume=True).records
    assert [r["planned"] for r in whole] == [3, 3, 3, 3]
    assert [(r["accuracy"], r["loads"], r["client_jain"]) for r in whole] == [
        (r["accuracy"], r["loads"], r["client_jain"]) for r in parts
    ]
    utility = load_policy(sorted((tmp_path / "whole").glob("**/policy.npz"))[-1]).variable("oort_utility")
    assert 3 <= (utility > 0).sum() <= 8
