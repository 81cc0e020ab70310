"""Soft mode: widen bounds by the least total weight, so that an assignment exists, and no more than that.

Without budgets the least total is a minimum cost flow (`fedmoe_sched._elastic`), proved by its potentials. All
assignments that need no more are complementary to these potentials, and so those of another network problem: of
these the one of the best objective says which bounds give way. Budgets are what clients have, and never give way:
with them column generation over choices of clients bounds and finds both (`fedmoe_sched._elastic_choices`), or
integer programs do (`fedmoe_sched._elastic_program`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._budget_sensitivity import BudgetWorth
from fedmoe_sched._elastic import least_relaxation
from fedmoe_sched._face import rest_of
from fedmoe_sched._network_explain import Explainer
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import certify as make_certificate
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import Relaxation, Schedule, Status, StopReason
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Limits, Solver

__all__ = ["SECONDS", "WEIGHTS", "Relaxed", "priced", "relax", "solve_soft"]

#: What one place of each kind of bound counts; kinds that are left out are hard.
WEIGHTS: Mapping[str, float] = {"min_experts": 1.0, "layer_min": 1.0, "load_min": 1.0, "load_max": 1.0}
#: How long to look for the least relaxation within budgets.
SECONDS = 20.0
_PROGRAM = 20_000  # pairs of an integer program whose engine still keeps its time limit
_KINDS = ("min_experts", "layer_min", "load_min", "load_max", "capacity", "layer_max")


@dataclass(frozen=True, eq=False)
class Relaxed:
    """A problem whose bounds were widened so that an assignment exists.

    Parameters
    ----------
    problem : AssignmentProblem
        With the widened bounds; the same object if nothing had to be widened, or if no widening helps.
    relaxations : tuple of Relaxation
        What was widened; empty if nothing was.
    total : float
        The weight of what was widened; 0 where nothing had to be, inf where no widening helps.
    bound : float
        No less is enough: what is proved.
    assignment : Assignment or None
        One within the widened bounds; None where none is known.
    """

    problem: AssignmentProblem
    relaxations: tuple[Relaxation, ...]
    total: float
    bound: float
    assignment: Assignment | None = None

    @property
    def proved(self) -> bool:
        """Whether `total` is proved to be the least."""
        return self.bound >= self.total * (1 - 1e-5)  # weights may have been rounded to a millionth


def relax(
    problem: AssignmentProblem, weights: Mapping[str, float] = WEIGHTS, *, seconds: float = SECONDS
) -> Relaxed:
    """Widen bounds by the fewest places in total, so that an assignment exists.

    Parameters
    ----------
    problem : AssignmentProblem
        Budgets and eligibility are never touched.
    weights : mapping of str to float, default 1 for all but ``"capacity"`` and ``"layer_max"``
        What one place counts of ``"min_experts"``, ``"layer_min"``, ``"load_min"`` (lowered), ``"load_max"``,
        ``"capacity"`` and ``"layer_max"`` (raised); > 0. A kind that is not named is never touched. Weights count
        to a millionth of the largest one.
    seconds : float, default 20
        Time limit of the search that budgets need; without budgets there is none.

    Returns
    -------
    Relaxed
        Of all ways to widen by the same total weight, the one that allows the best objective. With budgets, where
        time runs out, the best of either that was found; `Relaxed.proved` says whether the total is the least.

    Raises
    ------
    InputError
        A weight is unknown or not > 0.

    Examples
    --------
    >>> problem = AssignmentProblem([[3.0, 1.0], [2.0, 0.5], [1.0, 1.0]], 1, min_experts=1, load_max=1)
    >>> relaxed = relax(problem, {"min_experts": 1})
    >>> [str(relaxation) for relaxation in relaxed.relaxations]
    ['min_experts[1]: 1 -> 0']
    """
    _refuse_weights(weights)
    if problem.budgets:
        return _relax_within_budgets(problem, weights, seconds)
    if find_conflict(problem) is None:
        return Relaxed(problem, (), 0.0, 0.0)
    least = least_relaxation(problem, weights)
    if least is None:
        return Relaxed(problem, (), math.inf, math.inf)
    best = solve(rest_of(problem, least.face))
    best.loads  # noqa: B018  (raises, with the reason, where there is none)
    assert best.pairs is not None
    assignment = Assignment.from_mask(least.face.forced | best.pairs.mask())
    return _widened(problem, assignment, weights, float(least.bound))


def _relax_within_budgets(problem: AssignmentProblem, weights: Mapping[str, float], seconds: float) -> Relaxed:
    from fedmoe_sched._elastic_choices import relax_by_choices, takes  # which bring SciPy's matrices along
    from fedmoe_sched._elastic_program import BudgetRelaxation, relax_by_program

    def told(found: BudgetRelaxation) -> Relaxed:
        if found.assignment is None:
            return Relaxed(problem, (), math.inf, found.bound)
        return _widened(problem, found.assignment, weights, found.bound)

    if not takes(problem, weights):
        return told(relax_by_program(problem, weights, seconds))
    start = time.perf_counter()
    relaxed = told(relax_by_choices(problem, weights, seconds))
    left = seconds - (time.perf_counter() - start)
    if relaxed.proved or left <= 0 or math.prod(problem.shape) > _PROGRAM:
        return relaxed
    other = told(relax_by_program(problem, weights, left))
    best = min(relaxed, other, key=lambda each: each.total)
    return dataclasses.replace(best, bound=max(relaxed.bound, other.bound))


def _refuse_weights(weights: Mapping[str, float]) -> None:
    for kind, weight in weights.items():
        if kind not in _KINDS:
            msg = f"weights: no bound called {kind!r}; there are {', '.join(_KINDS)}"
            raise InputError(msg)
        if not (weight > 0 and math.isfinite(weight)):
            msg = f"weights[{kind!r}] = {weight}: must be finite and > 0"
            raise InputError(msg)


def _widened(
    problem: AssignmentProblem, assignment: Assignment, weights: Mapping[str, float], bound: float
) -> Relaxed:
    """Widen bounds as far as an assignment needs it."""
    counts, loads = assignment.counts, assignment.loads
    used: dict[str, IntArray] = {
        "min_experts": np.minimum(problem.min_experts, counts),
        "load_min": np.minimum(problem.load_min, loads),
        "load_max": np.maximum(problem.load_max, loads),
        "capacity": np.maximum(problem.capacity, counts),
    }
    asked: dict[str, IntArray] = {kind: getattr(problem, kind) for kind in used}
    layers = problem.layers
    if layers is not None:
        n = problem.n_clients
        asked["layer_min"], asked["layer_max"] = layers.bounds_of(slice(0, n), n)
        within = layers.count_pairs(assignment, slice(0, n))
        used["layer_min"] = np.minimum(asked["layer_min"], within)
        used["layer_max"] = np.maximum(asked["layer_max"], within)
        if any((used[kind] != asked[kind]).any() for kind in ("layer_min", "layer_max")):
            layers = ExpertLayers(layers.layer_of, used["layer_min"], used["layer_max"])
    relaxations = tuple(
        _relaxation(kind, at, int(asked[kind][at]), int(used[kind][at]))
        for kind in _KINDS
        if kind in used
        for at in zip(*(part.tolist() for part in np.nonzero(used[kind] != asked[kind])), strict=True)
    )
    total = sum(weights[one.bound] * abs(one.used - one.asked) for one in relaxations)
    bounds = {kind: part for kind, part in used.items() if not kind.startswith("layer")}
    widened = problem.replace(layers=layers, **bounds) if relaxations else problem
    return Relaxed(widened, relaxations, total, bound, assignment)


def _relaxation(kind: str, at: tuple[int, ...], asked: int, used: int) -> Relaxation:
    if kind.startswith("load"):
        return Relaxation(at[0], kind, asked, used)
    return Relaxation(None, kind, asked, used, client=at[0], layer=at[1] if len(at) > 1 else None)


def solve_soft(
    problem: AssignmentProblem,
    solver: str | Solver[Any] = "auto",
    *,
    limits: Limits | None = None,
    certify: bool = False,
    warm_start: Schedule | npt.ArrayLike | None = None,
) -> Schedule:
    """Solve a problem, with bounds widened by the fewest places where they exclude one another.

    Parameters
    ----------
    problem, solver, limits, certify, warm_start
        See `fedmoe_sched.solve`. With budgets the time limit, or else `SECONDS`, is one for the relaxation too.

    Returns
    -------
    Schedule
        `relaxed` lists what was widened with its price, `relaxed_proved` says whether fewer places would not do.
    """
    limits = limits or Limits()

    def answered(problem: AssignmentProblem, time: float | None = limits.time) -> Schedule:
        within = dataclasses.replace(limits, time=time)
        return solve(problem, solver, limits=within, certify=certify, warm_start=warm_start)

    if problem.budgets and find_conflict(problem) is None:
        # Whether bounds exclude one another is as hard a question as any: without a limit it might take for ever.
        answer = answered(problem, SECONDS if limits.time is None else limits.time)
        if answer.pairs is not None and not answer.violations:
            cut_short = limits.time is None and answer.stop_reason is StopReason.TIME_LIMIT
            return answered(problem) if cut_short else answer
    relaxed = relax(problem, seconds=SECONDS if limits.time is None else limits.time)
    answer = answered(relaxed.problem)
    if answer.pairs is None and relaxed.assignment is not None:
        certificate = make_certificate(relaxed.problem, relaxed.assignment)
        answer = dataclasses.replace(
            answer, status=Status.FEASIBLE, pairs=relaxed.assignment, certificate=certificate, conflict=None
        )
    if not relaxed.relaxations:
        return answer
    return dataclasses.replace(answer, relaxed=priced(answer, relaxed.relaxations), relaxed_proved=relaxed.proved)


def priced(schedule: Schedule, relaxed: tuple[Relaxation, ...]) -> tuple[Relaxation, ...]:
    """Add to each relaxation by how much the objective would rise if the bound gave way by one more place.

    Parameters
    ----------
    schedule : Schedule
        Of the relaxed problem; where it is not optimal there are no prices. With budgets there are only those that
        are known exactly, because the bounds of `fedmoe_sched.explain.BudgetSensitivity` meet.
    relaxed : tuple of Relaxation
    """
    if not relaxed or schedule.status is not Status.OPTIMAL:
        return relaxed
    if schedule.problem.budgets:
        return _priced_within_budgets(schedule, relaxed)
    assert schedule.pairs is not None
    explainer = Explainer(schedule.problem, schedule.pairs)
    worth = explainer.sensitivity()

    def price(one: Relaxation) -> float:
        if one.client is not None and one.layer is not None:
            return explainer.layer_worth(one.client, one.layer, one.bound)
        return float(getattr(worth, one.bound)[one.expert if one.client is None else one.client])

    return tuple(dataclasses.replace(one, price=price(one)) for one in relaxed)


def _priced_within_budgets(schedule: Schedule, relaxed: tuple[Relaxation, ...]) -> tuple[Relaxation, ...]:
    worth = BudgetWorth(schedule)
    of_layer = functools.cache(worth.of_layer)
    known = {"load_max": "places", "load_min": "releases", "capacity": "slots", "min_experts": "fewer"}

    def price(one: Relaxation) -> float | None:
        at = one.expert if one.client is None else one.client
        both = getattr(worth, known[one.bound]) if one.layer is None else of_layer(one.layer, one.bound)
        most, least = (float(side[at]) for side in both)
        return least if most == least else None

    return tuple(dataclasses.replace(one, price=price(one)) for one in relaxed)
