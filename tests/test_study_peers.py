"""The peers of the study: right where they claim to be, and refusals where they are not."""

from __future__ import annotations

import numpy as np
import pytest
from oracle import brute_force, linear_program

from benchmarks.study.families import single
from benchmarks.study.peers import PEERS, register_peers
from benchmarks.study.peers.pot_emd import PotEmd
from benchmarks.study.peers.pruned_flow import PrunedFlow
from benchmarks.study.peers.pylmcf_simplex import PylmcfSimplex
from benchmarks.study.peers.scipy_lap import SciPyLap
from fedmoe_sched import AssignmentProblem, Status, UnsupportedProblemError, registry, solve, solvers
from fedmoe_sched.instances import clustered, tied, uniform

WHOLE = [PylmcfSimplex(), PrunedFlow(), PrunedFlow(smallest=3)]
ONE_EACH = [*WHOLE, PotEmd(), SciPyLap()]


def skip_if_missing(peer):
    if peer.missing() is not None:
        pytest.skip(peer.missing())


def random_problem(seed, *, single_slot=False):
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(3, 7)), int(rng.integers(2, 4))
    scores = rng.integers(-3, 6, (n, m)) / 4 if seed % 2 else rng.standard_normal((n, m))
    if single_slot:
        least = rng.integers(0, 2, n)
        return AssignmentProblem(scores, 1, min_experts=least, load_max=rng.integers(-(-n // m), n + 1, m))
    capacity = rng.integers(0, m + 1, n)
    low = rng.integers(0, 2, m)
    return AssignmentProblem(
        scores,
        capacity,
        min_experts=rng.integers(0, capacity + 1),
        load_min=low,
        load_max=low + rng.integers(0, n, m),
        eligible=rng.random((n, m)) < 0.8,
    )


def assert_is_optimum(problem, answer, optimum):
    if optimum is None:
        assert answer.status is Status.INFEASIBLE
    else:
        assert answer.status is Status.OPTIMAL
        assert answer.objective == pytest.approx(optimum, abs=1e-9)
        assert answer.verify().optimal


@pytest.mark.parametrize("peer", WHOLE, ids=repr)
@pytest.mark.parametrize("seed", range(25))
def test_agrees_with_brute_force(peer, seed):
    skip_if_missing(peer)
    problem = random_problem(seed)
    assert_is_optimum(problem, solve(problem, peer), brute_force(problem))


@pytest.mark.parametrize("peer", ONE_EACH, ids=repr)
@pytest.mark.parametrize("seed", range(25))
def test_agrees_with_brute_force_for_one_expert_per_client(peer, seed):
    skip_if_missing(peer)
    problem = random_problem(seed, single_slot=True)
    assert_is_optimum(problem, solve(problem, peer), brute_force(problem))


@pytest.mark.parametrize("family", [clustered, tied, uniform], ids=lambda family: family.__name__)
@pytest.mark.parametrize("peer", [PylmcfSimplex(), PrunedFlow(smallest=30), PrunedFlow(smallest=100)], ids=repr)
def test_agrees_with_a_linear_program_where_it_samples(peer, family):
    skip_if_missing(peer)
    problem = family(400, 6, seed=2)
    assert_is_optimum(problem, solve(problem, peer), linear_program(problem))


def test_pruned_flow_takes_single_precision_and_is_proved():
    problem = clustered(3000, 8, seed=1)
    answer = solve(problem.replace(desirability=problem.desirability.astype(np.float32)), PrunedFlow())
    assert answer.verify().optimal


def test_pruned_flow_really_prunes(monkeypatch):
    from fedmoe_sched.solvers.flow_ortools import OrToolsFlow

    pairs = []
    build = OrToolsFlow.build

    def counted(self, problem, limits, prices):
        pairs.append(problem.n_clients * problem.n_experts if problem.eligible is None else problem.eligible.sum())
        return build(self, problem, limits, prices)

    monkeypatch.setattr(OrToolsFlow, "build", counted)
    problem = uniform(4000, 8)
    assert solve(problem, PrunedFlow()).status is Status.OPTIMAL
    assert max(pairs) < 0.5 * 4000 * 8


@pytest.mark.parametrize("peer", [PotEmd(), SciPyLap()], ids=repr)
@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (AssignmentProblem(np.ones((4, 2)), 2), "one expert per client only"),
        (AssignmentProblem(np.ones((4, 2)), 1, load_min=1), "lower load bounds"),
        (AssignmentProblem(np.ones((4, 2)), 1, load_max=1), "no fewer places than clients"),
        (AssignmentProblem(np.ones((4, 2)), 1, eligible=np.eye(4, 2)), "does not take eligibility"),
    ],
)
def test_peers_for_one_expert_refuse_the_rest(peer, problem, reason):
    skip_if_missing(peer)
    with pytest.raises(UnsupportedProblemError, match=reason):
        solve(problem, peer)


def test_assignment_refuses_a_matrix_beyond_its_memory():
    problem = single(clustered(100, 4))
    assert SciPyLap(memory_limit=10**6).supports(problem) is None
    assert "GiB" in SciPyLap(memory_limit=10**4).supports(problem)


def test_peers_are_found_by_their_own_names(monkeypatch):
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    assert set(PEERS).isdisjoint(entry.name for entry in solvers())
    register_peers()
    entries = {entry.name: entry for entry in solvers()}
    assert all(entries[name].exact and entries[name].summary for name in PEERS)
    assert all(registry.solver_class(name).name == name for name in PEERS)
