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
from fedmoe_sched.policies import (
    POLICIES,
    Policy,
    StateVariable,
    load_policy,
    make_policy,
    policy_class,
    register_policy,
)
from fedmoe_sched.solvers.lp_scipy import SciPyLP

ROOT = Path(__file__).resolve().parent.parent
FITNESS = {"a": [0.9, 0.1, 0.2], "b": [0.8, 0.3, 0.1], "c": [0.7, 0.6, 0.5]}


def ready(name: str, **options) -> Scheduler:
    policy = make_policy(name, 3, **options)
    for client, row in FITNESS.items():
        policy.add_client(client, fitness=row)
    return policy


@pytest.fixture(params=["random", "greedy", "desirability", "balanced", "flex-moe", "fedamole"])
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


@pytest.mark.parametrize("name", ["random", "greedy", "desirability", "balanced", "flex-moe"], indirect=True)
def test_all_but_fedamole_fill_capacities(name):
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
        ("balanced", {"solver": {"name": "greedy", "options": {}}}, "policy 'balanced' needs an exact backend"),
        ("balanced", {"balance": None}, "balance = None: policy 'balanced' needs"),
        ("flex-moe", {"solver": "random"}, "solver = 'random': policy 'flex-moe' needs an exact backend"),
        ("flex-moe", {"usage_weight": 0.1}, "usage_weight = 0.1: policy 'flex-moe' has usage_weight = 0.0"),
        ("flex-moe", {"fill": False}, "fill = False: policy 'flex-moe' has fill = True"),
        (
            "flex-moe",
            {"fitness": {"on_idle": "decay"}},
            "on_idle = 'decay': policy 'flex-moe' has on_idle = 'keep'",
        ),
        ("flex-moe", {"deficit_weight": -1}, "deficit_weight = -1: must be >= 0"),
        ("flex-moe", {"deficit_weight": "x"}, "deficit_weight = 'x': must be a finite number"),
        ("flex-moe", {"target": [1, -1, 0]}, r"target\[1\] = -1.0: must be >= 0"),
        ("flex-moe", {"target": [1, 1]}, r"target: has shape \(2,\), must be \(3,\)"),
        ("flex-moe", {"target": 0}, "target = 0: must be > 0 for some expert"),
        ("fedamole", {"solver": "greedy-global"}, "policy 'fedamole' needs an exact backend"),
        ("fedamole", {"balance": 0.25}, "balance = 0.25: policy 'fedamole' has balance = None"),
        ("fedamole", {"load_min": np.ones(3)}, "load_min = .*: policy 'fedamole' has load_min = None"),
        ("fedamole", {"fill": True}, "fill = True: policy 'fedamole' has fill = False"),
        ("fedamole", {"clients_per_expert": 0}, "clients_per_expert = 0: must be >= 1"),
        ("fedamole", {"clients_per_expert": 1.5}, "clients_per_expert = 1.5: must be a whole number"),
        ("fedamole", {"min_experts": -1}, "min_experts = -1: must be >= 0"),
        ("fedamole", {"min_experts": 3, "max_experts": 2}, "min_experts = 3: must be <= max_experts = 2"),
        ("balanced", {"solver": "oracle"}, "solver = 'oracle'"),
        ("greedy", {"colour": 1}, "policy 'greedy': .*colour"),
        ("optimal", {}, "policy = 'optimal': must be one of scheduler, random, greedy, desirability"),
        (["greedy"], {}, "policy = "),
    ],
)
def test_bad_policies(policy, options, message):
    with pytest.raises(InputError, match=message):
        make_policy(policy, 3, **options)


def test_options_that_say_what_is_so_anyway():
    make_policy("greedy", 3, usage_weight=0, balance=None, solver="greedy")
    make_policy("balanced", 3, balance=None, load_max=4)
    make_policy("flex-moe", 3, usage_weight=0, fill=True, solver=SciPyLP(), fitness={"on_idle": "keep"})
    make_policy("fedamole", 3, balance=None, load_min=None, fill=False, solver="lp-scipy")


class Mine(Scheduler):
    """A policy with variables and an option of its own."""

    name = "mine"
    variables = {  # noqa: RUF012
        "deficit": StateVariable("expert"),
        "waited": StateVariable("client", 1.0),
        "best": StateVariable("pair", -1.0),
    }
    wrong = None

    def __init__(self, experts, *, bonus=0.0, **options):
        super().__init__(experts, **options)
        self.bonus = bonus

    def decide(self, fitness, usage, capacity, eligible, *, clients, **rest):
        waited, best = self.variable("waited", clients), self.variable("best", clients)
        known = fitness + self.bonus * (self.variable("deficit") + waited[:, None] + best)
        return super().decide(known, usage, capacity, eligible, clients=clients, **rest)

    def learned_variables(self, opened, reports):
        if self.wrong is not None:
            return self.wrong
        loads = opened.pairs.loads
        waited = self.variable("waited") + 1
        waited[opened.clients[reports.answered]] = 0
        best, rows = self.variable("best").copy(), opened.clients[reports.positions]
        np.maximum.at(best, (rows, reports.experts), reports.rewards)
        deficit = np.maximum(0, self.variable("deficit") + loads.mean() - loads)
        return {"deficit": deficit, "waited": waited, "best": best}

    def options(self):
        return super().options() | {"bonus": self.bonus}


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
    for name in Mine.variables:
        assert len(np.unique(again.variable(name))) > 1
    rounds = [simulate(one, range(4, 13), np.random.default_rng(1)) for one in (policy, again)]
    assert rounds[0] == rounds[1]
    assert frozen(policy) == frozen(again)


