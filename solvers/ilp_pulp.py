"""The integer program by CBC, through PuLP."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched._budgets import network_relaxation
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import objective
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import StopReason
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers._budget_rows import Covers, budget_rows
from fedmoe_sched.solvers._layer_rows import layer_rows
from fedmoe_sched.solvers._load_steps import engine_bound, engine_costs, load_sides
from fedmoe_sched.solvers._matrix import Pairs, clipped_bounds, eligible_pairs
from fedmoe_sched.solvers._rounding import completed_answer

__all__ = ["PulpCbc"]

_LOG_PRECISION = 0.0005  # the log prints the bound with three decimals
_EARLY = 0.9  # of the time limit: whoever ends before was not stopped by it
_GRACE = 1.0  # seconds that CBC has for writing its answer after the time limit
#: With knapsack cuts behind its preprocessing CBC 2.10 cuts off the optimum of some problems with budgets, and
#: calls less than that optimal.
_SOUND = ("-preprocess", "off", "-knapsackCuts", "off")


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    pairs: Pairs
    unit: float
    folder: Path
    program: Any
    mps_names: dict[str, str]  # the names of the variables, and what they are called in the file
    limited: bool = False
    killed: bool = False
    return_code: int | None = None
    early: bool = True  # whether it ended long before its time limit
    kept: bool = True  # whether the last assignment keeps the budgets to the certificate's tolerance

    @property
    def solution(self) -> Path:
        return self.folder / "round.sol"

    @property
    def log(self) -> str:
        file = self.folder / "cbc.log"
        return file.read_text(errors="replace") if file.exists() else ""


class PulpCbc(Solver[_Model]):
    """Exact branch and cut with CBC: PuLP writes the program, brings the engine, and reads the solution.

    What the tolerances of the engine leave is recovered by cancelling improving cycles after a completed run.
    At a time limit the bound is what CBC's log says, if it got as far as one. CBC looks at the clock only between
    its phases, so the process is stopped one second after the limit; it has no assignment to show then. With
    budgets the bound of a completed run is the backend's word, and answers that exceed a budget within the
    engine's tolerance are excluded by a row of their own, and the process runs anew; CBC's preprocessing and
    knapsack cuts are off, because together they cut off optima. With a load penalty each expert has a continuous
    variable for every step in the cost of its load.
    """

    name: ClassVar[str] = "ilp-pulp"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.LOAD_PENALTY,
        Capability.BUDGETS,
        Capability.LAYERS,
        Capability.PRICES,
        Capability.TIME_LIMIT,
        Capability.THREADS,
    }
    requires: ClassVar[tuple[str, ...]] = ("pulp",)
    summary: ClassVar[str] = "integer program (CBC through PuLP); a separate process, stopped at a time limit"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Make one binary per eligible pair, at most two constraints per client, expert, layer; write the file."""
        pulp = _pulp()

        network = network_relaxation(problem)
        pairs = eligible_pairs(network)
        bounds = clipped_bounds(network)
        scores, steps, unit = engine_costs(problem, pairs, bounds)
        with _without_announcements():
            program = pulp.LpProblem("round", pulp.LpMaximize)
            takes = np.array(
                [pulp.LpVariable(f"x{k}", cat=pulp.LpBinary) for k in range(len(scores))], dtype=object
            )
            used = np.array(
                [pulp.LpVariable(f"y{k}", 0, size) for k, size in enumerate(steps.sizes.tolist())], dtype=object
            )
            gains = zip([*takes, *used], [*scores.tolist(), *(-steps.costs).tolist()], strict=True)
            program.setObjective(pulp.LpAffineExpression(gains))
            clients = _grouped(takes, pairs.clients, problem.n_clients)
            for group, least, most in zip(clients, bounds.client_min, bounds.client_max, strict=True):
                _constrain(program, group, int(least), int(most))
            loads = _grouped(takes, pairs.experts, problem.n_experts)
            beyond = _grouped(used, steps.experts, problem.n_experts)
            for group, more, least, most in zip(loads, beyond, *load_sides(bounds, steps), strict=True):
                _constrain(program, group, int(least), int(most), more)
            if problem.layers is not None:
                layers = layer_rows(network, pairs)
                groups = _grouped(takes, layers.rows, len(layers.low))
                for group, least, most in zip(groups, layers.low, layers.high, strict=True):
                    _constrain(program, group, int(least), int(most))
            for numbers, sizes, limit in zip(*budget_rows(problem, pairs, whole=False)[:3], strict=True):
                taken = pulp.LpAffineExpression(zip(takes[numbers].tolist(), sizes.tolist(), strict=True))
                program.addConstraint(pulp.LpConstraint(taken, pulp.LpConstraintLE, rhs=limit))
            folder = Path(tempfile.mkdtemp(prefix="fedmoe-sched-"))
            mps_names = _write(program, folder)
        model = _Model(problem, pairs, unit, folder, program, mps_names)
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
        return model

    def run(self, model: _Model, limits: Limits) -> None:
        """Solve within the limits."""

        def solve(seconds: float | None) -> None:
            _run_engine(model, dataclasses.replace(limits, time=seconds))

        def exclude(client: int, experts: npt.NDArray[np.int64]) -> None:
            numbers = np.flatnonzero((model.pairs.clients == client) & np.isin(model.pairs.experts, experts))
            variables = model.program.variablesDict()
            cover = np.array([variables[f"x{k}"] for k in numbers.tolist()], dtype=object)
            with _without_announcements():
                _constrain(model.program, cover, 0, len(experts) - 1)
                model.mps_names = _write(model.program, model.folder)

        model.kept = Covers(model.problem).enforce(solve, lambda: _read_found(model), exclude, limits.time)

    def read(self, model: _Model) -> Answer:
        """Read the assignment, and the bound where the run was interrupted."""
        pulp = _pulp()

        if model.killed or not model.kept:
            return Answer(StopReason.TIME_LIMIT)
        if model.return_code != 0 or not model.solution.exists():
            return Answer(StopReason.FAILED, message=f"CBC ended with code {model.return_code}")
        engine = _engine()
        # The first status will not do: it reads "Optimal" for the incumbent of an interrupted run too.
        status, found = engine.get_status(str(model.solution))
        words = model.solution.read_text().partition(" - objective value")[0]
        if status == pulp.LpStatusInfeasible and (words == "Infeasible" or _is_integer_infeasible(model, words)):
            return Answer(StopReason.PROVED_INFEASIBLE)
        if found in {pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible}:
            assignment = _read_assignment(engine, model, model.solution)
            if found == pulp.LpSolutionOptimal:
                return completed_answer(model.problem, assignment, objective(model.problem, assignment))
            return Answer(StopReason.TIME_LIMIT, assignment, bound=_logged_bound(model))
        # "Integer infeasible" is among these: CBC says so when the time runs out in its preprocessing. Without
        # budgets it is never true, for a linear program of this matrix that is feasible has an integer solution.
        reason = StopReason.TIME_LIMIT if model.limited else StopReason.FAILED
        return Answer(reason, bound=_logged_bound(model), message=f"CBC ended: {words}")


