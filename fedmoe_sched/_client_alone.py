"""One client arranged anew, all others as they are: what that gains with a bound wider than it is."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, row_blocks
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import OPTIMALITY_GAP, choice_bounds
from fedmoe_sched.knapsack_bound import ChoiceBounds, Knapsacks, budgeted_responses
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import BUDGET_TOLERANCE

__all__ = ["ClientsAlone", "client_alone"]

_CANDIDATES = 64  # clients of whom one more place at an expert is tried


def client_alone(problem: AssignmentProblem, client: int, others: IntArray) -> AssignmentProblem:
    """Return the problem of one client, where all others make up such loads; scores count what a load costs."""
    scores = problem.desirability[client].astype(np.float64)
    if problem.load_penalty is not None:
        scores -= problem.load_penalty.marginal_of(np.arange(problem.n_experts), others + 1)
    return problem.restrict(
        [client],
        desirability=scores[None],
        load_min=np.maximum(problem.load_min - others, 0),
        load_max=np.maximum(problem.load_max - others, 0),
        load_penalty=None,
    )


class _Parts(NamedTuple):
    """What some clients have, may take and must keep, each of shape (clients, m); scores count what loads cost."""

    scores: FloatArray
    held: BoolArray
    open: BoolArray
    must: BoolArray


class ClientsAlone:
    """Gains of single clients of a feasible assignment of a problem with budgets.

    Parameters
    ----------
    problem : AssignmentProblem
    pairs : Assignment
        Feasible.
    """

    def __init__(self, problem: AssignmentProblem, pairs: Assignment) -> None:
        self.problem, self.loads, self.counts = problem, pairs.loads, pairs.counts
        self._held = pairs.mask()
        experts, penalty = np.arange(problem.n_experts), problem.load_penalty
        # What the last client of each expert costs, and one more.
        self._last = self._next = np.zeros(problem.n_experts)
        if penalty is not None:
            self._last = penalty.marginal_of(experts, np.maximum(self.loads, 1))
            self._next = penalty.marginal_of(experts, self.loads + 1)

    def held(self, client: int) -> BoolArray:
        """Return which experts a client has; shape (m,), bool."""
        row: BoolArray = self._held[client]
        return row

    def gains(self, wider: AssignmentProblem) -> FloatArray:
        """Return what each client gains at least where its bounds are those of `wider`; shape (n,), >= 0.

        Only bounds of clients may differ from those of the problem.
        """
        every = np.arange(self.problem.n_clients)
        return self._gains(wider, every)

    def places(self) -> FloatArray:
        """Return what one more place at each expert gains at least; shape (m,).

        Of clients that could take it, those are tried that would gain the most if budgets did not count.
        """
        rows = []
        for expert in np.flatnonzero(self.loads == self.problem.load_max).tolist():
            could = ~self._held[:, expert] & (self.counts <= self.problem.capacity)
            if self.problem.eligible is not None:
                could &= self.problem.eligible[:, expert]
            clients = np.flatnonzero(could)
            hope = self.problem.desirability[clients, expert] - self._cheapest[clients]
            best = np.argsort(-hope, kind="stable")[:_CANDIDATES]
            rows.append(np.stack([clients[best], np.full(len(best), expert)]))
        gains = np.zeros(self.problem.n_experts)
        if rows:
            clients, experts = np.concatenate(rows, axis=1)
            np.maximum.at(gains, experts, self._gains(self.problem, clients, free=experts))
        return gains

    def releases(self) -> FloatArray:
        """Return what one client less that each expert must get gains at least; shape (m,)."""
        tight = (self.loads == self.problem.load_min) & (self.loads > 0)
        clients, experts = np.nonzero(self._held & tight)
        gains = np.zeros(self.problem.n_experts)
        np.maximum.at(gains, experts, self._gains(self.problem, clients, loose=experts))
        return gains

    @cached_property
    def _cheapest(self) -> FloatArray:
        """What a client would give up for one expert more, budgets aside; shape (n,)."""
        scores = np.where(self._held, self.problem.desirability.astype(np.float64), np.inf).min(axis=1)
        return np.where(self.counts < self.problem.capacity, 0.0, np.where(np.isfinite(scores), scores, 0.0))

    def _gains(
        self,
        wider: AssignmentProblem,
        clients: IntArray,
        free: IntArray | None = None,
        loose: IntArray | None = None,
    ) -> FloatArray:
        gains = np.zeros(len(clients))
        bounds = choice_bounds(wider, slice(0, wider.n_clients))
        for block in row_blocks((len(clients), wider.n_experts)):
            some = clients[block]
            parts = self._parts(
                some, None if free is None else free[block], None if loose is None else loose[block]
            )
            gains[block] = self._gains_of(wider, some, bounds, parts)
        return gains

    def _parts(self, clients: IntArray, free: IntArray | None, loose: IntArray | None) -> _Parts:
        problem, row = self.problem, np.arange(len(clients))
        held = self._held[clients]
        scores = problem.desirability[clients].astype(np.float64) - np.where(held, self._last, self._next)
        others = self.loads - held
        open_, must = others < problem.load_max, held & (others < problem.load_min)
        if free is not None:
            open_[row, free] = True
        if loose is not None:
            must[row, loose] = False
        if problem.eligible is not None:
            open_ &= problem.eligible[clients]
        return _Parts(scores, held, open_, must)

    def _gains_of(
        self, wider: AssignmentProblem, clients: IntArray, bounds: ChoiceBounds, parts: _Parts
    ) -> FloatArray:
        scores, held, open_, must = parts
        inside = np.stack([must[:, experts].sum(axis=1) for experts in bounds.members], axis=1)
        forced = must.sum(axis=1)
        left = ChoiceBounds(
            bounds.members,
            np.maximum(bounds.low[clients] - inside, 0),
            bounds.high[clients] - inside,
            np.maximum(bounds.least[clients] - forced, 0),
            bounds.most[clients] - forced,
        )
        resources = []
        for resource in wider.budgets:
            sizes, allowed = resource.sizes_of(clients), resource.allowed[clients]
            taken = np.where(must, sizes, 0.0).sum(axis=1)
            room = np.where(
                taken > 0, (allowed - taken) - 1e-12 * np.where(np.isfinite(allowed), allowed, 0), allowed
            )
            resources.append(Knapsacks(sizes, np.maximum(room, 0.0)))
        reduced = np.where(open_ & ~must, scores, -np.inf)
        found = budgeted_responses(reduced, left, resources).lower
        kept = np.where(must, scores, 0.0).sum(axis=1)
        now = np.where(held, scores, 0.0).sum(axis=1)
        gain = np.where(np.isfinite(found), found + kept - now, 0.0)
        return np.where(gain > OPTIMALITY_GAP * np.maximum(1.0, np.abs(now)), gain, 0.0)

    def smallest_steps(self) -> FloatArray:
        """Return how much more of each resource lets a client gain by one expert; see `BudgetSensitivity`.

        Returns
        -------
        ndarray, shape (R, n), float64
        """
        problem = self.problem
        bounds = choice_bounds(problem, slice(0, problem.n_clients))
        steps: FloatArray = np.full((len(problem.budgets), problem.n_clients), np.inf)
        for block in row_blocks(problem.shape):
            clients = np.arange(block.start, block.stop)
            parts = self._parts(clients, None, None)
            self._shorten(steps[:, block], clients, bounds, parts)
        return steps

    def _shorten(self, steps: FloatArray, clients: IntArray, bounds: ChoiceBounds, parts: _Parts) -> None:
        """Try to add each expert, alone or in exchange for each that is held, and note what is missing for it."""
        scores, held, open_, must = parts
        row = np.arange(len(clients))
        layer_of = np.empty(self.problem.n_experts, dtype=np.int64)
        for layer, experts in enumerate(bounds.members):
            layer_of[experts] = layer
        inside = np.stack([held[:, experts].sum(axis=1) for experts in bounds.members], axis=1)
        more = (inside < bounds.high[clients])[:, layer_of]
        less = (inside > bounds.low[clients])[:, layer_of]
        below = self.counts[clients] < bounds.most[clients]
        noise = OPTIMALITY_GAP * np.maximum(1.0, np.abs(np.where(held, scores, 0.0).sum(axis=1)))[:, None]
        sizes = [resource.sizes_of(clients) for resource in self.problem.budgets]
        allowed = [resource.budget[clients][:, None] for resource in self.problem.budgets]
        used = [np.where(held, size, 0.0).sum(axis=1)[:, None] for size in sizes]
        order = np.argsort(~held, axis=1, kind="stable")
        for rank in range(-1, int(held.sum(axis=1).max(initial=0))):
            given: FloatArray = np.zeros((len(clients), 1))
            if rank < 0:
                could = more & below[:, None]
            else:
                out = order[:, rank]
                given = scores[row, out][:, None]
                same = layer_of[out][:, None] == layer_of
                could = same | (more & less[row, out][:, None])
                could &= (held & ~must)[row, out][:, None]
            could &= open_ & ~held & (scores - given > noise)
            missing = []
            for size, limit, now in zip(sizes, allowed, used, strict=True):
                after = now + size - (0.0 if rank < 0 else size[row, out][:, None])
                missing.append(np.where(after > limit * (1 + BUDGET_TOLERANCE), after - limit, 0.0))
            for resource, step in enumerate(steps):
                alone = could.copy()
                for other, amount in enumerate(missing):
                    if other != resource:
                        alone &= amount == 0
                np.minimum(step, np.where(alone, missing[resource], np.inf).min(axis=1), out=step)
