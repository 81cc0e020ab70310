"""pFedMoAP: who owns which expert, who is whose neighbour, and what is frozen, averaged and kept."""

import json

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_tools import assert_unchanged, frozen, simulate

from fedmoe_sched import InputError, StateFileError
from fedmoe_sched.federated.aggregate import Update
from fedmoe_sched.federated.methods import Setting, View, make_method
from fedmoe_sched.policies import Policy, load_policy, make_policy
from fedmoe_sched.policies.pfedmoap import PFedMoapPolicy


def run(policy, clients, *, failed=()):
    """Plan and close one round in which every client reports on its own expert; return the plan."""
    clients = clients if isinstance(clients, dict) else [*clients]
    plan = policy.plan(clients).experts_by_client()
    for client, experts in plan.items():
        own = policy.own_expert(client)
        if client in failed:
            policy.report(client, failed=True)
        elif experts:
            policy.report(client, {own: (10, 0.5)})
    policy.close_round()
    return plan


class TestOwners:
    def test_numbers_are_given_out_in_order_of_appearance(self):
        policy = PFedMoapPolicy(4)
        assert run(policy, ["b", "a"]) == {"b": [0], "a": [1]}
        assert run(policy, ["c", "a", "d"]) == {"c": [2], "a": [1], "d": [3]}
        assert [policy.own_expert(client) for client in "abcd"] == [1, 0, 2, 3]
        assert policy.own_expert("e") is None

    def test_more_clients_than_experts(self):
        policy = PFedMoapPolicy(3)
        run(policy, ["a", "b"])
        before = frozen(policy)
        with pytest.raises(InputError, match=r"experts = 3: policy 'pfedmoap' needs one .* so far 4"):
            policy.plan(["c", "a", "d"])
        assert_unchanged(policy, before)

    def test_who_cannot_train_owns_nothing(self):
        policy = PFedMoapPolicy(2)
        policy.add_client("b", eligible=[1])
        policy.add_client("c", eligible=[])
        assert run(policy, {"a": 0, "b": 1, "c": 1, "d": 1}) == {"a": [], "b": [1], "c": [], "d": [0]}
        assert [policy.own_expert(client) for client in "abcd"] == [None, 1, None, 0]
        policy.add_client("e", eligible=[0])
        with pytest.raises(InputError, match="so far 3"):
            policy.plan(["e"])

    def test_no_free_expert_that_a_new_client_may_train(self):
        policy = PFedMoapPolicy(2)
        policy.add_client("b", eligible=[0])
        assert run(policy, ["a", "b"]) == {"a": [0], "b": []}
        assert policy.own_expert("b") is None

    def test_a_cancelled_round_leaves_the_numbers(self):
        policy = PFedMoapPolicy(3)
        policy.plan(["b", "a"])
        before = frozen(policy)
        policy.cancel_round()
        policy.plan(["b", "a"])
        assert_unchanged(policy, before)
        policy.cancel_round()
        assert policy.plan(["c", "a", "b"]).experts_by_client() == {"c": [2], "a": [1], "b": [0]}

    def test_an_open_round_survives_the_file(self, tmp_path):
        policy = PFedMoapPolicy(3, neighbours=1)
        policy.plan(["b", "a"])
        policy.save(tmp_path / "state")
        again = load_policy(tmp_path / "state")
        assert (again.own_expert("a"), again.neighbours) == (1, 1)
        assert frozen(again) == frozen(policy)


