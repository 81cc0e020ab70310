"""Generalised assignment problems drawn anew, by the rules of the published types a to e.

Types a to d are those of Chu and Beasley (1997, *Computers & Operations Research* 24), type e is that of Yagiura,
Ibaraki and Glover (2004, *INFORMS Journal on Computing* 16). For agent i of m and job j of n, all drawn
independently and all whole numbers, rounded down:

====  =========================  ==============================  ==============================================
type  what job j takes of i      cost                            what agent i has
====  =========================  ==============================  ==============================================
a     uniform in 5..25           uniform in 10..50               9 n / m + 0.4 R
b     as a                       as a                            0.7 of that
c     as a                       as a                            0.8 / m of what all jobs would take of i
d     uniform in 1..100          111 - size + uniform -10..10    as c
e     1 - 10 ln U, U in (0, 1]   1000 / size - 10 U', U' in      as c, but enough for any single job
                                 [0, 1]
====  =========================  ==============================  ==============================================

R is the most that any agent would have to give if every job went to the agent where it costs least. Costs are to
be small. The published files keep these rules to the unit; nothing guarantees that an instance with few jobs per
agent is feasible.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget

__all__ = ["TYPES", "draw"]

TYPES = "abcde"

IntArray = npt.NDArray[np.int64]


def draw(kind: str, agents: int, jobs: int, seed: int = 0) -> AssignmentProblem:
    """Draw an instance.

    Parameters
    ----------
    kind : str
        One of `TYPES`.
    agents, jobs : int
        m and n of the table, both >= 1: clients and experts of the problem.
    seed : int, default 0
        Same seed, same instance.

    Returns
    -------
    AssignmentProblem
        As `fedmoe_sched.gap_files.read_gap` reads published ones: desirability is minus the cost.
    """
    rng = np.random.default_rng(seed)
    sizes, costs = _sizes_and_costs(kind, (agents, jobs), rng)
    budget = ResourceBudget("resource", sizes.astype(np.float64), _budgets(kind, sizes, costs).astype(np.float64))
    return AssignmentProblem(-costs.astype(np.float64), jobs, load_min=1, load_max=1, budgets=[budget])


def _sizes_and_costs(kind: str, shape: tuple[int, int], rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    if kind == "d":
        sizes = rng.integers(1, 101, shape)
        return sizes, 111 - sizes + rng.integers(-10, 11, shape)
    if kind == "e":
        sizes = np.floor(1 - 10 * np.log(1 - rng.random(shape))).astype(np.int64)
        return sizes, np.floor(1000 / sizes - 10 * rng.random(shape)).astype(np.int64)
    return rng.integers(5, 26, shape), rng.integers(10, 51, shape)


def _budgets(kind: str, sizes: IntArray, costs: IntArray) -> IntArray:
    """Return what the agents have, by whole-number arithmetic: rounding errors would lower some by 1."""
    m, n = sizes.shape
    if kind in "ab":
        cheapest = costs.argmin(axis=0)
        taken = np.zeros(m, dtype=np.int64)
        np.add.at(taken, cheapest, sizes[cheapest, np.arange(n)])
        tenths = 90 * n + 4 * m * int(taken.max())  # m times what agents of type a have
        return np.full(m, tenths // (10 * m) if kind == "a" else 7 * tenths // (100 * m))
    budgets: IntArray = 4 * sizes.sum(axis=1) // (5 * m)
    return np.maximum(budgets, sizes.max(axis=1)) if kind == "e" else budgets
