"""The clients that the exact price backend looks at: samples, all of them, and those that may still move."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, read_only
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solvers._compile import compiling
from fedmoe_sched.solvers._newton_kernels import NOTHING, newton_step, quantile, surplus
from fedmoe_sched.solvers._path_kernels import BALANCED, OUT_OF_ROOM, augment, jump
from fedmoe_sched.solvers._response_kernels import (
    candidates,
    exchange_costs,
    keep_rows,
    respond,
    respond_rows,
    write_rows,
)
from fedmoe_sched.solvers._rows import gather, readable
from fedmoe_sched.solvers._ties import Ties

__all__ = ["Level", "Prices", "Run", "Values", "load_kernels"]

_STALLED = 4  # Newton steps without a tenth less surplus before paths take over
_MOST_NEWTON_STEPS = 40
_MOST_TRUST = 64.0  # in units of the reach
_BLOCK_CLIENTS = 8192  # unit of work of a thread
_MOST_BLOCKS = 16  # of passes that need a matrix of costs, or a list of candidates, for each block
_CELLS_PER_MICROSECOND = 8000  # of a Newton step, which looks again at few of the clients
_CANDIDATES_PER_MICROSECOND = 50
_MOST_MOVERS = 50_000
_MANY = 20.0  # times the surplus that paths deal with as fast as a Newton step
_MOST_JUMPS = 16  # of one level before they are taken for steps on a finer lattice
_TOO_MANY_JUMPS = 500  # to go on like this: look at all exchanges at once
_CANDIDATES = 4  # times the most experts of any client: room enough for most lists
_FIRST_ARCS = 16  # of each pair of experts, beside those for what is out of place
_SPARE_ARCS = 65_536  # that clients may gain by moving before the graph is made anew
_TIE_WINDOW = 16.0  # exchanges between ties cost less than this, in units of the perturbation

_ALL_ELIGIBLE = read_only(np.zeros((0, 0), dtype=np.bool_))

Prices: TypeAlias = npt.NDArray[np.float64]
#: Net values of a block of clients: scores, eligible, table and size of the noise, first client, prices.
Values: TypeAlias = tuple[FloatArray, BoolArray, Prices, float, int, Prices]
#: Runs a function on block numbers, in threads or not.
Run: TypeAlias = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]


class _Clients:
    """What Newton's method needs of clients: their response to prices, and which are nearly indifferent."""

    penalty: Any
    prices: Prices
    loads: IntArray
    load_min: IntArray
    load_max: IntArray
    excess: IntArray
    slack: npt.NDArray[np.float32]
    arcs: npt.NDArray[np.int16]
    close_enough: float
    finest: float
    reach: float

    def respond(self, prices: Prices) -> int:
        """Let every client play its best response; return the surplus."""
        raise NotImplementedError

    def surplus(self) -> int:
        """Compare the loads with what complementary slackness asks for; return the sum of the differences."""
        return int(surplus(self.penalty, self.prices, self.loads, self.load_min, self.load_max, self.excess))

    def approach(self, furthest: float = np.inf) -> int:
        """Improve the prices by Newton steps until paths are the cheaper way on; return the surplus.

        Parameters
        ----------
        furthest : float
            Stop before the prices move by more than this against one another.
        """
        base = self.prices
        off = self.surplus()
        trust, goal, stalled = 8.0, 0.9 * off, 0
        bounds = (self.load_min, self.load_max)
        for _ in range(_MOST_NEWTON_STEPS):
            if off / 2 <= self.close_enough or trust < 0.02 or stalled == _STALLED:
                break
            prices = self.prices
            moved = np.empty(len(prices))
            self.reach = newton_step(
                self.penalty, prices, self.loads, *bounds, self.excess, self.slack, self.arcs, self.finest, trust,
                moved,
            )  # fmt: skip
            step = moved - prices
            if _spread(moved - base) > furthest:
                break
            slope = float(step @ self.excess)
            off_there = self.respond(moved)
            slope_there = float(step @ self.excess)
            if slope_there >= -0.5 * slope:
                # The dual is convex: where its slope along the step has hardly turned, it is lower.
                off = off_there
                if slope_there > 0.9 * slope and trust == _MOST_TRUST:
                    break  # a ray, whose end is far off on this scale
                trust = min(_MOST_TRUST, (4 if slope_there > 0.5 * slope else 2) * trust)
            else:
                off = self.respond(prices + step * (slope / (slope - slope_there)))
                trust /= 2
                if float(step @ self.excess) < -0.5 * slope:
                    off = self.respond(prices)
                    trust /= 4
            stalled += 1
            if off < goal:
                goal, stalled = 0.9 * off, 0
        return off