class TestNeighbours:
    def ready(self, **options):
        policy = PFedMoapPolicy(5, default_capacity=3, **options)
        run(policy, "abcd", failed="d")
        # Expert 3 is untrained, 4 is nobody's: nobody tells of them. Of itself a client is at distance 0.
        policy.tell("a", {"distance": [0.0, 0.5, 0.2, np.nan, np.nan]})
        policy.tell("b", {"distance": [0.5, 0.0, 0.5, np.nan, np.nan]})
        policy.tell("d", {"distance": [0.9, 0.3, 0.7, np.nan, np.nan]})
        return policy

    def test_the_first_round_has_none(self):
        policy = PFedMoapPolicy(3, default_capacity=3)
        assert run(policy, "abc") == {"a": [0], "b": [1], "c": [2]}

    def test_the_nearest_by_hand(self):
        policy = self.ready()
        assert policy.variable("trained").tolist() == [1, 1, 1, 0, 0]
        # a, b: all there are. c was told nothing. d: 1 at 0.3 and 2 at 0.7, not 0 at 0.9.
        assert run(policy, "abcd") == {"a": [0, 1, 2], "b": [0, 1, 2], "c": [2], "d": [1, 2, 3]}

    def test_fewer_by_capacity_or_option(self):
        policy = self.ready()
        # b: 0 and 2 are equally far, the lower number goes first.
        assert run(policy, {"a": 2, "b": 2, "d": 1}) == {"a": [0, 2], "b": [0, 1], "d": [3]}
        assert run(self.ready(neighbours=1), "abd") == {"a": [0, 2], "b": [0, 1], "d": [1, 3]}
        assert run(self.ready(neighbours=0), "abd") == {"a": [0], "b": [1], "d": [3]}

    def test_eligibility_counts_for_neighbours_and_for_the_own_expert(self):
        policy = self.ready()
        policy.add_client("a", eligible=[0, 1])
        policy.add_client("b", eligible=[0, 2])
        assert run(policy, "ab") == {"a": [0, 1], "b": []}

    def test_a_new_client_has_neighbours_by_what_it_starts_from(self):
        policy = self.ready(neighbours=1)
        policy.tell("e", {"distance": [0.5, 0.4, 0.6, np.nan, np.nan]})
        assert run(policy, ["e"]) == {"e": [1, 4]}

    def test_distances_stand_until_told_anew(self):
        policy = self.ready(neighbours=1)
        policy.tell("a", {"distance": [0.0, 0.1, np.nan, np.nan, np.nan]})
        assert run(policy, ["a"]) == {"a": [0, 1]}
        assert policy.variable("distance", ["a"]).tolist() == [[0.0, 0.1, 0.2, -1, -1]]

    def test_no_client_is_asked(self):
        policy = self.ready()
        assert isinstance(policy, Policy)
        assert [policy.signals(when) for when in ("once", "before", "after")] == [(), (), ()]
        assert policy.signals("server") == ("distance",)

    def test_fitness_given_up_is_that_of_the_scheduler(self):
        policy = PFedMoapPolicy(2)
        policy.add_client("a", fitness=[0.2, 0.8])
        policy.plan(["a"])
        assert policy.close_round().fitness_given_up == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": -1}, "neighbours = -1: must be >= 0"),
        ({"neighbours": 1.5}, "neighbours = 1.5: must be a whole number"),
        ({"solver": "auto"}, "solver = 'auto': policy 'pfedmoap' has solver = 'greedy'"),
        ({"balance": 0.25}, "balance = 0.25: policy 'pfedmoap' has balance = None"),
        ({"load_max": 2}, "load_max = 2: policy 'pfedmoap' has load_max = None"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        make_policy("pfedmoap", 3, **options)


@given(st.data())
@settings(max_examples=drawn(60), deadline=None)
def test_everybody_keeps_its_expert_and_nobody_gets_too_many(data):
    m = data.draw(st.integers(1, 6))
    policy = PFedMoapPolicy(m, neighbours=data.draw(st.none() | st.integers(0, 3)))
    may = data.draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=m, max_size=m))
    for client, row in enumerate(may):
        policy.add_client(client, eligible=np.flatnonzero(row).tolist())
    owners = {}
    for _ in range(3):
        clients = data.draw(st.lists(st.integers(0, m - 1), min_size=1, max_size=m, unique=True))
        capacity = {client: data.draw(st.integers(0, m + 1)) for client in clients}
        for client in clients:
            distance = data.draw(st.lists(st.sampled_from([0.0, 0.5, 0.7, np.nan]), min_size=m, max_size=m))
            policy.tell(client, {"distance": np.where(policy.variable("trained") > 0, distance, np.nan)})
        plan = run(policy, capacity)
        for client, experts in plan.items():
            own = policy.own_expert(client)
            assert owners.setdefault(client, own) in (own, None)
            owners[client] = own
            assert len(experts) <= capacity[client]
            assert set(experts) <= set(np.flatnonzero(may[client]).tolist())
            assert not experts or own in experts
            assert policy.neighbours is None or len(experts) <= policy.neighbours + 1
        known = [own for own in owners.values() if own is not None]
        assert len(set(known)) == len(known)


