"""FedMoE-DA: neighbours and weights from gate vectors, personal experts averaged with their neighbours."""

import json

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_tools import frozen, simulate

from fedmoe_sched import InputError, StateFileError
from fedmoe_sched.federated.aggregate import Update
from fedmoe_sched.federated.methods import Setting, make_method
from fedmoe_sched.policies import Policy, load_policy, make_policy
from fedmoe_sched.policies.fedmoe_da import FedMoeDaPolicy, nearest_pairs

# Cosines: 0-1 0.6, 0-2 0.8, 0-3 -1, 1-2 0.96, 1-3 -0.6, 2-3 -0.8; lengths do not count.
VECTORS = np.array([[1.0, 0.0], [3.0, 4.0], [0.8, 0.6], [-2.0, 0.0]])


class TestRule:
    def test_neighbours_and_weights_by_hand(self):
        found = nearest_pairs(VECTORS, 2, 0.5)
        assert found.places.tolist() == [[0, 2, 1], [1, 2, 0], [2, 1, 0], [3, 1, 2]]
        masses = np.exp(np.array([[1, 0.8, 0.6], [1, 0.96, 0.6], [1, 0.96, 0.8], [1, -0.6, -0.8]]) / 0.5)
        assert found.weights == pytest.approx(masses / masses.sum(axis=1, keepdims=True))

    def test_low_temperature_leaves_each_to_itself_and_high_makes_all_alike(self):
        assert nearest_pairs(VECTORS, 2, 1e-4).weights[0] == pytest.approx([1, 0, 0])
        assert nearest_pairs(VECTORS, 2, 1e6).weights[0] == pytest.approx([1 / 3] * 3, rel=1e-4)

    def test_only_the_same_kind(self):
        found = nearest_pairs(VECTORS, 2, 0.5, [0, 1, 0, 2])
        assert found.places.tolist() == [[0, 2, -1], [1, -1, -1], [2, 0, -1], [3, -1, -1]]
        assert found.weights[1].tolist() == [1, 0, 0]
        assert found.weights[0] == pytest.approx([1 / (1 + np.exp(-0.4)), np.exp(-0.4) / (1 + np.exp(-0.4)), 0])

    def test_zero_vectors_and_ties(self):
        found = nearest_pairs(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]]), 1, 1.0)
        assert found.places.tolist() == [[0, 1], [1, 3], [2, 0], [3, 1]]
        assert found.weights[:2] == pytest.approx(np.array([[np.e, 1], [0.5 * (np.e + 1)] * 2]) / (np.e + 1))

    def test_fewer_pairs_than_neighbours(self):
        assert nearest_pairs(VECTORS[:2], 5, 1.0).places.tolist() == [[0, 1], [1, 0]]
        assert nearest_pairs(VECTORS, 0, 1.0).weights.tolist() == [[1]] * 4

    @given(st.integers(1, 400), st.integers(0, 4), st.integers(0, 99))
    @settings(max_examples=drawn(25), deadline=None)
    def test_each_row_is_an_average_that_begins_with_itself(self, size, count, seed):
        random = np.random.default_rng(seed)
        vectors, kinds = random.standard_normal((size, 3)), random.integers(0, 3, size)
        places, weights = nearest_pairs(vectors, count, 0.3, kinds)
        assert (places[:, 0] == np.arange(size)).all()
        assert weights.sum(axis=1) == pytest.approx(np.ones(size))
        assert (np.diff(weights, axis=1) <= 1e-12).all()
        assert ((weights > 0) == (places >= 0)).all()
        for row, own in enumerate(places):
            near = own[own >= 0]
            assert len(set(near.tolist())) == len(near) == min(count + 1, (kinds == kinds[row]).sum())
            assert (kinds[near] == kinds[row]).all()


