"""The baseline: every client trains a random choice of its eligible experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._layer_ranks import narrow_to_layers

__all__ = ["RandomFill"]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    generator: np.random.Generator
    assignment: Assignment | None = None


class RandomFill(Solver[_Model]):
    """Give every client a uniformly random choice of its eligible experts, as many as it can train.

    The random alignment of Chen et al. 2025 (arXiv 2507.05685, figure 3). Desirability and load bounds are
    nobody's concern; capacities are filled, whatever the fewest experts are. With layers the fewest of each layer
    are drawn first, then the others among what layers have room for. The same `Limits.seed` gives the same choice.
    """

    name: ClassVar[str] = "random"
    exact: ClassVar[bool] = False
    capabilities: ClassVar[frozenset[Capability]] = frozenset(
        {Capability.MIN_EXPERTS, Capability.ELIGIBILITY, Capability.LAYERS}
    )
    summary: ClassVar[str] = "uniformly random experts up to capacity, seeded; the baseline"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Seed the generator: there is no model."""
        return _Model(problem, np.random.default_rng(limits.seed))

    def run(self, model: _Model, limits: Limits) -> None:
        """Draw each client's experts."""
        problem, generator = model.problem, model.generator
        chosen = (_random_choice(problem, block, generator) for block in problem.blocks())
        model.assignment = Assignment.from_mask_blocks(chosen, problem.n_experts)

    def read(self, model: _Model) -> Answer:
        """Hand over the assignment."""
        return Answer(StopReason.COMPLETED, model.assignment)


def _random_choice(problem: AssignmentProblem, block: slice, generator: np.random.Generator) -> BoolArray:
    """Order each client's experts at random, those that are not eligible last, and take the first ones."""
    slots = problem.slots[block]
    keys = generator.random((len(slots), problem.n_experts))
    if problem.eligible is not None:
        keys[~problem.eligible[block]] = 2.0
    if problem.layers is not None:
        return _draw_in_layers(problem, block, keys)
    order = np.argsort(keys, axis=1)
    taken = np.zeros(keys.shape, dtype=np.bool_)
    np.put_along_axis(taken, order, np.arange(problem.n_experts) < slots[:, None], axis=1)
    return taken


def _draw_in_layers(problem: AssignmentProblem, block: slice, keys: FloatArray) -> BoolArray:
    """Take the lowest keys that the layers allow; keys of 2 are not eligible."""
    ranks = np.where(keys < 2, -keys, -np.inf)
    taken, _, most = narrow_to_layers(problem, block, ranks)
    order = np.argsort(-ranks, axis=1)
    more = np.zeros(keys.shape, dtype=np.bool_)
    np.put_along_axis(more, order, np.arange(problem.n_experts) < most[:, None], axis=1)
    return taken | more
