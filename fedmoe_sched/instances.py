"""Seeded instances of the round problem, for comparing solvers.

All families but `soft`, `layered` and `budgets` share the bounds: capacities uniform in 1..4 (never above the
number of experts), every load between half of the mean load and 10 % above it::

    load_min = floor(0.5 * sum(capacity) / m)        load_max = ceil(1.1 * sum(capacity) / m)

They differ in the desirability, and so in how much the clients contend for the same experts. With independent
scores (`uniform`, `integers`) each client's best experts spread evenly by themselves once there are some 10,000
clients (ties broken at random): the load bounds hardly bind, ranking nearly solves the problem, and it tests
little. All others build on the scores of `clustered`, which stay contended at any size. `soft` has no load bounds:
a load penalty balances. `layered` has bounds of layers too, and `budgets` what each device has of memory, time and
upload.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._layer_dealing import mean_layer_loads
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.problem_files import load_problem, save_problem
from fedmoe_sched.scores import ExpertCost, resource_budgets
from fedmoe_sched.solve import solve
from fedmoe_sched.switching import with_switching_cost

__all__ = [
    "FAMILIES",
    "budgets",
    "clustered",
    "drifted",
    "generate",
    "integers",
    "layered",
    "load_problem",
    "save_problem",
    "soft",
    "tied",
    "uniform",
    "with_bounds",
]

_CLASSES = 10
_QUANTUM = 0.05
_DRIFT = _SWITCHING_COST = 0.1

# Devices of `budgets`: bandwidths and speed as `fedmoe_sched.federated.devices` draws them, in seconds and bytes.
_RAM = np.array([2e9, 3e9, 4e9, 4e9, 6e9, 6e9, 8e9, 8e9, 8e9, 12e9])
_MEMORY_SHARE = 0.05
_SAMPLES = 500
_DEADLINE = 600.0

FloatMatrix = npt.NDArray[np.float64]


def uniform(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Draw every desirability independently and uniformly from [0, 1).

    Parameters
    ----------
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
    """
    rng = _generator(n_clients, n_experts, seed)
    return with_bounds(rng.random((n_clients, n_experts)), rng)


