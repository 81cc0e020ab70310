"""Soft mode: widen the fewest bounds, by the fewest places in total, so that an assignment exists.

A bound that gives way is a variable of an integer program that says by how much, and their weighted sum is least.
The program is a minimum cost flow over groups of clients that are alike, and its relaxation is integral (Ahuja,
Magnanti and Orlin, *Network Flows*, section 6.7, on making infeasible flows feasible).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._dealing import group_clients, rank_in_group
from fedmoe_sched.errors import InputError
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import Relaxation, Schedule, Status

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["WEIGHTS", "priced", "relax"]

#: What one place of each kind of bound counts; kinds that are left out are hard.
WEIGHTS: Mapping[str, float] = {"min_experts": 1.0, "load_min": 1.0, "load_max": 1.0}
_KINDS = ("min_experts", "load_min", "load_max", "capacity")


def relax(
    problem: AssignmentProblem, weights: Mapping[str, float] = WEIGHTS
) -> tuple[AssignmentProblem, tuple[Relaxation, ...]]:
    """Widen bounds by the fewest places in total, so that an assignment exists.

    Parameters
    ----------
    problem : AssignmentProblem
        Without budgets.
    weights : mapping of str to float, default 1 for all but ``"capacity"``
        What one place counts of ``"min_experts"`` (lowered), ``"load_min"`` (lowered), ``"load_max"`` (raised) and
        ``"capacity"`` (raised); > 0. A kind that is not named is never touched.

    Returns
    -------
    problem : AssignmentProblem
        With the widened bounds; the same object if nothing had to be widened, or if no widening helps.
    relaxed : tuple of Relaxation
        What was widened; empty if nothing was.

    Raises
    ------
    InputError
        The problem has budgets, or a weight is unknown or not > 0.

    Examples
    --------
    >>> problem = AssignmentProblem([[3.0, 1.0], [2.0, 0.5], [1.0, 1.0]], 1, min_experts=1, load_max=1)
    >>> _, relaxed = relax(problem, {"min_experts": 1})
    >>> [str(relaxation) for relaxation in relaxed]
    ['min_experts[0]: 1 -> 0']
    """
    _refuse(problem, weights)
    if find_conflict(problem) is None:
        return problem, ()
    moved = _least_moves(problem, weights)
    if moved is None:
        return problem, ()
    signs = {"min_experts": -1, "load_min": -1, "load_max": 1, "capacity": 1}
    bounds = {kind: getattr(problem, kind) + signs[kind] * change for kind, change in moved.items()}
    relaxed = tuple(
        _relaxation(kind, k, int(getattr(problem, kind)[k]), int(bounds[kind][k]))
        for kind in _KINDS
        for k in np.flatnonzero(moved[kind]).tolist()
    )
    return problem.replace(**bounds), relaxed


def _refuse(problem: AssignmentProblem, weights: Mapping[str, float]) -> None:
    if problem.budgets:
        msg = "problem: has budgets; only bounds of network problems can be relaxed"
        raise InputError(msg)
    if problem.layers is not None:
        msg = "problem: has layers; only bounds of problems without them can be relaxed"
        raise InputError(msg)
    for kind, weight in weights.items():
        if kind not in _KINDS:
            msg = f"weights: no bound called {kind!r}; there are {', '.join(_KINDS)}"
            raise InputError(msg)
        if not (weight > 0 and math.isfinite(weight)):
            msg = f"weights[{kind!r}] = {weight}: must be finite and > 0"
            raise InputError(msg)


def _relaxation(kind: str, number: int, asked: int, used: int) -> Relaxation:
    if kind.startswith("load"):
        return Relaxation(number, kind, asked, used)
    return Relaxation(None, kind, asked, used, client=number)


def _least_moves(problem: AssignmentProblem, weights: Mapping[str, float]) -> dict[str, IntArray] | None:
    """Return by how much each bound gives way, by kind; None where nothing helps."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    # What exceeds the pairs that there are has to go in any case, and could be too large for an engine.
    beyond = {
        "min_experts": np.maximum(problem.min_experts - problem.eligible_counts, 0),
        "load_min": np.maximum(problem.load_min - problem.n_clients, 0),
    }
    if any(kind not in weights and part.any() for kind, part in beyond.items()):
        return None
    problem = problem.replace(**{kind: getattr(problem, kind) - part for kind, part in beyond.items()})
    groups = group_clients(problem)
    size, m = groups.size, problem.n_experts
    first = np.zeros(len(size), dtype=np.int64)
    first[groups.member[::-1]] = np.arange(problem.n_clients)[::-1]
    # No client can have more experts than are open to it, nor an expert more clients than there are.
    least, slots = problem.min_experts[first], problem.slots[first]
    room = groups.open.sum(axis=1) - slots
    flow = groups.open * size[:, None]
    give = np.concatenate([size * least, problem.load_min, np.full(m, problem.n_clients), size * room])
    allowed = np.repeat([float(kind in weights) for kind in _KINDS], [len(size), m, m, len(size)])
    price = np.repeat([weights.get(kind, 0.0) for kind in _KINDS], [len(size), m, m, len(size)])
    costs = np.concatenate([np.zeros(flow.size), price])
    top = np.concatenate([flow.ravel(), give * allowed])
    found = milp(
        costs,
        integrality=np.ones(len(costs)),
        bounds=Bounds(0, top),
        constraints=LinearConstraint(
            _rows(groups.open),
            np.concatenate([size * least, np.full(len(size), -np.inf), problem.load_min, np.full(m, -np.inf)]),
            np.concatenate([np.full(len(size), np.inf), size * slots, np.full(m, np.inf), problem.load_max]),
        ),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    moves = np.split(np.rint(found.x[flow.size :]).astype(np.int64), np.cumsum([len(size), m, m]))
    by_kind = dict(zip(_KINDS, moves, strict=True))
    for kind in ("min_experts", "capacity"):
        by_kind[kind] = _dealt(by_kind[kind], size, groups.member)
    return {kind: part + beyond.get(kind, 0) for kind, part in by_kind.items()}


def _rows(open_: BoolArray) -> csr_array[Any, Any]:
    """Make the rows: places of groups, and loads, from below and above, each with what gives way."""
    from scipy.sparse import block_array, identity, kron

    g, m = open_.shape
    by_group = kron(identity(g), np.ones((1, m)))
    by_expert = kron(np.ones((1, g)), identity(m))
    rows: csr_array[Any, Any] = block_array(
        [
            [by_group, identity(g), None, None, None],
            [by_group, None, None, None, -identity(g)],
            [by_expert, None, identity(m), None, None],
            [by_expert, None, None, -identity(m), None],
        ],
        format="csr",
    )
    return rows


def _dealt(total: IntArray, size: IntArray, member: IntArray) -> IntArray:
    """Share what a group gives way among its members, evenly."""
    share: IntArray = total[member] // size[member] + (rank_in_group(member) < total[member] % size[member])
    return share


def priced(schedule: Schedule, relaxed: tuple[Relaxation, ...]) -> tuple[Relaxation, ...]:
    """Add to each relaxation by how much the objective would rise if the bound gave way by one more place.

    Parameters
    ----------
    schedule : Schedule
        Of the relaxed problem; where it is not optimal there are no prices.
    relaxed : tuple of Relaxation
    """
    if schedule.status is not Status.OPTIMAL or schedule.problem.budgets:
        return relaxed
    worth = schedule.sensitivity()
    return tuple(dataclasses.replace(one, price=_price(getattr(worth, one.bound), one)) for one in relaxed)


def _price(worth: FloatArray, one: Relaxation) -> float:
    number = one.expert if one.client is None else one.client
    return float(worth[number])
