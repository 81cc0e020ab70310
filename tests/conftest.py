"""Options and parameters that all tests share."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

from fedmoe_sched import SolverEntry, solvers

# Sums of floating-point numbers depend on the number of threads; some tests compare bits.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Examples are the same in every run; `--hypothesis-profile=explore` looks for new ones. Tests that ask for so many
# get them in the slow suite, and half of them here: see `drawn.drawn`.
settings.register_profile("repeat", derandomize=True, deadline=None, max_examples=50, database=None)
settings.register_profile("slow", derandomize=True, deadline=None, max_examples=100, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("repeat")

# Nearly all that imports make stays: to look through it for garbage takes a third of the time of collecting tests.
gc.disable()

# Test arguments that stand for every backend of a kind.
_KINDS = {
    "backend": lambda entry: True,
    "exact_backend": lambda entry: entry.exact,
    "heuristic": lambda entry: not entry.exact,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--solvers",
        default=None,
        metavar="NAMES",
        help="test only these backends, comma-separated; default: every one in the registry",
    )


def _chosen(config: pytest.Config) -> list[SolverEntry]:
    entries = solvers()
    wanted = config.getoption("--solvers")
    if wanted is None:
        return entries
    names = [name.strip() for name in wanted.split(",")]
    unknown = sorted(set(names) - {entry.name for entry in entries})
    if unknown:
        msg = f"--solvers: there is no {unknown[0]!r}; there are {', '.join(entry.name for entry in entries)}"
        raise pytest.UsageError(msg)
    return [entry for entry in entries if entry.name in names]


# Where a run of any policy is trained in so many processes (the test argument `processes`): each loads torch, and
# that takes longer than the run. Workers have tests of their own, and some policies have them in the fast suite.
_PROCESSES = [1, pytest.param(2, marks=pytest.mark.slow)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "processes" in metafunc.fixturenames:
        metafunc.parametrize("processes", _PROCESSES)
    for argument, belongs in _KINDS.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(
                argument,
                [
                    pytest.param(entry.name, marks=_skip_if_missing(entry))
                    for entry in _chosen(metafunc.config)
                    if belongs(entry)
                ],
            )


def _skip_if_missing(entry: SolverEntry) -> list[pytest.MarkDecorator]:
    return [] if entry.available is True else [pytest.mark.skip(reason=str(entry.available))]


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for entry in _chosen(config):
        if entry.available is not True:
            terminalreporter.write_line(f"backend not tested: {entry.available}", yellow=True)
