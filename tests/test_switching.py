"""Switching cost: what counts as held, the optimum of one round, and what schedulers remember."""

from __future__ import annotations

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import brute_force, enumerate_assignments, tiny_problems
from scheduler_tools import frozen, simulate

from fedmoe_sched import AssignmentProblem, InputError, Scheduler, Status, schedule, solve
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.policies import make_policy
from fedmoe_sched.switching import as_held, switching_report, with_switching_cost

pd = pytest.importorskip("pandas")

CLIENTS, EXPERTS = ["ann", "bob", "cid"], ["cats", "dogs"]
HELD = np.array([[True, False], [False, True], [True, True]])


def held_pairs(mask) -> Assignment:
    return Assignment.from_mask(np.asarray(mask, dtype=np.bool_))


# --- one round by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cost", "experts", "objective"), [(0.0, [0], 0.6), (0.05, [0], 0.55), (0.2, [1], 0.5)])
def test_a_client_changes_only_if_it_pays(cost, experts, objective):
    """Expert 0 is better by 0.1, and the client holds expert 1."""
    answer = schedule([[0.6, 0.5]], [1, 1], 1, balance=None, usage_weight=0, held={0: [1]}, switching_cost=cost)
    assert (answer.experts_of(0), answer.status) == (experts, Status.OPTIMAL)
    assert answer.objective == pytest.approx(objective, abs=1e-12)
    assert answer.verify().optimal


def test_the_report_takes_the_objective_apart():
    answer = schedule(
        [[0.9, 0.8], [0.3, 0.6]], [1, 1], 2, held={0: [0]}, switching_cost=[0.5, 0.25], usage_weight=0
    )
    report = switching_report(answer, {0: [0]}, [0.5, 0.25])
    assert (report.kept, report.resent) == (1, 3)
    assert report.paid == pytest.approx(0.25 + 0.5 + 0.25)
    assert report.desirability == pytest.approx(0.9 + 0.8 + 0.3 + 0.6)
    assert answer.objective == pytest.approx(report.desirability - report.paid)


def test_the_cost_may_differ_from_pair_to_pair():
    fitness, held = [[0.6, 0.5], [0.6, 0.5]], {0: [1], 1: [1]}
    answer = schedule(
        fitness, [1, 1], 1, balance=None, usage_weight=0, held=held, switching_cost=[[0.05, 9], [0.2, 9]]
    )
    assert answer.experts_by_client() == {0: [0], 1: [1]}


def test_what_is_held_keeps_its_score_to_the_last_digit():
    scores = np.random.default_rng(0).random((50, 4), dtype=np.float32)
    held = np.random.default_rng(1).random((50, 4)) < 0.5
    less = with_switching_cost(scores, held_pairs(held), np.array(0.1))
    assert less.dtype == np.float32
    assert (less[held] == scores[held]).all()
    assert (less[~held] == scores[~held] - np.float32(0.1)).all()
    assert with_switching_cost(scores, held_pairs(held), np.array(0.0)) is scores


def test_without_a_cost_what_is_held_changes_nothing():
    fitness = np.random.default_rng(2).random((9, 3))
    plain, told = schedule(fitness, [1, 2, 3], 1), schedule(fitness, [1, 2, 3], 1, held=np.ones((9, 3), bool))
    assert plain.experts_by_client() == told.experts_by_client()
    assert plain.objective == told.objective


# --- the optimum -------------------------------------------------------------------------------------------------

BACKENDS = ["exact", "flow-ortools", "flow-networkx", "lp-scipy", "milp-scipy"]


