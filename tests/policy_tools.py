"""Helpers shared by the tests of single policies: random worlds, limits, runs of the training loop."""

from __future__ import annotations

import json

import numpy as np
from hypothesis import strategies as st
from scheduler_tools import finish, frozen, record_values

from fedmoe_sched.policies import load_policy, make_policy


@st.composite
def worlds(draw):
    """(experts, capacities, eligible sets, seed) of a few clients; capacities and sets may be empty."""
    m, n = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    capacities = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    eligible = draw(st.lists(st.sets(st.integers(0, m - 1)), min_size=n, max_size=n))
    return m, capacities, eligible, draw(st.integers(0, 2**20))


def play(policy, clients, generator, tell) -> dict:
    """Run one round in which clients tell what they are asked for; ``tell(name, m, generator)`` makes it up."""
    m = len(policy.experts)
    for client in clients:
        before = {name: tell(name, m, generator) for name in policy.signals("before")}
        if before:
            policy.tell(client, before)
    plan = policy.plan(clients).experts_by_client()
    finish(policy, generator)
    record = policy.close_round()
    for client in record.answered:
        policy.tell(client, {name: tell(name, m, generator) for name in policy.signals("after")})
    return {"plan": plan, "record": record_values(record)}


def signal(name, m, generator):
    """Make up what a client tells."""
    if name == "accuracy":
        return float(generator.random())
    values = generator.random(m) * (generator.random(m) < 0.7)
    return values / max(values.sum(), 1e-9)


def assert_limits_hold(name, world, **options):
    """Play a random world, with clients that come and go; no plan breaks capacity or eligibility."""
    m, capacities, eligible, seed = world
    policy, generator = make_policy(name, m, seed=seed, **options), np.random.default_rng(seed)
    for client, (capacity, allowed) in enumerate(zip(capacities, eligible, strict=True)):
        policy.add_client(client, capacity=capacity, eligible=allowed)
    for _ in range(4):
        here = [c for c in range(len(capacities)) if generator.random() < 0.7] or [0]
        plan = play(policy, here, generator, signal)["plan"]
        for client in here:
            experts = plan[client]
            assert len(experts) == len(set(experts)) <= capacities[client]
            assert set(experts) <= eligible[client]
            assert experts or not (capacities[client] and eligible[client])
    return policy


def assert_resumes(name, path, **options):
    """A policy that is saved and loaded in mid-run goes on as one that is not; half the clients appear late."""

    def run(*, stop):
        policy, generator = make_policy(name, 6, default_capacity=3, seed=5, **options), np.random.default_rng(2)
        rounds = []
        for number in range(12):
            if stop and number in {3, 8}:
                policy.save(path)
                policy = load_policy(path)
            here = generator.permutation(8 if number < 5 else 16)[:6].tolist()
            rounds.append(play(policy, here, generator, signal))
        return [*rounds, frozen(policy)]

    assert run(stop=True) == run(stop=False)


def assert_trains_and_resumes(policy, folder, workers):
    """Train on digits, with devices; interrupted, and then with workers, it gives the same. Return the policy."""
    import torch

    from fedmoe_sched.federated import TrainConfig, run_training
    from fedmoe_sched.federated.runs import is_timing

    config = TrainConfig.from_dict(
        {
            "policy": policy,
            "rounds": 4,
            "seed": 3,
            "data": {"train_samples": 160, "test_samples": 60},
            "clients": {
                "count": 6,
                "capacity": [1, 3],
                "participation": 0.75,
                "failure_rate": 0.1,
                "min_samples": 4,
            },
            "model": {"experts": 4, "channels": [4]},
            "local": {"batch_size": 32},
            "devices": {"source": "synthetic"},
        }
    )
    whole = run_training(config, folder / "whole")
    run_training(config.updated({"rounds": 2}), folder / "parts")
    again = run_training(config.updated({"workers": workers}), folder / "parts", resume=True)
    contents = [
        [
            {k: v for k, v in json.loads(line).items() if not is_timing(k)}
            for line in (folder / part / "metrics.jsonl").read_text().splitlines()
        ]
        for part in ("whole", "parts")
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) == 4
    assert all(torch.equal(value, again.state[name]) for name, value in whole.state.items())
    return load_policy(max((folder / "whole").rglob("policy.npz")))
