"""Min-cost flow by NetworkX: the network simplex method in plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._layer_rows import ClientSide, client_side
from fedmoe_sched.solvers._load_steps import LoadSteps
from fedmoe_sched.solvers._matrix import Bounds, clipped_bounds, eligible_pairs
from fedmoe_sched.solvers._rounding import polished_answer, whole_scores, whole_steps

__all__ = ["NetworkXFlow"]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    graph: Any
    flow: dict[int, dict[int, dict[int, int]]] | None = None


class NetworkXFlow(Solver[_Model]):
    """Exact min-cost flow with NetworkX's network simplex, which needs no compiled code.

    A circulation through a hub node: hub -> client (experts taken), client -> expert (the pairs), expert -> hub
    (loads; with a load penalty an arc for each client that an expert may get, because each costs more); lower
    bounds are supplies of the end nodes. With layers there is a node for each client and layer on the way from
    clients to experts. The method is sure to be exact for whole costs only, so desirability and penalties are
    rounded, and improving cycles that the rounding hid are cancelled afterwards. Cannot be
    interrupted: it runs to its end whatever the time limit, and the schedule says so.
    """

    name: ClassVar[str] = "flow-networkx"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.LAYERS,
        Capability.LOAD_PENALTY,
        Capability.PRICES,
    }
    requires: ClassVar[tuple[str, ...]] = ("networkx",)
    summary: ClassVar[str] = "min-cost flow (NetworkX, pure Python); readable, for up to some 100,000 pairs"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Make the graph; nodes: clients, then experts, then the hub."""
        import networkx as nx

        n = problem.n_clients
        scores, _ = whole_scores(problem)
        pairs = eligible_pairs(problem)
        costs = (-scores[pairs.clients, pairs.experts]).tolist()
        bounds = clipped_bounds(problem)
        side = client_side(problem, pairs, bounds)
        if side is None:
            return _Model(problem, None)
        graph: Any = nx.MultiDiGraph()
        _add_nodes(graph, side, bounds)
        _add_load_arcs(graph, whole_steps(problem, bounds), problem.shape)
        arcs = zip(side.tails.tolist(), (n + pairs.experts).tolist(), costs, strict=True)
        graph.add_edges_from((tail, head, {"capacity": 1, "weight": cost}) for tail, head, cost in arcs)
        return _Model(problem, graph)

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve to the end: the engine takes no limits."""
        import networkx as nx

        if model.graph is None:
            return
        try:
            _, model.flow = nx.network_simplex(model.graph)
        except nx.NetworkXUnfeasible:
            model.flow = None

    def read(self, model: _Model) -> Answer:
        """Read the flows, undo the rounding, find the prices."""
        if model.flow is None:
            return Answer(StopReason.PROVED_INFEASIBLE)
        n, m = model.problem.shape
        n_layers = 0 if model.problem.layers is None else model.problem.layers.n_layers
        chosen = []
        for i in range(n):
            first = n + m + 1 + i * n_layers
            tails = range(first, first + n_layers) if n_layers else (i,)
            used = [flow for tail in tails for flow in model.flow[tail].items()]
            chosen += [(i, head - n) for head, parallel in used if any(parallel.values())]
        clients, experts = np.array(chosen, dtype=np.int64).reshape(-1, 2).T
        return polished_answer(model.problem, Assignment.from_pairs(clients, experts, model.problem.shape))


def _add_nodes(graph: Any, side: ClientSide, bounds: Bounds) -> None:
    """Add the nodes, and what clients take beyond their lower bounds; those are supplies (negative demands)."""
    n, m = len(side.room), len(bounds.expert_min)
    hub = n + m
    graph.add_nodes_from((i, {"demand": -supply}) for i, supply in enumerate(side.supply.tolist()))
    graph.add_nodes_from((n + j, {"demand": least}) for j, least in enumerate(bounds.expert_min.tolist()))
    graph.add_node(hub, demand=side.total - int(bounds.expert_min.sum()))
    layered = enumerate(side.layer_supply.tolist(), start=hub + 1)
    graph.add_nodes_from((node, {"demand": -supply}) for node, supply in layered)
    client_arcs = enumerate(side.room.tolist())
    graph.add_edges_from((hub, i, {"capacity": room, "weight": 0}) for i, room in client_arcs)
    layer_arcs = enumerate(zip(side.owners.tolist(), side.layer_room.tolist(), strict=True), start=hub + 1)
    graph.add_edges_from((i, node, {"capacity": room, "weight": 0}) for node, (i, room) in layer_arcs)


def _add_load_arcs(graph: Any, steps: LoadSteps, shape: tuple[int, int]) -> None:
    """Add what experts get beyond their lower bounds: parallel arcs where the cost rises with the load."""
    n, hub = shape[0], sum(shape)
    arcs = zip(steps.experts.tolist(), steps.sizes.tolist(), steps.costs.tolist(), strict=True)
    graph.add_edges_from((n + j, hub, {"capacity": size, "weight": int(cost)}) for j, size, cost in arcs)