@settings(max_examples=drawn(40))
@given(problem=tiny_problems(), data=st.data())
def test_network_backends_find_the_best_of_all_assignments(problem, data):
    """The oracle adds up fitness and switching cost pair by pair; it never sees the changed scores."""
    held = np.array(data.draw(st.lists(st.booleans(), min_size=problem.desirability.size)))
    held = held[: problem.desirability.size].reshape(problem.shape)
    cost = data.draw(st.sampled_from([0.25, 1.0, 3.0]))
    every = enumerate_assignments(problem)
    paid = np.zeros(1)
    for i, options in enumerate(every.choices):
        fresh = np.array([sum(not held[i, j] for j in subset) for subset in options], dtype=float)
        paid = (paid[:, None] + cost * fresh).reshape(-1)
    fits = ((every.loads >= problem.load_min) & (every.loads <= problem.load_max)).all(axis=1)
    best = (every.values - paid)[fits].max() if fits.any() else None
    scores = with_switching_cost(problem.desirability, held_pairs(held), np.array(cost))
    for backend in BACKENDS:
        answer = solve(problem.replace(desirability=scores), backend)
        if best is None:
            assert answer.status is Status.INFEASIBLE
        else:
            assert answer.status is Status.OPTIMAL
            assert answer.objective == pytest.approx(best, abs=1e-6)


sizes = st.lists(st.integers(0, 4), min_size=4, max_size=4)


@settings(max_examples=drawn(80))
@given(
    problem=tiny_problems(),
    seed=st.integers(0, 9999),
    size=sizes,
    factors=st.lists(st.integers(1, 40), min_size=2),
)
def test_a_higher_price_per_byte_never_sends_more_bytes(problem, seed, size, factors):
    """The exchange argument: of two optima for prices p < q, that for q sends at most as much, ties or not."""
    held = np.random.default_rng(seed).random(problem.shape) < 0.4
    each = np.array(size[: problem.n_experts], dtype=float)
    sent = []
    for factor in sorted(factors):
        scores = with_switching_cost(problem.desirability, held_pairs(held), factor / 8 * each)
        answer = solve(problem.replace(desirability=scores), "exact")
        if answer.status is Status.INFEASIBLE:
            return
        sent.append(float(((answer.pairs.mask() & ~held) * each).sum()))
    assert sent == sorted(sent, reverse=True)


def test_more_pairs_may_be_sent_where_they_are_fewer_bytes():
    """7 - 3p for one expert of 3 bytes against 4 - 2p for two of one byte: from p = 3 on two are sent, not one."""
    eligible = [[True, True, False], [False, True, True]]
    scores = AssignmentProblem([[5.0, 2.0, 0.0], [0.0, 2.0, 2.0]], 1, min_experts=1, load_max=1, eligible=eligible)
    resent, held = {}, held_pairs([[False, False, False], [False, True, False]])
    for price in (2.9, 3.1):
        cost = price * np.array([3.0, 1.0, 1.0])
        answer = solve(scores.replace(desirability=with_switching_cost(scores.desirability, held, cost)))
        assert answer.objective == pytest.approx(brute_force(answer.problem))
        resent[price] = switching_report(answer, held, cost).resent
    assert resent == {2.9: 1, 3.1: 2}


# --- what clients hold -------------------------------------------------------------------------------------------


def test_what_is_held_can_be_told_in_many_ways():
    last = schedule([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]], [1, 1], [1, 1, 2], balance=None, usage_weight=0)
    sparse = last.assignment
    ways = [HELD, HELD.tolist(), HELD.astype(int), sparse, last, held_pairs(HELD), {0: [0], 1: [1], 2: (1, 0, 1)}]
    for held in ways:
        assert (as_held(held, (3, 2)).mask() == HELD).all()
    assert not as_held(None, (3, 2)).mask().any()


def test_names_are_matched_and_clients_may_come_and_go():
    frame = pd.DataFrame(HELD, index=CLIENTS, columns=EXPERTS)
    last = schedule(
        pd.DataFrame(HELD * 1.0, index=CLIENTS, columns=EXPERTS), [1, 1], [1, 1, 2], balance=None, usage_weight=0
    )
    now = (("dee", "cid", "ann"), ("dogs", "cats"))
    expected = [[False, False], [True, True], [False, True]]
    for held in (frame, last, {"ann": ["cats"], "bob": ["dogs"], "cid": ["dogs", "cats"]}):
        assert (as_held(held, (3, 2), *now).mask() == expected).all()


