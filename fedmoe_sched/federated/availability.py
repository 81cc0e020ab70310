"""When clients are there: traces of intervals that repeat for ever."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched.errors import InputError

__all__ = ["Availability", "Traces", "alternating_traces"]

_TICKS = 1_000_000  # per second: whole microseconds, so that the remainder by a trace's length is exact


@dataclass(frozen=True, eq=False)
class Traces:
    """Intervals ``[start, end)`` in which devices are available, in whole seconds since the start of each trace.

    Parameters
    ----------
    offset : ndarray, shape (k + 1,), int64
        Trace i has the intervals ``offset[i]:offset[i + 1]``, in order and without overlap.
    start, end : ndarray, shape (intervals,), int64
    period : ndarray, shape (k,), int64
        Length of each trace.
    """

    offset: IntArray
    start: IntArray
    end: IntArray
    period: IntArray

    def __len__(self) -> int:
        return len(self.period)

    @property
    def counts(self) -> IntArray:
        """Number of intervals of each trace; shape (k,)."""
        counts: IntArray = np.diff(self.offset)
        return counts

    @property
    def owner(self) -> IntArray:
        """Trace of each interval; shape (intervals,)."""
        return np.repeat(np.arange(len(self)), self.counts)

    def cleaned(self) -> Traces:
        """Return the traces without empty intervals, and with those made one that touch."""
        full = self.end > self.start
        owner, start, end = self.owner[full], self.start[full], self.end[full]
        breaks = (owner[1:] != owner[:-1]) | (start[1:] > end[:-1])
        first, last = np.concatenate([[True], breaks]), np.concatenate([breaks, [True]])
        counts = np.bincount(owner[first[: len(owner)]], minlength=len(self))
        return Traces(_offsets(counts), start[first[: len(owner)]], end[last[: len(owner)]], self.period)

    def taken(self, rows: IntArray) -> Traces:
        """Return the traces of some rows, in that order; a row may be taken more than once."""
        counts = self.counts[rows]
        offset = _offsets(counts)
        places = np.arange(offset[-1]) + np.repeat(self.offset[rows] - offset[:-1], counts)
        return Traces(offset, self.start[places], self.end[places], self.period[rows])


def _offsets(counts: npt.ArrayLike) -> IntArray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


@dataclass(frozen=True, eq=False)
class Availability:
    """Which clients are available at a simulated time, and until when.

    A trace is repeated by remainder: at time t client i is where its trace is at ``(t + shift_i) mod period_i``,
    as FLASH (Yang et al. 2021) repeats its own.

    Parameters
    ----------
    traces : Traces
        One per client, each with at least one interval that is not empty.
    shift : ndarray, shape (n,), int64
        Whole seconds into each trace at time 0.

    Raises
    ------
    InputError
        A client is never available, or there is not one shift per client.

    Examples
    --------
    >>> traces = Traces(np.array([0, 2]), np.array([0, 50]), np.array([10, 100]), np.array([100]))
    >>> availability = Availability(traces, np.array([30]))
    >>> [availability.remaining(t).item() for t in (0, 20, 75, 80)]  # the trace is at 30, 50, 5 and 10
    [0.0, 60.0, 5.0, 0.0]
    >>> availability.waiting(0).item(), availability.waiting(80).item()
    (20.0, 40.0)
    """

    traces: Traces
    shift: IntArray
    _start: IntArray = field(init=False, repr=False)
    _end: IntArray = field(init=False, repr=False)
    _base: IntArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        traces = self.traces.cleaned()
        if len(self.shift) != len(traces):
            msg = f"shift: has length {len(self.shift)}, must be {len(traces)} (one per client)"
            raise InputError(msg)
        if (traces.counts == 0).any():
            msg = f"traces[{int(np.argmin(traces.counts))}]: has no interval in which the client is available"
            raise InputError(msg)
        # All traces one after the other on a single axis: one binary search answers for every client.
        base = _offsets(traces.period)[:-1]
        placed = base[traces.owner]
        object.__setattr__(self, "traces", traces)
        for name, seconds in (("_base", base), ("_start", placed + traces.start), ("_end", placed + traces.end)):
            object.__setattr__(self, name, seconds * _TICKS)

    def remaining(self, time: float) -> FloatArray:
        """Return for how many more seconds each client is available without a break.

        Parameters
        ----------
        time : float
            Simulated seconds, >= 0; times within a microsecond are one.

        Returns
        -------
        ndarray, shape (n,), float64
            0 for clients that are not available, inf for those that always are.
        """
        now, found = self._locate(time)
        here = (found >= self.traces.offset[:-1]) & (self._end[found] > now)
        left: FloatArray = np.where(here, self._end[found] - now, 0).astype(np.float64)
        first, last = self.traces.offset[:-1], self.traces.offset[1:] - 1
        end_of_trace = self._base + self.traces.period * _TICKS
        joined = (self._end[last] == end_of_trace) & (self._start[first] == self._base)
        wraps = here & (found == last) & joined
        left[wraps] += (self._end[first] - self._base)[wraps]
        left[wraps & (first == last)] = np.inf
        return left / _TICKS

    def waiting(self, time: float) -> FloatArray:
        """Return the seconds until each client is available; 0 for those that are. Shape (n,), float64."""
        now, found = self._locate(time)
        first, last = self.traces.offset[:-1], self.traces.offset[1:] - 1
        later = found < last
        next_start = np.where(
            later,
            self._start[np.where(later, found + 1, first)],
            self._start[first] + self.traces.period * _TICKS,
        )
        wait: FloatArray = np.where(self.remaining(time) > 0, 0, next_start - now) / _TICKS
        return wait

    def _locate(self, time: float) -> tuple[IntArray, IntArray]:
        """Return where each client is on the common axis, and the last interval that began by then."""
        ticks = round(time * _TICKS) + self.shift * _TICKS
        now = self._base + ticks % (self.traces.period * _TICKS)
        found: IntArray = np.searchsorted(self._start, now, side="right").astype(np.int64) - 1
        return now, found


def alternating_traces(count: int, *, on: float, off: float, period: int, rng: np.random.Generator) -> Traces:
    """Draw traces of alternating exponential intervals, rounded up to whole seconds; each begins with an "on".

    Parameters
    ----------
    count : int
    on, off : float
        Mean seconds available, and away.
    period : int
        Seconds after which a trace repeats.
    rng : Generator

    Returns
    -------
    Traces
    """
    starts, ends, counts = [], [], []
    for _ in range(count):
        start, end = _alternating(on, off, period, rng)
        starts.append(start)
        ends.append(end)
        counts.append(len(start))
    return Traces(
        _offsets(counts), np.concatenate(starts), np.concatenate(ends), np.full(count, period, dtype=np.int64)
    )


def _alternating(on: float, off: float, period: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    changes: IntArray = np.zeros(0, dtype=np.int64)
    while not len(changes) or changes[-1] < period:
        pairs = rng.exponential([on, off], size=(1 + round(period / (on + off)), 2))
        more = np.ceil(pairs).astype(np.int64).clip(min=1).ravel().cumsum()
        changes = np.concatenate([changes, more + (changes[-1] if len(changes) else 0)])
    start = np.concatenate([[0], changes[1:-1:2]])
    kept: BoolArray = start < period
    return start[kept], np.minimum(changes[::2], period)[kept]
