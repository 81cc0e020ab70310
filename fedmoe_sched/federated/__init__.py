"""Federated training of a global Mixture-of-Experts model with a thin PyTorch loop; needs the `train` extra.

Nothing is imported before it is used, so that reading a config needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmoe_sched.federated.config import TrainConfig
    from fedmoe_sched.federated.experiment import Experiment
    from fedmoe_sched.federated.simulation import RunResult, run_training

__all__ = ["Experiment", "RunResult", "TrainConfig", "run_training"]

_HOME = {
    "Experiment": "experiment",
    "RunResult": "simulation",
    "TrainConfig": "config",
    "run_training": "simulation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from fedmoe_sched.errors import MissingDependencyError

    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name in {"torch", "pydantic", "tomli_w", "sklearn"}:
            msg = f"training needs the package {error.name!r}: pip install 'fedmoe-sched[train]'"
            raise MissingDependencyError(msg) from error
        raise
    return getattr(module, name)
