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
        chosen = np.zeros(problem.shape, dtype=np.bool_)
        for block in problem.blocks():
            chosen[block] = _top_ranked(problem, block)
        model.assignment = Assignment.from_mask(chosen)

    def read(self, model: _Model) -> Answer:
        """Hand over the assignment; where clients do not compete, prices of zero prove it optimal."""
        problem = model.problem
        prices = np.zeros(problem.n_experts) if problem.is_separable else None
        return Answer(StopReason.COMPLETED, model.assignment, prices)


def _top_ranked(problem: AssignmentProblem, block: slice) -> npt.NDArray[np.bool_]:
    scores = problem.desirability[block].astype(np.float64)
    if problem.eligible is not None:
        scores[~problem.eligible[block]] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=1)
    rank = np.arange(problem.n_experts)
    least = np.minimum(problem.min_experts, problem.slots)[block, None]
    wanted = (rank < least) | ((rank < problem.slots[block, None]) & (ranked > 0))
    taken = np.zeros_like(wanted)
    np.put_along_axis(taken, order, wanted, axis=1)
    return taken
