"""Prices and a first answer by column generation over choices, for many clients of few experts.

The problem is written in choices: every client takes one of its sets of experts that keep its bounds, and the
loads are what all of them take (Dantzig and Wolfe 1960, *Operations Research* 8). Its linear relaxation has a row
per expert besides those that give each client one choice, so that at most as many clients as experts are torn
between several choices. Choices are generated as they are needed: what clients want at the prices of the linear
program so far.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched.solvers._budget_dual import Clients, Dual

__all__ = ["Generated", "Pool", "generate"]

_SAMPLE, _FEWER = 10, 6  # clients per expert of the smallest problem, and how much smaller each is than the next
_TRIES = 4  # prices around the first ones, whose choices start a problem
_SPREAD = 0.5  # how far around, in parts of the mean price, of a problem with one client per expert
_BOX, _WIDER = 8.0, 4.0  # how many times that prices may move in a round, and how that grows where it binds
_ROUNDS = 60
_CLOSE, _CLOSE_ENOUGH = 1e-7, 1e-4  # gaps, in parts of the bound: of the problem, and of samples of it
_ROUNDING = 1e-9

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Choices = npt.NDArray[np.int8]
Pool = tuple[Ints, Choices]


class Generated(NamedTuple):
    """What column generation found.

    Parameters
    ----------
    dual : Dual
        The best prices, with their bound.
    shares : ndarray, shape (n, m)
        Of the pairs in the last linear program, or the choices at the best prices if there was no time for any.
    infeasible : bool
        Whether no assignment keeps all bounds.
    pool : tuple of ndarray, shape (k,) and (k, m)
        All choices that were generated: the client and the experts of each.
    """

    dual: Dual
    shares: Floats
    infeasible: bool
    pool: Pool


def generate(
    clients: Clients,
    random: np.random.Generator,
    left: Callable[[], float],
    known: Floats | None = None,
    pool: Pool | None = None,
) -> Generated:
    """Find prices and shares of choices: for samples of the clients first, each larger than the one before.

    Parameters
    ----------
    clients : Clients
    random : numpy.random.Generator
    left : callable
        Returns the seconds that are left.
    known : ndarray, shape (m,), or None
        Prices of a similar problem.
    pool : tuple of ndarray, shape (k,) and (k, m), or None
        Choices of the same clients, all possible, to start with: those of a problem that differs in gains only.

    Returns
    -------
    Generated
    """
    n, m = clients.gain.shape
    sizes = [n]
    while known is None and sizes[-1] > 2 * _SAMPLE * m:
        sizes.append(max(sizes[-1] // _FEWER, _SAMPLE * m))
    prices = np.zeros(m) if known is None else known
    finite = np.abs(clients.gain[np.isfinite(clients.gain)])
    scale = spread = float(finite.sum()) / max(len(finite), 1) or 1.0
    order = random.permutation(n)
    for size in reversed(sizes):
        if prices.any():
            spread = _SPREAD * max(float(np.abs(prices).mean()), 1e-3 * scale) * math.sqrt(m / size)
        some = clients if size == n else clients.sample(np.sort(order[:size]))
        start = pool if size == n else None
        found = _Problem(some, prices, spread, random, left, start).solve(_CLOSE if size == n else _CLOSE_ENOUGH)
        prices = found.dual.prices
    return found


class _Problem:
    """Choices of some clients, and the linear program in them.

    Prices stay within a box around the best ones so far, that widens where an expert is at its border (Marsten,
    Hogan and Blankenship 1975, *Operations Research* 23).
    """

    def __init__(
        self,
        clients: Clients,
        prices: Floats,
        spread: float,
        random: np.random.Generator,
        left: Callable[[], float],
        pool: Pool | None,
    ) -> None:
        self.clients, self.left = clients, left
        self.owners, self.choices = [np.zeros(0, dtype=np.int64)], [np.zeros((0, len(prices)), dtype=np.int8)]
        self._seen: set[tuple[int, bytes]] = set()
        self._master = _Master(clients)
        # An expert without an upper bound of its load is never dear, and one without a lower bound never cheap.
        free = clients.penalty is not None
        self._lowest = np.where(free | (clients.load_min > 0), -np.inf, 0.0)
        self._highest = np.where(free | (clients.load_max < len(clients.gain)), np.inf, 0.0)
        self.best, self._wanted = Dual.at(clients, prices.clip(self._lowest, self._highest))
        if pool is not None:
            self._append(*pool)
        self._add(self._wanted)
        self._master.add_loads(prices)
        for _ in range(_TRIES):
            self._ask(prices + spread * random.standard_normal(len(prices)))
        self._box = np.full(len(prices), _BOX * spread)
        self._least = self._least_worth()

    def solve(self, close: float) -> Generated:
        """Add choices until the gap is so small, a part of the bound, or none is missing or time is over."""
        program = None
        for _ in range(_ROUNDS):
            if self.left() <= 0.0 or self._is_infeasible():
                break
            found = self._master.solve(self.best.prices, self._box, self.left())
            if found is None:
                break
            program = found
            news = self._ask(program.prices)
            open_ = self.best.bound - program.worth > close * abs(self.best.bound)
            if not program.at_border.any() and (news == 0 or not open_):
                break
            self._box[program.at_border] *= _WIDER
        shares = self._wanted.astype(np.float64)
        owners, choices = np.concatenate(self.owners), np.concatenate(self.choices)
        if program is not None:
            shares, known = np.zeros(self.clients.gain.shape), len(program.shares)
            np.add.at(shares, owners[:known], choices[:known] * program.shares[:, None])
        return Generated(self.best, shares, self._is_infeasible(), (owners, choices))

    def _least_worth(self) -> float:
        """Return what any choices of the clients are worth at least, whatever the loads."""
        losses = np.sort(np.where(np.isfinite(self.clients.gain), self.clients.gain, 0.0).clip(max=0.0), axis=1)
        losses[np.arange(losses.shape[1]) >= self.clients.most[:, None]] = 0.0
        least, penalty = float(losses.sum()), self.clients.penalty
        if penalty is not None:
            ends = penalty.total(self.clients.load_min), penalty.total(self.clients.load_max)
            least -= self.clients.share * float(np.maximum(*ends).sum())  # convex: largest at an end
        return least

    def _is_infeasible(self) -> bool:
        """Whether the bound is less than any choices are worth."""
        size = 1.0 + float(np.abs(self.best.prices) @ self.clients.load_max) + abs(self._least)
        return self.best.bound < self._least - _ROUNDING * size

    def _ask(self, prices: Floats) -> int:
        """Let the clients choose; return how many of the choices are new."""
        dual, chosen = Dual.at(self.clients, prices.clip(self._lowest, self._highest))
        if dual.bound < self.best.bound:
            self.best, self._wanted = dual, chosen
        return self._add(chosen) + self._master.add_loads(prices)

    def _add(self, chosen: Choices) -> int:
        some = np.flatnonzero(chosen.any(axis=1))
        return self._append(some, chosen[some])

    def _append(self, owners: Ints, choices: Choices) -> int:
        packed, fresh = np.packbits(choices, axis=1), []
        for at, i in enumerate(owners.tolist()):
            key = (i, packed[at].tobytes())
            if key not in self._seen:
                self._seen.add(key)
                fresh.append(at)
        self.owners.append(owners[fresh])
        self.choices.append(choices[fresh])
        self._master.add(self.owners[-1], self.choices[-1])
        return len(fresh)


class _Program(NamedTuple):
    """A solution of the linear program: prices, shares of the choices, their worth, experts at the border."""

    prices: Floats
    shares: Floats
    worth: float
    at_border: npt.NDArray[np.bool_]


class _Master:
    """The linear program in the choices so far. It goes on from its last basis where only choices are added.

    A place more than an expert has costs the highest price in the box, and one that is not taken earns the lowest:
    so prices stay within.
    """

    def __init__(self, clients: Clients) -> None:
        from ortools.linear_solver import pywraplp

        (n, m), self._clients = clients.gain.shape, clients
        self._solver: Any = pywraplp.Solver.CreateSolver("GLOP")
        self._solver.SetSolverSpecificParametersAsString("use_preprocessing: false")
        infinite = self._solver.infinity()
        low = np.where(clients.load_min > 0, clients.load_min, -infinite)
        high = np.where(clients.load_max < n, clients.load_max, infinite)
        if clients.penalty is not None:
            low = high = np.zeros(m)  # loads of the clients less those that experts choose
        self._loads = [self._solver.Constraint(*each) for each in zip(low.tolist(), high.tolist(), strict=True)]
        self._known: list[set[int]] = [set() for _ in range(m)]  # loads that experts may choose
        self._load: list[Any] = []
        self._one = [self._solver.Constraint(1.0 if least else -infinite, 1.0) for least in clients.least.tolist()]
        self._over = [self._solver.NumVar(0.0, infinite, "") for _ in range(m)]
        self._short = [self._solver.NumVar(0.0, infinite, "") for _ in range(m)]
        for load, over, short in zip(self._loads, self._over, self._short, strict=True):
            load.SetCoefficient(over, -1.0)
            load.SetCoefficient(short, 1.0)
        self._objective: Any = self._solver.Objective()
        self._objective.SetMaximization()
        self._shares: list[Any] = []
        if clients.penalty is not None:
            self._load = [self._solver.Constraint(1.0, 1.0) for _ in range(m)]
            self._add_loads(clients.load_min)
            self._add_loads(clients.load_max)

    def add_loads(self, prices: Floats) -> int:
        """Add the loads that experts with a penalty want at these prices; return how many are new."""
        clients = self._clients
        if clients.penalty is None:
            return 0
        return self._add_loads(clients.penalty.best_loads(prices, clients.load_min, clients.load_max))

    def _add_loads(self, loads: Ints) -> int:
        assert self._clients.penalty is not None
        share, costs, fresh = self._clients.share, self._clients.penalty.total(loads), 0
        for j, (load, cost) in enumerate(zip(loads.tolist(), costs.tolist(), strict=True)):
            if load in self._known[j]:
                continue
            self._known[j].add(load)
            fresh += 1
            part = self._solver.NumVar(0.0, self._solver.infinity(), "")
            self._objective.SetCoefficient(part, -share * cost)
            self._loads[j].SetCoefficient(part, -share * load)
            self._load[j].SetCoefficient(part, 1.0)
        return fresh

    def add(self, owners: Ints, choices: Choices) -> None:
        """Add choices of these clients."""
        infinite = self._solver.infinity()
        floors = self._clients.floor_worth(owners, choices)
        for i, choice, floor in zip(owners.tolist(), choices, floors.tolist(), strict=True):
            share = self._solver.NumVar(0.0, infinite, "")
            experts = np.flatnonzero(choice)
            self._objective.SetCoefficient(share, float(self._clients.gain[i, experts].sum()) + floor)
            self._one[i].SetCoefficient(share, 1.0)
            for j in experts.tolist():
                self._loads[j].SetCoefficient(share, 1.0)
            self._shares.append(share)

    def solve(self, center: Floats, box: Floats, seconds: float) -> _Program | None:
        """Solve it with prices within a box; None where that takes longer, or fails."""
        for over, short, price, width in zip(self._over, self._short, center.tolist(), box.tolist(), strict=True):
            self._objective.SetCoefficient(over, -(price + width))
            self._objective.SetCoefficient(short, price - width)
        self._solver.SetTimeLimit(max(1, int(1000 * seconds)))
        if self._solver.Solve() != self._solver.OPTIMAL:
            return None
        beyond = [
            over.solution_value() + short.solution_value()
            for over, short in zip(self._over, self._short, strict=True)
        ]
        return _Program(
            np.array([load.dual_value() for load in self._loads]),
            np.array([share.solution_value() for share in self._shares]),
            float(self._objective.Value()),
            np.array(beyond) > _ROUNDING,
        )
