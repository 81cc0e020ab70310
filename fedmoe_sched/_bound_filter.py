"""A minimal set of bounds that exclude one another, by leaving others out, for any oracle of feasibility.

A mix of the deletion and the additive filter (Chinneck, *Feasibility and Infeasibility in Optimization*, 2008,
section 6.1): the shortest infeasible beginning of a list of bounds ends with one that is needed, and all behind it
are not. Bisection finds it, so that k bounds among N need some k log N tries.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, IntArray
from fedmoe_sched._dealing import alike_clients
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.result import Bound

__all__ = ["Bounds", "OutOfTimeError", "needed", "with_demands"]


class OutOfTimeError(Exception):
    """The oracle does not know, and there is no time left to find out."""


class Bounds:
    """The bounds of a problem as a list that can be kept in part: those of experts first, then client by client.

    Capacities, ``layer_max``, eligibility and budgets are what clients can do, and always kept.

    Parameters
    ----------
    problem : AssignmentProblem
    """

    def __init__(self, problem: AssignmentProblem) -> None:
        self._problem = problem
        n, m = problem.shape
        layers = 0 if problem.layers is None else problem.layers.n_layers
        self._least = np.zeros((n, layers), dtype=np.int64)
        if problem.layers is not None:
            self._least = problem.layers.bounds_of(slice(0, n), n)[0]
        # One row per client: min_experts, then layer_min of each layer.
        self._own = np.hstack([problem.min_experts[:, None], self._least])
        self._active = np.concatenate([problem.load_min > 0, problem.load_max < n, (self._own > 0).reshape(-1)])
        self._start = 2 * m

    def blocks(self, numbers: IntArray) -> list[IntArray]:
        """Part bounds by kind, and those of layers by layer."""
        m, width = self._problem.n_experts, self._own.shape[1]
        kind = np.where(numbers < self._start, numbers // m, 2 + (numbers - self._start) % width)
        return [numbers[kind == one] for one in np.unique(kind)]

    def twins(self, kept: IntArray, number: int) -> IntArray:
        """Return a bound, and the same bound of clients that are alike and have the same bounds kept."""
        width = self._own.shape[1]
        if number < self._start:
            return np.array([number])
        client, column = divmod(number - self._start, width)
        keep = np.zeros(len(self._active), dtype=np.bool_)
        keep[kept] = True
        own = keep[self._start :].reshape(self._own.shape)
        same = (self._alike == self._alike[client]) & (own == own[client]).all(axis=1)
        numbers: IntArray = self._start + np.flatnonzero(same) * width + column
        return numbers

    @cached_property
    def _alike(self) -> IntArray:
        """The kind of each client; budgets make every client one of its own."""
        return np.arange(self._problem.n_clients) if self._problem.budgets else alike_clients(self._problem)[1]

    @property
    def all(self) -> IntArray:
        """Numbers of all bounds that exclude anything."""
        return np.flatnonzero(self._active)

    def of(self, *, load_min: IntArray, load_max: IntArray, clients: IntArray) -> IntArray:
        """Return the numbers of the bounds of some experts and clients that exclude anything."""
        m, width = self._problem.n_experts, self._own.shape[1]
        own = self._start + (clients[:, None] * width + np.arange(width)).reshape(-1)
        numbers = np.concatenate([load_min, m + load_max, own]).astype(np.int64)
        active: IntArray = numbers[self._active[numbers]]
        return active

    def names(self, kept: IntArray) -> tuple[Bound, ...]:
        """Name bounds by number."""
        m, width = self._problem.n_experts, self._own.shape[1]

        def name(number: int) -> Bound:
            if number < self._start:
                return Bound("load_max" if number >= m else "load_min", number % m)
            client, layer = divmod(number - self._start, width)
            return Bound("layer_min", client, layer - 1) if layer else Bound("min_experts", client)

        return tuple(map(name, kept.tolist()))

    def only(self, kept: IntArray) -> AssignmentProblem:
        """Return the problem with these bounds alone."""
        problem, m = self._problem, self._problem.n_experts
        keep = np.zeros(len(self._active), dtype=np.bool_)
        keep[kept] = True
        own = np.where(keep[self._start :].reshape(self._own.shape), self._own, 0)
        layers = problem.layers
        if layers is not None:
            layers = ExpertLayers(layers.layer_of, own[:, 1:], layers.layer_max)
        return problem.replace(
            min_experts=own[:, 0],
            load_min=np.where(keep[:m], problem.load_min, 0),
            load_max=np.where(
                keep[m : 2 * m], problem.load_max, max(problem.n_clients, int(problem.load_min.max()))
            ),
            layers=layers,
        )


def with_demands(problem: AssignmentProblem) -> AssignmentProblem:
    """Leave out clients that must take nothing, where no expert must have any: they are in nobody's way."""
    wanting: BoolArray = problem.demands > 0
    if (problem.load_min > 0).any() or wanting.all() or not wanting.any():
        return problem
    clients = np.flatnonzero(wanting)
    layers = problem.layers
    if layers is not None:
        layers = ExpertLayers(layers.layer_of, *layers.bounds_of(clients, len(clients)))
    return AssignmentProblem(
        np.zeros((len(clients), problem.n_experts), dtype=np.float16),
        problem.capacity[clients],
        min_experts=problem.min_experts[clients],
        load_max=problem.load_max,
        eligible=None if problem.eligible is None else problem.eligible[clients],
        budgets=[
            ResourceBudget(
                resource.name,
                resource.size if resource.size.ndim == 1 else resource.size[clients],
                resource.budget[clients],
            )
            for resource in problem.budgets
        ],
        layers=layers,
    )


