"""FLEX-MoE and FedAMoLE: the arithmetic of each rule by hand, and bounds that exclude one another."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_tools import assert_unchanged, frozen, simulate
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from fedmoe_sched import InfeasibleError, InputError, Status
from fedmoe_sched.policies import load_policy, make_policy
from fedmoe_sched.policies.fedamole import FedAmolePolicy
from fedmoe_sched.policies.flex_moe import FlexMoePolicy
from fedmoe_sched.schedule import balanced_load_bounds

FITNESS = {"a": [0.9, 0.1, 0.2], "b": [0.8, 0.3, 0.1], "c": [0.7, 0.6, 0.5]}


def ready(cls, fitness=FITNESS, **options):
    policy = cls(len(next(iter(fitness.values()))), **options)
    for client, row in fitness.items():
        policy.add_client(client, fitness=row)
    return policy


def run(policy, clients, *, failed=(), fitness=FITNESS):
    """Plan and close one round in which rewards change no fitness; return the plan."""
    answer = policy.plan(list(clients))
    for client, experts in answer.experts_by_client().items():
        if client in failed:
            policy.report(client, failed=True)
        else:
            policy.report(client, {e: (10, fitness[client[0]][e]) for e in experts})
    policy.close_round()
    return answer


class TestFlexMoe:
    def test_deficits_of_three_rounds_by_hand(self):
        policy = ready(FlexMoePolicy, deficit_weight=0.6)  # loads of 0 to 2: 25 % of the mean 1, outwards
        # No deficit: 0.9 + 0.8 + 0.6. Client b fails, so each expert should have had 2/3 of a client.
        first = run(policy, "abc", failed="b")
        assert first.experts_by_client() == {"a": [0], "b": [0], "c": [1]}
        assert policy.deficit == pytest.approx([0, 0, 2 / 3])
        # Expert 2 is worth 0.6 * 2/3 / 1 = 0.4 more: c has 0.9 there, 0.6 at 1. Then 1 client for each.
        second = run(policy, "abc")
        assert second.experts_by_client() == {"a": [0], "b": [0], "c": [2]}
        assert second.objective == pytest.approx(0.9 + 0.8 + 0.5 + 0.4)
        assert policy.deficit == pytest.approx([0, 1, 2 / 3])
        # Worth 0, 0.6 and 0.4 more: a 0.9 at 0, b 0.9 at 1, c 1.2 at 1.
        third = run(policy, "abc")
        assert third.experts_by_client() == {"a": [0], "b": [1], "c": [1]}
        assert third.objective == pytest.approx(0.9 + 0.9 + 1.2)
        assert policy.deficit == pytest.approx([0, 0, 2 / 3 + 1])

    def test_without_weight_deficits_decide_nothing(self):
        policy = ready(FlexMoePolicy, deficit_weight=0)
        plans = [run(policy, "abc").experts_by_client() for _ in range(3)]
        assert plans == [{"a": [0], "b": [0], "c": [1]}] * 3
        assert policy.deficit.tolist() == [0, 0, 3]

    def test_a_target_of_ones_own(self):
        policy = ready(FlexMoePolicy, deficit_weight=0.6, target=[0, 1, 5])
        run(policy, "abc")
        assert policy.deficit.tolist() == [0, 0, 5]  # of loads 2, 1, 0
        # Mean target 2: expert 2 is worth 0.6 * 5 / 2 = 1.5 more.
        assert run(policy, "abc").objective == pytest.approx(0.9 + 0.1 + 1.5 + 0.5 + 1.5)
        assert policy.deficit.tolist() == [0, 1, 8]

    def test_only_closed_rounds_with_reports_change_the_deficit(self):
        policy = ready(FlexMoePolicy)
        run(policy, "abc")
        before = policy.deficit.tolist()
        assert before == [0, 0, 1]
        policy.plan([*"abc"])
        policy.report("a", {0: (10, 0.9)})
        policy.cancel_round()
        assert policy.deficit.tolist() == before
        run(policy, "abc", failed="abc")
        assert policy.deficit.tolist() == before

    def test_a_failed_plan_leaves_the_deficit(self):
        policy = ready(FlexMoePolicy, load_min=1)
        run(policy, "abc")
        before = frozen(policy)
        with pytest.raises(InfeasibleError, match="need 3 clients"):
            policy.plan([*"ab"])
        assert_unchanged(policy, before)

    def test_the_deficit_survives_the_file(self, tmp_path):
        policy = ready(FlexMoePolicy, target=1.5, deficit_weight=0.2)
        run(policy, "abc")
        policy.save(tmp_path / "state")
        again = load_policy(tmp_path / "state")
        assert again.deficit.tolist() == [0, 0.5, 1.5]
        assert (again.target.tolist(), again.deficit_weight) == ([1.5] * 3, 0.2)
        assert run(again, "abc").objective == run(policy, "abc").objective

    def test_the_weight_is_free_of_scale(self):
        one, three = (ready(FlexMoePolicy, balance=None, deficit_weight=0.6) for _ in range(2))
        names = [f"{client}{copy}" for client in FITNESS for copy in range(3)]
        for name in names:
            three.add_client(name, fitness=FITNESS[name[0]])
        seen = set()
        for _ in range(6):
            few, many = run(one, "abc").experts_by_client(), run(three, names).experts_by_client()
            assert many == {name: few[name[0]] for name in names}
            assert three.deficit == pytest.approx(3 * one.deficit)
            seen.add(tuple(map(tuple, few.values())))
        assert len(seen) > 1

    def test_bounds_that_cannot_hold_are_widened(self):
        policy = ready(FlexMoePolicy, balance=0)
        policy.add_client("a", eligible=[0])
        policy.add_client("b", eligible=[0])
        answer = policy.plan([*"abc"])
        assert answer.experts_by_client() == {"a": [0], "b": [0], "c": [1]}
        assert sorted(map(str, answer.relaxed)) == ["load_max[0]: 1 -> 2", "load_min[2]: 1 -> 0"]


class TestFedAmole:
    def test_degrees_are_exact_and_the_sum_is_the_best(self):
        policy = ready(FedAmolePolicy, clients_per_expert=2, default_capacity=3)
        answer = policy.plan([*"abc"])
        assert answer.loads.tolist() == [2, 2, 2]
        # Each expert leaves out the client least fit for it: c, a and b, of 4.2 in all.
        assert answer.experts_by_client() == {"a": [0, 2], "b": [0, 1], "c": [1, 2]}
        assert answer.objective == pytest.approx(3.3)
        assert (answer.relaxed, answer.status) == ((), Status.OPTIMAL)

    def test_least_and_most_experts_of_a_client(self):
        options = {"clients_per_expert": 1, "default_capacity": 3}
        rows = {"a": [0.9, 0.8, 0.7], "b": [0.5, 0.1, 0.1], "c": [0.1, 0.1, 0.2]}

        def plan(**more):
            answer = ready(FedAmolePolicy, rows, **options, **more).plan([*"abc"])
            assert answer.relaxed == ()
            return answer.experts_by_client()

        assert plan(min_experts=0) == {"a": [0, 1, 2], "b": [], "c": []}
        assert plan(min_experts=0, max_experts=2) == {"a": [1, 2], "b": [0], "c": []}  # 2.0, the next best 1.9
        assert plan() == {"a": [1], "b": [0], "c": [2]}  # 0.5 + 0.8 + 0.2

    def test_capacity_is_not_filled(self):
        policy = ready(FedAmolePolicy, clients_per_expert=1, default_capacity=3)
        assert policy.plan([*"abc"]).pairs.counts.tolist() == [1, 1, 1]

    @pytest.mark.parametrize(("capacity", "load"), [(1, 2), (2, 5), (4, 10), (9, 20)])
    def test_by_default_experts_fill_the_capacities_evenly(self, capacity, load):
        policy = make_policy("fedamole", 8, default_capacity=capacity)
        answer = policy.plan(range(20))
        assert answer.loads.tolist() == [load] * 8
        if capacity > 1:  # 20 places do not go into 8: four clients have nothing to do
            assert answer.relaxed == ()
            assert answer.pairs.counts.min() >= 1
        else:
            assert sum(r.asked - r.used for r in answer.relaxed) == 4

    def test_too_few_slots_starve_experts_evenly(self):
        policy = ready(FedAmolePolicy, clients_per_expert=2, default_capacity=2)
        answer = policy.plan([*"ab"])  # 4 slots for 6 places
        assert sorted(answer.loads.tolist()) == [1, 1, 2]
        assert [(r.bound, r.asked, r.used) for r in answer.relaxed] == [("load_min", 2, 1)] * 2
        assert policy.close_round().relaxed == 2

    def test_too_few_places_are_shared_evenly_and_by_relevance(self):
        rows = {"a": [0.9, 0.9], "b": [0.8, 0.8], "c": [0.7, 0.7], "d": [0.1, 0.1], "e": [0.6, 0.2]}
        policy = ready(FedAmolePolicy, rows, clients_per_expert=2, min_experts=2, default_capacity=2)
        answer = policy.plan([*"abcde"])  # a and b alone would fill all four places, with most relevance
        assert answer.pairs.counts.tolist() == [1, 1, 1, 0, 1]
        assert answer.objective == pytest.approx(0.9 + 0.8 + 0.7 + 0.6)
        assert list(map(str, answer.relaxed)) == [
            f"min_experts[{i}]: 2 -> {used}" for i, used in enumerate([1, 1, 1, 0, 1])
        ]
        assert [(r.client, r.expert) for r in answer.relaxed[:2]] == [(0, None), (1, None)]

    def test_no_client_must_take_more_than_was_asked_because_another_cannot(self):
        policy = ready(FedAmolePolicy, clients_per_expert=1, default_capacity=2)
        for client in "ab":
            policy.add_client(client, eligible=[0])
        answer = policy.plan([*"abc"])
        assert answer.experts_by_client() == {"a": [0], "b": [], "c": [1, 2]}
        assert list(map(str, answer.relaxed)) == ["min_experts[1]: 1 -> 0"]
        assert answer.problem.min_experts.tolist() == [1, 0, 1]

    def test_a_client_with_less_room_than_it_must_take(self):
        policy = ready(FedAmolePolicy, clients_per_expert=2, min_experts=2, default_capacity=3)
        answer = policy.plan({"a": 1, "b": 3, "c": 3})
        assert list(map(str, answer.relaxed)) == ["min_experts[0]: 2 -> 1"]
        assert answer.loads.tolist() == [2, 2, 2]
        assert answer.pairs.counts.tolist() == [1, 3, 2]  # a at expert 0, which leaves out c

    @pytest.mark.parametrize(
        ("clients", "options", "message"),
        [
            ({"a": 1, "b": 3, "c": 0}, {"min_experts": 2}, r"client a \(and 1 more\): must take 2 .*room for 1"),
            ({"a": 2, "b": 2}, {}, r"experts \{0, 1, 2\} need 6 clients"),
            ({"a": 3, "b": 3, "c": 3}, {"min_experts": 3}, r"clients \{a, b, c\} must take 9 places"),
        ],
    )
    def test_strict_raises_and_changes_nothing(self, clients, options, message):
        policy = ready(FedAmolePolicy, clients_per_expert=2, strict=True, **options)
        before = frozen(policy)
        with pytest.raises(InfeasibleError, match=message):
            policy.plan(clients)
        assert_unchanged(policy, before)
        assert make_policy("fedamole", 3, strict=False, clients_per_expert=2, **options).plan(clients).relaxed

    def test_every_layer_is_a_module_of_its_own(self):
        """Four clients, one expert of each layer: two clients for each of the first two, four for the last one."""
        layers = {"layer_of": [0, 0, 1], "layer_min": 1, "layer_max": 1}
        rows = {"a": [0.9, 0.8, 0.1], "b": [0.9, 0.2, 0.1], "c": [0.8, 0.1, 0.1], "d": [0.3, 0.2, 0.1]}
        answer = ready(FedAmolePolicy, rows, default_capacity=2, layers=layers).plan([*"abcd"])
        assert answer.loads.tolist() == [2, 2, 4]
        assert answer.experts_by_client() == {"a": [1, 2], "b": [0, 2], "c": [0, 2], "d": [1, 2]}
        assert answer.relaxed == ()

    def test_layers_that_clients_must_keep_give_an_expert_more_than_its_number(self):
        layers = {"layer_of": [0, 0, 1], "layer_min": 1}
        options = {"clients_per_expert": 1, "default_capacity": 2, "layers": layers}
        answer = ready(FedAmolePolicy, **options).plan([*"abc"])
        assert [r.bound for r in answer.relaxed] == ["load_max"] * len(answer.relaxed)
        assert sum(r.used - r.asked for r in answer.relaxed) == 3  # 6 places for 3
        assert answer.loads[2] == 3
        with pytest.raises(InfeasibleError, match="must take"):
            ready(FedAmolePolicy, **options, strict=True).plan([*"abc"])

    @pytest.mark.parametrize("name", ["min_experts", "max_experts"])
    def test_layers_say_how_many_experts_a_client_has(self, name, tmp_path):
        layers = {"layer_of": [0, 0, 1], "layer_min": 1}
        with pytest.raises(InputError, match=f"{name} = 2: layer_min and layer_max say that"):
            make_policy("fedamole", 3, layers=layers, default_capacity=2, **{name: 2})
        make_policy("fedamole", 3, layers=layers, default_capacity=2).save(tmp_path / "state")
        assert load_policy(tmp_path / "state").plan(range(4)).loads.tolist() == [2, 2, 4]

    def test_strict_and_soft_exclude_one_another(self):
        with pytest.raises(InputError, match="soft = True: excludes strict = True"):
            make_policy("fedamole", 3, strict=True, soft=True)
        make_policy("fedamole", 3, soft=True)

    def test_strict_plans_what_can_be_planned(self):
        policy = ready(FedAmolePolicy, clients_per_expert=2, min_experts=2, strict=True, default_capacity=2)
        assert policy.plan([*"abc"]).loads.tolist() == [2, 2, 2]

    def test_options_survive_the_file(self, tmp_path):
        own = {"clients_per_expert": 2, "min_experts": 0, "max_experts": 3, "strict": True}
        make_policy("fedamole", 3, **own).save(tmp_path / "state")
        options = load_policy(tmp_path / "state").options()
        assert {name: options[name] for name in own} == own


@pytest.mark.parametrize("name", ["flex-moe", "fedamole"])
def test_starts_from_the_prices_of_the_last_round(name, monkeypatch):
    place = {"flex-moe": "fedmoe_sched.schedule", "fedamole": "fedmoe_sched.policies.fedamole"}[name]
    module, starts = sys.modules[place], []  # the name `fedmoe_sched.schedule` is that of a function
    solve = module.solve

    def noting(*arguments, warm_start, **options):
        starts.append(warm_start)
        return solve(*arguments, warm_start=warm_start, **options)

    monkeypatch.setattr(module, "solve", noting)
    policy = ready({"flex-moe": FlexMoePolicy, "fedamole": FedAmolePolicy}[name])
    prices = run(policy, "abc").prices
    run(policy, "abc")
    assert starts[0] is None
    assert (starts[1] == prices).all()


def most_places(clients, experts, open_pairs) -> int:
    """Places that can be dealt out at most when both sides are limited: a maximum flow."""
    n, m = open_pairs.shape
    table = np.zeros((n + m + 2, n + m + 2), dtype=np.int32)
    table[0, 1 : n + 1] = clients
    table[1 : n + 1, n + 1 : -1] = open_pairs
    table[n + 1 : -1, -1] = experts
    return int(maximum_flow(csr_array(table), 0, n + m + 1).flow_value)


@st.composite
def rounds(draw, most_clients=7, most_experts=5):
    """Sizes, capacities and eligible pairs of a round, with fitness that has ties and negative values."""
    n, m = draw(st.integers(1, most_clients)), draw(st.integers(1, most_experts))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    eligible = generator.random((n, m)) < draw(st.sampled_from([0.3, 0.7, 1.0]))
    fitness = generator.integers(-2, 4, (n, m)) / draw(st.sampled_from([1.0, 4.0, 1e6]))
    return generator.integers(0, m + 2, n), eligible, fitness


def planned(policy, capacity, eligible, fitness):
    for i, row in enumerate(fitness):
        policy.add_client(i, fitness=row, eligible=np.flatnonzero(eligible[i]).tolist(), capacity=int(capacity[i]))
    return policy.plan(range(len(fitness)))


@given(rounds(), st.none() | st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=drawn(80), deadline=None)
def test_degrees_hold_or_the_schedule_says_which_were_relaxed(case, places, least, more):
    capacity, eligible, fitness = case
    options = {"clients_per_expert": places, "min_experts": least, "max_experts": max(1, least + more)}
    answer = planned(FedAmolePolicy(fitness.shape[1], **options), *case)
    assert answer.status is Status.OPTIMAL
    room = np.minimum(np.minimum(capacity, options["max_experts"]), eligible.sum(axis=1))
    places = places or max(1, room.sum() // fitness.shape[1])
    chosen = answer.pairs.mask()
    counts, loads = chosen.sum(axis=1), chosen.sum(axis=0)
    assert not (chosen & ~eligible).any()
    assert (counts <= room).all()
    assert (loads <= places).all()
    used = {(r.bound, r.expert if r.client is None else r.client): r.used for r in answer.relaxed}
    assert all(r.used < r.asked == (places if r.bound == "load_min" else least) for r in answer.relaxed)
    assert all(loads[j] == used.get(("load_min", j), places) for j in range(len(loads)))
    assert all(counts[i] >= used.get(("min_experts", i), least) for i in range(len(counts)))
    # No fewer places would have done.
    starved, short = places * len(loads) - loads.sum(), np.maximum(0, least - counts).sum()
    assert starved == places * len(loads) - most_places(room, places, eligible)
    assert short == least * len(counts) - most_places(np.minimum(room, least), places, eligible)
    assert sum(r.asked - r.used for r in answer.relaxed) == starved + short
    assert (answer.problem.min_experts <= least).all()


@given(rounds(most_clients=4, most_experts=3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=drawn(60), deadline=None)
def test_relaxed_degrees_are_the_most_even_and_then_the_most_relevant(case, places, least):
    capacity, eligible, fitness = case
    n, m = fitness.shape
    policy = FedAmolePolicy(m, clients_per_expert=places, min_experts=least, max_experts=3)
    answer = planned(policy, *case)
    every = (np.arange(2 ** (n * m))[:, None] >> np.arange(n * m) & 1).astype(bool).reshape(-1, n, m)
    room = np.minimum(np.minimum(capacity, 3), eligible.sum(axis=1))
    counts, loads = every.sum(axis=2), every.sum(axis=1)
    fits = (
        (counts <= room).all(axis=1) & (loads == answer.loads).all(axis=1) & ~(every & ~eligible).any(axis=(1, 2))
    )
    covered = np.minimum(counts[fits], least)
    relevance = (every[fits] * fitness).sum(axis=(1, 2))
    best = max(zip(covered.sum(axis=1), -(covered**2).sum(axis=1), relevance, strict=True))
    used = np.minimum(answer.pairs.counts, least)
    assert (used.sum(), -(used**2).sum()) == best[:2]
    assert answer.objective == pytest.approx(best[2], rel=1e-9, abs=1e-12)


@given(rounds(most_clients=4, most_experts=3), st.none() | st.integers(1, 3), st.data())
@settings(max_examples=drawn(60), deadline=None)
def test_layers_are_kept_and_experts_relaxed_by_the_fewest_places(case, places, data):
    """Against every assignment: no expert has more than its number where there is another way."""
    capacity, eligible, fitness = case
    n, m = fitness.shape
    layer_of = np.sort(data.draw(st.lists(st.integers(0, 1), min_size=m, max_size=m)))
    layer_of -= layer_of.min()
    groups = layer_of.max() + 1
    high = np.array([[data.draw(st.integers(0, 2)) for _ in range(groups)] for _ in range(n)])
    low = np.array([[data.draw(st.integers(0, h)) for h in row] for row in high])
    policy = FedAmolePolicy(m, clients_per_expert=places, layers={"layer_of": layer_of.tolist()})
    for i, row in enumerate(fitness):
        policy.add_client(
            i, fitness=row, eligible=np.flatnonzero(eligible[i]).tolist(), capacity=int(capacity[i]),
            layer_min=low[i], layer_max=high[i],
        )  # fmt: skip
    answer = policy.plan(range(n))
    problem = answer.problem
    asked = {r.expert: r.asked for r in answer.relaxed}
    wanted = np.array([asked.get(j, problem.load_min[j]) for j in range(m)])
    assert (wanted == places).all() if places else all(len({*wanted[layer_of == g]}) == 1 for g in range(groups))
    every = (np.arange(2 ** (n * m))[:, None] >> np.arange(n * m) & 1).astype(bool).reshape(-1, n, m)
    within = np.stack([every[:, :, layer_of == g].sum(axis=2) for g in range(groups)], axis=2)
    lowest, highest = problem.layers.bounds_of(slice(0, n), n)
    fits = (every.sum(axis=2) <= problem.capacity).all(axis=1) & ~(every & ~eligible).any(axis=(1, 2))
    fits &= ((within >= lowest) & (within <= highest)).all(axis=(1, 2))
    loads = every[fits].sum(axis=1)
    short, over = (np.maximum(0, d).sum(axis=1) for d in (wanted - loads, loads - wanted))
    moved = sum(abs(r.asked - r.used) for r in answer.relaxed)
    assert any(r.bound == "load_max" for r in answer.relaxed) <= (over > 0).all()
    assert moved == (short[over == 0].min() if (over == 0).any() else (short + over).min())
    allowed = ((loads >= problem.load_min) & (loads <= problem.load_max)).all(axis=1)
    best = (every[fits][allowed] * fitness).sum(axis=(1, 2)).max()
    assert answer.objective == pytest.approx(best, rel=1e-9, abs=1e-12)


@given(rounds(), st.sampled_from([0.0, 0.25, 1.0]), st.integers(0, 9))
@settings(max_examples=drawn(80), deadline=None)
def test_loads_are_bounded_or_the_schedule_says_which_bounds_were_widened(case, balance, seed):
    capacity, eligible, fitness = case
    policy = FlexMoePolicy(fitness.shape[1], balance=balance)
    answer = planned(policy, *case)
    for _ in range(2):  # with deficits too
        room = np.minimum(capacity, eligible.sum(axis=1))
        assert answer.status is Status.OPTIMAL
        assert (answer.pairs.counts == room).all()
        assert not (answer.pairs.mask() & ~eligible).any()
        low, high = (bound.copy() for bound in balanced_load_bounds(room, len(answer.loads), balance))
        for r in answer.relaxed:
            (low if r.bound == "load_min" else high)[r.expert] = r.used
        assert (low <= answer.loads).all()
        assert (answer.loads <= high).all()
        policy.cancel_round()
        simulate(policy, range(len(fitness)), np.random.default_rng(seed))
        answer = policy.plan(range(len(fitness)))
