"""What a schedule did to balance, to fairness, and to the fitness it had to give up for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, as_bool_matrix, as_matrix
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import dual_bound, objective
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import Schedule

__all__ = ["fitness_given_up", "jain_index", "load_cv"]


def load_cv(loads: npt.ArrayLike) -> float:
    """Return the coefficient of variation of the loads, the balance figure of FLEX-MoE (arXiv 2512.23070).

    Parameters
    ----------
    loads : array_like, shape (m,)
        Numbers >= 0, one per expert.

    Returns
    -------
    float
        ``std(loads) / mean(loads)`` with the population standard deviation: 0 is perfect balance,
        ``sqrt(m - 1)`` everything on one expert. 0 where there is no load at all.

    Examples
    --------
    >>> load_cv([1, 3])
    0.5
    """
    values = _amounts("loads", loads)
    # Squares of tiny or huge numbers leave the range of float64; a power of two scales without rounding.
    values = np.ldexp(values, -np.frexp(values.max())[1])
    mean = float(values.mean())
    return float(values.std()) / mean if mean > 0 else 0.0


def jain_index(amounts: npt.ArrayLike) -> float:
    """Return Jain's fairness index (Jain, Chiu and Hawe, DEC-TR-301, 1984).

    Parameters
    ----------
    amounts : array_like, shape (k,)
        Numbers >= 0, such as the rounds that each client took part in.

    Returns
    -------
    float
        ``(sum x)^2 / (k sum x^2)``: 1 if all are equal (also if all are 0), 1/k if one has everything.

    Examples
    --------
    >>> jain_index([1, 1, 0, 0])
    0.5
    """
    values = _amounts("amounts", amounts)
    largest = float(values.max())
    if largest == 0:
        return 1.0
    values = values / largest  # squares of large numbers overflow
    return float(values.sum() ** 2 / (len(values) * (values * values).sum()))


def fitness_given_up(
    fitness: Any, capacity: Any, assignment: Any, *, eligible: Any = None, layers: ExpertLayers | None = None
) -> float:
    """Return the share of the attainable fitness that an assignment gives up for everything else.

    Parameters
    ----------
    fitness : array_like, shape (n, m)
        Bare fitness, without usage or bonus terms.
    capacity : array_like of int, shape (n,), or int
        The most experts of each client.
    assignment : Schedule, Assignment, or array_like of bool, shape (n, m)
        What was decided.
    eligible : array_like of bool, shape (n, m), optional
        Pairs that are possible at all.
    layers : ExpertLayers, optional
        How many experts of each layer clients train.

    Returns
    -------
    float
        ``(best - got) / best`` with got the fitness of the assignment, and best that of the best assignment under
        capacity, eligibility and layers alone (no load bounds, nobody has to train more than layers demand). At
        least 0 for an assignment that keeps to them; above 1 only if it has pairs of negative fitness. 0 where
        best is not positive: there is none to give up.

    Examples
    --------
    >>> round(fitness_given_up([[0.9, 0.5], [0.7, 0.6]], 1, [[True, False], [False, True]]), 6)
    0.0625
    """
    problem = AssignmentProblem(as_matrix("fitness", fitness), capacity, eligible=eligible, layers=layers)
    # Without load bounds, prices of zero make the dual bound the optimum itself.
    best = dual_bound(problem, np.zeros(problem.n_experts))
    if best <= 0:
        return 0.0
    return (best - objective(problem, _pairs(assignment, problem.shape))) / best


def _pairs(assignment: Any, shape: tuple[int, int]) -> Assignment:
    if isinstance(assignment, Schedule):
        assignment.loads  # noqa: B018  (raises, with the reason, where there is no assignment)
        assignment = assignment.pairs
    if not isinstance(assignment, Assignment):
        return Assignment.from_mask(as_bool_matrix("assignment", assignment, shape))
    have = (assignment.n_clients, assignment.n_experts)
    if have != shape:
        msg = f"assignment: has shape {have}, must be {shape} (clients, experts)"
        raise InputError(msg)
    return assignment


def _amounts(name: str, value: npt.ArrayLike) -> FloatArray:
    array = np.asarray(value, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        msg = f"{name}: has shape {array.shape}, must be a list of at least one number"
        raise InputError(msg)
    if not (array >= 0).all() or np.isinf(array).any():
        at = int(np.argmax(~((array >= 0) & np.isfinite(array))))
        msg = f"{name}[{at}] = {array[at]}: must be finite and >= 0"
        raise InputError(msg)
    return array
