"""Min-cost flow by pylmcf: LEMON's network simplex on one arc per eligible pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched import AssignmentProblem, Limits, Solver, StopReason
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs
from fedmoe_sched.solvers._rounding import polished_answer, whole_scores

__all__ = ["PylmcfSimplex"]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    graph: Any
    pairs: Pairs
    pair_arcs: npt.NDArray[np.int64]
    refusal: str = ""


class PylmcfSimplex(Solver[_Model]):
    """Exact min-cost flow with pylmcf's network simplex (LEMON; Király and Kovács 2012).

    The engine takes no negative costs. So every client supplies as many units as it has capacity: over its pairs
    at the largest score less the pair's own, or straight to the sink, unused, at the largest score. Experts pass
    on what lies between their two load bounds, which the engine takes as bounds of an arc. Whole costs, and the
    way back to the unrounded optimum, are those of the backend ``flow-ortools``.
    """

    name: ClassVar[str] = "flow-pylmcf"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {Capability.PRICES}
    requires: ClassVar[tuple[str, ...]] = ("pylmcf",)
    summary: ClassVar[str] = "network simplex (LEMON through pylmcf)"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Add all arcs in bulk, ordered by tail and head, which is the order that the engine answers in."""
        import pylmcf

        n, m = problem.shape
        sink = n + m
        pairs = eligible_pairs(problem)
        clients, experts = pairs
        bounds = clipped_bounds(problem)
        scores, _ = whole_scores(problem)
        largest = max(0, int(scores.max()))
        # The arcs of client i are its pairs and then the one to the sink; those of the experts come last.
        pair_arcs = np.arange(len(clients)) + clients
        idle_arcs = np.cumsum(problem.eligible_counts) + np.arange(n)
        tails, heads = np.empty((2, len(clients) + n + m), dtype=np.int32)
        low, high, costs = np.zeros((3, len(tails)), dtype=np.int64)
        tails[pair_arcs], heads[pair_arcs] = clients, n + experts
        tails[idle_arcs], heads[idle_arcs] = np.arange(n), sink
        tails[-m:], heads[-m:] = n + np.arange(m), sink
        high[pair_arcs], costs[pair_arcs] = 1, largest - scores[clients, experts]
        high[idle_arcs], costs[idle_arcs] = bounds.client_max - bounds.client_min, largest
        low[-m:], high[-m:] = bounds.expert_min, bounds.expert_max
        graph = pylmcf.Graph(sink + 1, tails, heads)
        graph.set_edge_capacities(high)
        graph.set_edge_minimums(low)
        graph.set_edge_costs(costs)
        supply = np.zeros(sink + 1, dtype=np.int64)
        supply[:n], supply[sink] = bounds.client_max, -bounds.client_max.sum()
        graph.set_node_supply(supply)
        return _Model(problem, graph, pairs, pair_arcs)

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve to the end: the engine takes no limits."""
        try:
            model.graph.solve()
        except (RuntimeError, ValueError) as error:
            model.refusal = str(error) or type(error).__name__

    def read(self, model: _Model) -> Answer:
        """Read the flows, undo the rounding, find the prices."""
        if model.refusal:
            infeasible = "infeasible" in model.refusal.lower()
            reason = StopReason.PROVED_INFEASIBLE if infeasible else StopReason.FAILED
            return Answer(reason, message=model.refusal)
        clients, experts = model.pairs
        used = np.asarray(model.graph.result())[model.pair_arcs] > 0
        assignment = Assignment.from_pairs(clients[used], experts[used], model.problem.shape)
        return polished_answer(model.problem, assignment)
