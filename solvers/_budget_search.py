"""The search for answers to problems with budgets: prices, a first answer, then some clients anew at a time."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
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
from fedmoe_sched.solvers._budget_dual import Clients, Dual, climb, weigh
from fedmoe_sched.solvers._budget_relaxation import Relaxation, linear_relaxation
from fedmoe_sched.solvers._compile import compiling
from fedmoe_sched.solvers._insertion_kernels import insert
from fedmoe_sched.solvers._recombination import Parts, rounded
from fedmoe_sched.solvers._shift_kernels import shift_search
from fedmoe_sched.solvers.flow_ortools import OrToolsFlow
from fedmoe_sched.solvers.milp_scipy import SciPyMILP

__all__ = ["Search", "load_kernels"]

_STALLED = 100  # parts without a better answer before a try at the integer program of all clients
_SHARE = 0.2  # of the time left, for the first such try
_FILL = 0.4  # of the time left, for an answer from the linear relaxation
_PLACE = 7e-5  # seconds for an expert that is missing, times experts per client squared
_DESCENT, _FIRST = 0.005, 0.25  # of it, for local search with and without an answer
_NEAR = 8  # clients of an expert that the local search looks at
_KEENEST = 2  # clients of an expert: to one of these it may want to move again once there is more room
_PRICE, _FLOOR = 15.0, 0.3  # of what budgets are worth, of exceeding them at first; of the mean of it, the least
_MOST = 0.7  # of the time left, for that of all pairs where recombination is slow
_CORE = 4  # pairs per client and expert in the first program of the most promising ones
_SMALL = 5000  # pairs: few enough to have them all in the program
_EFFORT, _EFFORT_A_PAIR = 300_000, 100  # steps of the local search between two looks at the clock, at most
_UNLIMITED = 4.0  # seconds of search before the integer program to the end, where there is no time limit
_PRICING = 0.4  # of the time left, for the linear relaxation
_FEW, _PAIRS_A_SECOND = 1000, 5e4  # pairs that programs are fast with; of the linear relaxation, when it is slow
_TARGET = 0.01  # of the bound, that subgradient steps aim below it
_WEIGHTS = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)  # of sizes against scores, in first answers
_STEPS = 400  # on the way to better prices
_ROUNDING = 1e-10  # of an objective
_TINY = 1e-3  # of a budget

Mask = npt.NDArray[np.bool_]


@functools.cache
@compiling()
def load_kernels() -> None:
    """Call every kernel once: it is loaded from disk then, or compiled."""
    tiny = AssignmentProblem(
        np.ones((2, 2)), 1, budgets=[ResourceBudget("tiny", np.array([1.0, 2.0]), np.full(2, 2.0))]
    )
    search = Search(tiny, Limits(time=1.0))
    search.insert()
    search.price(np.zeros(2))
    search.descend(0.0, 0.0)
    Parts(search.clients, search.dual, np.zeros((2, 2), dtype=np.int8), search.random, lambda: 1.0).improve()


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
        self.relaxed: Relaxation | None = None
        self.spare: Assignment | None = None
        self._number = _CORE  # pairs per client and expert in the next program of the most promising ones
        self.dual = Dual(np.zeros(self.problem.n_experts), np.zeros((1, 1)), math.inf, np.zeros(0))

    def left(self, share: float = 1.0) -> float:
        """Return a part of the seconds that are left."""
        total = _UNLIMITED if self.limits.time is None else self.limits.time
        return max(0.0, share * (total - (time.perf_counter() - self.started)))

    @property
    def bound(self) -> float:
        """No assignment is worth more; infinite as long as that is all that is known."""
        known = self.dual.bound if self.relaxed is None else min(self.dual.bound, self.relaxed.bound)
        return min(self.claim, self.clients.round_down(known))

    @property
    def proved(self) -> bool:
        """Whether no assignment is better than the best one."""
        return self.held is not None and self.bound - self.worth <= _ROUNDING * max(1.0, abs(self.worth))

    def run(self, prices: npt.NDArray[np.float64] | None) -> Answer:
        """Search until the answer is proved or the time is over.

        Parameters
        ----------
        prices : ndarray, shape (m,), or None
            Prices of a similar problem, to start from where there is no time for the linear relaxation.

        Returns
        -------
        Answer
        """
        self.spare = self.insert()
        if not (self.price(prices) and self.improve()):
            return Answer(StopReason.PROVED_INFEASIBLE)
        if not self.proved:
            self.adopt(self.spare)
        assignment = None if self.held is None else Assignment.from_mask(self.held)
        bound = self.worth if self.proved else self.bound
        bound += _ROUNDING * max(1.0, abs(bound))  # knapsacks may be bounded more closely than the certificate's
        known = self.dual.prices if math.isfinite(self.dual.bound) else None
        return Answer(
            StopReason.COMPLETED if self.proved else StopReason.TIME_LIMIT,
            assignment,
            known,
            bound if math.isfinite(bound) else None,
        )

    def insert(self) -> Assignment | None:
        """Place experts one by one, with more and more regard to sizes, until all bounds are kept."""
        gain, possible = self.clients.gain, np.isfinite(self.clients.gain)
        if not possible.any():
            return None
        largest = self.clients.size.max(axis=0, initial=0.0)
        order = np.zeros(0, dtype=np.int64)
        if self.problem.load_penalty is None:
            worth = np.where(possible, gain / (largest + _TINY), -np.inf)
            order = np.argsort(-worth, axis=None, kind="stable")[: int((possible & (gain > 0)).sum())]
        scale = float(np.abs(gain).mean(where=possible))
        for weight in _WEIGHTS:
            held = np.zeros(gain.shape, dtype=np.int8)
            score = np.where(possible, gain - weight * scale * largest, -np.inf)
            ranked = np.ascontiguousarray(np.argsort(-score, axis=0, kind="stable").T)
            insert(
                score, *self.clients.arrays[1:7], self.clients.load_min, self.clients.load_max, ranked, order, held
            )
            assignment = Assignment.from_mask(held > 0)
            if not violations(self.problem, assignment):
                return assignment
        return None

    def price(self, prices: npt.NDArray[np.float64] | None) -> bool:
        """Find prices and their bound; return whether the linear relaxation has a solution."""
        if not np.isfinite(self.clients.gain).any():
            return self._climb(None)
        infeasible, pairs = False, int(np.isfinite(self.clients.gain).sum())
        if self.limits.time is None or pairs <= _PAIRS_A_SECOND * self.left(_PRICING) or pairs <= _FEW:
            self.relaxed, infeasible = linear_relaxation(self.problem, self.left(_PRICING) + 1e-3)
        return not infeasible and self._climb(prices)

    def relax(self, problem: AssignmentProblem, seconds: float) -> Relaxation | None:
        """Solve the linear relaxation of a problem like this one."""
        return linear_relaxation(problem, seconds)[0]

    def _climb(self, prices: npt.NDArray[np.float64] | None) -> bool:
        """Improve the prices of the linear relaxation by subgradient steps."""
        known = None
        if self.relaxed is not None:
            start, known = self.relaxed.prices, self.relaxed.multipliers
        else:
            value = None if self.spare is None else objective(self.problem, self.spare)
            start, known = weigh(self.clients, value, _STEPS, self.left(0.2))
            if (
                prices is not None
                and Dual.at(self.clients, prices)[0].bound < Dual.at(self.clients, start)[0].bound
            ):
                start, known = prices, None
        self.dual = Dual.at(self.clients, start)[0]
        if math.isfinite(self.dual.bound):
            target = self.dual.bound - _TARGET * abs(self.dual.bound)
            self.dual = climb(self.clients, self.dual, target, _STEPS, self.left(0.1))
            self.dual.estimate(self.clients, known)
        return True

    def descend(self, seconds: float, first: float) -> None:
        """Search locally, from the shares of the linear relaxation, or the best assignment around the budgets.

        So many seconds after there is an answer, but no more than `first` for it.
        """
        reduced = self.dual.reduced(self.clients)
        wanted = reduced
        if self.relaxed is not None:
            reduced = self.relaxed.reduced
            scale = np.abs(reduced).max(where=np.isfinite(reduced), initial=_TINY)
            wanted = self.relaxed.shares + _TINY * reduced / scale
        current = self._from_network(wanted)
        if current is None:
            return
        number = _NEAR + 2 * (int(current.sum()) // current.shape[1])
        order = np.argsort(-reduced, axis=0, kind="stable")[:number].T
        near = np.where(np.isfinite(np.take_along_axis(reduced.T, order, axis=1)), order, -1)
        fans, worth = self._fans(near), self.dual.multipliers
        floor = np.maximum(worth, max(_FLOOR * float(worth.mean()), _ROUNDING))
        price, best, record, seed = _PRICE * floor, np.zeros_like(current), -math.inf, self.limits.seed
        began, effort = time.perf_counter(), min(_EFFORT, _EFFORT_A_PAIR * current.size)
        while True:
            record = shift_search(
                *self.clients.arrays[:7], self.clients.load_min, self.clients.load_max, near, fans, price, floor,
                current, best, record, effort, seed,
            )  # fmt: skip
            seed += 1
            if time.perf_counter() - began >= (first if record == -math.inf else seconds):
                break
        if record > -math.inf:
            self.adopt(Assignment.from_mask(best.astype(np.bool_)))

    def _fans(self, near: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """List for each client the experts of which it is one of the keenest; shape (n, k), filled up with -1."""
        keen = near[:, :_KEENEST]
        lists = [np.flatnonzero((keen == i).any(axis=1)) for i in range(len(self.clients.gain))]
        fans = np.full((len(lists), max(map(len, lists))), -1)
        for row, experts in zip(fans, lists, strict=True):
            row[: len(experts)] = experts
        return fans

    def _from_network(self, reduced: npt.NDArray[np.float64]) -> npt.NDArray[np.int8] | None:
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
        held = assignment.mask()
        value = objective(self.problem, assignment)
        value += float(self.clients.floor_worth(np.arange(len(held)), held).sum())
        if value > self.worth:
            self.held, self.worth = held, value

    def improve(self) -> bool:
        """Find answers and try to prove them; return False if there is none."""
        limited = self.limits.time is not None
        parts = self.start()
        while parts is None and self.left() > 0:
            if not self.try_all(self.left(0.5)):
                return False
            if self.held is not None:
                parts = self.parts(self.held.astype(np.int8), self.left)
            else:
                self.descend(0.0, self.left(0.5))
        if parts is not None:
            self._follow(parts)
        since, tries = 0, 0
        while parts is not None and self.left() > 0 and not self.proved:
            gained, slack = parts.improve()
            since = 0 if gained > 0.0 else since + 1
            if gained > 0.0:
                self._follow(parts)
            self.claim = min(self.claim, self.clients.round_down(parts.worth + slack))
            if (since >= _STALLED or parts.exhausted) and not self.proved:
                since = 0
                tries += 1
                few = int(self._kept().sum()) <= _FEW
                self.settle(
                    self.left(0.9 if parts.exhausted else min(0.9, _SHARE * (2 * tries - 1 if few else 1)))
                )
                if self.worth > parts.worth:
                    assert self.held is not None
                    parts.restart(self.held.astype(np.int8))
        return self.proved or limited or self.try_all(None)

    def _follow(self, parts: Parts) -> None:
        if parts.worth > self.worth:
            self.held, self.worth = parts.held > 0, parts.worth

    def parts(self, held: npt.NDArray[np.int8], left: Callable[[], float]) -> Parts:
        """Return an assignment, shape (n, m), to recombine as long as there are seconds left."""
        return Parts(self.clients, self.dual, held, self.random, left)

    def start(self) -> Parts | None:
        """Return a first answer: by local search, from the linear relaxation, or from one with more room."""
        if self.left() > 0:
            self.descend(self.left(_DESCENT), self.left(_FIRST if self.relaxed is not None else _MOST))
            if len(self.problem.budgets) > 1 and not self.core(self.left(_FIRST)) and not self.proved:
                self.try_all(self.left(_MOST))  # what recombination lists are choices, which are many then
            if self.held is None or self._is_soon_filled():
                parts = self._filled(self.relaxed, _FILL)
                if parts is None and self.held is None and self.relaxed is not None and self.left() > 0:
                    parts = self._filled(self.relax(self._roomy(self.relaxed), self.left(0.3)), 0.3)
                if parts is not None and parts.worth > self.worth:
                    return parts
        self.adopt(self.spare)
        return None if self.held is None else self.parts(self.held.astype(np.int8), self.left)

    def _is_soon_filled(self) -> bool:
        """Whether the linear relaxation, rounded, misses little."""
        if self.relaxed is None:
            return False
        missing = np.maximum(self.clients.load_min - rounded(self.clients, self.relaxed.shares).sum(axis=0), 0)
        n, m = self.clients.gain.shape
        return bool(missing.sum() * _PLACE * (m / n) ** 2 <= self.left(_FILL))

    def _filled(self, relaxed: Relaxation | None, share: float) -> Parts | None:
        """Round a linear relaxation, and place what is missing; None where that fails."""
        if relaxed is None:
            return None
        end = self.left(1 - share)
        parts = self.parts(rounded(self.clients, relaxed.shares), lambda: self.left() - end)
        if not parts.fill():
            return None
        parts.left = self.left
        return parts

    def _roomy(self, relaxed: Relaxation) -> AssignmentProblem:
        """Return the problem with budgets less by half of what a client's experts take on average."""
        count = np.maximum(relaxed.shares.sum(axis=1), 1.0)
        taken = (self.clients.size * relaxed.shares).sum(axis=2) / count
        return self.problem.replace(
            budgets=[
                ResourceBudget(one.name, one.sizes_of(np.arange(len(count))), one.budget * (1 - 0.5 * part))
                for one, part in zip(self.problem.budgets, taken.clip(0.0, 1.0), strict=True)
            ]
        )

    def settle(self, seconds: float) -> None:
        """Look for what recombination does not find."""
        if not self.core(seconds):
            self.try_all(seconds)

    def core(self, seconds: float) -> bool:
        """Solve the integer program of the most promising pairs, each time of more of them.

        Returns whether there was one that is much smaller than that of all pairs that matter.
        """
        kept = self._kept()
        number = self._number * sum(kept.shape)
        if self.relaxed is None or int(kept.sum()) <= max(2 * number, _SMALL):
            return False
        reduced = self.relaxed.reduced
        promising = reduced >= -np.partition(-reduced[kept], number)[number]
        promising |= self.relaxed.shares > 0
        if self.held is not None:
            promising |= self.held
        self.solve(kept & promising, seconds)
        self._number *= 2
        return True

    def _kept(self) -> Mask:
        if self.held is None or not math.isfinite(self.dual.bound):
            return np.isfinite(self.clients.gain)
        kept = self.dual.keep(self.clients, self.worth)
        return kept if self.relaxed is None else kept & self.relaxed.keep(self.worth)

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


def _solve(problem: AssignmentProblem, seconds: float | None) -> Answer:
    engine = SciPyMILP()
    limits = Limits(time=None if seconds is None else max(seconds, 1e-3))
    model = engine.build(problem, limits, None)
    engine.run(model, limits)
    return engine.read(model)
