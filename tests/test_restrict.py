"""Problems of some clients and experts: every field comes along, checked by enumeration."""

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import brute_force, tiny_problems

from fedmoe_sched import AssignmentProblem, ExpertLayers, InputError, LoadPenalty, ResourceBudget


def closed(problem, clients, experts):
    """The whole problem with nothing possible outside the part, and nothing demanded there."""
    n, m = problem.shape
    inside = np.zeros((n, m), dtype=bool)
    inside[np.ix_(clients, experts)] = True
    out_clients, out_experts = ~inside.any(axis=1), ~inside.any(axis=0)
    layers = problem.layers
    if layers is not None:
        low, high = (bounds.copy() for bounds in layers.bounds_of(slice(0, n), n))
        low[out_clients] = 0
        low[:, np.setdiff1d(np.arange(layers.n_layers), layers.layer_of[experts])] = 0
        layers = ExpertLayers(layers.layer_of, low, high)
    return problem.replace(
        eligible=inside if problem.eligible is None else inside & problem.eligible,
        min_experts=np.where(out_clients, 0, problem.min_experts),
        load_min=np.where(out_experts, 0, problem.load_min),
        layers=layers,
    )


@settings(max_examples=drawn(150), deadline=None)
@given(data=st.data())
def test_a_part_has_the_optimum_of_the_whole_with_the_rest_closed(data):
    flags = data.draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    problem = data.draw(tiny_problems(penalised=flags[0], budgeted=flags[1], with_layers=flags[2]))
    n, m = problem.shape
    clients = data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, n))]
    experts = data.draw(st.permutations(range(m)))[: data.draw(st.integers(1, m))]
    part = problem.restrict(clients, experts)
    assert part.shape == (len(clients), len(experts))
    best, whole = brute_force(part), brute_force(closed(problem, clients, experts))
    assert best == (None if whole is None else pytest.approx(whole, abs=1e-9))


def full_problem():
    return AssignmentProblem(
        np.arange(12, dtype=np.float32).reshape(3, 4),
        [1, 2, 3],
        min_experts=[0, 1, 2],
        load_min=[0, 1, 0, 1],
        load_max=[3, 2, 1, 3],
        eligible=np.arange(12).reshape(3, 4) % 5 > 0,
        load_penalty=LoadPenalty.from_marginals([[1, 2], [3, 3], [0, 4], [5, 6]]),
        budgets=[
            ResourceBudget("memory", [1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0]),
            ResourceBudget("seconds", np.arange(12.0).reshape(3, 4), [50.0, np.inf, 70.0]),
        ],
        layers=ExpertLayers([0, 2, 1, 2], layer_min=0, layer_max=[[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        client_labels=["a", "b", "c"],
        expert_labels=["w", "x", "y", "z"],
    )


def test_every_field_by_hand():
    part = full_problem().restrict([2, 0], [3, 1])
    assert part.desirability.tolist() == [[11, 9], [3, 1]]
    assert part.desirability.dtype == np.float32
    assert (part.capacity.tolist(), part.min_experts.tolist()) == ([3, 1], [2, 0])
    assert (part.load_min.tolist(), part.load_max.tolist()) == ([1, 1], [3, 2])
    assert part.eligible.tolist() == [[True, True], [True, True]]
    assert part.load_penalty.marginal([2, 2]).tolist() == [6, 3]
    memory, seconds = part.budgets
    assert (memory.size.tolist(), memory.budget.tolist()) == ([4, 2], [7, 5])
    assert (seconds.size.tolist(), seconds.budget.tolist()) == ([[11, 9], [3, 1]], [70, 50])
    assert (part.layers.layer_of.tolist(), part.layers.layer_max.tolist()) == ([0, 0], [[9], [3]])
    assert (part.client_labels, part.expert_labels) == (("c", "a"), ("z", "x"))
    two = full_problem().restrict([1], [1, 0]).layers  # of layers 2 and 0
    assert (two.layer_of.tolist(), two.layer_max.tolist()) == ([1, 0], [[4, 6]])
    shared = ExpertLayers([0, 2, 1, 2], layer_min=0, layer_max=[1, 2, 3])
    assert full_problem().replace(layers=shared).restrict(None, [1, 0]).layers.layer_max.tolist() == [1, 3]


def test_neighbours_are_views_and_changes_are_made_at_once():
    problem = full_problem()
    part = problem.restrict(clients=[1, 2], capacity=[0, 4], min_experts=0, layers=None)
    assert np.shares_memory(part.desirability, problem.desirability)
    assert np.shares_memory(part.eligible, problem.eligible)
    assert (part.capacity.tolist(), part.layers, part.expert_labels) == ([0, 4], None, problem.expert_labels)
    assert part.load_penalty is problem.load_penalty
    assert problem.restrict().shape == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clients": [0, 3]}, r"clients\[1\] = 3: must be below 3"),
        ({"experts": [0, -1]}, r"experts\[1\] = -1: must be >= 0"),
        ({"experts": [2, 1, 2]}, r"experts\[2\] = 2: occurs twice"),
        ({"clients": [0], "capacity": [1, 2]}, r"capacity: has shape \(2,\), must be \(1,\)"),
        ({"clients": [0], "capacities": 1}, "no argument called 'capacities'"),
        ({"experts": [0.5]}, "experts"),
    ],
)
def test_wrong_parts(arguments, message):
    with pytest.raises(InputError, match=message):
        full_problem().restrict(**arguments)
