"""Modules of the package that run in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys

__all__ = ["start_module"]


def start_module(module: str, *, stdout: int, stderr: int | None) -> subprocess.Popen[bytes]:
    """Start ``python -m module`` with a pipe to its standard input.

    A fresh interpreter, not a fork, which would copy locks that threads of the numerical libraries hold; nor
    "spawn" of `multiprocessing`, which runs the caller's main script again in the child.

    Parameters
    ----------
    module : str
        Its name.
    stdout, stderr : int or None
        As for `subprocess.Popen`.
    """
    # It must find the same modules as this process, installed or not.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=stderr,
        env=environment,
        start_new_session=True,  # Ctrl-C goes to the caller alone; programs that it starts can be ended with it
    )
