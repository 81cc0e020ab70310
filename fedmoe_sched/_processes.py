"""Modules of the package that run in processes of their own: how they start, and how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

__all__ = ["end_with_parent", "kill_session", "start_module"]

_POLL = 0.2  # seconds between looks at the parent


def start_module(
    module: str, *, stdout: int, stderr: int | None, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` with a pipe to its standard input.

    A fresh interpreter, not a fork, which would copy locks that threads of the numerical libraries hold; nor
    "spawn" of `multiprocessing`, which runs the caller's main script again in the child.

    Parameters
    ----------
    module : str
        Its name.
    stdout, stderr : int or None
        As for `subprocess.Popen`.
    environment : mapping, optional
        Environment variables on top of those of this process.
    """
    # It must find the same modules as this process, installed or not.
    modules = {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env={**os.environ, **modules, **(environment or {})},
        start_new_session=True,  # Ctrl-C goes to the caller alone; programs that it starts can be ended with it
    )


def kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a child that `start_module` started, and the programs that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):  # it ended by itself in the meantime
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def end_with_parent(parent: int, *, grace: float) -> None:
    """End this process at once, whatever it is doing, `grace` seconds after its parent has ended.

    Parameters
    ----------
    parent : int
        Process number of the parent.
    grace : float
        Seconds in which the process may still end by itself.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL)
        time.sleep(grace)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()
