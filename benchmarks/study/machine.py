"""Where and with what a study was run."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fedmoe_sched
from benchmarks.study.plan import THREADED, Plan

__all__ = ["describe", "read_description", "write_description"]

_PACKAGES = ("numpy", "scipy", "numba", "ortools", "networkx", "pulp", "pylmcf", "POT")
_CPU_FILE = Path("/proc/cpuinfo")


def describe(plan: Plan, seed: int) -> dict[str, Any]:
    """Return the machine, the versions and the settings of a study as plain values."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "memory_gib": _memory_gib(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
        },
        "versions": {"fedmoe_sched": fedmoe_sched.__version__} | {name: _version(name) for name in _PACKAGES},
        "settings": dataclasses.asdict(plan) | {"seed": seed, "solver_with_threads": THREADED},
        "seconds": 0.0,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = _CPU_FILE.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def write_description(path: Path, description: dict[str, Any]) -> None:
    """Write a description as JSON."""
    path.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def read_description(path: Path) -> dict[str, Any] | None:
    """Read a description; None where there is none."""
    if not path.exists():
        return None
    description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return description
