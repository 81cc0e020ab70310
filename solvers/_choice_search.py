"""The search for many clients of few experts, or loads with a penalty: column generation, programs in choices."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.solver import Limits
from fedmoe_sched.solvers._budget_dual import Clients
from fedmoe_sched.solvers._budget_relaxation import Relaxation
from fedmoe_sched.solvers._budget_search import Search
from fedmoe_sched.solvers._choice_master import Generated, Pool, generate
from fedmoe_sched.solvers._choice_program import choose
from fedmoe_sched.solvers._compile import compiling
from fedmoe_sched.solvers._recombination import Parts

__all__ = ["ChoiceSearch", "load_kernels"]

_GENERATING = 0.7  # of the time left, for prices
_NARROW, _WIDEN = 1e-4, 4.0  # of the bound, that choices lose at most in the first program of them; and the next
_COMBINING = 0.4  # of the time left, for such a program
_TOGETHER = 4  # clients per expert in a program that untangles shares, at first
_WHOLE = 1e-6  # of shares


@functools.cache
@compiling()
def load_kernels() -> None:
    """Call every kernel once: it is loaded from disk then, or compiled."""
    tiny = AssignmentProblem(
        np.ones((4, 2)), 1, budgets=[ResourceBudget("tiny", np.array([1.0, 2.0]), np.full(4, 2.0))]
    )
    search = ChoiceSearch(tiny, Limits(time=1.0))
    search.insert()
    search.price(None)
    choose(search.clients, search.dual, 0.0, None, 1.0)


@dataclass(eq=False)
class ChoiceSearch(Search):
    """A search that starts from the linear program in choices; see `Search`.

    Parameters
    ----------
    pool : tuple of ndarray, or None
        Choices to start with, see `generate`; after `price` all that were generated.
    floors : tuple of ndarray, shape (n, G), and float, or None
        Lower bounds of layers that may give way, and what each of their experts is worth more; no other search
        than `price`, `insert`, `untangle` and `combine` knows them.
    """

    pool: Pool | None = None
    floors: tuple[npt.NDArray[np.int64], float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.clients = self.clients.with_floors(self.floors)
        # What choices lose at most in the next program of them, and in the last one.
        self._limit, self._combined = 0.0, -1.0

    def price(self, prices: npt.NDArray[np.float64] | None) -> bool:
        """Find prices and their bound; return whether they leave an assignment possible."""
        if not np.isfinite(self.clients.gain).any():
            return super().price(prices)
        found = self._generate(self.clients, self.left(_GENERATING), prices, self.pool)
        self.pool = found.pool
        self.dual = found.dual.estimate(self.clients)
        largest = np.abs(self.clients.gain).max(where=np.isfinite(self.clients.gain), initial=0.0)
        self._limit = _NARROW * max(abs(self.dual.bound), float(largest))
        self.relaxed = self._relaxation(found)
        return not found.infeasible

    def relax(self, problem: AssignmentProblem, seconds: float) -> Relaxation | None:
        """Solve the linear program in choices of a problem like this one."""
        found = self._generate(Clients.of(problem), seconds, self.dual.prices)
        return self._relaxation(found)

    def _relaxation(self, found: Generated) -> Relaxation:
        reduced = self.dual.reduced(self.clients)
        return Relaxation(found.dual.prices, self.dual.multipliers, found.shares, reduced)

    def _generate(
        self,
        clients: Clients,
        seconds: float,
        prices: npt.NDArray[np.float64] | None,
        pool: Pool | None = None,
    ) -> Generated:
        end = self.left() - seconds
        return generate(clients, self.random, lambda: self.left() - end, prices, pool)

    def improve(self) -> bool:
        """Find answers and try to prove them; return False if there is none."""
        if self.clients.penalty is None:
            return super().improve()
        if self.relaxed is not None:
            self.untangle(self.relaxed.shares)
        self.adopt(self.spare)
        while self.left() > 0 and not self.proved:
            if not (self.combine(self.left(_COMBINING)) or self.try_all(self.left())):
                return False
        return self.proved or self.limits.time is not None or self.try_all(None)

    def start(self) -> Parts | None:
        """Return a first answer: from shares of choices, or as any search does."""
        if self.relaxed is not None:
            self.untangle(self.relaxed.shares)
        if self.held is None:
            self.adopt(self.spare)
        return super().start() if self.held is None else self.parts(self.held.astype(np.int8), self.left)

    def settle(self, seconds: float) -> None:
        """Look for what recombination does not find."""
        if not self.combine(seconds):
            self.try_all(seconds)

    def untangle(self, shares: npt.NDArray[np.float64]) -> None:
        """Round shares of choices: those who are torn between several choose anew, with some others, then more."""
        n, m = shares.shape
        nearest = np.rint(shares)
        torn = (np.abs(shares - nearest) > _WHOLE).any(axis=1)
        known = nearest > 0
        if not torn.any():
            self.adopt(Assignment.from_mask(known))
        order = np.argsort(self.random.random(n) - torn)
        size = max(_TOGETHER * m, 2 * int(torn.sum()))
        while self.held is None and self.left() > 0:
            some = np.sort(order[:size])
            found = choose(self.clients, self.dual, self._limit, known, self.left(_COMBINING), some)
            if found.held is not None:
                self.adopt(Assignment.from_mask(found.held))
            if size >= n:
                break
            size *= 4

    def combine(self, seconds: float) -> bool:
        """Solve programs in choices that lose little, then more, until one proves the best answer.

        Returns whether there was one that was not solved before.
        """
        end, tried = self.left() - seconds, False
        while not self.proved and self.left() > end:
            gap = self.clients.round_down(self.dual.bound) - self.worth
            limit = min(self._limit, (1 + 1e-9) * gap)
            if limit <= self._combined:
                break
            found = choose(self.clients, self.dual, limit, self.held, self.left() - end)
            tried = True
            if found.held is not None:
                self.adopt(Assignment.from_mask(found.held))
            self.claim = min(self.claim, max(self.clients.round_down(found.bound), self.worth))
            self._combined, self._limit = limit, _WIDEN * limit
            if not math.isfinite(found.bound):
                break
        return tried
