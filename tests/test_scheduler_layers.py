"""Layers of experts in the round loop: bounds of all clients and of single ones, rounds, states and policies."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_tools import assert_unchanged, frozen, simulate

from fedmoe_sched import (
    CapacityProfile,
    ExpertCost,
    ExpertLayers,
    InputError,
    Scheduler,
    StateFileError,
    schedule,
)
from fedmoe_sched._files import read_archive, write_archive
from fedmoe_sched.metrics import fitness_given_up
from fedmoe_sched.policies import POLICIES, load_policy, make_policy

LAYERS = {"layer_of": [0, 1, 0, 1], "layer_min": 1, "layer_max": [2, 1]}
TAKE_LAYERS = ["scheduler", "random", "greedy", "desirability", "balanced", "flex-moe", "fedamole"]


def layered(policy="scheduler", **options) -> Scheduler:
    return make_policy(policy, 4, default_capacity=3, layers=LAYERS, **options)


def of_layers(experts) -> list[int]:
    return [sum(LAYERS["layer_of"][e] == g for e in experts) for g in range(2)]


@pytest.mark.parametrize("policy", TAKE_LAYERS)
def test_every_plan_keeps_the_layers(policy):
    scheduler, generator = layered(policy, seed=3), np.random.default_rng(1)
    scheduler.add_client(0, layer_min=[0, 1], layer_max=[0, 1])
    scheduler.add_client(1, capacity=4, layer_max=2)
    for _ in range(6):
        here = generator.permutation(8)[:5].tolist()
        plan = simulate(scheduler, here, generator)["plan"]
        for client in here:
            low, high = {0: ([0, 1], [0, 1]), 1: ([1, 1], [2, 2])}.get(client, ([1, 1], [2, 1]))
            assert all(a <= k <= b for a, k, b in zip(low, of_layers(plan[client]), high, strict=True))
            if policy != "fedamole":
                assert len(plan[client]) == sum(high)  # filled, as far as layers go


@pytest.mark.parametrize("policy", sorted(set(POLICIES) - set(TAKE_LAYERS)))
def test_rules_without_layers_refuse_them(policy):
    for given_as in (LAYERS, ExpertLayers(**LAYERS)):
        with pytest.raises(InputError, match=rf"layers = .*: policy '{policy}' has layers = None"):
            make_policy(policy, 4, layers=given_as)


def test_a_plan_is_what_schedule_decides_with_the_same_layers():
    fitness = np.random.default_rng(7).random((5, 4))
    scheduler = layered(balance=0.1)
    for client, row in enumerate(fitness):
        scheduler.add_client(client, fitness=row)
    scheduler.add_client(3, layer_min=[2, 0], layer_max=[2, 0])
    answer = scheduler.plan(range(5))
    low, high = np.ones((5, 2), dtype=int), np.tile([2, 1], (5, 1))
    low[3], high[3] = (2, 0), (2, 0)
    layers = ExpertLayers(LAYERS["layer_of"], low, high)
    same = schedule(fitness, np.zeros(4), 3, layers=layers, balance=0.1)
    assert answer.objective == pytest.approx(same.objective, abs=1e-12)
    assert answer.problem.layers.layer_min.tolist() == low.tolist()
    assert answer.experts_of(3) == [0, 2]
    assert answer.verify().feasible
    for client, experts in answer.experts_by_client().items():
        scheduler.report(client, dict.fromkeys(experts, (1, 0.5)))
    record = scheduler.close_round()
    assert record.fitness_given_up == pytest.approx(fitness_given_up(fitness, 3, same, layers=layers))


def test_fitness_given_up_counts_what_layers_allow():
    fitness = [[0.9, 0.8, 0.2]]
    layers = ExpertLayers([0, 0, 1], layer_min=[0, 1], layer_max=1)
    assert fitness_given_up(fitness, 2, [[1, 0, 1]]) == pytest.approx(0.6 / 1.7)
    assert fitness_given_up(fitness, 2, [[1, 0, 1]], layers=layers) == 0
    assert fitness_given_up(fitness, 2, [[0, 1, 1]], layers=layers) == pytest.approx(0.1 / 1.1)


def test_who_cannot_train_what_its_layers_demand_sits_out():
    scheduler = layered(balance=None)
    scheduler.add_client("small", capacity=1)
    scheduler.add_client("narrow", eligible=[0, 2])
    scheduler.add_client("one layer", capacity=1, layer_min=[0, 0])
    scheduler.add_client("well", capacity=2)
    counts = {
        client: len(experts) for client, experts in scheduler.plan(scheduler.clients).experts_by_client().items()
    }
    assert counts == {"small": 0, "narrow": 0, "one layer": 1, "well": 2}
    scheduler.cancel_round()
    assert len(scheduler.plan({"small": 2}).experts_of("small")) == 2  # until it can


@pytest.mark.parametrize("policy", TAKE_LAYERS)
def test_a_round_that_nobody_can_take_part_in_is_empty(policy):
    scheduler = layered(policy)
    assert scheduler.plan({"small": 1, "idle": 0}).loads.tolist() == [0, 0, 0, 0]
    record = scheduler.close_round()
    assert (record.available, record.planned) == (2, ())


def test_a_slow_round_keeps_nobody_out_of_its_layers_for_ever():
    """One expert still fits the deadline, the two that the layers demand do not: the correction relaxes."""
    scheduler = Scheduler(
        2,
        expert_cost=ExpertCost(expert_bytes=1e6, samples=100),
        deadline=10.0,
        default_capacity=2,
        layers={"layer_of": [0, 1], "layer_min": 1},
        balance=None,
    )
    scheduler.add_client("phone", profile=CapacityProfile(ms_per_sample=10, memory_bytes=1e9))
    assert scheduler.plan(["phone"]).experts_of("phone") == [0, 1]
    scheduler.report("phone", {0: (100, 0.5), 1: (100, 0.5)}, seconds=24.0)
    scheduler.close_round()
    slow = scheduler.speed_correction_of("phone")
    assert 3 * slow < 10 < 6 * slow  # seconds of one expert, and of two
    waited = 0
    while not scheduler.plan(["phone"]).experts_of("phone"):
        scheduler.close_round()
        waited += 1
        assert waited < 100
    assert waited > 0
    assert 1 < scheduler.speed_correction_of("phone") < slow


def test_clients_that_sit_out_take_no_place_in_a_selection_and_are_owed_nothing():
    scheduler = layered(selection={"clients": 2}, fairness={"client_rate": 0.5}, balance=None)
    scheduler.add_client("small", capacity=1)
    for client in ("a", "b", "c"):
        scheduler.add_client(client)
    generator = np.random.default_rng(0)
    for _ in range(4):
        plan = simulate(scheduler, ["small", "a", "b", "c"], generator)["plan"]
        assert sum(bool(experts) for experts in plan.values()) == 2
    assert scheduler.variable("fair_queue", ["small"]).tolist() == [0]


@pytest.mark.parametrize("policy", TAKE_LAYERS)
def test_layers_are_saved_and_loaded(tmp_path, policy):
    def run(*, stop: bool) -> list:
        scheduler, generator = layered(policy, seed=5), np.random.default_rng(2)
        rounds = []
        for number in range(6):
            if number == 2:
                scheduler.add_client(1, layer_min=0, layer_max=[0, 2])
            if stop and number in {1, 4}:
                scheduler.save(tmp_path / "state.npz")
                scheduler = load_policy(tmp_path / "state.npz")
            rounds.append(simulate(scheduler, generator.permutation(7)[:5].tolist(), generator))
        return [*rounds, frozen(scheduler)]

    assert run(stop=True) == run(stop=False)


def test_states_from_before_layers_and_flawed_ones(tmp_path):
    path = tmp_path / "state.npz"
    old = Scheduler(4, default_capacity=2)
    old.plan(["a"])
    old.save(path)
    arrays, metadata = read_archive(path)
    del metadata["options"]["layers"]
    write_archive(path, arrays, metadata)
    assert Scheduler.load(path).layers_of(["a"]) is None
    metadata["options"]["layers"] = {"layer_of": [0, 0, 1], "layer_min": 0, "layer_max": 1}
    write_archive(path, arrays, metadata)
    with pytest.raises(StateFileError, match="layers: is of 3 experts, must be of 4"):
        Scheduler.load(path)
    metadata["options"]["layers"] = LAYERS  # whose bounds of clients the state does not have
    write_archive(path, arrays, metadata)
    with pytest.raises(StateFileError, match="lacks or has in excess: layer_max, layer_min"):
        Scheduler.load(path)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 0, 1, 1], r"layers = \[0, 0, 1, 1\]: must be a ExpertLayers or a mapping of its fields"),
        ({"layer": [0, 0, 1, 1]}, "layers: .*unexpected keyword argument 'layer'"),
        ({"layer_of": [0, 1]}, "layers: is of 2 experts, must be of 4"),
        ({"layer_of": [0, 0, 2, 2]}, "layer_of: has no expert in layer 1"),
        ({"layer_of": [0, 0, 1, 1], "layer_min": [[1, 0]] * 3}, r"layers: has bounds of 3 clients .*add_client"),
        ({"layer_of": [0, 0, 1, 1], "layer_min": 2, "layer_max": 1}, r"layer_min\[0\] = 2: must be <= layer_max"),
    ],
)
def test_wrong_layers(layers, message):
    with pytest.raises(InputError, match=message):
        Scheduler(4, default_capacity=2, layers=layers)


def test_a_default_capacity_that_is_too_small_for_the_layers():
    message = r"default_capacity = 1: must be 0, or at least 2, which layers demand"
    with pytest.raises(InputError, match=message):
        Scheduler(4, layers=LAYERS)
    assert Scheduler(4, default_capacity=0, layers=LAYERS).plan(["a"]).experts_of("a") == []


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"layer_min": [2, 1], "layer_max": 1}, r"client 'a': layer_min\[0\] = 2: must be <= layer_max\[0\] = 1"),
        ({"layer_min": [0, 2]}, r"client 'a': layer_min\[1\] = 2: must be <= layer_max\[1\] = 1"),
        ({"layer_max": [1, 0]}, r"client 'a': layer_min\[1\] = 1: must be <= layer_max\[1\] = 0"),
        ({"layer_max": [1, 2, 3]}, r"client 'a': layer_max: has shape \(3,\), must be \(2,\) \(one per layer\)"),
        ({"layer_min": -1}, r"client 'a': layer_min = -1: must be >= 0"),
    ],
)
def test_wrong_bounds_of_a_client_change_nothing(bounds, message):
    scheduler = layered()
    before = frozen(scheduler)
    with pytest.raises(InputError, match=message):
        scheduler.add_client("a", capacity=2, **bounds)
    assert_unchanged(scheduler, before)
    with pytest.raises(InputError, match="client 'a': layer_min: the scheduler needs layers to use it"):
        Scheduler(4).add_client("a", layer_min=1)


def test_bounds_of_a_client_that_are_left_out_stay_as_they_are():
    scheduler = layered()
    scheduler.add_client("a", layer_min=[0, 1])
    scheduler.add_client("a", layer_max=[1, 2])
    scheduler.add_client("a", capacity=2)
    own = scheduler.layers_of(["a", "new"])
    assert own.layer_min.tolist() == [[0, 1], [1, 1]]
    assert own.layer_max.tolist() == [[1, 2], [2, 1]]
    assert scheduler.layers_of(["new"]).n_clients is None  # none of its own


@settings(max_examples=drawn(40), deadline=None)
@given(data=st.data())
def test_rounds_are_feasible_whatever_clients_have(data):
    """Whoever is planned keeps its bounds; whoever is not could not have kept them."""
    m, n = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    layer_of = data.draw(st.lists(st.integers(0, 1), min_size=m, max_size=m).filter(lambda x: min(x) == 0))
    groups = max(layer_of) + 1
    scheduler = Scheduler(m, layers={"layer_of": layer_of}, balance=0.1)
    world = []
    for client in range(n):
        high = data.draw(st.lists(st.integers(0, 2), min_size=groups, max_size=groups))
        low = [data.draw(st.integers(0, h)) for h in high]
        capacity = data.draw(st.integers(0, m))
        eligible = data.draw(st.sets(st.integers(0, m - 1)))
        scheduler.add_client(client, capacity=capacity, eligible=eligible, layer_min=low, layer_max=high)
        room = [min(h, sum(layer_of[e] == g for e in eligible)) for g, h in enumerate(high)]
        able = capacity > 0 and any(room) and sum(low) <= capacity and all(
            r >= k for r, k in zip(room, low, strict=True)
        )  # fmt: skip
        world.append((capacity, eligible, low, high, room, able))
    plan = scheduler.plan(range(n)).experts_by_client()
    for client, (capacity, eligible, low, high, room, able) in enumerate(world):
        experts = plan[client]
        counts = [sum(layer_of[e] == g for e in experts) for g in range(groups)]
        assert set(experts) <= eligible
        assert bool(experts) == able
        if able:
            assert all(a <= k <= b for a, k, b in zip(low, counts, high, strict=True))
            assert len(experts) == min(capacity, sum(room))