class TestPolicy:
    def test_the_fittest_experts_up_to_capacity(self):
        policy = FedMoeDaPolicy(3)
        policy.add_client("a", fitness=[0.1, 0.9, 0.5])
        policy.add_client("b", fitness=[0.1, 0.9, 0.5], eligible=[0, 2])
        assert isinstance(policy, Policy)
        plan = policy.plan({"a": 2, "b": 1, "c": 0, "d": 9}).experts_by_client()
        assert plan == {"a": [1, 2], "b": [2], "c": [], "d": [0, 1, 2]}

    def test_refreshes_after_the_first_round_and_every_so_many(self):
        policy, due = FedMoeDaPolicy(2, refresh=3), []
        for _ in range(8):
            due.append(policy.is_refresh_due)
            simulate(policy, ["a"], np.random.default_rng(0))
        assert due == [False, True, False, False, True, False, False, True]

    def test_saved_in_mid_run_it_plans_the_same(self, tmp_path):
        def rounds(*, stop):
            policy = make_policy("fedmoe-da", 4, default_capacity=2, neighbours=2, temperature=0.1, refresh=2)
            generator, seen = np.random.default_rng(2), []
            for number in range(6):
                if stop and number == 3:
                    policy.save(tmp_path / "state")
                    policy = load_policy(tmp_path / "state")
                    assert (policy.neighbours, policy.temperature, policy.refresh) == (2, 0.1, 2)
                seen.append([policy.is_refresh_due, simulate(policy, generator.permutation(9)[:6], generator)])
            return [*seen, frozen(policy)]

        assert rounds(stop=True) == rounds(stop=False)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"neighbours": -1}, "neighbours = -1: must be >= 0"),
            ({"refresh": 0}, "refresh = 0: must be > 0"),
            ({"refresh": 1.5}, "refresh = 1.5: must be a whole number"),
            ({"temperature": 0}, "temperature = 0.0: must be > 0"),
            ({"temperature": "x"}, "temperature = 'x': must be a finite number"),
            ({"solver": "auto"}, "solver = 'auto': policy 'fedmoe-da' has solver = 'greedy'"),
            ({"balance": 0.25}, "balance = 0.25: policy 'fedmoe-da' has balance = None"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(InputError, match=message):
            make_policy("fedmoe-da", 3, **options)


# The method -----------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")


def answer(client, values, gate, *, samples=10.0):
    experts = {f"experts.{j}.w": np.array([value]) for j, value in values.items()}
    shared = {"gate.weight": np.array(gate, dtype=float), "extractor.w": np.array([samples])}
    return Update(client, experts | shared, samples, dict.fromkeys(values, 1.0))


class TestMethod:
    def start(self, sizes=(1, 1), **options):
        self.policy = FedMoeDaPolicy(2, default_capacity=2, **{"neighbours": 1, "temperature": 1.0} | options)
        self.method = make_method("fedmoe-da", Setting(NAMES, 2))
        self.state = {f"experts.{j}.w": np.full(size, 7.0) for j, size in enumerate(sizes)}
        self.state |= {"gate.weight": np.zeros((2, 2)), "extractor.w": np.zeros(1)}

    def round(self, capacity, answers):
        self.method.before_plan(self.policy, self.state, [NAMES.index(client) for client in capacity])
        plan = self.policy.plan(capacity).experts_by_client()
        briefs = {c: self.method.brief(NAMES.index(c), experts, self.state) for c, experts in plan.items()}
        combined = self.method.merge(self.state, answers, briefs, self.policy)
        self.state = combined.state
        self.policy.close_round()
        return briefs

    def experts(self):
        return {
            (client, name): value.item()
            for client in range(3)
            for name, value in self.method.personal_parts(client).items()
            if name.startswith("experts.")
        }

    def test_two_rounds_by_hand(self):
        self.start()
        first = [
            answer("a", {0: 1.0, 1: 2.0}, [[1, 0], [0, 1]]),
            answer("b", {0: 5.0}, [[3, 4], [9, 9]], samples=30),
        ]
        briefs = self.round({"a": 2, "b": 1}, first)
        assert (briefs["a"].down, briefs["a"].up, briefs["b"].down, briefs["a"].parts) == (
            (0, 1),
            (0, 1),
            (0,),
            {},
        )
        # Nobody has neighbours yet. The global experts are plain means, the extractor is by samples.
        assert self.experts() == {(0, "experts.0.w"): 1, (0, "experts.1.w"): 2, (1, "experts.0.w"): 5}
        assert [self.state[f"experts.{j}.w"].item() for j in range(2)] == [3, 2]
        assert self.state["gate.weight"].tolist() == [[2, 2], [4.5, 5]]
        assert self.state["extractor.w"].item() == pytest.approx((10 * 10 + 30 * 30) / 40)
        # Cosines: a0-a1 0, a0-b0 0.6, a1-b0 0.8. So b0 is nearest to a0 and a1, a1 to b0.
        second = [answer("a", {0: 10.0, 1: 20.0}, [[1, 0], [0, 1]]), answer("c", {0: 40.0}, [[1, 1], [0, 0]])]
        briefs = self.round({"a": 2, "b": 1, "c": 1}, second)
        assert (briefs["a"].down, briefs["b"].down, briefs["c"].down) == ((0,), (1,), (0,))  # b0 once
        assert briefs["a"].parts.keys() == {"experts.0.w", "experts.1.w", "gate.weight"}
        assert briefs["b"].parts.keys() == {"experts.0.w", "gate.weight"}
        share = {cosine: np.exp(cosine) / (np.e + np.exp(cosine)) for cosine in (0.6, 0.8)}
        # b did not answer: it takes part with what it has, and is left as it is. c was not there when the
        # neighbours were found.
        assert self.experts() == {
            (0, "experts.0.w"): pytest.approx(10 * (1 - share[0.6]) + 5 * share[0.6]),
            (0, "experts.1.w"): pytest.approx(20 * (1 - share[0.8]) + 5 * share[0.8]),
            (1, "experts.0.w"): 5,
            (2, "experts.0.w"): 40,
        }
        own = self.experts()
        mean = (own[0, "experts.0.w"] + 5 + 40) / 3
        assert self.state["experts.0.w"].item() == pytest.approx(mean)

    def test_all_averages_are_of_what_was_trained_not_of_other_averages(self):
        self.start()
        gates = {"a": [[1, 0], [0, 0]], "b": [[1, 0], [0, 0]]}
        for values in ((0.0, 0.0), (1.0, 3.0)):
            updates = [answer(c, {0: v}, gates[c]) for c, v in zip("ab", values, strict=True)]
            self.round({"a": 1, "b": 1}, updates)
        assert self.experts() == {(0, "experts.0.w"): 2, (1, "experts.0.w"): 2}

    def test_experts_of_the_client_itself_may_be_neighbours_and_cost_nothing(self):
        self.start()
        self.round({"a": 2}, [answer("a", {0: 1.0, 1: 2.0}, [[1, 0], [1, 0]])])
        briefs = self.round({"a": 2}, [answer("a", {0: 4.0, 1: 8.0}, [[1, 0], [1, 0]])])
        assert briefs["a"].down == ()
        assert self.experts() == {(0, "experts.0.w"): 6, (0, "experts.1.w"): 6}

    def test_experts_of_another_size_are_no_neighbours(self):
        self.start(sizes=(1, 2))
        update = answer("a", {0: 1.0}, [[1, 0], [1, 0]])
        update = Update("a", {**update.parameters, "experts.1.w": np.array([4.0, 8.0])}, 10.0, {0: 1.0, 1: 1.0})
        for _ in range(2):
            self.round({"a": 2}, [update])
        parts = self.method.personal_parts(0)
        assert [parts[f"experts.{j}.w"].tolist() for j in range(2)] == [[1], [4, 8]]

    def test_neighbours_stay_between_refreshes(self):
        self.start(refresh=2)
        same, other = [[1, 0], [0, 0]], [[-1, 0], [0, 0]]
        pairs = []
        for gate in (same, other, other, other):
            gates = {"a": same, "b": gate, "c": same}
            self.round(dict.fromkeys(gates, 1), [answer(client, {0: 1.0}, g) for client, g in gates.items()])
            pairs.append(self.method.arrays()["nearest/places"].tolist())
        # Found after round 1, when all are alike, and after round 3, when b is not.
        assert pairs[0] == []
        assert pairs[1] == pairs[2] == [[0, 1], [1, 0], [2, 0]]
        assert pairs[3] == [[0, 2], [1, 0], [2, 0]]

    def test_rejected_updates_leave_what_the_client_has(self):
        self.start()
        self.round({"a": 1}, [answer("a", {0: 1.0}, [[1, 0], [0, 1]])])
        self.round({"a": 1}, [answer("a", {0: np.nan}, [[1, 0], [0, 1]])])
        assert self.experts() == {(0, "experts.0.w"): 1}

    def test_saved_and_restored(self):
        self.start()
        for _ in range(2):
            self.round({"a": 2, "b": 1}, [answer("a", {0: 1.0, 1: 2.0}, [[1, 0], [0, 1]])])
        other = make_method("fedmoe-da", Setting(NAMES, 2))
        other.restore(self.method.arrays())
        ours, theirs = self.method.arrays(), other.arrays()
        assert {k: v.tolist() for k, v in ours.items()} == {k: v.tolist() for k, v in theirs.items()}
        assert len(ours["nearest/pairs"]) == 2
        assert other.brief(0, [0, 1], self.state).down == self.method.brief(0, [0, 1], self.state).down
        with pytest.raises(StateFileError, match="method 'fedmoe-da' lacks 'nearest/pairs'"):
            other.restore({})

    def test_another_policy(self):
        self.start()
        with pytest.raises(InputError, match="method 'fedmoe-da': needs policy 'fedmoe-da', not 'greedy'"):
            self.method.before_plan(make_policy("greedy", 2), self.state, [0])


SMALL = {
    "policy": "fedmoe-da",
    "policy_options": {"refresh": 2, "neighbours": 2},
    "rounds": 4,
    "seed": 3,
    "data": {"train_samples": 160, "test_samples": 60},
    "clients": {"count": 6, "capacity": [1, 2, 3], "participation": 0.75, "failure_rate": 0.1, "min_samples": 4},
    "model": {"experts": 3, "channels": [4], "expert_hidden": [4, 2]},
    "local": {"batch_size": 32},
}


@pytest.mark.train
class TestTraining:
    def start(self, folder, *, resume=False, **changes):
        pytest.importorskip("torch")
        pytest.importorskip("sklearn")
        from fedmoe_sched.federated import TrainConfig, run_training

        return run_training(TrainConfig.from_dict(SMALL).updated(changes), folder, resume=resume)

    def contents(self, folder):
        from fedmoe_sched.federated.runs import RunFolder, is_timing

        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]
        arrays = RunFolder(folder).load_checkpoint()[0]
        return records, {name: value.tobytes() for name, value in arrays.items()}

    @pytest.mark.parametrize("changes", [{}, {"devices.source": "synthetic"}])
    def test_resumed_it_goes_on_bit_for_bit(self, tmp_path, changes, processes):
        self.start(tmp_path / "whole", **changes)
        self.start(tmp_path / "parts", rounds=2, **changes)
        self.start(tmp_path / "parts", resume=True, workers=processes, **changes)
        assert self.contents(tmp_path / "parts") == self.contents(tmp_path / "whole")
        arrays = self.contents(tmp_path / "whole")[1]
        assert len({value for name, value in arrays.items() if name.endswith("/experts.0.2.weight")}) > 1
        assert len(np.frombuffer(arrays["method:nearest/weights"])) > 6
