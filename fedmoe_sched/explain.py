"""Why a pair is in a schedule or not, and what bounds and capacities are worth.

Without budgets all answers are exact: they are shortest distances in the exchange graph of an optimal assignment
(`fedmoe_sched.exchange`). To force a pair, or to forbid it, closes a cycle through it, and the cheapest such cycle
is what it costs (Ahuja, Magnanti and Orlin, *Network Flows*, section 9.11, on the sensitivity of minimum cost
flows). Prices alone would only bound it, and where several sets of prices are optimal, say too little or too much.

With budgets the problem is NP-hard: an answer is exact where the problem with the decision turned round is solved,
and else lies between two bounds, which say what they are; so does what wider bounds are worth.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass

from fedmoe_sched._arrays import FloatArray

__all__ = ["BudgetExplanation", "BudgetSensitivity", "Explanation", "ResourceUse", "Sensitivity"]


@dataclass(frozen=True)
class Explanation:
    """Why a client trains an expert, or does not.

    Parameters
    ----------
    client, expert : hashable
    chosen : bool
    eligible : bool
    desirability : float
    price : float or None
        Of the expert: what is left of the desirability after it is what counts for the client. None where the
        schedule has no prices.
    margin : float
        What the objective loses at least if the decision on this pair is turned round: the pair forced in, or
        forbidden, and everything else arranged anew in the best way. 0 where that is as good; inf where no
        assignment keeps the bounds then. The desirability of the pair would have to rise, or fall, by so much.
    fitness_change : float or None
        By how much the fitness of the pair would have to rise (or fall, where negative) for that: the margin over
        the weight of fitness; infinite where fitness does not count. None where the schedule is not one of
        `fedmoe_sched.schedule`.
    instead : tuple of hashable
        For a pair that is not chosen, the expert that the client would give up in that best rearrangement; for one
        that is, the expert that it would take instead. Empty if it would train one more, or one less.
    brought_in_by : tuple of tuple of str
        For a pair that is not chosen, what brings it into every optimum: ``("capacity",)`` is one more slot of the
        client, ``("load_max",)`` one more place at the expert, ``("layer_max",)`` one more expert of the layer at
        the client; several in one entry only together.
    binding : tuple of str
        Bounds at their limit that have to do with this pair, in words.
    """

    client: Hashable
    expert: Hashable
    chosen: bool
    eligible: bool
    desirability: float
    price: float | None
    margin: float
    fitness_change: float | None
    instead: tuple[Hashable, ...]
    brought_in_by: tuple[tuple[str, ...], ...]
    binding: tuple[str, ...]

    def __str__(self) -> str:
        price = "" if self.price is None else f", price {self.price:.6g}"
        values = f"desirability {self.desirability:.6g}{price}"
        pair = f"client {self.client!r} and expert {self.expert!r} ({values})"
        if not self.eligible:
            return f"{pair}: not chosen: the pair is not eligible"
        lines = [f"{pair}: {'chosen' if self.chosen else 'not chosen'}{self._turned()}"]
        lines += [f"  {reason}" for reason in self.binding]
        lines += [f"  {self._wider(bounds)} would bring it in" for bounds in self.brought_in_by]
        return "\n".join(lines)

    def _wider(self, bounds: tuple[str, ...]) -> str:
        """Name bounds that are wider by one."""
        words = self._words()
        return " and ".join(words[name] for name in bounds) + (" together" if len(bounds) > 1 else "")

    def _words(self) -> dict[str, str]:
        return {
            "capacity": f"one more slot at client {self.client!r}",
            "load_max": f"one more place at expert {self.expert!r}",
            "layer_max": f"one more expert of its layer at client {self.client!r}",
        }

    @property
    def exact(self) -> bool:
        """Whether the margin is known exactly, and not only from below."""
        return True

    def _turned(self) -> str:
        """Say what the opposite would cost."""
        what, how = self._what(), self._how()
        if math.isinf(self.margin):
            return f"; {what} no assignment keeps all bounds"
        direction = "fall" if self.chosen else "rise"
        if self.margin == 0:
            return f"; {what}{how} the objective would be the same"
        return (
            f"; {what}{how} the objective would be {self.margin:.6g} less: so much its desirability would have to "
            f"{direction}{self._by_fitness()}"
        )

    def _what(self) -> str:
        return "without it" if self.chosen else "with it"

    def _how(self) -> str:
        """Say what the client would give up, or take instead."""
        if self.chosen:
            return f" and {_experts(self.instead)} instead" if self.instead else ""
        return f" in place of {_experts(self.instead)}" if self.instead else " in addition"

    def _by_fitness(self) -> str:
        change = self.fitness_change
        if change is None:
            return ""
        if math.isinf(change):
            return " (its fitness does not count)"
        return f" (its fitness by {change:+.6g})"


@dataclass(frozen=True)
class ResourceUse:
    """What one resource of a client has left for an expert.

    Parameters
    ----------
    name : str
    budget, used : float
        What the client has, and what its experts take, in the unit of the resource.
    size : float
        What the expert takes of it.
    missing : float
        How much more budget would let the expert fit beside those that the client has; 0 where it fits.
    """

    name: str
    budget: float
    used: float
    size: float
    missing: float

    def words(self, client: Hashable, expert: Hashable, *, chosen: bool) -> str:
        """Say it in a sentence."""
        use = f"client {client!r} uses {self.used:.6g} of {self.budget:.6g} {self.name}"
        if chosen:
            return f"{use}, {self.size:.6g} of it for expert {expert!r}"
        fits = f"{self.missing:.6g} more would let it fit" if self.missing else "it fits"
        return f"{use}; expert {expert!r} takes {self.size:.6g}: {fits}"


@dataclass(frozen=True)
class BudgetExplanation(Explanation):
    """Why a client trains an expert, or does not, where there are budgets.

    The problem is NP-hard then. What turning the decision round loses is `margin` at least, by prices or by the
    bound of a backend, and `margin_most` at most, by an arrangement that is known; where they are equal, it is
    exact. Both may be negative where the schedule is not optimal: turning round gains then.

    Parameters
    ----------
    client, expert, chosen, eligible, desirability, price, binding
        See `Explanation`.
    margin : float
        A lower bound.
    fitness_change : float or None
        See `Explanation`; None too where the margin is not exact.
    instead : tuple of hashable
        What the client gives up for the pair, or takes instead of it, in the arrangement that loses `margin_most`.
    brought_in_by : tuple of tuple of str
        See `Explanation`; ``"budget:memory"`` is so much more of the resource ``"memory"`` that the expert fits
        beside those that the client has (`ResourceUse.missing`). Of sets of bounds only those that are proved to
        bring the pair in, and no part of which is.
    margin_most : float
        An upper bound; inf where no arrangement with the decision turned round is known.
    besides : tuple of hashable
        What the client takes besides the pair in that arrangement, or gives up besides it.
    resources : tuple of ResourceUse
        What the client's budgets have left for the pair.
    """

    margin_most: float
    besides: tuple[Hashable, ...]
    resources: tuple[ResourceUse, ...]

    def __str__(self) -> str:
        lines = [super().__str__()]
        if self.eligible:
            lines += [f"  {use.words(self.client, self.expert, chosen=self.chosen)}" for use in self.resources]
        return "\n".join(lines)

    @property
    def exact(self) -> bool:
        """Whether the margin is known exactly, and not only from below."""
        return self.margin == self.margin_most

    def _words(self) -> dict[str, str]:
        more = {
            f"budget:{use.name}": f"{use.missing:.6g} more {use.name} for client {self.client!r}"
            for use in self.resources
        }
        return super()._words() | more

    def _how(self) -> str:
        rest = f", {'giving up' if self.chosen else 'taking'} {_experts(self.besides)} too" if self.besides else ""
        return f"{super()._how()}{rest}"

    def _turned(self) -> str:
        if self.exact and self.margin >= 0:
            return super()._turned()
        what = self._what()
        known = f"; {what}{self._how()} the objective would be {_less_or_more(self.margin_most)}"
        if self.exact:
            return f"{known}: the schedule is not optimal"
        if math.isinf(self.margin_most):
            known = f"; no arrangement {what} is known"
        if math.isinf(self.margin):
            return f"{known}; nothing bounds what others lose"
        limit = "loses less" if self.margin >= 0 else "gains more"
        return f"{known}; none {what} {limit} than {abs(self.margin):.6g} (a bound)"


def _less_or_more(loss: float) -> str:
    return f"{abs(loss):.6g} {'less' if loss >= 0 else 'more'}"


def _experts(names: tuple[Hashable, ...]) -> str:
    return f"expert{'s' if len(names) > 1 else ''} {', '.join(repr(name) for name in names)}"


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What one unit more or less of every bound is worth: how much the optimum would rise.

    Parameters
    ----------
    load_max : ndarray, shape (m,), float64
        One more place at each expert; 0 where the bound does not bind.
    load_min : ndarray, shape (m,), float64
        One client less that each expert must get.
    capacity : ndarray, shape (n,), float64
        One more expert that each client may train.
    min_experts : ndarray, shape (n,), float64
        One expert less that each client must train.
    """

    load_max: FloatArray
    load_min: FloatArray
    capacity: FloatArray
    min_experts: FloatArray


