"""Load-balanced alignment, solved exactly."""

from __future__ import annotations

from typing import Any, ClassVar

from fedmoe_sched.errors import InputError
from fedmoe_sched.policies.base import RulePolicy

__all__ = ["BalancedPolicy"]


class BalancedPolicy(RulePolicy):
    """The most desirable assignment among those that keep every expert's load near the mean, proved optimal.

    The round problem with load bounds of ``+- balance`` (0.25 unless given) around the mean load, solved by an
    exact backend (``solver="auto"`` unless given).

    Source: the "load-balanced" alignment of figure 3 of Chen et al. 2025 (arXiv 2507.05685) [T], which gives
    neither bounds nor solver; lower and upper load bounds as in FLEX-MoE (arXiv 2512.23070) [S]; the tolerance
    is ours [I].

    Parameters
    ----------
    experts : int or iterable of hashable
    **options
        Those of `fedmoe_sched.Scheduler`.

    Raises
    ------
    InputError
        A wrong option, a solver that is not exact, or nothing that balances: ``balance=None`` without load bounds.
    """

    name: ClassVar[str] = "balanced"
    needs_exact: ClassVar[bool] = True

    def __init__(self, experts: Any, **options: Any) -> None:
        bounds = (options.get(name) for name in ("load_min", "load_max"))
        if options.get("balance", 0.25) is None and all(bound is None for bound in bounds):
            msg = "balance = None: policy 'balanced' needs a balance, load_min or load_max"
            raise InputError(msg)
        super().__init__(experts, **options)
