"""The command line: ``fedmoe-sched``. One module per command; none of them decides anything."""

from __future__ import annotations

from fedmoe_sched.cli._app import app, main

__all__ = ["app", "main"]
