"""What the tests judge the package by: brute force, a linear program, and checks, with no code of the package."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from fedmoe_sched import AssignmentProblem, ExpertLayers, LoadPenalty, ResourceBudget

TOLERANCE = 1e-9


class Everything(NamedTuple):
    """All assignments that keep the clients' bounds: their objectives, loads, and choices per client."""

    values: npt.NDArray[np.float64]
    loads: npt.NDArray[np.int64]
    choices: list[list[tuple[int, ...]]]


def affords(problem: AssignmentProblem, client: int, experts: Iterable[int]) -> bool:
    """Whether a client's budgets reach for these experts, up to what the package forgives."""
    for resource in problem.budgets:
        sizes = resource.size if resource.size.ndim == 1 else resource.size[client]
        if sum(float(sizes[j]) for j in experts) > float(resource.budget[client]) * (1 + 1e-9):
            return False
    return True


def layer_range(problem: AssignmentProblem, client: int, layer: int) -> tuple[int, int]:
    """Return the fewest and most experts of a layer that a client may train."""
    low, high = (
        bounds[client, layer] if bounds.ndim == 2 else bounds[layer]
        for bounds in (problem.layers.layer_min, problem.layers.layer_max)
    )
    return int(low), int(high)


def keeps_layers(problem: AssignmentProblem, client: int, experts: Iterable[int]) -> bool:
    """Whether these experts of a client are as many of each layer as they may be."""
    if problem.layers is None:
        return True
    of = [int(problem.layers.layer_of[j]) for j in experts]
    for layer in set(problem.layers.layer_of.tolist()):
        low, high = layer_range(problem, client, layer)
        if not low <= of.count(layer) <= high:
            return False
    return True


def enumerate_assignments(problem: AssignmentProblem) -> Everything:
    """List every assignment of a tiny problem, load bounds aside; the last client's choice varies fastest.

    Budgets and layers are bounds of clients, and kept.
    """
    n, m = problem.shape
    values, loads = np.zeros(1), np.zeros((1, m), dtype=np.int64)
    choices: list[list[tuple[int, ...]]] = []
    for i in range(n):
        can = [j for j in range(m) if problem.eligible is None or problem.eligible[i, j]]
        sizes = range(int(problem.min_experts[i]), min(int(problem.capacity[i]), len(can)) + 1)
        options = [
            subset
            for size in sizes
            for subset in itertools.combinations(can, size)
            if affords(problem, i, subset) and keeps_layers(problem, i, subset)
        ]
        worth = np.array([sum(float(problem.desirability[i, j]) for j in subset) for subset in options])
        taken = np.array([[j in subset for j in range(m)] for subset in options], dtype=np.int64).reshape(-1, m)
        values = (values[:, None] + worth).reshape(-1)
        loads = (loads[:, None] + taken).reshape(-1, m)
        choices.append(options)
    return Everything(values, loads, choices)


def every_mask(problem):
    """List all assignments that keep every bound, as masks."""
    all_ = enumerate_assignments(problem)
    kept = ((all_.loads >= problem.load_min) & (all_.loads <= problem.load_max)).all(axis=1)
    shape = tuple(len(options) for options in all_.choices)
    masks = []
    for number in np.flatnonzero(kept):
        mask = np.zeros(problem.shape, dtype=np.int8)
        for i, at in enumerate(np.unravel_index(number, shape)):
            mask[i, list(all_.choices[i][at])] = 1
        masks.append(mask)
    return masks


def _remembered(
    optimum: Callable[[AssignmentProblem], float | None],
) -> Callable[[AssignmentProblem], float | None]:
    """Keep what was found: many backends are judged on the same problems."""
    found: dict[tuple[Any, ...], float | None] = {}

    @functools.wraps(optimum)
    def remembered(problem: AssignmentProblem) -> float | None:
        key = _key(problem)
        if key not in found:
            found[key] = optimum(problem)
        return found[key]

    return remembered


