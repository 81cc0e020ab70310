"""The scheduler's state as arrays and JSON values, and back; every inconsistency is an InputError."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray, as_counts, as_vector
from fedmoe_sched._clients import ClientTable
from fedmoe_sched._names import decode_name, encode_name
from fedmoe_sched._variables import StateVariable, Variables
from fedmoe_sched._version import __version__
from fedmoe_sched.errors import InputError
from fedmoe_sched.rounds import OpenRound
from fedmoe_sched.scores.fitness import FitnessOptions, FitnessScores
from fedmoe_sched.scores.usage import UsageScores

__all__ = [
    "FORMAT",
    "VERSION",
    "StateParts",
    "pack_state",
    "state_header",
    "stored_experts",
    "unpack_state",
]

FORMAT = "fedmoe-sched scheduler"
VERSION = 1


@dataclass(frozen=True, eq=False)
class StateParts:
    """A state taken apart and checked."""

    clients: ClientTable
    fitness: FitnessScores
    usage: FloatArray
    trained: IntArray
    round: int
    prices: FloatArray | None
    open: OpenRound | None
    variables: Variables


def state_header(
    policy: str, experts: Sequence[Hashable], options: Mapping[str, Any], round_: int
) -> dict[str, Any]:
    """Return the metadata that says what the state is of.

    Raises
    ------
    InputError
        The name of an expert cannot be stored.
    """
    codes = []
    for name in experts:
        try:
            codes.append(encode_name(name))
        except (TypeError, ValueError, RecursionError) as error:
            msg = f"expert = {name!r}: this name cannot be stored in a file ({error})"
            raise InputError(msg) from error
    return {
        "format": FORMAT,
        "version": VERSION,
        "package": __version__,
        "policy": policy,
        "experts": codes,
        "options": dict(options),
        "round": round_,
    }


def pack_state(
    header: Mapping[str, Any],
    *,
    clients: ClientTable,
    fitness: FitnessScores,
    usage: UsageScores,
    trained: IntArray,
    prices: FloatArray | None,
    opened: OpenRound | None,
    variables: Variables,
) -> dict[str, Any]:
    """Put all parts together as ``{"arrays": ..., "metadata": ...}``."""
    arrays = {f"clients.{name}": array for name, array in clients.arrays().items()}
    arrays |= {f"fitness.{name}": array for name, array in fitness.arrays().items()}
    arrays["usage"] = usage.values.copy()
    arrays["trained"] = trained.copy()
    arrays["prices"] = np.zeros(0) if prices is None else prices.copy()
    if opened is not None:
        arrays |= {f"open.{name}": array for name, array in opened.arrays().items()}
    arrays |= {f"own.{name}": array for name, array in variables.arrays().items()}
    metadata = {
        **header,
        "clients": clients.encoded_names(),
        "open": None if opened is None else dict(opened.summary),
    }
    return {"arrays": arrays, "metadata": metadata}


def stored_experts(metadata: Mapping[str, Any], policy: str) -> tuple[Hashable, ...]:
    """Check what a state is of, and return the experts.

    Raises
    ------
    InputError
        It is no such state, or of another version or policy.
    """
    if metadata.get("format") != FORMAT:
        msg = f"format = {metadata.get('format')!r}: must be {FORMAT!r}"
        raise InputError(msg)
    if metadata.get("version") != VERSION:
        msg = f"version = {metadata.get('version')!r}: this release reads version {VERSION}"
        raise InputError(msg)
    if metadata.get("policy") != policy:
        msg = f"policy = {metadata.get('policy')!r}: it was not saved by {policy!r}"
        raise InputError(msg)
    return tuple(decode_name(code) for code in metadata["experts"])


def unpack_state(
    state: Mapping[str, Any],
    policy: str,
    experts: Sequence[Hashable],
    options: FitnessOptions,
    variables: Mapping[str, StateVariable],
) -> StateParts:
    """Take a state apart; nothing is shared with it.

    Raises
    ------
    InputError
        It is of another policy or other experts, or its parts do not fit.
    """
    arrays, metadata = state["arrays"], state["metadata"]
    have = stored_experts(metadata, policy)
    if have != tuple(experts):
        msg = f"experts: the state is of {len(have)} experts {_short(have)}, not of {_short(experts)}"
        raise InputError(msg)
    m = len(experts)
    clients = ClientTable.restored(m, metadata["clients"], _part("clients", arrays))
    fitness = FitnessScores(m, options)
    fitness.restore(_part("fitness", arrays))
    if len(fitness) != len(clients):
        msg = f"fitness: has {len(fitness)} rows for {len(clients)} clients"
        raise InputError(msg)
    usage = as_vector("usage", arrays["usage"], m, "one per expert", least=0)
    trained = as_counts("trained", arrays.get("trained", 0), m, "one per expert").copy()  # not in older states
    prices = arrays["prices"]
    prices = as_vector("prices", prices, m, "one per expert").copy() if prices.size else None
    opened = None
    if metadata["open"] is not None:
        opened = OpenRound.restored(m, len(clients), metadata["open"], _part("open", arrays))
    round_ = metadata["round"]
    if type(round_) is not int or round_ < 0:
        msg = f"round = {round_!r}: must be a whole number >= 0"
        raise InputError(msg)
    own = Variables.restored(m, len(clients), variables, _part("own", arrays))
    return StateParts(clients, fitness, usage, trained, round_, prices, opened, own)


def _part(prefix: str, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    return {
        name.removeprefix(f"{prefix}."): array for name, array in arrays.items() if name.startswith(f"{prefix}.")
    }


def _short(names: Sequence[Hashable]) -> str:
    text = ", ".join(repr(name) for name in names[:5])
    return f"({text}, ...)" if len(names) > 5 else f"({text})"
