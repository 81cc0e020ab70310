"""Exact schedules from expert prices: Newton steps on sampled clients, then shortest paths between experts."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._layers import layers_interact, layers_of
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import objective
from fedmoe_sched.exchange import polish
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver

if TYPE_CHECKING:
    from fedmoe_sched.solvers._layer_levels import LayeredLevel
    from fedmoe_sched.solvers._price_levels import Run

__all__ = ["SuccessiveShortestPaths"]

_GROWTH = 8  # clients of one sampled level over those of the level below
_FIRST_LEVEL = 1024  # clients of the smallest sampled level, at least
_LARGEST_SAMPLE = 262_144  # a sample is a copy; more clients tell hardly more
_DIRECT_CELLS = 4096  # problems up to this many pairs go straight to the shortest paths
_USUAL_EXPONENTS, _LARGEST_EXPONENT = 64, 1000  # of two, for the largest score
_HARMLESS = 1e-10  # relative to the objective
_BLOCK_CLIENTS = 8192  # fewer are not worth a thread

_MOST_EXPERTS = np.iinfo(np.int16).max  # the hub is a node too, and nodes are kept as 16-bit numbers

Prices: TypeAlias = npt.NDArray[np.float64]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    start: Prices | None
    seed: int
    threads: int
    coupled: bool = False  # whether the layers of some client interact
    prices: Prices | None = None
    assignment: Assignment | None = None


class SuccessiveShortestPaths(Solver[_Model]):
    """Exact schedules from dual prices of the experts, in little more than one pass over the scores.

    Under given prices every client's best choice is its own affair, so the dual of the round problem has one
    variable per expert, however many clients there are. Two phases: (1) regularised Newton steps on the dual
    (Levenberg 1944; Marquardt 1963), whose Hessian is the density of clients that are nearly indifferent between
    two experts, on random samples of clients that grow eightfold up to all of them; (2) successive shortest paths
    (Ahuja, Magnanti and Orlin, *Network Flows*, section 9.7) on the exchange graph of m + 1 nodes, whose arcs are
    the nearly indifferent clients, which ends at an optimal assignment and optimal prices. A client is looked at
    again only when the prices have moved by more than it takes to change its mind, and an arc is left out only as
    long as it provably does not matter.

    Quantised scores make large sets of clients that are exactly indifferent; a random perturbation of 2**-36 of
    the largest score spreads them. Prices then lie near a lattice, and jump from one of its points to the next
    over the cheapest exchanges of all clients (the primal-dual step of Ford and Fulkerson, *Flows in Networks*,
    section 3.3). The certificate is computed from the true scores all the same.

    Layers are independent problems where neither ``capacity`` nor ``min_experts`` of any client says more than
    they do one by one. Else clients respond greedily within their nested bounds, and exchange experts across
    layers only where both layers allow it. As in valuated matroid intersection (Murota 1996, *SIAM Journal on
    Discrete Mathematics* 9), exchanges of one client on a path might be forbidden together: they are cut short to
    one.

    The kernels are compiled when they are first used, and kept on disk; the run cannot be interrupted.
    """

    name: ClassVar[str] = "exact"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.PRICES,
        Capability.WARM_START,
        Capability.THREADS,
        Capability.LOAD_PENALTY,
        Capability.LAYERS,
    }
    requires: ClassVar[tuple[str, ...]] = ("numba",)
    summary: ClassVar[str] = "own price-based solver; exact and by far the fastest from a few thousand clients on"

    def supports(self, problem: AssignmentProblem) -> str | None:
        """Return None, or the reason why this backend does not take `problem`."""
        if problem.n_experts >= _MOST_EXPERTS:
            return f"{self.name} takes fewer than {_MOST_EXPERTS} experts, not {problem.n_experts}"
        return super().supports(problem)

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Load the compiled kernels, or compile them; there is no model apart from the problem."""
        from fedmoe_sched.solvers._price_levels import load_kernels

        dtype = "f8" if problem.desirability.dtype == np.float64 else "f4"
        load_kernels(dtype)
        coupled = problem.layers is not None and layers_interact(problem)
        if coupled:
            from fedmoe_sched.solvers._layer_levels import load_layer_kernels

            load_layer_kernels(dtype)
        return _Model(problem, prices, limits.seed, limits.threads or os.cpu_count() or 1, coupled)

    def run(self, model: _Model, limits: Limits) -> None:
        """Climb from small samples to all clients."""
        problem = model.problem
        n = problem.n_clients
        if problem.overstretched.any() or (problem.load_min > n).any():
            return
        solve = _solve if problem.layers is None or model.coupled else _solve_layers
        if n <= _BLOCK_CLIENTS or model.threads == 1:
            settled = solve(model, map)
        else:
            with ThreadPoolExecutor(model.threads) as pool:
                settled = solve(model, pool.map)
        if settled is not None:
            model.prices, model.assignment = settled

    def read(self, model: _Model) -> Answer:
        """Hand over the assignment and its prices."""
        if model.assignment is None:
            return Answer(StopReason.PROVED_INFEASIBLE)
        return Answer(StopReason.COMPLETED, model.assignment, model.prices)


