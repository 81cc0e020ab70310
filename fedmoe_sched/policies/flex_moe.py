"""FLEX-MoE: fitness and the deficit of the experts, under load bounds, solved exactly."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, as_vector
from fedmoe_sched._scheduler_options import real_option
from fedmoe_sched._variables import StateVariable
from fedmoe_sched.errors import InputError
from fedmoe_sched.policies.base import RulePolicy
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import Schedule
from fedmoe_sched.rounds import OpenRound, RoundReports

__all__ = ["FlexMoePolicy"]


class FlexMoePolicy(RulePolicy):
    """The assignment of most fitness plus expert deficit, every client at capacity, all loads within bounds.

    Maximises ``sum_ij (Q_ij + mu * D_j / T) x_ij``: every client trains exactly ``k_c`` experts (its capacity, or
    as many as are eligible), every load stays within ``balance`` of the mean, or within `load_min` and `load_max`.
    The constraint matrix is totally unimodular, so that the linear program has integral optima and every exact
    backend solves it; balance bounds that cannot hold are widened as in `fedmoe_sched.schedule`.

    D is a virtual queue of what the experts have missed, in clients:
    ``D_j <- max(0, D_j + target_j - load_j)``, brought up to date when a round closes.

    Source: FLEX-MoE (arXiv 2512.23070): the objective ``sum Q``, fitness Q as a moving average that is kept for
    untrained pairs, exactly ``k_c`` experts per client, lower and upper load bounds per expert, and a historical
    deficit [S]. How the deficit enters is our reconstruction [I]:

    - It is added to the fitness of all pairs of the expert, with weight mu. T is the mean load that is to come
      (the mean of `target`, or slots of the available clients over m), so that mu is in units of fitness per
      round's worth of load missed, whatever the number of clients.
    - ``load_j`` counts the clients that reported on the expert, not those that were planned: an expert whose
      clients failed was not trained, and is owed for it.
    - ``target_j`` is by default the mean of these loads. Clients that fail then leave no expert with a deficit
      that all share, and a round without any report leaves D as it is.
    - Bounds of +- 0.25 and mu = 0.1 are ours. Under ``balance=0`` the loads are all but fixed and D decides only
      who gets the odd places. Whether the paper's load CV of 0.003 [S] is that of single rounds, which only such
      bounds force, or of the loads summed over rounds, which D evens out, is not known.

    An expert that few clients can train at all is owed more every round, without limit: in time its few clients
    always get it. A fixed `target` above what clients can train makes all deficits grow alike, which moves
    nothing.

    Parameters
    ----------
    experts : int or iterable of hashable
    deficit_weight : float, default 0.1
        mu >= 0.
    target : float or array_like of shape (m,), optional
        Clients that should train each expert in each round, >= 0, not all 0; None is the mean of each round.
    **options
        Those of `fedmoe_sched.Scheduler`; ``usage_weight=0``, ``fitness_weight=1`` and ``fill=True`` are fixed,
        and so is that the fitness of untrained pairs is kept. ``balance=None`` leaves the loads to the deficits.

    Raises
    ------
    InputError
        A wrong option, a solver that is not exact, or one that the policy fixes otherwise.

    Examples
    --------
    >>> policy = FlexMoePolicy(2, balance=None, deficit_weight=0.4)
    >>> for client in ("anna", "ben"):
    ...     policy.add_client(client, fitness=[0.6, 0.5])
    >>> for _ in range(2):
    ...     for client, experts in policy.plan(["anna", "ben"]).experts_by_client().items():
    ...         policy.report(client, {expert: (10, 0.6) for expert in experts})
    ...     print(policy.close_round().loads, policy.deficit.tolist())
    (2, 0) [0.0, 1.0]
    (0, 2) [1.0, 0.0]
    """

    name: ClassVar[str] = "flex-moe"
    fixed: ClassVar[Mapping[str, Any]] = {"usage_weight": 0.0, "fitness_weight": 1.0, "fill": True}
    needs_exact: ClassVar[bool] = True
    variables: ClassVar[Mapping[str, StateVariable]] = {"deficit": StateVariable("expert")}

    def __init__(
        self,
        experts: int | Iterable[Hashable],
        *,
        deficit_weight: float = 0.1,
        target: npt.ArrayLike | None = None,
        **options: Any,
    ) -> None:
        super().__init__(experts, **options)
        if self._options.fitness.on_idle != "keep":
            msg = f"fitness: on_idle = 'decay': policy {self.name!r} has on_idle = 'keep'"
            raise InputError(msg)
        self.deficit_weight = real_option("deficit_weight", deficit_weight)
        if self.deficit_weight < 0:
            msg = f"deficit_weight = {deficit_weight}: must be >= 0"
            raise InputError(msg)
        self.target = None if target is None else _checked_target(target, len(self.experts))

    @property
    def deficit(self) -> FloatArray:
        """What each expert has missed so far, in clients, read-only; shape (m,)."""
        return self.variable("deficit")

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        target = None if self.target is None else self.target.tolist()
        return super().options() | {"deficit_weight": self.deficit_weight, "target": target}

    def decide(
        self,
        fitness: FloatArray,
        usage: FloatArray,
        capacity: IntArray,
        eligible: BoolArray | None,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
        warm_start: FloatArray | None,
    ) -> Schedule:
        """Add the deficits to the fitness, and solve."""
        m = len(self.experts)
        if self.target is None:
            layers = self.layers_of(clients, capacity)
            slots = AssignmentProblem(fitness, capacity, eligible=eligible, layers=layers).slots
            mean_load = float(slots.sum()) / m
        else:
            mean_load = float(self.target.mean())
        bonus = self.deficit_weight * self.deficit / mean_load if mean_load > 0 else np.zeros(m)
        return super().decide(
            fitness + bonus, usage, capacity, eligible, clients=clients, seed=seed, warm_start=warm_start
        )

    def learned_variables(self, opened: OpenRound, reports: RoundReports) -> Mapping[str, npt.ArrayLike]:
        """Bring the deficits up to date by the loads that were trained."""
        loads = np.bincount(reports.experts, minlength=len(self.experts))
        target = loads.mean() if self.target is None else self.target
        return {"deficit": np.maximum(0.0, self.deficit + target - loads)}


def _checked_target(target: npt.ArrayLike, n_experts: int) -> FloatArray:
    """Read the target loads; one number stands for all experts."""
    spread = np.full(n_experts, target) if isinstance(target, (int, float, np.number)) else target
    checked = as_vector("target", spread, n_experts, "one per expert", least=0).copy()
    if not checked.any():
        msg = f"target = {target!r}: must be > 0 for some expert"
        raise InputError(msg)
    return checked
