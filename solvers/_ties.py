"""What parts ties in the exact price backend: a perturbation of quantised scores, far below their steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.problem import AssignmentProblem

__all__ = ["Ties"]

_PROBED, _PROBED_RUN = 1024, 32  # clients looked at to tell whether scores are quantised; as many in a row


@dataclass(frozen=True, eq=False)
class Ties:
    """Perturbation of the scores that spreads the clients of a tie.

    Parameters
    ----------
    table : ndarray, shape (T + m,)
        Noise in [0, 1); each client reads m numbers in a row from a place of its own.
    size : float
        What the noise is multiplied by; 0 where there are no ties.
    quantum : float
        Typical distance of scores that differ; 0 where none do.
    finest : float
        Differences of scores below this are not told apart.
    largest : float
        Size of the largest score of the clients that were looked at; 1 if all are 0.
    """

    table: npt.NDArray[np.float64]
    size: float
    quantum: float
    finest: float
    largest: float = 1.0

    _ENTRIES: ClassVar[int] = 2**16
    _RELATIVE_SIZE: ClassVar[float] = 2.0**-36  # of the largest score

    @classmethod
    def none(cls, m: int) -> Ties:
        """No perturbation."""
        return cls(np.zeros(m + 1), 0.0, 0.0, float(np.finfo(np.float64).tiny))

    @classmethod
    def of(cls, problem: AssignmentProblem, rng: np.random.Generator) -> Ties:
        """Draw a perturbation, if a probe of the clients says that scores, or their differences, are quantised."""
        m = problem.n_experts
        probe = _probe(problem)
        largest = float(abs(probe).max()) or 1.0
        size = largest * cls._RELATIVE_SIZE
        finest = max(size / 256, float(np.finfo(np.float64).tiny))
        columns = np.linspace(0, m - 1, min(m, 4)).astype(np.int64)
        differences = [probe[:, columns[0]], *(probe[:, columns[:-1]] - probe[:, columns[1:]]).T]
        gaps = [np.diff(np.unique(values)) for values in differences]
        if all(len(gap) > len(probe) / 2 for gap in gaps):
            return cls(np.zeros(m + 1), 0.0, 0.0, finest, largest)
        steps = np.concatenate(gaps)
        steps = steps[steps > 4096 * size]  # what rounding makes of equal steps is not a step
        quantum = float(np.median(steps)) if len(steps) else 0.0
        return cls(rng.random(cls._ENTRIES + m), size, quantum, finest, largest)


def _probe(problem: AssignmentProblem) -> npt.NDArray[np.float64]:
    """Copy the scores of some clients: runs of neighbours, because a memory map is read by the page."""
    n = problem.n_clients
    if n <= _PROBED:
        return problem.desirability.astype(np.float64)
    runs = min(_PROBED // _PROBED_RUN, -(-n // _PROBED_RUN))
    parts = []
    for start in np.linspace(0, max(0, n - _PROBED_RUN), runs).astype(np.int64).tolist():
        block = slice(start, min(n, start + _PROBED_RUN))
        parts.append(problem.desirability[block].astype(np.float64))
        problem.release(block)
    return np.concatenate(parts)