def _solve_layers(model: _Model, run: Run) -> tuple[Prices, Assignment] | None:
    """Solve layers that do not interact one by one."""
    from fedmoe_sched.solvers._layer_levels import join_layers, split_layers

    problem, prices, parts = model.problem, np.empty(model.problem.n_experts), []
    for part, experts in zip(split_layers(problem), layers_of(problem).members, strict=True):
        start = None if model.start is None else model.start[experts]
        settled = _solve(_Model(part, start, model.seed, model.threads), run)
        if settled is None:
            return None
        prices[experts] = settled[0]
        parts.append(settled[1])
    return prices, join_layers(problem, parts)


def _solve(model: _Model, run: Run) -> tuple[Prices, Assignment] | None:
    """Solve sample after sample, each from the prices of the one before, and at last for all clients."""
    from fedmoe_sched.solvers._price_levels import Level
    from fedmoe_sched.solvers._ties import Ties

    problem, start = model.problem, model.start
    n, m = problem.shape
    make = Level if problem.layers is None else _layered(problem)
    if n * m <= _DIRECT_CELLS:
        level = make(problem, Ties.none(m), None, run)
        assignment = level.settle_directly(np.zeros(m) if start is None else start)
        return None if assignment is None else (level.prices, assignment)
    rng = np.random.default_rng(model.seed)
    ties = Ties.of(problem, rng)
    exponent = int(np.frexp(ties.largest)[1])
    if abs(exponent) > _USUAL_EXPONENTS:
        return _solve_scaled(model, run, min(-exponent, _LARGEST_EXPONENT))
    prices = np.zeros(m) if start is None else start
    cold, tie_window = start is None, 0.0
    for size in [*(_sample_sizes(n, m) if cold else ()), n]:
        level = make(problem, ties, _sample(n, size, rng) if size < n else None, run)
        level.tie_window = max(level.tie_window, tie_window)
        if cold and ties.size:
            level.respond_smoothly(prices)
        else:
            level.respond(prices)
        settled = level.settle(2 * ties.quantum if cold else 0.0, only_prices=size < n)
        # A sample may well be infeasible where the problem is not.
        prices, tie_window, cold = level.prices, level.tie_window, False
    if not settled:
        return None
    assignment = level.assignment()
    if ties.size * len(assignment.indices) > _HARMLESS * abs(objective(problem, assignment)):
        # What parts ties is too much beside what is left of scores and penalties that cancel out.
        polished = polish(problem, assignment)
        return polished.prices, polished.assignment
    return prices, assignment


def _layered(problem: AssignmentProblem) -> Callable[..., LayeredLevel]:
    from fedmoe_sched.solvers._layer_levels import layered_levels

    return layered_levels(problem)


def _solve_scaled(model: _Model, run: Run, exponent: int) -> tuple[Prices, Assignment] | None:
    """Solve with all scores times a power of two: single precision has some use here, and a narrow range."""
    problem, unit = model.problem, 2.0**exponent
    penalty = problem.load_penalty
    if penalty is not None:
        penalty = LoadPenalty(penalty.indptr, penalty.start, penalty.value * unit, penalty.slope * unit)
    scores = problem.desirability.astype(np.float64) * unit
    start = None if model.start is None else model.start * unit
    problem = problem.replace(desirability=scores, load_penalty=penalty)
    scaled = _Model(problem, start, model.seed, model.threads, model.coupled)
    settled = _solve(scaled, run)
    return None if settled is None else (settled[0] / unit, settled[1])


def _sample_sizes(n: int, m: int) -> list[int]:
    """Sizes of the sampled levels, ascending."""
    sizes: list[int] = []
    size = n // _GROWTH
    while size >= max(_FIRST_LEVEL, 16 * m):
        if size <= _LARGEST_SAMPLE:
            sizes.append(size)
        size //= _GROWTH
    return sizes[::-1]


def _sample(n: int, size: int, rng: np.random.Generator) -> IntArray:
    """Draw distinct clients, ascending, with a chance of `size` / n each."""
    return np.flatnonzero(rng.random(n, dtype=np.float32) < size / n)
