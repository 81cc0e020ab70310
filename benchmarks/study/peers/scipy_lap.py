"""Linear assignment by SciPy, for one expert per client: every place of an expert is a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks.study.peers._single import assignment_of, places, refusal, worth
from fedmoe_sched import AssignmentProblem, Limits, Solver, StopReason
from fedmoe_sched.solver import Answer, Capability

__all__ = ["SciPyLap"]

Floats = npt.NDArray[np.float64]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    expert_of_column: npt.NDArray[np.int64]
    scores: Floats
    expert: npt.NDArray[np.int64] | None = None


class SciPyLap(Solver[_Model]):
    """Exact assignment with ``scipy.optimize.linear_sum_assignment`` (Crouse 2016, after Jonker and Volgenant).

    The matrix is dense: clients times all places of all experts.

    Parameters
    ----------
    memory_limit : int, default 2 GiB
        Bytes that the matrix may take; SciPy makes a copy of it.
    """

    name: ClassVar[str] = "lap-scipy"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.MIN_EXPERTS, Capability.LOAD_BOUNDS})
    requires: ClassVar[tuple[str, ...]] = ("scipy",)
    summary: ClassVar[str] = "linear assignment (SciPy); one expert per client, one column per place"

    def __init__(self, memory_limit: int = 2**31) -> None:
        self.memory_limit = memory_limit

    def supports(self, problem: AssignmentProblem) -> str | None:
        """Return None, or the reason why this peer does not take `problem`."""
        reason = super().supports(problem) or refusal(self.name, problem)
        size = 8 * problem.n_clients * int(places(problem).sum())
        if reason is None and size > self.memory_limit:
            limit = self.memory_limit
            return f"{self.name} would need a matrix of {size / 2**30:.1f} GiB, limit {limit / 2**30:.1f} GiB"
        return reason

    def build(self, problem: AssignmentProblem, limits: Limits, prices: Floats | None) -> _Model:
        """Repeat every expert's column once per place."""
        columns = np.repeat(np.arange(problem.n_experts), places(problem))
        return _Model(problem, columns, worth(problem)[:, columns])

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve to the end: the engine takes no limits."""
        from scipy.optimize import linear_sum_assignment

        _, column = linear_sum_assignment(model.scores, maximize=True)
        model.expert = model.expert_of_column[column]

    def read(self, model: _Model) -> Answer:
        """Hand over the experts."""
        if model.expert is None:
            return Answer(StopReason.FAILED)
        return Answer(StopReason.COMPLETED, assignment_of(model.problem, model.expert))
