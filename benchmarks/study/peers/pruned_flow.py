"""The strongest baseline off the shelf: arcs pruned by approximate prices, flow on the rest, proof over all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched import AssignmentProblem, Limits, Solver, StopReason
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import certify, dual_bound
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability
from fedmoe_sched.solvers.flow_ortools import OrToolsFlow

__all__ = ["PrunedFlow"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    answer: Answer | None = None


class PrunedFlow(Solver[_Model]):
    """What a careful user would build around OR-Tools' min-cost flow.

    1. Solve a random eighth of the clients, with load bounds scaled down, in this same way, and take its prices.
       The smallest sample is solved as it is.
    2. Under these prices most clients' best choice is clear: every other is worse by more than some margin. They
       get it. The others keep only the arcs within the margin. It is chosen so that they are six times as many as
       the places by which the loads are off, and some more, but at most 30 % of the clients.
    3. Min-cost flow on what remains, and its prices.
    4. The dual bound of these prices over *all* arcs. Where it does not prove the optimum, widen the margin to 60
       and 90 % of the clients, around the prices of the best bound so far, and repeat; in the end prune nothing.

    Parameters
    ----------
    smallest : int, default 1,000
        Clients of the smallest sample. Problems below twice as many are not pruned.
    """

    name: ClassVar[str] = "flow-pruned"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {Capability.PRICES}
    requires: ClassVar[tuple[str, ...]] = ("ortools",)
    summary: ClassVar[str] = "min-cost flow (OR-Tools) on arcs pruned by prices of a sample, proved over all arcs"

    def __init__(self, smallest: int = 1000) -> None:
        self.smallest = smallest

    def build(self, problem: AssignmentProblem, limits: Limits, prices: Floats | None) -> _Model:
        """Do nothing: which arcs there are is found out while solving."""
        return _Model(problem)

    def run(self, model: _Model, limits: Limits) -> None:
        """Prune, solve, prove; widen until proved."""
        rng = np.random.default_rng(limits.seed)
        model.answer = _pruned_flow(model.problem, self.smallest, limits, rng, proved=True)

    def read(self, model: _Model) -> Answer:
        """Hand over the proved answer."""
        return model.answer or Answer(StopReason.FAILED)


def _pruned_flow(
    problem: AssignmentProblem, smallest: int, limits: Limits, rng: np.random.Generator, *, proved: bool
) -> Answer:
    """Solve a problem by way of a sample of it; without a proof the first feasible answer will do."""
    n, m = problem.shape
    if n < 2 * smallest or (problem.min_experts > problem.slots).any():
        return _flow(problem, limits)
    part = _sampled(problem, max(smallest, n // 8), rng)
    prices = _pruned_flow(part, smallest, limits, rng, proved=False).prices
    if prices is None:
        return _flow(problem, limits)
    bound = dual_bound(problem, prices) if proved else np.inf
    choices = _best_choices(problem, prices)
    share = (6 * _places_off(problem, choices) + 32 * m) / n
    for part_undecided in (min(share, 0.3), 0.6, 0.9):
        answer = _flow_on_undecided(problem, prices, choices, part_undecided, limits)
        if answer is None or answer.assignment is None or answer.prices is None:
            continue
        certificate = certify(problem, answer.assignment, answer.prices)
        if not proved or certificate.optimal:
            return answer
        if certificate.bound is not None and certificate.bound < bound:
            bound, prices = certificate.bound, answer.prices
            choices = _best_choices(problem, prices)
    return _flow(problem, limits)


def _flow(problem: AssignmentProblem, limits: Limits) -> Answer:
    engine = OrToolsFlow()
    flow = engine.build(problem, limits, None)
    engine.run(flow, limits)
    return engine.read(flow)


def _sampled(problem: AssignmentProblem, size: int, rng: np.random.Generator) -> AssignmentProblem:
    """Return the problem of a random sample of the clients, with load bounds in proportion."""
    n = problem.n_clients
    rows = np.sort(rng.choice(n, size, replace=False))
    load_max = np.minimum(problem.load_max, n)
    return problem.restrict(
        rows,
        load_min=np.floor(problem.load_min * (size / n)).astype(np.int64),
        load_max=np.ceil(load_max * (size / n)).astype(np.int64),
    )


def _places_off(problem: AssignmentProblem, choices: _Choices) -> int:
    """Return by how many places the loads of the best choices are outside the bounds."""
    loads = np.bincount(choices.best[choices.taken], minlength=problem.n_experts)
    return int(abs(loads - np.clip(loads, problem.load_min, problem.load_max)).sum())


def _flow_on_undecided(
    problem: AssignmentProblem, prices: Floats, choices: _Choices, share: float, limits: Limits
) -> Answer | None:
    """Fix what the prices make clear, solve for the rest; None where that leaves no feasible rest."""
    slack = choices.slack
    margin = np.partition(slack, int(share * len(slack)))[int(share * len(slack))]
    undecided = np.flatnonzero(slack <= margin)
    sure, possible = _classify(problem, undecided, prices, margin)
    chosen = choices.taken & (slack > margin)[:, None]
    some, others = np.nonzero(sure)
    fixed_clients = np.concatenate([np.nonzero(chosen)[0], undecided[some]])
    fixed_experts = np.concatenate([choices.best[chosen], others])
    loads = np.bincount(fixed_experts, minlength=problem.n_experts)
    if (loads > problem.load_max).any():
        return None
    taken = sure.sum(axis=1)
    rest = problem.restrict(
        undecided,
        capacity=problem.slots[undecided] - taken,
        min_experts=np.maximum(problem.min_experts[undecided] - taken, 0),
        load_min=np.maximum(problem.load_min - loads, 0),
        load_max=problem.load_max - loads,
        eligible=possible,
    )
    answer = _flow(rest, limits)
    if answer.assignment is None:
        return None
    clients = np.concatenate([fixed_clients, undecided[answer.assignment.clients]])
    experts = np.concatenate([fixed_experts, answer.assignment.indices])
    return Answer(StopReason.COMPLETED, Assignment.from_pairs(clients, experts, problem.shape), answer.prices)


def _reduced(problem: AssignmentProblem, rows: slice | Ints, prices: Floats) -> npt.NDArray[np.floating]:
    """Return scores less prices, -inf where not eligible; in the precision of the scores, enough for pruning."""
    scores = problem.desirability[rows] - prices.astype(problem.desirability.dtype)
    if problem.eligible is not None:
        scores[~problem.eligible[rows]] = -np.inf
    return scores


@dataclass(frozen=True, eq=False)
class _Choices:
    """Each client's best choice under some prices.

    Parameters
    ----------
    best : ndarray, shape (n, k), int16
        The k experts of largest score less price, in descending order; k is the largest capacity.
    taken : ndarray, shape (n, k), bool
        Those of them that the client takes.
    slack : ndarray, shape (n,), float32
        The least change of a difference of two reduced scores, or of one from 0, that changes the choice.
    """

    best: npt.NDArray[np.int16]
    taken: npt.NDArray[np.bool_]
    slack: npt.NDArray[np.float32]


def _best_choices(problem: AssignmentProblem, prices: Floats) -> _Choices:
    """Let every client choose, in one pass over the scores."""
    n, m = problem.shape
    width = min(m, max(1, int(problem.slots.max())))
    best, count = np.empty((n, width), dtype=np.int16), np.empty(n, dtype=np.int64)
    slack = np.empty(n, dtype=np.float32)
    for block in problem.blocks():
        reduced = _reduced(problem, block, prices)
        top = np.argpartition(-reduced, min(width, m - 1), axis=1)[:, : width + 1]
        values = np.take_along_axis(reduced, top, axis=1)
        order = np.argsort(-values, axis=1)
        top, values = np.take_along_axis(top, order, axis=1), np.take_along_axis(values, order, axis=1)
        best[block] = top[:, :width]
        count[block], slack[block] = _choice(values, problem.min_experts[block], problem.slots[block])
    return _Choices(best, np.arange(width) < count[:, None], slack)


def _choice(values: npt.NDArray[np.floating], least: Ints, most: Ints) -> tuple[Ints, Floats]:
    """Return how many of the descending values each row takes, and the slack of that choice."""
    size = len(values)
    # Value number r, from 1 on, is in column r.
    padded = np.hstack([np.full((size, 1), np.inf), values, np.full((size, 1), -np.inf)])
    count = np.clip((values > 0).sum(axis=1), least, most)
    rows = np.arange(size)
    last, next_ = padded[rows, count], padded[rows, count + 1]
    swap = last - next_
    drop = np.where(count > least, last, np.inf)
    add = np.where(count < most, -next_, np.inf)
    return count, np.minimum(np.minimum(swap, drop), add)


def _classify(
    problem: AssignmentProblem, rows: Ints, prices: Floats, margin: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Part the arcs of some clients into those surely taken, and those that may be; shapes (rows, m)."""
    reduced = _reduced(problem, rows, prices)
    ranked = -np.sort(-reduced, axis=1)
    ranked = np.hstack([np.full((len(rows), 1), np.inf), ranked, np.full((len(rows), 1), -np.inf)])
    at = np.arange(len(rows))
    least, most = problem.min_experts[rows], problem.slots[rows]
    last, beyond = ranked[at, most][:, None], ranked[at, most + 1][:, None]
    forced, optional = ranked[at, least][:, None], ranked[at, least + 1][:, None]
    # With -inf for what is not eligible, some differences are of two infinities: no number, and False below.
    with np.errstate(invalid="ignore"):
        sure = (reduced - beyond > margin) & ((reduced > margin) | (reduced - optional > margin))
        never = (last - reduced > margin) | ((reduced < -margin) & (forced - reduced > margin))
    possible = ~sure & ~never & np.isfinite(reduced)
    return sure, possible
