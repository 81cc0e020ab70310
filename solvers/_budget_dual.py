"""Prices for problems with budgets, and the bounds that they prove: subgradient steps, with true knapsacks too."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched._knapsack_tables import whole_units
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solvers._budget_rows import has_whole_scores
from fedmoe_sched.solvers._knapsack_kernels import multipliers, respond
from fedmoe_sched.solvers._layer_rows import layer_rows
from fedmoe_sched.solvers._matrix import clipped_bounds, eligible_pairs

__all__ = ["Clients", "Dual", "climb", "weigh"]

_MARGIN = 5e-10  # of a budget: half of what the certificate forgives
_MOST_UNITS, _UNITS = 20_000, 2_000  # of a budget, in tables
_PATIENCE = 12  # steps without a better bound before the step is cut
_SHRINK, _SMALLEST_STEP = 0.6, 1e-3
_MEMORY = 0.5  # of the direction before
_TARGET, _TINY = 0.01, 1e-9  # of the bound, that steps aim below it; of anything

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Clients:
    """The clients as arrays for the kernels.

    Parameters
    ----------
    gain : ndarray, shape (n, m)
        Desirability; -inf where the pair is not possible.
    size : ndarray, shape (R, n, m)
        What a pair takes of each budget, in parts of it; 0 where there is no limit.
    least, most : ndarray, shape (n,)
    layer_of : ndarray, shape (m,)
    layer_min, layer_max : ndarray, shape (n, G)
        Fewest and most experts of each layer, of which there is one where the problem has none.
    load_min, load_max : ndarray, shape (m,)
    units, budgets : ndarray, shape (n, m) and (n,)
        The same in whole units, where there is one resource and no layers; budgets are -1 elsewhere.
    whole : bool
        Whether all objectives are whole numbers.
    penalty : LoadPenalty or None
        Of the loads.
    short : float
        What an expert is worth more up to a layer's lower bound, where it gives way; infinite: it does not. Only
        for choices at prices, and programs in them.
    share : float
        That these clients are of those whose loads are bounded and penalised; 1 but for samples.
    """

    gain: Floats
    size: Floats
    least: Ints
    most: Ints
    layer_of: Ints
    layer_min: Ints
    layer_max: Ints
    load_min: Ints
    load_max: Ints
    units: Ints
    budgets: Ints
    whole: bool
    penalty: LoadPenalty | None = None
    short: float = np.inf
    share: float = 1.0

    @classmethod
    def of(cls, problem: AssignmentProblem) -> Clients:
        """Read a problem with budgets."""
        network = network_relaxation(problem)
        assert network.eligible is not None
        bounds = clipped_bounds(network)
        gain = np.where(network.eligible, problem.desirability.astype(np.float64), -np.inf)
        size = np.zeros((len(problem.budgets), *problem.shape))
        for part, resource in zip(size, problem.budgets, strict=True):
            limited = np.isfinite(resource.budget) & (resource.budget > 0)
            allowed = resource.budget[limited, None] * (1 + _MARGIN)
            with np.errstate(over="ignore"):  # pairs that exceed a budget by themselves are not possible
                part[limited] = resource.sizes_of(np.flatnonzero(limited)) / allowed
        size[:, ~network.eligible] = 0.0
        most = np.minimum(bounds.client_max, network.eligible.sum(axis=1))
        layers = _layers(network)
        least = np.maximum(bounds.client_min, layers[1].sum(axis=1))
        units, budgets = _in_units(problem, network.eligible)
        whole = problem.load_penalty is None and has_whole_scores(problem)
        low, high = bounds.expert_min, bounds.expert_max
        penalty = problem.load_penalty
        return cls(gain, size, least, most, *layers, low, high, units, budgets, whole, penalty)

    def sample(self, some: Ints) -> Clients:
        """Keep some of the clients, in order, and their share of the bounds and penalties of the loads."""
        share = len(some) / len(self.gain)
        if self.penalty is not None:
            return replace(self._only(some), share=share)
        low, high = np.floor(self.load_min * share), np.ceil(self.load_max * share)
        return replace(self._only(some), load_min=low.astype(np.int64), load_max=high.astype(np.int64))

    def beside(self, some: Ints, loads: Ints) -> Clients:
        """Keep some of the clients, in order, where the others make up such loads."""
        return replace(
            self._only(some),
            load_min=np.maximum(self.load_min - loads, 0),
            load_max=self.load_max - loads,
            penalty=None if self.penalty is None else self.penalty.after(loads),
        )

    def _only(self, some: Ints) -> Clients:
        return replace(
            self,
            gain=self.gain[some],
            size=np.ascontiguousarray(self.size[:, some]),
            least=self.least[some],
            most=self.most[some],
            layer_min=self.layer_min[some],
            layer_max=self.layer_max[some],
            units=self.units[some],
            budgets=self.budgets[some],
        )

    @property
    def arrays(self) -> tuple[Floats, Floats, Ints, Ints, Ints, Ints, Ints, Ints, Ints]:
        """What kernels take of the clients, in order."""
        return (
            self.gain, self.size, self.least, self.most, self.layer_of, self.layer_min, self.layer_max, self.units,
            self.budgets,
        )  # fmt: skip

    def count(self, held: npt.NDArray[Any]) -> Ints:
        """Count the experts of each layer in rows of them, shape (k, m); shape (k, G)."""
        return np.stack([held[:, self.layer_of == g].sum(axis=1) for g in range(self.layer_min.shape[1])], axis=1)

    def with_floors(self, floors: tuple[Ints, float] | None) -> Clients:
        """Let lower bounds of layers, shape (n, G), give way: each of their experts is worth so much more."""
        return self if floors is None else replace(self, layer_min=floors[0], short=floors[1])

    def floor_worth(self, owners: Ints, choices: npt.NDArray[Any]) -> Floats:
        """Return what choices, shape (k, m), of these clients are worth more for lower bounds of layers."""
        if self.short == np.inf:
            return np.zeros(len(owners))
        worth: Floats = self.short * np.minimum(self.count(choices), self.layer_min[owners]).sum(axis=1)
        return worth

    def places(self, prices: Floats) -> float:
        """Return what places at the experts are worth at most at these prices, less the penalty."""
        if self.penalty is None:
            return float(self.load_max @ np.maximum(prices, 0) - self.load_min @ np.maximum(-prices, 0))
        return self.share * float(self.penalty.conjugate(prices, self.load_min, self.load_max).sum())

    def round_down(self, bound: float) -> float:
        """Use that objectives are whole numbers, where they are."""
        return float(np.floor(bound + 1e-6)) if self.whole else bound


def _layers(network: AssignmentProblem) -> tuple[Ints, Ints, Ints]:
    n, m = network.shape
    if network.layers is None:
        return np.zeros(m, dtype=np.int64), np.zeros((n, 1), dtype=np.int64), np.full((n, 1), m)
    rows = layer_rows(network, eligible_pairs(network))
    # A copy: for arrays that cannot be written to, every kernel would be compiled once more.
    return network.layers.layer_of.copy(), rows.low.reshape(n, -1), rows.high.reshape(n, -1)


def _in_units(problem: AssignmentProblem, fits: npt.NDArray[np.bool_]) -> tuple[Ints, Ints]:
    units, budgets = np.zeros(problem.shape, dtype=np.int64), np.full(problem.n_clients, -1, dtype=np.int64)
    if len(problem.budgets) == 1 and problem.layers is None:
        [resource] = problem.budgets
        for i in np.flatnonzero(np.isfinite(resource.budget)).tolist():
            sizes = resource.sizes_of(np.array([i]))[0]
            whole = whole_units(sizes[fits[i]], float(resource.allowed[i]), _MOST_UNITS, _UNITS)
            units[i, fits[i]], budgets[i] = whole.sizes, whole.budget
    return units, budgets


@dataclass(eq=False)
class Dual:
    """Prices of experts, what budgets are worth, and the bound that they prove.

    Parameters
    ----------
    prices : ndarray, shape (m,)
    multipliers : ndarray, shape (R, n)
        Worth of a client's budgets.
    bound : float
    worth : ndarray, shape (n,)
        Of it, what each client's knapsack contributes.
    """

    prices: Floats
    multipliers: Floats
    bound: float
    worth: Floats

    @classmethod
    def at(cls, clients: Clients, prices: Floats) -> tuple[Dual, npt.NDArray[np.int8]]:
        """Let the clients respond; return the choices too."""
        chosen, worth = np.empty(clients.gain.shape, dtype=np.int8), np.empty(len(clients.gain))
        respond(*clients.arrays, clients.short, prices, chosen, worth)
        bound = float(worth.sum()) + clients.places(prices)
        return cls(prices, np.zeros((len(clients.size), len(worth))), bound, worth), chosen

    def reduced(self, clients: Clients) -> Floats:
        """Return scores less prices and what the budgets used are worth; shape (n, m), -inf where not possible."""
        return _reduced(clients, self.prices, self.multipliers)

    def estimate(self, clients: Clients, known: Floats | None = None) -> Dual:
        """Choose multipliers: known ones, or those that suit the prices, with all resources of a client as one."""
        found = np.empty(len(clients.gain))
        multipliers(clients.gain, clients.size, clients.least, clients.most, self.prices, found)
        self.multipliers = np.tile(found, (len(clients.size), 1))
        if known is not None:
            better = _relaxed_worth(clients, self.prices, known) < _relaxed_worth(
                clients, self.prices, self.multipliers
            )
            self.multipliers[:, better] = known[:, better]
        return self

    def keep(self, clients: Clients, value: float) -> npt.NDArray[np.bool_]:
        """Return the pairs that an assignment worth more than `value` could hold; shape (n, m).

        A client's knapsack is bounded by its multiplier; a pair of negative reduced score that is taken all the
        same costs that much of the bound.
        """
        reduced = self.reduced(clients)
        relaxed = _relaxed_worth(clients, self.prices, self.multipliers)
        slack = self.bound - self.worth + relaxed - (value + (1 - 1e-6) * clients.whole)
        kept: npt.NDArray[np.bool_] = np.isfinite(reduced) & (-reduced <= slack[:, None] + 1e-9 * abs(self.bound))
        return kept


def _reduced(clients: Clients, prices: Floats, worth: Floats) -> Floats:
    reduced = clients.gain - prices
    for each, size in zip(worth, clients.size, strict=True):
        reduced -= each[:, None] * size
    return reduced


def _relaxed_worth(clients: Clients, prices: Floats, worth: Floats) -> Floats:
    """Bound each client's knapsack by multipliers of its budgets; shape (n,)."""
    bound: Floats = worth.sum(axis=0) + np.maximum(_reduced(clients, prices, worth), 0.0).sum(axis=1)
    return bound


