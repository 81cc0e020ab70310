"""Shrink a conflict until every bound in it is needed.

A deletion filter (Chinneck, *Feasibility and Infeasibility in Optimization*, 2008, section 6.1): bounds are left
out in turn, and stay out where the others still exclude one another. What is needed beside more bounds is needed
beside fewer, so that one pass is enough. Clients that are alike are left out together: how many of a group are
needed is found by bisection. With layers and budgets `fedmoe_sched._bound_filter` does it bound by bound; whether
bounds can be met within budgets is asked of a backend.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._bound_filter import Bounds, OutOfTimeError, needed, with_demands
from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched._dealing import Groups, deal, group_clients, rank_in_group
from fedmoe_sched._wording import listed
from fedmoe_sched.feasibility import find_conflict, overflowing, starving
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.registry import get_solver
from fedmoe_sched.result import Bound, Conflict, StopReason
from fedmoe_sched.solver import Limits

__all__ = ["minimal_conflict"]

_MANY = 20  # clients, two per expert: column generation sees sooner than an integer program what is possible
_OF_CLIENTS = ("min_experts", "layer_min")
_NOTHING = np.zeros(0, dtype=np.int64)


def minimal_conflict(problem: AssignmentProblem, conflict: Conflict, *, seconds: float = 2.0) -> Conflict:
    """Leave out of a conflict the clients and experts without which it is one all the same.

    Parameters
    ----------
    problem : AssignmentProblem
    conflict : Conflict
        As `fedmoe_sched.feasibility.find_conflict` and `budget_conflict` return it.
    seconds : float, default 2
        After this time what is left is returned, and the message says that it may not be minimal.

    Returns
    -------
    Conflict
        With `bounds`, none of which can be left out where it is `minimal`. Where experts starve, `clients` are all
        that could train one of them, and those that cannot for bounds of their own. A conflict within budgets that
        is no cut of the network, but what a search says, is of kind ``"budgets"``.
    """
    deadline = time.perf_counter() + seconds
    if problem.layers is None and conflict.kind != "budgets":
        conflict = _minimal_cut(problem, conflict, deadline)
        if not problem.budgets:
            return conflict
    bounds = Bounds(problem)

    def clash(kept: IntArray) -> bool:
        return _excludes(with_demands(bounds.only(kept)), deadline)

    # Whole kinds of bounds go first.
    kept, _ = needed(bounds.blocks(_candidates(problem, bounds, conflict)), clash, deadline)
    kept, done = needed(np.split(kept, len(kept)), clash, deadline, bounds.twins)
    return _told(_worded(bounds.only(kept), bounds.names(kept)), done=done)


def _candidates(problem: AssignmentProblem, bounds: Bounds, conflict: Conflict) -> IntArray:
    """Return bounds that exclude one another, as a conflict tells them."""
    clients, experts = (np.array(part, dtype=np.int64) for part in (conflict.clients, conflict.experts))
    if conflict.kind == "experts starve":
        others = np.arange(problem.n_clients) if problem.layers is not None else _NOTHING
        return bounds.of(load_min=experts, load_max=_NOTHING, clients=others)
    if conflict.kind == "clients overflow":
        # Without full experts every one of the clients lacks room by itself.
        return bounds.of(load_min=_NOTHING, load_max=experts, clients=clients if len(experts) else clients[:1])
    return bounds.all


def _excludes(problem: AssignmentProblem, deadline: float) -> bool:
    """Whether no assignment keeps all bounds."""
    if find_conflict(problem) is not None:
        return True
    if not problem.budgets:
        return False
    left = deadline - time.perf_counter()
    if left <= 0:
        raise OutOfTimeError
    limits = Limits(time=left)
    anything = problem.replace(desirability=np.zeros(problem.shape, dtype=np.float16), load_penalty=None)
    many = problem.n_clients >= max(_MANY, 2 * problem.n_experts)
    backend, _ = get_solver("lagrangian" if many else "milp-scipy", anything)
    model = backend.build(anything, limits, None)
    backend.run(model, limits)
    answer = backend.read(model)
    if answer.assignment is None and answer.stop_reason is not StopReason.PROVED_INFEASIBLE:
        raise OutOfTimeError
    return answer.assignment is None


def _worded(problem: AssignmentProblem, bounds: tuple[Bound, ...]) -> Conflict:
    """Put bounds into words; `problem` has no others."""
    conflict = find_conflict(problem)
    if conflict is not None:
        # Those that can train none of the experts may be so because of their bounds.
        bound = {one.number for one in bounds if one.kind in _OF_CLIENTS}
        return dataclasses.replace(conflict, clients=tuple(sorted(bound.union(conflict.clients))), bounds=bounds)
    parts = []
    for kind, what, labels in (
        ("min_experts", "client", problem.client_labels),
        ("layer_min", "client", problem.client_labels),
        ("load_min", "expert", problem.expert_labels),
        ("load_max", "expert", problem.expert_labels),
    ):
        numbers = np.unique([bound.number for bound in bounds if bound.kind == kind]).astype(np.int64)
        if len(numbers):
            parts.append(f"{kind} of {listed(what, labels, numbers)}")
    message = (
        f"{', '.join(parts)}: no assignment keeps all of them within the budgets of "
        f"{' and '.join(resource.name for resource in problem.budgets)} (a search says so, no cut shows it)"
    )
    clients, experts = (
        tuple(sorted({bound.number for bound in bounds if bound.kind in kinds}))
        for kinds in (_OF_CLIENTS, ("load_min", "load_max"))
    )
    return Conflict("budgets", clients, experts, 0, 0, message, bounds)


def _minimal_cut(problem: AssignmentProblem, conflict: Conflict, deadline: float) -> Conflict:
    """Shrink a cut of the network of a problem without layers, whatever budgets say besides."""
    relaxed = network_relaxation(problem)
    clients, experts = (np.array(part, dtype=np.int64) for part in (conflict.clients, conflict.experts))
    if conflict.kind == "experts starve":
        kept, done = _needed_experts(relaxed, experts, deadline)
        bounds = tuple(Bound("load_min", j) for j in kept.tolist())
        return _told(dataclasses.replace(starving(relaxed, kept), bounds=bounds), done=done)
    if not len(experts):  # each client lacks room by itself
        kept_clients, kept, done = clients[:1], experts, True
        if problem.budgets:
            return conflict
    else:
        kept_clients, kept, done = _needed_clients(relaxed, clients, experts, deadline)
    bounds = tuple(
        Bound(kind, k)
        for kind, numbers in (("load_max", kept), ("min_experts", kept_clients))
        for k in numbers.tolist()
    )
    return _told(dataclasses.replace(overflowing(relaxed, kept_clients, kept), bounds=bounds), done=done)


def _told(conflict: Conflict, *, done: bool) -> Conflict:
    if done:
        return dataclasses.replace(conflict, minimal=True)
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
