"""Settings of a run on Flower: training and engine, from Flower's flat run config; no flwr here."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.config import TrainConfig, checked

__all__ = ["FlowerConfig", "read_run_config"]

_PREFIX = "flower."

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class FlowerConfig(BaseModel):
    """How the server deals with clients that are elsewhere.

    Parameters
    ----------
    run_dir : str
        Folder for settings, metrics and checkpoints, as the server sees it; see `fedmoe_sched.federated.runs`.
    resume : bool
        Go on after the last checkpoint in it, if there is one.
    min_clients : int
        A round begins when so many clients are there and not busy.
    min_replies : int
        With fewer good updates in a round the model stays as it is.
    round_timeout : float
        Seconds after which a round ends; messages expire then too.
    wait_timeout : float
        Seconds to wait for `min_clients`; then the run ends, and can be resumed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    run_dir: Annotated[str, Field(min_length=1)] = "runs/flower"
    resume: bool = False
    min_clients: Annotated[int, Field(ge=1)] = 2
    min_replies: Annotated[int, Field(ge=1)] = 1
    round_timeout: Seconds = 120.0
    wait_timeout: Seconds = 120.0


def read_run_config(values: Mapping[str, Any]) -> tuple[TrainConfig, FlowerConfig]:
    """Read what ``flwr run`` makes of ``[tool.flwr.app.config]`` and ``--run-config``.

    Parameters
    ----------
    values : mapping of str to bool, int, float or str
        Keys as in the TOML file of a run, with dots (``clients.count``); those of `FlowerConfig` begin with
        ``flower.``. An empty text leaves a setting at its default. Lists and tables, which Flower has no values
        for, are text in TOML: ``"[1, 2]"``, ``"{ balance = 0.1 }"``.

    Returns
    -------
    TrainConfig, FlowerConfig

    Raises
    ------
    InputError
        An unknown key or wrong value.

    Examples
    --------
    >>> config, flower = read_run_config({"clients.count": 3, "clients.capacity": "[1, 2]"})
    >>> config.clients.capacities(), flower.min_clients
    ((1, 2, 1), 2)
    """
    source = "run config"
    given = {key: _value(key, value, source) for key, value in values.items() if value != ""}
    engine = {key.removeprefix(_PREFIX): value for key, value in given.items() if key.startswith(_PREFIX)}
    training = {key: value for key, value in given.items() if not key.startswith(_PREFIX)}
    return TrainConfig().updated(training, source=source), checked(FlowerConfig, engine, source)


def _value(key: str, value: Any, source: str) -> Any:
    """Read text that is a list or a table; all other values are what they are."""
    if not (isinstance(value, str) and value.lstrip().startswith(("[", "{"))):
        return value
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        msg = f"{source}: {key} = {value!r}: is not TOML ({error})"
        raise InputError(msg) from error
