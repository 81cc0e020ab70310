"""Copies: which experts a client need not be sent, by hand and in training."""

from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

import torch

from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.aggregate import Update
from fedmoe_sched.federated.coordinator import Coordinator
from fedmoe_sched.federated.experiment import Experiment
from fedmoe_sched.federated.experiment_table import measure
from fedmoe_sched.federated.methods import Setting
from fedmoe_sched.federated.methods.cached import CachedExperts, copy_options
from fedmoe_sched.federated.runs import is_timing
from fedmoe_sched.policies import POLICIES, RulePolicy, takes_option
from fedmoe_sched.scheduler import Scheduler

pytestmark = pytest.mark.train

# --- by hand -----------------------------------------------------------------------------------------------------

POLICY = Scheduler(3)


class Hand:
    """Rounds of clients a, b, c on experts of one number each."""

    def __init__(self, oldest=None):
        self.method = CachedExperts(Setting(("a", "b", "c"), 3), oldest)
        self.state = {"gate.bias": np.zeros(1), **{f"experts.{j}.w": np.zeros(1) for j in range(3)}}
        self.values = iter(range(1, 99))

    def round(self, *, failed=(), weights=None, broken=(), **assigned):
        """Train; return what was kept, and what took the place of the global experts."""
        briefs = {
            name: self.method.brief("abc".index(name), experts, self.state) for name, experts in assigned.items()
        }
        updates = []
        for name, brief in briefs.items():
            if name not in failed:
                value = np.nan if name in broken else float(next(self.values))
                parameters = {f"experts.{j}.w": np.array([value]) for j in brief.experts}
                samples = {j: (weights or {}).get(name, 10.0) for j in brief.experts}
                updates.append(Update(name, parameters, 10.0, samples))
        self.state = self.method.merge(self.state, updates, briefs, POLICY).state
        kept = {name: brief.kept for name, brief in briefs.items() if brief.kept}
        parts = {
            name: {k: float(v[0]) for k, v in brief.parts.items()} for name, brief in briefs.items() if brief.parts
        }
        for name, brief in briefs.items():
            assert sorted((*brief.down, *brief.kept)) == sorted(assigned[name])
            assert brief.experts == brief.trained == brief.up == tuple(assigned[name])
        return kept, parts


@pytest.mark.parametrize("oldest", [None, 3])
def test_a_copy_that_nobody_else_changed_is_the_expert(oldest):
    hand = Hand(oldest)
    assert hand.round(a=[0], b=[1]) == ({}, {})
    assert hand.round(a=[0], b=[1]) == ({"a": (0,), "b": (1,)}, {})
    hand.round(c=[2])  # a is away: its expert stays as it is
    assert hand.round(a=[0], b=[0])[0] == {"a": (0,)}
    assert hand.round(c=[0])[0] == {}
    assert hand.round(c=[0])[0] == {"c": (0,)}
    if oldest is None:
        assert hand.round(a=[0]) == ({}, {})


def test_stale_copies_are_used_up_to_their_age_and_then_sent_again():
    hand = Hand(2)
    for _ in range(2):
        assert hand.round(a=[0], b=[0]) == ({}, {})  # first sent, later too old
        _, parts = hand.round(a=[0], b=[0])
        first, second = parts["a"]["experts.0.w"], parts["b"]["experts.0.w"]
        assert second == first + 1  # each its own
        kept, parts = hand.round(a=[0], b=[0])
        assert kept == {"a": (0,), "b": (0,)}
        assert parts["a"]["experts.0.w"] == first + 2  # what it trained itself in between


def test_age_counts_from_when_the_copy_was_last_in_step():
    hand = Hand(1)
    hand.round(a=[0])
    hand.round(a=[0])  # alone: still the expert
    assert hand.round(a=[0], b=[0])[0] == {"a": (0,)}
    assert hand.round(a=[0])[0] == {"a": (0,)}  # one round old; and alone again
    hand.round(b=[0])
    assert hand.round(a=[0]) == ({"a": (0,)}, {"a": {"experts.0.w": 5.0}})
    hand = Hand(1)
    hand.round(a=[0], b=[0])
    hand.round(c=[1])
    assert hand.round(a=[0])[0] == {}  # two rounds old, though it trained only once


def test_rounds_that_a_client_is_away_make_its_copy_older_and_other_experts_replace_it():
    hand = Hand(3)
    hand.round(a=[0, 1], b=[0, 1])
    hand.round(a=[1])
    assert hand.round(a=[0, 1])[0] == {"a": (1,)}


