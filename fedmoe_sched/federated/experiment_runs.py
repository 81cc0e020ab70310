"""Running an experiment: each run in a process of its own, finished ones skipped, begun ones resumed; no torch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedmoe_sched._files import locked_folder
from fedmoe_sched._processes import kill_session, start_module
from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.experiment import PlannedRun
from fedmoe_sched.federated.runs import RunFolder
from fedmoe_sched.policies import POLICIES

__all__ = ["Event", "error_of", "finished_rounds", "refuse_missing_data", "refuse_other_settings", "run_all"]

_WORKER = "fedmoe_sched.federated._experiment_worker"
_ERROR_FILE = "error.txt"


@dataclass(frozen=True)
class Event:
    """What happened to a run.

    Parameters
    ----------
    plan : PlannedRun
    kind : {"skipped", "started", "round", "finished", "failed"}
    round : int
        Finished rounds.
    accuracy : float or None
        After that round, where it has just ended.
    message : str
        Why it failed.
    """

    plan: PlannedRun
    kind: Literal["skipped", "started", "round", "finished", "failed"]
    round: int
    accuracy: float | None = None
    message: str = ""


def finished_rounds(folder: Path) -> int:
    """Return the number of rounds on record in a run folder; 0 where there is none."""
    file = RunFolder(folder).metrics_file
    return file.read_bytes().count(b"\n") if file.exists() else 0


def error_of(folder: Path) -> str:
    """Return why a run failed when it was last tried, in one line; empty where it did not."""
    file = folder / _ERROR_FILE
    if not file.exists():
        return ""
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def refuse_other_settings(plans: Sequence[PlannedRun], output: Path) -> None:
    """Refuse run folders that hold a run with other settings than planned.

    Raises
    ------
    InputError
        Names the first such folder and the setting that differs.
    """
    for plan in plans:
        file = RunFolder(output / plan.folder).config_file
        if file.exists():
            plan.config.refuse_to_continue(file)


def refuse_missing_data(plans: Iterable[PlannedRun], output: Path) -> None:
    """Read the data sets of the runs that are still to be made: what is missing is better told once, and now.

    Parameters
    ----------
    plans : iterable of PlannedRun
    output : Path
        Folder of the experiment.

    Raises
    ------
    DataFileError
        A file is missing, truncated or corrupted.
    """
    from fedmoe_sched.federated.data import load_dataset

    ahead = [plan for plan in plans if finished_rounds(output / plan.folder) < plan.config.rounds]
    for name, folder, download in dict.fromkeys(
        (plan.config.data.name, plan.config.data.dir, plan.config.data.download) for plan in ahead
    ):
        load_dataset(name, folder, download=download)


def run_all(
    plans: Sequence[PlannedRun], output: Path, *, jobs: int = 2, on_event: Callable[[Event], None] | None = None
) -> None:
    """Make the planned runs, each in a process of its own.

    A run with all its rounds is skipped, one that was begun goes on, and one that fails leaves its error in its
    folder while the others go on; it is tried again the next time. If this process is interrupted, or killed, the
    processes that it started end too.

    Parameters
    ----------
    plans : sequence of PlannedRun
    output : Path
        Folder of the experiment.
    jobs : int
        Processes at the same time.
    on_event : callable, optional
        Called with every `Event`, one at a time, from other threads.

    Raises
    ------
    InputError
        `jobs` is below 1, another command is making runs in `output`, or a run folder holds a run with other
        settings; nothing was started then.
    """
    if jobs < 1:
        msg = f"jobs = {jobs}: must be >= 1"
        raise InputError(msg)
    refuse_other_settings(plans, output)
    children = _Children(output, on_event or (lambda _: None))
    with locked_folder(output, "output folder"), ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(children.run, plan) for plan in plans]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            children.stop()
            raise


class _Children:
    """The processes of one experiment."""

    def __init__(self, output: Path, on_event: Callable[[Event], None]) -> None:
        self._output, self._on_event = output, on_event
        self._lock, self._event_lock = threading.Lock(), threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def stop(self) -> None:
        """End all of them, and start no other."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                if process.poll() is None:
                    kill_session(process)

    def run(self, plan: PlannedRun) -> None:
        """Make one run, unless it is there."""
        folder = self._output / plan.folder
        rounds = finished_rounds(folder)
        if rounds >= plan.config.rounds:
            self._tell(Event(plan, "skipped", plan.config.rounds))
            return
        folder.mkdir(parents=True, exist_ok=True)
        errors = folder / _ERROR_FILE
        with errors.open("wb") as stream:
            process = self._start(plan, stream.fileno())
        if process is None:
            errors.unlink()
            return
        self._tell(Event(plan, "started", rounds))
        code = self._follow(plan, process)
        if code == 0 or self._stopped:
            errors.unlink(missing_ok=True)
        elif not error_of(folder):
            errors.write_text(f"ended by signal {-code}" if code < 0 else f"ended with exit status {code}")
        if self._stopped:
            return
        kind: Literal["finished", "failed"] = "finished" if code == 0 else "failed"
        self._tell(Event(plan, kind, finished_rounds(folder), message=error_of(folder)))

    def _tell(self, event: Event) -> None:
        with self._event_lock:
            self._on_event(event)

    def _start(self, plan: PlannedRun, errors: int) -> subprocess.Popen[bytes] | None:
        """Start the process of a run; None if all have been told to stop."""
        request = {
            "config": plan.config.to_dict(),
            "folder": os.fspath(self._output / plan.folder),
            "policies": POLICIES,
        }
        with self._lock:
            if self._stopped:
                return None
            threads = {"OMP_NUM_THREADS": str(plan.config.threads)}
            process = start_module(_WORKER, stdout=subprocess.PIPE, stderr=errors, environment=threads)
            self._running.add(process)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died at once: its exit status says so
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        return process

    def _follow(self, plan: PlannedRun, process: subprocess.Popen[bytes]) -> int:
        """Pass on what a process tells until it ends; return its exit status."""
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            for line in process.stdout:
                record = json.loads(line)
                self._tell(Event(plan, "round", record["round"], record["accuracy"]))
            return process.wait()
        except BaseException:
            kill_session(process)
            process.wait()
            raise
        finally:
            with self._lock:
                self._running.discard(process)
            for stream in (process.stdout, process.stdin):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
