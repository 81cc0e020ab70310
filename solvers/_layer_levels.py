"""Layers in the exact price backend: one problem per layer where they are independent, else nested bounds.

Layers are independent where neither ``capacity`` nor ``min_experts`` of any client says more than its layers do
one by one. Else the best response of a client is greedy within its nested bounds (`fedmoe_sched.layer_bound`), and
an exchange is between two experts of a layer, or between layers that can spare an expert and have room for one.
Samples, Newton steps, windows and jumps are those of `_price_levels`; shortest paths have kernels of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._layers import layer_bounds, layers_of
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solvers._layer_kernels import (
    exchange_costs_layered,
    net_scores,
    respond_layered,
    sharpen_slacks,
)
from fedmoe_sched.solvers._layer_paths import augment_layered
from fedmoe_sched.solvers._path_kernels import BALANCED, OUT_OF_ROOM
from fedmoe_sched.solvers._price_levels import Level, Prices, Run, Values
from fedmoe_sched.solvers._ties import Ties

__all__ = ["LayeredLevel", "join_layers", "layered_levels", "load_layer_kernels", "split_layers"]

_SPARE_ARCS = 65_536  # that clients may gain by moving before the graph is made anew


class _Tight(NamedTuple):
    """Bounds of all clients as the kernels take them: of each layer, shape (n, G), and of all, (n,); int16."""

    low: npt.NDArray[np.int16]
    high: npt.NDArray[np.int16]
    least: npt.NDArray[np.int16]
    most: npt.NDArray[np.int16]

    @classmethod
    def of(cls, problem: AssignmentProblem) -> _Tight:
        shape = (problem.n_clients, layers_of(problem).n_layers)
        bounds = cls(*(np.empty(size, dtype=np.int16) for size in (shape, shape, shape[0], shape[0])))
        for block in problem.blocks():
            for whole, part in zip(bounds, layer_bounds(problem, block), strict=True):
                whole[block] = part
        return bounds


def layered_levels(
    problem: AssignmentProblem,
) -> Callable[[AssignmentProblem, Ties, IntArray | None, Run], LayeredLevel]:
    """Return what makes the levels of a problem; its bounds are tightened once for all of them."""
    return partial(LayeredLevel, _Tight.of(problem))


class LayeredLevel(Level):
    """A sample of clients, or all of them, whose layers interact."""

    def __init__(
        self, bounds: _Tight, problem: AssignmentProblem, ties: Ties, rows: IntArray | None, run: Run
    ) -> None:
        super().__init__(problem, ties, rows, run)
        mine = bounds if rows is None else _Tight(*(part[rows] for part in bounds))
        self.low, self.high, self.least, self.most = mine
        layers = layers_of(problem)
        self._layer_of = np.append(layers.layer_of, layers.n_layers).astype(np.int16)

    def _choose(self, part: slice, values: Values, drift: float, settled: float, loads: IntArray) -> None:
        respond_layered(
            *values, self._layer_of, self.low[part], self.high[part], self.least[part], self.most[part], drift,
            settled, self.choice[part], self.count[part], self.slack[part], self.arcs[part], loads,
        )  # fmt: skip

    def _note_costs(self, part: slice, values: Values, costs: Prices) -> None:
        exchange_costs_layered(
            *values, self._layer_of, self.low[part], self.high[part], self.least[part], self.most[part],
            self.choice[part], self.count[part], costs,
        )  # fmt: skip

    def settle_directly(self, prices: Prices) -> Assignment | None:
        """Find the optimum of a small problem in as few steps as possible."""
        self.respond(prices)
        return self.assignment() if self._move(np.inf)[0] == BALANCED else None

    def _move(self, window: float) -> tuple[int, int]:
        """Move clients with a slack of at most `window` along shortest paths; see `Level._move`."""
        self._sharpen(window)
        rows = np.flatnonzero(self.slack <= window)
        score, held, count = self._states(rows)
        low, high, least, most = self.low[rows], self.high[rows], self.least[rows], self.most[rows]
        base = np.append(self.prices, 0.0)
        potential, loads = base.copy(), self.loads.copy()
        spare = _SPARE_ARCS + 2 * len(base) ** 3  # at least one path fits in
        status = OUT_OF_ROOM
        while status == OUT_OF_ROOM:
            status = augment_layered(
                self.penalty, self._layer_of, score, held, count, low, high, least, most, base, potential, loads,
                self.load_min, self.load_max, window, spare,
            )  # fmt: skip
        self._keep(rows, held, count[:, -1])
        self.loads = loads
        self._go_to(potential[:-1] - potential[-1])
        self.slack[rows] = 0.0
        return int(status), len(rows)

    def _sharpen(self, window: float) -> None:
        """Find out which of the clients that may be within the window are."""

        def block(number: int, part: slice, scores: FloatArray, eligible: BoolArray, first: int) -> None:
            sharpen_slacks(
                scores, eligible, self.ties.table, self.ties.size, first, self.prices, self._layer_of,
                self.low[part], self.high[part], self.least[part], self.most[part], self.choice[part],
                self.count[part], window, self.slack[part],
            )  # fmt: skip

        if window < np.inf:
            self._in_blocks(block)

    def _keep(self, rows: IntArray, held: BoolArray, count: IntArray) -> None:
        """Write what clients have after moving back into their choices."""
        chosen = self.choice[rows]
        chosen[np.arange(chosen.shape[1]) < count[:, None]] = np.nonzero(held)[1]
        self.choice[rows], self.count[rows] = chosen, count

    def _states(self, rows: IntArray) -> tuple[Prices, BoolArray, IntArray]:
        """Return scores, what is held, and how many of each layer and of all, of some clients."""
        m, n_layers = len(self.prices), self.low.shape[1]
        score, free = np.empty((len(rows), m)), np.zeros(m)

        def block(number: int, part: slice, scores: FloatArray, eligible: BoolArray, first: int) -> None:
            inside = slice(*np.searchsorted(rows, (part.start, part.stop)))
            net_scores(
                scores, eligible, self.ties.table, self.ties.size, first, free, rows[inside] - part.start,
                score[inside],
            )  # fmt: skip

        self._in_blocks(block)
        held = np.zeros((len(rows), m), dtype=np.bool_)
        places = np.arange(self.choice.shape[1]) < self.count[rows, None]
        held[np.nonzero(places)[0], self.choice[rows][places]] = True
        count = np.empty((len(rows), n_layers + 1), dtype=np.int64)
        for layer in range(n_layers):
            np.sum(held[:, self._layer_of[:-1] == layer], axis=1, out=count[:, layer])
        np.sum(held, axis=1, out=count[:, n_layers])
        return score, held, count


def split_layers(problem: AssignmentProblem) -> list[AssignmentProblem]:
    """Return the problem of every layer, for layers that do not interact."""
    bounds = _Tight.of(problem)
    return [
        problem.restrict(
            experts=experts,
            capacity=bounds.high[:, layer],
            min_experts=bounds.low[:, layer],
            layers=None,
            client_labels=None,  # of no use here, and checked anew for every layer
        )
        for layer, experts in enumerate(layers_of(problem).members)
    ]


def join_layers(problem: AssignmentProblem, parts: list[Assignment]) -> Assignment:
    """Put the assignments of the layers together."""
    indptr = np.sum([part.indptr for part in parts], axis=0)
    indices = np.empty(indptr[-1], dtype=np.int64)
    begin = indptr[:-1].copy()
    ordered, last = True, -1
    for part, experts in zip(parts, layers_of(problem).members, strict=True):
        places = np.arange(len(part.indices)) + np.repeat(begin - part.indptr[:-1], part.counts)
        indices[places] = experts[part.indices]
        begin += part.counts
        ordered, last = ordered and int(experts[0]) > last, int(experts[-1])
    if not ordered:  # layers whose experts are scattered
        return Assignment.from_pairs(np.repeat(np.arange(len(begin)), np.diff(indptr)), indices, problem.shape)
    return Assignment(indptr, indices, problem.n_experts)


@cache
def load_layer_kernels(dtype: npt.DTypeLike) -> None:
    """Call every kernel once with scores of this type: it is loaded from disk then, or compiled."""
    scores: Any = np.arange(16, dtype=dtype).reshape(4, 4)
    problem = AssignmentProblem(scores, 3, load_max=3, layers=ExpertLayers([0, 0, 1, 1], 1, 2))
    level = layered_levels(problem)(problem, Ties.none(4), None, map)
    level.settle_directly(np.zeros(4))
    level._sharpen(1.0)
    level._exchange_costs()