def integers(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Draw every desirability independently from the whole numbers 0..5: ties everywhere.

    Parameters
    ----------
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
    """
    rng = _generator(n_clients, n_experts, seed)
    return with_bounds(rng.integers(0, 6, (n_clients, n_experts)).astype(np.float64), rng)


def clustered(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Draw scores as non-IID data would give them: popular classes, specialised experts of unequal quality.

    Ten classes have a Zipf prior. The data of client i is a mix of them drawn from
    ``Dirichlet(10 alpha_i prior)``, alpha_i uniform in [0.1, 0.5]. Expert j has a prototype: its quality, drawn
    from ``LogNormal(0, 0.25)``, times 0.7 of its own class (j mod 10) plus 0.3 of a ``Dirichlet(1)`` draw. The
    score is the mix times the prototype plus noise of standard deviation 0.05. Clients crowd onto the good
    experts of the popular classes at any size.

    Parameters
    ----------
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
    """
    rng = _generator(n_clients, n_experts, seed)
    return with_bounds(_clustered_scores(n_clients, n_experts, rng), rng)


def tied(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Round the scores of `clustered` to multiples of 0.05: contention and ties at once.

    Parameters
    ----------
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
    """
    rng = _generator(n_clients, n_experts, seed)
    scores = _clustered_scores(n_clients, n_experts, rng)
    return with_bounds(np.rint(scores / _QUANTUM) * _QUANTUM, rng)


def drifted(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Go on from a round of `clustered`: the scores have drifted, and what clients do not hold from it costs 0.1.

    What they hold is the answer of ``greedy-global`` to that round. Normal noise of standard deviation 0.1 is
    added to the scores, and 0.1 subtracted from those of pairs that are not held (`fedmoe_sched.switching`).

    Parameters
    ----------
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
    """
    rng = _generator(n_clients, n_experts, seed)
    last = with_bounds(_clustered_scores(n_clients, n_experts, rng), rng)
    held = solve(last, "greedy-global").pairs
    assert held is not None
    scores = last.desirability + _DRIFT * rng.standard_normal(last.shape)
    return last.replace(desirability=with_switching_cost(scores, held, np.array(_SWITCHING_COST)))


def soft(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Balance the scores of `clustered` by a load penalty instead of bounds.

    Clients train as many experts as they can, so that the loads sum up to the capacities. The penalty is
    quadratic, of weight 0.5 per mean load: one more client of an expert costs 0.5 more where its level is a mean
    load higher.
    The history of each expert is uniform in [0, 1) mean loads.

    Parameters
    ----------
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
    """
    rng = _generator(n_clients, n_experts, seed)
    bounded = with_bounds(_clustered_scores(n_clients, n_experts, rng), rng)
    mean_load = float(bounded.capacity.sum()) / n_experts
    penalty = LoadPenalty.quadratic(0.5 / mean_load, mean_load * rng.random(n_experts))
    return bounded.replace(min_experts=bounded.capacity, load_min=0, load_max=None, load_penalty=penalty)


def layered(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Put the experts of `clustered` into layers, of each of which a client trains one or two.

    There are ``G = min(8, m // 4)`` layers of neighbouring experts, at least one. Capacities are uniform in
    G..2 G: which layers get a second expert is up to the client, so that the layers are not problems of their own.
    Loads lie between half of the mean load of the layer and 10 % above it; these means are those of clients that
    share what their capacity allows evenly among the layers.

    Parameters
    ----------
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
    """
    rng = _generator(n_clients, n_experts, seed)
    scores = _clustered_scores(n_clients, n_experts, rng)
    n_layers = max(1, min(8, n_experts // 4))
    layers = ExpertLayers(np.arange(n_experts) * n_layers // n_experts, 1, 2)
    capacity = np.minimum(rng.integers(n_layers, 2 * n_layers + 1, n_clients), n_experts)
    problem = AssignmentProblem(scores, capacity, layers=layers)
    mean = mean_layer_loads(problem)[layers.layer_of]
    # A hair inwards, so that rounding errors of the mean move no bound by a client.
    return problem.replace(load_min=np.floor(0.5 * mean + 1e-9), load_max=np.ceil(1.1 * mean - 1e-9))


def budgets(n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Give the clients of `clustered` devices, and the experts unequal sizes: three resource budgets.

    An expert has ``20 MB * LogNormal(0, 0.5)``, and computes in proportion to that times ``LogNormal(0, 0.25)``.
    Devices are phones: 5 % of a RAM of 2 to 12 GB, in classes, is for training; log-normal are milliseconds per
    sample (median 63, standard deviation of the logarithm 0.8), download (4300 kbit/s, 0.5), upload (3300 kbit/s,
    0.7), and the bytes that a client may upload in a round (50 MB, 0.5). Clients train on 500 samples, within 10
    minutes. `fedmoe_sched.scores.resource_budgets` makes ``"memory"``, ``"seconds"`` and ``"upload"`` of that;
    capacities of 1..4 bound the number of experts on top.

    Load bounds come from experts dealt out in turn, to each client as many as its budgets and its capacity allow.
    No load is more than 10 % above the mean load of that dealing, and none less than half of it; of an expert that
    was dealt less often, as it fits fewer clients, none less than it was dealt. So there always is a schedule.

    Parameters
    ----------
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem
    """
    rng = _generator(n_clients, n_experts, seed)
    scores = _clustered_scores(n_clients, n_experts, rng)
    capacity = with_bounds(scores, rng).capacity
    weight = rng.lognormal(0.0, 0.5, n_experts)
    cost = ExpertCost(
        expert_bytes=tuple(20e6 * weight),
        expert_compute=tuple(weight * rng.lognormal(0.0, 0.25, n_experts)),
        samples=_SAMPLES,
    )
    kbits = [rng.lognormal(np.log(median), spread, n_clients) for median, spread in ((4300, 0.5), (3300, 0.7))]
    devices = np.column_stack(  # the columns of `profile_table`
        [
            rng.lognormal(np.log(63.0), 0.8, n_clients),
            _MEMORY_SHARE * rng.choice(_RAM, n_clients),
            *(125 * speed for speed in kbits),  # bytes per second
            np.zeros(n_clients),
        ]
    )
    upload = rng.lognormal(np.log(50e6), 0.5, n_clients)
    resources = resource_budgets(devices, cost, n_experts, deadline=_DEADLINE, upload_bytes=upload)
    problem = AssignmentProblem(scores, capacity, budgets=resources)
    dealt = _dealt_loads(problem)
    total = int(dealt.sum())
    # Whole-number arithmetic, as in `with_bounds`. Who is dealt more than load_max can do with fewer clients.
    return problem.replace(
        load_min=np.minimum(dealt, total // (2 * n_experts)), load_max=-(-11 * total // (10 * n_experts))
    )


#: The families by name.
FAMILIES: dict[str, Callable[..., AssignmentProblem]] = {
    "clustered": clustered,
    "tied": tied,
    "uniform": uniform,
    "integers": integers,
    "drifted": drifted,
    "soft": soft,
    "layered": layered,
    "budgets": budgets,
}


def generate(family: str, n_clients: int, n_experts: int, *, seed: int = 0) -> AssignmentProblem:
    """Draw an instance of a family by name.

    Parameters
    ----------
    family : str
        One of `FAMILIES`.
    n_clients, n_experts : int
        n and m, both >= 1.
    seed : int, default 0
        Same seed, same problem.

    Returns
    -------
    AssignmentProblem

    Raises
    ------
    InputError
        No such family, or a size below 1.

    Examples
    --------
    >>> generate("clustered", 100, 8)
    AssignmentProblem(100 clients x 8 experts, 239 slots, load 14..33)
    """
    try:
        draw = FAMILIES[family]
    except (KeyError, TypeError):
        msg = f"family = {family!r}: must be one of {', '.join(FAMILIES)}"
        raise InputError(msg) from None
    return draw(n_clients, n_experts, seed=seed)


def _generator(n_clients: int, n_experts: int, seed: int) -> np.random.Generator:
    for name, value, least in (("n_clients", n_clients, 1), ("n_experts", n_experts, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            msg = f"{name} = {value!r}: must be a whole number >= {least}"
            raise InputError(msg)
    return np.random.default_rng(seed)


def with_bounds(scores: npt.NDArray[np.floating[Any]], rng: np.random.Generator) -> AssignmentProblem:
    """Set capacities and load bounds as nearly all families have them, see the head of this module.

    Parameters
    ----------
    scores : ndarray, shape (n, m), float32 or float64
    rng : Generator
        Draws the capacities.

    Returns
    -------
    AssignmentProblem
    """
    n, m = scores.shape
    capacity = np.minimum(rng.integers(1, 5, n), m)
    total = int(capacity.sum())
    # Whole-number arithmetic: 1.1 * total / m would round some exact multiples up.
    return AssignmentProblem(scores, capacity, load_min=total // (2 * m), load_max=-(-11 * total // (10 * m)))


def _clustered_scores(n: int, m: int, rng: np.random.Generator) -> FloatMatrix:
    prior = 1.0 / np.arange(1, _CLASSES + 1)
    prior /= prior.sum()
    alpha = rng.uniform(0.1, 0.5, n)
    mix = rng.standard_gamma(alpha[:, None] * _CLASSES * prior)  # a Dirichlet draw, once normalised
    mix /= mix.sum(axis=1, keepdims=True)
    quality = rng.lognormal(0.0, 0.25, m)
    own_class = np.eye(_CLASSES)[np.arange(m) % _CLASSES]
    prototype = quality[:, None] * (0.7 * own_class + 0.3 * rng.dirichlet(np.ones(_CLASSES), m))
    scores: FloatMatrix = mix @ prototype.T
    scores += 0.05 * rng.standard_normal((n, m))
    return scores


def _dealt_loads(problem: AssignmentProblem) -> IntArray:
    """Offer client i the experts i, i + 1, ... (mod m), and count who takes what fits; shape (m,), int64."""
    n, m = problem.shape
    client = np.arange(n)
    slots = problem.capacity.copy()
    left = [resource.budget for resource in problem.budgets]
    loads = np.zeros(m, dtype=np.int64)
    for turn in range(m):
        expert = (client + turn) % m
        sizes = [resource.pair_sizes(client, expert) for resource in problem.budgets]
        takes = np.logical_and.reduce([slots > 0, *(size <= rest for size, rest in zip(sizes, left, strict=True))])
        slots -= takes
        left = [rest - takes * size for size, rest in zip(sizes, left, strict=True)]
        loads += np.bincount(expert[takes], minlength=m)
    return loads
