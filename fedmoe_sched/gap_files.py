"""Published instances of the generalised assignment problem, as problems with one resource budget.

The format of the OR-Library (Beasley 1990, *Journal of the Operational Research Society* 41): numbers parted by
blanks. First the number of instances, which files of a single one leave out; then, for each instance, the numbers
of agents and jobs, the costs agent by agent, what each job takes of each agent's resource in the same order, and
what the agents have. Every job goes to exactly one agent: agents are clients, and jobs experts of load 1.
"""

from __future__ import annotations

import os

from fedmoe_sched._number_files import Numbers, Sense, desirability_sign, read_numbers
from fedmoe_sched.errors import InputError
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget

__all__ = ["read_gap"]

_LEAST = 5  # numbers of an instance: one agent, one job


def read_gap(path: str | os.PathLike[str], sense: Sense = "min") -> list[AssignmentProblem]:
    """Read the instances of a file.

    Parameters
    ----------
    path : path-like
        Text, or the same compressed by gzip.
    sense : {"min", "max"}, default "min"
        Whether the sum of costs is to be small, and desirability is minus the cost; or large, and it is the cost.

    Returns
    -------
    list of AssignmentProblem
        With the resource ``"resource"``, loads of exactly 1, and no limit on the experts of a client.

    Raises
    ------
    InputError
        Not such a file, or a number of it is missing; the message starts with the path.
    OSError
        The file cannot be read.
    """
    sign = desirability_sign(sense)
    numbers = read_numbers(path)
    single = len(numbers) >= _LEAST and len(numbers) == _size(numbers)
    found = [numbers] if single else _parted(path, numbers)
    return [_problem(instance, sign) for instance in found]


def _size(numbers: Numbers) -> int:
    """Count the numbers of an instance that begins here."""
    agents, jobs = numbers[:2].tolist()
    return int(2 + agents * (2 * jobs + 1))


def _parted(path: str | os.PathLike[str], numbers: Numbers) -> list[Numbers]:
    """Part a file that begins with the number of its instances."""
    found: list[Numbers] = []
    at = 1
    while at + 2 <= len(numbers) and _size(numbers[at:]) <= len(numbers) - at:
        size = _size(numbers[at:])
        if size < _LEAST:
            break
        found.append(numbers[at : at + size])
        at += size
    if not found or at != len(numbers) or len(found) != numbers[0]:
        msg = f"{path}: not a file of assignment problems ({len(found)} complete, {len(numbers)} numbers in all)"
        raise InputError(msg)
    return found


def _problem(numbers: Numbers, sign: float) -> AssignmentProblem:
    agents, jobs = (int(number) for number in numbers[:2])
    cells = agents * jobs
    costs, sizes = (numbers[2 + k * cells : 2 + (k + 1) * cells].reshape(agents, jobs) for k in range(2))
    budget = ResourceBudget("resource", sizes.copy(), numbers[2 + 2 * cells :].copy())
    return AssignmentProblem(sign * costs, jobs, load_min=1, load_max=1, budgets=[budget])
