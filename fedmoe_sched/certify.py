"""Objective, feasibility, dual bound and gap of an assignment, recomputed from the raw problem.

No backend is trusted here and none is imported: what a schedule says of itself comes from this module.
The bound is weak Lagrangian duality over the expert load constraints (Bertsekas, *Nonlinear Programming*,
section 6.1; for transport problems Ahuja, Magnanti and Orlin, *Network Flows*, section 9.4, and for convex costs
chapter 14). With resource budgets the best choice of a client is a knapsack, see `fedmoe_sched.knapsack_bound`;
with layers alone it is greedy within nested bounds, see `fedmoe_sched.layer_bound`.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray, as_vector, row_blocks
from fedmoe_sched._layers import layer_bounds, layers_of
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.knapsack_bound import ChoiceBounds, Knapsacks, budgeted_responses
from fedmoe_sched.layer_bound import beyond_layers, layered_choice
from fedmoe_sched.problem import AssignmentProblem

__all__ = [
    "OPTIMALITY_GAP",
    "Certificate",
    "Violation",
    "certify",
    "choice_bounds",
    "client_bounds",
    "dual_bound",
    "is_whole",
    "load_terms",
    "objective",
    "relative_gap",
    "responses_bound",
    "rounded_down",
    "violations",
]

#: A relative gap up to this counts as optimal: what float64 sums over a million clients can resolve.
OPTIMALITY_GAP = 1e-9

_LARGEST_WHOLE = 2.0**31


@dataclass(frozen=True)
class Violation:
    """One broken constraint.

    Parameters
    ----------
    constraint : str
        ``"capacity"``, ``"min_experts"``, ``"layer_min"``, ``"layer_max"``, ``"load_min"``, ``"load_max"``,
        ``"eligible"`` or ``"budget"``.
    position : tuple of int
        (client,), (expert,), (client, expert) or (client, layer) number.
    value, limit : int, or float for a budget
        What the assignment has there, and what the problem allows.
    resource : str, default ""
        Of a budget: its name.
    """

    constraint: str
    position: tuple[int, ...]
    value: float
    limit: float
    resource: str = ""

    def __str__(self) -> str:
        where = ", ".join(str(i) for i in self.position)
        if self.resource:
            return f"{self.value:.12g} exceeds the {self.resource} budget[{where}] = {self.limit:.12g}"
        if self.constraint == "eligible":
            return f"pair ({where}) is assigned but not eligible"
        side = "exceeds" if self.value > self.limit else "is below"
        return f"{self.value} {side} {self.constraint}[{where}] = {self.limit}"


@dataclass(frozen=True)
class Certificate:
    """What can be proved of an assignment, independently of the backend that made it.

    Parameters
    ----------
    objective : float
        ``sum_ij d_ij x_ij - sum_j phi_j(load_j)``.
    violations : tuple of Violation
        Broken constraints; empty for a feasible assignment.
    bound : float or None
        No feasible assignment has a larger objective; None without prices.
    gap : float or None
        ``(bound - objective) / max(1, abs(objective))``; None without prices, and for an assignment that breaks
        constraints, which the bound does not bound.
    """

    objective: float
    violations: tuple[Violation, ...]
    bound: float | None
    gap: float | None

    @property
    def feasible(self) -> bool:
        """Whether every constraint holds."""
        return not self.violations

    @property
    def optimal(self) -> bool:
        """Whether feasibility and a gap of at most `OPTIMALITY_GAP` are both proved."""
        return self.feasible and self.gap is not None and self.gap <= OPTIMALITY_GAP


def _sum_over_blocks(problem: AssignmentProblem, term: Callable[[slice], float]) -> float:
    """Sum a term of some clients each, computed by as many threads as this process may have processors.

    The blocks do not depend on the number of threads and the sum is correctly rounded, so neither does the result.
    """

    def of_block(block: slice) -> float:
        value = term(block)
        problem.release(block)
        return value

    blocks = list(row_blocks(problem.shape))
    threads = min(len(blocks), _processors())
    if threads == 1:
        return math.fsum(map(of_block, blocks))
    with ThreadPoolExecutor(threads) as pool:
        return math.fsum(pool.map(of_block, blocks))


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def objective(problem: AssignmentProblem, assignment: Assignment) -> float:
    """Sum the desirability of the chosen pairs, less the penalty of the loads, in float64."""

    def of_block(block: slice) -> float:
        chosen = problem.desirability[block][assignment.pairs_of(block)]
        return float(chosen.sum(dtype=np.float64))

    value = _sum_over_blocks(problem, of_block)
    if problem.load_penalty is None:
        return value
    return value - float(problem.load_penalty.total(assignment.loads).sum())


def _outside(name: str, values: IntArray, limits: IntArray, *, upper: bool, first: int = 0) -> Iterator[Violation]:
    bad = values > limits if upper else values < limits
    for at in np.flatnonzero(bad).tolist():
        yield Violation(name, (first + at,), int(values[at]), int(limits[at]))


def violations(problem: AssignmentProblem, assignment: Assignment) -> tuple[Violation, ...]:
    """List every broken constraint of `problem` in `assignment`."""
    above: list[Violation] = []
    below: list[Violation] = []
    barred: list[Violation] = []
    for block in problem.blocks():
        first = block.start
        counts = np.diff(assignment.indptr[first : block.stop + 1])
        above += _outside("capacity", counts, problem.capacity[block], upper=True, first=first)
        below += _outside("min_experts", counts, problem.min_experts[block], upper=False, first=first)
        if problem.layers is not None:
            above += _outside_layers("layer_max", problem, assignment, block)
            below += _outside_layers("layer_min", problem, assignment, block)
        if problem.eligible is not None:
            rows, experts = assignment.pairs_of(block)
            at = np.flatnonzero(~problem.eligible[block][rows, experts])
            pairs = zip((first + rows[at]).tolist(), experts[at].tolist(), strict=True)
            barred += [Violation("eligible", pair, 1, 0) for pair in pairs]
    return (
        *above,
        *below,
        *_outside("load_max", assignment.loads, problem.load_max, upper=True),
        *_outside("load_min", assignment.loads, problem.load_min, upper=False),
        *barred,
        *_over_budget(problem, assignment),
    )


def _outside_layers(
    name: str, problem: AssignmentProblem, assignment: Assignment, block: slice
) -> Iterator[Violation]:
    broken = beyond_layers(problem, assignment, block, upper=name == "layer_max")
    return (Violation(name, (client, layer), count, bound) for client, layer, count, bound in broken)


def _over_budget(problem: AssignmentProblem, assignment: Assignment) -> Iterator[Violation]:
    for resource in problem.budgets:
        used = resource.used(assignment)
        for i in np.flatnonzero(used > resource.allowed).tolist():
            yield Violation("budget", (i,), float(used[i]), float(resource.budget[i]), resource.name)


def _reduce(problem: AssignmentProblem, block: slice, prices: FloatArray, reduced: FloatArray) -> None:
    """Write desirability less prices into `reduced`, in float64; -inf where not eligible."""
    scores = problem.desirability[block]
    if scores.dtype == np.float16:  # exact, and several times faster than NumPy's way from 16 to 64 bits
        scores = scores.astype(np.float32)
    np.subtract(scores, prices, out=reduced)
    if problem.eligible is not None:
        # 1 - 1 / eligible is 0 or -inf: several times faster than writing through a mask.
        barrier = problem.eligible[block].astype(np.float64)
        with np.errstate(divide="ignore"):
            np.divide(-1.0, barrier, out=barrier)
        barrier += 1.0
        reduced += barrier


def _best_responses(reduced: FloatArray, least: IntArray, most: IntArray) -> float:
    """Sum each row's best choice: its `least` largest, then positive ones up to `most`; the rows get reordered."""
    width = int(most.max(initial=0))
    if width == 0:
        return 0.0
    m = reduced.shape[1]
    if width < m:
        reduced.partition(m - width, axis=1)
        reduced = reduced[:, m - width :].copy()
    reduced.sort(axis=1)
    # One row per rank: NumPy is fast along long rows only.
    ranked = np.ascontiguousarray(reduced[:, ::-1].T)
    rank = np.arange(width)[:, None]
    taken = (ranked > 0) & (rank < most)
    taken |= rank < least
    return float(np.add.reduce(ranked, axis=None, where=taken))


