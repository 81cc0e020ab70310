"""The first policies: what each rule decides, what it fixes, and one life through the file for all of them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scheduler_tools import frozen, simulate

from fedmoe_sched import InputError, Scheduler, StateFileError
from fedmoe_sched.policies import POLICIES, Policy, load_policy, make_policy, policy_class, register_policy

ROOT = Path(__file__).resolve().parent.parent
FITNESS = {"a": [0.9, 0.1, 0.2], "b": [0.8, 0.3, 0.1], "c": [0.7, 0.6, 0.5]}


def ready(name: str, **options) -> Scheduler:
    policy = make_policy(name, 3, **options)
    for client, row in FITNESS.items():
        policy.add_client(client, fitness=row)
    return policy


@pytest.fixture(params=["random", "greedy", "desirability", "balanced"])
def name(request):
    return request.param


def test_each_is_a_policy_and_a_scheduler(name):
    policy = make_policy(name, 3)
    assert isinstance(policy, Policy)
    assert isinstance(policy, Scheduler)
    assert policy.name == name


def test_the_protocol_check_can_fail():
    assert not isinstance(object(), Policy)


def test_each_names_its_source_and_mark(name):
    text = inspect.getdoc(policy_class(name))
    assert "arXiv" in text
    assert any(mark in text for mark in ("[T]", "[S]", "[I]"))


def test_each_resumes_exactly(name, tmp_path):
    def run(*, stop: bool) -> list:
        policy, generator = make_policy(name, 4, default_capacity=2, seed=5), np.random.default_rng(2)
        rounds = []
        for number in range(6):
            if stop and number == 3:
                policy.save(tmp_path / "state")
                policy = load_policy(tmp_path / "state")
                assert type(policy) is policy_class(name)
            rounds.append(simulate(policy, generator.permutation(20)[:12], generator))
        return [*rounds, frozen(policy)]

    assert run(stop=True) == run(stop=False)


def test_each_fills_capacities(name):
    policy = make_policy(name, 4, default_capacity=3)
    assert policy.plan(range(10)).pairs.counts.tolist() == [3] * 10


def test_greedy_takes_the_fittest_and_nothing_else_counts():
    policy = ready("greedy")
    policy.plan(list(FITNESS))
    for client in FITNESS:
        policy.report(client, {0: (1000, FITNESS[client][0])})
    record = policy.close_round()
    assert record.loads == (3, 0, 0)
    assert record.fitness_given_up == pytest.approx(0, abs=1e-12)
    assert record.load_cv == pytest.approx(2**0.5)
    policy.plan(list(FITNESS))
    assert policy.close_round().loads == (3, 0, 0)  # for all its usage


def test_desirability_gives_way_to_usage_a_round_later():
    policy = ready("desirability", usage_weight=0.2, usage={"decay": 1.0})
    policy.plan(list(FITNESS))
    for client in FITNESS:
        policy.report(client, {0: (1000, FITNESS[client][0])})
    assert policy.close_round().loads == (3, 0, 0)
    # All usage is on expert 0: its share is 3, so it costs 0.6; the others cost nothing.
    assert policy.plan(list(FITNESS)).experts_by_client() == {"a": [0], "b": [1], "c": [1]}


def test_balanced_keeps_loads_near_the_mean():
    policy = ready("balanced", usage_weight=0.0, balance=0)
    answer = policy.plan(list(FITNESS))
    assert answer.loads.tolist() == [1, 1, 1]
    assert answer.objective == pytest.approx(0.9 + 0.3 + 0.5)  # the best of the six permutations
    assert answer.gap == pytest.approx(0, abs=1e-12)
    record = policy.close_round()
    assert record.fitness_given_up == pytest.approx((2.4 - 1.7) / 2.4)
    assert make_policy("balanced", 3).options()["balance"] == 0.25


def test_random_takes_no_notice_of_fitness():
    policy = make_policy("random", 2, seed=3)
    for client in range(400):
        policy.add_client(client, fitness=[1.0, 0.0])
    policy.plan(range(400))
    low, high = sorted(policy.close_round().loads)
    assert low + high == 400
    assert low > 150  # five standard deviations; by fitness it would be 0


def test_random_depends_on_the_seed_alone():
    plans = [make_policy("random", 5, seed=seed).plan(range(50)).pairs.mask() for seed in (1, 1, 2)]
    assert (plans[0] == plans[1]).all()
    assert (plans[0] != plans[2]).any()


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("greedy", {"usage_weight": 0.1}, "usage_weight = 0.1: policy 'greedy' has usage_weight = 0.0"),
        ("greedy", {"solver": "auto"}, "solver = 'auto': policy 'greedy' has solver = 'greedy'"),
        ("desirability", {"balance": 0.25}, "balance = 0.25: policy 'desirability' has balance = None"),
        ("random", {"solver": "greedy"}, "solver = 'greedy': policy 'random'"),
        ("balanced", {"solver": "greedy"}, "policy 'balanced' needs an exact backend"),
        ("balanced", {"balance": None}, "balance = None: policy 'balanced' needs"),
        ("balanced", {"solver": "oracle"}, "solver = 'oracle'"),
        ("greedy", {"colour": 1}, "policy 'greedy': .*colour"),
        ("optimal", {}, "policy = 'optimal': must be one of random, greedy, desirability, balanced"),
        (["greedy"], {}, "policy = "),
    ],
)
def test_bad_policies(policy, options, message):
    with pytest.raises(InputError, match=message):
        make_policy(policy, 3, **options)


def test_options_that_say_what_is_so_anyway():
    make_policy("greedy", 3, usage_weight=0, balance=None, solver="greedy")
    make_policy("balanced", 3, balance=None, load_max=4)


class Mine(Scheduler):
    """A policy with state and an option of its own."""

    name = "mine"

    def __init__(self, experts, *, bonus=0.0, **options):
        super().__init__(experts, **options)
        self.bonus, self.deficit = bonus, np.zeros(len(self.experts))

    def decide(self, fitness, usage, capacity, eligible, **rest):
        return super().decide(fitness + self.bonus * self.deficit, usage, capacity, eligible, **rest)

    def close_round(self):
        record = super().close_round()
        self.deficit = np.maximum(0, self.deficit + np.mean(record.loads) - record.loads)
        return record

    def options(self):
        return super().options() | {"bonus": self.bonus}

    def state_dict(self):
        state = super().state_dict()
        state["arrays"]["deficit"] = self.deficit
        return state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.deficit = state["arrays"]["deficit"]


@pytest.fixture
def mine():
    register_policy("mine", f"{__name__}:Mine")
    yield
    del POLICIES["mine"]


@pytest.mark.usefixtures("mine")
def test_a_policy_of_ones_own_resumes_with_its_state(tmp_path):
    policy = make_policy("mine", 3, bonus=0.1, balance=None)
    simulate(policy, range(9), np.random.default_rng(0))
    policy.save(tmp_path / "state")
    again = load_policy(tmp_path / "state")
    assert isinstance(again, Mine)
    assert again.bonus == 0.1
    assert again.deficit.any()
    rounds = [simulate(one, range(9), np.random.default_rng(1)) for one in (policy, again)]
    assert rounds[0] == rounds[1]


def test_a_file_of_another_policy(tmp_path):
    path = tmp_path / "state"
    make_policy("greedy", 3).save(path)
    with pytest.raises(StateFileError, match="policy = 'greedy': it was not saved by 'balanced'"):
        policy_class("balanced").load(path)
    register_policy("mine", f"{__name__}:Mine")
    make_policy("mine", 3).save(path)
    del POLICIES["mine"]
    with pytest.raises(StateFileError, match=r"state: policy = 'mine': must be one of"):
        load_policy(path)
    Scheduler(3).save(path)
    assert type(load_policy(path)) is Scheduler


def test_bad_registration():
    with pytest.raises(InputError, match="must read 'module:Class'"):
        register_policy("x", "module.Class")
    assert "x" not in POLICIES


def test_importing_policies_loads_no_engine():
    code = (
        "import sys, fedmoe_sched, fedmoe_sched.policies, fedmoe_sched.scores, fedmoe_sched.metrics;"
        "fedmoe_sched.policies.make_policy('random', 3);"
        "heavy = 'torch ortools pulp networkx matplotlib scipy.sparse scipy.optimize pydantic pandas'.split();"
        "print([name for name in heavy if name in sys.modules],"
        " 'fedmoe_sched.policies.greedy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] False"
