"""What it costs to turn the decision on one pair round, and which bounds, wider by one, would bring it in."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray
from fedmoe_sched.exchange import ExchangeGraph

__all__ = ["PairMargins"]


class PairMargins:
    """Margins of the pairs of an optimal assignment, by shortest distances in its exchange graph.

    Parameters
    ----------
    graph : ExchangeGraph
        Of an optimal assignment.
    distance : ndarray, shape (m + 1, m + 1)
        As `ExchangeGraph.distances` returns them.
    """

    def __init__(self, graph: ExchangeGraph, distance: FloatArray) -> None:
        self.graph = graph
        self.distance = distance

    def held(self, client: int) -> BoolArray:
        """Return which experts a client has; shape (m,), bool."""
        row: BoolArray = self.graph.held[client]
        return row

    def costs(self, client: int, expert: int) -> FloatArray:
        """Return what turning the decision on an eligible pair round costs, by its partner.

        Returns
        -------
        ndarray, shape (m + 1,), float64
            By the expert that the client gives up for this one, or takes instead of it; the last entry is for
            one expert more, or less. inf where that is impossible.
        """
        return self._removal(client, expert) if self.held(client)[expert] else self._insertion(client, expert)

    def _insertion(self, client: int, expert: int) -> FloatArray:
        problem, graph, m = self.graph.problem, self.graph, self.graph.problem.n_experts
        held, scores = self.held(client), problem.desirability[client].astype(np.float64)
        costs: FloatArray = np.full(m + 1, np.inf)
        costs[:m][held] = scores[held]
        if graph.counts[client] < problem.capacity[client]:
            costs[m] = 0.0
        if graph.layers is not None:
            costs[~graph.layers.partners(client, expert, taken=True)] = np.inf
        costs += self.distance[expert] - scores[expert]
        return costs

    def _removal(self, client: int, expert: int) -> FloatArray:
        problem, graph, m = self.graph.problem, self.graph, self.graph.problem.n_experts
        held, scores = self.held(client), problem.desirability[client].astype(np.float64)
        costs: FloatArray = np.full(m + 1, np.inf)
        free = ~held if problem.eligible is None else ~held & problem.eligible[client]
        costs[:m][free] = -scores[free]
        if graph.counts[client] > problem.min_experts[client]:
            costs[m] = 0.0
        if graph.layers is not None:
            costs[~graph.layers.partners(client, expert, taken=False)] = np.inf
        costs += self.distance[:, expert] + scores[expert]
        return costs

    def brought_in_by(self, client: int, expert: int) -> tuple[tuple[str, ...], ...]:
        """Return which bounds, each wider by one, bring an eligible pair that is not chosen into every optimum.

        The graph of the wider problem is that of the narrower one with a few arcs more, and one improving cycle
        or two away from its optimum.

        Returns
        -------
        tuple of tuple of str
            Sets of ``"capacity"``, ``"load_max"`` and ``"layer_max"``, all of them at their limit now; of these
            sets only those no part of which is enough.
        """
        full = self._full(client, expert)
        enough: list[tuple[str, ...]] = []
        for size in range(1, len(full) + 1):
            for bounds in combinations(full, size):
                part_is_enough = any(set(known) <= set(bounds) for known in enough)
                if not part_is_enough and self._brings_in(client, expert, bounds):
                    enough.append(bounds)
        return tuple(enough)

    def _full(self, client: int, expert: int) -> list[str]:
        """Name the upper bounds of the pair that are at their limit."""
        problem, graph = self.graph.problem, self.graph
        full = {
            "capacity": graph.counts[client] == problem.capacity[client],
            "load_max": graph.loads[expert] == problem.load_max[expert],
            "layer_max": graph.layers is not None and graph.layers.is_full(client, expert),
        }
        return [name for name, binds in full.items() if binds]

    def _brings_in(self, client: int, expert: int, bounds: tuple[str, ...]) -> bool:
        problem = self.graph.problem
        changes = {}
        for name, at in (("capacity", client), ("load_max", expert)):
            if name in bounds:
                changes[name] = getattr(problem, name).copy()
                changes[name][at] += 1
        layer_of = (client, expert) if "layer_max" in bounds else None
        graph = self.graph.widened(problem.replace(**changes), layer_of=layer_of)
        graph.settle()
        if not graph.held[client, expert]:
            return False
        distance = graph.distances()
        assert distance is not None
        worth = float(PairMargins(graph, distance).costs(client, expert).min())
        return worth > graph.tolerance() * (problem.n_experts + 1)  # else others do as well
