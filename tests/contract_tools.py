"""What the contract suites share (`test_contract*.py`): what an answer must be, by checks that share no code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from oracle import TOLERANCE, affords, assert_prices_prove, keeps_layers, penalty_paid, tiny_problems

from fedmoe_sched import AssignmentProblem, Capability, Schedule, Status, StopReason, solve
from fedmoe_sched.registry import solver_class

Item = TypeVar("Item")


def needs(name: str, *capabilities: Capability) -> None:
    """Skip a test of what a backend does not declare; that it refuses it then is a test of its own."""
    missing = set(capabilities) - solver_class(name).capabilities
    if missing:
        pytest.skip(f"{name} does not take {min(missing)}")


def takes(name: str, capability: Capability) -> bool:
    return capability in solver_class(name).capabilities


@cache
def examples(**kinds: bool) -> list[AssignmentProblem]:
    """Draw tiny problems, the same ones for all backends: most of these solve them faster than they are drawn.

    As many as the profile of Hypothesis says. They are small enough to be read without being shrunk.
    """
    found: list[AssignmentProblem] = []

    @given(problem=tiny_problems(**kinds))
    def collect(problem: AssignmentProblem) -> None:
        found.append(problem)

    collect()
    return found


# Backends of which only the model is ours, and whose engines take some milliseconds to start.
_ENGINES = ("lp-scipy", "milp-scipy", "ilp-ortools", "mip-ortools", "ilp-pulp")


def share(exact_backend: str, problems: Sequence[Item]) -> Sequence[Item]:
    """Return the part of many problems that a backend is tried on: for engines a third, not the same for all."""
    if exact_backend not in _ENGINES:
        return problems
    return problems[_ENGINES.index(exact_backend) % 3 :: 3]


def assert_finds(exact_backend: str, problem: AssignmentProblem, optimum: float | None) -> None:
    """Assert that a backend finds and proves the optimum, or names a conflict where there is none."""
    with shown(problem):
        answer = solve(problem, exact_backend)
        if optimum is None:
            assert_refused(answer)
        elif problem.budgets:
            assert_searched(answer, optimum)
        else:
            assert_proved(answer, optimum)


@contextmanager
def shown(problem: AssignmentProblem) -> Iterator[None]:
    """Add the problem to what goes wrong with it."""
    try:
        yield
    except Exception as error:
        values = {field.name: getattr(problem, field.name) for field in fields(problem)}
        error.add_note("\n".join(f"{name} = {value}" for name, value in values.items() if value is not None))
        raise


def assert_proved(answer: Schedule, optimum: float) -> None:
    """Assert that an answer is the optimum, and that its prices prove it."""
    problem = answer.problem
    scale = max(1.0, abs(optimum))
    mask, total = _assert_optimal(answer, optimum)
    assert answer.bound == pytest.approx(total, abs=TOLERANCE * scale)
    assert answer.prices is not None
    assert answer.verify().optimal
    if problem.layers is not None:
        return  # complementary slackness is that of nested bounds
    assert_prices_prove(problem, mask, answer.prices, 1e-7)


def assert_searched(answer: Schedule, optimum: float) -> None:
    """Assert that an answer to a problem with budgets is the optimum, and that its bound is true."""
    problem = answer.problem
    scale = max(1.0, abs(optimum))
    mask, total = _assert_optimal(answer, optimum)
    assert all(affords(problem, i, np.flatnonzero(row)) for i, row in enumerate(mask))
    assert answer.bound == pytest.approx(total, abs=2 * TOLERANCE * scale)
    assert answer.bound_source in {"prices", "backend"}
    proved = answer.verify().bound
    assert proved is None or proved >= optimum - TOLERANCE * scale
    assert answer.bound_source == "backend" or proved is not None


def _assert_optimal(answer: Schedule, optimum: float) -> tuple[npt.NDArray[np.bool_], float]:
    """Assert that an answer is the optimum; return it, and its objective as counted here."""
    problem = answer.problem
    assert answer.status is Status.OPTIMAL
    assert answer.stop_reason is StopReason.COMPLETED
    mask = answer.assignment.toarray()
    assert mask.dtype == np.bool_
    total = float(problem.desirability.astype(np.float64)[mask].sum()) - penalty_paid(problem, mask.sum(axis=0))
    scale = max(1.0, abs(optimum))
    assert total == pytest.approx(optimum, abs=TOLERANCE * scale)
    assert answer.objective == pytest.approx(total, abs=TOLERANCE * scale)
    assert_keeps_bounds(problem, mask)
    return mask, total


def assert_keeps_bounds(problem: AssignmentProblem, mask: npt.NDArray[np.bool_]) -> None:
    assert (mask.sum(axis=1) <= problem.capacity).all()
    assert (mask.sum(axis=1) >= problem.min_experts).all()
    assert (mask.sum(axis=0) <= problem.load_max).all()
    assert (mask.sum(axis=0) >= problem.load_min).all()
    assert problem.eligible is None or not mask[~problem.eligible].any()
    assert all(keeps_layers(problem, i, np.flatnonzero(row)) for i, row in enumerate(mask))


def assert_refused(answer: Schedule) -> None:
    assert answer.status is Status.INFEASIBLE
    assert answer.stop_reason is StopReason.PROVED_INFEASIBLE
    assert answer.pairs is None
    assert answer.conflict is not None
