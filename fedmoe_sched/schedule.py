"""``schedule(fitness, usage, capacity)``: scores in, certified schedule out."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import (
    FloatArray,
    IntArray,
    KnownMatrix,
    Labelled,
    as_counts,
    as_matrix,
    as_vector,
    split_labels,
)
from fedmoe_sched._budgets import fitting_counts, fitting_pairs
from fedmoe_sched._layer_dealing import mean_layer_loads
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.feasibility import widen_load_bounds
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.relax import solve_soft
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.result import Relaxation, Schedule
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Limits, Solver
from fedmoe_sched.switching import as_held, as_switching_cost, with_switching_cost

__all__ = ["balanced_load_bounds", "desirability", "schedule", "usage_share"]


def usage_share(usage: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return each expert's usage relative to its fair share.

    Parameters
    ----------
    usage : array_like, shape (m,)
        Usage scores >= 0, in samples or compute.

    Returns
    -------
    ndarray, shape (m,), float64
        ``usage_j / mean(usage)``: 1.0 is the fair share; all 1.0 while nothing was trained yet.
    """
    values = np.asarray(usage, dtype=np.float64)
    mean = values.mean()
    return values / mean if mean > 0 else np.ones_like(values)


def desirability(
    fitness: FloatArray, usage: npt.ArrayLike, *, fitness_weight: float = 1.0, usage_weight: float = 0.1
) -> FloatArray:
    """Combine fitness and usage into the composite score of the round problem.

    ``d_ij = fitness_weight * F_ij - usage_weight * usage_share_j``, our reading of "rises with fitness, falls
    with usage" in Chen et al. 2025 (arXiv 2507.05685), which gives no formula.

    Parameters
    ----------
    fitness : ndarray, shape (n, m)
    usage : array_like, shape (m,)
    fitness_weight, usage_weight : float
        The usage weight is in units of fitness per fair share.

    Returns
    -------
    ndarray, shape (n, m), of the dtype of `fitness`; float32 for float16, whose own arithmetic is too coarse
        With weights of 1 and 0 it is `fitness` itself, not a copy.
    """
    if fitness_weight == 1 and usage_weight == 0:
        return fitness
    dtype = np.promote_types(fitness.dtype, np.float32)
    scores: FloatArray = np.multiply(fitness, dtype.type(fitness_weight), dtype=dtype)
    scores -= (usage_weight * usage_share(usage)).astype(dtype)
    return scores