def test_saved_in_mid_run_it_plans_the_same(tmp_path):
    def rounds(*, stop):
        policy, generator = make_policy("pfedmoap", 12, default_capacity=3, seed=5), np.random.default_rng(2)
        seen = []
        for number in range(6):
            if stop and number == 3:
                policy.save(tmp_path / "state")
                policy = load_policy(tmp_path / "state")
            clients = generator.permutation(12)[:7].tolist()
            for client in clients:
                row = np.where(policy.variable("trained") > 0, generator.random(12), np.nan)
                policy.tell(client, {"distance": row})
            seen.append(simulate(policy, clients, generator))
        return [*seen, frozen(policy)]

    assert rounds(stop=True) == rounds(stop=False)


# The method -----------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")


def state_of(*values, gate=0.0):
    """A state with experts of two numbers each."""
    experts = {f"experts.{j}.w": np.array(value, dtype=np.float32) for j, value in enumerate(values)}
    return {"gate.b": np.full(3, gate, dtype=np.float32), **experts}


def answer(client, expert, value, *, samples=10.0, routed=1.0, gate=1.0):
    parameters = {f"experts.{expert}.w": np.array(value, np.float32), "gate.b": np.full(3, gate, np.float32)}
    return Update(client, parameters, samples, {expert: routed})


