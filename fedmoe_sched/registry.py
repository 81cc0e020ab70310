"""The backends by name: loaded only when used, listed without importing any engine."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fedmoe_sched.errors import InputError, MissingDependencyError, UnsupportedProblemError
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solver import Capability, Solver

__all__ = ["SolverEntry", "get_solver", "pick", "register_solver", "solver_class", "solvers"]

# In the order in which tables list them: heuristics, then exact backends from the most special to the most
# general one.
_BACKENDS: dict[str, str] = {
    "random": "fedmoe_sched.solvers.random_fill:RandomFill",
    "greedy": "fedmoe_sched.solvers.greedy:Greedy",
    "greedy-global": "fedmoe_sched.solvers.greedy_global:GreedyGlobal",
    "exact": "fedmoe_sched.solvers.successive_shortest_paths:SuccessiveShortestPaths",
    "flow-networkx": "fedmoe_sched.solvers.flow_networkx:NetworkXFlow",
    "flow-ortools": "fedmoe_sched.solvers.flow_ortools:OrToolsFlow",
    "lp-scipy": "fedmoe_sched.solvers.lp_scipy:SciPyLP",
    "lagrangian": "fedmoe_sched.solvers.lagrangian:Lagrangian",
    "milp-scipy": "fedmoe_sched.solvers.milp_scipy:SciPyMILP",
    "ilp-ortools": "fedmoe_sched.solvers.ilp_ortools:CpSat",
    "mip-ortools": "fedmoe_sched.solvers.mip_ortools:OrToolsMIP",
    "ilp-pulp": "fedmoe_sched.solvers.ilp_pulp:PulpCbc",
}

# Exact backends in the order in which `auto` would have them: the fastest first. One compiles its kernels when it
# is first used: below so many pairs the others are fast enough, and it comes last. So it does with many experts
# and few clients: its graph has a node per expert, that of the others an arc per pair (docs/solvers.md has times).
_COMPILED = "exact"
_AUTO_ORDER = (_COMPILED, "flow-ortools", "lp-scipy", "flow-networkx", "ilp-pulp")
_AUTO_BUDGETS = ("lagrangian", "milp-scipy", "ilp-ortools", "mip-ortools", "ilp-pulp")
_COMPILING_PAYS = 100_000
_SQUARED_EXPERTS_PER_CLIENT = 128

# The backend for problems without load bounds and penalty, where clients do not compete.
_AUTO_SEPARABLE = "greedy"


@dataclass(frozen=True)
class SolverEntry:
    """One line of `solvers()`.

    Parameters
    ----------
    name : str
        What to pass as ``solver=``.
    exact : bool
        Whether a completed run is optimal.
    capabilities : frozenset of Capability
    available : True or str
        True, or the reason why it cannot be used here.
    summary : str
        What it is and when to use it.
    """

    name: str
    exact: bool
    capabilities: frozenset[Capability]
    available: bool | str
    summary: str


def register_solver(name: str, path: str) -> None:
    """Add a backend of your own under a name, or replace one.

    Parameters
    ----------
    name : str
        What to pass as ``solver=``.
    path : str
        ``"module:Class"``, a subclass of `fedmoe_sched.solver.Solver`; imported when first used.
    """
    module, _, cls = path.partition(":")
    if not module or not cls:
        msg = f"path = {path!r}: must read 'module:Class'"
        raise InputError(msg)
    _BACKENDS[name] = path


def solver_class(name: str) -> type[Solver[Any]]:
    """Return the class of a backend; its engine is not imported."""
    try:
        module, _, cls = _BACKENDS[name].partition(":")
    except (KeyError, TypeError):
        msg = f"solver = {name!r}: must be 'auto', a Solver, or one of {', '.join(_BACKENDS)}"
        raise InputError(msg) from None
    found: type[Solver[Any]] = getattr(importlib.import_module(module), cls)
    return found


def solvers() -> list[SolverEntry]:
    """List every backend with what it can do and whether it can be used here."""
    entries = []
    for name in _BACKENDS:
        cls = solver_class(name)
        entries.append(SolverEntry(name, cls.exact, cls.capabilities, cls.missing() or True, cls.summary))
    return entries


def pick(problem: AssignmentProblem, candidates: Iterable[str] | None = None) -> tuple[str, str]:
    """Choose the backend for ``solver="auto"``, from the class of the problem and what is installed.

    Without load bounds and load penalty every client's own best choice is optimal, and nothing has to be
    optimised. Else the first of the candidates that can be used here and takes the problem is chosen.

    Parameters
    ----------
    problem : AssignmentProblem
    candidates : iterable of str, optional
        Exact backends, the preferred one first; by default in an order of their speed.

    Returns
    -------
    name : str
    reason : str
        Why, in a few words.

    Raises
    ------
    UnsupportedProblemError
        None of the candidates can be used.
    """
    n, m = problem.shape
    if problem.is_separable:
        return _AUTO_SEPARABLE, f"{n} x {m} without load bounds: each client's own best choice is optimal"
    if candidates is None:
        candidates = _AUTO_BUDGETS if problem.budgets else _AUTO_ORDER
    if n * m < _COMPILING_PAYS or m * m > _SQUARED_EXPERTS_PER_CLIENT * n:
        candidates = sorted(candidates, key=_COMPILED.__eq__)
    refusals: list[str] = []
    for name in candidates:
        cls = solver_class(name)
        refusal = cls.missing() or cls().supports(problem)
        if refusal is None:
            reason = f"{n} x {m} with {_coupling(problem)}: fastest exact backend"
            if refusals:
                reason += f" that can be used here ({'; '.join(refusals)})"
            return name, reason
        refusals.append(refusal)
    msg = f"solver = 'auto': no backend takes this problem ({'; '.join(refusals)})"
    raise UnsupportedProblemError(msg)


def _coupling(problem: AssignmentProblem) -> str:
    """Say what makes the clients compete."""
    bounds = ["load bounds"] if problem.has_load_bounds else []
    penalty = ["load penalty"] if problem.load_penalty is not None else []
    budgets = ["budgets"] if problem.budgets else []
    layers = ["layers"] if problem.layers is not None else []
    return " and ".join(bounds + penalty + budgets + layers)


def get_solver(solver: str | Solver[Any], problem: AssignmentProblem) -> tuple[Solver[Any], str]:
    """Return a ready backend for `problem`, and why `auto` chose it (empty for a named one).

    Raises
    ------
    InputError
        No backend of that name.
    MissingDependencyError
        A package that it needs is not installed.
    UnsupportedProblemError
        The backend does not take this problem.
    """
    reason = ""
    if isinstance(solver, Solver):
        instance = solver
    else:
        if solver == "auto":
            solver, reason = pick(problem)
        instance = solver_class(solver)()
    missing = instance.missing()
    if missing is not None:
        raise MissingDependencyError(missing)
    refusal = instance.supports(problem)
    if refusal is not None:
        raise UnsupportedProblemError(refusal)
    return instance, reason
