"""The round loop: arithmetic of a round, churn of clients, and refusals that change nothing."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from scheduler_tools import assert_unchanged, finish, frozen, plain, record_values, simulate

from fedmoe_sched import (
    CapacityProfile,
    ExpertCost,
    FitnessOptions,
    InfeasibleError,
    InputError,
    NoAssignmentError,
    RoundRecord,
    Schedule,
    Scheduler,
    UsageOptions,
    schedule,
)
from fedmoe_sched.result import Status, StopReason

COST = ExpertCost(expert_bytes=1e6, samples=100, memory_overhead=4)


def test_one_round_by_hand():
    scheduler = Scheduler(
        ["vision", "audio"],
        fitness={"rate": 0.5, "prior": 0.2},
        usage={"decay": 0.25},
        balance=None,
        usage_weight=0.0,
    )
    scheduler.add_client("anna", fitness={"vision": 0.8})
    scheduler.add_client("ben", capacity=2)
    answer = scheduler.plan(["anna", "ben", "carl"])
    assert answer.experts_of("anna") == ["vision"]
    assert answer.experts_of("ben") == ["vision", "audio"]
    carl = answer.experts_of("carl")[0]
    scheduler.report("anna", {"vision": (40, 0.4)}, seconds=3.5)
    scheduler.report("ben", {"vision": (10, 1.0), "audio": (30, 0.0)}, seconds=2)
    record = scheduler.close_round()

    # 0.5 * 0.8 + 0.5 * 0.4; the rest keeps the prior
    np.testing.assert_allclose(scheduler.fitness_of("anna"), [0.6, 0.2], rtol=1e-15)
    np.testing.assert_allclose(scheduler.fitness_of("ben"), [0.6, 0.1], rtol=1e-15)
    np.testing.assert_allclose(scheduler.fitness_of("carl"), [0.2, 0.2])
    np.testing.assert_allclose(scheduler.usage, [0.25 * 50, 0.25 * 30])
    assert record.round == scheduler.round == 1
    assert (record.planned, record.answered, record.failed) == (
        ("anna", "ben", "carl"),
        ("anna", "ben"),
        ("carl",),
    )
    loads = {"vision": 2, "audio": 1}
    loads[carl] += 1
    assert record.loads == (loads["vision"], loads["audio"])
    assert record.trained_loads == (2, 1)
    assert record.samples == 80
    assert record.usage == (12.5, 7.5)
    assert record.objective == pytest.approx(0.8 + 0.4 + 0.2)
    assert record.gap == pytest.approx(0, abs=1e-12)
    assert record.fitness_given_up == pytest.approx(0, abs=1e-12)
    assert record.client_jain == pytest.approx(2 / 3)  # one round each for two of three clients
    assert record.slowest_seconds == 3.5
    assert record.status == "optimal"


def test_record_is_json():
    scheduler = Scheduler(2)
    scheduler.plan([("a", 1), None])
    record = scheduler.close_round()
    values = json.loads(json.dumps(record.to_dict()))
    assert values["failed"] == 2
    assert values["failed_clients"] == ["('a', 1)", "None"]
    assert values["slowest_seconds"] is None
    assert isinstance(record, RoundRecord)
    with pytest.raises(AttributeError):
        record.round = 7


def test_fitness_given_up_is_measured_on_bare_fitness():
    scheduler = Scheduler(2, balance=0, usage_weight=0.0)
    for name, row in {"a": [0.9, 0.1], "b": [0.8, 0.3], "c": [0.7, 0.6], "d": [0.6, 0.1]}.items():
        scheduler.add_client(name, fitness=row)
    scheduler.plan(["a", "b", "c", "d"])
    record = scheduler.close_round()
    assert record.loads == (2, 2)
    assert record.fitness_given_up == pytest.approx(0.6 / 3.0)


def test_the_second_round_uses_what_the_first_one_taught():
    scheduler = Scheduler(2, fitness=FitnessOptions(rate=1.0), usage=UsageOptions(decay=1.0), balance=None)
    scheduler.plan(["a"])
    [first] = scheduler.assigned()["a"]
    scheduler.report("a", {first: (10, -1.0)})
    scheduler.close_round()
    assert scheduler.plan(["a"]).experts_of("a") == [1 - first]


def test_usage_steers_away_from_worked_experts():
    scheduler = Scheduler(2, balance=None, usage_weight=0.5)
    scheduler.add_client("a", fitness=[0.6, 0.5])
    assert scheduler.plan(["a"]).experts_of("a") == [0]
    scheduler.report("a", {0: (100, 0.6)})
    scheduler.close_round()
    # usage share 2 against 0: 0.6 - 1.0 < 0.5 - 0.0
    assert scheduler.plan(["a"]).experts_of("a") == [1]


def test_failed_clients_are_those_that_did_not_answer():
    scheduler = Scheduler(2)
    scheduler.plan({"a": 1, "b": 1, "c": 1, "idle": 0})
    before = scheduler.fitness.copy()
    scheduler.report("a", dict.fromkeys(scheduler.assigned()["a"], (5, 0.5)))
    scheduler.report("b", failed=True)
    scheduler.report("idle")
    record = scheduler.close_round()
    assert record.answered == ("a",)
    assert record.failed == ("b", "c")
    assert record.available == 4
    assert (scheduler.fitness[1:] == before[1:]).all()


def test_an_expert_left_out_of_the_report_is_idle():
    scheduler = Scheduler(2, fitness={"rate": 1.0, "prior": 0.5, "on_idle": "decay", "idle_decay": 0.5})
    scheduler.add_client("a", capacity=2, fitness=[0.1, 0.1])
    scheduler.plan(["a"])
    scheduler.report("a", {1: (0, 0.9)})  # no samples, and yet feedback
    record = scheduler.close_round()
    np.testing.assert_allclose(scheduler.fitness_of("a"), [0.3, 0.9])
    assert record.trained_loads == (0, 1)


def test_the_order_of_reports_makes_no_difference():
    generator = np.random.default_rng(0)
    names = [f"c{i}" for i in range(30)]
    values = {name: generator.random(2) for name in names}
    ends = []
    for order in (names, names[::-1]):
        scheduler = Scheduler(3, default_capacity=2)
        scheduler.plan(names)
        for name in order:
            work, reward = values[name]
            scheduler.report(name, dict.fromkeys(scheduler.assigned()[name], (work / 3, reward)))
        scheduler.close_round()
        ends.append(frozen(scheduler))
    assert ends[0] == ends[1]


def test_clients_come_and_go_and_keep_what_was_learned():
    scheduler = Scheduler(3, fitness={"rate": 1.0})
    simulate(scheduler, ["a", "b"], np.random.default_rng(0), drop=0)
    kept = scheduler.fitness_of("a")
    assert kept.any()
    simulate(scheduler, ["b", 7, ("x", 1)], np.random.default_rng(1), drop=0)
    assert scheduler.clients == ("a", "b", 7, ("x", 1))
    assert (scheduler.fitness_of("a") == kept).all()
    answer = scheduler.plan([("x", 1), "a"])
    assert list(answer.experts_by_client()) == [("x", 1), "a"]
    assert answer.problem.client_labels == (("x", 1), "a")


def test_many_rounds_of_churn_keep_every_invariant():
    generator = np.random.default_rng(3)
    scheduler = Scheduler(4, default_capacity=2, balance=0.5)
    world = [f"client-{i}" for i in range(60)]
    known: list = []
    for number in range(25):
        there = [world[i] for i in generator.permutation(60)[: generator.integers(1, 30)]]
        result = simulate(scheduler, there, generator)
        known += [name for name in there if name not in known]
        assert scheduler.clients == tuple(known)
        assert scheduler.fitness.shape == (len(known), 4)
        assert list(result["plan"]) == there
        assert scheduler.round == number + 1
        record = result["record"]
        assert record["answered"] + record["failed"] == record["planned"] == len(there)


def test_a_mapping_brings_news_that_stay():
    scheduler = Scheduler(4, default_capacity=1, expert_cost=COST)
    profile = CapacityProfile(memory_bytes=1.3e7)
    answer = scheduler.plan({"a": 3, "b": profile, "c": None})
    assert [len(experts) for experts in answer.experts_by_client().values()] == [3, 3, 1]
    scheduler.close_round()
    answer = scheduler.plan(["a", "b", "c"])
    assert [len(experts) for experts in answer.experts_by_client().values()] == [3, 3, 1]
    scheduler.close_round()
    answer = scheduler.plan({"a": 0, "b": 2})  # with a profile too, the smaller number holds
    assert [len(experts) for experts in answer.experts_by_client().values()] == [0, 2]


def test_eligible_experts_of_a_client():
    scheduler = Scheduler(["x", "y", "z"], default_capacity=3, balance=None)
    scheduler.add_client("early")
    scheduler.add_client("picky", eligible=["z", "x"])
    answer = scheduler.plan(["early", "picky", "late"])
    assert answer.experts_of("picky") == ["x", "z"]
    assert answer.experts_of("early") == answer.experts_of("late") == ["x", "y", "z"]
    scheduler.close_round()
    scheduler.add_client("picky", eligible=["y"])
    assert scheduler.plan(["picky"]).experts_of("picky") == ["y"]


def test_add_client_leaves_alone_what_it_is_not_told():
    scheduler = Scheduler(2)
    scheduler.add_client("a", capacity=2, eligible=[0], fitness={1: 0.7})
    before = frozen(scheduler)
    scheduler.add_client("a")
    assert_unchanged(scheduler, before)


def test_profiles_and_a_deadline_limit_the_round():
    scheduler = Scheduler(3, expert_cost=COST, deadline=20.0, default_profile=CapacityProfile(ms_per_sample=20))
    # 3 * 100 * 20 / 1000 = 6 s per expert
    answer = scheduler.plan({"usual": None, "fast": CapacityProfile(), "slow": CapacityProfile(ms_per_sample=80)})
    assert [len(experts) for experts in answer.experts_by_client().values()] == [3, 3, 0]


def test_observed_times_correct_a_profile_until_it_is_right():
    scheduler = Scheduler(3, expert_cost=COST, deadline=20.0, correction_rate=0.5)
    scheduler.add_client("a", profile=CapacityProfile(ms_per_sample=20))
    counts = []
    for _ in range(12):
        experts = scheduler.plan(["a"]).experts_of("a")
        counts.append(len(experts))
        scheduler.report("a", dict.fromkeys(experts, (1, 0.5)), seconds=1.5 * 6 * len(experts))
        scheduler.close_round()
    assert counts[0] == 3  # 18 s as promised
    assert counts[-1] == 2  # 27 s in truth; two take 18 s
    assert scheduler.speed_correction_of("a") == pytest.approx(1.5, abs=1e-3)


def test_failed_rounds_teach_no_speed():
    scheduler = Scheduler(3, expert_cost=COST, default_profile=CapacityProfile(ms_per_sample=20))
    scheduler.plan(["a", "b"])
    scheduler.report("a", failed=True, seconds=1e6)
    scheduler.close_round()
    assert scheduler.speed_correction_of("a") == scheduler.speed_correction_of("b") == 1.0


def test_usage_in_compute():
    cost = ExpertCost(expert_compute=[1.0, 3.0])
    scheduler = Scheduler(2, expert_cost=cost, usage={"unit": "compute", "decay": 1.0}, default_capacity=2)
    scheduler.plan(["a"])
    scheduler.report("a", {0: (10, 0.1), 1: (10, 0.1)})
    scheduler.close_round()
    assert scheduler.usage.tolist() == [10, 30]


@pytest.mark.parametrize(("exploration", "other"), [(0.0, False), (1.0, True)])
def test_exploration_bonus_counts_in_the_plan(exploration, other):
    options = {"exploration": exploration, "rate": 1.0, "prior": 0.0}
    scheduler = Scheduler(2, fitness=options, balance=None, usage_weight=0.0)
    [first] = scheduler.plan(["a"]).experts_of("a")
    scheduler.report("a", {first: (1, 0.1)})
    scheduler.close_round()
    # One round, one trial: 0.1 + sqrt(ln 2 / 2) = 0.69 for the tried expert, sqrt(ln 2) = 0.83 for the other.
    assert scheduler.plan(["a"]).experts_of("a") == [1 - first if other else first]
    assert scheduler.close_round().fitness_given_up == pytest.approx(1.0 if other else 0.0)


def test_by_default_every_expert_is_tried_before_one_that_disappoints_is_kept():
    scheduler, rewards, tried = Scheduler(3, balance=None, usage_weight=0.0), [0.5, 0.9, 0.6], []
    for _ in range(12):
        [expert] = scheduler.plan(["a"]).experts_of("a")
        scheduler.report("a", {expert: (1, rewards[expert])})
        scheduler.close_round()
        tried.append(expert)
    assert sorted(tried[:3]) == [0, 1, 2]
    assert set(tried[-5:]) == {1}


def test_cancelled_round_can_be_planned_again_alike():
    scheduler = Scheduler(3, default_capacity=2, solver="random", balance=None)
    simulate(scheduler, range(20), np.random.default_rng(0))
    before = frozen(scheduler)
    first = scheduler.plan(range(20))
    scheduler.report(0, failed=True)
    scheduler.cancel_round()
    assert_unchanged(scheduler, before)
    assert (plain(scheduler.plan(range(20))) == plain(first)).all()


def test_rounds_differ_in_their_seed():
    scheduler = Scheduler(5, default_capacity=2, solver="random", balance=None)
    masks = []
    for _ in range(3):
        masks.append(plain(scheduler.plan(range(20))).tobytes())
        scheduler.close_round()
    assert len(set(masks)) == 3
    other = Scheduler(5, default_capacity=2, solver="random", balance=None, seed=1)
    assert plain(other.plan(range(20))).tobytes() not in masks


class Recording(Scheduler):
    """Keeps what `decide` is given; can fail on demand."""

    def decide(self, *args, **kwargs):
        self.given = kwargs
        return super().decide(*args, **kwargs)


def test_prices_of_the_last_closed_round_are_passed_on():
    scheduler = Recording(2, default_capacity=1, balance=0)
    for name, row in {"a": [0.9, 0.1], "b": [0.8, 0.3]}.items():
        scheduler.add_client(name, fitness=row)
    prices = scheduler.plan(["a", "b"]).prices
    assert scheduler.given["warm_start"] is None
    scheduler.close_round()
    scheduler.plan(["a", "b"])
    assert (scheduler.given["warm_start"] == prices).all()


def test_decide_may_return_a_schedule_without_names():
    class Bare(Scheduler):
        def decide(self, fitness, usage, capacity, eligible, **_):
            return schedule(fitness, usage, capacity, balance=None)

    answer = Bare(["x", "y"]).plan(["a"])
    assert set(answer.experts_by_client()) == {"a"}
    assert answer.experts_of("a")[0] in ("x", "y")


class Failing(Scheduler):
    how = "shape"

    def decide(self, fitness, usage, capacity, eligible, **kwargs):
        if self.how == "shape":
            return schedule(np.ones((7, 2)), [1, 1], 1)
        if self.how == "raise":
            raise RuntimeError("no idea")
        answer = super().decide(fitness, usage, capacity, eligible, **kwargs)
        return Schedule(answer.problem, "x", Status.UNKNOWN, StopReason.TIME_LIMIT)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("shape", InputError, r"decide: returned a schedule of shape \(7, 2\), must be \(2, 2\)"),
        ("raise", RuntimeError, "no idea"),
        ("unknown", NoAssignmentError, "time limit"),
    ],
)
def test_failed_decision_changes_nothing(how, error, message):
    scheduler = Failing(2)
    scheduler.add_client("a", capacity=1)
    scheduler.how = how
    before = frozen(scheduler)
    with pytest.raises(error, match=message):
        scheduler.plan({"a": 2, "new": 1})
    assert_unchanged(scheduler, before)
    scheduler.how = "raise"
    assert not scheduler.is_open


def test_infeasible_plan_names_the_conflict_and_changes_nothing():
    scheduler = Scheduler(["x", "y"], load_min=[0, 3])
    scheduler.add_client("a", eligible=["x"])
    before = frozen(scheduler)
    with pytest.raises(InfeasibleError, match=r"expert y needs 3 clients .* only 2 eligible slots"):
        scheduler.plan({"a": 2, "b": 1, "c": 1})
    assert_unchanged(scheduler, before)
    answer = scheduler.plan(["b", "c", "d"])
    assert answer.clients_of("y") == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("available", "message"),
    [
        ([], "names no client"),
        ({}, "names no client"),
        ("abc", "available_clients = 'abc': must be several names"),
        (3, "available_clients = 3: must be an iterable"),
        (["a", "b", "a"], r"available_clients\[2\] = 'a': already at position 0"),
        (["a", ["b"]], r"available_clients\[1\] = \['b'\]: must be hashable"),
        ([float("nan")], r"available_clients\[0\] = nan"),
        ({"a": -1}, r"available_clients\['a'\] = -1: must be >= 0"),
        ({"a": 1.5}, r"available_clients\['a'\] = 1.5: must be a whole number"),
        ({"a": "many"}, r"available_clients\['a'\]: holds"),
        ({"a": [1]}, r"available_clients\['a'\] = \[1\]: must be a whole number, a CapacityProfile, or None"),
        ({"new": 1, "a": CapacityProfile()}, "client 'a': profile: the scheduler needs expert_cost"),
    ],
)
def test_bad_plan_changes_nothing(available, message):
    scheduler = Scheduler(2)
    scheduler.add_client("a")
    before = frozen(scheduler)
    with pytest.raises(InputError, match=message):
        scheduler.plan(available)
    assert_unchanged(scheduler, before)
    scheduler.plan(["a"])


def test_steps_out_of_order():
    scheduler = Scheduler(2)
    for step in (scheduler.close_round, scheduler.cancel_round, scheduler.assigned, lambda: scheduler.report("a")):
        with pytest.raises(InputError, match="no round is open; plan"):
            step()
    scheduler.plan(["a"])
    before = frozen(scheduler)
    with pytest.raises(InputError, match=r"round 1 is still open; close_round\(\) or cancel_round\(\)"):
        scheduler.plan(["b"])
    assert_unchanged(scheduler, before)
    scheduler.close_round()
    with pytest.raises(InputError, match="close_round: no round is open"):
        scheduler.close_round()


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("client", "results", "options", "message"),
    [
        ("nobody", {}, {}, "client = 'nobody': there is no client of that name"),
        (["a"], {}, {}, r"client = \['a'\]: there is no client"),
        ("absent", {}, {}, "client 'absent': is not part of round 1"),
        ("b", {}, {}, "client 'b': has reported already in round 1"),
        ("a", {"y": (1, 1)}, {}, r"client 'a': expert 'y' was not assigned to it this round \(assigned: 'x'\)"),
        ("a", {"z": (1, 1)}, {}, "client 'a': expert 'z' was not assigned"),
        ("a", {"x": (-1, 1)}, {}, "client 'a', expert 'x': samples = -1"),
        ("a", {"x": (NAN, 1)}, {}, "client 'a', expert 'x': samples = nan"),
        ("a", {"x": (INF, 1)}, {}, "samples = inf"),
        ("a", {"x": (2.0**54, 1)}, {}, r"samples = 1.8014398509481984e\+16"),
        ("a", {"x": ("5", 1)}, {}, "samples = '5'"),
        ("a", {"x": (1, NAN)}, {}, "client 'a', expert 'x': reward = nan: must be a finite number"),
        ("a", {"x": (1, -INF)}, {}, "reward = -inf"),
        ("a", {"x": (1, None)}, {}, "reward = None"),
        ("a", {"x": 5}, {}, r"expert 'x': 5: must be a pair \(samples, reward\)"),
        ("a", {"x": (1, 2, 3)}, {}, r"expert 'x': \(1, 2, 3\): must be a pair"),
        ("a", [("x", 1, 1)], {}, r"results = \[.*\]: must map each expert"),
        ("a", {"x": (1, 1)}, {"failed": True}, "reported failure together with results for 1 experts"),
        ("a", {"x": (1, 1)}, {"seconds": -1}, "client 'a': seconds = -1"),
        ("a", {"x": (1, 1)}, {"seconds": NAN}, "seconds = nan"),
        ("a", {"x": (1, 1)}, {"seconds": "3"}, "seconds = '3'"),
    ],
)
def test_bad_report_changes_nothing(client, results, options, message):
    scheduler = Scheduler(["x", "y"], balance=None)
    scheduler.add_client("absent")
    scheduler.add_client("a", eligible=["x"])
    scheduler.plan(["a", "b"])
    scheduler.report("b")
    before = frozen(scheduler)
    with pytest.raises(InputError, match=message):
        scheduler.report(client, results, **options)
    assert_unchanged(scheduler, before)
    scheduler.report("a", {"x": (1, 1)})


def test_numpy_and_torch_like_scalars_are_numbers():
    scheduler = Scheduler(2, default_capacity=2)
    scheduler.plan(["a"])
    scheduler.report(
        "a", {0: (np.int64(3), np.float32(0.5)), 1: [np.array(4), np.array(0.25)]}, seconds=np.float64(1)
    )
    assert scheduler.close_round().samples == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": -1}, "capacity = -1: must be >= 0"),
        ({"capacity": 1.5}, "capacity = 1.5: must be a whole number"),
        ({"profile": CapacityProfile()}, "needs expert_cost"),
        ({"eligible": ["smell"]}, "client 'a': eligible: there is no expert 'smell'"),
        ({"eligible": "xy"}, "client 'a': eligible = 'xy': must be several names"),
        ({"fitness": {"smell": 1}}, "client 'a': fitness: there is no expert 'smell'"),
        ({"fitness": {"x": NAN}}, "fitness"),
        ({"fitness": [1.0]}, r"fitness: has shape \(1,\), must be \(2,\)"),
        ({"capacity": 3, "fitness": [1.0, INF]}, r"fitness\[1\] = inf"),
    ],
)
@pytest.mark.parametrize("known", [True, False])
def test_bad_client_changes_nothing(options, message, known):
    scheduler = Scheduler(["x", "y"])
    if known:
        scheduler.add_client("a", capacity=1)
    before = frozen(scheduler)
    with pytest.raises(InputError, match=message):
        scheduler.add_client("a", **options)
    assert_unchanged(scheduler, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"default_capacity": -1}, "default_capacity = -1"),
        ({"default_capacity": 0.5}, "default_capacity = 0.5"),
        ({"expert_cost": {"expert_bites": 3}}, "expert_cost: .*expert_bites"),
        ({"expert_cost": 3}, "expert_cost = 3: must be a ExpertCost or a mapping"),
        ({"expert_cost": {"expert_bytes": [1, 2]}}, r"expert_bytes: has shape \(2,\)"),
        ({"default_profile": CapacityProfile()}, "default_profile: needs expert_cost"),
        ({"deadline": 5.0}, "deadline: needs expert_cost"),
        ({"deadline": -5.0, "expert_cost": COST}, "deadline = -5.0"),
        ({"correction_rate": 0}, "correction_rate = 0"),
        ({"fitness": {"rate": 2}}, "rate = 2"),
        ({"fitness": {"prior": [1, 2]}}, r"prior: has shape \(2,\)"),
        ({"usage": {"half_life": 2}}, "usage: .*half_life"),
        ({"seed": -1}, "seed = -1"),
        ({"fitness_weight": NAN}, "fitness_weight = nan"),
        ({"usage_weight": "much"}, "usage_weight = 'much'"),
        ({"balance": -0.1}, "balance = -0.1"),
        ({"load_min": -1}, "load_min = -1"),
        ({"load_max": [1, 2]}, "load_max: has shape"),
        ({"solver": "oracle"}, "solver = 'oracle'"),
        ({"time_limit": 0}, "time = 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Scheduler(3, **options)


def test_unchanged_check_can_fail():
    scheduler = Scheduler(2)
    before = frozen(scheduler)
    scheduler.add_client("a")
    with pytest.raises(AssertionError):
        assert_unchanged(scheduler, before)


def test_arrays_handed_out_cannot_be_written():
    scheduler = Scheduler(2)
    scheduler.add_client("a")
    for array in (scheduler.fitness, scheduler.usage):
        with pytest.raises(ValueError, match="read-only"):
            array[:] = 1


def test_hard_load_bounds_hold():
    scheduler = Scheduler(3, default_capacity=1, load_min=2, load_max=[2, 2, 5])
    scheduler.plan(range(6))
    assert scheduler.close_round().loads == (2, 2, 2)


def test_relaxed_balance_is_counted():
    scheduler = Scheduler(["x", "y"], balance=0)
    for name in range(4):
        scheduler.add_client(name, eligible=["x"])
    scheduler.plan(range(4))
    record = scheduler.close_round()
    assert record.loads == (4, 0)
    assert record.relaxed == 2


def test_soft_widens_bounds_that_exclude_one_another_and_the_record_says_which():
    def planned(**options):
        scheduler = Scheduler(["x", "y"], load_min=[1, 3], balance=None, **options)
        scheduler.add_client("a", eligible=["x"])
        return scheduler, ["a", "b", "c"]

    scheduler, clients = planned()
    with pytest.raises(InfeasibleError, match="expert y needs 3 clients"):
        scheduler.plan(clients)
    scheduler, clients = planned(soft=True)
    scheduler.plan(clients)
    record = scheduler.close_round()
    assert record.loads == (1, 2)
    assert record.relaxed == 1
    [told] = record.relaxations
    assert told.startswith("load_min[y]: 3 -> 2 (one more place is worth ")
    assert record_values(record)["relaxations"] == [told]
    scheduler.plan(["b", "c", "d", "e"])
    assert scheduler.close_round().relaxations == ()


def test_soft_names_the_clients_whose_bounds_give_way():
    scheduler = Scheduler(2, default_capacity=2, load_max=2, balance=None, soft=True)
    scheduler.plan(["anna", "ben", "carl"])
    record = scheduler.close_round()
    # Three clients of two experts each, and four places: whichever bounds give way, it is by two places.
    assert record.relaxed == len(record.relaxations) > 0
    gone = [re.match(r"(\w+)\[(\w+)\]: (\d) -> (\d)", told).groups() for told in record.relaxations]
    assert sum(abs(int(asked) - int(used)) for *_, asked, used in gone) == 2
    assert {name for kind, name, *_ in gone if kind == "min_experts"} <= {"anna", "ben", "carl"}
    assert {name for kind, name, *_ in gone if kind == "load_max"} <= {"0", "1"}
    assert sum(record.loads) == 6 - sum(int(asked) - int(used) for kind, _, asked, used in gone if kind[0] == "m")


def test_a_round_after_a_round_without_any_report():
    scheduler = Scheduler(2)
    scheduler.plan(["a", "b"])
    record = scheduler.close_round()
    assert record.failed == ("a", "b")
    assert record.client_jain == 1.0
    assert record_values(record)["usage"] == [0, 0]
    scheduler.plan(["a", "b"])
    finish(scheduler, np.random.default_rng(0), drop=0)
    assert scheduler.close_round().failed == ()
