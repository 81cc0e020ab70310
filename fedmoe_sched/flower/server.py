"""The server's half of a Flower app."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmoe_sched._processes import end_with_parent
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.coordinator import Coordinator
from fedmoe_sched.federated.runs import RunFolder
from fedmoe_sched.flower.settings import FlowerConfig, read_run_config
from fedmoe_sched.flower.strategy import ExpertStrategy

__all__ = ["make_strategy", "server_app"]

_GRACE = 5.0  # seconds


def server_app(
    config: TrainConfig | None = None,
    options: FlowerConfig | None = None,
    *,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> ServerApp:
    """Make the server's half of the app: train, and leave a run folder behind.

    Parameters
    ----------
    config : TrainConfig, optional
    options : FlowerConfig, optional
        By default both are what the run config of ``flwr run`` says; give both or neither.
    callbacks : sequence of callable
        Called with the record of every round, once it is on disk.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        _end_with_superlink()
        given = read_run_config(context.run_config) if config is None else (config, options or FlowerConfig())
        threads = torch.get_num_threads()
        torch.set_num_threads(given[0].threads)
        try:
            with RunFolder(given[1].run_dir).locked():
                make_strategy(*given, callbacks=callbacks).run(grid)
        finally:
            torch.set_num_threads(threads)

    return app


def _end_with_superlink() -> None:
    """Do not outlive a SuperLink that was killed.

    Flower interrupts a server app whose parent has ended, but then waits for a SuperLink that does not come back:
    the process would keep the run folder locked, and no new run could go on.
    """
    if "--parent-pid" in sys.argv[:-1]:
        end_with_parent(int(sys.argv[sys.argv.index("--parent-pid") + 1]), grace=_GRACE)


def make_strategy(
    config: TrainConfig, options: FlowerConfig, *, callbacks: Sequence[Callable[[dict[str, Any]], None]] = ()
) -> ExpertStrategy:
    """Open the run folder and make a strategy on top of it.

    Raises
    ------
    InputError
        Wrong settings, or a run folder that is in use.
    StateFileError
        The checkpoint is corrupted.
    """
    coordinator = Coordinator(
        config,
        options.run_dir,
        resume=options.resume,
        min_replies=options.min_replies,
        deadline=options.round_timeout,
    )
    return ExpertStrategy(coordinator, options, callbacks=callbacks)