def test_schedule_matches_names_of_held_and_cost():
    fitness = pd.DataFrame([[0.6, 0.5], [0.6, 0.5]], index=["ann", "bob"], columns=EXPERTS)
    last = pd.DataFrame([[True, False]], index=["bob"], columns=["dogs", "cats"])
    cost = pd.Series([9.0, 0.2], ["dogs", "cats"])
    answer = schedule(fitness, [1, 1], 1, balance=None, usage_weight=0, held=last, switching_cost=cost)
    # ann holds nothing: dogs would cost her 9, cats 0.2. bob holds dogs.
    assert answer.experts_by_client() == {"ann": ["cats"], "bob": ["dogs"]}
    assert answer.objective == pytest.approx(0.6 - 0.2 + 0.5)
    both = pd.DataFrame([[9.0, 0.2], [9.0, 0.05]], index=["ann", "bob"], columns=["dogs", "cats"])
    answer = schedule(fitness, [1, 1], 1, balance=None, usage_weight=0, held=last, switching_cost=both)
    assert answer.experts_by_client() == {"ann": ["cats"], "bob": ["cats"]}


@pytest.mark.parametrize(
    ("held", "cost", "words"),
    [
        (None, -1, r"switching_cost = -1\.0: must be finite and >= 0"),
        (None, [0.1, -2], r"switching_cost\[1\] = -2\.0: must be finite and >= 0"),
        (None, [[0, 0], [0, np.nan], [0, 0]], r"switching_cost\[1, 1\] = nan: must be finite"),
        (None, [1, 2, 3], r"switching_cost: has shape \(3,\), must be one number, \(2,\) \(experts\) or \(3, 2\)"),
        (None, "dear", "switching_cost: holds .* values, not numbers"),
        ({3: [0]}, 1, r"held\[3\]: must be a client number from 0 to 2"),
        ({0: [2]}, 1, r"held\[0\]: expert 2 is not among the 2 of this round"),
        ({0: 1}, 1, r"held\[0\] = 1: must be a list of experts"),
        ({0: [[1]]}, 1, r"held\[0\]: expert \[1\] is not among"),
        (HELD[:2], 1, r"held: has shape \(2, 2\), must be \(3, 2\)"),
        (held_pairs(HELD[:2]), 1, r"held: has shape \(2, 2\), must be \(3, 2\)"),
        (HELD * 3, 1, r"held\[0, 0\] = 3: must be True or False"),
    ],
)
def test_bad_input_is_named(held, cost, words):
    with pytest.raises(InputError, match=words):
        schedule(np.ones((3, 2)), [1, 1], 1, held=held, switching_cost=cost)


def test_an_expert_that_is_gone_is_named():
    with pytest.raises(InputError, match="expert 'cars' is held, and this round has no such expert"):
        as_held(pd.DataFrame([[True]], index=["ann"], columns=["cars"]), (3, 2), CLIENTS, EXPERTS)


# --- rounds ------------------------------------------------------------------------------------------------------


def one_round(scheduler, clients, *, failed=(), reward=0.5):
    plan = scheduler.plan(clients).experts_by_client()
    for client, experts in plan.items():
        if client in failed:
            scheduler.report(client, failed=True)
        else:
            scheduler.report(client, dict.fromkeys(experts, (10, reward)))
    return plan, scheduler.close_round()


def moody(**options) -> Scheduler:
    """One client whose favourite changes at once with what it learns."""
    scheduler = Scheduler(["x", "y"], balance=None, usage_weight=0, fitness={"rate": 1.0}, **options)
    scheduler.add_client("a", fitness=[0.6, 0.5])
    return scheduler