def load_terms(problem: AssignmentProblem, prices: FloatArray) -> float:
    """Sum what the experts' places are worth at these prices: the part of the bound that no client enters."""
    if problem.load_penalty is None:
        return float((problem.load_max * np.maximum(prices, 0) - problem.load_min * np.maximum(-prices, 0)).sum())
    # "No limit" may be any large number, but no expert gets more than all clients.
    most = np.maximum(np.minimum(problem.load_max, problem.n_clients), problem.load_min)
    return float(problem.load_penalty.conjugate(prices, problem.load_min, most).sum())


def dual_bound(problem: AssignmentProblem, prices: npt.ArrayLike) -> float:
    """Bound the objective of every feasible assignment from above, from expert prices.

    For any prices p of shape (m,), with R_i the best choice of client i under scores d_ij - p_j::

        bound(p) = sum_i R_i(p) + sum_j (load_max_j max(p_j, 0) - load_min_j max(-p_j, 0))

    With a load penalty phi the second sum is that of the conjugates, which is the same where phi is 0::

        max of p_j l - phi_j(l) over l = load_min_j..load_max_j

    with no l above the number of clients. With layers R_i keeps their bounds (`fedmoe_sched.layer_bound`). With
    budgets, with or without layers, R_i is the bound of `fedmoe_sched.knapsack_bound`, mostly exact. Where there
    are budgets, all scores are whole numbers, and no load costs anything, so is the objective: the bound is
    rounded down.

    Parameters
    ----------
    problem : AssignmentProblem
    prices : array_like, shape (m,)
        Any finite numbers: wrong prices give a weaker bound, never a wrong one.

    Returns
    -------
    float
        The bound; ``-inf`` proves that some client cannot take as many experts as it must.
    """
    p = as_vector("prices", prices, problem.n_experts, "one per expert")
    bound = load_terms(problem, p) + responses_bound(problem, p)
    return rounded_down(bound) if problem.budgets and is_whole(problem) else bound


