"""Shrink a conflict until every bound in it is needed.

A deletion filter (Chinneck, *Feasibility and Infeasibility in Optimization*, 2008, section 6.2.1): bounds are left
out in turn, and stay out where the others still exclude one another. What is needed beside more bounds is needed
beside fewer, so that one pass is enough. Clients that are alike are left out together: how many of a group are
needed is found by bisection.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched._dealing import Groups, deal, group_clients, rank_in_group
from fedmoe_sched.feasibility import overflowing, starving
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import Conflict

__all__ = ["minimal_conflict"]


def minimal_conflict(problem: AssignmentProblem, conflict: Conflict, *, seconds: float = 2.0) -> Conflict:
    """Leave out of a conflict the clients and experts without which it is one all the same.

    Parameters
    ----------
    problem : AssignmentProblem
    conflict : Conflict
        As `fedmoe_sched.feasibility.find_conflict` returns it.
    seconds : float, default 2
        After this time what is left is returned, and the message says that it may not be minimal.

    Returns
    -------
    Conflict
        Where experts starve, no ``load_min`` of the named experts can be left out; `clients` are all that could
        train one of them. Where clients overflow, neither the ``min_experts`` of any named client nor the
        ``load_max`` of any named expert can. Conflicts of budgets, and of problems with layers, are returned as
        they are.
    """
    if problem.layers is not None:
        return conflict
    relaxed = network_relaxation(problem)
    clients, experts = (np.array(part, dtype=np.int64) for part in (conflict.clients, conflict.experts))
    deadline = time.perf_counter() + seconds
    if conflict.kind == "experts starve":
        kept, done = _needed_experts(relaxed, experts, deadline)
        return _told(starving(relaxed, kept), done=done)
    if conflict.kind != "clients overflow":
        return conflict
    crowded = clients[problem.min_experts[clients] > problem.slots[clients]]
    if len(crowded):
        return overflowing(problem, crowded[:1], np.zeros(0, dtype=np.int64))
    crowded = clients[relaxed.min_experts[clients] > relaxed.eligible_counts[clients]]
    if len(crowded) or not len(experts):
        return conflict  # too little fits the budgets, each client's own
    kept_clients, kept, done = _needed_clients(relaxed, clients, experts, deadline)
    return _told(overflowing(relaxed, kept_clients, kept), done=done)


def _told(conflict: Conflict, *, done: bool) -> Conflict:
    if done:
        return conflict
    return dataclasses.replace(conflict, message=f"{conflict.message} (perhaps fewer exclude one another too)")


def _needed_experts(problem: AssignmentProblem, experts: IntArray, deadline: float) -> tuple[IntArray, bool]:
    """Leave out experts whose ``load_min`` is not needed; all other bounds but capacities are left out."""
    groups = group_clients(problem)
    free = Groups(groups.member, groups.size, np.zeros_like(groups.least), groups.most, groups.open)
    no_limit = np.full(problem.n_experts, problem.n_clients)
    if (problem.load_min[experts] > problem.n_clients).any():
        return experts[problem.load_min[experts] > problem.n_clients][:1], True
    kept = np.zeros(problem.n_experts, dtype=np.bool_)
    kept[experts] = True
    for expert in experts:
        if time.perf_counter() > deadline:
            return np.flatnonzero(kept), False
        kept[expert] = False
        kept[expert] = deal(free, np.where(kept, problem.load_min, 0), no_limit) is None
    return np.flatnonzero(kept), True


def _needed_clients(
    problem: AssignmentProblem, clients: IntArray, experts: IntArray, deadline: float
) -> tuple[IntArray, IntArray, bool]:
    """Leave out clients whose ``min_experts`` is not needed, and experts whose ``load_max`` is not."""
    groups = group_clients(problem)
    size = np.bincount(groups.member[clients], minlength=len(groups.size))
    full = np.minimum(problem.load_max, problem.n_clients)
    kept = np.zeros(problem.n_experts, dtype=np.bool_)
    kept[experts] = True

    def clash() -> bool:
        present = np.flatnonzero(size)
        some = Groups(
            groups.member, size[present], groups.least[present], groups.least[present], groups.open[present]
        )
        return (
            bool(len(present))
            and deal(some, np.zeros_like(full), np.where(kept, full, problem.n_clients)) is not None
        )

    whole, present = size.copy(), np.flatnonzero(size)
    few, many = 0, len(present)  # where no two clients are alike, there is no time to leave them out one by one
    while many - few > 1 and time.perf_counter() <= deadline:
        size[:] = whole
        size[present[(few + many) // 2 :]] = 0
        few, many = (few, (few + many) // 2) if clash() else ((few + many) // 2, many)
    size[:] = whole
    size[present[many:]] = 0
    for expert in experts:
        if time.perf_counter() > deadline:
            break
        kept[expert] = False
        kept[expert] = not clash()
    for group in np.flatnonzero(size):
        if time.perf_counter() > deadline:
            break
        few, many = -1, int(size[group])  # clash at `many`, none at `few`
        while many - few > 1:
            size[group] = (few + many) // 2
            few, many = (few, int(size[group])) if clash() else (int(size[group]), many)
        size[group] = many
    rank = rank_in_group(groups.member[clients])
    return clients[rank < size[groups.member[clients]]], np.flatnonzero(kept), time.perf_counter() <= deadline
