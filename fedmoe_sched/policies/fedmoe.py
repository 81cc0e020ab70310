"""FedMoE: the experts that cover most of a client's activation, then what its peers recommend."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._scheduler_options import count_option, ranged_option
from fedmoe_sched._variables import StateVariable
from fedmoe_sched.policies.client_rule import ClientRule, best_pairs, top_ranked
from fedmoe_sched.rounds import OpenRound, RoundReports

__all__ = ["FedMoePolicy", "covering"]

# Phases of a client: its experts follow its activation; are kept; were changed and are on trial; stay for good.
_FOLLOWS, _KEEPS, _TRIES, _FROZEN = range(4)

_HALVINGS = 53  # of the unit interval, down to one rounding error


class FedMoePolicy(ClientRule):
    """Every client has a set of experts of its own, chosen by activation, and changed once or more by its peers.

    1. *Coverage*. The largest theta in [0, 1] such that some experts within the budget cover at least theta of the
       client's activation, and the fewest experts that do: `covering`. The budget is `alpha` times the client's
       capacity, rounded down, at least one.
    2. *Recommendation*. The client keeps its set. If its accuracy has not risen by more than `tolerance` above its
       best for `patience` of its own evaluations, its `peers` nearest clients by cosine of activation are asked.
       With n the mean size of their sets less the size of its own, rounded (halves towards zero), it gets the n
       best of the experts that it lacks, by the mean of what the peers have of them, weighted by similarity; if n
       is negative, it drops as many of its own, those of its lowest activation, but keeps one.
    3. *Trial*. If the next evaluation is no rise above the best, the client goes back to the set that it had
       before, and stays with it for good. Else it keeps the new set, and step 2 goes on.

    Source: FedMoE (arXiv 2408.11304): coverage under a memory bound of alpha times the client's memory by binary
    search, the trigger, cosine peers, n, adding or dropping, revert and freeze [T]. Ours [I]:

    - The paper searches theta for all layers at once; there is one layer here, for which the answer is simply the
      experts of most activation within the budget (those without any are left out).
    - Memory is counted in experts: capacities already follow from memory where clients have profiles. `alpha`
      bounds what coverage takes, capacity what peers add.
    - Activation is the client's mean gate probability: every expert of a mixture here works on every sample, as
      much as the gate says. Clients tell it before every round. The gates of our loop start untrained, so that the
      set follows activation for the client's first `coverage_rounds` rounds before it is kept.
    - What a peer has of an expert is its activation if the expert is in its set, and 0 otherwise. Experts that no
      peer has are not added.
    - The evaluation is the accuracy of the client's model on its own samples, as it was received. No rise, and
      nothing that could be changed, starts the count anew.
    - A kept set shrinks for rounds in which capacity or eligibility do not allow all of it, to the experts of
      highest activation; if none is allowed, coverage chooses for that round.
    - Ties are broken by lot, anew for each client and round: a client that has told no activation trains random
      experts, and so do all while the gate is even, as it is before it has learnt anything.
    - `alpha`, `patience`, `tolerance`, `peers` and `coverage_rounds` have defaults of ours.

    The schedule's objective is the activation that is covered, summed over clients. Fitness is learned, and what
    the rule gives up of it is reported, but it does not count.

    Parameters
    ----------
    experts : int or iterable of hashable
    alpha : float, default 0.75
        Share of the capacity that coverage may fill, 0 to 1.
    coverage_rounds : int, default 5
        Rounds of the client's own after which its set is kept, at least 1.
    patience : int, default 3
        Evaluations without a rise until peers are asked, at least 1.
    tolerance : float, default 0.0
        A rise is more than this, >= 0, in accuracy.
    peers : int, default 5
        At least 1.
    **options
        Those of `fedmoe_sched.Scheduler`; ``solver="greedy"``, ``balance=None``, no load bounds, ``fill=True``,
        ``usage_weight=0`` and ``fitness_weight=1`` are fixed.

    Raises
    ------
    InputError
        A wrong option, or one that the policy fixes otherwise.

    Examples
    --------
    >>> policy = FedMoePolicy(4, alpha=0.5, default_capacity=4)
    >>> policy.tell("anna", {"gate_mean": [0.2, 0.5, 0.0, 0.3]})
    >>> policy.plan(["anna"]).experts_by_client()
    {'anna': [1, 3]}
    """

    name: ClassVar[str] = "fedmoe"
    variables: ClassVar[Mapping[str, StateVariable]] = {
        "gate_mean": StateVariable("pair", told="before", least=0.0),
        "accuracy": StateVariable("client", told="after", least=0.0),
        "chosen": StateVariable("pair"),  # 1 for the experts of the client's set
        "earlier": StateVariable("pair"),  # the set to go back to
        "best": StateVariable("client", -1.0),  # accuracy; any first one is a rise
        "stalled": StateVariable("client"),  # evaluations without a rise
        "rounds": StateVariable("client"),  # of coverage
        "phase": StateVariable("client", _FOLLOWS),
    }

    def __init__(
        self,
        experts: int | Iterable[Hashable],
        *,
        alpha: float = 0.75,
        coverage_rounds: int = 5,
        patience: int = 3,
        tolerance: float = 0.0,
        peers: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(experts, **options)
        self.alpha = ranged_option("alpha", alpha, 0, 1)
        self.coverage_rounds = count_option("coverage_rounds", coverage_rounds, 1)
        self.patience = count_option("patience", patience, 1)
        self.tolerance = ranged_option("tolerance", tolerance, 0)
        self.peers = count_option("peers", peers, 1)

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        own = ("alpha", "coverage_rounds", "patience", "tolerance", "peers")
        return super().options() | {name: getattr(self, name) for name in own}

    def choose(
        self,
        fitness: FloatArray,
        capacity: IntArray,
        eligible: BoolArray,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
    ) -> tuple[FloatArray, BoolArray]:
        """Give every client its set, or the experts that cover its activation as long as it keeps none."""
        slots = np.minimum(capacity, eligible.sum(axis=1))
        activation = self.variable("gate_mean", clients)
        mass = np.where(eligible, activation, 0.0)
        blank = ~mass.any(axis=1)
        mass[blank] = eligible[blank]
        kept = eligible & (self.variable("chosen", clients) > 0)
        kept &= self.variable("phase", clients)[:, None] > _FOLLOWS
        wanted = np.where(kept.any(axis=1, keepdims=True), kept, covering(mass, self._budget(slots), seed=seed))
        chosen = top_ranked(np.where(wanted, mass, -np.inf), np.minimum(slots, wanted.sum(axis=1)))
        return activation, chosen

    def _budget(self, slots: IntArray) -> IntArray:
        """Return the experts that coverage may take, at least one where there is room for one."""
        # A hair upwards, so that 0.29 * 100 = 28.999999999999996 does not round down to 28.
        share = np.floor(self.alpha * slots + 1e-9).astype(np.int64)
        budget: IntArray = np.minimum(slots, np.maximum(1, share))
        return budget

    def learned_variables(self, opened: OpenRound, reports: RoundReports) -> Mapping[str, npt.ArrayLike]:
        """Take down what coverage chose for the clients that trained it, and count their rounds."""
        chosen, rounds, phase = (self.variable(name).copy() for name in ("chosen", "rounds", "phase"))
        trained = reports.answered & (opened.pairs.counts > 0)
        told = self.variable("gate_mean")[opened.clients].any(axis=1)
        follows = np.flatnonzero(trained & told & (phase[opened.clients] == _FOLLOWS))
        rows = opened.clients[follows]
        chosen[rows] = opened.pairs.mask()[follows]
        rounds[rows] += 1
        phase[rows[rounds[rows] >= self.coverage_rounds]] = _KEEPS
        return {"chosen": chosen, "rounds": rounds, "phase": phase}

    def learned_signals(self, client: int, told: Mapping[str, FloatArray]) -> Mapping[str, FloatArray]:
        """Take a client's accuracy for what it says of its set."""
        if "accuracy" not in told:
            return told
        accuracy, phase = told["accuracy"], self.variable("phase")[client]
        news: dict[str, Any] = dict(told)
        if accuracy > self.variable("best")[client] + self.tolerance:
            news |= {"best": accuracy, "stalled": 0.0}
            if phase == _TRIES:
                news["phase"] = _KEEPS
        elif phase == _TRIES:
            news |= {"chosen": self.variable("earlier")[client], "phase": _FROZEN}
        elif phase == _KEEPS:
            news |= self._stalled(client)
        return news

    def _stalled(self, client: int) -> dict[str, Any]:
        """Count an evaluation without a rise; where there were enough, put what peers recommend on trial."""
        stalled = self.variable("stalled")[client] + 1
        if stalled < self.patience:
            return {"stalled": stalled}
        own = self.variable("chosen")[client].copy()  # of a view that is about to be written to
        changed = self.recommended(client)
        if (changed == own).all():
            return {"stalled": 0.0}
        return {"chosen": changed, "earlier": own, "stalled": 0.0, "phase": _TRIES}

    def recommended(self, client: int) -> FloatArray:
        """Return the set that a client's peers recommend, as it is now if there is nothing to change.

        Parameters
        ----------
        client : int
            Row of the client in the variables.

        Returns
        -------
        ndarray, shape (m,)
            1 for the experts of the set, 0 for others.
        """
        chosen, activation = self.variable("chosen"), self.variable("gate_mean")
        own = chosen[client] > 0
        similar = _cosines(activation, client)
        similar[[client, *np.flatnonzero(~chosen.any(axis=1))]] = 0.0
        peers = np.argsort(-similar, kind="stable")[: self.peers]
        peers = peers[similar[peers] > 0]
        if not len(peers):
            return _as_row(own)
        more = _rounded(float(chosen[peers].sum(axis=1).mean()) - int(own.sum()))
        if more < 0:
            kept = max(1, int(own.sum()) + more)
            return _as_row(_best(np.where(own, activation[client], -np.inf), kept))
        weights = similar[peers] / similar[peers].sum()
        estimate = weights @ (activation[peers] * chosen[peers])
        possible, slots = self._room(client)
        outside = possible & ~own & (estimate > 0)
        count = min(more, int(outside.sum()), max(0, int(slots) - int((own & possible).sum())))
        return _as_row(own | _best(np.where(outside, estimate, -np.inf), count))

    def _room(self, client: int) -> tuple[BoolArray, int]:
        """Return which experts a client may have, and how many, as far as is known now."""
        capacity, eligible = self._clients.limits(np.array([client]), {}, self._options.rules)
        possible = np.ones(len(self.experts), dtype=np.bool_) if eligible is None else eligible[0]
        return possible, int(min(capacity[0], possible.sum()))


