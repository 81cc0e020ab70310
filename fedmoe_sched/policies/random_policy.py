"""Random alignment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from fedmoe_sched.policies.base import RulePolicy

__all__ = ["RandomPolicy"]


class RandomPolicy(RulePolicy):
    """Every client trains a uniformly random choice of its eligible experts, as many as it can.

    Source: the baseline "random" of figure 3 of Chen et al. 2025 (arXiv 2507.05685) [T]; that every choice is
    equally likely, and drawn anew each round, is our reading [I]. Fitness and usage are kept up to date but do
    not count. The same `seed` gives the same rounds.
    """

    name: ClassVar[str] = "random"
    fixed: ClassVar[Mapping[str, Any]] = {"solver": "random", "balance": None, "switching_cost": 0.0}
