"""The exact backend with layers, at sizes where it samples clients, parts ties and lets prices jump."""

from __future__ import annotations

import numpy as np
import pytest

from fedmoe_sched import AssignmentProblem, ExpertLayers, Limits, LoadPenalty, Status, solve
from fedmoe_sched._layers import layers_interact
from fedmoe_sched.instances import clustered, layered
from fedmoe_sched.solvers._path_kernels import OUT_OF_ROOM

CLIENTS, EXPERTS = 9_000, 8  # one sampled level below all clients, two blocks of threads

PLAIN = layered(CLIENTS, EXPERTS, seed=1)
SCATTERED = ExpertLayers([0, 1, 1, 0, 2, 0, 2, 1], 1, [2, 1, 2])
ROUNDED = np.round(PLAIN.desirability * 10) / 10
ODD = np.arange(CLIENTS) % 2


def loads_of(layers: ExpertLayers, share: list[float]) -> np.ndarray:
    """A tenth more than what each expert gets where clients take so many of each layer."""
    return np.ceil(1.1 * CLIENTS * np.array(share) / np.bincount(layers.layer_of))[layers.layer_of]


KINDS = {
    "coupled": {},
    "coupled, float32": {"desirability": PLAIN.desirability.astype(np.float32)},
    "coupled, tied": {"desirability": ROUNDED},
    "coupled, whole numbers": {"desirability": np.round(PLAIN.desirability * 5)},
    "coupled, some must take more": {"min_experts": 2 + ODD * (PLAIN.capacity > 2)},
    "coupled, some eligible": {
        "eligible": np.random.default_rng(2).random(PLAIN.shape) < 0.8,
        "layers": ExpertLayers(PLAIN.layers.layer_of, 0, 2),
        "load_min": 0,
    },
    "coupled, scattered layers, penalty": {
        "layers": SCATTERED,
        "capacity": 3 + ODD,
        "load_min": 0,
        "load_max": CLIENTS,
        "load_penalty": LoadPenalty.quadratic(1e-4, np.arange(EXPERTS) * 500.0),
    },
    "independent": {"capacity": 4},
    "independent, filled, scattered, steps": {
        "layers": SCATTERED,
        "capacity": 5,
        "min_experts": 5,
        "load_min": 0,
        "load_max": loads_of(SCATTERED, [2, 1, 2]),
        "load_penalty": LoadPenalty.from_marginals(
            np.cumsum(np.random.default_rng(3).random((EXPERTS, 5000)) < 0.01, axis=1) * 0.05
        ),
    },
}


def problem_of(kind: str) -> AssignmentProblem:
    return PLAIN.replace(**KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_is_proved_and_equals_that_of_the_flow(kind):
    problem = problem_of(kind)
    assert layers_interact(problem) == kind.startswith("coupled")
    answer = solve(problem, "exact")
    assert answer.status is Status.OPTIMAL
    assert answer.objective == pytest.approx(solve(problem, "flow-ortools").objective, rel=1e-9)


@pytest.mark.parametrize("kind", ["coupled, tied", "independent"])
def test_the_answer_is_the_same_for_any_number_of_threads(kind):
    one, two = (solve(problem_of(kind), "exact", limits=Limits(threads=k)) for k in (1, 2))
    np.testing.assert_array_equal(one.pairs.indices, two.pairs.indices)
    np.testing.assert_array_equal(one.prices, two.prices)


@pytest.mark.parametrize("kind", ["coupled", "independent"])
def test_a_warm_start_leads_to_the_optimum(kind):
    problem = problem_of(kind)
    answer = solve(problem, "exact")
    noise = 0.01 * np.random.default_rng(4).standard_normal(problem.shape)
    changed = problem.replace(desirability=problem.desirability + noise)
    warm, cold = (solve(changed, "exact", warm_start=start) for start in (answer, None))
    assert warm.status is Status.OPTIMAL
    assert warm.objective == pytest.approx(cold.objective, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_scores_of_any_magnitude(scale):
    problem = clustered(2000, 8, seed=2).replace(
        layers=ExpertLayers([0, 1] * 4, 1, 2), capacity=3, load_min=0, load_max=900
    )
    answer = solve(problem.replace(desirability=problem.desirability * scale), "exact")
    assert answer.objective == pytest.approx(solve(problem, "exact").objective * scale, rel=1e-9)


def test_infeasible_layers_are_explained():
    problem = PLAIN.replace(load_max=np.where(PLAIN.layers.layer_of == 1, 2000, CLIENTS), load_min=0)
    answer = solve(problem, "exact")
    assert answer.status is Status.INFEASIBLE
    assert "of layer 1" in answer.conflict.message


@pytest.mark.parametrize("kind", ["coupled", "independent"])
def test_a_memory_map_is_read_in_place(tmp_path, kind):
    problem = problem_of(kind)
    np.save(tmp_path / "scores.npy", problem.desirability)
    mapped = problem.replace(desirability=np.load(tmp_path / "scores.npy", mmap_mode="r"))
    assert solve(mapped, "exact").objective == solve(problem, "exact").objective


def test_the_graph_is_made_anew_where_room_for_arcs_runs_out(monkeypatch):
    from fedmoe_sched.solvers import _layer_levels

    statuses = []

    def cramped(*arguments: object) -> int:
        statuses.append(augment(*arguments[:-1], 9**3))  # one path of eight experts and the hub fits in
        return statuses[-1]

    augment = _layer_levels.augment_layered
    monkeypatch.setattr(_layer_levels, "augment_layered", cramped)
    problem = layered(500, 8)
    answer = solve(problem, "exact")
    assert OUT_OF_ROOM in statuses
    assert answer.status is Status.OPTIMAL
    assert answer.objective == pytest.approx(solve(problem, "flow-ortools").objective, rel=1e-12)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        # Client 0 moves from layer 0 to 1, and then from 0 to 2: it moves from where it began to where it ends.
        ([(0, 2, 0), (2, 1, 5), (1, 4, 0)], [(0, 4, 0)]),
        # Twice within layers that differ: nothing is shared.
        ([(0, 1, 0), (1, 2, 5), (2, 3, 0)], [(0, 1, 0), (1, 2, 5), (2, 3, 0)]),
        # Into layer 0, and then within it.
        ([(4, 0, 7), (0, 3, 0), (3, 1, 7)], [(4, 1, 7)]),
        # A load that moves within its bounds has no client.
        ([(0, 6, -1), (6, 4, 3), (4, 2, 5)], [(0, 6, -1), (6, 4, 3), (4, 2, 5)]),
    ],
)
def test_exchanges_of_one_client_that_share_a_bound_become_one(monkeypatch, steps, expected):
    """Layers of two experts; the path is traced from its end, and comes out in that order."""
    from fedmoe_sched.solvers import _layer_paths

    size = 7
    layer_of = np.array([0, 0, 1, 1, 2, 2, 3])
    parent, root, link = np.full(size, -1), np.full((size, size), -1), np.zeros((10, 4), dtype=np.int64)
    for number, (tail, head, client) in enumerate(steps):
        parent[head] = tail if client >= 0 else tail + size
        root[tail, head], link[number, 0] = number, client
    path = np.empty((size, 3), dtype=np.int64)
    monkeypatch.setattr(_layer_paths, "_shares_a_bound", _layer_paths._shares_a_bound.py_func)
    length = _layer_paths._trace.py_func(steps[-1][1], parent, root, link, layer_of, path)
    assert path[:length].tolist() == [list(step) for step in expected[::-1]]