def covering(mass: FloatArray, budget: IntArray, *, seed: int = 0) -> BoolArray:
    """Choose the fewest experts that cover the largest share of a client's activation that its budget allows.

    By bisection of the share theta, as in FedMoE: for a given theta the fewest experts are those of most
    activation until theta is covered, and theta is feasible if they are within the budget b. With one layer it is
    feasible exactly if the b experts of most activation cover it; the largest theta is therefore what these cover,
    and the choice is these, without any that add nothing.

    Parameters
    ----------
    mass : ndarray, shape (k, m)
        Activation, >= 0.
    budget : ndarray, shape (k,), int64
        Experts that each client may have.
    seed : int
        Of the lots.

    Returns
    -------
    ndarray, shape (k, m), bool
        Ties are broken by lot.

    Examples
    --------
    >>> covering(np.array([[0.2, 0.5, 0.0, 0.3], [0.0, 0.0, 1.0, 0.0]]), np.array([2, 2])).astype(int).tolist()
    [[0, 1, 0, 1], [0, 0, 1, 0]]
    """
    covered = np.cumsum(-np.sort(-mass, axis=1), axis=1)
    total = covered[:, -1:]
    covered = np.divide(covered, total, out=np.zeros_like(covered), where=total > 0)

    def needed(theta: FloatArray) -> IntArray:
        count: IntArray = 1 + (covered < theta[:, None]).sum(axis=1)
        return count

    feasible, infeasible = np.zeros(len(mass)), np.ones(len(mass))
    whole = needed(infeasible) <= budget
    feasible[whole] = 1.0
    for _ in range(_HALVINGS):
        middle = (feasible + infeasible) / 2
        holds = needed(middle) <= budget
        feasible, infeasible = np.where(holds, middle, feasible), np.where(holds, infeasible, middle)
    counts = np.where(total[:, 0] > 0, np.minimum(needed(feasible), budget), 0)
    return best_pairs(mass, counts, mass > 0, seed=seed)


def _cosines(rows: FloatArray, one: int) -> FloatArray:
    """Return the cosine of every row with one of them, 0 for rows of zeros; shape (n,)."""
    lengths = np.linalg.norm(rows, axis=1)
    scale = lengths * lengths[one]
    cosines: FloatArray = np.divide(rows @ rows[one], scale, out=np.zeros(len(rows)), where=scale > 0)
    return cosines


def _best(ranks: FloatArray, count: int) -> BoolArray:
    """Mark the `count` entries of highest rank."""
    marked: BoolArray = top_ranked(ranks[None], np.array([count]))[0]
    return marked


def _as_row(experts: BoolArray) -> FloatArray:
    """Return a set of experts as a row of a variable."""
    row: FloatArray = experts.astype(np.float64)
    return row


def _rounded(value: float) -> int:
    """Round to a whole number, halves towards zero."""
    return int(math.copysign(math.ceil(abs(value) - 0.5), value))
