"""One verb: solve a problem with a backend, certify the answer, explain a refusal."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import as_vector
from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import OPTIMALITY_GAP, Certificate, relative_gap
from fedmoe_sched.certify import certify as make_certificate
from fedmoe_sched.errors import InputError
from fedmoe_sched.exchange import recover_prices
from fedmoe_sched.feasibility import budget_conflict, find_conflict
from fedmoe_sched.minimal_conflict import minimal_conflict
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.registry import get_solver, pick
from fedmoe_sched.result import Schedule, Status, StopReason
from fedmoe_sched.solver import Answer, Capability, Limits, Solver

__all__ = ["solve"]


def solve(
    problem: AssignmentProblem,
    solver: str | Solver[Any] = "auto",
    *,
    limits: Limits | None = None,
    certify: bool = False,
    warm_start: Schedule | npt.ArrayLike | None = None,
) -> Schedule:
    """Solve one assignment problem.

    Parameters
    ----------
    problem : AssignmentProblem
    solver : str or Solver, default "auto"
        A name from `solvers()`, or an instance with options: ``solve(problem, Greedy(...))``.
    limits : Limits, optional
        Time, seed and threads. A backend without `Capability.TIME_LIMIT` runs to its end whatever the time, and
        the schedule's ``message`` says so.
    certify : bool, default False
        Obtain a bound that prices prove, and so a gap, for an answer that comes without, at the cost of an exact
        solve. Answers of exact backends always have one, except with budgets.
    warm_start : Schedule or array_like of shape (m,), optional
        A schedule of a similar problem, or its prices, to start from.

    Returns
    -------
    Schedule
        Its objective, feasibility and bound were recomputed from the raw problem. An infeasible problem is an
        answer, not an exception: ``status`` is INFEASIBLE and ``conflict`` says why.

    Raises
    ------
    InputError, MissingDependencyError, UnsupportedProblemError
        The backend is unknown, not installed, or does not take this problem.

    Examples
    --------
    >>> problem = AssignmentProblem([[3.0, 1.0], [2.0, 0.5]], capacity=1, min_experts=1, load_max=1)
    >>> answer = solve(problem)
    >>> str(answer.status), answer.objective, answer.experts_by_client()
    ('optimal', 3.5, {0: [0], 1: [1]})
    """
    limits = limits or Limits()
    backend, reason = get_solver(solver, problem)
    start = time.perf_counter()
    prices = _starting_prices(warm_start, problem.n_experts)
    model = backend.build(problem, limits, prices)
    built = time.perf_counter()
    backend.run(model, limits)
    solved = time.perf_counter()
    answer = backend.read(model)
    read = time.perf_counter()
    if answer.assignment is None:
        schedule = _without_assignment(problem, backend, answer)
    else:
        schedule = _with_assignment(problem, backend, answer, answer.assignment, want_bound=certify)
    return dataclasses.replace(
        schedule,
        build_seconds=built - start,
        solve_seconds=solved - built,
        read_seconds=read - solved,
        certify_seconds=time.perf_counter() - read,
        solver_reason=reason,
        message=_with_notice(schedule.message, backend, limits),
    )


def _with_notice(message: str, backend: Solver[Any], limits: Limits) -> str:
    """Add to the backend's words that it could not keep the time limit, where one was set."""
    if limits.time is None or Capability.TIME_LIMIT in backend.capabilities:
        return message
    notice = f"{backend.name} takes no time limit: it ran to its end"
    return f"{message}; {notice}" if message else notice


def _starting_prices(
    warm_start: Schedule | npt.ArrayLike | None, n_experts: int
) -> npt.NDArray[np.float64] | None:
    if isinstance(warm_start, Schedule):
        if warm_start.prices is None:
            return None
        warm_start = warm_start.prices
        if len(warm_start) != n_experts:
            msg = f"warm_start: a schedule of {len(warm_start)} experts, must be of {n_experts}"
            raise InputError(msg)
    if warm_start is None:
        return None
    return as_vector("warm_start", warm_start, n_experts, "one price per expert").astype(np.float64)