class TestMethod:
    def start(self):
        policy, method = PFedMoapPolicy(3, default_capacity=2), make_method("pfedmoap", Setting(NAMES, 3))
        self.state = state_of([1, 1], [8, 8], [9, 9])
        return policy, method

    def round(self, policy, method, clients, answers):
        method.before_plan(policy, self.state, [NAMES.index(client) for client in clients])
        plan = policy.plan([*clients]).experts_by_client()
        briefs = {c: method.brief(NAMES.index(c), experts, self.state) for c, experts in plan.items() if experts}
        updates = [answer(client, briefs[client].trained[0], **how) for client, how in answers.items()]
        combined = method.merge(self.state, updates, briefs, policy)
        self.state = combined.state
        rejected = {rejection.client for rejection in combined.rejected}
        for client in set(answers) - rejected:
            policy.report(client, {briefs[client].trained[0]: (10, 0.5)})
        policy.close_round()
        return briefs

    def test_two_rounds_by_hand(self):
        policy, method = self.start()
        briefs = self.round(
            policy, method, "ab", {"a": {"value": [4, 1]}, "b": {"value": [1, 5], "samples": 30.0, "routed": 0.0}}
        )
        # Both start from the model's first expert, with the even gate.
        assert {name: part.tolist() for name, part in briefs["b"].parts.items()} == {"experts.1.w": [1, 1]}
        assert (briefs["b"].experts, briefs["b"].trained, briefs["b"].down, briefs["b"].up) == ((1,),) * 4
        # The pool has what was sent, also where the gate sent the expert nothing; the gate of newcomers is even.
        assert [self.state[f"experts.{j}.w"].tolist() for j in range(3)] == [[4, 1], [1, 5], [9, 9]]
        assert self.state["gate.b"].tolist() == [0, 0, 0]
        # Global: (10 * [4, 1] + 30 * [1, 5]) / 40.
        assert method.global_view().parts["experts.0.w"] == pytest.approx([1.75, 4])
        assert method.global_view().experts == (0,)
        briefs = self.round(policy, method, "abc", {"c": {"value": [2, 2]}})
        # a and b are 5 apart. c is at the global one: 0.75 and 1 from b, so that b is nearer.
        distance = policy.variable("distance", ["a", "b", "c"])
        assert distance[:2].tolist() == [[0, 5, -1], [5, 0, -1]]
        assert distance[2].tolist() == pytest.approx([np.hypot(2.25, 3), np.hypot(0.75, 1), -1])
        assert {c: brief.experts for c, brief in briefs.items()} == {"a": (0, 1), "b": (0, 1), "c": (1, 2)}
        assert (briefs["c"].trained, briefs["c"].down, briefs["c"].up) == ((2,), (2, 1), (2,))
        # The own expert comes as the global one, the neighbour as it is in the pool; gates are the clients'.
        assert briefs["a"].parts.keys() == {"experts.0.w", "gate.b"}
        assert briefs["a"].parts["experts.0.w"] == pytest.approx([1.75, 4])
        assert briefs["a"].parts["gate.b"].tolist() == [1, 1, 1]
        assert "gate.b" not in briefs["c"].parts
        # Only c answered: the average is of this round's answers.
        assert method.global_view().parts["experts.0.w"].tolist() == [2, 2]

    def test_a_round_without_answers_changes_nothing(self):
        policy, method = self.start()
        self.round(policy, method, "ab", {"a": {"value": [4, 1]}})
        before = {name: value.tolist() for name, value in self.state.items()}
        self.round(policy, method, "ab", {"b": {"value": [np.nan, 1]}})
        assert {name: value.tolist() for name, value in self.state.items()} == before
        assert method.global_view().parts["experts.0.w"].tolist() == [4, 1]

    def test_views(self):
        policy, method = self.start()
        self.round(policy, method, "ab", {"a": {"value": [4, 1]}})
        gate = pytest.approx([1, 1, 1])
        assert method.client_view(0, [0, 1]) == View((0, 1), {"gate.b": gate})  # as in the pool
        assert method.client_view(0, []).experts == (0,)  # without room in its last round
        # b has not trained its expert: it still has the global one. c was never there.
        assert method.client_view(1, [1]) == View((1,), {"experts.1.w": pytest.approx([4, 1])})
        assert method.client_view(2, []) == View((0,), {"experts.0.w": pytest.approx([4, 1])})

    def test_saved_and_restored(self):
        policy, method = self.start()
        self.round(policy, method, "ab", {"a": {"value": [4, 1]}})
        other = make_method("pfedmoap", Setting(NAMES, 3))
        other.restore(method.arrays())
        assert other.global_view() == View((0,), {"experts.0.w": pytest.approx([4, 1])})
        assert other.personal_parts(0)["gate.b"].tolist() == [1, 1, 1]
        with pytest.raises(StateFileError, match="lacks its global expert"):
            other.restore({})

    def test_what_does_not_fit(self):
        policy, method = self.start()
        with pytest.raises(InputError, match="method 'pfedmoap': needs policy 'pfedmoap', not 'greedy'"):
            method.before_plan(make_policy("greedy", 3), self.state, [0])
        with pytest.raises(InputError, match="experts 0 and 2 differ in size"):
            method.before_plan(policy, state_of([1, 1], [2, 2], [3]), [0])


SMALL = {
    "policy": "pfedmoap",
    "rounds": 4,
    "seed": 3,
    "data": {"train_samples": 160, "test_samples": 60},
    "clients": {"count": 6, "capacity": [1, 2, 3], "participation": 0.75, "failure_rate": 0.1, "min_samples": 4},
    "model": {"experts": 6, "channels": [4], "expert_hidden": 4},
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
        run = self.start(tmp_path / "whole", **changes).run
        self.start(tmp_path / "parts", rounds=2, **changes)
        self.start(tmp_path / "parts", resume=True, workers=processes, **changes)
        assert self.contents(tmp_path / "parts") == self.contents(tmp_path / "whole")
        assignment = run.schedule_arrays("assignment")
        assert assignment[0].sum(axis=1).max() == 1
        assert assignment[-1].sum(axis=1).max() == 3
        # Each expert is trained by one client alone.
        samples = run.schedule_arrays("samples")
        assert (np.any(samples > 0, axis=0).sum(axis=0) <= 1).all()

    def test_too_few_experts(self, tmp_path):
        with pytest.raises(InputError, match="experts = 3: policy 'pfedmoap' needs one"):
            self.start(tmp_path / "run", **{"model.experts": 3})