def responses_bound(problem: AssignmentProblem, p: FloatArray) -> float:
    """Bound what all clients together could gain at prices: the part of `dual_bound` that loads do not enter."""
    if problem.overstretched.any():
        return -np.inf

    kept = threading.local()  # memory that is asked for block by block costs more than what is done in it

    def of_block(block: slice) -> float:
        size = block.stop - block.start
        if not hasattr(kept, "reduced"):
            kept.reduced = np.empty((next(row_blocks(problem.shape)).stop, problem.n_experts))
        reduced = kept.reduced[:size]
        _reduce(problem, block, p, reduced)
        if problem.budgets:
            return math.fsum(_within_budgets(problem, block, reduced))
        if problem.layers is None:
            return _best_responses(reduced, problem.min_experts[block], problem.slots[block])
        forced, optional, least, most = layered_choice(problem, block, reduced)
        return forced + _best_responses(optional, least, most)

    return _sum_over_blocks(problem, of_block)


def client_bounds(problem: AssignmentProblem, p: FloatArray) -> FloatArray:
    """Bound what each client could gain at prices, for a problem with budgets; shape (n,), float64.

    The sum is what `responses_bound` returns; ``-inf`` for a client that cannot take as many experts as it must.
    """
    each = np.full(problem.n_clients, -np.inf)

    def of_block(block: slice) -> float:
        reduced = np.empty((block.stop - block.start, problem.n_experts))
        _reduce(problem, block, p, reduced)
        each[block] = _within_budgets(problem, block, reduced)
        return 0.0

    _sum_over_blocks(problem, of_block)
    return each


def _within_budgets(problem: AssignmentProblem, block: slice, reduced: FloatArray) -> FloatArray:
    knapsacks = [Knapsacks(one.sizes_of(block), one.allowed[block]) for one in problem.budgets]
    return budgeted_responses(reduced, choice_bounds(problem, block), knapsacks).upper


def choice_bounds(problem: AssignmentProblem, block: slice) -> ChoiceBounds:
    """Return how many experts some clients may train, of each layer where there are some."""
    if problem.layers is None:
        least, most = problem.min_experts[block], problem.slots[block]
        return ChoiceBounds((np.arange(problem.n_experts),), least[:, None], most[:, None], least, most)
    return ChoiceBounds(layers_of(problem).members, *layer_bounds(problem, block))


def is_whole(problem: AssignmentProblem) -> bool:
    """Whether every objective is a whole number, below what float64 can tell apart."""
    if problem.load_penalty is not None or problem.largest_score >= _LARGEST_WHOLE:
        return False
    scores = (problem.desirability[block] for block in problem.blocks())
    return all(bool((part == np.rint(part)).all()) for part in scores)


def rounded_down(bound: float) -> float:
    """Round a bound on whole numbers down, but for what sums in float64 do not resolve."""
    if np.isinf(bound):
        return bound
    return float(np.floor(bound + OPTIMALITY_GAP * max(1.0, abs(bound))))


def relative_gap(bound: float, value: float) -> float:
    """Return ``(bound - value) / max(1, abs(value))``."""
    return (bound - value) / max(1.0, abs(value))


def certify(
    problem: AssignmentProblem, assignment: Assignment, prices: npt.ArrayLike | None = None
) -> Certificate:
    """Recompute everything that is claimed of an assignment.

    Parameters
    ----------
    problem : AssignmentProblem
    assignment : Assignment
        Of the same shape as the problem.
    prices : array_like, shape (m,), optional
        Dual prices of the expert load constraints.

    Returns
    -------
    Certificate
    """
    value = objective(problem, assignment)
    bound = None if prices is None else dual_bound(problem, prices)
    broken = violations(problem, assignment)
    gap = None if bound is None or broken else relative_gap(bound, value)
    return Certificate(value, broken, bound, gap)