def _run_engine(model: _Model, limits: Limits) -> None:
    """Run CBC on the file, as a process that is stopped if it does not heed the time limit."""
    command = [_engine().path, "round.mps", "-max", "-ratio", "0", "-allow", "0"]
    seed = str(1 + limits.seed % (2**31 - 1))  # 0 stands for the time of day
    command += ["-randomSeed", seed, "-randomCbcSeed", seed]
    if limits.time is not None:
        command += ["-sec", str(limits.time), "-timeMode", "elapsed"]
    if limits.threads is not None:
        command += ["-threads", str(limits.threads)]
    if model.problem.budgets:
        command += list(_SOUND)
    command += ["-solve", "-printingOptions", "all", "-solution", model.solution.name]
    model.limited = limits.time is not None
    patience = None if limits.time is None else limits.time + _GRACE
    model.solution.unlink(missing_ok=True)
    started = time.perf_counter()
    with (model.folder / "cbc.log").open("wb") as log:
        try:
            ended = subprocess.run(
                command,
                cwd=model.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=patience,
                check=False,
            )
        except subprocess.TimeoutExpired:
            model.killed = True
        else:
            model.return_code = ended.returncode
    model.early = limits.time is None or time.perf_counter() - started < _EARLY * limits.time


def _read_found(model: _Model) -> Assignment | None:
    """Return the assignment that the engine ended with, if there is one."""
    pulp = _pulp()
    if model.killed or model.return_code != 0 or not model.solution.exists():
        return None
    _, found = _engine().get_status(str(model.solution))
    if found not in {pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible}:
        return None
    return _read_assignment(_engine(), model, model.solution)


