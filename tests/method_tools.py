"""A short training run for the tests of policies: whole, and interrupted."""

from __future__ import annotations

import json

import numpy as np

from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.federated.runs import RunFolder, is_timing
from fedmoe_sched.policies import load_policy

SMALL = {
    "rounds": 4,
    "seed": 3,
    "data": {"train_samples": 160, "test_samples": 60},
    "clients": {"count": 6, "capacity": [1, 2], "participation": 0.75, "failure_rate": 0.2, "min_samples": 4},
    "model": {"experts": 3, "channels": [4], "expert_hidden": [4, 8]},
    "local": {"batch_size": 32},
}


def small(policy, **changes):
    return TrainConfig.from_dict(SMALL | {"policy": policy}).updated(changes)


def checkpoint(folder):
    """Arrays of the last checkpoint: the model, and what belongs to the method."""
    return RunFolder(folder).load_checkpoint()[0]


def last_policy(folder):
    """The policy of the last checkpoint."""
    return load_policy(RunFolder(folder).load_checkpoint()[2])


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]


def assert_resumes(policy, tmp_path, workers, **changes):
    """A run that stops after two rounds and goes on with workers is one that does neither; return it."""
    config = small(policy, **changes)
    whole = run_training(config, tmp_path / "whole").run
    run_training(config.updated({"rounds": 2}), tmp_path / "parts")
    run_training(config.updated({"workers": workers}), tmp_path / "parts", resume=True)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    ours, theirs = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    return whole
