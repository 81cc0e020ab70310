"""What importing the package loads, and what it must not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = (
    "torch",
    "ortools",
    "pulp",
    "networkx",
    "matplotlib",
    "scipy.sparse",
    "typer",
    "pydantic",
    "pandas",
    "flwr",
)


def python(code: str, *, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=cwd)


# Lists the modules that the package itself brings in: a test run may have put others there at start-up.
LOADED = """
import sys
sys.path[:0] = {path!r}
before = set(sys.modules)
{code}
print(*sorted(set(sys.modules) - before))
"""


def loaded_by(code: str) -> set[str]:
    run = python(LOADED.format(path=sys.path, code=code))
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_import_loads_no_engine():
    loaded = loaded_by("import fedmoe_sched")
    assert "fedmoe_sched.schedule" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_listing_the_backends_loads_no_engine():
    loaded = loaded_by("import fedmoe_sched; fedmoe_sched.solvers()")
    assert "fedmoe_sched.solvers.ilp_pulp" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_check_can_fail():
    assert "networkx" in loaded_by("import fedmoe_sched, networkx")


def test_bare_import_of_the_backends_folder_is_refused():
    if not (ROOT / "solvers").is_dir():
        pytest.skip("runs in a source tree only")
    run = python("import solvers", cwd=ROOT)
    assert run.returncode != 0
    assert "ImportError: this folder is the package fedmoe_sched.solvers, not 'solvers'" in run.stderr


def test_backends_are_listed_however_often_one_asks():
    """Loading a backend binds the package of that name in the place of the function."""
    code = "import fedmoe_sched as f; a = f.solvers(); b = f.solvers(); from fedmoe_sched import solvers as s"
    code += "; assert a == b == s(); import fedmoe_sched.solvers.greedy as g; g.Greedy"
    assert "fedmoe_sched.solvers.greedy" in loaded_by(code)


def test_public_names_exist():
    import fedmoe_sched

    assert len(set(fedmoe_sched.__all__)) == len(fedmoe_sched.__all__)
    for name in fedmoe_sched.__all__:
        assert getattr(fedmoe_sched, name) is not None


def test_the_flower_package_imports_no_engine_and_reading_its_settings_no_flwr():
    pytest.importorskip("pydantic")
    loaded = loaded_by("import fedmoe_sched.flower, fedmoe_sched.flower.settings")
    assert "fedmoe_sched.flower.settings" in loaded
    assert loaded.isdisjoint({"flwr", "ray", "torch"})