def _key(problem: AssignmentProblem) -> tuple[Any, ...]:
    arrays = (problem.desirability, problem.capacity, problem.min_experts, problem.load_min, problem.load_max)
    eligible = None if problem.eligible is None else problem.eligible.tobytes()
    penalty = problem.load_penalty
    parts = () if penalty is None else (penalty.indptr, penalty.start, penalty.value, penalty.slope)
    layers = problem.layers
    nested = () if layers is None else (layers.layer_of, layers.layer_min, layers.layer_max)
    return (
        problem.shape,
        problem.desirability.dtype.str,
        *(a.tobytes() for a in arrays),
        eligible,
        *(a.tobytes() for a in parts),
        *((a.shape, a.tobytes()) for a in nested),
        *(a.tobytes() for resource in problem.budgets for a in (resource.size, resource.budget)),
    )


def marginal_cost(problem: AssignmentProblem, j: int, load: int) -> float:
    """Return what the load-th client of expert j costs: by its last segment that has begun, in a plain search."""
    penalty = problem.load_penalty
    if penalty is None:
        return 0.0
    begun = [s for s in range(penalty.indptr[j], penalty.indptr[j + 1]) if penalty.start[s] <= load]
    s = begun[-1]
    return float(penalty.value[s]) + float(penalty.slope[s]) * int(load - penalty.start[s])


def penalty_table(problem: AssignmentProblem, most: int) -> npt.NDArray[np.float64]:
    """Return phi_j of every load 0..most, one client after the other; shape (m, most + 1)."""
    m = problem.n_experts
    marginals = [[0.0, *(marginal_cost(problem, j, load) for load in range(1, most + 1))] for j in range(m)]
    return np.cumsum(marginals, axis=1)


def penalty_paid(problem: AssignmentProblem, loads: npt.NDArray[np.int64]) -> float:
    """Return the penalty of these loads, client by client; 0 without one."""
    if problem.load_penalty is None:
        return 0.0
    return sum(marginal_cost(problem, j, load) for j, most in enumerate(loads) for load in range(1, int(most) + 1))


@_remembered
def brute_force(problem: AssignmentProblem) -> float | None:
    """Return the best objective of a tiny problem; None if no assignment keeps all bounds."""
    values, loads, _ = enumerate_assignments(problem)
    values = values - penalty_table(problem, problem.n_clients)[np.arange(problem.n_experts), loads].sum(axis=1)
    fits = ((loads >= problem.load_min) & (loads <= problem.load_max)).all(axis=1)
    return float(values[fits].max()) if fits.any() else None


