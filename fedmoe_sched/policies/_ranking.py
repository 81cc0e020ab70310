"""What rules that see one client at a time have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._scheduler_options import real_option
from fedmoe_sched.errors import InputError

__all__ = ["CLIENT_BY_CLIENT", "open_pairs", "ranged_option", "top_ranked"]

#: Options that such a rule fixes. The rule chooses pairs and hands them on as the only eligible ones: the "greedy"
#: backend then takes them all, and proves that these scores allow no more.
CLIENT_BY_CLIENT: Mapping[str, Any] = {
    "solver": "greedy",
    "balance": None,
    "load_min": None,
    "load_max": None,
    "usage_weight": 0.0,
    "fitness_weight": 1.0,
    "fill": True,
}


def open_pairs(
    shape: tuple[int, ...], capacity: IntArray, eligible: BoolArray | None
) -> tuple[BoolArray, IntArray]:
    """Return which pairs are possible, and how many experts each client can take.

    Returns
    -------
    possible : ndarray, shape (k, m), bool
    slots : ndarray, shape (k,), int64
    """
    possible = np.ones(shape, dtype=np.bool_) if eligible is None else eligible
    return possible, np.minimum(capacity, possible.sum(axis=1))


def top_ranked(ranks: FloatArray, counts: IntArray) -> BoolArray:
    """Mark the experts of highest rank of every client; ties go to the lower expert number.

    Parameters
    ----------
    ranks : ndarray, shape (k, m)
        -inf for experts that are not to be taken.
    counts : ndarray, shape (k,), int64
        How many each client takes, at most as many as it has that are not -inf.

    >>> top_ranked(np.array([[0.1, 0.5, 0.5], [3.0, 2.0, 1.0]]), np.array([1, 2])).astype(int).tolist()
    [[0, 1, 0], [1, 1, 0]]
    """
    order = np.argsort(-ranks, axis=1, kind="stable")
    taken = np.zeros(ranks.shape, dtype=np.bool_)
    np.put_along_axis(taken, order, np.arange(ranks.shape[1]) < counts[:, None], axis=1)
    return taken


def ranged_option(name: str, value: Any, least: float, most: float = np.inf) -> float:
    """Read an option that is a number within limits.

    Raises
    ------
    InputError
        It is something else.
    """
    number = real_option(name, value)
    if not least <= number <= most:
        rule = f">= {least:g}" if most == np.inf else f"from {least:g} to {most:g}"
        msg = f"{name} = {value!r}: must be {rule}"
        raise InputError(msg)
    return number