def balanced_load_bounds(
    slots: npt.ArrayLike, n_experts: int, balance: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return load bounds of ``+- balance`` around the mean load.

    Parameters
    ----------
    slots : array_like of int, shape (n,)
        Experts that each client can take.
    n_experts : int
        m.
    balance : float
        Tolerance >= 0; 0.1 means within 10 % of the mean, rounded outwards to whole clients.

    Returns
    -------
    load_min, load_max : ndarray, shape (m,), int64
    """
    return _around(np.full(n_experts, float(np.sum(slots)) / n_experts), balance)


def _around(mean: FloatArray, balance: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    # A hair inwards, so that 10 * (1 + 0.1) = 11.000000000000002 does not round up to 12.
    low = np.maximum(0, np.ceil(mean * (1 - balance) - 1 + 1e-9))
    high = np.floor(mean * (1 + balance) + 1 - 1e-9)
    return low.astype(np.int64), high.astype(np.int64)


def schedule(
    fitness: Any,
    usage: Any,
    capacity: Any,
    *,
    fitness_weight: float = 1.0,
    usage_weight: float = 0.1,
    eligible: Any = None,
    load_min: Any = None,
    load_max: Any = None,
    balance: float | None = 0.25,
    load_penalty: LoadPenalty | None = None,
    budgets: Sequence[ResourceBudget] = (),
    held: Any = None,
    switching_cost: Any = 0.0,
    layers: ExpertLayers | None = None,
    fill: bool = True,
    solver: str | Solver[Any] = "auto",
    time_limit: float | None = None,
    seed: int = 0,
    warm_start: Schedule | npt.ArrayLike | None = None,
    certify: bool = False,
    soft: bool = False,
) -> Schedule:
    """Decide which client trains which experts this round.

    Parameters
    ----------
    fitness : array_like, shape (n, m)
        How well expert j suits client i's data; any finite numbers. NumPy arrays, torch CPU tensors, nested
        lists, or a pandas DataFrame with clients as index and experts as columns: its labels are kept.
        With ``usage_weight=0`` and ``fitness_weight=1`` a memory map of floats is never loaded whole.
    usage : array_like, shape (m,)
        Decayed training load of each expert, >= 0, in samples or compute. A Series is aligned by label.
    capacity : array_like of int, shape (n,), or int
        The most experts each client may train. A Series is aligned by label.
    fitness_weight, usage_weight : float, default 1.0 and 0.1
        Weights of the composite score, see `desirability`.
    eligible : array_like of bool, shape (n, m), optional
        Pairs that are possible at all; None is all of them.
    load_min, load_max : int or array_like of int, shape (m,), optional
        Hard bounds on the clients per expert; what is given here replaces the bound that `balance` sets. A
        Series is aligned by label.
    balance : float or None, default 0.25
        Keep every load within this tolerance of the mean load, with layers that of its layer: what a client's
        bounds leave open between layers is shared in proportion to their room. Where that is impossible, or
        clashes with a hard bound, it is widened by the fewest places, listed in ``Schedule.relaxed``. None sets no
        such bounds.
    load_penalty : LoadPenalty, optional
        Convex cost of the loads, for soft balance, in units of desirability; experts in the order of `fitness`. It
        comes on top of load bounds: with ``balance=None`` it is all that balances the loads.
    budgets : sequence of ResourceBudget, default ()
        What clients have of memory, seconds, ..., and what experts take of it; clients and experts in the order of
        `fitness`. `fedmoe_sched.scores.resource_budgets` makes them from capacity profiles.
    held : Schedule, mapping of client to experts, array_like or sparse array of bool, shape (n, m), optional
        What clients have from before, e.g. the schedule of last round. Names are matched where both sides have
        them: clients that are away count for nothing, new ones hold nothing. None: nobody holds anything.
    switching_cost : float, or array_like of shape (m,) or (n, m), default 0.0
        What it costs, in units of desirability, to give a client an expert that it does not hold: >= 0, e.g. in
        proportion to the expert's bytes. Part of the objective and of its proof; `switching_report` in
        `fedmoe_sched.switching` takes it apart. A Series or DataFrame is aligned by label.
    layers : ExpertLayers, optional
        Which experts are in which layer, and how many of each layer clients train; in the order of `fitness`.
    fill : bool, default True
        Whether clients train as many experts as they can (the rule of Chen et al. 2025), with layers as many as
        ``layer_max`` allows too, or only those of positive desirability and those that layers demand. With budgets
        they take as many as fit whichever they are, and of the others up to `capacity` only what is worth it;
        `balance` goes by these numbers too.
    solver : str or Solver, default "auto"
        Backend name or instance, see `fedmoe_sched.solvers`.
    time_limit : float, optional
        Wall seconds for the solver.
    seed : int, default 0
        Seed of everything random in a backend.
    warm_start : Schedule or array_like of shape (m,), optional
        Last round's schedule, or its prices, to start from.
    certify : bool, default False
        Give heuristics a bound too, at the cost of an exact solve.
    soft : bool, default False
        Where bounds exclude one another, widen ``min_experts``, ``layer_min``, ``load_min`` and ``load_max`` by
        the fewest places in total (`fedmoe_sched.relax`); ``Schedule.relaxed`` lists them with what one more place
        is worth. Budgets are kept; with them there are no such prices, and ``Schedule.relaxed_proved`` says
        whether time was enough to prove that fewer places would not do.

    Returns
    -------
    Schedule
        ``status`` INFEASIBLE if hard bounds exclude one another; ``conflict`` then names them.

    Raises
    ------
    InputError
        A wrong argument; the message names argument, position and value.

    Examples
    --------
    >>> answer = schedule([[0.9, 0.1], [0.8, 0.3], [0.7, 0.6], [0.6, 0.1]], usage=[1, 1], capacity=1)
    >>> answer.loads.tolist(), str(answer.status)
    ([3, 1], 'optimal')
    """
    _refuse_bad_options(fitness_weight, usage_weight, balance)
    bare = split_labels(fitness)
    known = as_matrix("fitness", bare.values)
    m = known.shape[1]
    usage = as_vector("usage", _aligned("usage", usage, bare.columns), m, "one per expert", least=0)
    scores = desirability(known, usage, fitness_weight=fitness_weight, usage_weight=usage_weight)
    scores = _switched(scores, held, switching_cost, bare)
    problem = AssignmentProblem(
        KnownMatrix(known) if scores is known else scores,
        _aligned("capacity", capacity, bare.rows),
        eligible=_aligned_matrix("eligible", eligible, bare.rows, bare.columns),
        load_penalty=load_penalty,
        budgets=budgets,
        layers=layers,
        client_labels=bare.rows,
        expert_labels=bare.columns,
    )
    low = _load_bound("load_min", load_min, bare.columns, m)
    high = _load_bound("load_max", load_max, bare.columns, m)
    problem, relaxed = _bounded(problem, low, high, balance, fill=fill)
    answer = (solve_soft if soft else solve)(
        problem,
        solver,
        limits=Limits(time=time_limit, seed=seed),
        certify=certify,
        warm_start=warm_start,
    )
    return dataclasses.replace(answer, relaxed=relaxed + answer.relaxed, fitness_weight=fitness_weight)


def _refuse_bad_options(fitness_weight: float, usage_weight: float, balance: float | None) -> None:
    for name, value in (("fitness_weight", fitness_weight), ("usage_weight", usage_weight)):
        if not np.isfinite(value):
            msg = f"{name} = {value}: must be finite"
            raise InputError(msg)
    if balance is not None and not (balance >= 0 and np.isfinite(balance)):
        msg = f"balance = {balance}: must be finite and >= 0, or None"
        raise InputError(msg)


def _load_bound(name: str, value: Any, experts: tuple[Hashable, ...] | None, size: int) -> IntArray | None:
    return None if value is None else as_counts(name, _aligned(name, value, experts), size, "one per expert")


def _bounded(
    problem: AssignmentProblem,
    low: IntArray | None,
    high: IntArray | None,
    balance: float | None,
    *,
    fill: bool,
) -> tuple[AssignmentProblem, tuple[Relaxation, ...]]:
    """Set the fewest experts and the load bounds; those that `balance` sets give way, those given do not."""
    if problem.budgets:
        # What the network around sure counts of experts can do, budgets cannot forbid.
        fits = fitting_pairs(problem)
        surely, _ = fitting_counts(problem, fits)
        # Of layers a client must take its fewest in any case: whether they fit depends on which they are.
        surely = np.maximum(surely, np.minimum(problem.demands, problem.capacity))
        sure = problem.replace(budgets=(), eligible=fits, capacity=surely)
        bounded, relaxed = _bounded(sure, low, high, balance, fill=fill)
        names = ("min_experts", "load_min", "load_max")
        return problem.replace(**{name: getattr(bounded, name) for name in names}), relaxed
    hard_low = 0 if low is None else low
    # A load_min above the number of clients is a conflict, which soft mode can solve, and no bad input.
    hard_high = np.maximum(problem.n_clients, hard_low) if high is None else high
    min_experts = problem.slots if fill else 0
    hard = problem.replace(min_experts=min_experts, load_min=hard_low, load_max=hard_high)
    if balance is None or (low is not None and high is not None):
        return hard, ()
    if problem.layers is None:
        soft_low, soft_high = balanced_load_bounds(problem.slots, problem.n_experts, balance)
    else:
        soft_low, soft_high = _around(mean_layer_loads(hard)[problem.layers.layer_of], balance)
    load_min = np.minimum(soft_low, hard.load_max) if low is None else low
    load_max = np.maximum(soft_high, hard.load_min) if high is None else high
    soft = hard.replace(load_min=load_min, load_max=load_max)
    return widen_load_bounds(soft, hard=(hard.load_min, hard.load_max))


def _switched(scores: FloatArray, held: Any, cost: Any, bare: Labelled) -> FloatArray:
    """Subtract the switching cost, put into the order of the fitness."""
    dimensions = getattr(cost, "ndim", 0)
    if dimensions == 1:
        cost = _aligned("switching_cost", cost, bare.columns)
    elif dimensions == 2:
        cost = _aligned_matrix("switching_cost", cost, bare.rows, bare.columns)
    before = as_held(held, scores.shape, bare.rows, bare.columns)
    return with_switching_cost(scores, before, as_switching_cost(cost, scores.shape))


def _aligned(name: str, value: Any, labels: tuple[Hashable, ...] | None) -> Any:
    """Put a labelled vector into the order of `labels`; anything else is left as it is."""
    bare = split_labels(value)
    if bare.rows is None or labels is None:
        return bare.values
    return np.asarray(bare.values)[_order(name, bare.rows, labels)]


def _aligned_matrix(
    name: str,
    value: Any,
    rows: tuple[Hashable, ...] | None,
    columns: tuple[Hashable, ...] | None,
) -> Any:
    bare = split_labels(value)
    if bare.rows is None or bare.columns is None or rows is None or columns is None:
        return bare.values
    by_row = np.asarray(bare.values)[_order(f"{name} (clients)", bare.rows, rows)]
    return by_row[:, _order(f"{name} (experts)", bare.columns, columns)]


def _order(name: str, have: tuple[Hashable, ...], want: tuple[Hashable, ...]) -> list[int]:
    places = {label: i for i, label in enumerate(have)}
    for label in want:
        if label not in places:
            msg = f"{name}: has no entry labelled {label!r}, which fitness has"
            raise InputError(msg)
    if len(have) != len(want):
        extra = next(label for label in have if label not in set(want) or have.count(label) > 1)
        msg = f"{name}: has {len(have)} entries, fitness has {len(want)} (first surplus: {extra!r})"
        raise InputError(msg)
    return [places[label] for label in want]