def _is_integer_infeasible(model: _Model, words: str) -> bool:
    """Whether to believe it when CBC says so: with budgets, and if the time had not run out."""
    return bool(model.problem.budgets) and model.early and words == "Integer infeasible"


def _write(program: Any, folder: Path) -> dict[str, str]:
    """Write the program, and return what its variables are called in the file."""
    names: dict[str, str] = program.writeMPS(str(folder / "round.mps"), rename=1)[1]
    return names


def _pulp() -> Any:
    """Import PuLP on a stack of its own.

    PuLP keeps the exceptions of the engines that it does not find, and an exception keeps the stack it was raised
    on: imported from here, it would hold the first problem, its model and its files until the process ends.
    """
    if "pulp" not in sys.modules:
        with ThreadPoolExecutor(1) as stack:
            stack.submit(importlib.import_module, "pulp").result()
    return sys.modules["pulp"]


@contextlib.contextmanager
def _without_announcements() -> Iterator[None]:
    """Silence what PuLP 3.3 says about the interface of PuLP 4, which 3.2 does not have yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _engine() -> Any:
    pulp = _pulp()
    with _without_announcements():
        return pulp.PULP_CBC_CMD(msg=False)


def _grouped(
    variables: npt.NDArray[np.object_], side: npt.NDArray[np.int64], size: int
) -> list[npt.NDArray[np.object_]]:
    """Split variables by the client, or expert, that each belongs to."""
    by_side = np.argsort(side, kind="stable")
    return np.split(variables[by_side], np.cumsum(np.bincount(side, minlength=size))[:-1])


def _constrain(
    program: Any,
    group: npt.NDArray[np.object_],
    least: int,
    most: int,
    less: npt.NDArray[np.object_] | None = None,
) -> None:
    """Bound the sum of a group, less another one."""
    pulp = _pulp()
    taken = [] if less is None else less.tolist()
    signs = [1] * len(group) + [-1] * len(taken)
    total = pulp.LpAffineExpression(zip([*group.tolist(), *taken], signs, strict=True))
    if least == most:
        program.addConstraint(pulp.LpConstraint(total, pulp.LpConstraintEQ, rhs=most))
        return
    if least > 0:
        program.addConstraint(pulp.LpConstraint(total, pulp.LpConstraintGE, rhs=least))
    if most < len(group):
        program.addConstraint(pulp.LpConstraint(total, pulp.LpConstraintLE, rhs=most))


def _read_assignment(engine: Any, model: _Model, solution: Path) -> Assignment:
    class _Named:  # the reader wants the names of variables, nothing else of them
        def __init__(self, name: str) -> None:
            self.name = name

    names = [f"x{k}" for k in range(len(model.pairs.clients))]
    values = engine.readsol_MPS(str(solution), None, [_Named(name) for name in names], model.mps_names, {})[1]
    chosen = np.array([values[name] > 0.5 for name in names], dtype=np.bool_)
    return Assignment.from_pairs(model.pairs.clients[chosen], model.pairs.experts[chosen], model.problem.shape)


def _logged_bound(model: _Model) -> float | None:
    """Read the upper bound out of CBC's log, rounded up; None if the first linear program was not finished."""
    log = model.log
    found = re.search(r"^Upper bound:\s+(\S+)", log, flags=re.MULTILINE)
    if found is None or "Continuous objective value" not in log:
        return None
    return engine_bound(model.problem, (float(found.group(1)) + _LOG_PRECISION) * model.unit)
