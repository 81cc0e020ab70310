"""The paper's algorithm: client by client, the top-ranked experts up to capacity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._layer_ranks import narrow_to_layers

__all__ = ["Greedy"]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    assignment: Assignment | None = None


class Greedy(Solver[_Model]):
    """Give every client its most desirable eligible experts; loads are nobody's concern.

    The alignment rule of Chen et al. 2025 (arXiv 2507.05685): candidate experts by capacity, ranked by
    desirability, the top ones up to what the client can handle. Clients do not see one another, so they may all
    crowd onto the same expert. With layers: first the fewest of each layer, by rank, then the top-ranked of what
    its layers have room for. Without load bounds and load penalty the answer is optimal, and proved so. Ties go
    to the lower expert number. Cannot be interrupted.
    """

    name: ClassVar[str] = "greedy"
    exact: ClassVar[bool] = False
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.MIN_EXPERTS, Capability.ELIGIBILITY, Capability.LAYERS}
    )
    summary: ClassVar[str] = "client by client, top-ranked experts up to capacity; ignores load bounds"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Keep the problem: there is no model."""
        return _Model(problem)

    def run(self, model: _Model, limits: Limits) -> None:
        """Rank each client's experts and take the first ones."""
        problem = model.problem
        chosen = (_choice(problem, block) for block in problem.blocks())
        model.assignment = Assignment.from_mask_blocks(chosen, problem.n_experts)

    def read(self, model: _Model) -> Answer:
        """Hand over the assignment; where clients do not compete, prices of zero prove it optimal."""
        problem = model.problem
        prices = np.zeros(problem.n_experts) if problem.is_separable else None
        return Answer(StopReason.COMPLETED, model.assignment, prices)


def _choice(problem: AssignmentProblem, block: slice) -> BoolArray:
    scores = problem.desirability[block].astype(np.float64)
    if problem.eligible is not None:
        scores[~problem.eligible[block]] = -np.inf
    if problem.layers is None:
        return _top_ranked(scores, problem.min_experts[block], problem.slots[block])
    forced, least, most = narrow_to_layers(problem, block, scores)
    chosen: BoolArray = forced | _top_ranked(scores, least, most)
    return chosen


def _top_ranked(scores: FloatArray, least: IntArray, slots: IntArray) -> BoolArray:
    """Take the `least` largest scores of each row, and the positive ones up to its slots."""
    positive = np.count_nonzero(scores > 0, axis=1)
    wanted = np.maximum(np.minimum(least, slots), np.minimum(slots, positive))
    # Sorting the scores alone is many times faster than sorting the experts by them.
    ranked = np.sort(scores, axis=1)
    last = np.where(wanted > 0, ranked[np.arange(len(ranked)), -wanted], np.inf)[:, None]
    taken = scores >= last
    tied = np.flatnonzero(np.count_nonzero(taken, axis=1) > wanted)
    above, level = scores[tied] > last[tied], scores[tied] == last[tied]
    room = wanted[tied] - np.count_nonzero(above, axis=1)
    taken[tied] = above | (level & (np.cumsum(level, axis=1) <= room[:, None]))
    bare: BoolArray = taken
    return bare
