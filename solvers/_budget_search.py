"""The search for answers to problems with budgets: locally first, then by integer programs of some clients."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import objective, violations
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import Answer, Limits
from fedmoe_sched.solvers._budget_dual import Clients, Dual, climb, linear_relaxation
from fedmoe_sched.solvers._shift_kernels import shift_search
from fedmoe_sched.solvers.flow_ortools import OrToolsFlow
from fedmoe_sched.solvers.milp_scipy import SciPyMILP

__all__ = ["Search", "load_kernels"]

_SMALL = 600  # possible pairs up to which the integer program is tried first
_STALLED = 20  # neighbourhoods without a better answer before a try at the whole integer program
_HELD = 50  # pairs that a first neighbourhood holds
_MOMENT = 0.03  # seconds of local search where the integer program is quick
_NEAR = 8  # clients of an expert that the local search looks at
_EFFORT = 300_000  # steps of the local search between two looks at the clock
_UNLIMITED = 4.0  # seconds of search before the integer program to the end, where there is no time limit
_PATIENCE = 0.03  # of the time limit, for one neighbourhood
_TARGET = 0.01  # of the bound, that subgradient steps aim below it
_STEPS = 300  # on the way to better prices

Mask = npt.NDArray[np.bool_]


def load_kernels() -> None:
    """Call every kernel once: it is loaded from disk then, or compiled."""
    tiny = AssignmentProblem(
        np.ones((2, 2)), 1, budgets=[ResourceBudget("tiny", np.array([1.0, 2.0]), np.full(2, 2.0))]
    )
    search = Search(tiny, Limits(time=1.0))
    search.price(np.zeros(2))
    search.descend(0.0)


@dataclass(eq=False)
class Search:
    """The state of a search: the best assignment and the best prices so far.

    Parameters
    ----------
    problem : AssignmentProblem
        With budgets.
    limits : Limits
    held : ndarray, shape (n, m), bool, or None
        The best assignment.
    worth : float
    claim : float
        A bound on the word of the engine that searched the rest.
    """

    problem: AssignmentProblem
    limits: Limits
    held: Mask | None = None
    worth: float = -math.inf
    claim: float = math.inf
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.clients = Clients.of(self.problem)
        self.random = np.random.default_rng(self.limits.seed)
        self.dual = Dual(np.zeros(self.problem.n_experts), np.zeros(self.problem.n_clients), math.inf, np.zeros(0))

    def left(self, share: float = 1.0) -> float:
        """Return a part of the seconds that are left."""
        total = _UNLIMITED if self.limits.time is None else self.limits.time
        return max(0.0, share * (total - (time.perf_counter() - self.started)))

    @property
    def proved(self) -> bool:
        """Whether no assignment is better than the best one."""
        bound = min(self.claim, self.clients.round_down(self.dual.bound))
        return self.held is not None and bound - self.worth <= 1e-10 * max(1.0, abs(self.worth))

    def run(self, prices: npt.NDArray[np.float64] | None) -> Answer:
        """Search until the answer is proved or the time is over.

        Parameters
        ----------
        prices : ndarray, shape (m,), or None
            Prices of a similar problem, used where time is too short for the linear relaxation.

        Returns
        -------
        Answer
        """
        feasible = self.price(prices)
        small = np.isfinite(self.clients.gain).sum() <= _SMALL
        if feasible:
            self.descend(_MOMENT if small else self.left(0.1))
        if feasible and not self.proved:
            feasible = self.improve(small=bool(small))
        if not feasible:
            return Answer(StopReason.PROVED_INFEASIBLE)
        assignment = None if self.held is None else Assignment.from_mask(self.held)
        bound = self.claim if math.isfinite(self.claim) else None
        known = self.dual.prices if math.isfinite(self.dual.bound) else None
        return Answer(StopReason.COMPLETED if self.proved else StopReason.TIME_LIMIT, assignment, known, bound)

    def price(self, prices: npt.NDArray[np.float64] | None) -> bool:
        """Find prices and their bound; return whether the linear relaxation has a solution."""
        gain = np.where(np.isfinite(self.clients.gain), self.clients.gain, 0.0)
        start = np.zeros(gain.shape[1])
        forced = self.clients.load_min > 0
        start[forced] = np.sort(gain[:, forced], axis=0)[-2:].mean(axis=0)
        if np.isfinite(self.clients.gain).any():
            relaxed, infeasible = linear_relaxation(self.problem, self.left(0.4) + 1e-3)
            if infeasible:
                return False
            start = relaxed if relaxed is not None else start if prices is None else prices
        self.dual = Dual.at(self.clients, start)[0]
        if math.isfinite(self.dual.bound):
            target = self.dual.bound - _TARGET * abs(self.dual.bound)
            self.dual = climb(self.clients, self.dual, target, _STEPS, self.left(0.1)).estimate(self.clients)
        return True

    def descend(self, seconds: float) -> None:
        """Search locally, from the best assignment of the network around the budgets."""
        reduced = self.dual.reduced(self.clients)
        current = self._start(reduced)
        if current is None:
            return
        order = np.argsort(-reduced, axis=0, kind="stable")[:_NEAR].T
        near = np.where(np.isfinite(np.take_along_axis(reduced.T, order, axis=1)), order, -1)
        worth_of = self.dual.multipliers
        floor = np.tile(np.maximum(worth_of, 1e-3 * max(float(worth_of.max()), 1e-9)), (len(self.clients.size), 1))
        price, best, record, seed = 1.5 * floor, np.zeros_like(current), -math.inf, self.limits.seed
        end = time.perf_counter() + seconds
        while True:
            record = shift_search(
                self.clients.gain, self.clients.size, near, self.clients.least, self.clients.most, price, floor,
                current, best, record, _EFFORT, seed,
            )  # fmt: skip
            seed += 1
            if time.perf_counter() >= end:
                break
        if record > -math.inf:
            self.adopt(Assignment.from_mask(best.astype(np.bool_)))

    def _start(self, reduced: npt.NDArray[np.float64]) -> npt.NDArray[np.int8] | None:
        scores = np.where(np.isfinite(reduced), reduced, 0.0)
        network = network_relaxation(self.problem).replace(desirability=scores)
        flow = OrToolsFlow()
        model = flow.build(network, self.limits, None)
        flow.run(model, self.limits)
        assignment = model.assignment()
        return None if assignment is None else assignment.mask().astype(np.int8)

    def adopt(self, assignment: Assignment | None) -> None:
        """Keep an assignment if it is feasible and better than the best one."""
        if assignment is None or violations(self.problem, assignment):
            return
        value = objective(self.problem, assignment)
        if value > self.worth:
            self.held, self.worth = assignment.mask(), value

    def improve(self, *, small: bool) -> bool:
        """Improve the answer and try to prove it; return False if there is none."""
        limited = self.limits.time is not None
        if small and not self.try_all(self.left(0.3) if limited else None):
            return False
        if not small and not self.proved:
            self.solve(self._promising(), self.left(0.25))
        number, stalled = self._first_size(), 0
        while self.left() > 0 and not self.proved:
            if self.held is None or stalled >= _STALLED:
                stalled = 0
                if not self.try_all(self.left(0.9 if self.held is None else 0.4)):
                    return False
            else:
                before = self.worth
                number = self._neighbourhood(number)
                stalled = stalled + 1 if self.worth == before else 0
        return self.proved or limited or self.try_all(None)

    def _kept(self) -> Mask:
        if self.held is None or not math.isfinite(self.dual.bound):
            return np.isfinite(self.clients.gain)
        return self.dual.keep(self.clients, self.worth)

    def _promising(self) -> Mask:
        """Return the pairs of each expert with its most promising clients."""
        reduced = self.dual.reduced(self.clients)
        least = np.sort(reduced, axis=0)[-min(len(reduced), _NEAR // 2)]
        mask: Mask = self._kept() & ((reduced >= least) | (reduced > 0))
        return mask

    def try_all(self, seconds: float | None) -> bool:
        """Solve the integer program of all pairs that matter; return False if no assignment exists."""
        answer = self.solve(self._kept(), seconds)
        if answer.stop_reason is StopReason.PROVED_INFEASIBLE and self.held is None:
            return False
        if self._settled(answer):
            self.claim = self.worth
        elif answer.bound is not None:
            self.claim = min(self.claim, max(answer.bound, self.worth))
        return True

    def _settled(self, answer: Answer) -> bool:
        """Whether an engine that searched all pairs which matter has left nothing better than the best answer.

        Not where it gave up, nor where its answer breaks a budget by more than rounding: nobody has that one.
        """
        if answer.stop_reason is StopReason.COMPLETED:
            assert answer.assignment is not None
            return not violations(self.problem, answer.assignment)
        return answer.stop_reason is StopReason.PROVED_INFEASIBLE

    def solve(self, pairs: Mask, seconds: float | None) -> Answer:
        """Solve the integer program of some of the pairs, and adopt its answer."""
        answer = _solve(self.problem.replace(eligible=pairs), seconds)
        self.adopt(answer.assignment)
        return answer

    def _first_size(self) -> int:
        """Return how many clients hold so many pairs as suit an integer program."""
        mean = 1.0 if self.held is None else max(1.0, self.held.sum() / len(self.held))
        return min(self.problem.n_clients, max(2, math.ceil(_HELD / mean)))

    def _neighbourhood(self, number: int) -> int:
        """Solve for some clients, all others fixed; return how many to take next time."""
        assert self.held is not None
        n = self.problem.n_clients
        clients = np.sort(self.random.choice(n, number, replace=False))
        patience = min(self.left(), max(0.2, _PATIENCE * (self.limits.time or _UNLIMITED)))
        began = time.perf_counter()
        if number == n:
            self.try_all(patience)
            return min(n, max(2, 3 * number // 4))
        answer, experts = self._solve_some(clients, patience)
        if answer.assignment is not None:
            changed = self.held.copy()
            changed[np.ix_(clients, experts)] = answer.assignment.mask()
            self.adopt(Assignment.from_mask(changed))
        if answer.stop_reason is StopReason.TIME_LIMIT:
            return min(n, max(2, 3 * number // 4))
        quick = time.perf_counter() - began < patience / 4
        return min(n, number + 1) if quick else number

    def _solve_some(self, clients: npt.NDArray[np.int64], seconds: float) -> tuple[Answer, npt.NDArray[np.int64]]:
        """Solve the integer program of these clients, over the experts that they hold or that have room."""
        assert self.held is not None
        problem, some = self.problem, self.held[clients]
        outside = self.held.sum(axis=0) - some.sum(axis=0)
        experts = np.flatnonzero(some.any(axis=0) | (problem.load_max > outside))
        part = problem.restrict(
            clients,
            experts,
            load_min=np.maximum(problem.load_min - outside, 0)[experts],
            load_max=np.maximum(problem.load_max - outside, 0)[experts],
            eligible=self._kept()[np.ix_(clients, experts)],
        )
        return _solve(part, seconds), experts


def _solve(problem: AssignmentProblem, seconds: float | None) -> Answer:
    engine = SciPyMILP()
    limits = Limits(time=None if seconds is None else max(seconds, 1e-3))
    model = engine.build(problem, limits, None)
    engine.run(model, limits)
    return engine.read(model)
