"""FedJETs: who becomes an anchor, what the gate decides, and who comes and goes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_tools import frozen, simulate

from fedmoe_sched import InputError
from fedmoe_sched.policies import load_policy, make_policy
from fedmoe_sched.policies.client_rule import best_pairs
from fedmoe_sched.policies.fedjets import FedJetsPolicy

# Shares 1 0 0 | .5 .5 0 | 0 .9 .1 | 0 0 1 | .4 .3 .3
LABELS = {"a": [4, 0, 0], "b": [5, 5, 0], "c": [0, 9, 1], "d": [0, 0, 7], "e": [4, 3, 3]}
GATE = {"a": [0.1, 0.2, 0.7], "b": [0.5, 0.2, 0.3], "e": [0.2, 0.5, 0.3]}


def ready(labels=LABELS, gate=GATE, **options):
    policy = FedJetsPolicy(3, **{"default_capacity": 3} | options)
    for client, counts in labels.items():
        policy.tell(client, {"labels": counts})
    for client, row in gate.items():
        policy.tell(client, {"gate_mean": row})
    return policy


def closed(policy, clients):
    plan = policy.plan(list(clients)).experts_by_client()
    for client, experts in plan.items():
        policy.report(client, dict.fromkeys(experts, (10, 0.5)))
    policy.close_round()
    return plan


class TestAnchors:
    def test_three_by_hand(self):
        # The mean share is .38 .34 .28: a is at distance .62, b .28, c .56, d .72, e .04. So d comes first; then a
        # is at distance 1 from d, b 1, c .9, e .7: a, known before b. From the nearer of the two b is at .5, c at
        # .9, e at .6.
        policy = ready()
        assert policy.anchors == {"d": 0, "a": 1, "c": 2}
        assert policy.variable("anchor").tolist() == [-1] * 5  # not fixed before a round has closed
        assert closed(policy, "abcde") == {"a": [1], "b": [0, 2], "c": [2], "d": [0], "e": [1, 2]}
        assert policy.variable("anchor").tolist() == [1, -1, 2, 0, -1]

    def test_fixed_by_the_first_round_for_good(self):
        policy = ready()
        closed(policy, "b")  # whoever is there
        policy.tell("f", {"labels": [0, 100, 0]})
        policy.tell("a", {"labels": [1, 1, 1]})
        policy.add_client("d", eligible=[1, 2])
        assert policy.anchors == {"d": 0, "a": 1, "c": 2}

    def test_a_round_that_is_cancelled_fixes_nothing(self):
        policy = ready()
        policy.plan([*"abcde"])
        policy.cancel_round()
        policy.tell("f", {"labels": [0, 5, 0]})  # pure, where c was not
        assert policy.anchors == {"d": 0, "a": 1, "f": 2}

    def test_not_before_enough_clients_have_told(self):
        few = {client: LABELS[client] for client in "ab"}
        policy = ready(few)
        policy.add_client("c")
        policy.tell("d", {"labels": [0, 0, 0]})  # no samples: nothing told
        assert policy.anchors == {}
        assert ready(candidates=6).anchors == {}
        # Two clients, the mean at .75 .25: both at .25, the first one wins. No third client for expert 2.
        assert ready(few, candidates=2).anchors == {"a": 0, "b": 1}

    def test_the_vacancies_are_filled_when_somebody_comes(self):
        policy = ready({client: LABELS[client] for client in "ab"}, candidates=1)
        closed(policy, "ab")
        for client in "ec":
            policy.tell(client, {"labels": LABELS[client]})
        assert policy.anchors == {"a": 0, "b": 1, "c": 2}  # .5 from b, e is .3 from it

    def test_only_clients_that_may_train_the_expert(self):
        policy = ready()
        policy.add_client("d", eligible=[1, 2])
        policy.add_client("a", capacity=0)
        policy.add_client("b", eligible=[2])
        # Of c and e, for expert 0, c is farther from the mean .225 .425 .35 of b, c, d, e; then d is farthest for
        # expert 1. From c, b is at .5 and e at .6, from d farther.
        assert policy.anchors == {"c": 0, "d": 1, "e": 2}
        for client in LABELS:
            policy.add_client(client, eligible=[0, 1])
        assert set(policy.anchors.values()) == {0, 1}

    @pytest.mark.parametrize("change", [{"capacity": 0}, {"eligible": [0, 2]}])
    def test_one_that_cannot_is_like_others_until_it_can(self, change):
        policy = ready()
        closed(policy, "abcde")
        policy.add_client("a", **change)
        others = [] if "capacity" in change else [0, 2]
        assert closed(policy, "ab")["a"] == others
        policy.add_client("a", capacity=1, eligible=[0, 1, 2])
        assert closed(policy, "ab") == {"a": [1], "b": [0, 2]}

    def test_one_that_is_away_leaves_its_expert_to_the_gate(self):
        policy = ready()
        closed(policy, "abcde")
        assert closed(policy, "be") == {"b": [0, 2], "e": [1, 2]}


class TestGate:
    def test_at_most_k_and_never_more_than_the_capacity(self):
        assert [len(closed(ready(top_k=k), "be")["b"]) for k in (1, 2, 3)] == [1, 2, 3]
        policy = ready(top_k=3)
        policy.add_client("b", capacity=1)
        policy.add_client("e", eligible=[0, 2], capacity=1)
        assert closed(policy, "be") == {"b": [0], "e": [2]}

    def test_the_objective_is_what_the_gate_gives(self):
        answer = ready().plan([*"be"])
        assert answer.objective == pytest.approx(0.5 + 0.3 + 0.5 + 0.3)
        assert answer.gap == pytest.approx(0, abs=1e-12)

    def test_fitness_given_up_is_that_of_all_eligible_pairs(self):
        policy = ready(gate={"b": [0.5, 0.4, 0.1]}, top_k=1)
        policy.add_client("b", fitness=[0.2, 0.3, 0.5], capacity=2)
        policy.plan(["b"])
        assert policy.close_round().fitness_given_up == pytest.approx((0.8 - 0.2) / 0.8)

    def test_who_has_told_nothing_chooses_at_random(self):
        policy = make_policy("fedjets", 4, default_capacity=2)
        plans = [policy.plan(range(300)).pairs.mask()]
        policy.cancel_round()
        assert (policy.plan(range(300)).pairs.mask() == plans[0]).all()
        loads = policy.close_round().loads
        assert sum(loads) == 600
        assert min(loads) > 110  # of 150; to the lower number it would be 0
        assert (policy.plan(range(300)).pairs.mask() != plans[0]).any()

    def test_ties_are_broken_evenly_and_only_ties(self):
        scores = np.tile([0.5, 0.2, 0.2, 0.2], (3000, 1))
        eligible = np.ones(scores.shape, dtype=bool)
        eligible[:, 3] = False
        chosen = best_pairs(scores, np.full(3000, 2), eligible, seed=1)
        assert chosen.sum(axis=0) == pytest.approx([3000, 1500, 1500, 0], abs=150)
        assert (chosen.sum(axis=1) == 2).all()


@given(st.data())
def test_capacity_eligibility_and_k_are_kept(data):
    n, m, k = (data.draw(st.integers(1, 5)) for _ in range(3))
    policy = FedJetsPolicy(m, top_k=k, candidates=data.draw(st.integers(1, 5)), seed=data.draw(st.integers(0, 9)))
    room = {}
    for client in range(n):
        capacity = data.draw(st.integers(0, 4))
        eligible = data.draw(st.sets(st.integers(0, m - 1)))
        policy.add_client(client, capacity=capacity, eligible=eligible)
        if data.draw(st.booleans()):
            counts = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=2))
            policy.tell(client, {"labels": counts, "gate_mean": np.arange(m) == client})
        room[client] = (capacity, eligible)
    for _ in range(2):
        available = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
        anchors = policy.anchors
        assert len(set(anchors.values())) == len(anchors)
        for client, experts in closed(policy, available).items():
            capacity, eligible = room[client]
            assert set(experts) <= eligible
            own = client in anchors and anchors[client] in eligible and capacity > 0
            assert len(experts) == (1 if own else min(capacity, k, len(eligible)))
            if own:
                assert experts == [anchors[client]]


@pytest.mark.parametrize("stop", [1, 3])
def test_saved_in_mid_run_it_goes_on_the_same(tmp_path, stop):
    def run(stop):
        policy, generator = FedJetsPolicy(4, default_capacity=2, candidates=9, seed=5), np.random.default_rng(2)
        rounds = []
        for number in range(5):
            clients = generator.permutation(20)[:8]
            for client in clients:
                told = {"labels": generator.integers(0, 9, 3), "gate_mean": generator.random(4).round(1)}
                policy.tell(client, told)
            if number == stop:
                policy.save(tmp_path / "state")
                policy = load_policy(tmp_path / "state")
                assert policy.candidates == 9
            rounds.append(simulate(policy, clients, generator))
        assert len(policy.anchors) == 4
        return [*rounds, frozen(policy)]

    assert run(stop) == run(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k = 0: must be >= 1"),
        ({"top_k": 1.5}, "top_k = 1.5: must be a whole number"),
        ({"candidates": 0}, "candidates = 0: must be >= 1"),
        ({"solver": "auto"}, "solver = 'auto': policy 'fedjets' has solver = 'greedy'"),
        ({"load_max": [1, 1, 1]}, "policy 'fedjets' has load_max = None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        make_policy("fedjets", 3, **options)


@pytest.mark.train
def test_it_trains_resumes_and_keeps_its_anchors(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    from method_tools import assert_resumes, last_policy

    run = assert_resumes("fedjets", tmp_path, workers=2, **{"local.train_extractor": False})
    anchors = last_policy(tmp_path / "whole").anchors
    assert set(anchors.values()) == {0, 1, 2}
    assignment = run.schedule_arrays("assignment")
    for client, expert in anchors.items():
        trained = assignment[:, int(client[-1])]
        assert trained[:, expert].any()
        assert trained.sum() == trained[:, expert].sum()
