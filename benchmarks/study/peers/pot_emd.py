"""Optimal transport by POT, for one expert per client."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks.study.peers._single import assignment_of, places, refusal, worth
from fedmoe_sched import AssignmentProblem, Limits, Solver, StopReason
from fedmoe_sched.solver import Answer, Capability

__all__ = ["PotEmd"]

Floats = npt.NDArray[np.float64]


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    supply: Floats
    demand: Floats
    costs: Floats
    plan: Floats | None = None
    warning: str | None = None


class PotEmd(Solver[_Model]):
    """Exact optimal transport with POT's ``ot.emd`` (network simplex; Bonneel et al. 2011).

    Every client sends one unit; one more row, of cost 0, fills the places that stay empty. A transport plan may
    stack several units of one client at one expert, so this is right only where a client has one unit to give.
    Lower load bounds cannot be said.
    """

    name: ClassVar[str] = "emd-pot"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = frozenset({Capability.MIN_EXPERTS, Capability.LOAD_BOUNDS})
    requires: ClassVar[tuple[str, ...]] = ("ot",)
    summary: ClassVar[str] = "optimal transport (POT); one expert per client"

    @classmethod
    def missing(cls) -> str | None:
        """Return which package is missing: its import name is not its name."""
        reason = super().missing()
        return None if reason is None else f"{cls.name} needs POT: pip install POT"

    def supports(self, problem: AssignmentProblem) -> str | None:
        """Return None, or the reason why this peer does not take `problem`."""
        return super().supports(problem) or refusal(self.name, problem)

    def build(self, problem: AssignmentProblem, limits: Limits, prices: Floats | None) -> _Model:
        """Set up supplies, demands and the dense costs."""
        n, m = problem.shape
        demand = places(problem).astype(np.float64)
        supply = np.append(np.ones(n), demand.sum() - n)
        costs = np.zeros((n + 1, m))
        costs[:n] = -worth(problem)
        return _Model(problem, supply, demand, costs)

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve to the end: the engine's default of 100,000 pivots is too few."""
        import ot

        log: dict[str, Any]
        model.plan, log = ot.emd(model.supply, model.demand, model.costs, numItermax=10**9, log=True)
        model.warning = log["warning"]

    def read(self, model: _Model) -> Answer:
        """Read which expert each client's unit went to."""
        if model.warning or model.plan is None:
            return Answer(StopReason.FAILED, message=str(model.warning))
        expert = model.plan[: model.problem.n_clients].argmax(axis=1)
        return Answer(StopReason.COMPLETED, assignment_of(model.problem, expert))
