"""Families of instances that only the study uses: fitness of a real training run, and one expert per client."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedmoe_sched import AssignmentProblem, InputError
from fedmoe_sched.instances import generate, with_bounds

__all__ = ["FAMILIES", "FITNESS_FILE", "SINGLE", "instance", "single", "trained"]

#: Written by ``python -m benchmarks.study.fitness_run``.
FITNESS_FILE = Path(__file__).with_name("data") / "trained.npz"

#: Families of the study, in the order of its tables.
FAMILIES = ("uniform", "clustered", "tied", "trained")

#: What the families of one expert per client are called: the family, then this.
SINGLE = "-single"

#: From so many pairs on the study takes its scores in float32, as a round of that size would keep them.
FLOAT32_PAIRS = 100_000 * 64

_BLOCK = 8192  # rows of one matrix product


def trained(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Resample the fitness of a real training run (see ``benchmarks/study/data/README.md``).

    The file has, for every training sample s of every real client and every expert j, ``e_sj``: the moving average
    over the rounds of whether the expert labels the sample right. The mean over a client's samples is the client's
    fitness, as `fedmoe_sched.scores.FitnessScores` would hold it.

    Experts: `n_experts` distinct columns, chosen at random. Clients: each row is a real client drawn with
    replacement, whose own samples are then reweighted by the Bayesian bootstrap (Rubin 1981, Annals of Statistics
    9, 130-134)::

        fitness_ij = sum_s w_s e_sj        w ~ Dirichlet(1, ..., 1) over the samples s of the client

    That is the sampling error which a fitness estimated from so few samples really has, correlated between the
    experts as it really is, since they are judged on the same samples. The ordinary bootstrap would give clients
    with four samples no more than 35 different rows, and so ties that mean nothing. A million rows drawn like this
    are a million noisy copies of some hundreds of real clients, not a million real clients.

    Parameters
    ----------
    n_clients : int
        n >= 1.
    n_experts : int
        m, from 1 to the number of experts in the file.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
        Capacities and load bounds as in `fedmoe_sched.instances`.

    Raises
    ------
    InputError
        More experts than there are, or a number out of range.
    """
    correct, starts = _sample_scores()
    most = correct.shape[1]
    if n_clients < 1 or not 1 <= n_experts <= most or seed < 0:
        msg = (
            f"trained({n_clients}, {n_experts}, seed={seed}): clients must be >= 1, experts 1 to {most}, seed >= 0"
        )
        raise InputError(msg)
    rng = np.random.default_rng(seed)
    columns = np.ascontiguousarray(correct[:, rng.permutation(most)[:n_experts]])
    client = rng.integers(0, len(starts) - 1, n_clients)
    scores = np.empty((n_clients, n_experts))
    order = np.argsort(client, kind="stable")
    edges = np.searchsorted(client[order], np.arange(len(starts)))
    for first, last, row, end in zip(starts[:-1], starts[1:], edges[:-1], edges[1:], strict=True):
        for start in range(row, end, _BLOCK):
            rows = order[start : min(end, start + _BLOCK)]
            scores[rows] = _weights(len(rows), last - first, rng) @ columns[first:last]
    return with_bounds(scores, rng)


@functools.cache
def _sample_scores() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the scores by sample, clients one after another, and where each client's samples begin and end."""
    with np.load(FITNESS_FILE) as file:
        correct, client = file["correct"].astype(np.float64), file["client"]
    starts = np.flatnonzero(np.diff(client, prepend=-1))
    return correct, np.append(starts, len(client)).astype(np.int64)


def _weights(rows: int, samples: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Draw from the flat Dirichlet distribution; shape (rows, samples)."""
    weights = rng.standard_exponential((rows, samples))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def single(problem: AssignmentProblem) -> AssignmentProblem:
    """Give every client exactly one expert, as transport and assignment solvers want it.

    Parameters
    ----------
    problem : AssignmentProblem

    Returns
    -------
    AssignmentProblem
        The same scores; ``capacity = min_experts = 1``, ``load_min = 0``, ``load_max`` 10 % above the mean load.
    """
    n, m = problem.shape
    return problem.replace(capacity=1, min_experts=1, load_min=0, load_max=-(-11 * n // (10 * m)))


def instance(family: str, n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Draw an instance of the study.

    Parameters
    ----------
    family : str
        One of `FAMILIES`, or such a name followed by `SINGLE`.
    n_clients, n_experts : int
    seed : int, default 0

    Returns
    -------
    AssignmentProblem
        In float32 from `FLOAT32_PAIRS` pairs on.
    """
    base = family.removesuffix(SINGLE)
    if base == "trained":
        problem = trained(n_clients, n_experts, seed=seed)
    else:
        problem = generate(base, n_clients, n_experts, seed=seed)
    if n_clients * n_experts >= FLOAT32_PAIRS:
        problem = problem.replace(desirability=problem.desirability.astype(np.float32))
    return single(problem) if base != family else problem
