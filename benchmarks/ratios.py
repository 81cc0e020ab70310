"""The few ratios that say whether the exact backend is what it should be.

Usage::

    python benchmarks/ratios.py                    # up to 1,000,000 x 64, there `exact` alone
    python benchmarks/ratios.py --largest 100000   # in a minute or two
    python benchmarks/ratios.py --million-flow     # OR-Tools' min-cost flow there too, once: minutes, gigabytes

In one process, so that both solvers see the same machine at the same time: they take turns, and medians count.
A solver's time is build and solve, with kernels compiled and engines imported before. From 100,000 x 64 on the
scores are float32. Memory is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.study.families import instance
from fedmoe_sched import AssignmentProblem, Schedule, Status, solve
from fedmoe_sched.compare import compare

_SIZES = ((100, 8), (1_000, 16), (10_000, 32), (20_000, 64), (100_000, 64))
_LARGEST = (1_000_000, 64)
_FAMILIES = ("clustered", "tied")
_SECONDS = 5.0  # of repeats per solver and instance, about
_LEAST, _MOST = 3, 50  # solves by `exact`
_NOISE = 1e-3


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    sizes = [size for size in (*_SIZES, _LARGEST) if size[0] <= options.largest]
    times: dict[tuple[str, int, int], float] = {}
    print(f"{'instance':<24} {'exact':>10} {'flow-ortools':>13} {'ratio':>7} {'warm/cold':>10}  repeats")
    for n, m in sizes:
        for family in _FAMILIES:
            problem = instance(family, n, m)
            with_flow = (n, m) != _LARGEST or options.million_flow
            ours, flow, repeats = _in_turns(problem, with_flow=with_flow)
            times[family, n, m] = ours
            warm = _warm_over_cold(problem)
            theirs, ratio = (f"{1e3 * flow:.2f} ms", f"{flow / ours:.1f}") if flow else ("-", "-")
            name = f"{family} {n} x {m}"
            print(f"{name:<24} {1e3 * ours:>7.2f} ms {theirs:>13} {ratio:>7} {warm:>10.2f}  {repeats}", flush=True)
    _summary(times, sizes)
    if _LARGEST in sizes:
        _memory()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--largest", type=int, default=_LARGEST[0], help="clients of the largest instance")
    parser.add_argument("--million-flow", action="store_true", help="OR-Tools' flow at 1,000,000 x 64 too, once")
    return parser.parse_args(arguments)


def _seconds(answer: Schedule) -> float:
    if answer.status is not Status.OPTIMAL:
        msg = f"not optimal: {answer!r}"
        raise RuntimeError(msg)
    return answer.build_seconds + answer.solve_seconds


def _in_turns(problem: AssignmentProblem, *, with_flow: bool) -> tuple[float, float | None, int]:
    """Return the median seconds of `exact` and of `flow-ortools`, and how often `exact` was run."""
    solve(problem, "exact")  # kernels and caches
    ours: list[float] = []
    flow: list[float] = []
    while len(ours) < _LEAST or (sum(ours) + sum(flow) < _SECONDS and len(ours) < _MOST):
        ours.append(_seconds(solve(problem, "exact")))
        if with_flow and sum(flow) < _SECONDS:
            flow.append(_seconds(solve(problem, "flow-ortools")))
    return statistics.median(ours), statistics.median(flow) if flow else None, len(ours)


def _warm_over_cold(problem: AssignmentProblem) -> float:
    """Return the time of a warm re-solve after noise on every score, over that of a cold solve of the same."""
    rng = np.random.default_rng(1)
    noise = _NOISE * rng.standard_normal(problem.shape, dtype=np.float32)
    start = solve(problem, "exact")
    changed = problem.replace(desirability=problem.desirability + noise)
    cold: list[float] = []
    warm: list[float] = []
    while len(cold) < _LEAST or (sum(cold) < _SECONDS and len(cold) < _MOST):
        cold.append(_seconds(solve(changed, "exact")))
        warm.append(_seconds(solve(changed, "exact", warm_start=start)))
    return statistics.median(warm) / statistics.median(cold)


def _summary(times: dict[tuple[str, int, int], float], sizes: Sequence[tuple[int, int]]) -> None:
    for n, m in sizes:
        print(f"tied over clustered, {n} x {m}: {times['tied', n, m] / times['clustered', n, m]:.2f}")
    large = [n for n, m in sizes if m == 64]
    if len(large) > 1:
        span = math.log(large[-1] / large[0])
        for family in _FAMILIES:
            growth = math.log(times[family, large[-1], 64] / times[family, large[0], 64])
            print(f"growth exponent in n, {family}, {large[0]} to {large[-1]} x 64: {growth / span:.2f}")


def _memory() -> None:
    problem = instance("clustered", *_LARGEST)
    [row] = compare({"memory": problem}, ["exact"], certify=False)
    size = sum(getattr(problem, name).nbytes for name in ("desirability", "capacity", "min_experts"))
    if row.peak_bytes is not None:
        print(f"peak memory of the process over input, 1000000 x 64: {row.peak_bytes / size:.2f}")
        print(f"  {row.peak_bytes / 2**20:.0f} MiB over {size / 2**20:.0f} MiB of scores (float32) and capacities")


if __name__ == "__main__":
    main()
