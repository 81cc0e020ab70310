"""What the loads cost beyond their lower bounds, in steps of constant cost: parallel arcs of a network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solvers._matrix import Bounds, largest_cost

__all__ = ["LoadSteps", "load_steps"]


class LoadSteps(NamedTuple):
    """Steps of the loads, expert by expert and never falling in cost; parallel arrays.

    An optimal flow takes the cheap steps of an expert first, because its costs are convex; the clients up to
    ``load_min`` are paid for in any case, and have no step.
    """

    experts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    costs: npt.NDArray[np.float64]


def load_steps(problem: AssignmentProblem, bounds: Bounds, scale: float | None = None) -> LoadSteps:
    """List the steps of each load between its bounds.

    Parameters
    ----------
    problem : AssignmentProblem
    bounds : Bounds
        Of the same problem.
    scale : float, optional
        Costs are multiples of `largest_cost`, or with a scale whole multiples of that, divided by the scale.

    Returns
    -------
    LoadSteps
        Equal costs in a row are one step; without a penalty there is one step per expert, which costs nothing.
    """
    room = bounds.expert_max - bounds.expert_min
    if problem.load_penalty is None:
        return LoadSteps(np.arange(len(room)), room, np.zeros(len(room)))
    experts = np.repeat(np.arange(len(room)), room)
    first = np.cumsum(room) - room
    loads = np.arange(1, len(experts) + 1) + (bounds.expert_min - first)[experts]
    costs = problem.load_penalty.marginal_of(experts, loads) / (largest_cost(problem) or 1.0)
    if scale is not None:
        costs = np.rint(costs * scale)
    begins = np.ones(len(experts), dtype=np.bool_)
    begins[1:] = (experts[1:] != experts[:-1]) | (costs[1:] != costs[:-1])
    at = np.flatnonzero(begins)
    return LoadSteps(experts[at], np.diff(at, append=len(experts)), costs[at])
