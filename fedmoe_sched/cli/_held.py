"""What clients hold, for the command line: the answer of an earlier ``fedmoe-sched solve``."""

from __future__ import annotations

import csv
import json
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedmoe_sched._arrays import split_labels
from fedmoe_sched.errors import InputError

__all__ = ["read_held"]


def read_held(path: Path, fitness: Any) -> dict[Hashable, list[Hashable]]:
    """Read an answer as ``{client: [experts]}``.

    Parameters
    ----------
    path : Path
        ``--output`` of an earlier ``solve``, .json or .csv.
    fitness : array_like
        Of this round. Files hold names as text: they are matched with its labels, or are numbers where it has
        none.

    Raises
    ------
    InputError
        It is no such file, or a name is no number.
    OSError
        It cannot be read.
    """
    bare = split_labels(fitness)
    text = path.read_text(encoding="utf-8")
    try:
        pairs = _csv_pairs(text) if path.suffix.lower() == ".csv" else _json_pairs(text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path}: is no answer of 'fedmoe-sched solve --output' with an assignment ({error!r})"
        raise InputError(msg) from error
    clients, experts = (_by_text(labels) for labels in (bare.rows, bare.columns))
    held: dict[Hashable, list[Hashable]] = {}
    for client, expert in pairs:
        held.setdefault(_named(path, client, clients), []).append(_named(path, expert, experts))
    return held


def _json_pairs(text: str) -> list[tuple[str, str]]:
    assignment: Mapping[str, list[Any]] = json.loads(text)["assignment"]
    return [(client, str(expert)) for client, experts in assignment.items() for expert in experts]


def _csv_pairs(text: str) -> list[tuple[str, str]]:
    return [(row["client"], row["expert"]) for row in csv.DictReader(text.splitlines())]


def _by_text(labels: Iterable[Hashable] | None) -> dict[str, Hashable] | None:
    return None if labels is None else {str(label): label for label in labels}


def _named(path: Path, name: str, labels: Mapping[str, Hashable] | None) -> Hashable:
    """Return the label that reads so; the name itself where there is none."""
    if labels is not None:
        return labels.get(name, name)
    if not name.isdigit():
        msg = f"{path}: {name!r}: must be a number, since the scores have no names"
        raise InputError(msg)
    return int(name)