@pytest.mark.parametrize("how", ["failed", "broken"])
def test_a_client_that_failed_keeps_only_what_it_had_before(how):
    hand = Hand(3)
    hand.round(a=[0], b=[0])
    assert hand.round(a=[0, 1], b=[0], **{how: ["a"]})[0] == {"a": (0,), "b": (0,)}
    kept, parts = hand.round(a=[0, 1], b=[0])
    assert kept == {"a": (0,), "b": (0,)}
    assert parts["a"] == {"experts.0.w": 1.0}  # as it was before it failed


def test_training_without_weight_does_not_make_a_copy_the_expert():
    hand = Hand()
    hand.round(a=[0], b=[0], weights={"b": 0.0})
    assert hand.round(a=[0], b=[0])[0] == {"a": (0,)}
    hand = Hand()
    hand.round(a=[0], weights={"a": 0.0})
    assert hand.round(a=[0])[0] == {}


@pytest.mark.parametrize("oldest", [None, 2])
def test_a_restored_method_goes_on_as_the_saved_one(oldest):
    hand, other = Hand(oldest), Hand(oldest)
    for number in range(6):
        assigned = {"a": [0, number % 3] if number % 3 else [0], "b": [number % 2], "c": [1, 2]}
        failed = ["c"] if number == 3 else []
        other.method.restore({k: v.copy() for k, v in hand.method.arrays().items()})
        other.state = hand.state
        hand.values, other.values = iter(range(10 * number, 99)), iter(range(10 * number, 99))
        assert hand.round(failed=failed, **assigned) == other.round(failed=failed, **assigned)
    ours, theirs = hand.method.arrays(), other.method.arrays()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("change", [{"since": np.zeros((2, 3))}, {"twin": None}])
def test_copies_of_another_run_are_refused(change):
    saved = CachedExperts(Setting(("a",), 3)).arrays()
    saved |= change
    with pytest.raises(StateFileError, match=r"saved copies: .* is missing, or of another number of clients"):
        CachedExperts(Setting(("a",), 3)).restore({k: v for k, v in saved.items() if v is not None})


# --- training ----------------------------------------------------------------------------------------------------

SMALL = {
    "policy": "balanced",
    "rounds": 5,
    "seed": 3,
    "data": {"train_samples": 160, "test_samples": 60},
    "clients": {"count": 6, "capacity": [1, 2], "participation": 0.8, "failure_rate": 0.1, "min_samples": 4},
    "model": {"experts": 6, "channels": [4], "expert_hidden": 0},
    "local": {"batch_size": 32},
    "policy_options": {"switching_cost": 0.3},
}
BYTES = ("bytes_down", "bytes_saved")


def small(**changes):
    return TrainConfig.from_dict(SMALL).updated(changes)


