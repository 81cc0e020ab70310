"""Switching cost: an expert that a client does not hold from before costs something, since it has to be sent.

With ``h_ij = 1`` where client i holds expert j, the objective is ``sum_ij (d_ij - s_ij (1 - h_ij)) x_ij``. What is
subtracted is linear: the problem is the same one with other scores, and every backend and every proof stays as it
is. The form is ours [I].
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, as_array, as_bool_matrix, split_labels
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError
from fedmoe_sched.result import Schedule

__all__ = [
    "SwitchingReport",
    "as_held",
    "as_switching_cost",
    "switching_paid",
    "switching_report",
    "with_switching_cost",
]

Labels = Sequence[Hashable] | None


@dataclass(frozen=True)
class SwitchingReport:
    """What a schedule keeps of what clients hold, and what the rest costs.

    Parameters
    ----------
    kept, resent : int
        Pairs of the schedule that the client holds, and that it does not.
    paid : float
        Switching cost of the latter, in units of desirability.
    desirability : float
        Objective of the schedule without the switching cost: `paid` more than ``Schedule.objective``.
    """

    kept: int
    resent: int
    paid: float
    desirability: float


def switching_report(answer: Schedule, held: Any, switching_cost: npt.ArrayLike = 0.0) -> SwitchingReport:
    """Take a schedule that has a switching cost in its objective apart.

    Parameters
    ----------
    answer : Schedule
    held, switching_cost
        As they were given to `fedmoe_sched.schedule`.

    Returns
    -------
    SwitchingReport

    Raises
    ------
    InputError
        `held` or `switching_cost` do not fit the schedule.
    InfeasibleError, NoAssignmentError
        The schedule has no assignment.

    Examples
    --------
    >>> from fedmoe_sched import schedule
    >>> answer = schedule([[0.6, 0.5]], [1, 1], 1, balance=None, usage_weight=0, held={0: [1]}, switching_cost=0.3)
    >>> switching_report(answer, {0: [1]}, 0.3)
    SwitchingReport(kept=1, resent=0, paid=0.0, desirability=0.5)
    """
    answer.loads  # noqa: B018  (raises, with the reason, where there is no assignment)
    problem, pairs = answer.problem, answer.pairs
    assert pairs is not None
    assert answer.objective is not None
    before = as_held(held, problem.shape, problem.client_labels, problem.expert_labels)
    cost = as_switching_cost(switching_cost, problem.shape)
    fresh = ~before.mask()[pairs.clients, pairs.indices]
    paid = switching_paid(pairs, fresh, cost)
    return SwitchingReport(int((~fresh).sum()), int(fresh.sum()), paid, answer.objective + paid)


def switching_paid(pairs: Assignment, fresh: BoolArray, cost: FloatArray) -> float:
    """Return what the pairs that are not held cost.

    Parameters
    ----------
    pairs : Assignment
    fresh : ndarray, shape (number of pairs,), bool
        Whether the client does not hold the expert.
    cost : ndarray, shape (), (m,) or (n, m)
    """
    each = np.broadcast_to(cost, (pairs.n_clients, pairs.n_experts))
    return float(each[pairs.clients[fresh], pairs.indices[fresh]].sum())


def with_switching_cost(scores: FloatArray, held: Assignment, cost: FloatArray) -> FloatArray:
    """Subtract the switching cost from the scores of pairs that are not held.

    Parameters
    ----------
    scores : ndarray, shape (n, m)
    held : Assignment
        Of shape (n, m).
    cost : ndarray, shape (), (m,) or (n, m)
        As `as_switching_cost` returns it.

    Returns
    -------
    ndarray, shape (n, m), of the dtype of `scores`; float32 for float16
        `scores` itself where nothing costs anything.
    """
    if not np.any(cost):
        return scores
    dtype = np.promote_types(scores.dtype, np.float32)
    less: FloatArray = np.subtract(scores, cost.astype(dtype), dtype=dtype)
    at = held.clients, held.indices
    less[at] = scores[at]  # to add the cost again would round
    return less


def as_switching_cost(value: Any, shape: tuple[int, int]) -> FloatArray:
    """Read a switching cost.

    Parameters
    ----------
    value : float, or array_like of shape (m,) or (n, m)
        Desirability per download, >= 0; e.g. in proportion to the bytes of the expert.
    shape : (int, int)
        (n, m).

    Returns
    -------
    ndarray, shape (), (m,) or (n, m), float64

    Raises
    ------
    InputError
        Another shape, or a number that is negative or not finite.
    """
    cost = as_array("switching_cost", value).astype(np.float64, copy=False)
    if cost.shape not in ((), shape[1:], shape):
        msg = f"switching_cost: has shape {cost.shape}, must be one number, {shape[1:]} (experts) or {shape}"
        raise InputError(msg)
    bad = ~(np.isfinite(cost) & (cost >= 0))
    if bad.any():
        at = np.unravel_index(int(np.argmax(bad)), cost.shape) if cost.ndim else ()
        where = f"[{', '.join(str(int(i)) for i in at)}]" if at else ""
        msg = f"switching_cost{where} = {cost[at]}: must be finite and >= 0"
        raise InputError(msg)
    return cost


# What clients hold -----------------------------------------------------------------------------------------------


def as_held(held: Any, shape: tuple[int, int], clients: Labels = None, experts: Labels = None) -> Assignment:
    """Read what clients hold, as pairs of the round that is to be decided.

    Where both sides have names, they are matched by name: clients that are not in this round count for nothing,
    new ones hold nothing. Else positions count, and the shapes must be equal.

    Parameters
    ----------
    held : Schedule, Assignment, mapping of client to experts, array_like of bool, SciPy sparse array, or None
        A DataFrame of bool is matched by its labels. None: nobody holds anything.
    shape : (int, int)
        (n, m) of this round.
    clients, experts : sequence of hashable, optional
        The names of this round.

    Returns
    -------
    Assignment
        Of shape (n, m).

    Raises
    ------
    InputError
        Another shape, a client number that there is not, or an expert that this round has not.
    InfeasibleError, NoAssignmentError
        It is a schedule without an assignment.
    """
    if held is None:
        return Assignment.from_pairs([], [], shape)
    if isinstance(held, Mapping):
        return _of_mapping(held, shape, clients, experts)
    if isinstance(held, Schedule):
        held.loads  # noqa: B018  (raises, with the reason, where there is no assignment)
        assert held.pairs is not None
        return _matched(
            held.pairs, (held.problem.client_labels, held.problem.expert_labels), shape, clients, experts
        )
    if isinstance(held, Assignment):
        return _matched(held, (None, None), shape, clients, experts)
    bare = split_labels(held.toarray() if hasattr(held, "toarray") else held)
    mask = as_bool_matrix("held", bare.values, np.shape(bare.values) if bare.rows else shape)
    return _matched(Assignment.from_mask(mask), (bare.rows, bare.columns), shape, clients, experts)


def _matched(
    pairs: Assignment, names: tuple[Labels, Labels], shape: tuple[int, int], clients: Labels, experts: Labels
) -> Assignment:
    """Put pairs into the numbers of this round."""
    have = (pairs.n_clients, pairs.n_experts)
    if None in (*names, clients, experts):
        if have != shape:
            msg = f"held: has shape {have}, must be {shape} (clients, experts)"
            raise InputError(msg)
        return pairs
    rows = _places(names[0], clients)[pairs.clients]
    columns = _places(names[1], experts)[pairs.indices]
    there = rows >= 0
    lacking = there & (columns < 0)
    if lacking.any():
        expert = names[1][int(pairs.indices[np.argmax(lacking)])]  # type: ignore[index]
        msg = f"held: expert {expert!r} is held, and this round has no such expert"
        raise InputError(msg)
    return Assignment.from_pairs(rows[there], columns[there], shape)


def _places(have: Labels, want: Labels) -> IntArray:
    """Return where each name of one side is on the other; -1 where it is not."""
    places = {label: i for i, label in enumerate(want or ())}
    return np.array([places.get(label, -1) for label in have or ()], dtype=np.int64)


def _of_mapping(
    held: Mapping[Hashable, Iterable[Hashable]], shape: tuple[int, int], clients: Labels, experts: Labels
) -> Assignment:
    rows = {label: i for i, label in enumerate(range(shape[0]) if clients is None else clients)}
    columns = {label: j for j, label in enumerate(range(shape[1]) if experts is None else experts)}
    pairs: dict[tuple[int, int], None] = {}
    for client, chosen in held.items():
        if client not in rows and clients is None:
            msg = f"held[{client!r}]: must be a client number from 0 to {shape[0] - 1}"
            raise InputError(msg)
        if client in rows:
            pairs |= dict.fromkeys((rows[client], columns[expert]) for expert in _known(client, chosen, columns))
    numbers = np.array(list(pairs), dtype=np.int64).reshape(-1, 2)
    return Assignment.from_pairs(numbers[:, 0], numbers[:, 1], shape)


def _known(client: Hashable, chosen: Any, columns: Mapping[Hashable, int]) -> list[Hashable]:
    if isinstance(chosen, str) or not isinstance(chosen, Iterable):
        msg = f"held[{client!r}] = {chosen!r}: must be a list of experts"
        raise InputError(msg)
    listed = list(chosen)
    for expert in listed:
        if not isinstance(expert, Hashable) or expert not in columns:
            msg = f"held[{client!r}]: expert {expert!r} is not among the {len(columns)} of this round"
            raise InputError(msg)
    return listed
