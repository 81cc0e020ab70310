"""The linear relaxation of problems with budgets: prices, shares, and what the pairs lose."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solvers._budget_rows import budget_rows
from fedmoe_sched.solvers._layer_rows import layer_rows
from fedmoe_sched.solvers._matrix import clipped_bounds, eligible_pairs, incidence, unit_scores

__all__ = ["Relaxation", "linear_relaxation"]

Floats = npt.NDArray[np.float64]


class Relaxation(NamedTuple):
    """Solution of the linear relaxation.

    Parameters
    ----------
    prices : ndarray, shape (m,)
    multipliers : ndarray, shape (R, n)
        Of the budgets.
    shares : ndarray, shape (n, m)
        Of the pairs.
    reduced : ndarray, shape (n, m)
        Scores less what all bounds and budgets charge for them, those on numbers and of layers too; -inf where not
        possible.
    bound : float
        What they prove; infinite where that is not known.
    """

    prices: Floats
    multipliers: Floats
    shares: Floats
    reduced: Floats
    bound: float = math.inf

    def keep(self, value: float) -> npt.NDArray[np.bool_]:
        """Return the pairs that an assignment worth more than `value` could hold; shape (n, m)."""
        kept: npt.NDArray[np.bool_] = self.bound + self.reduced >= value - 1e-9 * max(1.0, abs(value))
        return kept & np.isfinite(self.reduced)


def linear_relaxation(problem: AssignmentProblem, seconds: float | None) -> tuple[Relaxation | None, bool]:
    """Solve the linear relaxation by the interior point method of SciPy's HiGHS, and go to a vertex.

    Returns
    -------
    relaxation : Relaxation or None
        None where time ran out.
    infeasible : bool
    """
    from scipy.optimize import linprog
    from scipy.sparse import vstack

    network = network_relaxation(problem)
    pairs = eligible_pairs(network)
    bounds = clipped_bounds(network)
    scores, unit = unit_scores(problem, pairs)
    n, size = problem.n_clients, len(scores)
    rows = incidence(network, pairs)
    counts = np.bincount(pairs.clients, minlength=n)
    short = np.flatnonzero(bounds.client_max < counts)
    needy = np.flatnonzero(bounds.client_min > 0)
    budgets = budget_rows(problem, pairs, whole=False)
    layers = layer_rows(network, pairs)
    of_layers, tight = (
        layers.matrix(),
        np.flatnonzero(layers.high < np.bincount(layers.rows, minlength=len(layers.high))),
    )
    loose = np.flatnonzero(layers.low > 0)
    fixed = np.flatnonzero(bounds.expert_min == bounds.expert_max)
    capped = np.flatnonzero(bounds.expert_min < bounds.expert_max)
    matrix = vstack(
        [
            rows[n + capped],
            -rows[n + capped],
            rows[short],
            -rows[needy],
            of_layers[tight],
            -of_layers[loose],
            budgets.matrix(size),
        ]
    )
    sides = [
        bounds.expert_max[capped],
        -bounds.expert_min[capped],
        bounds.client_max[short],
        -bounds.client_min[needy],
        layers.high[tight],
        -layers.low[loose],
    ]
    options = {} if seconds is None else {"time_limit": seconds}
    limits = np.concatenate([*sides, np.array(budgets.limits)])
    found = linprog(
        -scores,
        A_ub=matrix,
        b_ub=limits,
        A_eq=rows[n + fixed] if len(fixed) else None,
        b_eq=bounds.expert_max[fixed] if len(fixed) else None,
        bounds=(0, 1),
        method="highs-ipm",
        options=options,
    )
    if found.status != 0:
        return None, found.status == 2
    # Any charges prove a bound: theirs is computed anew, rounding errors of the engine are no matter.
    charges = np.maximum(-found.ineqlin.marginals, 0.0)
    left = scores - matrix.T @ charges
    bound = float(charges @ limits)
    if len(fixed):
        left += rows[n + fixed].T @ found.eqlin.marginals
        bound -= float(found.eqlin.marginals @ bounds.expert_max[fixed])
    bound += float(np.maximum(left, 0.0).sum())
    reduced = np.full(problem.shape, -np.inf)
    reduced[pairs.clients, pairs.experts] = left * unit
    prices = np.zeros(problem.n_experts)
    prices[fixed] = -found.eqlin.marginals
    prices[capped] = found.ineqlin.marginals[len(capped) : 2 * len(capped)]
    prices[capped] -= found.ineqlin.marginals[: len(capped)]
    shares = np.zeros(problem.shape)
    shares[pairs.clients, pairs.experts] = found.x
    worth = np.zeros((len(problem.budgets), n))
    of_budgets = found.ineqlin.marginals[len(found.ineqlin.marginals) - len(budgets.limits) :]
    worth[budgets.resources, budgets.clients] = -of_budgets
    for row, limit in enumerate(budgets.limits):  # of a whole budget, not of a unit of it
        worth[budgets.resources[row], budgets.clients[row]] *= limit
    return Relaxation(prices * unit, worth * unit, shares, reduced, bound * unit), False
