"""Fairness over time: queues and deficits by hand, what they guarantee, and the scheduler that keeps them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_tools import finish, frozen, record_values

from fedmoe_sched import CapacityProfile, ExpertCost, InputError, LoadPenalty, Scheduler, schedule
from fedmoe_sched.policies import load_policy, make_policy
from fedmoe_sched.scores import FairnessOptions, client_queues, expert_deficits, fairness_gains

# Arrays ----------------------------------------------------------------------------------------------------------


def test_queues_by_hand():
    queue = client_queues(
        [0, 0.5, 3, 0.2], [0.5, 0.25, 1, 0.5], [True, True, True, False], [False, True, True, False]
    )
    assert queue.tolist() == [0.5, 0, 3, 0.2]
    assert client_queues([1.0, 0.0], 0.5, able=True, participated=False).tolist() == [1.5, 0.5]


def test_deficits_by_hand():
    assert expert_deficits([0, 2, 0.5], [6, 0, 0], 0.5).tolist() == [0, 3, 1.5]
    assert expert_deficits([1, 0], [0, 0], 1.0).tolist() == [1, 0]


def test_gains_by_hand():
    options = FairnessOptions(client_weight=0.5, expert_weight=2.0)
    assert fairness_gains([0, 3], [1, 0], options).tolist() == [[2, 0], [3.5, 1.5]]


@given(
    st.lists(st.tuples(st.booleans(), st.booleans()), max_size=60),
    st.sampled_from([0.0, 0.125, 0.5, 1.0]),
)
def test_a_client_took_part_as_often_as_guaranteed_less_its_queue(rounds, rate):
    queue = np.zeros(1)
    for able, participated in rounds:
        queue = client_queues(queue, rate, [able], [able and participated])
    there = sum(able for able, _ in rounds)
    assert sum(able and participated for able, participated in rounds) >= rate * there - queue[0]


@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=40), st.sampled_from([0.0, 0.5, 1.0])
)
def test_an_expert_got_its_share_less_its_deficit(rounds, share):
    deficit = np.zeros(3)
    for loads in rounds:
        deficit = expert_deficits(deficit, loads, share)
    got = np.reshape(rounds, (-1, 3)).sum(axis=0)
    assert (got >= share * got.mean() - deficit - 1e-9).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: client_queues([-1], 0.5, True, True), r"queue\[0\] = -1.0: must be >= 0"),
        (lambda: client_queues([1, 2], [0.5, np.nan], True, True), r"rate\[1\] = nan"),
        (lambda: expert_deficits([0, 0], [1], 1.0), "loads: has shape"),
        (lambda: expert_deficits([0, 0], [1, -1], 1.0), r"loads\[1\] = -1.0: must be >= 0"),
        (lambda: FairnessOptions(client_rate=1.5), "fairness: client_rate = 1.5: must be from 0 to 1"),
        (lambda: FairnessOptions(expert_weight=-1.0), "fairness: expert_weight = -1.0: must be finite and >= 0"),
        (lambda: Scheduler(2, fairness={"rate": 1}), "fairness: .*unexpected keyword argument 'rate'"),
        (lambda: Scheduler(2, fairness={}, fitness_weight=0), "fitness_weight = 0.0: must be > 0 with fairness"),
        (
            lambda: Scheduler(2).add_client("a", rate=0.5),
            "client 'a': rate: the scheduler needs fairness to use it",
        ),
        (lambda: Scheduler(2, fairness={}).add_client("a", rate=2), "client 'a': rate = 2: must be from 0 to 1"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(InputError, match=message):
        call()


def test_a_deficit_is_a_negative_history_without_the_rest_of_the_penalty():
    # Of the penalty's weight * (load + history - 1/2) per client, the gain is the part weight * history.
    fitness, owed = np.array([[0.9, 0.5], [0.9, 0.5], [0.9, 0.5]]), np.array([0.0, 5.0])
    gained = fitness + fairness_gains(np.zeros(3), owed, FairnessOptions(expert_weight=0.1))
    assert schedule(gained, [1, 1], 1, balance=None).loads.tolist() == [0, 3]
    penalty = LoadPenalty.quadratic(0.1, history=-owed)
    assert schedule(fitness, [1, 1], 1, balance=None, load_penalty=penalty).loads.tolist() == [1, 2]


# In a scheduler --------------------------------------------------------------------------------------------------

SKILL = {"a": 0.9, "b": 0.8, "c": 0.3, "d": 0.2}


def played(fairness, rounds=200, *, clients=SKILL, **options):
    """Let four clients of unlike fitness compete for two places a round; return the share each took part in."""
    options = {"fill": False, "balance": None, "load_max": 1, "usage_weight": 0.0} | options
    scheduler = Scheduler(2, fairness=fairness, **options)
    for client in clients:
        scheduler.add_client(client, fitness=[SKILL[client]] * 2)
    times = dict.fromkeys(clients, 0)
    for _ in range(rounds):
        for client, experts in scheduler.plan(list(clients)).experts_by_client().items():
            times[client] += bool(experts)
            scheduler.report(client, dict.fromkeys(experts, (10, SKILL[client])))
        record = scheduler.close_round()
    return {client: count / rounds for client, count in times.items()}, scheduler, record


def test_a_feasible_rate_is_met_with_queues_and_not_without():
    without, _, unfair = played(None)
    assert without == {"a": 1, "b": 1, "c": 0, "d": 0}
    shares, scheduler, record = played({"client_rate": 0.4})
    queue = scheduler.variable("fair_queue")
    assert (queue < 12).all()  # bounded: (0.9 - 0.2) / 0.1 and a little
    for share, owed in zip(shares.values(), queue, strict=True):
        assert share >= 0.4 - owed / 200
    assert shares["a"] == pytest.approx(0.8, abs=0.05)  # who is better has what is left
    assert shares["d"] == pytest.approx(0.4, abs=0.05)
    assert record.client_jain > 0.85  # 4 / (4 * (0.8^2 + 3 * 0.4^2)) = 0.89 in the long run
    assert unfair.client_jain == 0.5


def test_a_smaller_weight_meets_the_same_rate_later():
    _, slow, _ = played({"client_rate": 0.4, "client_weight": 0.02}, rounds=80)
    _, fast, _ = played({"client_rate": 0.4, "client_weight": 1.0}, rounds=80)
    assert slow.variable("fair_queue").max() > 25
    assert fast.variable("fair_queue").max() < 4


def test_rates_that_no_schedule_meets_are_shared_evenly():
    shares, scheduler, _ = played({"client_rate": 0.8})
    assert all(share == pytest.approx(0.5, abs=0.05) for share in shares.values())
    assert (scheduler.variable("fair_queue") > 50).all()


def test_experts_are_owed_clients():
    def loads(fairness):
        scheduler = Scheduler(2, fairness=fairness, balance=None, usage_weight=0.0)
        for client in range(3):
            scheduler.add_client(client, fitness=[0.9, 0.5])
        total = np.zeros(2)
        for _ in range(60):
            for client, experts in scheduler.plan(range(3)).experts_by_client().items():
                scheduler.report(client, {expert: (10, [0.9, 0.5][expert]) for expert in experts})
            record = scheduler.close_round()
            total += record.trained_loads
        return total, scheduler.variable("fair_deficit") if fairness else None, record

    total, _, record = loads(None)
    assert total.tolist() == [180, 0]
    assert record.expert_jain == 0.5
    total, deficit, record = loads({"expert_share": 0.6})
    assert total[1] >= 0.6 * 90 - deficit[1] - 1e-9
    assert total[1] == pytest.approx(54, abs=9)
    assert record.expert_jain == pytest.approx(total.sum() ** 2 / 2 / (total**2).sum())


def test_clients_that_are_new_or_away_or_can_train_nothing():
    cost = ExpertCost(expert_bytes=1e6)
    scheduler = Scheduler(
        1,
        fairness={"client_rate": 0.5},
        fill=False,
        balance=None,
        load_max=1,
        usage_weight=0.0,
        expert_cost=cost,
        fitness={"prior": 0.1, "on_idle": "keep"},
    )

    def play(*clients):
        scheduler.plan(clients)
        scheduler.close_round()
        return dict(zip(scheduler.clients, scheduler.variable("fair_queue").tolist(), strict=True))

    scheduler.add_client("a", fitness=[0.9])
    scheduler.add_client("b", fitness=[0.5], rate=0.25)
    scheduler.add_client("tiny", profile=CapacityProfile(memory_bytes=1))
    # "a" trains, and never answers: it has had its turn. "tiny" can train nothing.
    assert play("a", "b", "tiny") == {"a": 0, "b": 0.25, "tiny": 0}
    assert play("a") == {"a": 0, "b": 0.25, "tiny": 0}
    assert play("a", "b", "c") == {"a": 0, "b": 0.5, "tiny": 0, "c": 0.5}
    scheduler.add_client("b", rate=1.0)
    assert play("a", "b") == {"a": 0, "b": 1.5, "tiny": 0, "c": 0.5}
    before = frozen(scheduler)
    scheduler.plan(["a", "b"])
    scheduler.cancel_round()
    assert frozen(scheduler) == before


@pytest.mark.parametrize("name", ["balanced", "fedjets", "random"])
def test_in_front_of_a_selection(name):
    def shares(fairness):
        selection = {"clients": 2, "exploration": 0.0, "least_exploration": 0.0}
        policy = make_policy(name, 2, selection=selection, fairness=fairness)
        times = dict.fromkeys("abcdef", 0)
        for _ in range(60):
            for client, experts in policy.plan(list(times)).experts_by_client().items():
                times[client] += bool(experts)
                policy.report(client, dict.fromkeys(experts, (10, 0.5)))
            policy.close_round()
            policy.tell(client, {"oort_utility": 1.0 if client in "ab" else 0.01})
        return np.array(list(times.values())) / 60, policy.variable("fair_queue") if fairness else None

    without, _ = shares(None)
    assert without.min() < 0.1
    fair, queue = shares({"client_rate": 0.25})
    assert (fair >= 0.25 - queue / 60).all()
    assert queue.max() < 3
    assert fair.sum() == pytest.approx(2)


@pytest.mark.parametrize("name", ["scheduler", "flex-moe"])
def test_saved_and_restored(tmp_path, name):
    options = {"selection": {"clients": 4}, "fairness": FairnessOptions(0.3, 0.2, 1.0, 0.3), "seed": 3}
    policy = make_policy(name, 3, default_capacity=2, **options)

    def play(one, rng, first):
        plan = one.plan(range(first, first + 8)).experts_by_client()
        finish(one, rng)
        return plan, record_values(one.close_round())

    generator = np.random.default_rng(0)
    for first in (0, 3, 1):
        play(policy, generator, first)
    policy.plan(range(8))
    policy.save(tmp_path / "state")
    again = load_policy(tmp_path / "state")
    assert frozen(again) == frozen(policy)
    assert policy.variable("fair_queue").max() > 0 < policy.variable("fair_deficit").max()
    ends = []
    for one in (policy, again):
        rng = np.random.default_rng(1)
        finish(one, rng)
        ends.append((record_values(one.close_round()), play(one, rng, 2), frozen(one)))
    assert ends[0] == ends[1]


def test_a_state_from_before_fairness_can_be_loaded():
    scheduler = Scheduler(2)
    scheduler.plan(["a", "b"])
    state = scheduler.state_dict()
    del state["arrays"]["trained"], state["arrays"]["open.able"]
    again = Scheduler(2)
    again.load_state_dict(state)
    assert frozen(again) == frozen(scheduler)


# Reports ---------------------------------------------------------------------------------------------------------


def test_a_schedule_tells_how_even_it_is():
    answer = schedule([[0.9, 0.1], [0.8, 0.2], [0.1, 0.7]], [1, 1], [2, 1, 1], balance=None)
    assert answer.client_jain == pytest.approx(4**2 / (3 * (4 + 1 + 1)))
    assert answer.expert_jain == 1.0
    assert "Jain's index 0.889 (clients), 1.000 (experts)" in answer.summary()
    plain = answer.to_dict()
    assert (plain["client_jain"], plain["expert_jain"]) == (answer.client_jain, answer.expert_jain)
    impossible = schedule([[0.9, 0.1]], [1, 1], 1, load_min=1)
    assert impossible.to_dict()["expert_jain"] is None


@pytest.mark.train
def test_a_training_run_with_queues_resumes(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("pydantic")
    pytest.importorskip("sklearn")
    from fedmoe_sched.federated import TrainConfig, run_training

    config = TrainConfig.from_dict(
        {
            "policy": "scheduler",
            "policy_options": {
                "fairness": {"client_rate": 0.4, "client_weight": 0.5},
                "fill": False,
                "balance": None,
                "load_max": 1,
            },
            "rounds": 4,
            "data": {"train_samples": 160, "test_samples": 40},
            "clients": {"count": 6, "min_samples": 4},
            "model": {"experts": 3, "channels": [4], "expert_hidden": 0},
        }
    )
    whole = run_training(config, tmp_path / "whole").records
    run_training(config.updated({"rounds": 2}), tmp_path / "parts")
    parts = run_training(config, tmp_path / "parts", resume=True).records
    watched = ("accuracy", "loads", "client_jain", "expert_jain")
    assert [[record[name] for name in watched] for record in whole] == [
        [record[name] for name in watched] for record in parts
    ]
    queue = load_policy(sorted((tmp_path / "whole").glob("**/policy.npz"))[-1]).variable("fair_queue")
    assert queue.max() <= 2  # 3 places for 6 clients: each trains every other round or so
    assert whole[-1]["client_jain"] > 0.85