@dataclass(frozen=True, eq=False)
class BudgetSensitivity:
    """What wider bounds are worth where there are budgets: between bounds, since every exact value is NP-hard.

    By how much the best objective, with one bound wider, exceeds that of the schedule, which is the optimum if the
    schedule is optimal. At most is by the prices of the schedule: a client's bound changes the best choice of this
    client alone, an expert's what its places are worth; inf without prices. At least is by arrangements that are
    known: one client arranged anew, all others as they are; 0 where that gains nothing.

    Parameters
    ----------
    at_most, at_least : Sensitivity
        One unit of each bound: a place, a slot, a client or an expert less that must be.
    unlimited_at_most, unlimited_at_least : ndarray, shape (R, n), float64
        No limit on one resource, in the order of the problem's budgets, at one client.
    without_at_most : ndarray, shape (R,), float64
        No limit on one resource at any client.
    smallest_step : ndarray, shape (R, n), float64
        The least amount more of one resource, in its unit, with which it pays for one client to add an expert or
        to exchange one for another, all others as they are; 0 where that pays as it is, inf where no amount does.
    """

    at_most: Sensitivity
    at_least: Sensitivity
    unlimited_at_most: FloatArray
    unlimited_at_least: FloatArray
    without_at_most: FloatArray
    smallest_step: FloatArray
