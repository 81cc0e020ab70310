"""Kernels kept on disk are compiled anew when what they call changes, in another file too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

numba = pytest.importorskip("numba")

HEADER = "from fedmoe_sched.solvers._compile import jit, part\n"
FILES = {
    "deepest.py": "@part\ndef deepest(x):\n    return x + 1.0\n",
    "callee.py": "from deepest import deepest\n@part\ndef callee(x):\n    return deepest(x)\n",
    "caller.py": "from callee import callee\n@jit\ndef caller(x):\n    return callee(x)\n",
    "steady.py": "@jit\ndef steady(x):\n    return x\n",
}
RUN = """
from caller import caller
from steady import steady
hits = [sum(kernel.stats.cache_hits.values()) for kernel in (caller, steady) if kernel(1.0)]
print(caller(1.0), *hits)
"""


def write(folder: Path, **changed: str) -> None:
    for name, text in FILES.items():
        (folder / name).write_text(HEADER + text)
    for name, text in changed.items():
        (folder / f"{name}.py").write_text(HEADER + text)


def run(folder: Path, cache: Path) -> list[float]:
    """Result of the caller, and how many kernels of the caller and of the steady file came from disk."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NUMBA_")}
    environment |= {"HOME": str(cache), "XDG_CACHE_HOME": str(cache), "LOCALAPPDATA": str(cache)}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.mark.parametrize("writable", [True, False])
def test_a_kernel_follows_the_files_it_is_made_of(tmp_path: Path, writable: bool):
    if not writable:  # not by permissions, which root ignores; Numba then takes the user's folder
        (tmp_path / "__pycache__").touch()
    home = tmp_path / "home"
    write(tmp_path)
    assert run(tmp_path, home) == [2.0, 0, 0]
    write(tmp_path, deepest="@part\ndef deepest(x):\n    return x + 2.0\n")  # as long as before
    assert run(tmp_path, home) == [3.0, 0, 1]
    assert home.exists() != writable


def test_a_part_is_compiled_once_for_a_number_that_starts_as_a_constant():
    from fedmoe_sched.solvers._compile import part

    @part
    def callee(x, count):
        return x + count

    @numba.njit
    def caller(x):
        count = 0
        while count < x:
            x = callee(x, count) - 2
            count += 1
        return x

    assert caller(5.0) == 2.0  # 5 + 0 - 2, then 3 + 1 - 2
    assert [str(one) for one in callee.signatures] == ["(float64, int64)"]


def test_kernels_run_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch):
    from numba.core.caching import CacheImpl

    from fedmoe_sched.solvers._compile import jit

    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(lambda x: x)
    kernel = jit(lambda x: x + 1.0)
    assert kernel(1.0) == 2.0
    assert kernel.stats.cache_path is None
