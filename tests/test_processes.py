"""Processes that end with the one that started them."""

from __future__ import annotations

import subprocess
import sys
import time

import psutil

# Deaf to interrupts, as a program is that waits inside its own handler.
CHILD = """
import os, signal, time
from fedmoe_sched._processes import end_with_parent
signal.signal(signal.SIGINT, signal.SIG_IGN)
end_with_parent(os.getppid(), grace=0.1)
print("ready", flush=True)
time.sleep(300)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def is_over(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_child_ends_once_its_parent_was_killed_and_not_before():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        child = psutil.Process(int(parent.stdout.readline()))
        time.sleep(1)  # several looks at the parent
        assert not is_over(child)
    finally:
        parent.kill()
        parent.communicate()
    end = time.monotonic() + 60
    while not is_over(child) and time.monotonic() < end:
        time.sleep(0.1)
    assert is_over(child)
