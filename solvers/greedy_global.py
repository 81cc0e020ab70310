"""All pairs in order of desirability, taken while the bounds leave room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._layer_ranks import LayerWalk
from fedmoe_sched.solvers._matrix import clipped_bounds, eligible_pairs

__all__ = ["GreedyGlobal"]

_CHUNK = 65_536  # pairs between two clean-ups of those that can no longer be taken


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    clients: npt.NDArray[np.int64]
    experts: npt.NDArray[np.int64]
    n_positive: int
    assignment: Assignment | None = None


class GreedyGlobal(Solver[_Model]):
    """Walk through all eligible pairs, the most desirable first, and take what the bounds leave room for.

    Capacities, eligibility and ``load_max`` always hold. For the lower bounds it sets places aside: a pair that
    does not help an expert below ``load_min`` is passed over once the slots left are only as many as such
    experts still miss, and a pair that does not help a client below ``min_experts`` once the places left are
    only as many as such clients still miss. With layers ``layer_max`` always holds, and a client keeps as
    many slots as its other layers still miss. These are counts over everybody: which slots reach which expert is
    not looked at, and nothing taken is ever given back, so lower bounds may stay unmet and the schedule is then
    VIOLATED. Pairs of no positive desirability are taken only for a lower bound that is still unmet.
    Ties go to the lower client number, then the lower expert number. Cannot be interrupted.
    """

    name: ClassVar[str] = "greedy-global"
    exact: ClassVar[bool] = False
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {Capability.LAYERS}
    summary: ClassVar[str] = "all pairs by desirability; keeps load_max, tries for load_min"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Sort the pairs."""
        clients, experts = eligible_pairs(problem)
        scores = problem.desirability[clients, experts]
        order = np.argsort(-scores, kind="stable")
        return _Model(problem, clients[order], experts[order], int((scores > 0).sum()))

    def run(self, model: _Model, limits: Limits) -> None:
        """Take pairs in order."""
        walk = _Walk(model.problem)
        cut = model.n_positive
        for first, end, only_forced in ((0, cut, False), (cut, len(model.clients), True)):
            for start in range(first, end, _CHUNK):
                part = slice(start, min(start + _CHUNK, end))
                walk.take(model.clients[part], model.experts[part], only_forced=only_forced)
        model.assignment = Assignment.from_pairs(walk.taken_clients, walk.taken_experts, model.problem.shape)

    def read(self, model: _Model) -> Answer:
        """Hand over the assignment."""
        return Answer(StopReason.COMPLETED, model.assignment)


class _Walk:
    """What is left to give; plain lists, which a loop over single pairs reads faster than arrays."""

    def __init__(self, problem: AssignmentProblem) -> None:
        bounds = clipped_bounds(problem)
        reach = problem.n_clients if problem.eligible is None else problem.eligible.sum(axis=0, dtype=np.int64)
        self.slots: list[int] = problem.slots.tolist()
        self.places: list[int] = np.minimum(bounds.expert_max, reach).tolist()
        self.layers = None if problem.layers is None else LayerWalk(problem)
        misses = bounds.client_min if self.layers is None else np.minimum(problem.demands, problem.n_experts + 1)
        self.client_misses: list[int] = misses.tolist()
        self.expert_misses: list[int] = bounds.expert_min.tolist()
        # How many pairs may still be taken that help no expert, or no client, below its lower bound.
        self.spare_slots = sum(self.slots) - sum(self.expert_misses)
        self.spare_places = sum(self.places) - sum(self.client_misses)
        self.taken_clients: list[int] = []
        self.taken_experts: list[int] = []

    def take(self, clients: npt.NDArray[np.int64], experts: npt.NDArray[np.int64], *, only_forced: bool) -> None:
        """Take from these pairs, in this order, what may be taken."""
        # Who is out of slots or places stays so: dropping those pairs in bulk is most of the work.
        open_ = (np.array(self.slots) > 0)[clients] & (np.array(self.places) > 0)[experts]
        if only_forced:
            misses = (np.array(self.client_misses) > 0)[clients] | (np.array(self.expert_misses) > 0)[experts]
            open_ &= misses
        slots, places = self.slots, self.places
        client_misses, expert_misses = self.client_misses, self.expert_misses
        for i, j in zip(clients[open_].tolist(), experts[open_].tolist(), strict=True):
            if not slots[i] or not places[j]:
                continue
            helps_client, helps_expert = client_misses[i] > 0, expert_misses[j] > 0
            if self.layers is not None:
                if not self.layers.allows(i, j, slots[i]):
                    continue
                helps_client = self.layers.missing_after(i, j) < client_misses[i]
            if not (helps_expert or self.spare_slots > 0) or not (helps_client or self.spare_places > 0):
                continue
            if only_forced and not (helps_client or helps_expert):
                continue
            slots[i] -= 1
            places[j] -= 1
            if self.layers is not None:
                self.layers.take(i, j)
            if helps_client:
                client_misses[i] -= 1
            else:
                self.spare_places -= 1
            if helps_expert:
                expert_misses[j] -= 1
            else:
                self.spare_slots -= 1
            self.taken_clients.append(i)
            self.taken_experts.append(j)
