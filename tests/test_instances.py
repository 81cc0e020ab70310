"""Generated instances and problem files."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import brute_force

from fedmoe_sched import AssignmentProblem, Capability, InputError, LoadPenalty, Status, solve, solvers
from fedmoe_sched._layers import layers_interact
from fedmoe_sched.instances import (
    FAMILIES,
    budgets,
    clustered,
    generate,
    integers,
    layered,
    load_problem,
    save_problem,
    soft,
    tied,
    uniform,
)
from fedmoe_sched.problem_files import read_score_table


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_same_seed_same_problem(self, family):
        one, two, other = (generate(family, 40, 6, seed=seed) for seed in (3, 3, 4))
        np.testing.assert_array_equal(one.desirability, two.desirability)
        np.testing.assert_array_equal(one.capacity, two.capacity)
        assert not np.array_equal(one.desirability, other.desirability)

    def test_bounds_are_the_documented_ones(self, family):
        if family in {"layered", "budgets"}:
            pytest.skip("has bounds of its own")
        problem = generate(family, 200, 7, seed=1)
        total = problem.capacity.sum()
        assert set(np.unique(problem.capacity)) == {1, 2, 3, 4}
        if family == "soft":
            assert not problem.has_load_bounds
            return
        assert set(problem.load_min) == {int(np.floor(0.5 * total / 7))}
        assert set(problem.load_max) == {int(np.ceil(1.1 * total / 7 - 1e-9))}

    @pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (30, 3)])
    def test_is_feasible_at_any_size(self, family, shape):
        problem = generate(family, *shape)
        assert (problem.capacity <= shape[1]).all()
        backend = "milp-scipy" if problem.budgets else "flow-ortools"
        assert solve(problem, backend).status is Status.OPTIMAL


class TestFamilies:
    def test_clustered_stays_contended_and_uniform_does_not(self):
        def crowding(problem):
            best = np.argmax(problem.desirability, axis=1)
            return np.bincount(best, minlength=problem.n_experts).max() / problem.n_clients * problem.n_experts

        assert crowding(uniform(5000, 16)) < 1.2
        assert crowding(clustered(5000, 16)) > 3

    def test_clustered_has_the_documented_mean(self):
        # A score is at most quality times the mix; the noise averages out.
        scores = clustered(4000, 20, seed=5).desirability
        assert -0.3 < scores.min() < 0
        assert 0.05 < scores.mean() < 0.2

    def test_tied_is_clustered_rounded(self):
        plain, rounded = clustered(50, 5, seed=2), tied(50, 5, seed=2)
        assert np.abs(plain.desirability - rounded.desirability).max() <= 0.025 + 1e-12
        np.testing.assert_allclose(np.rint(rounded.desirability / 0.05) * 0.05, rounded.desirability)
        assert len(np.unique(rounded.desirability)) < 100 < len(np.unique(plain.desirability))

    def test_layered_has_the_documented_bounds(self):
        problem = layered(300, 18, seed=1)
        assert problem.layers.n_layers == 4
        assert np.bincount(problem.layers.layer_of).tolist() == [5, 4, 5, 4]
        assert (problem.layers.layer_min == 1).all()
        assert (problem.layers.layer_max == 2).all()
        assert set(np.unique(problem.capacity)) == {4, 5, 6, 7, 8}
        places = problem.capacity.sum() / 4
        for layer, experts in enumerate(problem.layers.members):
            mean = places / len(experts)
            assert set(problem.load_min[experts]) == {int(np.floor(0.5 * mean))}, layer
            assert set(problem.load_max[experts]) == {int(np.ceil(1.1 * mean))}, layer
        plain = clustered(300, 18, seed=1)
        np.testing.assert_array_equal(problem.desirability, plain.desirability)
        assert layers_interact(problem)

    def test_integers_are_0_to_5(self):
        assert set(np.unique(integers(100, 4).desirability)) == {0, 1, 2, 3, 4, 5}

    def test_soft_is_clustered_balanced_by_its_penalty(self):
        problem = soft(300, 6, seed=3)
        np.testing.assert_array_equal(problem.desirability, clustered(300, 6, seed=3).desirability)
        mean = problem.capacity.sum() / 6
        # The first client costs w (h + 1/2), each further one w more.
        np.testing.assert_allclose(problem.load_penalty.slope, 0.5 / mean)
        history = problem.load_penalty.value / problem.load_penalty.slope - 0.5
        assert ((history >= -1e-9) & (history < mean)).all()
        crowded = solve(problem.replace(load_penalty=None)).loads
        level = solve(problem).loads + history
        assert level.std() < 0.5 * (crowded + history).std()
        assert level.std() > 1  # scores still count

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("clusterd", 3, 3), "family = 'clusterd': must be one of clustered"),
            ((None, 3, 3), "family = None"),
            (("uniform", 0, 3), "n_clients = 0: must be a whole number >= 1"),
            (("uniform", 3, 2.5), "n_experts = 2.5"),
        ],
    )
    def test_bad_arguments_are_named(self, arguments, message):
        with pytest.raises(InputError, match=message):
            generate(*arguments)

    def test_a_negative_seed_is_named(self):
        with pytest.raises(InputError, match="seed = -1"):
            generate("uniform", 3, 3, seed=-1)


class TestBudgets:
    def test_has_the_documented_parts(self):
        problem = budgets(4000, 12, seed=3)
        plain = clustered(4000, 12, seed=3)
        np.testing.assert_array_equal(problem.desirability, plain.desirability)
        np.testing.assert_array_equal(problem.capacity, plain.capacity)
        memory, seconds, upload = problem.budgets
        assert [resource.name for resource in problem.budgets] == ["memory", "seconds", "upload"]
        # Adam holds four numbers per parameter: 5 % of 2 to 12 GB against 4 x 20 MB x the weight of the expert.
        np.testing.assert_allclose(np.unique(memory.budget), [1e8, 1.5e8, 2e8, 3e8, 4e8, 6e8])
        np.testing.assert_allclose(memory.size, 4 * upload.size)
        assert len(np.unique(upload.size)) == 12
        assert 1e7 < np.median(upload.size) < 4e7
        assert np.median(upload.budget) == pytest.approx(50e6, rel=0.05)
        assert np.log(upload.budget).std() == pytest.approx(0.5, rel=0.05)
        assert (seconds.budget == 600).all()
        # 3 x 500 samples of 63 ms, and 160 Mbit down and up; the median of a sum is above the sum of the medians.
        per_weight = np.median(seconds.size, axis=0) / (upload.size / 20e6)
        assert 1 < np.median(per_weight) / (1.5 * 63 + 160 * (1 / 4.3 + 1 / 3.3)) < 1.3

    def test_no_load_is_far_above_the_mean_and_large_experts_need_fewer_clients(self):
        problem = budgets(2000, 12, seed=4)
        [most] = set(problem.load_max)
        least = problem.load_min.max()
        assert most == pytest.approx(2.2 * least, abs=2)
        assert most * 12 < 1.1 * problem.capacity.sum()
        size = problem.budgets[2].size
        low = problem.load_min < least
        assert 0 < low.sum() < 6
        assert size[low].min() > np.median(size)

    @pytest.mark.parametrize("seed", range(2))
    def test_every_resource_binds(self, seed):
        problem = budgets(100, 8, seed=seed)
        best = solve(problem, "milp-scipy").objective
        for resource in problem.budgets:
            others = [other for other in problem.budgets if other is not resource]
            assert solve(problem.replace(budgets=others), "milp-scipy").objective > 1.02 * best, resource
        assert solve(problem.replace(load_min=0, load_max=None), "milp-scipy").objective > 1.02 * best

    @pytest.mark.parametrize("seed", range(3))
    def test_all_backends_that_take_budgets_agree(self, seed):
        problem = budgets(24, 5, seed=seed)
        takes = [entry.name for entry in solvers() if Capability.BUDGETS in entry.capabilities]
        assert len(takes) == 5
        found = {name: solve(problem, name) for name in takes}
        for schedule in found.values():
            assert schedule.status is Status.OPTIMAL
            assert not schedule.violations
            assert schedule.objective == pytest.approx(found["milp-scipy"].objective, rel=1e-9)
            assert schedule.bound >= schedule.objective - 1e-9

    @given(n=st.integers(1, 5), m=st.integers(1, 4), seed=st.integers(0, 2**20))
    def test_the_optimum_of_tiny_ones_is_that_of_brute_force(self, n, m, seed):
        problem = budgets(n, m, seed=seed)
        best = brute_force(problem)
        assert best is not None
        assert solve(problem, "milp-scipy").objective == pytest.approx(best, rel=1e-9, abs=1e-9)

    @given(n=st.integers(1, 80), m=st.integers(1, 12), seed=st.integers(0, 2**20))
    def test_is_feasible_for_every_size_and_seed(self, n, m, seed):
        problem = budgets(n, m, seed=seed)
        any_will_do = problem.replace(desirability=np.zeros(problem.shape))
        assert not solve(any_will_do, "milp-scipy").violations
        assert (problem.load_min <= problem.load_max).all()


def some_problem():
    return AssignmentProblem(
        np.arange(6, dtype=np.float32).reshape(3, 2),
        [1, 2, 1],
        min_experts=[0, 1, 0],
        load_min=1,
        load_max=[2, 3],
        eligible=[[1, 1], [1, 1], [0, 1]],
        client_labels=["1", 1, "äb"],
        expert_labels=["vision", "text"],
    )


class TestProblemFiles:
    def test_round_trip_keeps_everything(self, tmp_path):
        problem = some_problem()
        save_problem(problem, tmp_path / "problem.npz")
        back = load_problem(tmp_path / "problem.npz")
        for name in ("desirability", "capacity", "min_experts", "load_min", "load_max", "eligible"):
            np.testing.assert_array_equal(getattr(back, name), getattr(problem, name))
        assert back.desirability.dtype == np.float32
        assert (back.client_labels, back.expert_labels) == (("1", 1, "äb"), ("vision", "text"))
        assert list(tmp_path.iterdir()) == [tmp_path / "problem.npz"]

    def test_round_trip_keeps_the_load_penalty(self, tmp_path):
        penalty = LoadPenalty.from_marginals([[0.0, 0.5, 0.5], [0.1, 0.2, 0.3]])
        save_problem(some_problem().replace(load_penalty=penalty), tmp_path / "p.npz")
        back = load_problem(tmp_path / "p.npz").load_penalty
        for name in ("indptr", "start", "value", "slope"):
            array = getattr(back, name)
            np.testing.assert_array_equal(array, getattr(penalty, name))
            assert array.dtype == getattr(penalty, name).dtype

    def test_round_trip_without_optional_parts(self, tmp_path):
        save_problem(uniform(4, 3), tmp_path / "p.npz")
        back = load_problem(tmp_path / "p.npz")
        assert back.eligible is None
        assert back.client_labels is None
        assert back.load_penalty is None

    def test_label_arrays_of_numpy_are_read(self, tmp_path):
        np.savez(tmp_path / "p.npz", desirability=np.eye(2), capacity=[1, 1], client_labels=np.array(["a", "b"]))
        assert load_problem(tmp_path / "p.npz").client_labels == ("a", "b")

    def test_a_failed_save_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "p.npz"
        save_problem(uniform(4, 3), path)
        before = path.read_bytes()
        bad = AssignmentProblem(np.eye(2), 1, client_labels=[("a", 1), ("b", 2)])
        with pytest.raises(InputError, match=r"client_labels\[0\] = \('a', 1\): only text and whole numbers"):
            save_problem(bad, path)
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]

    def test_every_truncation_is_an_input_error(self, tmp_path):
        path = tmp_path / "p.npz"
        save_problem(some_problem(), path)
        whole = path.read_bytes()
        for size in range(0, len(whole), 37):
            path.write_bytes(whole[:size])
            with pytest.raises(InputError, match=r"p\.npz: not a complete \.npz file"):
                load_problem(path)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"capacity": [1]}, "has no array called 'desirability'; it has capacity"),
            ({"desirability": [[1.0]], "capacity": [1], "cpacity": [2]}, "array 'cpacity' is not known"),
            ({"desirability": [[1.0]], "capacity": [-1]}, r"p\.npz: capacity\[0\] = -1: must be >= 0"),
            (
                {"desirability": [[1.0]], "capacity": [1], "load_penalty_start": [1]},
                "has no array called 'load_penalty_indptr'",
            ),
            (
                {
                    "desirability": [[1.0]],
                    "capacity": [1],
                    "load_penalty_indptr": [0, 1],
                    "load_penalty_start": [2],
                    "load_penalty_value": [0.0],
                    "load_penalty_slope": [0.0],
                },
                r"p\.npz: start\[0\] = 2: must be 1",
            ),
            ({"desirability": [[1.0]], "capacity": [1], "client_labels": "{"}, "client_labels: must be a list"),
            ({"desirability": [[1.0]], "capacity": [1], "client_labels": [0.5]}, "client_labels: must be a list"),
        ],
    )
    def test_wrong_contents_are_named(self, tmp_path, arrays, message):
        np.savez(tmp_path / "p.npz", **{name: np.asarray(value) for name, value in arrays.items()})
        with pytest.raises(InputError, match=message):
            load_problem(tmp_path / "p.npz")

    def test_bare_and_pickled_arrays_are_refused(self, tmp_path):
        with (tmp_path / "bare.npz").open("wb") as file:
            np.save(file, np.eye(3))
        np.savez(tmp_path / "object.npz", desirability=np.array([{"a": 1}], dtype=object), capacity=[1])
        for name in ("bare.npz", "object.npz"):
            with pytest.raises(InputError, match=rf"{name}: not a complete"):
                load_problem(tmp_path / name)

    def test_a_missing_file_is_an_os_error(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            load_problem(tmp_path / "none.npz")


class TestScoreTables:
    def read(self, tmp_path, text):
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        return read_score_table(tmp_path / "t.csv")

    def test_labels_capacity_and_empty_cells(self, tmp_path):
        table = self.read(tmp_path, "client, a ,capacity,b\nx,0.5,2,\n\ny,-1,1,1e-3\n")
        np.testing.assert_array_equal(table.scores, [[0.5, 0.0], [-1.0, 1e-3]])
        np.testing.assert_array_equal(table.eligible, [[True, False], [True, True]])
        np.testing.assert_array_equal(table.capacity, [2, 1])
        assert (table.clients, table.experts) == (("x", "y"), ("a", "b"))

    def test_without_capacity_and_empty_cells(self, tmp_path):
        table = self.read(tmp_path, "client,a\nx,1\n")
        assert table.eligible is None
        assert table.capacity is None

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "needs a header"),
            ("client,a\n", "at least one client row"),
            ("client\nx\n", "needs a header"),
            ("client,a,b\nx,1\n", "line 2: has 2 cells, the header has 3"),
            ("client,a\nx,1\n\ny,one\n", "line 4, column 'a': 'one' is not a finite number"),
            ("client,a\nx,nan\n", "line 2, column 'a': 'nan' is not"),
            ("client,a\nx,inf\n", "line 2, column 'a': 'inf' is not"),
            ("client,a,capacity\nx,1,\n", "line 2, column 'capacity': is empty"),
            ("client,capacity\nx,1\n", "at least one expert column"),
            ("client,a,capacity,capacity\nx,1,1,1\n", "at most one called 'capacity'"),
        ],
    )
    def test_wrong_tables_name_line_and_column(self, tmp_path, text, message):
        with pytest.raises(InputError, match=message):
            self.read(tmp_path, text)

    def test_binary_is_refused(self, tmp_path):
        (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(InputError, match="not comma-separated text"):
            read_score_table(tmp_path / "t.csv")
