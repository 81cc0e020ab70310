"""The paper's algorithm: client by client, the top-ranked experts up to capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import Answer, Capability, Limits, Solver

__all__ = ["Greedy"]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    assignment: Assignment | None = None


class Greedy(Solver[_Model]):
    """Give every client its most desirable eligible experts; loads are nobody's concern.

    The alignment rule of Chen et al. 2025 (arXiv 2507.05685): candidate experts by capacity, ranked by
    desirability, the top ones up to what the client can handle. Clients do not see one another, so they may all
    crowd onto the same expert. Without load bounds and load penalty the answer is optimal, and proved so. Ties go
    to the lower expert number. Cannot be interrupted.
    """

    name: ClassVar[str] = "greedy"
    exact: ClassVar[bool] = False
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.MIN_EXPERTS, Capability.ELIGIBILITY})
    summary: ClassVar[str] = "client by client, top-ranked experts up to capacity; ignores load bounds"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Keep the problem: there is no model."""
        return _Model(problem)

    def run(self, model: _Model, limits: Limits) -> None:
        """Rank each client's experts and take the first ones."""
        problem = model.problem
        chosen = (_top_ranked(problem, block) for block in problem.blocks())
        model.assignment = Assignment.from_mask_blocks(chosen, problem.n_experts)

    def read(self, model: _Model) -> Answer:
        """Hand over the assignment; where clients do not compete, prices of zero prove it optimal."""
        problem = model.problem
        prices = np.zeros(problem.n_experts) if problem.is_separable else None
        return Answer(StopReason.COMPLETED, model.assignment, prices)


def _top_ranked(problem: AssignmentProblem, block: slice) -> npt.NDArray[np.bool_]:
    scores = problem.desirability[block].astype(np.float64)
    if problem.eligible is not None:
        scores[~problem.eligible[block]] = -np.inf
    slots = problem.slots[block]
    positive = np.count_nonzero(scores > 0, axis=1)
    wanted = np.maximum(np.minimum(problem.min_experts[block], slots), np.minimum(slots, positive))
    # Sorting the scores alone is many times faster than sorting the experts by them.
    ranked = np.sort(scores, axis=1)
    last = np.where(wanted > 0, ranked[np.arange(len(ranked)), -wanted], np.inf)[:, None]
    taken = scores >= last
    tied = np.flatnonzero(np.count_nonzero(taken, axis=1) > wanted)
    above, level = scores[tied] > last[tied], scores[tied] == last[tied]
    room = wanted[tied] - np.count_nonzero(above, axis=1)
    taken[tied] = above | (level & (np.cumsum(level, axis=1) <= room[:, None]))
    return taken
