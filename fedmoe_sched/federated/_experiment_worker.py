"""One run of an experiment in a process of its own.

Run as ``python -m fedmoe_sched.federated._experiment_worker``. The request comes in as one line of JSON on
standard input, which the parent then holds open: when it closes, the parent is gone, and so is this process.
Number and accuracy of every round go out as one line of JSON on standard output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

from fedmoe_sched.errors import InputError, MissingDependencyError, NoAssignmentError, StateFileError
from fedmoe_sched.federated import TrainConfig, run_training
from fedmoe_sched.policies import POLICIES

__all__: list[str] = []


def _main() -> None:
    # Whatever an engine prints must not get between the records.
    records = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    POLICIES.update(request["policies"])  # the parent may have registered its own

    def show(record: dict[str, Any]) -> None:
        records.write(json.dumps({key: record[key] for key in ("round", "accuracy")}) + "\n")
        records.flush()

    try:
        config = TrainConfig.from_dict(request["config"])
        run_training(config, request["folder"], resume=True, callbacks=[show])
    except (InputError, MissingDependencyError, NoAssignmentError, StateFileError) as error:
        raise SystemExit(" ".join(str(error).split())) from None  # anything else keeps its traceback


def _end_with_parent() -> None:
    while os.read(0, 1024):  # not sys.stdin: its lock would be held when this process ends
        pass
    if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    _main()
