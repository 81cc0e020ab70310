"""Run the study of optimality against speed, and write its tables and figures.

Usage::

    python -m benchmarks.study                   # the published one; into docs/study
    python -m benchmarks.study --quick           # a small one in a minute or two; into study-output
    python -m benchmarks.study --tables-only     # tables and figures again, from the rows there are

Rows are on disk as soon as they are known. A study that was interrupted goes on where it was; ``--fresh`` starts
over.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study.machine import describe, read_description, write_description
from benchmarks.study.oscillation import write_oscillation
from benchmarks.study.plan import FULL, QUICK, Plan
from benchmarks.study.plots import write_plots
from benchmarks.study.runner import RowLog, run_plan
from benchmarks.study.tables import seconds_text, write_tables
from fedmoe_sched.compare import Row, compare, judge
from fedmoe_sched.instances import clustered

_ROOT = Path(__file__).resolve().parents[2]
_ROWS, _DESCRIPTION = "rows.csv", "machine.json"


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    plan = QUICK if options.quick else FULL
    folder = options.output or _ROOT / ("study-output" if options.quick else "docs/study")
    folder.mkdir(parents=True, exist_ok=True)
    if not options.tables_only:
        _measure(plan, folder, seed=options.seed, fresh=options.fresh)
    _write_results(folder)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, a minute or two")
    parser.add_argument("--fresh", action="store_true", help="forget the rows of an earlier run")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, help="folder of rows, tables and figures")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def _measure(plan: Plan, folder: Path, *, seed: int, fresh: bool) -> None:
    # Solvers that are told to use one thread must not find more in the numerical libraries below them.
    os.environ["OMP_NUM_THREADS"] = "1"
    rows_file, description_file = folder / _ROWS, folder / _DESCRIPTION
    if fresh:
        rows_file.unlink(missing_ok=True)
        description_file.unlink(missing_ok=True)
    description = describe(plan, seed)
    before = read_description(description_file)
    if before is not None and before["settings"] != json.loads(json.dumps(description["settings"])):
        raise SystemExit(f"{rows_file}: holds rows of a study with other settings; --fresh starts over")
    spent = 0.0 if before is None else before["seconds"]
    started = time.perf_counter()

    def save(row: Row | None = None) -> None:
        write_description(description_file, description | {"seconds": spent + time.perf_counter() - started})
        if row is not None:
            print(
                f"{row.instance:<28} {row.solver:<14} {row.status:<10} {seconds_text(row.seconds):>8}", row.message
            )

    save()
    _compile_kernels()
    run_plan(plan, RowLog(rows_file), seed=seed, on_row=save)
    write_oscillation(folder, plan.sizes[-1] if plan is QUICK else (10_000, 32), seed, print)
    save()


def _compile_kernels() -> None:
    """Let kernels that are compiled on first use be compiled, for both precisions, before anything is measured."""
    for precision in ("float64", "float32"):
        problem = clustered(20_000, 32)
        compare(problem.replace(desirability=problem.desirability.astype(precision)), ["exact"], certify=False)


def _write_results(folder: Path) -> None:
    description = read_description(folder / _DESCRIPTION)
    if description is None or not (folder / _ROWS).exists():
        raise SystemExit(f"{folder}: there is no study")
    rows = judge(RowLog(folder / _ROWS).rows)
    for path in [*write_tables(rows, description, folder), *write_plots(rows, folder)]:
        print(path)


if __name__ == "__main__":
    main()
