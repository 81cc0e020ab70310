"""Performance profiles (Dolan and Moré 2002)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fedmoe_sched.compare import Row

__all__ = ["profile", "share_within", "solved_seconds"]


def solved_seconds(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Return build and solve seconds of every exact solver on every instance that it proved optimal.

    Parameters
    ----------
    rows : iterable of Row

    Returns
    -------
    dict of str to dict of str to float
        Solver, then instance; solvers that solved nothing have an empty one.
    """
    times: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.exact:
            mine = times.setdefault(row.solver, {})
            if row.status == "optimal" and row.seconds is not None:
                mine[row.instance] = row.seconds
    return times


def profile(times: Mapping[str, Mapping[str, float]]) -> dict[str, list[float]]:
    """Return each solver's performance ratios.

    ``r_ps = t_ps / min over all solvers s of t_ps``, infinite where s did not solve p (Dolan and Moré 2002,
    Mathematical Programming 91, 201-213). `share_within` of them is the performance profile.

    Parameters
    ----------
    times : mapping of str to mapping of str to float
        Solver, then instance, then seconds > 0; an instance that is missing was not solved. Instances that nobody
        solved do not count.

    Returns
    -------
    dict of str to list of float
        Solver to its ratios >= 1 over all instances, ascending.

    Examples
    --------
    >>> profile({"a": {"p": 1.0, "q": 6.0}, "b": {"p": 4.0, "q": 2.0}, "c": {"p": 2.0}})
    {'a': [1.0, 3.0], 'b': [1.0, 4.0], 'c': [2.0, inf]}
    """
    instances = sorted({name for mine in times.values() for name in mine})
    best = {name: min(mine[name] for mine in times.values() if name in mine) for name in instances}
    return {
        solver: sorted(mine[name] / best[name] if name in mine else math.inf for name in instances)
        for solver, mine in times.items()
    }


def share_within(ratios: Sequence[float], factor: float) -> float:
    """Return the share of the instances solved within a factor of the fastest: ``rho_s(tau)``.

    Examples
    --------
    >>> share_within([1.0, 3.0], 2.0)
    0.5
    """
    return sum(ratio <= factor for ratio in ratios) / len(ratios) if ratios else 0.0
