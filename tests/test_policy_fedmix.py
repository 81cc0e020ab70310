"""FedMix: responsibilities by hand, what they choose, what is sent, and how it is averaged."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_tools import frozen, simulate

from fedmoe_sched import InputError
from fedmoe_sched.policies import load_policy, make_policy
from fedmoe_sched.policies.fedmix import FedMixPolicy, responsibilities

LOG = np.log
# Responsibilities 4/7, 2/7, 1/7; and 1/8, 5/8, 2/8.
LOSSES = {"a": [0.5, 0.5 + LOG(2), 0.5 + LOG(4)], "b": [1 + LOG(5), 1.0, 1 + LOG(2.5)]}


def ready(**options):
    policy = FedMixPolicy(3, **{"default_capacity": 3} | options)
    for client, row in LOSSES.items():
        policy.tell(client, {"expert_loss": row})
    return policy


def test_responsibilities_by_hand():
    assert responsibilities(list(LOSSES.values())) == pytest.approx(
        np.array([[4 / 7, 2 / 7, 1 / 7], [1 / 8, 5 / 8, 2 / 8]])
    )
    assert responsibilities([3.0, 3.0]).tolist() == [0.5, 0.5]
    assert responsibilities([0.0, 2000.0]).tolist() == [1.0, 0.0]  # no overflow
    assert responsibilities([1e308, -1e308]).tolist() == [0.0, 1.0]
    shares = responsibilities([[0.0, np.inf], [np.nan, 0.0], [1.0, 1.0]])
    assert np.isnan(shares).tolist() == [[True, True], [True, True], [False, False]]


@pytest.mark.parametrize(
    ("options", "a", "b"),
    [
        ({}, [0, 1, 2], [0, 1, 2]),
        ({"default_capacity": 2}, [0, 1], [1, 2]),
        ({"top_k": 1}, [0], [1]),
        ({"threshold": 0.2}, [0, 1], [1, 2]),
        ({"threshold": 0.27}, [0, 1], [1]),
        ({"threshold": 0.6}, [0], [1]),  # none of a reaches it: the highest
        ({"threshold": 0.1, "top_k": 2, "default_capacity": 1}, [0], [1]),
        ({"default_capacity": 0}, [], []),
    ],
)
def test_what_is_chosen(options, a, b):
    assert ready(**options).plan([*"ab"]).experts_by_client() == {"a": a, "b": b}


def test_the_objective_is_the_responsibility():
    answer = ready(default_capacity=2).plan([*"ab"])
    assert answer.objective == pytest.approx(6 / 7 + 7 / 8)
    assert answer.gap == pytest.approx(0, abs=1e-12)


def test_experts_that_are_not_eligible_keep_their_share():
    policy = ready(threshold=0.2)
    policy.add_client("a", eligible=[1, 2])  # 2/7 and 1/7, not 2/3 and 1/3
    policy.add_client("b", eligible=[0])
    assert policy.plan([*"ab"]).experts_by_client() == {"a": [1], "b": [0]}


def test_what_was_never_told_is_tried_first():
    policy = ready(top_k=1)
    policy.tell("c", {"expert_loss": [0.5, np.nan, 0.1]})
    assert policy.plan([*"c"]).experts_by_client() == {"c": [1]}


def test_who_has_told_nothing_chooses_at_random():
    policy = make_policy("fedmix", 4, default_capacity=1, threshold=0.9)
    first = policy.plan(range(400)).pairs.mask()
    loads = policy.close_round().loads
    assert sum(loads) == 400
    assert min(loads) > 60  # of 100; five standard deviations are 43
    assert (policy.plan(range(400)).pairs.mask() != first).any()


@given(st.data())
def test_capacity_eligibility_and_k_are_kept(data):
    n, m = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    top_k = data.draw(st.none() | st.integers(1, 3))
    policy = FedMixPolicy(m, top_k=top_k, threshold=data.draw(st.sampled_from([0.0, 0.3, 1.0])))
    room = {}
    for client in range(n):
        capacity, eligible = data.draw(st.integers(0, 6)), data.draw(st.sets(st.integers(0, m - 1)))
        policy.add_client(client, capacity=capacity, eligible=eligible)
        losses = data.draw(st.lists(st.sampled_from([0.0, 0.5, 3.0, np.nan]), min_size=m, max_size=m))
        policy.tell(client, {"expert_loss": losses})
        room[client] = min(capacity, len(eligible), top_k or m), eligible
    shares = responsibilities(policy.variable("expert_loss"))
    for client, experts in policy.plan(range(n)).experts_by_client().items():
        most, eligible = room[client]
        assert set(experts) <= eligible
        assert min(most, 1) <= len(experts) <= most
        left = [shares[client, j] for j in eligible - set(experts)]
        assert all(share <= min(shares[client, experts]) for share in left if experts)
        if len(experts) < most:
            assert all(share < policy.threshold for share in left)


def test_saved_in_mid_run_it_goes_on_the_same(tmp_path):
    def run(*, stop):
        policy, generator = FedMixPolicy(4, default_capacity=2, threshold=0.2, seed=5), np.random.default_rng(2)
        rounds = []
        for number in range(5):
            if stop and number == 2:
                policy.save(tmp_path / "state")
                policy = load_policy(tmp_path / "state")
                assert (policy.threshold, policy.top_k, policy.method) == (0.2, None, "fedmix")
            clients = generator.permutation(20)[:8]
            rounds.append(simulate(policy, clients, generator))
            for client in clients[:6]:
                policy.tell(client, {"expert_loss": generator.random(4).round(1)})
        return [*rounds, frozen(policy)]

    assert run(stop=True) == run(stop=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k = 0: must be >= 1"),
        ({"threshold": 1.5}, "threshold = 1.5: must be >= 0 and <= 1"),
        ({"threshold": -0.1}, "threshold = -0.1: must be >= 0 and <= 1"),
        ({"threshold": None}, "threshold = None: must be a finite number"),
        ({"balance": 0.25}, "balance = 0.25: policy 'fedmix' has balance = None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        make_policy("fedmix", 3, **options)


@pytest.mark.train
class TestMethod:
    @pytest.fixture
    def method(self):
        pytest.importorskip("torch")
        from fedmoe_sched.federated.methods import Setting, make_method

        return make_method("fedmix", Setting(("a", "b", "c"), 3))

    STATE = {name: np.zeros(1) for name in ("gate.bias", "experts.0.bias", "experts.1.bias", "experts.2.bias")}  # noqa: RUF012

    def test_all_is_sent_down_and_judged_and_only_the_assigned_comes_back(self, method):
        brief = method.brief(1, [2], self.STATE)
        assert (brief.experts, brief.trained, brief.up) == ((2,), (2,), (2,))
        assert brief.judged == brief.down == (0, 1, 2)

    def update(self, client, samples, value, experts, losses):
        from fedmoe_sched.federated.aggregate import Update

        names = ["gate.bias", *(f"experts.{j}.bias" for j in experts)]
        parameters = {name: np.array([value]) for name in names}
        signals = {} if losses is None else {"expert_loss": losses}
        return Update(client, parameters, samples, dict.fromkeys(experts, 77.0), signals)

    def test_experts_are_averaged_by_samples_times_responsibility(self, method):
        updates = [
            self.update("a", 70.0, 1.0, [0, 1], LOSSES["a"]),
            self.update("b", 16.0, 3.0, [1, 2], LOSSES["b"]),
        ]
        briefs = {"a": method.brief(0, [0, 1], self.STATE), "b": method.brief(1, [1, 2], self.STATE)}
        combined = method.merge(self.STATE, updates, briefs, None)
        # Weights: a 70 * 4/7 = 40 and 70 * 2/7 = 20; b 16 * 5/8 = 10 and 16 * 2/8 = 4.
        assert combined.expert_samples == pytest.approx({0: 40, 1: 30, 2: 4})
        values = {name: float(value[0]) for name, value in combined.state.items()}
        assert values == pytest.approx(
            {
                "gate.bias": (70 * 1 + 16 * 3) / 86,
                "experts.0.bias": 1.0,
                "experts.1.bias": (20 * 1 + 10 * 3) / 30,
                "experts.2.bias": 3.0,
            }
        )

    @pytest.mark.parametrize("losses", [None, [0.1, 0.2], [0.1, np.nan, 0.2], [0.1, np.inf, 0.2], 0.5])
    def test_updates_without_good_losses_are_rejected(self, method, losses):
        updates = [self.update("a", 70.0, 1.0, [0], losses), self.update("b", 1.0, 2.0, [0], [0.0, 0.0, 0.0])]
        combined = method.merge(self.STATE, updates, {n: method.brief(0, [0], self.STATE) for n in "ab"}, None)
        assert [str(r) for r in combined.rejected] == ["a: samples of expert 0 = nan: must be finite and >= 0"]
        assert combined.state["experts.0.bias"] == 2.0

    def test_an_expert_out_of_range_is_rejected_as_ever(self, method):
        bad = self.update("a", 70.0, 1.0, [7], LOSSES["a"])
        combined = method.merge(self.STATE, [bad], {"a": method.brief(0, [0], self.STATE)}, None)
        assert [str(r) for r in combined.rejected] == ["a: parameter 'experts.7.bias': there is none of that name"]

    def test_it_trains_and_resumes(self, tmp_path, processes):
        pytest.importorskip("sklearn")
        from method_tools import assert_resumes, checkpoint, last_policy

        run = assert_resumes("fedmix", tmp_path, processes)
        told = last_policy(tmp_path / "whole").variable("expert_loss")
        answered = (run.schedule_arrays("samples") > 0).any(axis=(0, 2))
        assert ((told > 0).all(axis=1) == answered).all()
        arrays = checkpoint(tmp_path / "whole")
        shared = sum(a.nbytes for name, a in arrays.items() if not name.startswith("experts."))
        experts = [
            sum(a.nbytes for name, a in arrays.items() if name.startswith(f"experts.{j}.")) for j in range(3)
        ]
        for record in run.records:
            assert record["bytes_down"] == record["planned"] * (shared + sum(experts))
            up = np.array(record["trained_loads"]) @ experts
            assert record["bytes_up"] == record["answered"] * shared + up
