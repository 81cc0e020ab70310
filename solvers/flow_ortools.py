"""Min-cost flow by OR-Tools: cost-scaling push-relabel on one arc per eligible pair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._layer_rows import client_side
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs
from fedmoe_sched.solvers._rounding import polished_answer, whole_scores, whole_steps

__all__ = ["OrToolsFlow"]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    flow: Any
    pair_arcs: npt.NDArray[np.int32]
    pairs: Pairs
    status: Any = None

    def assignment(self) -> Assignment | None:
        """Return the optimum of the rounded scores."""
        if self.flow is None or self.status != self.flow.OPTIMAL:
            return None
        used = self.flow.flows(self.pair_arcs) > 0
        clients, experts = self.pairs
        return Assignment.from_pairs(clients[used], experts[used], self.problem.shape)


class OrToolsFlow(Solver[_Model]):
    """Exact min-cost flow with OR-Tools' SimpleMinCostFlow.

    A circulation through a hub node: hub -> client (experts taken), client -> expert (the pairs), expert -> hub
    (loads; with a load penalty an arc for each client that an expert may get, because each costs more). With
    layers there is a node for each client and layer on the way from clients to experts.
    Desirability and penalties are rounded to whole costs; improving cycles that the rounding hid are cancelled
    afterwards, and the prices come from the same exchange graph. The engine cannot be interrupted: it runs to
    its end whatever the time limit, and the schedule says so.
    """

    name: ClassVar[str] = "flow-ortools"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.LAYERS,
        Capability.LOAD_PENALTY,
        Capability.PRICES,
    }
    requires: ClassVar[tuple[str, ...]] = ("ortools",)
    summary: ClassVar[str] = "min-cost flow (OR-Tools); the fastest off-the-shelf exact backend"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Add all arcs in bulk."""
        from ortools.graph.python import min_cost_flow

        n, m = problem.shape
        scores, _ = whole_scores(problem)
        pairs = eligible_pairs(problem)
        clients, experts = pairs
        bounds = clipped_bounds(problem)
        side = client_side(problem, pairs, bounds)
        if side is None:
            return _Model(problem, None, np.zeros(0, dtype=np.int32), pairs)
        flow = min_cost_flow.SimpleMinCostFlow()
        hub = n + m
        pair_arcs = flow.add_arcs_with_capacity_and_unit_cost(
            side.tails, n + experts, np.ones(len(clients), dtype=np.int64), -scores[clients, experts]
        )
        # Arcs are for what goes beyond the lower bounds, which are supplies of the end nodes.
        layered = hub + 1 + np.arange(len(side.owners))
        for tails, heads, room in (
            (np.full(n, hub), np.arange(n), side.room),
            (side.owners, layered, side.layer_room),
        ):
            flow.add_arcs_with_capacity_and_unit_cost(tails, heads, room, np.zeros_like(room))
        steps = whole_steps(problem, bounds)
        flow.add_arcs_with_capacity_and_unit_cost(
            n + steps.experts, np.full(len(steps.experts), hub), steps.sizes, steps.costs.astype(np.int64)
        )
        demand = int(bounds.expert_min.sum()) - side.total
        flow.set_nodes_supplies(np.arange(n), side.supply)
        flow.set_nodes_supplies(layered, side.layer_supply)
        flow.set_nodes_supplies(n + np.arange(m), -bounds.expert_min)
        flow.set_nodes_supplies(np.array([hub]), np.array([demand]))
        return _Model(problem, flow, pair_arcs, pairs)

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve to the end: the engine takes no limits."""
        if model.flow is not None:
            model.status = model.flow.solve()

    def read(self, model: _Model) -> Answer:
        """Read the flows, undo the rounding, find the prices."""
        if model.flow is None:
            return Answer(StopReason.PROVED_INFEASIBLE)
        assignment = model.assignment()
        if assignment is None:
            infeasible = model.status in (model.flow.INFEASIBLE, model.flow.UNBALANCED)
            reason = StopReason.PROVED_INFEASIBLE if infeasible else StopReason.FAILED
            return Answer(reason, message=str(model.status))
        return polished_answer(model.problem, assignment)
