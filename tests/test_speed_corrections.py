"""Speed corrections of clients that sat out a round: relaxed where they are the only reason, and only there."""

from __future__ import annotations

import numpy as np
import pytest
from scheduler_tools import frozen

from fedmoe_sched import CapacityProfile, ExpertCost, Scheduler

COST = ExpertCost(samples=100)  # of expert_bytes 0: with 20 ms per sample 3 * 100 * 20 / 1000 = 6 s per expert
PHONE = CapacityProfile(ms_per_sample=20)


def one_round(scheduler, clients, ratio=1.0):
    """Run a round in which everybody takes `ratio` times as long as its profile says; return the plan."""
    plan = scheduler.plan(clients).experts_by_client()
    for client, experts in plan.items():
        work = sum(scheduler.options()["expert_cost"]["expert_compute"][e] for e in experts)
        if experts:
            scheduler.report(client, dict.fromkeys(experts, (1, 0.5)), seconds=ratio * 6 * work)
    scheduler.close_round()
    return plan


def scheduler_of(work=(1.0, 1.0, 1.0), **options):
    cost = ExpertCost(samples=100, expert_compute=work)
    return Scheduler(len(work), **{"expert_cost": cost, "deadline": 20.0, "correction_rate": 0.6, **options})


def test_one_slow_round_by_hand():
    scheduler = scheduler_of()
    scheduler.add_client("a", profile=PHONE)
    assert len(one_round(scheduler, ["a"], ratio=11.0)["a"]) == 3
    # 0.4 + 0.6 * 11 = 7; then with q = 0.6 / 3 = 0.2: 1 + 6 * 0.8^t, until 6 c <= 20 s
    expected = [7.0, 5.8, 4.84, 4.072, 3.4576, 2.96608]
    seen = [scheduler.speed_correction_of("a")]
    for _ in range(5):
        assert one_round(scheduler, ["a"])["a"] == []
        seen.append(scheduler.speed_correction_of("a"))
    assert seen == pytest.approx(expected)
    assert [len(one_round(scheduler, ["a"])["a"]) for _ in range(5)] == [1, 1, 2, 2, 3]
    # It keeps to its profile: 1 + 1.96608 * 0.4^t; two experts from 12 c <= 20 on, three from 18 c <= 20.
    assert scheduler.speed_correction_of("a") == pytest.approx(1 + 1.96608 * 0.4**5)


def test_a_client_that_stays_slow_is_tried_now_and_then():
    scheduler = scheduler_of(default_profile=PHONE)
    planned = [bool(one_round(scheduler, ["a"], ratio=11.0)["a"]) for _ in range(60)]
    # It is tried with c from 1 + 7 / 3 * 0.8 to 10 / 3, has then 0.4 c + 6.6, from 7.75 to 7.93, and sits out the
    # five rounds until 1 + 6.75 * 0.8^5 = 3.2 or 1 + 6.93 * 0.8^5 = 3.3. From 7, after the first, it is five too.
    assert np.flatnonzero(planned).tolist() == list(range(0, 60, 6))


def test_an_expert_too_large_for_the_deadline_counts_as_kept_out():
    scheduler = scheduler_of(work=(1.0, 3.0))
    scheduler.add_client("a", profile=PHONE, eligible=[1])  # 18 s
    assert one_round(scheduler, ["a"], ratio=2.0)["a"] == [1]
    assert scheduler.speed_correction_of("a") == pytest.approx(1.6)
    assert one_round(scheduler, ["a"])["a"] == []  # the first expert would fit, but is none of its own
    assert scheduler.speed_correction_of("a") == pytest.approx(0.8 * 1.6 + 0.2)


@pytest.mark.parametrize(
    ("limit", "available"),
    [
        ({"profile": PHONE}, ["b"]),  # it is not there
        ({"capacity": 0}, ["a", "b"]),  # it may train nothing anyway
        ({"profile": CapacityProfile(ms_per_sample=80)}, ["a", "b"]),  # too slow by its profile, too
        ({"profile": CapacityProfile(ms_per_sample=1)}, ["a", "b"]),  # it fits, and is planned
    ],
)
def test_other_corrections_stay(limit, available):
    scheduler = scheduler_of(default_profile=PHONE)
    one_round(scheduler, ["a", "b"], ratio=11.0)
    scheduler.add_client("a", **limit)
    scheduler.plan(available)
    scheduler.close_round()  # nobody reports
    assert scheduler.speed_correction_of("a") == pytest.approx(7.0)


def test_there_is_nothing_to_relax_without_a_deadline():
    scheduler = scheduler_of(deadline=None, default_profile=PHONE)
    one_round(scheduler, ["a"], ratio=11.0)
    scheduler.add_client("a", capacity=0)
    assert one_round(scheduler, ["a"])["a"] == []
    assert scheduler.speed_correction_of("a") == pytest.approx(7.0)


def test_a_loaded_scheduler_relaxes_alike(tmp_path):
    scheduler = scheduler_of(default_profile=PHONE)
    one_round(scheduler, ["a", "b"], ratio=11.0)
    scheduler.plan(["a", "b"])
    scheduler.save(tmp_path / "state.npz")
    loaded = Scheduler.load(tmp_path / "state.npz")
    for one in (scheduler, loaded):
        one.close_round()
        assert one.speed_correction_of("b") == pytest.approx(5.8)
    assert frozen(loaded) == frozen(scheduler)


def test_jitter_bars_nobody_for_ever():
    scheduler = scheduler_of(default_profile=PHONE, correction_rate=0.3)
    rng = np.random.default_rng(0)
    names, planned = [f"c{i}" for i in range(30)], np.zeros((300, 30), dtype=bool)
    for row in planned:
        for i, (client, experts) in enumerate(scheduler.plan(names).experts_by_client().items()):
            row[i] = bool(experts)
            if experts:
                took = 6 * len(experts) * np.exp(1.5 * rng.standard_normal())
                scheduler.report(client, dict.fromkeys(experts, (1, 0.5)), seconds=took)
        scheduler.close_round()
    assert not planned.all(axis=0).any()  # everybody is too slow at some time
    assert planned[-100:].any(axis=0).all()
