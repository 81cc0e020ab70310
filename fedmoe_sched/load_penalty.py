"""Convex penalties on the loads: soft balance, as marginal costs that are piecewise linear in the load."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray, as_array, as_counts, as_matrix, as_vector, read_only, vector_size
from fedmoe_sched.errors import InputError

__all__ = ["LoadPenalty"]

_ENDLESS = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False, repr=False)
class LoadPenalty:
    """A convex penalty phi_j on the load of every expert j, with phi_j(0) = 0.

    It is held as marginal costs: the l-th client of expert j (l = 1, 2, ...) costs
    ``value[s] + slope[s] * (l - start[s])``, where s is the last segment of expert j with ``start[s] <= l``, and
    ``phi_j(load)`` is the sum over the clients that j has. Convex means that marginal costs never fall. They may
    be negative: such a penalty rewards the first clients of an expert.

    `quadratic`, `of_usage` and `from_marginals` make the usual ones.

    Parameters
    ----------
    indptr : array_like of int, shape (m + 1,)
        The segments of expert j are ``indptr[j]`` up to, not including, ``indptr[j + 1]``; at least one each.
    start : array_like of int, shape (segments,)
        First client number of each segment: 1 for the first one of each expert, then strictly ascending.
    value : array_like, shape (segments,)
        Cost of that client, in units of desirability; finite.
    slope : array_like, shape (segments,)
        By how much each further client of the segment costs more; finite and >= 0.

    Attributes
    ----------
    indptr, start : ndarray, int64
    value, slope : ndarray, float64

    Raises
    ------
    InputError
        A wrong shape or value, or marginal costs that fall; the message names argument, position and value.

    Examples
    --------
    >>> penalty = LoadPenalty.quadratic(0.5, n_experts=2)
    >>> penalty.total([4, 0]).tolist()  # 0.25 times the square of the load
    [4.0, 0.0]
    """

    indptr: IntArray
    start: IntArray
    value: npt.NDArray[np.float64]
    slope: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        size = vector_size("start", self.start)
        fields = {
            "indptr": as_counts(
                "indptr", self.indptr, vector_size("indptr", self.indptr), "one more than experts"
            ),
            "start": as_counts("start", self.start, size, "one per segment"),
            "value": as_vector("value", self.value, size, "one per segment"),
            "slope": as_vector("slope", self.slope, size, "one per segment", least=0),
        }
        for name, array in fields.items():
            object.__setattr__(self, name, read_only(array))
        _refuse_bad_indptr(self.indptr, size)
        self._refuse_bad_starts()
        self._refuse_falling()

    @classmethod
    def quadratic(
        cls, weight: npt.ArrayLike, history: npt.ArrayLike = 0.0, *, n_experts: int | None = None
    ) -> LoadPenalty:
        """Penalise the square of load plus history: ``phi(l) = weight / 2 * ((l + history)**2 - history**2)``.

        The l-th client costs ``weight * (l + history - 1/2)``.

        Parameters
        ----------
        weight : float or array_like, shape (m,)
            At least 0, in units of desirability per squared client; one number stands for all experts.
        history : float or array_like, shape (m,), default 0
            What counts as load before the round, in clients; finite. Negative: so many clients are below cost.
        n_experts : int, optional
            m; needed where weight and history are both one number.

        Returns
        -------
        LoadPenalty
            With one segment per expert.

        Raises
        ------
        InputError
            Different lengths, no length at all, a negative weight, or a value that is not finite.
        """
        given = {"weight": as_array("weight", weight), "history": as_array("history", history)}
        m = _common_size(given, n_experts)
        spread = {name: np.full(m, value) if value.ndim == 0 else value for name, value in given.items()}
        weights = as_vector("weight", spread["weight"], m, "one per expert", least=0).astype(
            np.float64, copy=False
        )
        offsets = as_vector("history", spread["history"], m, "one per expert")
        with np.errstate(over="ignore"):  # the constructor refuses what is not finite
            first = weights * (offsets + 0.5)
        return cls(np.arange(m + 1), np.ones(m, dtype=np.int64), first, weights)

    @classmethod
    def of_usage(
        cls, weight: npt.ArrayLike, usage: npt.ArrayLike, work_per_client: npt.ArrayLike, *, decay: float
    ) -> LoadPenalty:
        """Penalise the square of the usage that experts have after the round.

        With the update of `fedmoe_sched.scores.UsageScores`, and every client adding as much work as another, a
        load of l leaves an expert with ``after(l) = (1 - decay) * usage + decay * work_per_client * l``, and::

            phi(l) = weight / 2 * (after(l)**2 - after(0)**2)

        The l-th client costs ``weight * gain * (after(0) + gain * (l - 1/2))``, with ``gain = decay *
        work_per_client``: this is `quadratic` with a weight of ``weight * gain**2`` and a history of
        ``after(0) / gain`` clients.

        Parameters
        ----------
        weight : float or array_like, shape (m,)
            At least 0, in units of desirability per squared unit of usage: with usage of some hundred samples a
            useful weight is far below 1. Divided by the square of a fair share of usage, it is desirability per
            squared fair share.
        usage : array_like, shape (m,)
            Before the round; at least 0, in samples or compute.
        work_per_client : float or array_like, shape (m,)
            Work that one client adds to an expert, at least 0, in the unit of `usage`: the mean of their samples,
            times the relative compute of the expert where usage is in compute.
        decay : float
            In (0, 1], the weight of the newest round, as in `fedmoe_sched.scores.UsageOptions`.

        Returns
        -------
        LoadPenalty
            With one segment per expert.

        Raises
        ------
        InputError
            A wrong length, a value that is negative or not finite, or a decay out of range.

        Examples
        --------
        >>> penalty = LoadPenalty.of_usage(0.01, usage=[40, 0], work_per_client=10, decay=0.5)
        >>> penalty.marginal([1, 1]).tolist()  # usage becomes 25 of 20, and 5 of 0
        [1.125, 0.125]
        """
        if not 0 < decay <= 1:
            msg = f"decay = {decay}: must be > 0 and <= 1"
            raise InputError(msg)
        m = vector_size("usage", usage)
        given = {
            "weight": as_array("weight", weight),
            "work_per_client": as_array("work_per_client", work_per_client),
        }
        spread = {name: np.full(m, value) if value.ndim == 0 else value for name, value in given.items()}
        weights, work = (as_vector(name, spread[name], m, "one per expert", least=0) for name in given)
        with np.errstate(over="ignore"):  # the constructor refuses what is not finite
            floor = (1 - decay) * as_vector("usage", usage, m, "one per expert", least=0)
            gain = decay * work
            return cls(
                np.arange(m + 1),
                np.ones(m, dtype=np.int64),
                weights * gain * (floor + gain / 2),
                weights * gain * gain,
            )

    @classmethod
    def from_marginals(cls, table: npt.ArrayLike) -> LoadPenalty:
        """Take marginal costs one by one: the l-th client of expert j costs ``table[j, l - 1]``.

        Parameters
        ----------
        table : array_like, shape (m, T)
            Never falling along a row, in units of desirability. Clients beyond the T-th cost as much as that one.

        Returns
        -------
        LoadPenalty
            With one segment per run of equal entries.

        Raises
        ------
        InputError
            Not two-dimensional, empty, not finite, or falling.
        """
        costs = as_matrix("table", table, axes=("expert", "client")).astype(np.float64, copy=False)
        falling = costs[:, 1:] < costs[:, :-1]
        if falling.any():
            j, at = (int(i) for i in np.unravel_index(int(np.argmax(falling)), falling.shape))
            msg = f"table[{j}, {at + 1}] = {costs[j, at + 1]}: must be >= table[{j}, {at}] = {costs[j, at]}"
            raise InputError(msg)
        begins = np.ones(costs.shape, dtype=np.bool_)
        begins[:, 1:] = costs[:, 1:] > costs[:, :-1]
        indptr = np.concatenate([[0], np.cumsum(begins.sum(axis=1))])
        value: npt.NDArray[np.float64] = costs[begins]
        return cls(indptr, np.nonzero(begins)[1] + 1, value, np.zeros_like(value))

    @property
    def n_experts(self) -> int:
        """The number of experts m."""
        return len(self.indptr) - 1

    def restrict(self, experts: slice | IntArray) -> LoadPenalty:
        """Return the penalties of some experts, in this order."""
        sizes = np.diff(self.indptr)[experts]
        ends = np.cumsum(sizes)
        at = np.arange(ends[-1]) + np.repeat(self.indptr[:-1][experts] - (ends - sizes), sizes)
        return LoadPenalty(np.append(0, ends), self.start[at], self.value[at], self.slope[at])

    def after(self, loads: npt.ArrayLike) -> LoadPenalty:
        """Return what further clients cost where experts have some already: ``phi(loads + l) - phi(loads)``.

        Parameters
        ----------
        loads : array_like of int, shape (m,), or int

        Examples
        --------
        >>> LoadPenalty.from_marginals([[1.0, 2.0, 5.0]]).after([1]).marginal([2]).tolist()
        [5.0]
        """
        there = np.repeat(as_counts("loads", loads, self.n_experts, "one per expert"), np.diff(self.indptr))
        kept = self._ends > there
        begun = np.maximum(there + 1 - self.start, 0)  # clients of the segment that are there
        indptr = np.append(0, np.cumsum(np.add.reduceat(kept, self.indptr[:-1], dtype=np.int64)))
        start, value = np.maximum(self.start - there, 1), self.value + self.slope * begun
        return LoadPenalty(indptr, start[kept], value[kept], self.slope[kept])

    def marginal(self, loads: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return what the ``loads[j]``-th client of every expert j costs.

        Parameters
        ----------
        loads : array_like of int, shape (m,), or int
            At least 1.

        Returns
        -------
        ndarray, shape (m,), float64
        """
        loads = as_counts("loads", loads, self.n_experts, "one per expert")
        if (loads < 1).any():
            at = int(np.argmin(loads))
            msg = f"loads[{at}] = {loads[at]}: must be >= 1"
            raise InputError(msg)
        return self.marginal_of(np.arange(self.n_experts), loads)

    def marginal_of(self, experts: IntArray, loads: IntArray) -> npt.NDArray[np.float64]:
        """Return what the ``loads[k]``-th client of expert ``experts[k]`` costs, for each k; not checked.

        Parameters
        ----------
        experts, loads : ndarray of int, shape (k,)
            Expert numbers, and loads >= 1.

        Returns
        -------
        ndarray, shape (k,), float64
        """
        at, end = self.indptr[experts], self.indptr[experts + 1]
        while (end - at > 1).any():  # bisection, for all pairs at once
            middle = (at + end) // 2
            begun = self.start[middle] <= loads
            # Where a single segment is left, the middle is that one, and it has begun.
            at, end = np.where(begun, middle, at), np.where(begun, end, middle)
        with np.errstate(over="ignore"):
            costs: npt.NDArray[np.float64] = self.value[at] + self.slope[at] * (loads - self.start[at])
        return costs

    def total(self, loads: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return ``phi_j(loads[j])`` of every expert j, in closed form segment by segment.

        Parameters
        ----------
        loads : array_like of int, shape (m,), or int

        Returns
        -------
        ndarray, shape (m,), float64
        """
        loads = as_counts("loads", loads, self.n_experts, "one per expert")
        reached = np.minimum(np.repeat(loads, np.diff(self.indptr)), self._ends)
        counts = np.maximum(reached - self.start + 1, 0).astype(np.float64)
        with np.errstate(over="ignore"):
            costs = counts * self.value + self.slope * (counts * ((counts - 1) / 2))
        totals: npt.NDArray[np.float64] = np.add.reduceat(costs, self.indptr[:-1])
        return totals

    def best_loads(self, prices: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> IntArray:
        """Return loads within bounds that maximise ``prices * load - phi(load)``; the smallest such ones.

        Parameters
        ----------
        prices : array_like, shape (m,)
            Of one place at each expert, in units of desirability.
        low, high : array_like of int, shape (m,), or int
            Bounds on the loads, ``low <= high``.

        Returns
        -------
        ndarray, shape (m,), int64
            From `low` on, the number of clients whose marginal cost is below the price.
        """
        m = self.n_experts
        p = as_vector("prices", prices, m, "one per expert")
        least = as_counts("low", low, m, "one per expert")
        most = as_counts("high", high, m, "one per expert")
        if (least > most).any():
            at = int(np.argmax(least > most))
            msg = f"low[{at}] = {least[at]}: must be <= high[{at}] = {most[at]}"
            raise InputError(msg)
        experts = np.arange(m)
        while (open_ := least < most).any():  # bisection, because marginal costs never fall
            middle = (least + most + 1) // 2
            pays = self.marginal_of(experts, middle) < p
            least = np.where(open_ & pays, middle, least)
            most = np.where(open_ & ~pays, middle - 1, most)
        return least

    def conjugate(self, prices: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return the largest ``prices * load - phi(load)`` over loads within bounds.

        The convex conjugate of phi restricted to whole loads in low..high: what takes the place of the load bounds
        in the dual bound.

        Parameters
        ----------
        prices, low, high
            See `best_loads`.

        Returns
        -------
        ndarray, shape (m,), float64
        """
        loads = self.best_loads(prices, low, high)
        worth: npt.NDArray[np.float64] = np.asarray(prices, dtype=np.float64) * loads - self.total(loads)
        return worth

    @cached_property
    def _ends(self) -> IntArray:
        """Last client number of each segment; shape (segments,), int64."""
        ends = np.full(len(self.start), _ENDLESS)
        ends[:-1] = self.start[1:] - 1
        ends[self.indptr[1:] - 1] = _ENDLESS
        return ends

    def _refuse_bad_starts(self) -> None:
        first = np.zeros(len(self.start), dtype=np.bool_)
        first[self.indptr[:-1]] = True
        wrong = np.flatnonzero(first & (self.start != 1))
        if len(wrong):
            msg = f"start[{wrong[0]}] = {self.start[wrong[0]]}: must be 1, as the first segment of an expert"
            raise InputError(msg)
        wrong = 1 + np.flatnonzero(~first[1:] & (self.start[1:] <= self.start[:-1]))
        if len(wrong):
            at = int(wrong[0])
            msg = f"start[{at}] = {self.start[at]}: must be > start[{at - 1}] = {self.start[at - 1]}"
            raise InputError(msg)

    def _refuse_falling(self) -> None:
        """Refuse a segment that begins below where the one before it ends."""
        inner = self._ends < _ENDLESS
        with np.errstate(over="ignore"):
            last = self.value + self.slope * np.where(inner, self._ends - self.start, 0)
        wrong = np.flatnonzero(inner[:-1] & (self.value[1:] < last[:-1]))
        if len(wrong):
            at = int(wrong[0])
            msg = (
                f"value[{at + 1}] = {self.value[at + 1]}: must be >= {last[at]}, what the last client of segment "
                f"{at} costs"
            )
            raise InputError(msg)

    def __repr__(self) -> str:
        return f"LoadPenalty({self.n_experts} experts, {len(self.start)} segments)"


def _refuse_bad_indptr(indptr: IntArray, segments: int) -> None:
    if len(indptr) < 2:
        msg = f"indptr: has {len(indptr)} entries, needs at least 2 (one expert)"
        raise InputError(msg)
    for at, end in ((0, 0), (len(indptr) - 1, segments)):
        if indptr[at] != end:
            msg = f"indptr[{at}] = {indptr[at]}: must be {end}"
            raise InputError(msg)
    empty = 1 + np.flatnonzero(indptr[1:] <= indptr[:-1])
    if len(empty):
        at = int(empty[0])
        msg = f"indptr[{at}] = {indptr[at]}: must be > indptr[{at - 1}] = {indptr[at - 1]}"
        raise InputError(msg)


def _common_size(arguments: dict[str, npt.NDArray[Any]], n_experts: int | None) -> int:
    """Return the number of experts that the arguments speak of; one that disagrees is refused later."""
    if n_experts is None:
        for name, value in arguments.items():
            if value.ndim:
                return vector_size(name, value)
        msg = f"n_experts = None: must be given where {' and '.join(arguments)} are one number each"
        raise InputError(msg)
    if isinstance(n_experts, bool) or not isinstance(n_experts, (int, np.integer)) or n_experts < 1:
        msg = f"n_experts = {n_experts!r}: must be a whole number >= 1"
        raise InputError(msg)
    return int(n_experts)