def test_variables_grow_with_the_clients_and_change_in_closed_rounds_only():
    policy = Mine(2, default_capacity=1, balance=None)
    policy.add_client("a", fitness=[0.9, 0.1])
    assert policy.variable("waited").tolist() == [1]
    assert policy.variable("best", ["new", "a"]).tolist() == [[-1, -1], [-1, -1]]
    policy.plan(["a", "b"])
    before = frozen(policy)
    policy.cancel_round()
    policy.plan(["a", "b"])
    assert frozen(policy) == before
    policy.report("a", {0: (5, 0.25)})
    policy.report("b", failed=True)
    policy.close_round()
    assert policy.variable("waited").tolist() == [0, 2]
    assert policy.variable("waited", ["new", "b", "a"]).tolist() == [1, 2, 0]
    assert policy.variable("best").tolist() == [[0.25, -1], [-1, -1]]
    with pytest.raises(ValueError, match="read-only"):
        policy.variable("best")[0, 0] = 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"waited": [1.0, 2.0, 3.0]}, r"variable 'waited': has shape \(3,\), must be \(1,\) \(one per client\)"),
        ({"deficit": [0.0, np.nan]}, r"variable 'deficit'\[1\] = nan: must be finite"),
        ({"colour": 1}, "variable 'colour': must be one of deficit, waited, best"),
    ],
)
def test_wrong_values_of_a_variable_change_nothing(wrong, message):
    policy = Mine(2)
    policy.plan(["a"])
    policy.report("a", dict.fromkeys(policy.assigned()["a"], (9, 0.5)))
    policy.wrong, before = {"deficit": [7.0, 7.0]} | wrong, frozen(policy)
    with pytest.raises(InputError, match=message):
        policy.close_round()
    assert frozen(policy) == before


def test_bad_variables():
    with pytest.raises(InputError, match="per = 'round': must be one of expert, client, pair"):
        StateVariable("round")
    with pytest.raises(InputError, match="start = inf"):
        StateVariable("client", float("inf"))
    with pytest.raises(
        InputError, match="told = 'never': must be one of None, 'once', 'before', 'after', 'server'"
    ):
        StateVariable("client", told="never")
    with pytest.raises(InputError, match="told = 'once': clients tell what is kept per client"):
        StateVariable("expert", told="once")
    with pytest.raises(InputError, match="variable 'deficit': is kept per expert, not per client"):
        Mine(2).variable("deficit", ["a"])
    with pytest.raises(InputError, match="variable 'x': must be one of none"):
        Scheduler(2).variable("x")


class Asking(Scheduler):
    """A policy that asks clients for signals of all kinds."""

    name = "asking"
    variables = {  # noqa: RUF012
        "labels": StateVariable("vector", told="once"),
        "gate_mean": StateVariable("pair", 0.5, told="before"),
        "loss": StateVariable("client", 2.0, told="after"),
        "worst": StateVariable("client"),
    }

    def learned_signals(self, client, told):
        worst = max(self.variable("worst")[client], told.get("loss", 0.0))
        return {"worst": worst}


def test_what_clients_tell_holds_at_once_and_is_saved(tmp_path):
    policy = Asking(2, balance=None)
    assert [policy.signals(when) for when in ("once", "before", "after")] == [
        ("labels",),
        ("gate_mean",),
        ("loss",),
    ]
    policy.tell("a", {"labels": [3, 0, 1]})
    policy.add_client("b")
    policy.plan(["a", "b"])
    policy.tell("b", {"gate_mean": [0.25, np.nan], "loss": 0.75})
    policy.tell("b", {"loss": 0.5})
    policy.tell("b", {"labels": (0, 1, 2)})
    policy.cancel_round()
    assert policy.clients == ("a", "b")
    assert policy.variable("labels").tolist() == [[3, 0, 1], [0, 1, 2]]
    assert policy.variable("gate_mean").tolist() == [[0.5, 0.5], [0.25, 0.5]]
    assert policy.variable("loss").tolist() == [2.0, 0.5]
    assert policy.variable("worst").tolist() == [0.0, 0.75]
    assert policy.variable("labels", ["c", "b"]).tolist() == [[0, 0, 0], [0, 1, 2]]
    policy.save(tmp_path / "state")
    again = Asking.load(tmp_path / "state")
    again.add_client("c")
    assert again.variable("labels").tolist() == [[3, 0, 1], [0, 1, 2], [0, 0, 0]]


@pytest.mark.parametrize(
    ("signals", "message"),
    [
        ({"colour": 1}, "client 'a': signal 'colour': must be one of labels, gate_mean, loss"),
        ({"worst": 1}, "client 'a': signal 'worst': must be one of labels, gate_mean, loss"),
        ({"loss": np.nan}, r"client 'a': signal 'loss'\[0\] = nan: must be finite"),
        ({"loss": [0.5]}, r"client 'a': signal 'loss': has shape \(1,\), must be \(\) \(per client\)"),
        ({"gate_mean": [1.0]}, r"client 'a': signal 'gate_mean': has shape \(1,\), must be \(2,\) \(per pair\)"),
        ({"loss": 0.5, "labels": [1, 2]}, r"client 'a': signal 'labels': has shape \(2,\), must be \(3,\)"),
    ],
)
def test_wrong_signals_change_nothing(signals, message):
    policy = Asking(2)
    policy.tell("b", {"labels": [1, 2, 3]})
    before = frozen(policy)
    with pytest.raises(InputError, match=message):
        policy.tell("a", signals)
    assert frozen(policy) == before


def test_a_state_that_lacks_a_variable():
    state = Mine(2).state_dict()
    del state["arrays"]["own.best"]
    state["arrays"]["own.worst"] = np.zeros(2)
    with pytest.raises(InputError, match="variables: the state lacks or has in excess: best, worst"):
        Mine(2).load_state_dict(state)


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
