"""The backends, one file and one class each; imported as ``fedmoe_sched.solvers``.

``fedmoe_sched.solvers()`` lists them. Python binds the name of a package in its parent when it is first
imported, in the place of the function of that name; so the package can be called too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmoe_sched.registry import SolverEntry

if __name__ != "fedmoe_sched.solvers":
    msg = (
        f"this folder is the package fedmoe_sched.solvers, not {__name__!r}: "
        "import it from fedmoe_sched (install the project, or put its root on sys.path)"
    )
    raise ImportError(msg)


class _Listing(ModuleType):
    def __call__(self) -> list[SolverEntry]:
        """List every backend: see `fedmoe_sched.registry.solvers`."""
        from fedmoe_sched.registry import solvers

        return solvers()


sys.modules[__name__].__class__ = _Listing
