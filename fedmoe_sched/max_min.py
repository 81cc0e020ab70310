"""Max-min fairness: the smallest desirability of a chosen pair as large as possible, then the next, and so on.

A lexicographic bottleneck assignment problem (Burkard, Dell'Amico and Martello, *Assignment Problems*, SIAM 2009,
chapter 6). Of all assignments that keep the bounds, the answer is one whose numbers of pairs at each value, from
the lowest value up, are lexicographically least. No value counts against another: one pair more at a low value is
never made up for by any number of better ones.

It is solved level by level. The next value that cannot be avoided is found by bisection over the distinct scores,
with a maximum flow for each try. The fewest pairs at that value is a network problem with scores of -1 and 0, so
that its prices are whole numbers and exact. Its optima are all the assignments that are complementary to these
prices (Schrijver, *Theory of Linear and Integer Programming*, section 7.9): some pairs are forced, some excluded,
some bounds tight. What is left is again a network problem, in which the next level is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._face import Face, rest_of
from fedmoe_sched._layers import open_layers
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import certify, dual_bound, violations
from fedmoe_sched.errors import InputError
from fedmoe_sched.exchange import polish
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.registry import get_solver
from fedmoe_sched.result import Conflict, Schedule, Status, StopReason
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Solver

__all__ = ["Level", "MaxMin", "max_min"]


@dataclass(frozen=True, eq=False)
class Level:
    """One value that no assignment can avoid, given the levels below it.

    Parameters
    ----------
    value : float
        Desirability of the pairs of this level.
    count : int
        How many pairs have it: the fewest that are possible.
    prices : ndarray, shape (m,), float64, or None
        Whole numbers that prove it, see `MaxMin.verify`; None where the levels below it force all of these pairs.
    """

    value: float
    count: int
    prices: FloatArray | None


@dataclass(frozen=True, eq=False)
class MaxMin:
    """A max-min fair assignment, with what proves it.

    Parameters
    ----------
    schedule : Schedule
        The assignment. Its status is ``feasible``: it is `levels` that make it optimal, not the sum of
        desirability, of which another assignment may have more.
    levels : tuple of Level
        The values of the chosen pairs, ascending, and how many pairs have each.
    conflict : Conflict or None
        The cut that proves the bottleneck: why no assignment does without pairs of that value or below. None if no
        pair is chosen. For a problem without any assignment, it is that of the schedule.
    """

    schedule: Schedule
    levels: tuple[Level, ...]
    conflict: Conflict | None

    @property
    def bottleneck(self) -> float | None:
        """The smallest desirability of a chosen pair; None where no pair is chosen."""
        return self.levels[0].value if self.levels else None

    def verify(self) -> bool:
        """Prove the answer anew from the raw problem, without any backend.

        The assignment keeps all bounds and has the pairs of each level and no others; and for each level the dual
        bound of `fedmoe_sched.dual_bound`, at its prices, says that no assignment with the same lower levels has
        fewer pairs of its value, or only better ones.

        Raises
        ------
        InfeasibleError, NoAssignmentError
            There is no assignment.
        """
        pairs = _chosen(self.schedule)
        problem = self.schedule.problem
        values, counts = np.unique(problem.desirability[pairs.clients, pairs.indices], return_counts=True)
        claimed = [(level.value, level.count) for level in self.levels]
        if violations(problem, pairs) or claimed != list(zip(values.tolist(), counts.tolist(), strict=True)):
            return False
        face = _Face(problem)
        for level in self.levels:
            rank = int(np.searchsorted(face.values, level.value))
            if face.fewest(rank, level.prices) != level.count:
                return False
            face.fix(rank, level.prices)
        return True


def max_min(problem: AssignmentProblem, solver: str | Solver[Any] = "auto") -> MaxMin:
    """Find an assignment whose smallest desirability is the largest possible, then the next smallest, and so on.

    Exact: among the assignments that keep the bounds it has the fewest pairs at the lowest value, among those the
    fewest at the second lowest, and so on. So it has no pair that no bound asks for: `min_experts` or `load_min`
    say how many there are. Where every client trains exactly one expert, it is max-min fair among the clients.

    Parameters
    ----------
    problem : AssignmentProblem
        Without budgets and load penalty.
    solver : str or Solver, default "auto"
        An exact backend, for the network problems of the levels.

    Returns
    -------
    MaxMin
        An infeasible problem is an answer, not an exception: ``schedule.status`` says so, and `conflict` why.

    Raises
    ------
    InputError
        The problem has budgets or a load penalty, or the solver is not exact.
    MissingDependencyError, UnsupportedProblemError
        From the backend.

    Notes
    -----
    There are at most as many levels as chosen pairs. Each costs one solve, and as many maximum flows as the number
    of distinct scores has binary digits.

    Examples
    --------
    >>> problem = AssignmentProblem([[9, 5], [6, 1]], capacity=1, min_experts=1, load_max=1)
    >>> fair = max_min(problem)
    >>> fair.schedule.experts_by_client(), fair.bottleneck, fair.verify()
    ({0: [1], 1: [0]}, 5.0, True)
    """
    _refuse(problem, solver)
    conflict = find_conflict(problem)
    name = solver if isinstance(solver, str) else solver.name
    if conflict is not None:
        schedule = Schedule(problem, name, Status.INFEASIBLE, StopReason.PROVED_INFEASIBLE, conflict=conflict)
        return MaxMin(schedule, (), conflict)
    face = _Face(problem)
    levels: list[Level] = []
    proof = None
    while True:
        rank, forced = face.next_level()
        if rank == len(face.values):
            break
        prices = None
        if not forced:
            stage = face.stage(rank)
            prices = polish(stage, _chosen(solve(stage, solver))).prices
        if not levels:
            proof = find_conflict(face.at_least(rank + 1))
        levels.append(Level(float(face.values[rank]), face.fewest(rank, prices), prices))
        face.fix(rank, prices)
    last = solve(face.stage(len(face.values)), solver)
    pairs = Assignment.from_mask(face.forced | _chosen(last).mask())
    certificate = certify(problem, pairs)
    schedule = Schedule(
        problem, last.solver, Status.FEASIBLE, StopReason.COMPLETED, pairs=pairs, certificate=certificate
    )
    return MaxMin(schedule, tuple(levels), proof)


def _refuse(problem: AssignmentProblem, solver: str | Solver[Any]) -> None:
    present = {
        "budgets": bool(problem.budgets),
        "load_penalty": problem.load_penalty is not None,
    }
    for name, there in present.items():
        if there:
            msg = f"{name}: max_min takes problems without any"
            raise InputError(msg)
    backend, _ = get_solver(solver, problem)
    if solver != "auto" and not backend.exact:
        msg = f"solver = {backend.name!r}: max_min needs an exact backend, or 'auto'"
        raise InputError(msg)


def _chosen(schedule: Schedule) -> Assignment:
    if schedule.pairs is None:
        schedule.loads  # noqa: B018  (raises, with the reason)
    assert schedule.pairs is not None
    return schedule.pairs


class _Face:
    """The assignments that are optimal in all levels so far: forced pairs, and a network problem for the rest.

    Parameters
    ----------
    problem : AssignmentProblem
        Feasible.

    Attributes
    ----------
    values : ndarray, shape (k,)
        The distinct scores of eligible pairs, ascending; levels go by their positions, the ranks.
    ranks : ndarray, shape (n, m), int64
    done : int
        Rank of the last level; -1 before the first.
    forced : ndarray, shape (n, m), bool
        Pairs that all these assignments have.
    open : ndarray, shape (n, m), bool
        Pairs that some of these assignments have and others may not.
    rest : AssignmentProblem
        What the forced pairs leave of the bounds; `open` says which pairs are left.
    """

    def __init__(self, problem: AssignmentProblem) -> None:
        everything = np.ones(problem.shape, dtype=np.bool_)
        self.open: BoolArray = everything if problem.eligible is None else problem.eligible
        self.values = np.unique(problem.desirability[self.open])
        self.ranks: IntArray = np.searchsorted(self.values, problem.desirability)
        self.done = -1
        self.forced: BoolArray = np.zeros(problem.shape, dtype=np.bool_)
        self.rest = problem.replace(capacity=problem.slots)

    def at_least(self, rank: int) -> AssignmentProblem:
        """Return the rest with only the pairs of the levels so far, and those of a rank and above."""
        allowed = (self.ranks <= self.done) | (self.ranks >= rank)
        return self.rest.replace(eligible=self.open & allowed)

    def stage(self, rank: int) -> AssignmentProblem:
        """Return the problem of having the fewest pairs of a rank, and none between it and the levels so far."""
        return self.at_least(rank).replace(desirability=np.where(self.ranks == rank, -1.0, 0.0))

    def next_level(self) -> tuple[int, bool]:
        """Return the rank of the next level (the number of ranks at the end), and if all its pairs are forced."""
        ahead = self.ranks[self.forced & (self.ranks > self.done)]
        forced = int(ahead.min(initial=len(self.values)))
        needed = self._needed()
        return min(forced, needed), forced < needed

    def _needed(self) -> int:
        """Return the largest rank r such that pairs of the levels so far, and of ranks from r on, are enough."""
        low, high = self.done + 1, len(self.values)
        if find_conflict(self.at_least(high)) is None:
            return high
        while high - low > 1:  # pairs from `low` on are enough, those from `high` on are not
            middle = (low + high) // 2
            if find_conflict(self.at_least(middle)) is None:
                low = middle
            else:
                high = middle
        return low

    def fewest(self, rank: int, prices: FloatArray | None) -> int:
        """Return how many pairs of a rank are needed at least; what the prices prove of the rest is rounded."""
        forced = int(np.count_nonzero(self.forced & (self.ranks == rank)))
        return forced if prices is None else forced - round(dual_bound(self.stage(rank), prices))

    def fix(self, rank: int, prices: FloatArray | None) -> None:
        """Keep only what has the fewest pairs of a rank, by complementary slackness with optimal prices."""
        stage = self.stage(rank)
        self.open = self.open & ((self.ranks <= self.done) | (self.ranks >= rank))
        self.done = rank
        if prices is None:  # without any pair of that rank, besides those that are forced
            self.open &= self.ranks != rank
            self.rest = stage
            return
        face = _best_choices(stage, np.where(self.open, stage.desirability - prices, -np.inf))._replace(
            load_min=np.where(prices > 0, stage.load_max, stage.load_min),
            load_max=np.where(prices < 0, stage.load_min, stage.load_max),
        )
        self.forced |= face.forced
        self.open &= face.free
        self.rest = rest_of(stage, face)


def _best_choices(problem: AssignmentProblem, reduced: FloatArray) -> Face:
    """Describe all best choices of every client under reduced scores; pairs that are not eligible have -inf.

    Each layer takes its pairs above a threshold and none below it. That is the threshold of the client, unless the
    least of the layer lies below it, or all that the layer may take lie above it: then the number is fixed.
    """
    forced, free = np.empty(problem.shape, dtype=np.bool_), np.empty(problem.shape, dtype=np.bool_)
    layers = problem.layers
    if layers is None:
        threshold, least, most = _responses(reduced, problem.min_experts, problem.slots)
        forced, free = reduced > threshold[:, None], reduced == threshold[:, None]
        return Face(forced, free, least, most, None, None, problem.load_min, problem.load_max)
    low, high = (part.copy() for part in open_layers(problem, slice(0, problem.n_clients)))
    rows, fewest = np.arange(problem.n_clients), low.sum(axis=1)
    ranked, pool = [], []
    for layer, experts in enumerate(layers.members):
        inside = -np.sort(-reduced[:, experts], axis=1)
        place = np.arange(len(experts))
        beyond = (place >= low[:, layer, None]) & (place < high[:, layer, None])
        pool.append(np.where(beyond, inside, -np.inf))
        ranked.append(np.concatenate([np.full((len(rows), 1), np.inf), inside], axis=1))
    threshold, least, most = _responses(
        np.concatenate(pool, axis=1), np.maximum(problem.min_experts - fewest, 0), problem.slots - fewest
    )
    for layer, experts in enumerate(layers.members):
        last_needed, last_allowed = ranked[layer][rows, low[:, layer]], ranked[layer][rows, high[:, layer]]
        at_least, at_most = last_needed < threshold, last_allowed > threshold
        own = np.where(at_least, last_needed, np.where(at_most, last_allowed, threshold))[:, None]
        forced[:, experts], free[:, experts] = reduced[:, experts] > own, reduced[:, experts] == own
        high[at_least, layer] = low[at_least, layer]
        fixed = at_most & ~at_least
        low[fixed, layer] = high[fixed, layer]
    return Face(forced, free, least + fewest, most + fewest, low, high, problem.load_min, problem.load_max)


def _responses(reduced: FloatArray, least: IntArray, most: IntArray) -> tuple[FloatArray, IntArray, IntArray]:
    """Describe all best choices of every client under reduced scores.

    Each takes the pairs above its threshold and none below it; of those at the threshold, as many as bring the
    number of its experts between the two bounds that are returned. All of shape (n,).
    """
    ranked = np.concatenate([np.full((len(reduced), 1), np.inf), -np.sort(-reduced, axis=1)], axis=1)
    rows = np.arange(len(reduced))
    last_needed, last_allowed = ranked[rows, least], ranked[rows, most]
    threshold = np.where(last_needed < 0, last_needed, np.where(last_allowed > 0, last_allowed, 0.0))
    tight_low, tight_high = last_needed < 0, last_allowed > 0
    return threshold, np.where(tight_high, most, least), np.where(tight_low, least, most)
