"""pFedMoE: who trains which of the two experts, what stays with the client, and what others see of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_tools import frozen, simulate

from fedmoe_sched import InputError
from fedmoe_sched.policies import load_policy, make_policy


@pytest.mark.parametrize(
    ("capacity", "eligible", "experts"),
    [
        (2, [0, 1, 2], [0, 1]),
        (9, [0, 1, 2], [0, 1]),
        (1, [0, 1, 2], [0]),
        (1, [1, 2], [1]),
        (2, [0, 2], [0]),
        (2, [2], []),
        (0, [0, 1, 2], []),
    ],
)
def test_the_shared_expert_first_then_the_local_one(capacity, eligible, experts):
    policy = make_policy("pfedmoe", 3)
    policy.add_client("a", capacity=capacity, eligible=eligible, fitness=[-1.0, 0.2, 0.9])
    assert policy.plan(["a"]).experts_by_client() == {"a": experts}


def test_the_record():
    policy = make_policy("pfedmoe", 3, default_capacity=2)
    for client, row in {"a": [0.5, 0.25, 0.75], "b": [0.5, 1.0, 0.0]}.items():
        policy.add_client(client, fitness=row)
    policy.add_client("b", capacity=1)
    answer = policy.plan([*"ab"])
    assert answer.objective == pytest.approx(0.5 + 0.25 + 0.5)
    assert answer.gap == pytest.approx(0, abs=1e-12)
    record = policy.close_round()
    assert record.loads == (2, 1, 0)
    assert record.fitness_given_up == pytest.approx((1.25 + 1.0 - 1.25) / 2.25)


@given(st.data())
def test_capacity_and_eligibility_are_kept(data):
    n, m = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 4))
    policy, room = make_policy("pfedmoe", m), {}
    for client in range(n):
        room[client] = data.draw(st.integers(0, 3)), data.draw(st.sets(st.integers(0, m - 1)))
        policy.add_client(client, capacity=room[client][0], eligible=room[client][1])
    for client, experts in policy.plan(range(n)).experts_by_client().items():
        capacity, eligible = room[client]
        assert set(experts) <= eligible & {0, 1}
        assert len(experts) == min(capacity, len(eligible & {0, 1}))


def test_saved_in_mid_run_it_goes_on_the_same(tmp_path):
    def run(*, stop):
        policy, generator = make_policy("pfedmoe", 3, default_capacity=2, seed=5), np.random.default_rng(2)
        rounds = []
        for number in range(4):
            if stop and number == 2:
                policy.save(tmp_path / "state")
                policy = load_policy(tmp_path / "state")
                assert (policy.name, policy.method) == ("pfedmoe", "pfedmoe")
            clients = {int(c): int(generator.integers(0, 4)) for c in generator.permutation(20)[:8]}
            rounds.append(simulate(policy, clients, generator))
        return [*rounds, frozen(policy)]

    assert run(stop=True) == run(stop=False)


def test_bad_options():
    with pytest.raises(InputError, match="experts: has 1, policy 'pfedmoe' needs 2, one shared and one local"):
        make_policy("pfedmoe", 1)
    with pytest.raises(InputError, match="fill = False: policy 'pfedmoe' has fill = True"):
        make_policy("pfedmoe", 2, fill=False)


@pytest.mark.train
class TestMethod:
    NAMES = ("extractor.bias", "gate.bias", "experts.0.bias", "experts.1.bias", "experts.10.bias")

    @pytest.fixture
    def method(self):
        pytest.importorskip("torch")
        from fedmoe_sched.federated.methods import Setting, make_method

        return make_method("pfedmoe", Setting(("a", "b", "c"), 11))

    def update(self, client, samples, value, experts):
        from fedmoe_sched.federated.aggregate import Update

        names = ["extractor.bias", "gate.bias", *(f"experts.{j}.bias" for j in experts)]
        parameters = {name: np.array([value]) for name in names}
        return Update(client, parameters, samples, dict.fromkeys(experts, samples / 2))

    def test_only_the_shared_expert_and_the_extractor_are_averaged(self, method):
        state = dict.fromkeys(self.NAMES, np.array([7.0]))
        briefs = {name: method.brief(i, [0, 1], state) for i, name in enumerate("ab")}
        assert (briefs["a"].experts, briefs["a"].trained) == ((0, 1), (0, 1))
        assert briefs["a"].down == briefs["a"].up == (0,)
        updates = [self.update("a", 10.0, 1.0, [0, 1]), self.update("b", 30.0, 2.0, [0, 1])]
        combined = method.merge(state, updates, briefs, None)
        values = {name: float(value[0]) for name, value in combined.state.items()}
        assert values == dict(zip(self.NAMES, [1.75, 7.0, 1.75, 7.0, 7.0], strict=True))
        assert combined.expert_samples == {0: 20.0}
        assert method.personal_parts(0) == {"gate.bias": 1.0, "experts.1.bias": 1.0}
        assert method.personal_parts(1) == {"gate.bias": 2.0, "experts.1.bias": 2.0}
        # A latecomer starts from the initial values; those that were there go on with their own.
        assert method.brief(2, [0, 1], combined.state).parts == {}
        assert method.brief(1, [0, 1], combined.state).parts == {"gate.bias": 2.0, "experts.1.bias": 2.0}

    def test_what_each_of_them_uses(self, method):
        from fedmoe_sched.federated.methods import View

        assert method.global_view() == View((0,))
        assert method.client_view(2, []) == View((0,), {})
        state = dict.fromkeys(self.NAMES, np.array([7.0]))
        method.merge(state, [self.update("b", 1.0, 2.0, [0])], {"b": method.brief(1, [0], state)}, None)
        assert method.client_view(1, [0]) == View((0,), {"gate.bias": 2.0})

    def test_it_trains_and_resumes_with_an_expert_for_each(self, tmp_path, processes):
        pytest.importorskip("sklearn")
        from method_tools import assert_resumes, checkpoint, small

        from fedmoe_sched.federated.model import build_model

        run = assert_resumes("pfedmoe", tmp_path, processes)
        arrays = checkpoint(tmp_path / "whole")
        config = small("pfedmoe")
        initial = {
            name: v.numpy() for name, v in build_model(config.model, 1, 10, seed=config.seed).state_dict().items()
        }
        changed = {name for name in initial if not np.array_equal(arrays[name], initial[name])}
        assert {name for name in changed if not name.startswith("extractor.")} == {
            name for name in initial if name.startswith("experts.0.")
        }
        samples = run.schedule_arrays("samples").sum(axis=0)
        assert (samples[:, 1] > 0).sum() > 1
        bias = {name: a.tobytes() for name, a in arrays.items() if name.endswith("/experts.1.2.weight")}
        assert set(bias) == {f"method:{i}/experts.1.2.weight" for i in np.flatnonzero(samples[:, 1])}
        assert len(set(bias.values())) == len(bias)
        # Neither the gate nor expert 1 travels.
        sent = sum(a.nbytes for name, a in initial.items() if name.startswith(("extractor.", "experts.0.")))
        assert [record["bytes_down"] for record in run.records] == [r["planned"] * sent for r in run.records]
        assert [record["bytes_up"] for record in run.records] == [r["answered"] * sent for r in run.records]
