"""Child processes: what they find, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys

__all__ = ["child_environment", "kill_session"]


def child_environment() -> dict[str, str]:
    """Return an environment in which a Python child finds the same modules as this process, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a child that was started with ``start_new_session``, and the programs that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # it ended by itself in the meantime
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
