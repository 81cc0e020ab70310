"""Settings of training runs: TOML in and out, and errors that name key and value."""

import subprocess
import sys

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("tomli_w")

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.config import TrainConfig

pytestmark = pytest.mark.train


def test_toml_round_trip_keeps_everything(tmp_path):
    config = TrainConfig.from_dict(
        {
            "policy": "greedy",
            "policy_options": {"usage_weight": 0.3, "balance": None, "fitness": {"prior": 1.0}},
            "rounds": 7,
            "clients": {"capacity": [1, 2, 4], "split": "dirichlet", "alpha": 0.5},
            "model": {"routing": "top-k", "top_k": 2, "expert_channels": [8]},
            "local": {"gate_learning_rate": 0.01},
            "devices": {"source": "synthetic", "deadline": 60.0, "expert_bytes": 350_000_000},
            "data": {"name": "cifar10", "dir": "/data", "train_samples": 100},
        }
    )
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml())
    assert "train-samples = 100" in path.read_text()
    assert TrainConfig.from_toml(path) == config


def test_defaults_survive_the_round_trip():
    assert TrainConfig.from_dict(TrainConfig().to_dict()) == TrainConfig()


def test_kebab_and_snake_keys_are_the_same(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("[local]\nbatch-size = 4\n[clients]\nclasses_per_client = 3\n")
    config = TrainConfig.from_toml(path)
    assert (config.local.batch_size, config.clients.classes_per_client) == (4, 3)


def test_capacities_repeat_over_the_clients():
    config = TrainConfig.from_dict({"clients": {"count": 5, "capacity": [1, 3]}})
    assert config.clients.capacities() == (1, 3, 1, 3, 1)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rounds": 0}, ["rounds = 0", "greater than or equal to 1"]),
        ({"rounds": 2.5}, ["rounds = 2.5", "integer"]),
        ({"rounds": "5"}, ["rounds = '5'", "integer"]),
        ({"polcy": "greedy"}, ["polcy", "unknown setting", "'policy'"]),
        ({"clients": {"cuont": 3}}, ["clients.cuont", "unknown setting", "'count'"]),
        ({"clients": {"split": "odd"}}, ["clients.split = 'odd'", "'dirichlet'"]),
        ({"clients": {"capacity": [2, -1]}}, ["clients.capacity", "-1"]),
        ({"clients": {"capacity": []}}, ["clients.capacity", "empty"]),
        ({"clients": {"alpha": float("nan")}}, ["clients.alpha = nan"]),
        ({"clients": {"participation": 0.0}}, ["clients.participation = 0.0"]),
        ({"model": {"routing": "top-k", "top_k": 9}}, ["model.top_k = 9", "model.experts = 5"]),
        ({"devices": {"deadline": 30.0}}, ["devices.deadline = 30.0", "needs devices", "'synthetic'"]),
        ({"devices": {"availability": True}}, ["devices.availability = True", "needs devices"]),
        ({"devices": {"jitter": 0.1}}, ["devices.jitter = 0.1", "needs devices"]),
        ({"devices": {"source": "phone"}}, ["devices.source = 'phone'", "'phones'"]),
        ({"devices": {"source": "synthetic", "deadline": 0.0}}, ["devices.deadline = 0.0", "greater than 0"]),
        ({"devices": {"source": "synthetic", "bandwidth": "mobiperf"}}, ["devices.bandwidth = 'mobiperf'"]),
        ({"devices": {"source": "phones", "min_available": 2}}, ["devices.min_available = 2", "availability"]),
        ({"devices": {"memory_share": 1.5}}, ["devices.memory_share = 1.5"]),
        ({"devices": {"speed_scale": float("inf")}}, ["devices.speed_scale = inf"]),
        ({"devices": {"sorce": "phones"}}, ["devices.sorce", "'source'"]),
        ({"report_seconds": True, "devices": {"source": "synthetic"}}, ["report_seconds = True", "simulated"]),
        ({"local": {"learning_rate": -0.1}}, ["local.learning_rate = -0.1"]),
        ({"batch-size": 3, "batch_size": 4}, ["batch_size", "twice"]),
        ({"clients": 3}, ["clients = 3"]),
    ],
)
def test_wrong_settings_name_key_and_value(values, words):
    with pytest.raises(InputError) as error:
        TrainConfig.from_dict(values, source="run.toml")
    for word in ["run.toml", *words]:
        assert word in str(error.value)


def test_all_faults_are_named_at_once():
    with pytest.raises(InputError, match=r"rounds = 0.*clients\.count = -1"):
        TrainConfig.from_dict({"rounds": 0, "clients": {"count": -1}})


def test_files_that_are_no_toml_or_missing(tmp_path):
    path = tmp_path / "run.toml"
    with pytest.raises(InputError, match=r"run\.toml.*cannot be read"):
        TrainConfig.from_toml(path)
    path.write_text("rounds = \n")
    with pytest.raises(InputError, match=r"run\.toml.*is not TOML"):
        TrainConfig.from_toml(path)


def test_updated_replaces_single_settings():
    config = TrainConfig().updated({"clients.count": 3, "local.batch-size": 9, "policy": "random"})
    assert (config.clients.count, config.local.batch_size, config.policy) == (3, 9, "random")
    assert config.clients.split == TrainConfig().clients.split
    with pytest.raises(InputError, match=r"clients\.number: unknown setting"):
        config.updated({"clients.number": 3})
    with pytest.raises(InputError, match=r"^here: rounds\.last = 3: rounds holds no settings"):
        config.updated({"rounds.last": 3}, source="here")


def test_a_run_goes_on_with_its_own_settings_only(tmp_path):
    file = tmp_path / "config.toml"
    config = TrainConfig().updated({"clients.alpha": 0.5})
    file.write_text(config.to_toml())
    config.updated({"rounds": 99, "workers": 3, "data.dir": "elsewhere"}).refuse_to_continue(file)
    with pytest.raises(InputError, match=r"clients\.alpha = 0\.2, but the run was started with 0\.5"):
        config.updated({"clients.alpha": 0.2}).refuse_to_continue(file)


def test_reading_a_config_needs_no_torch():
    code = "import sys; from fedmoe_sched.federated import TrainConfig; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
