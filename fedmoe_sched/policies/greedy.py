"""Greedy alignment by fitness."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedmoe_sched.policies.base import RulePolicy

__all__ = ["GreedyPolicy"]


class GreedyPolicy(RulePolicy):
    """Every client trains the experts that it is fittest for, as many as it can; usage and loads do not count.

    Source: the baseline "greedy" of figure 3 of Chen et al. 2025 (arXiv 2507.05685) [T]; the paper gives no
    formula, ``d_ij = F_ij`` and ties to the lower expert number are our reading [I]. Where all fitness is equal,
    as at the start, all clients of one capacity therefore choose alike; the prior and the exploration bonus
    (`FitnessOptions`) decide whether they try others.
    """

    name: ClassVar[str] = "greedy"
    fixed: ClassVar[Mapping[str, Any]] = {"solver": "greedy", "balance": None, "usage_weight": 0.0}
