"""Can the bounds be met at all? If not: which ones exclude one another, and the least widening that helps.

Feasibility with lower bounds is a maximum flow (Ahuja, Magnanti and Orlin, *Network Flows*, section 6.7); a cut
that is too small names the conflict (Hoffman's circulation theorem). Clients with the same bounds and the same
eligible experts are interchangeable: a group's places at an expert can always be dealt out to its members in turn,
which gives each of them within one of the group's mean. A million clients that may train everything make a network
of a handful of nodes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._budgets import fitting_counts, network_relaxation
from fedmoe_sched._dealing import Groups, deal, deal_loads, group_clients
from fedmoe_sched._layer_cuts import layered_cut, overstretched_clients
from fedmoe_sched._layer_dealing import even_layer_loads, group_layered_clients
from fedmoe_sched._wording import ints as _ints
from fedmoe_sched._wording import listed as _names
from fedmoe_sched._wording import them as _them
from fedmoe_sched._wording import verb as _verb
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import Conflict, Relaxation

__all__ = ["budget_conflict", "find_conflict", "overflowing", "starving", "widen_load_bounds"]


def find_conflict(problem: AssignmentProblem) -> Conflict | None:
    """Name the bounds that exclude one another.

    Parameters
    ----------
    problem : AssignmentProblem

    Returns
    -------
    Conflict or None
        None: some assignment satisfies every constraint. With budgets it is only the network around them that was
        looked at: pairs that do not fit alone are not eligible, and no client takes more experts than could fit.
    """
    if problem.budgets:
        relaxed = network_relaxation(problem)
        return _unaffordable(problem, relaxed) or _find_cut(relaxed)
    return _find_cut(problem)


def budget_conflict(problem: AssignmentProblem, backend: str) -> Conflict:
    """Say that a backend's search found no assignment where no cut of the network explains it."""
    names = " and ".join(resource.name for resource in problem.budgets)
    message = f"no assignment keeps all bounds and the budgets of {names}: {backend} searched, no cut shows it"
    return Conflict("budgets", (), (), 0, 0, message)


def _unaffordable(problem: AssignmentProblem, relaxed: AssignmentProblem) -> Conflict | None:
    """Name the clients whose budgets do not reach for ``min_experts``, not even of the smallest experts."""
    assert relaxed.eligible is not None
    _, at_most = fitting_counts(problem, relaxed.eligible)
    short = np.flatnonzero((problem.demands > at_most) & (problem.demands <= problem.slots))
    if not len(short):
        return None
    required, available = int(problem.demands[short].sum()), int(at_most[short].sum())
    resources = " and ".join(resource.name for resource in problem.budgets)
    message = (
        f"{_names('client', problem.client_labels, short)} must take {required} places "
        f"({'min_experts' if problem.layers is None else 'min_experts, layer_min'}), "
        f"only {available} fit the budgets of {resources}"
    )
    return Conflict("clients overflow", _ints(short), (), required, available, message)


def _find_cut(problem: AssignmentProblem) -> Conflict | None:
    crossed = problem.load_min > problem.n_clients
    if crossed.any():
        return starving(problem, np.flatnonzero(crossed)[:1])
    crowded = problem.overstretched
    if crowded.any():
        return overflowing(problem, np.flatnonzero(crowded), np.zeros(0, dtype=np.int64))
    if _spread_is_feasible(problem):
        return None
    groups = _groups(problem)
    cut = deal(groups, problem.load_min, np.minimum(problem.load_max, problem.n_clients))
    if cut is None:
        return None
    if cut.overfull:
        return overflowing(problem, np.flatnonzero(cut.groups[groups.member]), cut.experts)
    return starving(problem, cut.experts)


def _groups(problem: AssignmentProblem) -> Groups:
    return group_clients(problem) if problem.layers is None else group_layered_clients(problem)


def _open_pairs(problem: AssignmentProblem, experts: IntArray) -> IntArray:
    """Count each client's eligible experts among those listed."""
    counts = np.full(problem.n_clients, len(experts), dtype=np.int64)
    if problem.eligible is not None:
        for block in problem.blocks():
            np.sum(problem.eligible[block][:, experts], axis=1, dtype=np.int64, out=counts[block])
    return counts


def starving(problem: AssignmentProblem, wanted: IntArray) -> Conflict:
    """Experts whose load_min cannot be met, and the clients that may train them at all."""
    if problem.layers is not None:
        return layered_cut(problem, wanted, overfull=False)
    reach = _open_pairs(problem, wanted)
    available = int(np.minimum(reach, problem.slots).sum())
    required = int(problem.load_min[wanted].sum())
    able = np.flatnonzero((reach > 0) & (problem.slots > 0))
    message = (
        f"{_names('expert', problem.expert_labels, wanted)} {_verb(wanted, 'need')} {required} clients "
        f"(load_min), only {available} eligible slots reach {_them(wanted)}"
    )
    return Conflict("experts starve", _ints(able), _ints(wanted), required, available, message)


