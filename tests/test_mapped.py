"""Scores in files: the answers are those of scores in memory, and memory stays small."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from oracle import clustered

from fedmoe_sched import AssignmentProblem, InputError, certify, dual_bound, solve
from fedmoe_sched._mapped import release_rows

# What the kernel counts as resident is read from here; other systems have no such file.
STATUS = Path("/proc/self/status")


def resident_file_bytes():
    """Bytes of files that this process has mapped and touched."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def mapped(path, array, mode="r"):
    np.save(path, array)
    return np.load(path, mmap_mode=mode)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("fedmoe_sched._arrays._BLOCK_CELLS", 512)


@pytest.mark.skipif(not STATUS.exists(), reason=f"needs {STATUS}")
@pytest.mark.parametrize("view", ["map", "array", "read-only", "rows", "backwards", "columns", "column-major"])
def test_touched_rows_leave_memory(tmp_path, view):
    size = 32 << 20
    values = np.ones((size // 256, 64), dtype=np.float32)
    matrix = mapped(tmp_path / "scores.npy", np.asfortranarray(values) if view == "column-major" else values)
    if view != "map":
        matrix = np.asarray(matrix)
    if view == "read-only":
        matrix = matrix.view()
    matrix = {"rows": matrix[100:], "backwards": matrix[::-1], "columns": matrix[:, 5:9]}.get(view, matrix)
    before = resident_file_bytes()
    total = float(matrix.sum(dtype=np.float64))
    assert resident_file_bytes() - before > size // 2
    release_rows(matrix, 0, len(matrix))
    assert resident_file_bytes() - before < size // 16
    assert float(matrix.sum(dtype=np.float64)) == total


@pytest.mark.skipif(not STATUS.exists(), reason=f"needs {STATUS}")
def test_only_the_rows_asked_for_leave_memory(tmp_path):
    matrix = mapped(tmp_path / "scores.npy", np.ones((1 << 17, 64), dtype=np.float32))
    before = resident_file_bytes()
    assert matrix.sum() > 0
    release_rows(matrix, 0, 1 << 16)
    left = resident_file_bytes() - before
    assert 14 << 20 < left < 18 << 20


def test_what_was_written_survives(tmp_path):
    """A copy-on-write map keeps what was written in its pages alone; the file of the others has it."""
    for mode in ("c", "r+"):
        matrix = mapped(tmp_path / f"{mode}.npy", np.zeros((4096, 64)), mode)
        matrix[:] = 7.0
        release_rows(matrix, 0, len(matrix))
        release_rows(np.asarray(matrix)[10:], 0, 100)
        assert (matrix == 7.0).all()
    assert (np.load(tmp_path / "r+.npy") == 7.0).all()
    assert (np.load(tmp_path / "c.npy") == 0.0).all()


@pytest.mark.parametrize(
    "array",
    [np.ones((8, 4)), np.ones((8, 4))[::2, 1:], np.frombuffer(bytes(64), dtype=np.float32).reshape(4, 4), None],
    ids=["owner", "view", "bytes", "none"],
)
def test_arrays_in_memory_are_left_alone(array):
    before = None if array is None else array.copy()
    release_rows(array, 0, 4)
    np.testing.assert_array_equal(array, before)


def test_threads_may_release_what_others_read(tmp_path):
    matrix = mapped(tmp_path / "scores.npy", np.arange(1 << 16, dtype=np.float32).reshape(-1, 16))
    total, stop = float(matrix.sum(dtype=np.float64)), threading.Event()

    def release():
        while not stop.is_set():
            release_rows(matrix, 0, len(matrix))

    with ThreadPoolExecutor(3) as pool:
        releasing = [pool.submit(release) for _ in range(2)]
        sums = {float(matrix.sum(dtype=np.float64)) for _ in range(200)}
        stop.set()
    assert [future.result() for future in releasing] == [None, None]
    assert sums == {total}


def in_memory_and_mapped(tmp_path, dtype, **changes):
    """Return one problem twice; the second has its matrices in files."""
    made = clustered(300, 8, seed=1, eligible_share=0.8, low=0.2, high=1.5)
    scores = made.desirability.astype(dtype)
    inside = made.replace(desirability=scores, **changes)
    outside = made.replace(
        desirability=mapped(tmp_path / "scores.npy", scores),
        eligible=mapped(tmp_path / "eligible.npy", made.eligible),
        **changes,
    )
    return inside, outside


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_maps_are_kept_as_they_are(tmp_path, dtype):
    _, problem = in_memory_and_mapped(tmp_path, dtype)
    assert problem.desirability.dtype == dtype
    for array in (problem.desirability, problem.eligible):
        assert any(isinstance(base, np.memmap) for base in (array.base, array.base.base))
        assert not array.flags.writeable
    again = problem.replace(load_min=0)
    assert np.shares_memory(again.desirability, problem.desirability)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("solver", ["exact", "greedy", "random", "greedy-global", "flow-ortools", "lp-scipy"])
def test_mapped_scores_give_the_same_answer(tmp_path, dtype, solver):
    inside, outside = in_memory_and_mapped(tmp_path, dtype)
    one, two = solve(inside, solver), solve(outside, solver)
    assert one.pairs is not None
    np.testing.assert_array_equal(one.pairs.mask(), two.pairs.mask())
    np.testing.assert_array_equal(one.prices, two.prices)
    assert one.certificate == two.certificate
    assert one.certificate == certify(outside, one.pairs, one.prices)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_not_finite_is_found_in_any_block(tmp_path, dtype, bad):
    scores = np.ones((1000, 4), dtype=dtype)
    scores[700, 2] = bad
    for given in (scores, mapped(tmp_path / "scores.npy", scores)):
        with pytest.raises(InputError, match=rf"desirability\[700, 2\] = {bad}: must be finite"):
            AssignmentProblem(given, 1)


@pytest.mark.usefixtures("small_blocks")
def test_other_faults_are_named_by_their_place_in_the_whole():
    scores = np.ones((1000, 4))
    eligible = np.ones((1000, 4), dtype=np.int8)
    eligible[900, 3] = 2
    with pytest.raises(InputError, match=r"eligible\[900, 3\] = 2"):
        AssignmentProblem(scores, 1, eligible=eligible)
    capacity = np.ones(1000, dtype=np.int64)
    capacity[999] = -5
    with pytest.raises(InputError, match=r"capacity\[999\] = -5"):
        AssignmentProblem(scores, capacity)


# Runs in a process of its own, whose peak is its own; prints that peak before and after, in kilobytes.
CERTIFIES = """
    import sys
    import numpy as np
    from fedmoe_sched import AssignmentProblem, Schedule, Status, StopReason, certify
    from fedmoe_sched.assignment import Assignment

    def peak():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

    before = peak()
    scores = np.load(sys.argv[1], mmap_mode="r")
    n, m = scores.shape
    problem = AssignmentProblem(scores, 2, min_experts=2, load_max=n)
    experts = np.stack([np.arange(n) % 7, 8 + np.arange(n) % 5], axis=1).ravel()
    pairs = Assignment(np.arange(0, 2 * n + 1, 2), experts, m)
    if len(sys.argv) > 2:
        total = problem.desirability.sum()  # touches every page and hands none back
    proof = certify(problem, pairs, np.zeros(m))
    assert proof.feasible and proof.bound > proof.objective
    print(peak() - before)
"""


@pytest.mark.skipif(not STATUS.exists(), reason=f"needs {STATUS}")
def test_a_large_map_is_certified_in_little_memory(tmp_path):
    path = tmp_path / "scores.npy"
    shape = (800_000, 64)  # 205 MB
    scores = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
    scores[:] = np.arange(64, dtype=np.float32)
    del scores

    def peak_bytes(*arguments):
        command = [sys.executable, "-c", textwrap.dedent(CERTIFIES), str(path), *arguments]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout) * 1024

    size = path.stat().st_size
    assert peak_bytes() < 0.5 * size
    assert peak_bytes("touch") > 0.9 * size  # the measurement can tell


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_bound_does_not_depend_on_the_number_of_threads(monkeypatch, dtype):
    problem = clustered(900, 8, seed=2, fill=False, eligible_share=0.7, low=0.1, high=2)
    problem = problem.replace(desirability=problem.desirability.astype(dtype))
    prices = np.linspace(-0.2, 0.4, 8)
    bounds = set()
    for threads in (1, 2, 5):
        monkeypatch.setattr(sys.modules["fedmoe_sched.certify"], "_processors", lambda threads=threads: threads)
        bounds.add(dual_bound(problem, prices))
    assert len(bounds) == 1
    reduced = problem.desirability.astype(np.float64) - prices
    reduced[~problem.eligible] = -np.inf
    plain = float((problem.load_max * np.maximum(prices, 0) - problem.load_min * np.maximum(-prices, 0)).sum())
    for row, most in zip(-np.sort(-reduced, axis=1), problem.capacity, strict=True):
        plain += row[:most][row[:most] > 0].sum()
    assert bounds.pop() == pytest.approx(plain, rel=1e-13)


def test_counts_are_copied_unless_nobody_can_write_to_them():
    capacity = np.array([1, 2, 3], dtype=np.int64)
    problem = AssignmentProblem(np.zeros((3, 2)), capacity)
    capacity[0] = 9
    assert problem.capacity.tolist() == [1, 2, 3]
    frozen = capacity.view()
    frozen.flags.writeable = False
    later = problem.replace(capacity=frozen)
    capacity[0] = 7
    assert later.capacity.tolist() == [9, 2, 3]
    again = problem.replace(min_experts=problem.slots)
    assert np.shares_memory(again.capacity, problem.capacity)
    for array in (again.capacity, again.min_experts, again.slots, again.eligible_counts):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