@pytest.mark.parametrize(("cost", "second", "resent"), [(0.0, "y", 1), (0.05, "y", 1), (0.2, "x", 0)])
def test_two_rounds_by_hand(cost, second, resent):
    scheduler = moody(switching_cost=cost)
    plan, record = one_round(scheduler, ["a"], reward=0.4)
    assert (plan, record.experts_resent) == ({"a": ["x"]}, 1)
    assert record.switching_paid == pytest.approx(cost)
    assert record.objective == pytest.approx(0.6 - cost)
    assert scheduler.held_by("a") == ["x"]
    plan, record = one_round(scheduler, ["a"], reward=0.4)
    assert (plan, record.experts_resent) == ({"a": [second]}, resent)
    assert record.switching_paid == pytest.approx(cost * resent)
    assert record.objective + record.switching_paid == pytest.approx(0.5 if second == "y" else 0.4)


def test_a_client_holds_its_experts_while_it_is_away_and_what_failed_only_if_it_had_it():
    scheduler = Scheduler(3, default_capacity=2, balance=None, usage_weight=0, fitness={"rate": 1.0})
    for client in ("a", "b"):
        scheduler.add_client(client, fitness=[0.9, 0.8, 0.1])
    one_round(scheduler, ["a", "b"], reward=0.5)
    for _ in range(2):
        one_round(scheduler, ["b"])
    assert scheduler.held_by("a") == [0, 1]
    scheduler.add_client("a", fitness=[0.1, 0.8, 0.9])
    _, record = one_round(scheduler, ["a", "b"], failed=["a"])
    assert record.experts_resent == 1  # expert 2, for a
    assert scheduler.held_by("a") == [1]
    scheduler.add_client("a", capacity=0)
    scheduler.plan(["a", "b"])
    scheduler.report("b", {0: (1, 0.5)})
    scheduler.close_round()
    assert scheduler.held_by("a") == [1]
    scheduler.plan(["b"])
    scheduler.close_round()  # b never answers
    assert scheduler.held_by("b") == [0, 1]
    with pytest.raises(InputError, match="there is no client"):
        scheduler.held_by("c")


@pytest.mark.parametrize(("oldest", "counts"), [(0, [0, 0, 0, 0]), (1, [1, 0, 1, 0]), (2, [1, 1, 0, 1])])
def test_copies_that_others_have_changed_count_for_so_many_rounds(oldest, counts):
    """Two clients of one expert: it is sent, goes on from the copy for some rounds, and is sent again."""
    scheduler = Scheduler(1, balance=None, switching_cost=0.1, max_staleness=oldest)
    resent = [one_round(scheduler, ["a", "b"])[1].experts_resent for _ in range(5)]
    assert resent == [2, *(0 if count else 2 for count in counts)]


def test_a_copy_is_the_expert_where_its_client_alone_trained_it():
    scheduler = Scheduler(2, balance=None, usage_weight=0, switching_cost=0.1, max_staleness=0)
    scheduler.add_client("a", fitness=[0.9, 0.1])
    scheduler.add_client("b", fitness=[0.1, 0.9])
    one_round(scheduler, ["a", "b"])
    for _ in range(3):
        assert one_round(scheduler, ["b"])[1].experts_resent == 0
    assert scheduler.held_by("a") == [0]  # nobody has changed it for three rounds
    scheduler.add_client("b", fitness=[0.9, 0.1])
    assert one_round(scheduler, ["b"])[1].experts_resent == 1
    assert (scheduler.held_by("a"), scheduler.held_by("b")) == ([], [0])
    record = one_round(scheduler, ["a", "b"], failed=["a", "b"])[1]
    assert (record.experts_resent, record.switching_paid) == (1, pytest.approx(0.1))
    assert (scheduler.held_by("a"), scheduler.held_by("b")) == ([], [0])