class _Needed(NamedTuple):
    kept: IntArray
    done: bool


def needed(
    items: list[IntArray],
    clash: Callable[[IntArray], bool],
    deadline: float,
    twins: Callable[[IntArray, int], IntArray] | None = None,
) -> _Needed:
    """Leave out of some bounds those without which the others exclude one another all the same.

    Parameters
    ----------
    items : list of ndarray of int
        Bounds that exclude one another, in parts that are left out or kept as a whole; those better named first.
    clash : callable
        Whether some of them exclude one another; may raise `OutOfTimeError`.
    deadline : float
        On the clock of `time.perf_counter`.
    twins : callable, optional
        Takes what is kept and a bound in it that is needed; returns that one and others that are, by symmetry.
        For items of one bound each.

    Returns
    -------
    kept : ndarray of int, ascending
    done : bool
        Whether every item of them is needed; False where there was no time to see.
    """
    rest = np.concatenate([*items, np.zeros(0, dtype=np.int64)])
    ends = np.cumsum([0, *map(len, items)])
    core = np.zeros(0, dtype=np.int64)
    while True:
        few, many = -1, len(ends) - 1  # the core and so many items of the rest: no clash, clash
        while many - few > 1:
            middle = (few + many) // 2
            try:
                if time.perf_counter() > deadline:
                    raise OutOfTimeError
                clashes = clash(np.concatenate([core, rest[: ends[middle]]]))
            except OutOfTimeError:
                return _Needed(np.sort(np.concatenate([core, rest[: ends[many]]])), done=False)
            few, many = (few, middle) if clashes else (middle, many)
        if many == 0:
            return _Needed(np.sort(core), done=True)
        found = rest[ends[many - 1] : ends[many]]
        kept = np.concatenate([core, rest[: ends[many]]])
        rest, ends = rest[: ends[many - 1]], ends[:many]
        if twins is not None:
            found = np.setdiff1d(twins(kept, int(found[0])), core)
            rest = rest[~np.isin(rest, found)]
            ends = np.arange(len(rest) + 1)
        core = np.concatenate([core, found])
