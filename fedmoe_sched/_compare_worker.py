"""One solve in a process of its own, so that its memory can be measured and its time bounded.

Run as ``python -m fedmoe_sched._compare_worker``; the pickled request comes in on standard input, from the parent
process alone, and the result goes as JSON to the file that it names.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedmoe_sched.certify import dual_bound
from fedmoe_sched.instances import clustered, load_problem
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.registry import get_solver, register_solver
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.result import Schedule
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Capability, Limits, Solver

__all__ = ["Request", "peak_memory", "run"]

_TIMES = ("build_seconds", "solve_seconds", "read_seconds", "certify_seconds")
_STATUS_FILE = Path("/proc/self/status")


@dataclass(frozen=True)
class Request:
    """What to solve, and how.

    Parameters
    ----------
    problem, result : str
        File to read the problem from, and file to write the result to.
    solver : str or Solver
    path : str or None
        ``"module:Class"`` of a named backend, which the parent may have registered itself.
    limits : Limits
    repeat : int
        The most solves to take the median time of.
    repeat_seconds : float or None
        No further solve is begun once they have taken so long together.
    """

    problem: str
    result: str
    solver: str | Solver[Any]
    path: str | None
    limits: Limits
    repeat: int
    repeat_seconds: float | None = None

    @property
    def ready(self) -> Path:
        """File that is there once engines are imported and kernels loaded."""
        return Path(f"{self.result}.ready")


def run(request: Request) -> dict[str, Any]:
    """Solve, and return what the parent needs to know as plain values."""
    if request.path is not None and isinstance(request.solver, str):
        register_solver(request.solver, request.path)
    problem = load_problem(request.problem)
    backend, _ = get_solver(request.solver, problem)
    _warm_up(backend, budgets=bool(problem.budgets))
    request.ready.touch()
    limits = request.limits
    if Capability.TIME_LIMIT not in backend.capabilities:
        limits = dataclasses.replace(limits, time=None)  # the parent's clock is the only limit it has
    times: list[dict[str, float]] = []
    peak = None
    started = time.perf_counter()
    while True:
        answer = solve(problem, backend, limits=limits)
        times.append({name: getattr(answer, name) for name in _TIMES})
        if len(times) == 1:
            peak = peak_memory()  # what one solve takes: repeats would add the answers before them
        if len(times) == request.repeat or _enough(time.perf_counter() - started, request.repeat_seconds):
            break
    medians = {name: statistics.median(each[name] for each in times) for name in _TIMES}
    return _plain(problem, answer) | medians | {"repeats": len(times), "peak_bytes": peak}


def _enough(seconds: float, limit: float | None) -> bool:
    return limit is not None and seconds >= limit


def _warm_up(backend: Solver[Any], *, budgets: bool) -> None:
    """Solve a tiny problem first: importing an engine and loading kernels are not part of anyone's solve time."""
    tiny = clustered(6, 3).replace(load_min=0)
    if budgets:
        tiny = tiny.replace(budgets=[ResourceBudget("memory", np.array([1.0, 2.0, 3.0]), np.full(6, 3.0))])
    for problem in (tiny, tiny.replace(capacity=1, load_max=6)):  # some take one expert per client only
        if backend.supports(problem) is None:
            solve(problem, backend, limits=Limits(time=10.0))
            return


def _plain(problem: AssignmentProblem, last: Schedule) -> dict[str, Any]:
    return {
        "status": str(last.status),
        "stop_reason": str(last.stop_reason),
        "objective": last.objective,
        "bound": last.bound,
        # Only prices give a bound that anybody can recompute.
        "certified_bound": None if last.prices is None else dual_bound(problem, last.prices),
        "violations": len(last.violations),
        "client_jain": None if last.pairs is None else last.client_jain,
        "expert_jain": None if last.pairs is None else last.expert_jain,
        "message": last.message if last.conflict is None else last.conflict.message,
    }


def peak_memory() -> int | None:
    """Largest resident set of this process so far, in bytes, plus that of the largest program it ran."""
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    own = _own_peak() or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    program = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    # A program starts with the peak of the process that launched it: only what exceeds that is its own.
    return own + program if program > own else own


def _own_peak() -> int | None:
    """Peak of this process from the kernel's status file; None where there is none.

    ``ru_maxrss`` is inherited from the parent on Linux, which may well be larger than the worker ever gets.
    """
    try:
        lines = _STATUS_FILE.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _main() -> None:
    request: Request = pickle.load(sys.stdin.buffer)
    try:
        result = run(request)
    except MemoryError:
        result = {"status": "failed", "message": "out of memory"}
    except Exception as error:  # whatever an engine throws becomes a row of the comparison
        result = {"status": "failed", "message": f"{type(error).__name__}: {error}"}
    Path(request.result).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    # Pickled by the parent under the module's real name, not as __main__.Request.
    from fedmoe_sched._compare_worker import _main as main

    main()