@_remembered
def linear_program(problem: AssignmentProblem) -> float | None:
    """Return the optimum of the linear relaxation, which is integral; None if infeasible. Interior point.

    With a penalty every expert has a variable of at most 1 for each client, which costs what that client does.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, hstack, identity, kron, vstack

    n, m = problem.shape
    by_client = kron(identity(n), np.ones((1, m)))
    by_expert = kron(np.ones((1, n)), identity(m))
    rows = vstack([by_client, -by_client, by_expert, -by_expert], format="csr")
    sides = [problem.capacity, -problem.min_experts, problem.load_max, -problem.load_min]
    if problem.layers is not None:
        counts = np.eye(problem.layers.n_layers)[problem.layers.layer_of].T
        by_layer = kron(identity(n), counts)
        ranges = [[layer_range(problem, i, layer) for layer in range(len(counts))] for i in range(n)]
        low, high = np.array(ranges).reshape(-1, 2).T
        rows = vstack([rows, by_layer, -by_layer], format="csr")
        sides += [high, -low]
    top = np.ones((n, m)) if problem.eligible is None else problem.eligible.astype(float)
    bounds = np.stack([np.zeros(n * m), top.ravel()], axis=1)
    costs = -problem.desirability.astype(np.float64).ravel()
    equal: dict[str, Any] = {}
    if problem.load_penalty is not None:
        paid = [marginal_cost(problem, j, load) for j in range(m) for load in range(1, n + 1)]
        costs = np.concatenate([costs, paid])
        bounds = np.concatenate([bounds, np.tile([0.0, 1.0], (n * m, 1))])
        equal = {"A_eq": hstack([by_expert, -kron(identity(m), np.ones((1, n)))]), "b_eq": np.zeros(m)}
        rows = hstack([rows, csr_array((rows.shape[0], n * m))])
    found = linprog(costs, A_ub=rows, b_ub=np.concatenate(sides), bounds=bounds, method="highs-ipm", **equal)
    return None if found.status == 2 else -float(found.fun)


def assert_prices_prove(problem: AssignmentProblem, mask: npt.NDArray[np.bool_], prices: Any, tol: float) -> None:
    """Assert complementary slackness, expert by expert and client by client.

    A price is 0, or with a penalty between what the last client of the expert costs and what one more would cost;
    more only where the expert is full, less only where it is at its lower bound.
    """
    loads, most = mask.sum(axis=0), problem.load_max
    if problem.load_penalty is not None:
        most = np.minimum(most, problem.n_clients)  # the bound has no conjugate beyond that
    for j, price in enumerate(prices):
        more, last = marginal_cost(problem, j, loads[j] + 1), marginal_cost(problem, j, max(loads[j], 1))
        assert price <= more + tol or loads[j] == most[j], f"expert {j} is not full but priced {price}"
        assert price >= last - tol or loads[j] == problem.load_min[j], (
            f"expert {j} is not scarce but priced {price}"
        )
    for i in range(problem.n_clients):
        can = np.ones(problem.n_experts, bool) if problem.eligible is None else problem.eligible[i]
        reduced = problem.desirability[i].astype(np.float64) - prices
        held, free = reduced[mask[i]], reduced[can & ~mask[i]]
        if len(held) and len(free):
            assert held.min() >= free.max() - tol, f"client {i} would rather swap"
        if len(held) < problem.capacity[i] and len(free):
            assert free.max() <= tol, f"client {i} would take one more"
        if len(held) > problem.min_experts[i]:
            assert held.min() >= -tol, f"client {i} would take one less"


_SHAPES = [(1, 1), (4, 4), (4, 3), (4, 2), (3, 4), (3, 3), (3, 2), (2, 4), (2, 2), (4, 1), (1, 4)]


def contended(seed: int, *, penalised: bool = False) -> AssignmentProblem:
    """Make a random tiny problem whose load bounds bite, and a few of which nothing satisfies.

    A penalty is a table, so steep that it competes with the scores.
    """
    rng = np.random.default_rng(seed)
    n, m = rng.integers(3, 5), rng.integers(2, 5)
    scores = rng.random((n, m)) + rng.random(m) - rng.choice([0.0, 0.6])
    if rng.random() < 0.4:
        scores = np.round(2 * scores)
    eligible = rng.random((n, m)) < 0.8 if rng.random() < 0.4 else None
    slots = np.minimum(rng.integers(1, m + 1, n), m if eligible is None else eligible.sum(axis=1))
    mean = slots.sum() / m
    load_max = np.maximum(1, np.rint(mean * rng.uniform(0.8, 1.5, m)).astype(int))
    table = np.sort(rng.uniform(-0.2, 1.2, (m, 4)), axis=1) if penalised else None
    return AssignmentProblem(
        scores,
        slots,
        load_penalty=None if table is None else LoadPenalty.from_marginals(table),
        min_experts=slots * rng.integers(0, 2),
        load_min=np.minimum(load_max, (mean * rng.uniform(0, 0.9, m)).astype(int)),
        load_max=load_max,
        eligible=eligible,
    )


@st.composite
def load_penalties(draw: st.DrawFn, m: int) -> LoadPenalty:
    """Draw penalties: quadratic ones and tables, ties with one another and with the scores, negative marginals."""
    if draw(st.booleans()):
        elements = draw(st.sampled_from([st.integers(0, 2).map(float), st.floats(0, 1.5)]))
        weight = draw(st.lists(elements, min_size=m, max_size=m))
        history = draw(st.lists(st.sampled_from([0.0, 0.5, 3.0, -2.0, 0.3]), min_size=m, max_size=m))
        return LoadPenalty.quadratic(weight, history)
    width = draw(st.integers(1, 5))
    elements = draw(st.sampled_from([st.integers(-1, 3).map(float), st.floats(-1, 3)]))
    cells = draw(st.lists(elements, min_size=m * width, max_size=m * width))
    return LoadPenalty.from_marginals(np.sort(np.reshape(cells, (m, width)), axis=1))


@st.composite
def resource_budgets(draw: st.DrawFn, shape: tuple[int, int]) -> tuple[ResourceBudget, ...]:
    """Draw one or two resources: whole numbers, tenths that add up, any floats; no limits, nothing left."""
    n, m = shape
    made = []
    for name in ["memory", "seconds"][: draw(st.integers(1, 2))]:
        number = draw(
            st.sampled_from(
                [st.integers(0, 5).map(float), st.integers(0, 9).map(lambda k: k / 10), st.floats(0, 3)]
            )
        )
        by_client = draw(st.booleans())
        cells = draw(st.lists(number, min_size=n * m, max_size=n * m))
        size = np.reshape(cells, (n, m)) if by_client else np.array(cells[:m])
        # Sums of sizes, so that some choice uses a budget up to the last bit.
        sums = np.broadcast_to(size, shape)[:, : draw(st.integers(1, m))].sum(axis=1)
        budget = np.where(draw(hnp.arrays(np.bool_, n)), sums, draw(st.sampled_from([0.0, 1.0, 2.5, np.inf])))
        made.append(ResourceBudget(name, size, budget))
    return tuple(made)


@st.composite
def expert_layers(draw: st.DrawFn, shape: tuple[int, int]) -> ExpertLayers:
    """Draw one to three layers in any order; bounds for all clients or by client, some of which exclude others."""
    n, m = shape
    layer_of = [draw(st.integers(0, 2)) for _ in range(m)]
    layer_of = [sorted(set(layer_of)).index(layer) for layer in layer_of]
    size = (n, max(layer_of) + 1) if draw(st.booleans()) else max(layer_of) + 1
    most = draw(st.none() | hnp.arrays(np.int64, size, elements=st.integers(0, 3), fill=st.nothing()))
    least = draw(hnp.arrays(np.int64, size, elements=st.sampled_from([0, 0, 1, 2]), fill=st.nothing()))
    return ExpertLayers(layer_of, np.minimum(least, np.bincount(layer_of) if most is None else most), most)


def layered(seed: int, *, penalised: bool = False) -> AssignmentProblem:
    """Make a random tiny problem whose layers bite, many together with the capacity; a few have no answer."""
    rng = np.random.default_rng(seed)
    problem = contended(seed, penalised=penalised)
    n, m = problem.shape
    layer_of = rng.integers(0, 2, m) if m < 4 else rng.permutation([0, 0, 1, 1, *rng.integers(0, 2, m - 4)])
    layer_of = np.unique(layer_of, return_inverse=True)[1]
    high = rng.integers(1, 3, (n, layer_of.max() + 1))
    low = np.minimum(high, rng.integers(0, 2, high.shape))
    low[low.sum(axis=1) > problem.slots - rng.integers(0, 2)] = 0
    least = np.minimum(problem.capacity, rng.integers(0, 3, n)) if rng.random() < 0.5 else problem.min_experts
    return problem.replace(layers=ExpertLayers(layer_of, low, high), min_experts=least)


@st.composite
def tiny_problems(
    draw: st.DrawFn,
    *,
    bounded: bool = True,
    penalised: bool = False,
    budgeted: bool = False,
    with_layers: bool = False,
) -> AssignmentProblem:
    """Draw problems small enough to enumerate: ties, negative scores, empty capacities, infeasible bounds."""
    n, m = draw(st.sampled_from(_SHAPES))
    elements = draw(
        st.sampled_from(
            [
                st.integers(1, 4).map(float),
                st.floats(0.25, 1, width=32),
                st.integers(-2, 3).map(float),
                st.floats(-2, 2, width=32),
                st.floats(-1, 1, allow_subnormal=False),
            ]
        )
    )
    dtype = draw(st.sampled_from([np.float64, np.float32]))
    scores = np.array(draw(st.lists(elements, min_size=n * m, max_size=n * m))).reshape(n, m).astype(dtype)
    eligible = draw(st.none() | hnp.arrays(np.bool_, (n, m), elements=st.booleans(), fill=st.nothing()))
    capacity = draw(hnp.arrays(np.int64, n, elements=st.integers(0, m + 1), fill=st.nothing()))
    open_ = np.full(n, m) if eligible is None else eligible.sum(axis=1)
    least = draw(st.sampled_from(["none", "some", "fill"]))
    if least == "some":
        wish = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 2), fill=st.nothing()))
        min_experts = np.minimum(wish, capacity)
    else:
        min_experts = np.minimum(capacity, open_) if least == "fill" else np.zeros(n, dtype=np.int64)
    bounds: dict[str, Any] = {}
    sides = draw(st.sampled_from(["max", "both", "min", "none"])) if bounded else "none"
    if sides in {"max", "both"}:
        lowest = draw(st.sampled_from([1, n // 2, 0]))
        elements = st.integers(lowest, n + 1)
        bounds["load_max"] = draw(hnp.arrays(np.int64, m, elements=elements, fill=st.nothing()))
    if sides in {"min", "both"}:
        wish = draw(hnp.arrays(np.int64, m, elements=st.integers(0, 2), fill=st.nothing()))
        bounds["load_min"] = np.minimum(wish, bounds.get("load_max", n))
    if penalised:
        bounds["load_penalty"] = draw(load_penalties(m))
    if with_layers:
        bounds["layers"] = draw(expert_layers((n, m)))
    if budgeted:
        bounds["budgets"] = draw(resource_budgets((n, m)))
    return AssignmentProblem(scores, capacity, min_experts=min_experts, eligible=eligible, **bounds)


def clustered(
    n: int,
    m: int,
    *,
    seed: int = 0,
    fill: bool = True,
    decimals: int | None = None,
    eligible_share: float = 1.0,
    low: float = 0.5,
    high: float = 1.1,
) -> AssignmentProblem:
    """Make a contended problem: clients and experts cluster around classes, a few of which are popular.

    Ten classes with a Zipf prior; the class mix of each client is drawn from a Dirichlet distribution around
    it, each expert is good at one class. `decimals` rounds the scores, which makes ties.
    """
    rng = np.random.default_rng(seed)
    prior = 1 / np.arange(1, 11)
    prior /= prior.sum()
    gamma = rng.gamma(10 * rng.uniform(0.1, 0.5, n)[:, None] * prior) + 1e-12
    mix = gamma / gamma.sum(axis=1, keepdims=True)
    skill = 0.7 * np.eye(10)[rng.integers(0, 10, m)] + 0.3 * rng.dirichlet(np.ones(10), m)
    scores = mix @ (rng.lognormal(0, 0.25, m)[:, None] * skill).T + 0.05 * rng.standard_normal((n, m))
    if decimals is not None:
        scores = np.round(scores, decimals)
    eligible = None if eligible_share == 1 else rng.random((n, m)) < eligible_share
    capacity = rng.integers(1, 5, n)
    open_ = m if eligible is None else eligible.sum(axis=1)
    slots = np.minimum(capacity, open_)
    mean = slots.sum() / m
    return AssignmentProblem(
        scores,
        capacity,
        min_experts=slots if fill else 0,
        load_min=int(low * mean),
        load_max=int(np.ceil(high * mean)),
        eligible=eligible,
    )