def test_the_cost_is_paid_for_copies_that_are_too_old():
    """What is sent anyway is no reason to stay."""
    plans = {}
    for oldest in (0, None):
        scheduler = moody(switching_cost=0.2, max_staleness=oldest)
        scheduler.add_client("b", fitness=[0.9, 0.0])
        one_round(scheduler, ["a", "b"], reward=0.4)
        plans[oldest] = one_round(scheduler, ["a"], reward=0.4)[0]["a"]
    assert plans == {0: ["y"], None: ["x"]}


@pytest.mark.parametrize("value", [-1, 0.5])
def test_ages_that_are_none_are_refused(value):
    with pytest.raises(InputError, match=f"max_staleness = {value}: must be"):
        Scheduler(2, max_staleness=value)


@pytest.mark.parametrize("oldest", [None, 1])
def test_what_is_held_and_the_cost_survive_the_file(tmp_path, oldest):
    def run(*, stop: bool) -> list:
        scheduler = Scheduler(4, default_capacity=2, switching_cost=[0.3, 0.1, 0, 2], max_staleness=oldest)
        generator = np.random.default_rng(3)
        rounds = [simulate(scheduler, list(range(6)), generator)]
        scheduler.plan(list(range(3, 9)))
        if stop:
            scheduler.save(tmp_path / "state")
            scheduler = Scheduler.load(tmp_path / "state")
        for client, experts in scheduler.assigned().items():
            scheduler.report(client, dict.fromkeys(experts, (5, 0.2)))
        scheduler.close_round()
        rounds += [simulate(scheduler, list(range(9)), generator) for _ in range(3)]
        return [*rounds, frozen(scheduler), [scheduler.held_by(client) for client in range(9)]]

    assert run(stop=True) == run(stop=False)


def test_a_cost_that_dwarfs_all_freezes_the_assignment():
    scheduler, generator = Scheduler(4, default_capacity=2, switching_cost=100.0), np.random.default_rng(0)
    plans = [simulate(scheduler, list(range(8)), generator, drop=0.0) for _ in range(5)]
    assert [one["record"]["experts_resent"] for one in plans] == [16, 0, 0, 0, 0]
    assert all(one["plan"] == plans[0]["plan"] for one in plans)
    free, generator = Scheduler(4, default_capacity=2), np.random.default_rng(0)
    again = [simulate(free, list(range(8)), generator, drop=0.0)["record"]["experts_resent"] for _ in range(5)]
    assert again[0] == 16
    assert sum(again) > 20


@pytest.mark.parametrize("policy", ["scheduler", "balanced", "flex-moe", "greedy", "desirability"])
def test_policies_that_rank_by_scores_take_the_cost(policy):
    rule = make_policy(policy, 2, switching_cost=0.5)
    rule.add_client("a", fitness=[0.5, 0.4])
    one_round(rule, ["a"], reward=0.5)
    rule.add_client("a", fitness=[0.4, 0.5])
    assert one_round(rule, ["a"])[0] == {"a": [0]}


@pytest.mark.parametrize("policy", ["random", "fedamole", "flux", "fedmoe-da"])
def test_policies_that_cannot_heed_it_refuse_it(policy):
    with pytest.raises(InputError, match=rf"switching_cost = 0\.2: policy '{policy}' has switching_cost = 0\.0"):
        make_policy(policy, 2, switching_cost=0.2)


@pytest.mark.parametrize(
    ("cost", "words"),
    [
        (-0.5, r"switching_cost = -0\.5: must be >= 0"),
        ([0.1, -1], r"switching_cost\[1\] = -1\.0: must be >= 0"),
        ([0.1], r"switching_cost: has shape \(1,\), must be \(2,\) \(one per expert\)"),
        ("dear", "switching_cost: holds .* values, not numbers"),
        (float("nan"), "switching_cost = nan: must be a finite number"),
    ],
)
def test_bad_options_are_named(cost, words):
    with pytest.raises(InputError, match=words):
        Scheduler(2, switching_cost=cost)