def overflowing(problem: AssignmentProblem, clients: IntArray, experts: IntArray) -> Conflict:
    """Clients whose min_experts exceed the places open to them; `experts` are those that are full."""
    if problem.layers is not None:
        return layered_cut(problem, experts, overfull=True) if len(experts) else overstretched_clients(problem)
    outside = np.setdiff1d(np.arange(problem.n_experts), experts)
    required = int(problem.min_experts[clients].sum())
    full = int(np.minimum(problem.load_max[experts], problem.n_clients).sum())
    available = full + int(_open_pairs(problem, outside)[clients].sum())
    message = (
        f"{_names('client', problem.client_labels, clients)} must take {required} places (min_experts), "
        f"only {available} are open to {_them(clients)}"
    )
    if len(experts):
        message += f" ({_names('expert', problem.expert_labels, experts)}: load_max {full} together)"
    return Conflict("clients overflow", _ints(clients), _ints(experts), required, available, message)


def _spread_is_feasible(problem: AssignmentProblem) -> bool:
    """Whether clients that spread themselves evenly over their eligible experts meet all bounds.

    Such a fractional point proves feasibility, because the polytope is integral; no flow is needed then.
    """
    if problem.overstretched.any():
        return False
    base, extra = _even_loads(problem) if problem.layers is None else even_layer_loads(problem)
    rounding = 1e-9 * (1 + base + extra)
    low, high = problem.load_min + rounding - base, problem.load_max - rounding - base
    # Clients take their fewest experts plus the same share t in [0, 1] of what more they could take.
    with np.errstate(divide="ignore", invalid="ignore"):
        at_least = np.where(extra > 0, low / extra, np.where(low <= 0, 0.0, np.inf))
        at_most = np.where(extra > 0, high / extra, np.where(high >= 0, 1.0, -np.inf))
    return max(0.0, float(at_least.max())) <= min(1.0, float(at_most.min()))


def _even_loads(problem: AssignmentProblem) -> npt.NDArray[np.float64]:
    """Spread every client's fewest places, and what more it could take, evenly over its eligible experts.

    Returns
    -------
    loads : ndarray, shape (2, m), float64
    """
    loads = np.zeros((2, problem.n_experts))
    if problem.eligible is None:
        total = int(problem.min_experts.sum())
        loads += np.array([[total], [int(problem.slots.sum()) - total]]) / problem.n_experts
        return loads
    for block in problem.blocks():
        open_ = problem.eligible[block].astype(np.float64)
        least = problem.min_experts[block]
        places = np.stack([least, problem.slots[block] - least])
        loads += (places / np.maximum(open_.sum(axis=1), 1)) @ open_
    return loads


def widen_load_bounds(
    problem: AssignmentProblem, hard: tuple[IntArray, IntArray]
) -> tuple[AssignmentProblem, tuple[Relaxation, ...]]:
    """Widen load bounds by the fewest places in total, spread evenly, so that an assignment exists.

    Parameters
    ----------
    problem : AssignmentProblem
        With the bounds that are wished for.
    hard : (ndarray, ndarray), each of shape (m,), int64
        ``load_min`` and ``load_max`` at their widest: no bound is moved past these.

    Returns
    -------
    problem : AssignmentProblem
        With the widened bounds; the same object if nothing had to be widened; with the `hard` bounds if not even
        these can be met.
    relaxed : tuple of Relaxation
        What was widened.
    """
    if _spread_is_feasible(problem):
        return problem, ()
    loads = _least_violating_loads(problem, *hard)
    if loads is None:
        return problem.replace(load_min=hard[0], load_max=hard[1]), ()
    load_min = np.minimum(problem.load_min, loads)
    load_max = np.maximum(problem.load_max, loads)
    relaxed = tuple(
        Relaxation(int(j), name, int(asked[j]), int(used[j]))
        for name, asked, used in (
            ("load_min", problem.load_min, load_min),
            ("load_max", problem.load_max, load_max),
        )
        for j in np.flatnonzero(asked != used)
    )
    return (problem.replace(load_min=load_min, load_max=load_max), relaxed) if relaxed else (problem, ())


def _least_violating_loads(problem: AssignmentProblem, hard_min: IntArray, hard_max: IntArray) -> IntArray | None:
    """Return loads with the least total violation; None if the hard bounds cannot be met."""
    if problem.overstretched.any():
        return None
    # No expert gets more than n clients; any more stands for "no limit".
    n = problem.n_clients
    soft = problem.load_min, np.minimum(problem.load_max, n)
    return deal_loads(_groups(problem), soft, (hard_min, np.minimum(hard_max, n)))
