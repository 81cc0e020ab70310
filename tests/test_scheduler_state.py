"""Save, load and resume: bit by bit, at any moment, and never from a flawed file."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduler_tools import finish, frozen, simulate

from fedmoe_sched import (
    CapacityProfile,
    ExpertCost,
    FitnessOptions,
    InputError,
    Scheduler,
    StateFileError,
    UsageOptions,
)
from fedmoe_sched._files import read_archive, write_archive
from fedmoe_sched.solvers.flow_ortools import OrToolsFlow
from fedmoe_sched.solvers.random_fill import RandomFill

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ["a", 1, 2.5, None, b"raw", ("site", 3), False, "ü"]


def rich_scheduler(**options) -> Scheduler:
    """Every feature that has state switched on."""
    scheduler = Scheduler(
        ["x", ("y", 1), 3],
        default_capacity=2,
        expert_cost=ExpertCost(expert_bytes=[1e6, 2e6, 3e6], samples=50),
        default_profile=CapacityProfile(ms_per_sample=10, memory_bytes=2.1e7),  # two experts: 4 * (2 + 3) MB
        deadline=60.0,
        fitness=FitnessOptions(prior=(0.1, 0.2, 0.3), on_idle="decay", exploration=0.1),
        usage=UsageOptions(decay=0.2, unit="compute"),
        seed=11,
        **options,
    )
    scheduler.add_client("a", eligible=["x", 3], fitness={3: 0.9})
    scheduler.add_client(1, capacity=1, profile=CapacityProfile(ms_per_sample=5, latency=0.1))
    return scheduler


def reloaded(scheduler: Scheduler, path: Path) -> Scheduler:
    scheduler.save(path)
    return type(scheduler).load(path)


@pytest.mark.parametrize("solver", ["auto", "greedy", "random"])
@pytest.mark.parametrize("at", range(5))
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, solver, at):
    def run(*, stop: int | None) -> list:
        scheduler, generator = rich_scheduler(solver=solver), np.random.default_rng(4)
        rounds = []
        for number in range(5):
            if number == stop:
                scheduler = reloaded(scheduler, tmp_path / "state")
            there = [c for c in CLIENTS if generator.random() < 0.7] or ["a"]
            rounds.append(simulate(scheduler, there, generator))
        rounds.append(frozen(scheduler))
        return rounds

    assert run(stop=at) == run(stop=None)


@pytest.mark.parametrize("reports", range(4))
def test_resume_between_plan_and_close(tmp_path, reports):
    def run(*, stop: bool) -> list:
        scheduler, generator = rich_scheduler(solver="random"), np.random.default_rng(1)
        simulate(scheduler, CLIENTS, generator)
        scheduler.plan(CLIENTS)
        assigned = scheduler.assigned()
        for client in CLIENTS[:reports]:
            scheduler.report(
                client, dict.fromkeys(assigned[client], (7, 0.3)), seconds=2.5 if reports % 2 else None
            )
        scheduler.report(CLIENTS[4], failed=True)
        if stop:
            scheduler = reloaded(scheduler, tmp_path / "state")
            assert scheduler.is_open
            assert scheduler.assigned() == assigned
            with pytest.raises(InputError, match="has reported already"):
                scheduler.report(CLIENTS[4], failed=True)
        for client in CLIENTS[5:]:
            scheduler.report(client, dict.fromkeys(assigned[client], (3, 0.8)))
        record = scheduler.close_round()
        return [
            record.failed,
            record.loads,
            record.objective,
            frozen(scheduler),
            simulate(scheduler, CLIENTS, generator),
        ]

    assert run(stop=True) == run(stop=False)


names = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=2).map(tuple),
    max_leaves=4,
)


@settings(max_examples=drawn(60), deadline=None)
@given(
    clients=st.lists(names, min_size=1, max_size=6, unique=True),
    experts=st.lists(names, min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 2**31 - 1),
    steps=st.lists(st.sampled_from(["plan", "close", "cancel", "half"]), max_size=8),
)
def test_any_state_survives_the_file_bit_by_bit(tmp_path_factory, clients, experts, seed, steps):
    generator = np.random.default_rng(seed)
    scheduler = Scheduler(experts, default_capacity=2, solver="greedy", seed=seed, fitness={"rate": 1 / 3})
    for step in steps:
        if not scheduler.is_open:
            scheduler.plan(clients[: 1 + generator.integers(len(clients))])
        if step == "half":
            finish(scheduler, generator, drop=0.5)
            scheduler.close_round()
        elif step == "close":
            scheduler.close_round()
        elif step == "cancel":
            scheduler.cancel_round()
    again = reloaded(scheduler, tmp_path_factory.mktemp("state") / "state")
    assert frozen(again) == frozen(scheduler)
    assert [(type(c), c) for c in again.clients] == [(type(c), c) for c in scheduler.clients]
    assert again.experts == scheduler.experts
    for one in (scheduler, again):
        if one.is_open:
            one.close_round()
    assert simulate(again, clients, np.random.default_rng(1)) == simulate(
        scheduler, clients, np.random.default_rng(1)
    )


def test_the_comparison_of_runs_can_fail(tmp_path):
    scheduler = rich_scheduler(solver="random")
    other = reloaded(scheduler, tmp_path / "state")
    other.add_client("a", fitness={3: np.nextafter(0.9, 1)})  # one bit
    assert frozen(other) != frozen(scheduler)
    changed = rich_scheduler(solver="random")
    changed.load_state_dict(
        scheduler.state_dict() | {"metadata": scheduler.state_dict()["metadata"] | {"round": 1}}
    )
    many = [f"c{i}" for i in range(30)]
    plans = [simulate(one, many, np.random.default_rng(0))["plan"] for one in (scheduler, changed)]
    assert plans[0] != plans[1]


@pytest.fixture
def saved(tmp_path):
    scheduler = rich_scheduler()
    simulate(scheduler, CLIENTS, np.random.default_rng(0))
    scheduler.plan(CLIENTS)
    path = tmp_path / "state"
    scheduler.save(path)
    return path


def test_truncated_and_corrupted_files_are_named(saved, tmp_path):
    data, bad = saved.read_bytes(), tmp_path / "broken-file"
    generator = np.random.default_rng(0)
    positions = {0, 1, 63, 64, 65, len(data) - 65, len(data) - 64, len(data) - 1}
    for at in positions | set(generator.integers(0, len(data), 400).tolist()):
        bad.write_bytes(data[:at])
        with pytest.raises(StateFileError, match=r"broken-file: truncated"):
            Scheduler.load(bad)
        bad.write_bytes(data[:at] + bytes([data[at] ^ (1 << int(generator.integers(8)))]) + data[at + 1 :])
        with pytest.raises(StateFileError, match=r"broken-file: truncated, corrupted"):
            Scheduler.load(bad)
    bad.write_bytes(data)
    assert frozen(Scheduler.load(bad)) == frozen(Scheduler.load(saved))


def rewritten(path: Path, change) -> Path:
    """Write a state with a right checksum and wrong content."""
    arrays, metadata = read_archive(path)
    change(arrays, metadata)
    write_archive(path, arrays, metadata)
    return path


def _set(part: str, name: str, value):
    return lambda arrays, metadata: (arrays if part == "arrays" else metadata).__setitem__(name, value)


def _without(part: str, name: str):
    return lambda arrays, metadata: (arrays if part == "arrays" else metadata).pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("metadata", "version", 2), "version = 2: this release reads version 1"),
        (_set("metadata", "format", "other"), "format = 'other'"),
        (_set("metadata", "policy", "greedy"), "policy = 'greedy': it was not saved by 'scheduler'"),
        (_set("metadata", "experts", ["x", "x", 3]), r"experts\[1\] = 'x'"),
        (_set("metadata", "experts", ["x", 3]), "must be"),
        (_set("metadata", "experts", [{"float": "?"}]), "invalid hexadecimal"),
        (_set("metadata", "clients", ["a"]), "clients.capacity: .* must be"),
        (_set("metadata", "clients", ["a"] * 8), "a name occurs twice"),
        (_set("metadata", "options", {"colour": "red"}), "colour"),
        (_set("metadata", "open", {"loads": [1]}), "plan summary"),
        (_without("metadata", "experts"), "it has no 'experts'"),
        (_without("metadata", "round"), "it has no 'round'"),
        (_set("metadata", "round", -3), "round = -3"),
        (_set("metadata", "round", "x"), "round = 'x'"),
        (_without("arrays", "usage"), "it has no 'usage'"),
        (_without("arrays", "clients.profile"), "it has no 'profile'"),
        (_set("arrays", "usage", np.array([1.0, -1.0, 0.0])), r"usage\[1\] = -1"),
        (_set("arrays", "usage", np.zeros(2)), "usage: has shape"),
        (_set("arrays", "prices", np.zeros(2)), "prices: has shape"),
        (_set("arrays", "fitness.values", np.zeros((8, 2))), "values: "),
        (_set("arrays", "fitness.values", np.full((8, 3), np.nan)), r"values\[0, 0\] = nan"),
        (_set("arrays", "fitness.values", np.zeros((7, 3))), "trials: "),
        (_set("arrays", "clients.capacity", np.zeros(8)), "clients.capacity: a float64"),
        (_set("arrays", "open.clients", np.arange(3)), "do not fit one another"),
        (_set("arrays", "open.indices", np.array([9])), "do not fit one another"),
        (_set("arrays", "open.reported", np.array([0])), "do not fit one another"),
    ],
)
def test_inconsistent_files_are_refused(saved, change, message):
    with pytest.raises(StateFileError, match=message) as caught:
        Scheduler.load(rewritten(saved, change))
    assert str(caught.value).startswith(str(saved))


def test_rewriting_alone_is_not_refused(saved):
    Scheduler.load(rewritten(saved, lambda arrays, metadata: None))


@pytest.mark.parametrize("name", [frozenset({1}), object(), ("site", 1j)])
def test_a_name_that_cannot_be_stored_leaves_the_old_file(tmp_path, name):
    scheduler = Scheduler(2)
    scheduler.add_client("a")
    path = tmp_path / "state"
    scheduler.save(path)
    old = path.read_bytes()
    scheduler.plan([name])  # a name like any other, until it is to be stored
    with pytest.raises(InputError, match=r"client = .*: this name cannot be stored in a file"):
        scheduler.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_an_expert_name_that_cannot_be_stored(tmp_path):
    with pytest.raises(InputError, match=r"expert = .*frozenset.*: this name cannot be stored"):
        Scheduler([frozenset({1}), 2]).save(tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


def test_failed_load_state_changes_nothing():
    scheduler, other = rich_scheduler(), Scheduler(["x", "y"])
    state = rich_scheduler().state_dict()
    state["arrays"]["usage"] = np.zeros(5)
    for bad, message in ((state, "usage: has shape"), (other.state_dict(), "experts: the state is of 2 experts")):
        before = frozen(scheduler)
        with pytest.raises(InputError, match=message):
            scheduler.load_state_dict(bad)
        assert frozen(scheduler) == before


def test_state_dict_shares_nothing_with_the_scheduler():
    scheduler = rich_scheduler()
    simulate(scheduler, CLIENTS, np.random.default_rng(0))
    scheduler.plan(CLIENTS)
    state, before = scheduler.state_dict(), frozen(scheduler)
    twin = rich_scheduler()
    twin.load_state_dict(state)
    for array in state["arrays"].values():
        array[...] = 0
    assert frozen(scheduler) == before == frozen(twin)
    json.dumps(state["metadata"])


def test_options_come_back(tmp_path):
    options = {
        "balance": None,
        "load_min": [0, 1, 0],
        "load_max": [7, 7, 7],
        "fill": False,
        "time_limit": 3.0,
        "certify": True,
    }
    scheduler = rich_scheduler(**options)
    again = reloaded(scheduler, tmp_path / "state")
    assert again.options() == scheduler.options()
    assert again.options() == again.options() | options


def test_a_solver_instance_comes_back(tmp_path):
    again = reloaded(rich_scheduler(solver=OrToolsFlow()), tmp_path / "state")
    assert again.options()["solver"] == {"name": "flow-ortools", "options": {}}
    assert simulate(again, CLIENTS, np.random.default_rng(0))["record"]["solver"] == "flow-ortools"


def test_a_solver_that_cannot_be_stored(tmp_path):
    class Mine(RandomFill):
        pass

    with pytest.raises(InputError, match=r"solver = Mine\(\): cannot be stored"):
        rich_scheduler(solver=Mine()).save(tmp_path / "state")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Scheduler.load(tmp_path / "nowhere")


KILLED = """
import sys
from fedmoe_sched import Scheduler
scheduler = Scheduler(40, balance=None, solver="greedy")
scheduler.plan(range(3000))
scheduler.close_round()
print("ready", flush=True)
while True:
    scheduler.plan(range(3000))
    scheduler.close_round()
    scheduler.save(sys.argv[1])
    print(scheduler.round, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.003, 0.01, 0.02, 0.05])
def test_a_killed_process_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "state"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    said = process.stdout.read().split()
    process.wait()
    scheduler = Scheduler.load(path)
    assert scheduler.round >= int(said[-1] if said else 3)
    assert len(scheduler.clients) == 3000


def test_an_open_round_keeps_what_was_widened_and_older_states_have_nothing_of_it(tmp_path):
    scheduler = Scheduler(["x", "y"], load_min=[1, 3], balance=None, soft=True)
    scheduler.plan(["b", "c"])
    assert scheduler.options()["soft"] is True
    again = reloaded(scheduler, tmp_path / "state").close_round()
    assert again.relaxations == scheduler.close_round().relaxations
    assert len(again.relaxations) == again.relaxed > 0

    scheduler.plan(["b", "c"])
    scheduler.save(tmp_path / "state")
    arrays, metadata = read_archive(tmp_path / "state")
    del metadata["open"]["relaxations"], metadata["options"]["soft"]
    write_archive(tmp_path / "state", arrays, metadata)
    older = Scheduler.load(tmp_path / "state")
    assert older.options()["soft"] is False
    record = older.close_round()
    assert record.relaxed > 0
    assert record.relaxations == ()
