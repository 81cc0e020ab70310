"""Client selection in front of the assignment: which of the available clients take part, by Oort's utility.

Source: Oort (Lai et al., OSDI 2021, arXiv 2010.06081). The statistical utility ``N sqrt(mean squared loss)`` and
the time penalty ``(T / t)^alpha`` are as published [T]/[S]; the confidence term, the cut-off and the decay of
exploration follow its algorithm 1 as we know it at second hand [S]. Its pacer, which moves T during training,
is left out: T is an option here.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray, as_vector
from fedmoe_sched.errors import InputError

__all__ = ["SelectionOptions", "select_clients", "selection_scores"]


@dataclass(frozen=True)
class SelectionOptions:
    """How many clients take part in a round, and what makes a client worth it.

    Parameters
    ----------
    clients : int
        K, the most clients of a round.
    exploration : float, default 0.9
        Share of K for clients that never answered, in [0, 1], in the first round.
    exploration_decay : float, default 0.98
        Factor of that share per round, in (0, 1].
    least_exploration : float, default 0.2
        It does not fall below this.
    seconds : float, optional
        T, the round time that is wanted; slower clients lose utility. None is no such penalty.
    time_exponent : float, default 2.0
        alpha in ``(T / t)^alpha``.
    staleness : float, default 0.1
        Weight of the confidence term, ``sqrt(staleness * log R / L)``, with R the number of the round and L the
        last round that the client answered in, in units of the largest utility.
    cutoff : float, default 0.95
        Clients within this factor of the last one that would be chosen by utility alone have a chance too.

    Raises
    ------
    InputError
        A value out of range.
    """

    clients: int
    exploration: float = 0.9
    exploration_decay: float = 0.98
    least_exploration: float = 0.2
    seconds: float | None = None
    time_exponent: float = 2.0
    staleness: float = 0.1
    cutoff: float = 0.95

    def __post_init__(self) -> None:
        if not isinstance(self.clients, int) or isinstance(self.clients, bool) or self.clients < 1:
            msg = f"selection: clients = {self.clients!r}: must be a whole number >= 1"
            raise InputError(msg)
        for name in ("exploration", "exploration_decay", "least_exploration", "cutoff"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                msg = f"selection: {name} = {value}: must be from 0 to 1"
                raise InputError(msg)
        for name in ("time_exponent", "staleness"):
            value = getattr(self, name)
            if not (value >= 0 and math.isfinite(value)):
                msg = f"selection: {name} = {value}: must be finite and >= 0"
                raise InputError(msg)
        if self.seconds is not None and not self.seconds > 0:
            msg = f"selection: seconds = {self.seconds}: must be > 0, or None"
            raise InputError(msg)

    def exploring(self, round_: int) -> float:
        """Return the share of clients that are tried for the first time in a round, 1 for the first.

        >>> options = SelectionOptions(10, exploration=0.9, exploration_decay=0.5, least_exploration=0.2)
        >>> [options.exploring(r) for r in (1, 2, 3, 4)]
        [0.9, 0.45, 0.225, 0.2]
        """
        return max(self.least_exploration, self.exploration * self.exploration_decay ** (round_ - 1))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values; ``SelectionOptions(**values)`` restores them."""
        return asdict(self)


def selection_scores(
    utility: npt.ArrayLike,
    seconds: npt.ArrayLike,
    answered: npt.ArrayLike,
    round_: int,
    options: SelectionOptions,
) -> FloatArray:
    """Score clients that have answered before.

    ``min(U, q) / q + sqrt(staleness * log R / L)``, times ``(T / t)^alpha`` where t > T. U is Oort's statistical
    utility; q is its 95 % quantile over the clients, which bounds what one with an outlying loss can gain. To
    divide by it is ours [I]: the confidence term then means the same whatever the unit of the loss.

    Parameters
    ----------
    utility : array_like, shape (k,)
        >= 0.
    seconds : array_like, shape (k,)
        Round time that was last observed; 0 where it is not known.
    answered : array_like, shape (k,)
        L: the last round that each client answered in, at least 1.
    round_ : int
        R: the round that is planned.
    options : SelectionOptions

    Returns
    -------
    ndarray, shape (k,), float64

    Examples
    --------
    >>> options = SelectionOptions(2, seconds=10.0, staleness=0.0)
    >>> selection_scores([4.0, 4.0, 2.0], [5.0, 20.0, 0.0], [1, 1, 1], 2, options).tolist()
    [1.0, 0.25, 0.5]
    """
    size = np.size(utility)
    values = as_vector("utility", utility, size, "one per client", least=0)
    took = as_vector("seconds", seconds, size, "one per client", least=0)
    last = as_vector("answered", answered, size, "one per client", least=1)
    if not size:
        return values
    most = float(np.quantile(values, 0.95))
    scores: FloatArray = np.minimum(values, most) / most if most > 0 else np.ones(size)
    scores = scores + np.sqrt(options.staleness * math.log(max(round_, 1)) / last)
    if options.seconds is not None:
        scores = (
            scores * np.minimum(1.0, options.seconds / np.maximum(took, options.seconds)) ** options.time_exponent
        )
    return scores


def select_clients(
    scores: FloatArray,
    known: npt.NDArray[np.bool_],
    speed: FloatArray,
    round_: int,
    options: SelectionOptions,
    seed: int,
) -> IntArray:
    """Choose the clients of a round.

    A share of the places, `SelectionOptions.exploring`, goes to clients that never answered, the faster ones with
    the higher chance. The others go to clients whose score is at least `cutoff` times that of the last one in
    order of score, at random in proportion to the score. Places that one side cannot fill go to the other.

    Parameters
    ----------
    scores : ndarray, shape (n,)
        Of `selection_scores`; any number for clients that never answered.
    known : ndarray, shape (n,), bool
        Whether a client has answered before.
    speed : ndarray, shape (n,)
        > 0; weights of the clients that never answered, such as one over the estimated round time.
    round_ : int
    options : SelectionOptions
    seed : int
        Of the round.

    Returns
    -------
    ndarray of int64
        Ascending; `SelectionOptions.clients` of them, or all where there are no more.
    """
    rng = np.random.default_rng([seed, 0x00127])
    old, new = np.flatnonzero(known), np.flatnonzero(~known)
    places = min(options.clients, len(known))
    exploring = min(len(new), math.floor(options.exploring(round_) * places + 0.5))
    exploiting = min(len(old), places - exploring)
    exploring = min(len(new), places - exploiting)
    chosen = [_drawn(rng, new, speed[new], exploring)]
    if exploiting:
        ranked = np.sort(scores[old])[::-1]
        worth = old[scores[old] >= options.cutoff * ranked[exploiting - 1]]
        chosen.append(_drawn(rng, worth, scores[worth], exploiting))
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def _drawn(rng: np.random.Generator, clients: IntArray, weights: FloatArray, count: int) -> IntArray:
    """Draw without replacement, in proportion to the weights; those without weight come last.

    Exponential clocks (Efraimidis and Spirakis 2006): the smallest of ``E / w`` are such a sample.
    """
    with np.errstate(divide="ignore"):
        ticks = rng.exponential(size=len(clients)) / weights
    return clients[np.argsort(ticks, kind="stable")[:count]]
