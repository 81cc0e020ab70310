"""Exact schedules from expert prices: Newton steps on sampled clients, then shortest paths between experts."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, IntArray, read_only
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver

__all__ = ["SuccessiveShortestPaths"]

_GROWTH = 8  # clients of one sampled level over those of the level below
_FIRST_LEVEL = 1024  # clients of the smallest sampled level, at least
_DIRECT_CELLS = 4096  # problems up to this many pairs go straight to the shortest paths
_STALLED = 10  # Newton steps without a tenth less surplus before paths take over
_PROBED = 2048  # clients looked at to tell whether scores are quantised
_BLOCK_CLIENTS = 8192  # unit of work of a thread
_CELLS_PER_PATH = 32_000  # a Newton step over this many pairs takes about as long as one shortest path
_MOST_NEWTON_STEPS = 40  # of one level
_TILT = 2.0**-36  # size of the perturbation that parts ties, relative to the largest score

_MOST_EXPERTS = np.iinfo(np.int16).max  # the hub is a node too, and nodes are kept as 16-bit numbers

_ALL_ELIGIBLE = read_only(np.zeros((0, 0), dtype=np.bool_))

Prices = npt.NDArray[np.float64]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    start: Prices | None
    seed: int
    threads: int
    prices: Prices | None = None
    assignment: Assignment | None = None


class SuccessiveShortestPaths(Solver[_Model]):
    """Exact schedules from dual prices of the experts, in a few passes over the scores.

    Under given prices every client's best choice is its own affair, so the dual of the round problem has one
    variable per expert, however many clients there are. Two phases: (1) regularised Newton steps on the dual
    (Levenberg 1944; Marquardt 1963), whose Hessian is the density of clients that are nearly indifferent between
    two experts, on random samples of clients that grow eightfold up to all of them; (2) successive shortest paths
    (Ahuja, Magnanti and Orlin, *Network Flows*, section 9.7) on the exchange graph of m + 1 nodes, whose arcs are
    the nearly indifferent clients, which ends at an optimal assignment and optimal prices. Arcs are left out only
    while the prices provably cannot make them matter.

    Quantised scores make large sets of clients that are exactly indifferent; a perturbation of rank one, of
    2**-36 of the largest score, orders them. The certificate is computed from the true scores all the same.
    The kernels are compiled when they are first used, and kept on disk; the run cannot be interrupted.
    """

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.PRICES,
        Capability.WARM_START,
        Capability.THREADS,
    }
    requires: ClassVar[tuple[str, ...]] = ("numba",)
    summary: ClassVar[str] = "own price-based solver; exact and by far the fastest from a few thousand clients on"

    def supports(self, problem: AssignmentProblem) -> str | None:
        """Return None, or the reason why this backend does not take `problem`."""
        if problem.n_experts >= _MOST_EXPERTS:
            return f"{self.name} takes fewer than {_MOST_EXPERTS} experts, not {problem.n_experts}"
        return super().supports(problem)

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Load the compiled kernels; there is no model apart from the problem."""
        from fedmoe_sched.solvers import _price_kernels  # noqa: F401

        return _Model(problem, prices, limits.seed, limits.threads or os.cpu_count() or 1)

    def run(self, model: _Model, limits: Limits) -> None:
        """Climb from small samples to all clients, then settle."""
        problem = model.problem
        n, m = problem.shape
        if (problem.min_experts > problem.slots).any() or (problem.load_min > n).any():
            return
        rng = np.random.default_rng(model.seed)
        tilt = _Tilt.for_problem(problem, rng)
        prices = np.zeros(m) if model.start is None else model.start.astype(np.float64)
        with ThreadPoolExecutor(model.threads) as pool:
            sizes = [] if model.start is not None else _sample_sizes(n, m)
            for size in [*sizes, n]:
                level = _Level(problem, tilt, _sample(n, size, rng) if size < n else None, pool)
                if n * m <= _DIRECT_CELLS and model.start is None:
                    level.respond(prices)
                    break
                if model.start is None and size == min([*sizes, n]):
                    for scale in tilt.scales:
                        prices = level.approach(prices, scale)
                prices = level.approach(prices)
                if tilt.parts_ties and size < n:
                    settled = level.settle()
                    prices = prices if settled is None else settled[0]
            settled = level.settle()
        if settled is not None:
            model.prices, model.assignment = settled

    def read(self, model: _Model) -> Answer:
        """Hand over the assignment and its prices."""
        if model.assignment is None:
            return Answer(StopReason.PROVED_INFEASIBLE)
        return Answer(StopReason.COMPLETED, model.assignment, model.prices)