def weigh(clients: Clients, value: float | None, steps: int, seconds: float) -> tuple[Floats, Floats]:
    """Find out what budgets are worth by subgradient steps in which experts choose clients, and price the experts.

    The dual of `climb`: with a number per client and resource instead of one per expert it is soon near the linear
    relaxation where experts are many, though bounds on what clients take are left out here.

    Parameters
    ----------
    clients : Clients
    value : float or None
        Worth of an assignment, if one is known.
    steps : int
        At most.
    seconds : float

    Returns
    -------
    prices : ndarray, shape (m,)
    multipliers : ndarray, shape (R, n)
    """
    end = time.perf_counter() + seconds
    n, m = clients.gain.shape
    low, high = np.clip(clients.load_min, 0, n), np.clip(clients.load_max, 0, n)
    depth, experts = int(high.max(initial=1)), np.arange(m)
    best = worth = np.zeros((len(clients.size), n))
    best_prices = np.zeros(m)
    record, trust, stalled, direction = math.inf, 1.0, 0, np.zeros_like(worth)
    for _ in range(steps):
        reduced = clients.gain - np.einsum("rn,rnm->nm", worth, clients.size)
        ranked = reduced.argmax(axis=0)[None] if depth <= 1 else np.argsort(-reduced, axis=0)[:depth]
        sorted_ = np.take_along_axis(reduced, ranked, axis=0)
        takes = np.clip((sorted_ > 0).sum(axis=0), low, high)
        taken = (np.arange(len(ranked))[:, None] < takes) & np.isfinite(sorted_)
        last = sorted_[np.maximum(takes, 1) - 1, experts]
        binds = np.isfinite(last) & (((takes == high) & (last > 0)) | ((takes == low) & (last < 0) & (low > 0)))
        bound = float(sorted_[taken].sum() + worth.sum())
        if bound < record - 1e-7 * abs(record) or record == math.inf:
            record, best, best_prices, stalled = bound, worth, np.where(binds, last, 0.0), 0
        else:
            stalled += 1
        if time.perf_counter() > end or trust < _SMALLEST_STEP:
            break
        if stalled > _PATIENCE:
            trust, stalled, worth = trust * _SHRINK, 0, best
            direction = np.zeros_like(worth)
            continue
        sizes = clients.size[:, ranked, experts[None]] * taken
        used = [np.bincount(ranked.ravel(), size.ravel(), minlength=n) for size in sizes]
        direction = 1.0 - np.stack(used) + _MEMORY * direction
        length = float((direction * direction).sum())
        if length == 0.0:
            break
        distance = max(_TARGET * abs(bound), _TINY if value is None else bound - value)
        worth = np.maximum(worth - trust * distance / length * direction, 0.0)
    return best_prices, best


