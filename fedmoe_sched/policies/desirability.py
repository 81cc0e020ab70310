"""The client-by-client rule with fitness and usage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedmoe_sched.policies.base import RulePolicy

__all__ = ["DesirabilityPolicy"]


class DesirabilityPolicy(RulePolicy):
    """Every client trains its most desirable experts, as many as it can: fitness counts for, usage against.

    Source: the alignment algorithm of Chen et al. 2025 (arXiv 2507.05685): candidates by capacity, a score that
    rises with fitness and falls with usage, the top-ranked up to capacity [T]; the linear score of
    `fedmoe_sched.schedule.desirability` and its weights are ours [I]. All clients of a round see the same usage,
    so balance comes about only from round to round.
    """

    name: ClassVar[str] = "desirability"
    fixed: ClassVar[Mapping[str, Any]] = {"solver": "greedy", "balance": None}
