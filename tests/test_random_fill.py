"""The random backend: full, legal, uniform, seeded."""

from __future__ import annotations

import numpy as np
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe_sched import AssignmentProblem, Limits, Status, certify, solve
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.solvers.random_fill import RandomFill


def a_problem(generator: np.random.Generator, n: int = 40, m: int = 6, **changes) -> AssignmentProblem:
    fields = {
        "capacity": generator.integers(0, m + 2, n),
        "eligible": generator.random((n, m)) < 0.6,
    } | changes
    return AssignmentProblem(generator.random((n, m)), **fields)


@settings(max_examples=drawn(50))
@given(st.integers(0, 2**31 - 1))
def test_fills_every_slot_and_breaks_nothing(seed):
    problem = a_problem(np.random.default_rng(seed))
    problem = problem.replace(min_experts=problem.slots)
    answer = solve(problem, "random", limits=Limits(seed=seed))
    assert answer.status in (Status.FEASIBLE, Status.OPTIMAL)
    assert (answer.pairs.counts == problem.slots).all()
    assert answer.verify().feasible


def test_the_check_of_feasibility_can_fail():
    problem = a_problem(np.random.default_rng(0), eligible=np.zeros((40, 6), dtype=bool))
    assert not certify(problem, Assignment.from_pairs([0], [0], (40, 6))).feasible


def test_the_seed_decides():
    problem = a_problem(np.random.default_rng(1))
    first, again, other = (solve(problem, "random", limits=Limits(seed=seed)) for seed in (4, 4, 5))
    assert (first.pairs.mask() == again.pairs.mask()).all()
    assert (first.pairs.mask() != other.pairs.mask()).any()


def test_every_choice_is_equally_likely():
    n = 60_000
    eligible = np.tile([True, True, False, True, True], (n, 1))
    problem = AssignmentProblem(np.zeros((n, 5)), capacity=2, eligible=eligible)
    mask = solve(problem, "random", limits=Limits(seed=3)).pairs.mask()
    _, counts = np.unique(np.packbits(mask, axis=1), return_counts=True)
    assert len(counts) == 6  # pairs out of 4
    # Chi-square with 5 degrees of freedom: 20.5 is passed once in a thousand seeds, and this seed is fixed.
    assert ((counts - n / 6) ** 2 / (n / 6)).sum() < 20.5


def test_the_check_of_uniformity_can_fail():
    # What a sampler that prefers low expert numbers would give.
    counts = np.array([10_600, 10_100, 10_000, 9_900, 9_900, 9_500])
    assert ((counts - 10_000) ** 2 / 10_000).sum() > 20.5


def test_blocks_do_not_repeat_one_another(monkeypatch):
    monkeypatch.setattr("fedmoe_sched._arrays._BLOCK_CELLS", 60)
    problem = AssignmentProblem(np.zeros((40, 6)), capacity=3)
    mask = solve(problem, "random").pairs.mask()
    assert len({mask[start : start + 10].tobytes() for start in range(0, 40, 10)}) == 4


def test_impossible_min_experts_are_infeasible():
    problem = AssignmentProblem(np.ones((2, 2)), capacity=2, min_experts=2, eligible=[[True, False], [True, True]])
    answer = solve(problem, "random")
    assert answer.status is Status.INFEASIBLE
    assert answer.conflict.clients == (0,)


def test_broken_load_bounds_are_listed():
    problem = AssignmentProblem(np.ones((50, 4)), capacity=1, min_experts=1, load_max=[50, 50, 50, 0])
    answer = solve(problem, "random")
    assert answer.status is Status.VIOLATED
    assert [v.constraint for v in answer.violations] == ["load_max"]


def test_is_a_heuristic_that_needs_nothing():
    assert not RandomFill.exact
    assert RandomFill.missing() is None
    assert RandomFill().supports(a_problem(np.random.default_rng(0))) is None
    assert solve(a_problem(np.random.default_rng(0)), RandomFill()).bound is None
