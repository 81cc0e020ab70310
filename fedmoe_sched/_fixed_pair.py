"""A problem with the decision on one pair fixed: forbidden, or taken, which leaves a smaller problem."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fedmoe_sched._arrays import IntArray
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import BUDGET_TOLERANCE, ResourceBudget

__all__ = ["Fixed", "with_pair", "without_pair"]


class Fixed(NamedTuple):
    """What is left of a problem, and what the pair that is taken adds to its objective; 0 for one forbidden."""

    rest: AssignmentProblem
    worth: float


def without_pair(problem: AssignmentProblem, client: int, expert: int) -> Fixed:
    """Forbid a pair."""
    eligible = np.ones(problem.shape, dtype=np.bool_) if problem.eligible is None else problem.eligible.copy()
    eligible[client, expert] = False
    return Fixed(problem.replace(eligible=eligible), 0.0)


def with_pair(problem: AssignmentProblem, client: int, expert: int) -> Fixed | None:
    """Take an eligible pair: every bound that it counts in is narrower by what it takes.

    The assignments of the rest, the pair added, are those of the problem that have the pair, and their objectives
    are those of the rest and the pair's worth.

    Returns
    -------
    Fixed or None
        None where the pair by itself breaks a bound.
    """
    if problem.capacity[client] < 1 or problem.load_max[expert] < 1:
        return None
    changes: dict[str, Any] = {
        "capacity": _less(problem.capacity, client),
        "min_experts": _less(problem.min_experts, client),
        "load_min": _less(problem.load_min, expert),
        "load_max": _less(problem.load_max, expert),
        "budgets": [],
    }
    for resource in problem.budgets:
        size = float(resource.sizes_of(np.array([client]))[0, expert])
        left = float(resource.allowed[client]) - size
        if left < 0:
            return None
        budget = resource.budget.copy()
        budget[client] = left / (1 + BUDGET_TOLERANCE)  # so that what is allowed is what is left
        changes["budgets"].append(ResourceBudget(resource.name, resource.size, budget))
    if problem.layers is not None:
        layer, clients = int(problem.layers.layer_of[expert]), slice(0, problem.n_clients)
        low, high = (bounds.copy() for bounds in problem.layers.bounds_of(clients, problem.n_clients))
        if high[client, layer] < 1:
            return None
        low[client, layer], high[client, layer] = max(0, low[client, layer] - 1), high[client, layer] - 1
        changes["layers"] = ExpertLayers(problem.layers.layer_of, low, high)
    worth = float(problem.desirability[client, expert])
    if problem.load_penalty is not None:
        one = np.zeros(problem.n_experts, dtype=np.int64)
        one[expert] = 1
        worth -= float(problem.load_penalty.marginal_of(np.array([expert]), np.array([1]))[0])
        changes["load_penalty"] = problem.load_penalty.after(one)
    rest = without_pair(problem, client, expert).rest
    return Fixed(rest.replace(**changes), worth)


def _less(bounds: IntArray, at: int) -> IntArray:
    less = bounds.copy()
    less[at] = max(0, less[at] - 1)
    return less
