"""Flux: the experts of most utility, and now and then the least explored."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._scheduler_options import ranged_option
from fedmoe_sched._variables import StateVariable
from fedmoe_sched.policies.client_rule import ClientRule, top_ranked
from fedmoe_sched.rounds import OpenRound, RoundReports
from fedmoe_sched.scores.fitness import flux_reward

__all__ = ["FluxPolicy"]


class FluxPolicy(ClientRule):
    """Every client trains the experts of most utility, as many as it can, but some places go to exploration.

    The utility of expert e at client i is ``samples_ie * sqrt(gradient_ie)``: the samples that the client's router
    sent to the expert, and the mean magnitude of the expert's gradient over them, both of the last round in which
    the client trained the expert. The total utility is maximised under each client's expert budget, its capacity;
    clients do not compete, so that its best experts by utility are the optimum. Each place goes to exploration
    with probability ``epsilon_i``, instead.

    Source: Flux (arXiv 2508.19078): this utility, a budget of experts per client, epsilon-exploration [S]. Ours
    [I], where we do not know the paper's choice:

    - Whether a place is explored is drawn place by place. It goes to the expert that the client has trained least
      often, ties at random; all draws are made of the round's seed alone.
    - An expert that the client never trained has no utility. Only exploration takes it, or a place for which there
      is no tried expert left: a new client's first experts are therefore random.
    - ``epsilon_i = max(epsilon_min, epsilon * epsilon_decay ** r_i)`` with r_i the rounds that the client itself
      has trained, so that a latecomer explores as much as the first ones did. All three defaults are ours.
    - A utility is not aged: it stands until the client trains the expert again.

    The schedule's objective is the total utility, in samples times the root of gradient magnitude; explored pairs
    that were never tried add nothing to it. Fitness is learned, and what the rule gives up of it is reported, but
    it does not count.

    Parameters
    ----------
    experts : int or iterable of hashable
    epsilon : float, default 0.5
        Share of explored places in a client's first round, 0 to 1.
    epsilon_decay : float, default 0.9
        Factor per round that the client has trained, 0 to 1; 1 is no decay.
    epsilon_min : float, default 0.05
        What decay stops at, 0 to 1.
    **options
        Those of `fedmoe_sched.Scheduler`; ``solver="greedy"``, ``balance=None``, no load bounds, ``fill=True``,
        ``usage_weight=0`` and ``fitness_weight=1`` are fixed.

    Raises
    ------
    InputError
        A wrong option, or one that the policy fixes otherwise.

    Examples
    --------
    >>> policy = FluxPolicy(2, epsilon=0, epsilon_min=0)
    >>> for samples, gradient in ((10, 0.25), (10, 4.0)):
    ...     [expert] = policy.plan(["anna"]).experts_by_client()["anna"]
    ...     policy.report("anna", {expert: (samples, 0.5)})
    ...     record = policy.close_round()
    ...     policy.tell("anna", {"gradient": [gradient if e == expert else float("nan") for e in range(2)]})
    ...     print(sorted(policy.utility(["anna"])[0].tolist()))
    [0.0, 5.0]
    [0.0, 20.0]
    """

    name: ClassVar[str] = "flux"
    variables: ClassVar[Mapping[str, StateVariable]] = {
        "gradient": StateVariable("pair", told="after", least=0.0),
        "routed": StateVariable("pair"),  # samples, of the last round in which the pair was trained
        "tries": StateVariable("pair"),
        "rounds": StateVariable("client"),
    }

    def __init__(
        self,
        experts: int | Iterable[Hashable],
        *,
        epsilon: float = 0.5,
        epsilon_decay: float = 0.9,
        epsilon_min: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(experts, **options)
        self.epsilon = ranged_option("epsilon", epsilon, 0, 1)
        self.epsilon_decay = ranged_option("epsilon_decay", epsilon_decay, 0, 1)
        self.epsilon_min = ranged_option("epsilon_min", epsilon_min, 0, 1)

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        own = ("epsilon", "epsilon_decay", "epsilon_min")
        return super().options() | {name: getattr(self, name) for name in own}

    def utility(self, clients: Iterable[Hashable]) -> FloatArray:
        """Return the utility of every expert for some clients, shape (k, m); 0 for experts never tried."""
        names = tuple(clients)
        return flux_reward(self.variable("routed", names), self.variable("gradient", names))

    def choose(
        self,
        fitness: FloatArray,
        capacity: IntArray,
        eligible: BoolArray,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
    ) -> tuple[FloatArray, BoolArray]:
        """Share out each client's places between utility and exploration."""
        slots = np.minimum(capacity, eligible.sum(axis=1))
        random = np.random.default_rng(seed)
        explored = random.binomial(slots, self._epsilon(clients))
        utility, tries = self.utility(clients), self.variable("tries", clients)
        tried = eligible & (tries > 0)
        best = top_ranked(np.where(tried, utility, -np.inf), np.minimum(slots - explored, tried.sum(axis=1)))
        # Tries are whole numbers: a fraction decides among equals only.
        rarity = -(tries + random.random(tries.shape))
        rest = top_ranked(np.where(eligible & ~best, rarity, -np.inf), slots - best.sum(axis=1))
        return utility, best | rest

    def _epsilon(self, clients: tuple[Hashable, ...]) -> FloatArray:
        """Return the share of places that each client explores, shape (k,)."""
        faded: FloatArray = self.epsilon * self.epsilon_decay ** self.variable("rounds", clients)
        return faded.clip(min=self.epsilon_min)

    def learned_variables(self, opened: OpenRound, reports: RoundReports) -> Mapping[str, npt.ArrayLike]:
        """Keep the samples of the trained pairs, and count tries and rounds."""
        rows = opened.clients[reports.positions]
        routed, tries = self.variable("routed").copy(), self.variable("tries").copy()
        rounds = self.variable("rounds").copy()
        routed[rows, reports.experts] = reports.samples
        tries[rows, reports.experts] += 1
        rounds[np.unique(rows)] += 1
        return {"routed": routed, "tries": tries, "rounds": rounds}
