"""Objective, feasibility, dual bound and gap of an assignment, recomputed from the raw problem.

No backend is trusted here and none is imported: what a schedule says of itself comes from this module.
The bound is weak Lagrangian duality over the expert load constraints (Bertsekas, *Nonlinear Programming*,
section 6.1; for transport problems Ahuja, Magnanti and Orlin, *Network Flows*, section 9.4, and for convex costs
chapter 14).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray, as_vector
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem

__all__ = [
    "OPTIMALITY_GAP",
    "Certificate",
    "Violation",
    "certify",
    "dual_bound",
    "objective",
    "relative_gap",
    "violations",
]

#: A relative gap up to this counts as optimal: what float64 sums over a million clients can resolve.
OPTIMALITY_GAP = 1e-9


@dataclass(frozen=True)
class Violation:
    """One broken constraint.

    Parameters
    ----------
    constraint : str
        ``"capacity"``, ``"min_experts"``, ``"load_min"``, ``"load_max"`` or ``"eligible"``.
    position : tuple of int
        (client,), (expert,) or (client, expert) number.
    value, limit : int
        What the assignment has there, and what the problem allows.
    """

    constraint: str
    position: tuple[int, ...]
    value: int
    limit: int

    def __str__(self) -> str:
        where = ", ".join(str(i) for i in self.position)
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


def objective(problem: AssignmentProblem, assignment: Assignment) -> float:
    """Sum the desirability of the chosen pairs, less the penalty of the loads, in float64."""
    chosen = problem.desirability[assignment.clients, assignment.indices]
    value = float(chosen.sum(dtype=np.float64))
    return (
        value
        if problem.load_penalty is None
        else value - float(problem.load_penalty.total(assignment.loads).sum())
    )


def _outside(name: str, values: IntArray, limits: IntArray, *, upper: bool) -> Iterator[Violation]:
    bad = values > limits if upper else values < limits
    for at in np.flatnonzero(bad):
        yield Violation(name, (int(at),), int(values[at]), int(limits[at]))


def violations(problem: AssignmentProblem, assignment: Assignment) -> tuple[Violation, ...]:
    """List every broken constraint of `problem` in `assignment`."""
    found = [
        *_outside("capacity", assignment.counts, problem.capacity, upper=True),
        *_outside("min_experts", assignment.counts, problem.min_experts, upper=False),
        *_outside("load_max", assignment.loads, problem.load_max, upper=True),
        *_outside("load_min", assignment.loads, problem.load_min, upper=False),
    ]
    if problem.eligible is not None:
        barred = ~problem.eligible[assignment.clients, assignment.indices]
        for at in np.flatnonzero(barred):
            pair = (int(assignment.clients[at]), int(assignment.indices[at]))
            found.append(Violation("eligible", pair, 1, 0))
    return tuple(found)


def _best_responses(reduced: FloatArray, least: IntArray, most: IntArray) -> float:
    """Sum each row's best choice: its `least` largest entries, then positive ones up to `most`."""
    width = int(most.max(initial=0))
    if width == 0:
        return 0.0
    m = reduced.shape[1]
    if width < m:
        reduced = np.partition(reduced, m - width, axis=1)[:, m - width :]
    ranked = np.sort(reduced, axis=1)[:, ::-1]
    rank = np.arange(ranked.shape[1])
    forced = rank < least[:, None]
    taken = forced | ((rank < most[:, None]) & (ranked > 0))
    return float(np.sum(ranked, where=taken))


def _load_terms(problem: AssignmentProblem, prices: FloatArray) -> float:
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

    with no l above the number of clients.

    Parameters
    ----------
    problem : AssignmentProblem
    prices : array_like, shape (m,)
        Any finite numbers: wrong prices give a weaker bound, never a wrong one.

    Returns
    -------
    float
        The bound; ``-inf`` proves that some client has fewer eligible experts than it must take.
    """
    p = as_vector("prices", prices, problem.n_experts, "one per expert")
    if (problem.min_experts > problem.eligible_counts).any():
        return -np.inf
    total = _load_terms(problem, p)
    for block in problem.blocks():
        reduced = problem.desirability[block].astype(np.float64)
        reduced -= p
        if problem.eligible is not None:
            reduced[~problem.eligible[block]] = -np.inf
        total += _best_responses(reduced, problem.min_experts[block], problem.slots[block])
    return total


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
