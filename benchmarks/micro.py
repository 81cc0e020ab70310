"""Micro-benchmarks, to see whether some step of the core is slower than it was.

Usage::

    python benchmarks/micro.py --save before.json
    python benchmarks/micro.py --against before.json

Each step is run repeatedly for about a second on a seeded contended problem; the best time counts, as the one
least disturbed by other work. Differences under 30 % are noise on a shared machine. How backends compare with one
another is another question: ``python -m benchmarks.study``, and ``python benchmarks/ratios.py`` in short.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedmoe_sched import AssignmentProblem, schedule, solve
from fedmoe_sched.certify import certify, dual_bound
from fedmoe_sched.exchange import recover_prices
from fedmoe_sched.feasibility import find_conflict
from fedmoe_sched.instances import clustered
from fedmoe_sched.relax import relax

_SIZES = ((1_000, 16), (20_000, 64))
_SECONDS = 1.0


def best_time(step: Callable[[], object]) -> float:
    step()  # imports and caches are not what is measured
    best, spent = np.inf, 0.0
    while spent < _SECONDS:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + seconds
    return float(best)


def steps(n: int, m: int) -> dict[str, Callable[[], object]]:
    problem = clustered(n, m)
    answer = solve(problem, "flow-ortools")
    pairs, prices = answer.pairs, answer.prices
    if pairs is None or prices is None:
        msg = f"clustered({n}, {m}) was not solved: {answer!r}"
        raise RuntimeError(msg)
    usage = np.ones(m)
    noise = 1e-3 * np.random.default_rng(1).standard_normal(problem.shape)
    changed = problem.replace(desirability=problem.desirability + noise)
    # No two clients can train the same experts, and every expert wants more of them than there are.
    eligible = np.random.default_rng(2).random(problem.shape) < 0.6
    slots = np.minimum(problem.capacity, eligible.sum(axis=1))
    short = problem.replace(eligible=eligible, min_experts=slots, load_min=int(1.1 * slots.sum() / m), load_max=n)
    return {
        "make a problem": lambda: AssignmentProblem(problem.desirability, problem.capacity, load_max=n),
        "dual bound": lambda: dual_bound(problem, prices),
        "certificate": lambda: certify(problem, pairs, prices),
        "recover prices": lambda: recover_prices(problem, pairs),
        "find conflict": lambda: find_conflict(problem),
        "relax": lambda: relax(short),
        "greedy": lambda: solve(problem, "greedy"),
        "greedy-global": lambda: solve(problem, "greedy-global"),
        "flow-ortools": lambda: solve(problem, "flow-ortools"),
        "exact, cold": lambda: solve(problem, "exact"),
        "exact, warm": lambda: solve(changed, "exact", warm_start=answer),
        "schedule()": lambda: schedule(problem.desirability, usage, problem.capacity),
    }


def measure() -> dict[str, float]:
    return {f"{name}, {n} x {m}": best_time(step) for n, m in _SIZES for name, step in steps(n, m).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", type=Path, help="write the times to this JSON file")
    parser.add_argument("--against", type=Path, help="compare with the times in this JSON file")
    options = parser.parse_args()
    before = json.loads(options.against.read_text(encoding="utf-8")) if options.against else {}
    times = measure()
    for name, seconds in times.items():
        change = f"  x {seconds / before[name]:.2f}" if name in before else ""
        print(f"{name:<32} {seconds * 1e3:10.3f} ms{change}")
    if options.save:
        options.save.write_text(json.dumps(times, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