def climb(clients: Clients, start: Dual, value: float, steps: int, seconds: float) -> Dual:
    """Improve the bound by subgradient steps (Held, Wolfe and Crowder 1974), towards the worth of an assignment.

    Parameters
    ----------
    clients : Clients
    start : Dual
    value : float
        Worth of the best assignment so far, or an estimate.
    steps : int
        At most.
    seconds : float

    Returns
    -------
    Dual
        The best one seen.
    """
    end = time.perf_counter() + seconds
    best, current, trust, stalled = start, start, 1.0, 0
    direction = np.zeros_like(start.prices)
    for _ in range(steps):
        if time.perf_counter() > end or trust < _SMALLEST_STEP:
            break
        current, chosen = Dual.at(clients, current.prices)
        if current.bound < best.bound - 1e-7 * abs(best.bound):
            best, stalled = current, 0
        else:
            stalled += 1
        if stalled > _PATIENCE:
            trust, stalled, current = trust * _SHRINK, 0, best
            direction[:] = 0.0
            continue
        loads = chosen.sum(axis=0, dtype=np.int64)
        wanted = np.where(current.prices > 0, clients.load_max, clients.load_min)
        wanted = np.where(current.prices == 0, np.clip(loads, clients.load_min, clients.load_max), wanted)
        direction = loads - wanted + _MEMORY * direction
        length = float(direction @ direction)
        if length == 0.0:
            break
        distance = max(current.bound - value, 1e-6 * abs(value))
        current = Dual(current.prices + trust * distance / length * direction, best.multipliers, 0.0, best.worth)
    return best