def _without_assignment(problem: AssignmentProblem, backend: Solver[Any], answer: Answer) -> Schedule:
    conflict = find_conflict(problem)
    if conflict is None and problem.budgets and answer.stop_reason is StopReason.PROVED_INFEASIBLE:
        conflict = budget_conflict(problem, backend.name)
    if conflict is not None:
        conflict = minimal_conflict(problem, conflict)
        status, stop_reason = Status.INFEASIBLE, StopReason.PROVED_INFEASIBLE
    else:
        # A backend that calls a feasible problem infeasible has failed, and the schedule says so.
        claimed = answer.stop_reason is StopReason.PROVED_INFEASIBLE
        status = Status.UNKNOWN
        stop_reason = StopReason.FAILED if claimed else answer.stop_reason
    return Schedule(
        problem,
        backend.name,
        status,
        stop_reason,
        solver_bound=answer.bound,
        conflict=conflict,
        message=answer.message,
    )


def _with_assignment(
    problem: AssignmentProblem,
    backend: Solver[Any],
    answer: Answer,
    assignment: Assignment,
    *,
    want_bound: bool,
) -> Schedule:
    prices = answer.prices
    completed = answer.stop_reason is StopReason.COMPLETED
    if prices is None and backend.exact and completed and not problem.budgets:
        prices = recover_prices(problem, assignment)
    if prices is None and want_bound:
        prices = _prices_of_optimum(problem)
    certificate = make_certificate(problem, assignment, prices)
    if not certificate.feasible:
        refused = _refused(problem, backend, certificate)
        if refused is not None:
            return refused
    claimed = answer.bound if prices is None or problem.budgets else None
    return Schedule(
        problem,
        backend.name,
        _status(problem, certificate, claimed),
        answer.stop_reason,
        pairs=assignment,
        certificate=certificate,
        prices=prices,
        solver_bound=claimed,
        message=answer.message,
    )


def _status(problem: AssignmentProblem, certificate: Certificate, claimed: float | None) -> Status:
    """Judge an answer: optimal if prices prove it.

    With budgets prices alone cannot always, and a bound that the backend vouches for counts;
    `Schedule.bound_source` tells which of them it was.
    """
    if not certificate.feasible:
        return Status.VIOLATED
    if certificate.optimal:
        return Status.OPTIMAL
    if problem.budgets and claimed is not None:
        gap = relative_gap(claimed, certificate.objective)
        return Status.OPTIMAL if gap <= OPTIMALITY_GAP else Status.FEASIBLE
    return Status.FEASIBLE


def _refused(problem: AssignmentProblem, backend: Solver[Any], certificate: Certificate) -> Schedule | None:
    """Turn down an assignment that breaks what this backend must keep; None if it may be handed on."""
    broken = {violation.constraint for violation in certificate.violations}
    if broken & {"min_experts", "layer_min"}:
        conflict = find_conflict(problem)
        if conflict is not None:
            conflict = minimal_conflict(problem, conflict)
            return Schedule(
                problem, backend.name, Status.INFEASIBLE, StopReason.PROVED_INFEASIBLE, conflict=conflict
            )
    if backend.exact or broken & {"capacity", "eligible", "layer_max"}:
        message = f"returned an assignment that breaks constraints: {certificate.violations[0]}"
        return Schedule(problem, backend.name, Status.UNKNOWN, StopReason.FAILED, message=message)
    return None


def _prices_of_optimum(problem: AssignmentProblem) -> npt.NDArray[np.float64] | None:
    """Prices from an exact backend, to judge an answer by; None where the problem is infeasible.

    With budgets they are those of the network that is left without them: a bound, but a weak one.
    """
    relaxed = network_relaxation(problem)
    name, _ = pick(relaxed)
    return solve(relaxed, name).prices