def contents(folder, *without):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k) and k not in without} for line in lines]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without copies to compare others with."""
    return run_training(small(), tmp_path_factory.mktemp("plain") / "none")


def test_current_copies_save_bytes_and_change_nothing_else(plain, tmp_path):
    alike = {"clients.cache": "current", "policy_options.max_staleness": None}  # plans as without copies
    saving = run_training(small(**alike), tmp_path / "current")
    assert contents(plain.run.path, *BYTES) == contents(tmp_path / "current", *BYTES)
    assert all(torch.equal(value, saving.state[name]) for name, value in plain.state.items())
    for one, other in zip(plain.records, saving.records, strict=True):
        assert one["bytes_saved"] == 0
        assert other["bytes_down"] + other["bytes_saved"] == one["bytes_down"]
    assert sum(record["bytes_saved"] for record in saving.records) > 0
    values = measure(saving.run, None)
    assert values["megabytes_saved"] == pytest.approx(1e-6 * sum(r["bytes_saved"] for r in saving.records))
    assert values["experts_resent"] == pytest.approx(np.mean([r["experts_resent"] for r in saving.records]))
    assert measure(plain.run, None)["megabytes_saved"] is None


def test_stale_copies_resume_and_spread_over_workers_bit_for_bit(plain, tmp_path):
    stale = {"clients.cache": "stale", "clients.max_staleness": 2}
    whole = run_training(small(**stale), tmp_path / "whole")
    run_training(small(rounds=3, **stale), tmp_path / "parts")
    again = run_training(small(workers=2, **stale), tmp_path / "parts", resume=True)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert all(torch.equal(value, again.state[name]) for name, value in whole.state.items())
    assert any(not torch.equal(value, plain.state[name]) for name, value in whole.state.items())
    assert whole.records[0]["bytes_saved"] == 0
    assert sum(record["bytes_saved"] for record in whole.records) > 0


@pytest.mark.parametrize("oldest", [0, 1, 2])
def test_policies_count_what_is_sent(tmp_path, oldest):
    settings = (
        {"clients.cache": "stale", "clients.max_staleness": oldest} if oldest else {"clients.cache": "current"}
    )
    config = small(
        **settings,
        **{"policy_options": {"switching_cost": 0.2}, "rounds": 6},
        **{"devices.source": "synthetic", "devices.expert_bytes": 4e6, "devices.shared_bytes": 1e6},
    )
    records = run_training(config, tmp_path / "run").records
    for record in records:
        shared = 1e6 * record["planned"]
        assert record["experts_resent"] * 4e6 == record["bytes_down"] - shared
    assert sum(record["bytes_saved"] for record in records) > 0


class Stubborn(RulePolicy):
    """Of a user who says what counts as held."""

    name = "stubborn"
    fixed: ClassVar = {"max_staleness": None}


class Bare(Scheduler):
    """Of a user who hands nothing on to the scheduler."""

    name = "bare"

    def __init__(self, experts, *, seed=0):
        super().__init__(experts, seed=seed)


def test_policies_are_told_only_what_they_can_be_told(monkeypatch):
    for cls in (Stubborn, Bare):
        monkeypatch.setitem(POLICIES, cls.name, f"{__name__}:{cls.__name__}")
    assert copy_options("random", 2) == copy_options("scheduler", 2) == {"max_staleness": 2}
    assert copy_options("random", 0) == {"max_staleness": 0}
    assert copy_options("random", None) == copy_options("stubborn", 2) == copy_options("bare", 2) == {}
    assert takes_option("bare", "seed")


def test_bytes_and_seconds_of_clients_that_never_change(tmp_path):
    """Six clients, two experts of three clients each, copies up to a round old: every second round sends none."""
    config = small(
        **{
            "clients.cache": "stale", "clients.capacity": 1, "clients.participation": 1.0,
            "clients.failure_rate": 0.0, "model.experts": 2,
            "policy_options": {"switching_cost": 100.0, "balance": 0.0, "max_staleness": None},
            "devices.source": "synthetic", "devices.expert_bytes": 4e6, "devices.shared_bytes": 1e6, "rounds": 4,
        }
    )  # fmt: skip
    records = run_training(config, tmp_path / "run").records
    assert [record["experts_resent"] for record in records] == [6, 0, 0, 0]
    assert [record["bytes_down"] for record in records] == [30_000_000, 6_000_000] * 2
    assert [record["bytes_saved"] for record in records] == [0, 24_000_000] * 2
    assert len({record["bytes_up"] for record in records}) == 1
    first, second = (record["simulated_round"] for record in records[:2])
    assert second < first
    assert records[2]["simulated_round"] == first


# --- refusals ----------------------------------------------------------------------------------------------------


def test_settings_without_an_effect_are_refused():
    for cache in ("none", "current"):
        with pytest.raises(InputError, match=rf"max_staleness = 2: needs cache = 'stale', not '{cache}'"):
            small(**{"clients.cache": cache, "clients.max_staleness": 2})
    with pytest.raises(InputError, match=r"clients\.cache = 'fresh'"):
        small(**{"clients.cache": "fresh"})


def test_other_methods_and_clients_elsewhere_are_refused(tmp_path):
    words = "clients.cache = 'current': policy 'fedmix' has the method 'fedmix', and only 'shared'"
    config = small(policy="fedmix", policy_options={}, **{"clients.cache": "current"})
    with pytest.raises(InputError, match=words):
        run_training(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=f"arm 'mix': {words}"):
        Experiment.from_dict(
            {
                "name": "e",
                "base": {"clients": {"cache": "current"}},
                "arms": [{"label": "mix", "policy": "fedmix"}],
            }
        )
    with pytest.raises(
        InputError, match=r"clients\.cache = 'current': clients elsewhere are sent all their experts"
    ):
        Coordinator(small(**{"clients.cache": "current", "clients.failure_rate": 0.0}), tmp_path / "other")
