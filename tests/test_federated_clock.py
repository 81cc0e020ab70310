"""The simulated clock: hand-worked times and bytes, stragglers, dropouts, failures, and waiting for clients."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("pydantic")

from device_tools import traces_of

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.availability import Availability
from fedmoe_sched.federated.clock import SimulatedClock, round_times
from fedmoe_sched.federated.devices import Devices
from fedmoe_sched.federated.methods import Brief, work_of
from fedmoe_sched.scores import CapacityProfile, ExpertCost

pytestmark = pytest.mark.train

# 1 MB per expert, 2 MB shared of which 0.5 MB are sent back; memory twice the parameters.
COST = ExpertCost(
    expert_bytes=1e6, shared_bytes=2e6, shared_up_bytes=0.5e6, memory_overhead=2, samples=1, expert_compute=1
)
# 20 ms per sample; down 1 MB/s, up 0.5 MB/s. The second is five times as slow, the third has little memory.
FAST = CapacityProfile(ms_per_sample=20, memory_bytes=1e9, down_bandwidth=1e6, up_bandwidth=0.5e6)
SLOW = CapacityProfile(ms_per_sample=100, memory_bytes=1e9, down_bandwidth=0.2e6, up_bandwidth=0.1e6)
SMALL = CapacityProfile(ms_per_sample=20, memory_bytes=5.9e6, down_bandwidth=1e6, up_bandwidth=0.5e6)
M = 3
SAMPLES = [100, 100, 100]

# With one expert: 3 x 100 x 20 ms = 6 s, 3 MB down 3 s, 1.5 MB up 3 s. With two: 6 + 6 s, 4 s, 5 s.
FAST_ONE, FAST_TWO, SLOW_ONE = 12.0, 21.0, 60.0


def clock(*profiles, traces=None, deadline=None, samples=SAMPLES, least=1):
    availability = None if traces is None else Availability(traces, np.zeros(len(profiles), dtype=np.int64))
    devices = Devices(tuple(profiles), availability)
    return SimulatedClock(
        COST, M, samples=samples[: len(profiles)], devices=devices, deadline=deadline, min_available=least
    )


def run(clock, assigned, *, drawn=None, failed=(), factor=1.0):
    """Gather and run a round in which clients train the experts listed."""
    gathering = clock.gather(sorted(assigned) if drawn is None else drawn)
    clients = [i for i in sorted(assigned) if i in gathering.clients]
    briefs = [Brief(*3 * (tuple(assigned[i]),), down=tuple(assigned[i]), up=tuple(assigned[i])) for i in clients]
    return clock.run(
        gathering,
        clients,
        work_of(briefs, M),
        np.array([i in failed for i in clients], dtype=bool),
        np.full(len(clients), factor),
    )


def test_times_and_bytes_by_hand():
    it = clock(FAST, SLOW)
    outcome = run(it, {0: [0, 2], 1: [1]})
    assert outcome.seconds.tolist() == pytest.approx([FAST_TWO, SLOW_ONE])
    assert outcome.answered.tolist() == [True, True]
    assert outcome.record == {
        "bytes_down": 4_000_000 + 3_000_000,
        "bytes_up": 2_500_000 + 1_500_000,
        "simulated_round": pytest.approx(60.0),
        "simulated_time": pytest.approx(60.0),
        "stragglers": 0,
        "dropouts": 0,
        "unavailable": 0,
    }
    outcome = run(it, {0: [0]})
    assert outcome.record["simulated_round"] == pytest.approx(FAST_ONE)
    assert it.time == outcome.record["simulated_time"] == pytest.approx(72.0)


def test_a_client_with_more_samples_takes_longer():
    it = clock(FAST, FAST, samples=[100, 250])
    assert run(it, {0: [0], 1: [0]}).seconds.tolist() == pytest.approx([6 + 6, 15 + 6])


def test_a_factor_stretches_the_whole_time():
    assert run(clock(FAST), {0: [0]}, factor=1.5).seconds.tolist() == pytest.approx([18.0])


def test_without_devices_time_stands_still_and_bytes_are_counted():
    it = SimulatedClock(COST, M, samples=SAMPLES)
    assert it.policy_options() == {}
    assert it.profiles == ()
    outcome = run(it, {0: [0], 1: [1, 2], 2: []}, failed=[1])
    assert outcome.answered.tolist() == [True, False, True]
    assert outcome.seconds is None
    assert outcome.record == {"bytes_down": 3_000_000 + 4_000_000 + 2_000_000, "bytes_up": 1_500_000 + 500_000}
    assert it.time == 0


def test_who_is_not_done_at_the_deadline_is_a_straggler_and_sends_nothing():
    outcome = run(clock(FAST, SLOW, deadline=59.0), {0: [0], 1: [1]})
    assert outcome.answered.tolist() == [True, False]
    assert (outcome.record["stragglers"], outcome.record["dropouts"]) == (1, 0)
    assert outcome.record["simulated_round"] == 59.0
    assert (outcome.record["bytes_down"], outcome.record["bytes_up"]) == (6_000_000, 1_500_000)
    assert run(clock(FAST, SLOW, deadline=60.0), {1: [1]}).answered.all()  # just in time


def test_a_round_whose_clients_all_answer_ends_with_the_last_one():
    outcome = run(clock(FAST, SLOW, deadline=100.0), {0: [0, 1], 1: [0]})
    assert outcome.record["simulated_round"] == pytest.approx(SLOW_ONE)


def test_who_goes_away_before_it_is_done_is_a_dropout():
    # Client 0 is there until 13, client 1 until 30: it needs 60. Client 2 would take 12 and comes at 15.
    traces = traces_of([(0, 13)], [(0, 30)], [(15, 40)], period=200)
    it = clock(FAST, SLOW, FAST, traces=traces)
    outcome = run(it, {0: [0], 1: [0], 2: [0]})
    assert outcome.answered.tolist() == [True, False]
    record = outcome.record
    assert (record["stragglers"], record["dropouts"], record["unavailable"]) == (0, 1, 1)
    assert record["simulated_round"] == 30  # when it is clear that client 1 will not answer
    assert record["bytes_up"] == 1_500_000
    # With a deadline before it goes away it is late, not gone; the round ends there.
    outcome = run(clock(FAST, SLOW, FAST, traces=traces, deadline=25.0), {0: [0], 1: [0], 2: [0]})
    assert (outcome.record["stragglers"], outcome.record["dropouts"]) == (1, 0)
    assert outcome.record["simulated_round"] == 25
    # With one after that it is gone, and the server waits until the deadline.
    outcome = run(clock(FAST, SLOW, FAST, traces=traces, deadline=50.0), {0: [0], 1: [0], 2: [0]})
    assert (outcome.record["stragglers"], outcome.record["dropouts"]) == (0, 1)
    assert outcome.record["simulated_round"] == 50


def test_failures_of_the_config_are_neither_stragglers_nor_dropouts():
    outcome = run(clock(FAST, SLOW), {0: [0], 1: [0]}, failed=[1])
    assert outcome.answered.tolist() == [True, False]
    assert (outcome.record["stragglers"], outcome.record["dropouts"]) == (0, 0)
    assert outcome.record["simulated_round"] == pytest.approx(SLOW_ONE)
    outcome = run(clock(FAST, SLOW, deadline=90.0), {0: [0], 1: [0]}, failed=[1])
    assert outcome.record["simulated_round"] == 90


def test_the_clock_moves_on_to_when_the_first_client_comes():
    it = clock(FAST, FAST, FAST, traces=traces_of([(40, 90)], [(70, 95)], [(0, 10)], period=100))
    it.time = 1010.0
    gathering = it.gather([0, 1])
    assert (gathering.clients, gathering.unavailable, gathering.waited) == ((0,), 1, 30.0)
    record = run(it, {0: [0], 1: [0]}).record
    assert record["simulated_round"] == pytest.approx(30 + FAST_ONE)
    assert record["simulated_time"] == pytest.approx(1052.0)
    assert it.gather([2]).waited == pytest.approx(48.0)  # across the end of the trace


def test_a_round_waits_until_enough_clients_are_there_together():
    traces = traces_of([(0, 10), (40, 90)], [(20, 30), (70, 95)], [(5, 25)], period=100)
    assert clock(FAST, FAST, FAST, traces=traces, least=2).gather([0, 1, 2]).clients == (0, 2)
    it = clock(FAST, FAST, FAST, traces=traces, least=2)
    it.time = 25.0
    assert it.gather([0, 1, 2]).waited == 45  # client 0 comes at 40, client 1 at 70
    assert it.gather([0, 1, 2]).clients == (0, 1)
    assert it.gather([0]).waited == 15  # fewer may take part
    assert clock(FAST, FAST, FAST, traces=traces, least=2).gather([1, 2]).waited == 20
    traces = traces_of([(0, 1e5), (4e5, 9e5)], [(2e5, 3e5), (7e5, 9.5e5)], [(5e4, 2.5e5)], period=1e6)
    with pytest.raises(InputError, match=r"devices\.min_available = 3: of the 3 clients .* in the 30 days"):
        clock(FAST, FAST, FAST, traces=traces, least=3).gather([0, 1, 2])


def test_clients_that_can_train_nothing_are_not_waited_for():
    it = clock(FAST, SMALL, traces=traces_of([(50, 90)], [(0, 10)], period=100))
    assert it.gather([0, 1]).clients == (0,)
    assert it.gather([0, 1]).waited == 50
    assert it.gather([1]).clients == (1,)  # none else was drawn


def test_a_round_without_plan_lasts_until_the_deadline():
    assert run(clock(FAST, deadline=30.0), {}, drawn=[0]).record["simulated_round"] == 30
    record = run(clock(FAST), {}, drawn=[0]).record
    assert (record["simulated_round"], record["bytes_down"], record["bytes_up"]) == (0, 0, 0)


def test_what_the_policy_is_told():
    it = clock(FAST, SLOW, deadline=30.0)
    assert it.policy_options() == {"expert_cost": COST, "deadline": 30.0}
    assert [profile.ms_per_sample for profile in it.profiles] == [2000, 10000]  # of all 100 samples


def test_devices_that_can_train_nothing_are_refused_with_what_they_lack():
    with pytest.raises(InputError, match=r"within its memory \(at most 5\.9e\+06 bytes\): one takes 6e\+06 bytes"):
        clock(SMALL)
    with pytest.raises(InputError, match=r"devices\.deadline = 11 s: one takes 6e\+06 bytes and at least 12 s"):
        clock(FAST, SLOW, deadline=11.0)


@given(st.data())
def test_rules_of_a_round(data):
    k = data.draw(st.integers(1, 6))
    times = st.floats(0.1, 100)
    seconds = np.array(data.draw(st.lists(times, min_size=k, max_size=k)))
    remaining = np.array(data.draw(st.lists(times | st.just(math.inf), min_size=k, max_size=k)))
    failed = np.array(data.draw(st.lists(st.booleans(), min_size=k, max_size=k)))
    deadline = data.draw(times | st.none())
    result = round_times(seconds, remaining, failed, deadline)
    kinds = np.stack([result.answered, result.stragglers, result.dropouts])
    assert (kinds.sum(axis=0) <= 1).all()
    assert (kinds.any(axis=0) | failed).all()  # everybody has a fate
    assert not (result.answered & failed).any()
    limit = math.inf if deadline is None else deadline
    near = 1 + 1e-6
    assert (seconds[result.answered] <= np.minimum(remaining[result.answered], limit) * near).all()
    assert (seconds[result.answered] <= result.length * near).all()
    assert (remaining[result.dropouts] <= seconds[result.dropouts] * near).all()
    assert (seconds[result.stragglers] > limit).all()
    assert result.length <= min(limit, seconds.max()) * near or not result.answered.all()
    if deadline is not None and not result.answered.all():
        assert result.length == deadline
    if deadline is None:
        assert not result.stragglers.any()
        assert result.length == np.minimum(seconds, remaining).max()
