"""A schedule as a text table: experts with loads, bounds and prices, resources with what is used of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fedmoe_sched._layer_exchange import LayerRoom
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.result import Status

if TYPE_CHECKING:
    from fedmoe_sched.assignment import Assignment
    from fedmoe_sched.result import Schedule

__all__ = ["summary_table"]


def summary_table(schedule: Schedule) -> str:
    """Return a schedule as a text table, one line per expert and resource; see `Schedule.summary`."""
    problem, loads = schedule.problem, schedule.loads
    worth, unlimited = _worth(schedule)
    rows = [["expert", "load", "bounds", "price", "binding"]]
    for j in range(problem.n_experts):
        price = "-" if schedule.prices is None else f"{schedule.prices[j] + 0.0:.6g}"
        place, release = worth(j)
        binding = []
        if loads[j] == problem.load_max[j]:
            binding.append(_joined("full", place))
        if loads[j] == problem.load_min[j] > 0:
            binding.append(_joined("at its least", release))
        bounds = f"{problem.load_min[j]}..{problem.load_max[j]}"
        rows.append([str(problem.expert_name(j)), str(loads[j]), bounds, price, "; ".join(binding)])
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[k].rjust(widths[k]) for k in (1, 2, 3)), row[4]]).rstrip()
        for row in rows
    ]
    assert schedule.pairs is not None
    for number, resource in enumerate(problem.budgets):
        lines.append(_resource_line(problem, schedule.pairs, resource) + unlimited(number))
    return "\n".join([repr(schedule), *lines])


def _joined(what: str, worth: str) -> str:
    return f"{what}, {worth}" if worth else what


def _worth(schedule: Schedule) -> tuple[Callable[[int], tuple[str, str]], Callable[[int], str]]:
    """Return what says what wider bounds are worth.

    Of an expert one more place, and one client less that it must get; of a resource no limit.
    """
    if schedule.problem.budgets and not schedule.violations:
        explainer = schedule._budget_explainer
        return explainer.place_words, explainer.resource_words
    if schedule.problem.budgets or schedule.status is not Status.OPTIMAL:
        return lambda expert: ("", ""), lambda resource: ""
    worth = schedule._explainer.sensitivity()
    return lambda expert: (
        f"one more place is worth {worth.load_max[expert]:.6g}",
        f"one less is worth {worth.load_min[expert]:.6g}",
    ), lambda resource: ""


def _resource_line(problem: AssignmentProblem, pairs: Assignment, resource: ResourceBudget) -> str:
    """Say how much of a resource is used, and how many clients it keeps from an expert."""
    used, limited = resource.used(pairs), np.isfinite(resource.budget)
    total = float(resource.budget[limited].sum())
    share = f"{used[limited].sum() / total:.1%} of {total:.6g} used" if total > 0 else "nobody has any, or a limit"
    kept = 0
    room = None if problem.layers is None else LayerRoom(problem, pairs.mask())
    for block in problem.blocks():
        clients = np.arange(block.start, block.stop)
        left = (resource.allowed - used)[block, None]
        could = np.ones((len(clients), problem.n_experts), dtype=np.bool_)
        could[pairs.pairs_of(block)] = False
        could &= (pairs.counts < problem.capacity)[block, None] & (resource.sizes_of(block) > left)
        if problem.eligible is not None:
            could &= problem.eligible[block]
        if room is not None:
            could &= room.changes(block)[0]
        kept += int(could.any(axis=1).sum())
    missed = f"for {kept} of {problem.n_clients} clients an expert does not fit that they have a slot for"
    return f"{resource.name}: {share}; {missed}"
