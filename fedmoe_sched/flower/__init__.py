"""The same training on the engine Flower (https://flower.ai), on many machines or simulated; extra `flower`.

`server_app` and `client_app` are the two halves of a Flower app; `ExpertStrategy` is the strategy of the former.
What they do is done elsewhere, by the code of the loop on one machine: `fedmoe_sched.federated.coordinator` on the
server, `fedmoe_sched.federated.workers.LocalTrainer` on the clients. Nothing is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedmoe_sched.flower.client import client_app
    from fedmoe_sched.flower.server import server_app
    from fedmoe_sched.flower.settings import FlowerConfig
    from fedmoe_sched.flower.strategy import ExpertStrategy

__all__ = ["ExpertStrategy", "FlowerConfig", "client_app", "server_app"]

_HOME = {
    "ExpertStrategy": "strategy",
    "FlowerConfig": "settings",
    "client_app": "client",
    "server_app": "server",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    from fedmoe_sched.errors import MissingDependencyError

    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name in {"flwr", "torch", "pydantic", "tomli_w", "sklearn"}:
            msg = f"training on Flower needs the package {error.name!r}: pip install 'fedmoe-sched[train,flower]'"
            raise MissingDependencyError(msg) from error
        raise
    return getattr(module, name)
