"""Answers to problems with budgets that get better part by part: some clients anew, all others fixed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt

from fedmoe_sched.solvers._budget_dual import Clients, Dual
from fedmoe_sched.solvers._recombination_kernels import recombine

__all__ = ["Parts", "rounded"]

_NEAR = 8  # clients of an expert that are likely to hold it
_NARROW = 3  # clients of a part: where even so few are too hard, more effort is spent
_FEWEST, _GROWTH = 2, 0.02  # clients of a part, and how that number follows success
_LISTED, _ROWS = 3_000, 1_000_000  # choices of a client, and of all clients of a part, that are listed
_THOROUGH = 10_000  # of a client, where it is about an answer at all, or about all clients
_EFFORT_A_CHOICE = 1000  # from which on more are
_LEAST_EFFORT, _MOST_EFFORT = 1_000_000, 300_000_000  # choices looked at in a part
_EFFORT_A_SECOND, _PAIRS_A_SECOND = 3e7, 3e6  # on a slow machine
_HARD = 8  # parts without a better answer before more effort is spent on narrow ones
_STALE = 40  # parts without a better answer before more effort is spent on each
_ASCENT = 40  # subgradient steps for the prices of a part; twice as many where it is thorough
_TRIES = 6  # parts that may fail to place an expert
_PLACING = 3_000_000  # effort for a part that places an expert
_NARROWEST = 4  # clients of a part that places an expert
_WIDEST = 12

Held = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Parts:
    """An assignment that keeps all budgets, and improves by recombination of some clients at a time.

    Parts are clients that compete for the same experts. They grow as long as the best answer of a part is proved,
    and shrink where it is not.

    Parameters
    ----------
    clients : Clients
    dual : Dual
        Good prices, with multipliers.
    held : ndarray, shape (n, m), int8
        Keeps budgets and upper bounds; lower bounds may be missed.
    random : numpy.random.Generator
    left : callable
        Returns the seconds that are left.
    """

    def __init__(
        self, clients: Clients, dual: Dual, held: Held, random: np.random.Generator, left: Callable[[], float]
    ) -> None:
        self.clients, self.dual, self.random, self.left = clients, dual, random, left
        self.step_size = 1 - 1e-6 if clients.whole else 1e-9 * float(np.abs(_finite(clients.gain)).max())
        reduced = dual.reduced(clients)
        # Who might hold an expert in a better answer, or not: clients about as keen on it as the last that does.
        loads = np.clip(held.sum(axis=0), 1, len(held))
        last = np.take_along_axis(-np.sort(-reduced, axis=0), loads[None] - 1, axis=0)
        away = np.abs(np.where(np.isfinite(reduced), reduced, np.inf) - np.where(np.isfinite(last), last, 0.0))
        order = np.argsort(away, axis=0, kind="stable")[: 2 * _NEAR].T
        self._near = np.where(np.isfinite(np.take_along_axis(away.T, order, axis=1)), order, -1)
        self._reduced = np.where(np.isfinite(reduced), reduced, 0.0)
        self._version = np.zeros(len(held), dtype=np.int64)
        self._room, self._loses = np.zeros((len(clients.size), len(held))), np.zeros(len(held))
        self.restart(held)
        self._number, self._effort, self._stale = 4.0, _LEAST_EFFORT, 0
        self.exhausted = False
        self._settled: dict[tuple[int, ...], tuple[int, int]] = {}

    def restart(self, held: Held) -> None:
        """Go on from another assignment."""
        self.held = held
        self.loads: Ints = held.sum(axis=0, dtype=np.int64)
        self.worth = float(self.clients.gain[held > 0].sum())
        self._version += 1
        self._note(np.arange(len(held)))

    def fill(self) -> bool:
        """Place what is missing at lower bounds, one at a time; return whether nothing is missing any more."""
        low, high = self.clients.load_min, self.clients.load_max
        needy = (self.clients.count(self.held) < self.clients.layer_min).any(axis=1)
        needy |= self.held.sum(axis=1) < self.clients.least
        for client in np.flatnonzero(needy).tolist():
            if not self._place(partial(self._around, [client]), np.minimum(low, self.loads), high):
                return False
        while self.left() > 0:
            short = np.flatnonzero(self.loads < low)
            if not len(short):
                return True
            expert = int(short[np.argmax(self.clients.size.sum(axis=0)[:, short].mean(axis=0))])
            lowest, highest = np.minimum(low, self.loads), high.copy()
            highest[short] = self.loads[short]
            lowest[expert] = highest[expert] = self.loads[expert] + 1
            if not self._place(partial(self._takers, expert), lowest, highest):
                return False
        return False

    def _place(self, part: Callable[[int], Ints], low: Ints, high: Ints) -> bool:
        """Recombine wider and wider parts until one of them keeps these bounds of the loads."""
        for tried in range(_TRIES):
            some = part(min(len(self.held), _WIDEST, _NARROWEST + tried))
            allowed = self._scale() * (1.0 + tried)
            gained, _ = self._recombine(some, low, high, allowed, _PLACING)
            if gained > 0.0:
                return True
            if self.left() <= 0:
                return False
        return False

    def _scale(self) -> float:
        return float(np.abs(self.dual.prices).mean()) + float(np.abs(_finite(self.clients.gain)).mean())

    def _takers(self, expert: int, number: int) -> Ints:
        """Choose clients around some that have room for an expert, and are likely to hold it."""
        near = self._near[expert][self._near[expert] >= 0]
        without = near[self.held[near, expert] == 0]
        possible = (self.held[:, expert] == 0) & np.isfinite(self.clients.gain[:, expert])
        candidates = without if len(without) else np.flatnonzero(possible)
        takes = np.maximum(self.clients.size[:, candidates, expert], 1e-12)
        fraction = np.clip(self._room[:, candidates] / takes, 0.0, 1.0).min(axis=0)
        wanted = np.argsort(-(fraction + 0.5 * self.random.random(len(candidates))))
        return self._around(candidates[wanted[: max(2, (2 * number) // 3)]].tolist(), number)

    def _around(self, first: list[int], number: int) -> Ints:
        """Choose clients that compete with these for experts."""
        n, some = len(self.held), list(first)
        for _ in range(20 * number):
            if len(some) >= min(number, n):
                break
            other = int(self.random.integers(n))
            experts = np.flatnonzero(self.held[some[self.random.integers(len(some))]]) if some else np.zeros(0)
            if len(experts):
                other = int(self._near[self.random.choice(experts), self.random.integers(min(n, _NEAR))])
            if other >= 0 and other not in some:
                some.append(other)
        return np.sort(np.array(some, dtype=np.int64))

    def improve(self) -> tuple[float, float]:
        """Recombine a part; return what was gained, and how much better an answer could be (infinite: unknown)."""
        n = len(self.held)
        number = min(n, max(_FEWEST, int(self._number)))
        some = np.arange(n) if number == n else self._around([self._seed()], number)
        key, state = tuple(some.tolist()), (int(self._version[some].sum()), self._effort)
        self.exhausted = number == n and self._effort == _MOST_EFFORT and self._settled.get(key) == state
        if self._settled.get(key) == state:
            self._number += 0.1
            self._stale += 1
            self._spend_more()
            return 0.0, np.inf
        gained, slack = self._recombine(some, self.clients.load_min, self.clients.load_max, -1.0, self._effort)
        if gained > 0.0:
            self._version[some] += 1
            self._stale = 0
        else:
            self._stale += 1
        self._settled[key] = (int(self._version[some].sum()), self._effort)
        if slack > 0.0 and gained == 0.0 and number <= _NARROW and self._stale >= _HARD:
            self._effort = min(int(1.3 * self._effort), _MOST_EFFORT)
        self._number *= 1 + _GROWTH if slack == 0.0 else 1 - _GROWTH
        self._number = min(max(self._number, _FEWEST), n + 0.5)
        self._spend_more()
        return gained, slack if number == n else np.inf

    def _spend_more(self) -> None:
        if self._stale >= _STALE:
            self._stale = 0
            self._effort = min(2 * self._effort, _MOST_EFFORT)

    def _seed(self) -> int:
        """Choose a client, likely one that loses much."""
        n = len(self.held)
        if self.random.random() < 0.5:
            return int(self.random.integers(n))
        total = float(self._loses.sum())
        return int(self.random.choice(n, p=self._loses / total)) if total > 0 else int(self.random.integers(n))

    def _recombine(self, some: Ints, low: Ints, high: Ints, allowed: float, effort: int) -> tuple[float, float]:
        seconds = max(self.left(), 1e-3)
        pairs = len(some) * int((self.loads - self.held[some].sum(axis=0) < high).sum())
        thorough = allowed >= 0.0 or len(some) == len(self.held)
        ascent = int(min(2 * _ASCENT if thorough else _ASCENT, 0.2 * seconds * _PAIRS_A_SECOND / max(pairs, 1)))
        listed = min(max(_THOROUGH if thorough else _LISTED, effort // _EFFORT_A_CHOICE), _ROWS // len(some))
        gained, slack = recombine(
            *self.clients.arrays, low, high, self.dual.prices, self.held, self.loads, some, self.step_size,
            allowed, ascent, max(listed, 1), int(min(effort, seconds * _EFFORT_A_SECOND)),
        )  # fmt: skip
        if gained > 0.0:
            self._note(some)
            self.worth = float(self.clients.gain[self.held > 0].sum())
        return float(gained), float(slack)

    def _note(self, some: Ints) -> None:
        """Bring up to date what budgets of these clients have left, and what they lose against the bound."""
        self._room[:, some] = (1.0 - (self.clients.size[:, some] * self.held[some]).sum(axis=2)).clip(0.0)
        held, reduced = self.held[some] > 0, self._reduced[some]
        self._loses[some] = np.where(held, -reduced, reduced).clip(0.0).sum(axis=1)
        self._loses[some] += (self.dual.multipliers[:, some] * self._room[:, some]).sum(axis=0)


def rounded(clients: Clients, shares: Floats) -> Held:
    """Round the shares of the linear relaxation, and drop what exceeds a budget or an upper bound.

    Parameters
    ----------
    clients : Clients
    shares : ndarray, shape (n, m)

    Returns
    -------
    ndarray, shape (n, m), int8
    """
    held = ((shares > 0.5) & np.isfinite(clients.gain)).astype(np.int8)
    over = ((clients.size * held).sum(axis=2) > 1.0 + 1e-11).any(axis=0) | (held.sum(axis=1) > clients.most)
    over |= (clients.count(held) > clients.layer_max).any(axis=1)
    for i in np.flatnonzero(over).tolist():
        experts = np.flatnonzero(held[i])
        experts = experts[np.argsort(-shares[i, experts], kind="stable")]
        layer = clients.layer_of[experts]
        beyond = np.tril(layer[:, None] == layer).sum(axis=1) > clients.layer_max[i, layer]
        held[i, experts[beyond]] = 0
        experts = experts[~beyond]
        used = np.cumsum(clients.size[:, i, experts], axis=1)
        fits = (used <= 1.0 + 1e-11).all(axis=0) & (np.arange(len(experts)) < clients.most[i])
        held[i, experts[~fits]] = 0
    for j in np.flatnonzero(held.sum(axis=0) > clients.load_max).tolist():
        holders = np.flatnonzero(held[:, j])
        held[holders[np.argsort(-shares[holders, j], kind="stable")][clients.load_max[j] :], j] = 0
    return held


def _finite(gain: Floats) -> Floats:
    finite: Floats = gain[np.isfinite(gain)]
    return finite if len(finite) else np.zeros(1)