def _sample_sizes(n: int, m: int) -> list[int]:
    """Sizes of the sampled levels, ascending."""
    sizes: list[int] = []
    size = n // _GROWTH
    while size >= max(_FIRST_LEVEL, 16 * m):
        sizes.append(size)
        size //= _GROWTH
    return sizes[::-1]


def _sample(n: int, size: int, rng: np.random.Generator) -> IntArray:
    """Draw distinct clients, ascending, with a chance of `size` / n each."""
    return np.flatnonzero(rng.random(n, dtype=np.float32) < size / n)


@dataclass(frozen=True, eq=False)
class _Tilt:
    """Perturbation ``along[i] * across[j]`` of the scores, to part ties.

    Parameters
    ----------
    along : ndarray, shape (n,)
    across : ndarray, shape (m,)
    finest : float
        Differences of scores below this are not told apart.
    scales : tuple of float
        Multiples of the perturbation, descending from the quantum of the scores: larger ones smooth the dual,
        whose kinks are as far apart as the quantum. Empty without a perturbation.
    """

    along: Prices
    across: Prices
    finest: float
    scales: tuple[float, ...] = ()

    @classmethod
    def for_problem(cls, problem: AssignmentProblem, rng: np.random.Generator) -> _Tilt:
        """Draw a perturbation; zero unless the scores are quantised, which a probe of the clients tells."""
        n, m = problem.shape
        probe = problem.desirability[:: max(1, n // _PROBED)].astype(np.float64)
        size = (float(abs(probe).max()) or 1e-12) * _TILT
        finest = max(size / 256, float(np.finfo(np.float64).tiny))
        values = np.unique(probe[:, 0])
        if len(values) > len(probe) / 2:
            return cls(np.zeros(n), np.zeros(m), finest)
        quantum = float(np.diff(values).max(initial=0.0))
        scales = tuple(quantum / size / 16.0**step for step in range(4)) if quantum > 0 and size > 0 else ()
        return cls(size * rng.random(n), rng.permutation(np.linspace(-1.0, 1.0, m)), finest, scales)

    @property
    def parts_ties(self) -> bool:
        """Whether there are ties to part."""
        return bool(self.across.any())


class _Level:
    """One sample of the clients, or all of them, with their best responses to the prices."""

    def __init__(
        self,
        problem: AssignmentProblem,
        tilt: _Tilt,
        rows: IntArray | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        from fedmoe_sched.solvers import _price_kernels

        self._kernels = _price_kernels
        self._problem = problem
        n, m = problem.shape
        share = 1.0 if rows is None else len(rows) / n
        self._rows = np.arange(n) if rows is None else rows
        # Copies, always: a kernel is compiled once more for arrays that are read-only.
        self._least = problem.min_experts[self._rows]
        self._most = problem.slots[self._rows]
        self._tilt = tilt
        self._along = tilt.along if rows is None else tilt.along[rows]
        self._load_min = np.floor(problem.load_min * share).astype(np.int64)
        self._load_max = np.ceil(np.minimum(problem.load_max, n) * share).astype(np.int64)
        # Loads of a sample scatter by about the square root: it is useless to balance them any better.
        noise = 0.25 * float(np.sqrt(self._load_max).sum())
        self._close_enough = _paths_per_step(n, m) if rows is None else noise
        self._pool = pool
        size = len(self._rows)
        widest = max(1, int(self._most.max(initial=1)))
        self._choice = np.empty((size, widest), dtype=np.int16)
        self._count = np.empty(size, dtype=np.int16)
        self._slack = np.empty(size, dtype=np.float32)
        self._arcs = np.empty((size, 2), dtype=np.int16)
        self._loads = np.zeros(m, dtype=np.int64)
        self._prices = np.zeros(m)
        self._value = 0.0

    def respond(self, prices: Prices, scale: float = 1.0) -> None:
        """Let every client play its best response to `prices`, with a multiple of the perturbation."""
        size = len(self._rows)
        # The blocks do not depend on the number of threads, and so neither does any rounding.
        starts = range(0, size, _BLOCK_CLIENTS)
        loads = np.zeros((len(starts), self._problem.n_experts), dtype=np.int64)
        eligible = self._problem.eligible
        if eligible is None:
            eligible = _ALL_ELIGIBLE
        potential = np.append(prices, 0.0)
        across = scale * self._tilt.across

        def block(at: int) -> float:
            value: float = self._kernels.respond(
                self._problem.desirability, eligible, self._rows, self._along, across,
                self._least, self._most, potential, self._choice, self._count, self._slack, self._arcs,
                loads[at], starts[at], min(size, starts[at] + _BLOCK_CLIENTS),
            )  # fmt: skip
            return value

        run = map if len(starts) == 1 else self._pool.map
        self._value = sum(run(block, range(len(starts))))
        self._loads = loads.sum(axis=0)
        self._prices = prices

    def _surplus(self) -> IntArray:
        """Load of each expert beyond what complementary slackness asks of it."""
        inside = np.clip(self._loads, self._load_min, self._load_max)
        wanted = np.where(self._prices > 0, self._load_max, np.where(self._prices < 0, self._load_min, inside))
        return self._loads - wanted

    def _dual(self) -> float:
        """Return the dual objective, the perturbation included."""
        p = self._prices
        return float(self._value + self._load_max @ np.maximum(p, 0) - self._load_min @ np.maximum(-p, 0))

    def approach(self, prices: Prices, scale: float = 1.0) -> Prices:
        """Improve the prices by Newton steps until paths are the cheaper way on; respond to the best ones."""
        self.respond(prices, scale)
        best, trust = (self._dual(), self._prices), 2.0
        surplus, fall = self._surplus(), None
        goal, stalled = 0.9 * abs(surplus).sum(), 0
        for _ in range(_MOST_NEWTON_STEPS):
            if abs(surplus).sum() / 2 <= self._close_enough or trust < 0.02 or stalled == _STALLED:
                break
            if fall is None:
                fall = self._density()
            step = self._newton_step(surplus, *fall, trust)
            self.respond(_keep_signs(best[1], step, surplus), scale)
            dual = self._dual()
            if dual < best[0]:
                best, trust = (dual, self._prices), min(32.0, 2 * trust)
                surplus, fall = self._surplus(), None
            else:
                trust /= 4
            stalled += 1
            if abs(surplus).sum() < goal:
                goal, stalled = 0.9 * abs(surplus).sum(), 0
        if self._prices is not best[1]:
            self.respond(best[1], scale)
        return best[1]

    def _density(self) -> tuple[npt.NDArray[np.float64], float]:
        """Clients per unit of price that are about to switch between two nodes, and the reach of the estimate."""
        m = self._problem.n_experts
        size = len(self._slack)
        wanted = min(size - 1, size // 2, max(16 * m, int(abs(self._surplus()).sum()) // 2, size // 16))
        reach = float(np.partition(self._slack, wanted)[wanted])
        near = self._arcs[(self._slack <= reach) & (self._arcs[:, 0] >= 0)].astype(np.int64)
        counts = np.bincount(near[:, 0] * (m + 1) + near[:, 1], minlength=(m + 1) ** 2).reshape(m + 1, m + 1)
        reach = max(reach, self._tilt.finest)
        return (counts + counts.T) / (2 * reach), reach

    def _newton_step(
        self, surplus: IntArray, density: npt.NDArray[np.float64], reach: float, trust: float
    ) -> Prices:
        """Solve for the price changes that would remove the surplus, none above `trust` times `reach`."""
        moving = np.flatnonzero((self._prices != 0) | (surplus != 0))
        laplacian = (np.diag(density.sum(axis=1)) - density)[np.ix_(moving, moving)]
        damping = 1e-3 * laplacian.trace() / len(moving) + 0.5 / reach
        step = np.zeros(len(surplus))
        while True:
            step[moving] = np.linalg.solve(laplacian + damping * np.eye(len(moving)), surplus[moving])
            if abs(step).max() <= trust * reach:
                return step
            damping *= 3

    def settle(self) -> tuple[Prices, Assignment] | None:
        """Find the optimum by shortest paths; None if there is no feasible assignment."""
        m = self._problem.n_experts
        size = len(self._rows)
        off = int(abs(self._surplus()).sum())
        wanted = min(4 * off + 4 * m, size // 4)
        window = float(np.partition(self._slack, wanted)[wanted])
        base = np.append(self._prices, 0.0)
        potential, loads = base.copy(), self._loads.copy()
        movers, held = np.zeros(0, dtype=np.int64), np.zeros((0, m), dtype=np.bool_)
        while True:
            near = np.flatnonzero(self._slack <= window)
            now = self._held(near)
            now[np.searchsorted(near, movers)] = held
            movers, held = near, now
            rows = self._rows[movers]
            scores = self._problem.desirability[rows].astype(np.float64)
            scores += self._along[movers, None] * self._tilt.across
            if self._problem.eligible is not None:
                scores[~self._problem.eligible[rows]] = -np.inf
            status = self._kernels.augment(
                scores, held, self._least[movers], self._most[movers], base, potential, loads,
                self._load_min, self._load_max, window,
            )  # fmt: skip
            if status == self._kernels.BALANCED:
                return potential[:m] - potential[m], self._assignment(movers, held)
            if window == np.inf:
                return None
            window = self._wider(window, len(movers))

    def _wider(self, window: float, movers: int) -> float:
        """Choose the next window: a multiple, or more for the sake of new movers; at last none."""
        widest = float(self._slack.max())
        if window >= widest:
            return np.inf
        # Ties part on a scale far below that of the scores: quick steps there, short ones where arcs are many.
        factor = 8.0 if window < 1e-4 * widest else 1.5
        wanted = min(len(self._slack) - 1, movers + 64)
        return max(factor * window, float(np.partition(self._slack, wanted)[wanted]))

    def _held(self, positions: IntArray) -> BoolArray:
        """Chosen experts of some clients as a boolean matrix."""
        held = np.zeros((len(positions), self._problem.n_experts), dtype=np.bool_)
        chosen = np.arange(self._choice.shape[1]) < self._count[positions, None]
        at, _ = np.nonzero(chosen)
        held[at, self._choice[positions][chosen]] = True
        return held

    def _assignment(self, movers: IntArray, held: BoolArray) -> Assignment:
        """Put the responses of those who stayed and the experts of those who moved together."""
        m, widest = self._problem.n_experts, self._choice.shape[1]
        self._count[movers] = held.sum(axis=1)
        self._choice[movers] = np.argsort(~held, axis=1, kind="stable")[:, :widest]
        chosen = np.arange(widest) < self._count[:, None]
        ascending = np.sort(np.where(chosen, self._choice, m), axis=1)
        indptr = np.zeros(len(self._rows) + 1, dtype=np.int64)
        np.cumsum(self._count, out=indptr[1:])
        return Assignment(indptr, ascending[chosen].astype(np.int64), m)


def _paths_per_step(n: int, m: int) -> float:
    """Return how many shortest paths take as long as a Newton step: a pass over all pairs and some algebra."""
    return n * m / _CELLS_PER_PATH + m / 2


def _keep_signs(prices: Prices, step: Prices, surplus: IntArray) -> Prices:
    """Take the step, but stop at zero: a price changes sign only by way of zero, where the load bound changes."""
    moved = prices + step
    moved[moved * prices < 0] = 0.0
    moved[(prices == 0) & (step * surplus < 0)] = 0.0
    return moved
