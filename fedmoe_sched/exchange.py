"""The exchange graph of an assignment: prices out of an answer, and improving cycles where there are any.

The graph has one node per expert and one more, the *spare* node, for slots that clients leave unused. An arc
a -> b costs the least loss of desirability with which one client can give up expert a and take b in its place;
arcs to and from the spare node are clients that give up, or take, one expert more, and loads that may still
rise or fall within their bounds, at their marginal penalty. It is the residual network of the assignment as a
circulation with all client nodes contracted: an assignment is optimal exactly when the graph has no negative
cycle, and shortest distances are then optimal dual prices (Ahuja, Magnanti and Orlin, *Network Flows*, theorems
9.1 and 9.3; chapter 14 for convex penalties). A cycle moves every load by at most one client, so that its cost is
what cancelling it gains.

With layers a client may exchange two experts of one layer, and of two layers only where it can do with one less
of the first and may train one more of the second; the spare node is a layer without bounds. A cycle that uses a
client twice may then break its bounds; it falls into two cycles, which cost as much together.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._layer_exchange import Arc, LayerRoom
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["ExchangeGraph", "Polished", "polish", "recover_prices"]

_FREE = -1  # the client of an arc that moves no client: a load with room within its bounds


@dataclass(frozen=True, eq=False)
class Polished:
    """An assignment after its improving cycles were cancelled.

    Parameters
    ----------
    assignment : Assignment
    prices : ndarray, shape (m,), float64
        Optimal dual prices.
    cycles : int
        How many improving cycles were cancelled.
    """

    assignment: Assignment
    prices: npt.NDArray[np.float64]
    cycles: int


class ExchangeGraph:
    """Costs and clients of the arcs, kept up to date while cycles are cancelled.

    Parameters
    ----------
    problem : AssignmentProblem
        Without budgets.
    assignment : Assignment
        Feasible for it.
    """

    def __init__(self, problem: AssignmentProblem, assignment: Assignment) -> None:
        self.problem = problem
        self.held = assignment.mask()
        self.counts = assignment.counts.copy()
        self.loads = assignment.loads.copy()
        self._largest_score = problem.largest_score
        self.layers = None if problem.layers is None else LayerRoom(problem, self.held)
        m = problem.n_experts
        self.cost = np.full((m + 1, m + 1), np.inf)
        self.client = np.full((m + 1, m + 1), _FREE, dtype=np.int64)
        self.update(range(m + 1))

    def update(self, nodes: Iterable[int]) -> None:
        """Recompute the arcs that leave `nodes`, and all that depend on loads alone."""
        spare = self.problem.n_experts
        for node in nodes:
            if node == spare:
                self._leave_spare()
            else:
                self._leave_expert(node)
        # A load that moves by itself beats any client's arc only where it is cheaper. The load of an expert that
        # is not among the nodes has not changed, so neither has what was offered for it before.
        rise, fall = self._load_costs()
        for cost, client, offer in (
            (self.cost[:spare, spare], self.client[:spare, spare], rise),
            (self.cost[spare, :spare], self.client[spare, :spare], fall),
        ):
            cheaper = offer < cost
            cost[cheaper], client[cheaper] = offer[cheaper], _FREE

    def _load_costs(self) -> tuple[FloatArray, FloatArray]:
        """Cost of one client more, and of one less, at each expert; inf where the bounds forbid it."""
        problem, loads = self.problem, self.loads
        rise, fall = np.zeros(problem.n_experts), np.zeros(problem.n_experts)
        if problem.load_penalty is not None:
            experts = np.arange(problem.n_experts)
            rise = problem.load_penalty.marginal_of(experts, loads + 1)
            fall = -problem.load_penalty.marginal_of(experts, np.maximum(loads, 1))
        rise[loads >= problem.load_max] = np.inf
        fall[loads <= problem.load_min] = np.inf
        return rise, fall

    def tolerance(self) -> float:
        """Return the rounding error of a path of differences: below it an improvement is not real.

        Only penalties that a path may gain count, not those that one client more would cost: paths avoid an arc
        that costs more than the rest of the graph gains, and its rounding error with it.
        """
        scale = max(self._largest_score, -float(min(cost.min() for cost in self._load_costs())))
        return 8 * float(np.finfo(np.float64).eps) * scale

    def _gains(self, clients: IntArray) -> FloatArray:
        """Desirability of what each client could take in addition; -inf where it cannot."""
        gains = self.problem.desirability[clients].astype(np.float64)
        gains[self.held[clients]] = -np.inf
        if self.problem.eligible is not None:
            gains[~self.problem.eligible[clients]] = -np.inf
        return gains

    def _best(self, clients: IntArray, given_up: FloatArray, tail: int) -> tuple[FloatArray, IntArray]:
        """Least of given_up - gain over `clients`, per expert, and the client that attains it."""
        m = self.problem.n_experts
        cost, who = np.full(m, np.inf), np.full(m, _FREE, dtype=np.int64)
        step = max(1, 524_288 // m)
        for start in range(0, len(clients), step):
            part = clients[start : start + step]
            loss = given_up[start : start + step, None] - self._gains(part)
            if self.layers is not None:
                loss[~self.layers.may_take(part, tail)] = np.inf
            at = np.argmin(loss, axis=0)
            least = loss[at, np.arange(m)]
            better = least < cost
            cost[better], who[better] = least[better], part[at[better]]
        return cost, who

    def _leave_expert(self, expert: int) -> None:
        spare = self.problem.n_experts
        holders = np.flatnonzero(self.held[:, expert])
        given_up = self.problem.desirability[holders, expert].astype(np.float64)
        self.cost[expert, :spare], self.client[expert, :spare] = self._best(holders, given_up, expert)
        self.cost[expert, spare], self.client[expert, spare] = np.inf, _FREE
        may_drop = self.counts[holders] > self.problem.min_experts[holders]
        if self.layers is not None:
            may_drop &= self.layers.may_give(holders, expert)
        if may_drop.any():
            at = int(np.argmin(np.where(may_drop, given_up, np.inf)))
            self.cost[expert, spare], self.client[expert, spare] = given_up[at], holders[at]

    def _leave_spare(self) -> None:
        spare = self.problem.n_experts
        idle = np.flatnonzero(self.counts < self.problem.capacity)
        self.cost[spare, :spare], self.client[spare, :spare] = self._best(idle, np.zeros(len(idle)), spare)

    def widened(self, problem: AssignmentProblem, *, layer_of: tuple[int, int] | None = None) -> ExchangeGraph:
        """Return a copy of the graph for a problem in which some of the bounds are wider.

        Parameters
        ----------
        problem : AssignmentProblem
            Of which nothing else has changed.
        layer_of : (int, int), optional
            A client and an expert: the client may train one more of the expert's layer, whatever `problem` says.
        """
        graph = copy.copy(self)
        graph.problem = problem
        for name in ("held", "counts", "loads", "cost", "client"):
            setattr(graph, name, getattr(self, name).copy())
        stale = [problem.n_experts]
        if self.layers is not None:
            graph.layers = self.layers.copy()
            if layer_of is not None:
                graph.layers.widen(*layer_of)
                stale += np.flatnonzero(self.held[layer_of[0]]).tolist()
        graph.update(stale)
        return graph

    def settle(self) -> tuple[npt.NDArray[np.float64], int]:
        """Cancel improving cycles until none is left; return optimal prices, shape (m,), and their number."""
        cycles = 0
        while True:
            distance, cycle = _shortest(self.cost, self.tolerance())
            if cycle is None:
                return distance[-1] - distance[:-1], cycles
            self.cancel(cycle)
            cycles += 1

    def distances(self) -> FloatArray | None:
        """Return what it costs at least to hand one place from any node to any other.

        By the algorithm of Floyd and Warshall (Ahuja, Magnanti and Orlin, *Network Flows*, section 5.6).

        Returns
        -------
        ndarray, shape (m + 1, m + 1), float64, or None
            Entry (a, b) is the least loss of the objective over all ways of moving clients by which expert a loses
            one client and expert b gains one; number m is the spare node. inf where there is none, 0 on the
            diagonal. None if the assignment is not optimal: then some cycle gains.
        """
        if _shortest(self.cost, self.tolerance())[1] is not None:
            return None
        distance: FloatArray = self.cost.copy()
        np.fill_diagonal(distance, 0.0)
        for node in range(len(distance)):
            np.minimum(distance, distance[:, node, None] + distance[None, node], out=distance)
        return distance

    def cancel(self, cycle: list[int]) -> None:
        """Move every client of the arcs of `cycle`, then bring the graph up to date."""
        spare = self.problem.n_experts
        moved = []
        # All moves are read off before any is made: they are simultaneous.
        arcs = [Arc(a, b, int(self.client[a, b])) for a, b in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
        if self.layers is not None:
            arcs = self.layers.split(arcs, self._arc_cost)
        for tail, head, client in arcs:
            if client == _FREE:
                continue
            moved.append(client)
            self._shift(client, tail, -1, spare)
            self._shift(client, head, +1, spare)
        # Arcs that leave the spare node change with any client's count; arcs that leave an expert change
        # only for the experts that a moved client holds now or held before.
        stale = set(np.flatnonzero(self.held[moved].any(axis=0)).tolist()) | set(cycle) | {spare}
        self.update(sorted(stale))

    def _arc_cost(self, arc: Arc) -> float:
        """Return what an arc costs that may not be the cheapest between its ends."""
        if arc.client == _FREE:
            return float(self.cost[arc.tail, arc.head])
        scores = np.append(self.problem.desirability[arc.client].astype(np.float64), 0.0)
        return float(scores[arc.tail] - scores[arc.head])

    def _shift(self, client: int, node: int, step: int, spare: int) -> None:
        if node == spare:
            return
        if self.layers is not None:
            self.layers.shift(client, node, step)
        self.held[client, node] = step > 0
        self.counts[client] += step
        self.loads[node] += step


def _shortest(cost: FloatArray, tolerance: float) -> tuple[FloatArray, list[int] | None]:
    """Bellman-Ford from a virtual root: distances, or a cycle of negative cost."""
    size = len(cost)
    distance = np.zeros(size)
    parent = np.full(size, -1)
    changed, every = np.arange(size), np.arange(size)
    for _ in range(size + 1):
        through = distance[changed, None] + cost[changed]
        best = np.argmin(through, axis=0)
        candidate = through[best, every]
        closer = candidate < distance - tolerance
        if not closer.any():
            return distance, None
        distance[closer], parent[closer] = candidate[closer], changed[best[closer]]
        changed = np.flatnonzero(closer)  # from all others nothing has come closer
    node = int(np.argmax(closer))
    for _ in range(size):  # every node that is still getting closer hangs below a cycle of parents
        node = int(parent[node])
    cycle = [node]
    while (node := int(parent[node])) != cycle[0]:
        cycle.append(node)
    return distance, cycle[::-1]


def polish(problem: AssignmentProblem, assignment: Assignment) -> Polished:
    """Cancel improving cycles until none is left: the result is optimal and comes with its prices.

    Backends that round desirability to whole numbers use this to reach the optimum of the unrounded problem.

    Parameters
    ----------
    problem : AssignmentProblem
    assignment : Assignment
        Feasible for the problem.

    Returns
    -------
    Polished
    """
    graph = ExchangeGraph(problem, assignment)
    prices, cycles = graph.settle()
    held: BoolArray = graph.held
    return Polished(Assignment.from_mask(held) if cycles else assignment, prices, cycles)


def recover_prices(problem: AssignmentProblem, assignment: Assignment) -> npt.NDArray[np.float64]:
    """Find optimal dual prices, starting from a feasible assignment that is optimal or nearly so.

    Parameters
    ----------
    problem, assignment
        See `polish`.

    Returns
    -------
    ndarray, shape (m,), float64
        Prices p for which `fedmoe_sched.certify.dual_bound` equals the optimum.
    """
    return polish(problem, assignment).prices