class Level(_Clients):
    """One sample of the clients, or all of them, with their best responses to the prices."""

    def __init__(self, problem: AssignmentProblem, ties: Ties, rows: IntArray | None, run: Run) -> None:
        n, m = problem.shape
        size = n if rows is None else len(rows)
        self._scores, self._eligible = problem.desirability, problem.eligible
        least, most = problem.min_experts, problem.slots
        low, high = problem.load_min, np.minimum(problem.load_max, n)
        self.close_enough = _paths_per_step(n * m / _CELLS_PER_MICROSECOND, m)
        if rows is not None:
            self._scores, self._eligible = gather(problem, rows)
            least, most = least[rows], most[rows]
            low = np.floor(low * (size / n)).astype(np.int64)
            high = np.ceil(high * (size / n)).astype(np.int64)
            # Loads of a sample scatter by about the square root: it is useless to balance them any better.
            self.close_enough = 0.25 * float(np.sqrt(high).sum())
        # Copies, always: a kernel is compiled once more for arrays that are read-only.
        self.least, self.most = least.astype(np.int16), most.astype(np.int16)
        self.load_min, self.load_max = low.copy(), high.copy()
        self.penalty = _penalty(problem)
        self.ties, self.finest = ties, ties.finest
        self.tie_window = _TIE_WINDOW * ties.size
        self._jumps = 0
        self._release: Callable[[slice], None] = problem.release if rows is None else _keep
        self._whole = problem if rows is None else None
        self._noise = ties.size
        self._run = run
        widest = max(1, int(self.most.max(initial=1)))
        self.choice = np.empty((size, widest), dtype=np.int16)
        self.count = np.zeros(size, dtype=np.int16)
        self.slack = np.full(size, -1.0, dtype=np.float32)
        self.arcs = np.empty((size, 2), dtype=np.int16)
        self.loads = np.zeros(m, dtype=np.int64)
        self.excess = np.zeros(m, dtype=np.int64)
        self.prices = np.zeros(m)
        self.reach = 0.0

    def _in_blocks(self, kernel: Callable[..., Any], most_blocks: int | None = None) -> list[Any]:
        """Call ``kernel(number, part, scores, eligible, first)`` for every block of clients."""
        size = len(self.slack)
        step = max(_BLOCK_CLIENTS, 0 if most_blocks is None else -(-size // most_blocks))

        def block(number: int) -> Any:
            start = number * step
            part = slice(start, min(size, start + step))
            eligible = _ALL_ELIGIBLE if self._eligible is None else self._eligible[part]
            result = kernel(number, part, readable(self._scores[part]), eligible, start)
            self._release(part)
            return result

        numbers = range(-(-size // step))
        return list(map(block, numbers) if len(numbers) == 1 else self._run(block, numbers))

    def respond(self, prices: Prices, noise: float | None = None) -> int:
        """Let every client play its best response, with a noise of the size of that of the ties unless given."""
        noise = self.ties.size if noise is None else noise
        # The noise moves two experts against each other by at most its size.
        drift = _spread(prices - self.prices) + abs(noise - self._noise)
        drift += 1e-15 * float(abs(prices).max() + abs(self.prices).max())
        settled = drift + 2 * self.reach
        loads = np.zeros((-(-len(self.slack) // _BLOCK_CLIENTS), len(prices)), dtype=np.int64)

        def block(number: int, part: slice, scores: FloatArray, eligible: BoolArray, first: int) -> None:
            self._choose(
                part, (scores, eligible, self.ties.table, noise, first, prices), drift, settled, loads[number]
            )

        self._in_blocks(block)
        self.loads += loads.sum(axis=0)
        self.prices, self._noise = prices, noise
        return self.surplus()

    def _choose(self, part: slice, values: Values, drift: float, settled: float, loads: IntArray) -> None:
        """Let a block of clients respond to the net values; see `_response_kernels.respond`."""
        respond(
            *values, self.least[part], self.most[part], drift, settled, self.choice[part], self.count[part],
            self.slack[part], self.arcs[part], loads,
        )  # fmt: skip

    def respond_smoothly(self, prices: Prices) -> None:
        """Let the first clients choose: with a noise as large as the steps of the scores at first, then less."""
        for noise in (self.ties.quantum, self.ties.quantum / 16) if self.ties.quantum else (self.ties.size,):
            self.respond(prices, noise)
            self.approach()
            prices = self.prices
        self.respond(prices)

    def settle(self, window: float = 0.0, *, only_prices: bool = False) -> bool:
        """Find the optimum; False if there is no feasible assignment.

        Parameters
        ----------
        window : float
            At first, leave no exchange out that costs less than this.
        only_prices : bool
            Be content with prices that are as good as the sample.
        """
        if window < np.inf and not self.ties.size:
            self.approach()
            if only_prices:
                return True
        if self._hopeless():
            return False
        while True:
            window = max(window, self._window())
            status, movers = self._move(window)
            if status == BALANCED:
                return True
            if window == np.inf:
                return False
            wider = self._wider(movers, window)
            if wider > 0:
                window = wider
                continue
            off = self._jump()
            if off < 0:
                return False
            if self._jumps > _TOO_MANY_JUMPS:
                window = np.inf
            elif self.ties.size:
                window = 0.0  # exchanges that were far off may be ties now
            elif off > 2 * self.close_enough:
                self.respond(self.prices)
                self.approach()

    def _move(self, window: float) -> tuple[int, int]:
        """Move clients with a slack of at most `window` along shortest paths.

        Returns
        -------
        status : int
            Of `_path_kernels.augment`.
        movers : int
            How many clients might have moved.
        """
        movers = _Movers(self, window, *self.candidates(window))
        status = movers.settle()
        self._take(movers)
        return status, len(movers.positions)

    def _jump(self) -> int:
        """Move the prices to where the cheapest exchanges of all clients lead on.

        Returns
        -------
        int
            How much load is out of place; -1 if no exchanges lead to where it is missing.
        """
        potential = np.append(self.prices, 0.0)
        off = jump(self.penalty, self._exchange_costs(), potential, self.loads, self.load_min, self.load_max)
        if off < 0:
            return -1
        before = self.prices
        self._go_to(potential[:-1] - potential[-1])
        self._jumps += 1
        jumped = _spread(self.prices - before)
        if jumped < self.ties.quantum / 64 or not self.ties.quantum or self._jumps > _MOST_JUMPS:
            # A second lattice, far finer than the first one: from rounding equal steps, or from a penalty.
            self.tie_window = max(self.tie_window, 4 * jumped)
        return int(off)

    def _hopeless(self) -> bool:
        """Whether the bounds exclude one another; looked into only where Newton's method leaves a lot to do."""
        if self._whole is None or abs(self.excess).sum() <= _MANY * self.close_enough:
            return False
        return find_conflict(self._whole) is not None

    def _window(self) -> float:
        """Choose which exchanges to look at first: enough of them for what is out of place, or all ties."""
        if self.ties.size:
            return self.tie_window
        size, m = len(self.slack), len(self.prices)
        wanted = 8 * int(abs(self.excess).sum()) + 8 * m
        return max(quantile(self.slack, min(wanted, size // 2)), self.finest)

    def _wider(self, movers: int, window: float) -> float:
        """Choose the next window: one with twice the clients; 0 if that is too many or too wide: jump."""
        size = len(self.slack)
        if movers > _MOST_MOVERS + size // 8:
            return 0.0
        if movers >= np.count_nonzero(self.slack < NOTHING):
            return np.inf
        wider = max(2 * window, quantile(self.slack, min(size - 1, 2 * movers + 64)))
        return wider if wider < 64 * window else 0.0

    def _take(self, movers: _Movers) -> None:
        """Take over what the movers found."""
        keep_rows(movers.positions, movers.indptr, movers.expert, movers.held, self.choice, self.count)
        self.loads = movers.loads
        self._go_to(movers.prices)
        self.slack[movers.positions] = 0.0

    def _go_to(self, prices: Prices) -> None:
        """Move to prices under which what the clients hold is still a best response."""
        drift = _spread(prices - self.prices) * (1 + 1e-6)
        self.slack -= np.float32(min(drift, float(np.finfo(np.float32).max)))
        np.maximum(self.slack, 0, out=self.slack)
        self.prices = prices
        self.surplus()

    def candidates(self, window: float) -> tuple[IntArray, IntArray, tuple[Any, ...]]:
        """List the clients with a slack of at most `window`, and their candidates; see `_path_kernels.augment`."""
        sizes = np.zeros(len(self.slack), dtype=np.int64)

        def block(number: int, part: slice, scores: FloatArray, eligible: BoolArray, first: int) -> list[Any]:
            near = int(np.count_nonzero(self.slack[part] <= window))
            # What is never written to takes no memory.
            found = near * min(len(self.prices), _CANDIDATES * self.choice.shape[1])
            room = -1
            while found > room:
                room = found
                lists: list[Any] = [np.empty(room, kind) for kind in (np.int16, np.float64, np.bool_)]
                found = candidates(
                    scores, eligible, self.ties.table, self.ties.size, first, self.prices, self.least[part],
                    self.most[part], self.choice[part], self.count[part], self.slack[part], self.arcs[part],
                    window, sizes[part], *lists,
                )  # fmt: skip
            return [values[:found] for values in lists]

        by_kind = zip(*self._in_blocks(block, _MOST_BLOCKS), strict=True)
        positions = np.flatnonzero(sizes)
        return positions, sizes[positions], tuple(map(np.concatenate, by_kind))

    def _exchange_costs(self) -> Prices:
        """Find the cheapest exchanges of all clients at the prices as they are."""
        nodes = len(self.prices) + 1
        costs = np.full((_MOST_BLOCKS, nodes, nodes), np.inf)

        def block(number: int, part: slice, scores: FloatArray, eligible: BoolArray, first: int) -> None:
            values = (scores, eligible, self.ties.table, self.ties.size, first, self.prices)
            self._note_costs(part, values, costs[number])

        self._in_blocks(block, _MOST_BLOCKS)
        least: Prices = costs.min(axis=0)
        return least

    def _note_costs(self, part: slice, values: Values, costs: Prices) -> None:
        """Note the cheapest exchanges of a block of clients; see `_response_kernels.exchange_costs`."""
        exchange_costs(*values, self.least[part], self.most[part], self.choice[part], self.count[part], costs)

    def settle_directly(self, prices: Prices) -> Assignment | None:
        """Find the optimum of a small problem with a list of all pairs, in as few steps as possible."""
        n, m = len(self.count), len(prices)
        scores, everyone = self._scores.astype(np.float64), np.arange(n)
        if self._eligible is None:
            sizes, experts = np.full(n, m), np.tile(np.arange(m, dtype=np.int16), n)
            scores = scores.reshape(-1)
        else:
            sizes, experts = self._eligible.sum(axis=1), np.nonzero(self._eligible)[1].astype(np.int16)
            scores = scores[self._eligible]
        movers = _Movers(self, np.inf, everyone, sizes, (experts, scores, np.zeros(len(experts), dtype=np.bool_)))
        movers.respond(prices)
        if movers.settle() != BALANCED:
            return None
        self.prices = movers.prices
        indptr = np.zeros(n + 1, dtype=np.int64)
        np.cumsum(movers.count, out=indptr[1:])
        return Assignment(indptr, experts[movers.held].astype(np.int64), m)

    def assignment(self) -> Assignment:
        """Return the choices of all clients."""
        indptr = np.zeros(len(self.count) + 1, dtype=np.int64)
        np.cumsum(self.count, out=indptr[1:])
        indices = np.empty(indptr[-1], dtype=np.int64)
        write_rows(self.choice, self.count, indptr, indices)
        return Assignment(indptr, indices, len(self.prices))


class _Movers(_Clients):
    """The clients of a level that may still change their minds, with the few experts that come into question."""

    def __init__(
        self, level: Level, window: float, positions: IntArray, sizes: IntArray, lists: tuple[Any, ...]
    ) -> None:
        self.window, self.positions = window, positions
        self.expert, self.score, self.held = lists
        self.indptr = np.zeros(len(sizes) + 1, dtype=np.int64)
        np.cumsum(sizes, out=self.indptr[1:])
        self.count = level.count[positions]
        self.least, self.most = level.least[positions], level.most[positions]
        self.slack, self.arcs = level.slack[positions], level.arcs[positions]
        self.penalty, self.load_min, self.load_max = level.penalty, level.load_min, level.load_max
        self.prices, self.loads, self.excess = level.prices, level.loads.copy(), level.excess.copy()
        self.ties, self.finest, self.reach = level.ties, level.finest, 0.0
        self.close_enough = _paths_per_step(len(self.score) / _CANDIDATES_PER_MICROSECOND, len(self.prices))

    def respond(self, prices: Prices) -> int:
        """Let every mover play its best response."""
        respond_rows(
            self.indptr, self.expert, self.score, self.held, self.count, self.least, self.most, prices,
            self.slack, self.arcs, self.loads,
        )  # fmt: skip
        self.prices = prices
        return self.surplus()

    def settle(self) -> int:
        """Move along shortest paths; return a status of `_path_kernels.augment`."""
        base, window = self.prices, self.window
        if self.ties.size and window < 1e6 * self.ties.size:
            self.approach(window / 2)
            window -= _spread(self.prices - base)
        m = len(self.prices)
        owner = np.repeat(np.arange(len(self.positions), dtype=np.int32), np.diff(self.indptr))
        potential = np.append(self.prices, 0.0)
        base = potential.copy()
        enough = _FIRST_ARCS + int(abs(self.excess).sum()) // m
        # At least one path fits in: each of its clients gains up to three arcs per candidate.
        spare = _SPARE_ARCS + 3 * m * (m + 1)
        status = OUT_OF_ROOM
        while status == OUT_OF_ROOM:
            status = augment(
                self.penalty, self.indptr, owner, self.expert, self.score, self.held, self.count, self.least,
                self.most, base, potential, self.loads, self.load_min, self.load_max, window, enough, spare,
            )  # fmt: skip
        self.prices = potential[:m] - potential[m]
        return int(status)


@cache
def load_kernels(dtype: npt.DTypeLike) -> None:
    """Call every kernel once with scores of this type: it is loaded from disk then, or compiled."""
    problem = AssignmentProblem(np.arange(8, dtype=dtype).reshape(4, 2), 1, load_max=3)
    with compiling():
        level = Level(problem, Ties.none(2), None, map)
        level.respond(np.zeros(2))
        level.surplus()
        level.approach()
        newton_step(
            level.penalty, level.prices, level.loads, level.load_min, level.load_max, level.excess, level.slack,
            level.arcs, level.finest, 1.0, np.zeros(2),
        )  # fmt: skip
        movers = _Movers(level, 1.0, *level.candidates(1.0))
        movers.respond(level.prices)
        jump(level.penalty, level._exchange_costs(), np.zeros(3), level.loads, level.load_min, level.load_max)
        level.settle(np.inf)
        level.assignment()


def _keep(block: slice) -> None:
    """Do what there is to do after a pass over a copy: nothing."""


def _penalty(problem: AssignmentProblem) -> tuple[IntArray, IntArray, Prices, Prices]:
    """Return the segments of the penalty as writeable arrays, the one type for which kernels are compiled."""
    penalty = problem.load_penalty
    if penalty is None:
        m = problem.n_experts
        return np.arange(m + 1), np.ones(m, dtype=np.int64), np.zeros(m), np.zeros(m)
    return penalty.indptr.copy(), penalty.start.copy(), penalty.value.copy(), penalty.slope.copy()


def _paths_per_step(microseconds: float, m: int) -> float:
    """Return how many shortest paths take as long as a Newton step, beside its `microseconds` over the clients."""
    return (50 + microseconds + m**3 / 4000) / (0.8 + m**2 / 1500)


def _spread(moved: Prices) -> float:
    """By how much prices move against one another, and against the hub, which does not move."""
    return float(max(moved.max(), 0.0) - min(moved.min(), 0.0))
