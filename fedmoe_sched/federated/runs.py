"""Run folders: what a training run leaves behind, written so that it survives a kill at any moment; no torch here.

A run folder holds

- ``config.toml``: the settings, in full;
- ``clients.npz``: class counts, group and capacity of every client, and its device profile where it has one;
- ``metrics.jsonl``: one JSON object per finished round;
- ``schedules/round-00001.npz``, ...: assignment, fitness, samples and client accuracy of every round;
- ``checkpoint/round-00012/``: all that is needed to go on after that round;
- ``.lock``: held while a run writes here.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._files import locked_folder, read_archive, write_archive, write_text
from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.metrics import jain_index

__all__ = ["PHASES", "Run", "RunFolder", "is_timing", "read_run"]

#: Records' wall times of the phases of a round, in their order.
PHASES = (
    "ask_seconds",
    "schedule_seconds",
    "train_seconds",
    "aggregate_seconds",
    "feedback_seconds",
    "evaluate_seconds",
)

_VERSION = 1
_MODEL, _POLICY = "model.npz", "policy.npz"


def is_timing(key: str) -> bool:
    """Whether a metric is measured wall time, and so differs between runs that are otherwise the same.

    Simulated times do not, and are named otherwise: ``simulated_round``, ``simulated_time``.
    """
    return key.endswith("seconds")


class RunFolder:
    """Writer of one run folder.

    Parameters
    ----------
    path : path
        Made by `begin` where it does not exist.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.clients_file = self.path / "clients.npz"
        self.metrics_file = self.path / "metrics.jsonl"
        self.schedules = self.path / "schedules"
        self.checkpoints = self.path / "checkpoint"

    def locked(self) -> AbstractContextManager[None]:
        """Keep the folder for one run while a block runs; an `InputError` says that it is in use."""
        return locked_folder(self.path, "run folder")

    def begin(self, config_toml: str) -> None:
        """Make the folder for a new run.

        Raises
        ------
        InputError
            It holds a run already, or is no folder that can be written.
        """
        if self.metrics_file.exists() or self.config_file.exists():
            msg = f"run folder {self.path}: holds a run already; resume it (--resume) or choose another folder"
            raise InputError(msg)
        try:
            for folder in (self.path, self.schedules, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            msg = f"run folder {self.path}: cannot be made ({error.strerror})"
            raise InputError(msg) from error
        self.write_config(config_toml)

    def write_config(self, config_toml: str) -> None:
        """Write the settings, atomically."""
        write_text(self.config_file, config_toml)

    def append(self, record: Mapping[str, Any]) -> int:
        """Append one line to the metrics and make it durable; return the size of the file in bytes."""
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        with self.metrics_file.open("ab") as stream:
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
            return stream.tell()

    def write_schedule(self, number: int, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Write the arrays of one round, atomically."""
        write_archive(self.schedules / _round_name(number, ".npz"), arrays, {"round": number})

    # Checkpoints -------------------------------------------------------------------------------------------------

    def save_checkpoint(
        self, number: int, model: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any], policy: Any
    ) -> None:
        """Write a checkpoint: whole, or not at all.

        Parameters
        ----------
        number : int
            The round after which the run can go on.
        model : mapping of str to ndarray
            Global parameters.
        metadata : mapping
            JSON values.
        policy : Policy
            Saves itself.
        """
        target = self.checkpoints / _round_name(number)
        temporary = self.checkpoints / f".{target.name}.tmp"
        for leftover in (temporary, target):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_archive(temporary / _MODEL, model, {"version": _VERSION, "round": number, **metadata})
        policy.save(temporary / _POLICY)
        temporary.rename(target)  # a checkpoint under its final name is complete
        for old in self._finished_checkpoints()[:-1]:
            shutil.rmtree(old, ignore_errors=True)

    def _finished_checkpoints(self) -> list[Path]:
        return sorted(self.checkpoints.glob("round-*"))

    def load_checkpoint(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any], Path] | None:
        """Read the latest checkpoint.

        Returns
        -------
        model : dict of str to ndarray
        metadata : dict
        policy_file : Path
        or None if the run has none yet.

        Raises
        ------
        StateFileError
            It is corrupted or of another version.
        """
        found = self._finished_checkpoints()
        if not found:
            return None
        path = found[-1] / _MODEL
        try:
            model, metadata = read_archive(path)
        except OSError as error:
            msg = f"{path}: cannot be read ({error.strerror})"
            raise StateFileError(msg) from error
        if metadata.get("version") != _VERSION:
            msg = f"{path}: is of version {metadata.get('version')}, this package reads version {_VERSION}"
            raise StateFileError(msg)
        return model, metadata, found[-1] / _POLICY

    def rewind(self, number: int, metrics_bytes: int) -> None:
        """Drop what was written after the checkpoint of round `number`: it will be made again.

        Raises
        ------
        StateFileError
            The metrics are shorter than they were at the checkpoint.
        """
        size = self.metrics_file.stat().st_size if self.metrics_file.exists() else 0
        if size < metrics_bytes:
            msg = f"{self.metrics_file}: has {size} bytes, had {metrics_bytes} at the checkpoint of round {number}"
            raise StateFileError(msg)
        if size > metrics_bytes:
            os.truncate(self.metrics_file, metrics_bytes)
        for path in self.schedules.glob("round-*.npz"):
            if path.name > _round_name(number, ".npz"):
                path.unlink()


def _round_name(number: int, suffix: str = "") -> str:
    return f"round-{number:06d}{suffix}"


def _plain(value: Any) -> Any:
    """Make JSON values of it; numbers that are not finite become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Run:
    """What a run folder holds, for tables and figures.

    Parameters
    ----------
    path : Path
    config : dict
        The settings as in the TOML file.
    records : tuple of dict
        One per finished round, in order.
    counts : ndarray, shape (n, classes), int64
        Training samples of every client by class.
    groups : ndarray, shape (n,), int64
        Clients with alike data.
    capacity : ndarray, shape (n,), int64
    """

    path: Path
    config: dict[str, Any]
    records: tuple[dict[str, Any], ...]
    counts: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    capacity: npt.NDArray[np.int64]
    _cache: dict[str, npt.NDArray[Any]] = field(default_factory=dict, repr=False)

    @property
    def policy(self) -> str:
        """Name of the policy."""
        return str(self.config["policy"])

    @property
    def n_experts(self) -> int:
        """Number of experts m."""
        return int(self.config["model"]["experts"])

    def series(self, key: str) -> npt.NDArray[np.float64]:
        """Return one metric over the rounds; NaN where it is missing. Shape (rounds,) or (rounds, m)."""
        empty = float("nan")
        return np.array([empty if r.get(key) is None else r[key] for r in self.records], dtype=np.float64)

    def rounds_to(self, target: float, key: str = "accuracy") -> int | None:
        """Return the first round in which a metric reaches `target`; None if none does."""
        return next((int(r["round"]) for r in self.records if (r.get(key) or 0) >= target), None)

    def total(self, *keys: str) -> float:
        """Return the sum of metrics over all rounds; what is missing counts as 0."""
        return float(sum(np.nansum(self.series(key)) for key in keys))

    def rounds_to_converge(self, key: str = "accuracy", *, window: int = 5, tolerance: float = 0.01) -> int:
        """Return the first round from which on average there was nothing left to gain.

        That is the first whose smoothed metric is within `tolerance` of the best smoothed metric. Smoothed is the
        mean of the `window` rounds around a round, of fewer at both ends. A run that still improves when it ends
        converges, by this definition, in one of its last rounds.

        Parameters
        ----------
        key : str
            A metric that every round has.
        window : int
            An odd number of rounds.
        tolerance : float
            In the unit of the metric.
        """
        values = self.series(key)
        half = window // 2
        smooth = np.array([values[max(0, r - half) : r + half + 1].mean() for r in range(len(values))])
        # The difference of equal decimal fractions is not always their decimal difference.
        return int(np.argmax(smooth >= smooth.max() - tolerance - 1e-12)) + 1

    def time_to(self, target: float, key: str = "accuracy") -> float | None:
        """Return the simulated seconds until a metric reaches `target`; None if never, or without a clock."""
        reached = self.rounds_to(target, key)
        return None if reached is None else self.records[reached - 1].get("simulated_time")

    def schedule_arrays(self, key: str) -> npt.NDArray[Any]:
        """Stack one array of all rounds' schedules.

        Parameters
        ----------
        key : {"assignment", "fitness", "samples", "client_accuracy"}

        Returns
        -------
        ndarray, shape (rounds, n, m), or (rounds, n) for ``client_accuracy``
        """
        if key not in self._cache:
            files = [self.path / "schedules" / _round_name(int(r["round"]), ".npz") for r in self.records]
            self._cache[key] = np.stack([_array_of(file, key) for file in files])
        return self._cache[key]

    def expert_jain(self) -> float | None:
        """Return Jain's index of the clients that trained each expert in all rounds; None if they are not told."""
        if any(record.get("trained_loads") is None for record in self.records):
            return None
        return jain_index(self.series("trained_loads").sum(axis=0))

    def summary(self, target: float | None = None) -> dict[str, Any]:
        """Return the figures of a comparison table.

        Parameters
        ----------
        target : float, optional
            Accuracy to reach, for ``rounds_to_target`` and ``simulated_time_to_target``.

        Returns
        -------
        dict
            Final and best accuracy, the mean over the last five rounds, client accuracies, and means over the
            rounds of load CV, fitness given up, gap (None where no schedule has one) and solve time; ``seconds``
            is all measured time of the rounds. ``client_jain`` and ``expert_jain`` count all rounds.
            ``bytes_down`` and ``bytes_up`` are the traffic of all rounds, ``simulated_time`` the simulated
            seconds; None where no record has them.
        """
        last = self.records[-1]
        accuracy = self.series("accuracy")
        return {
            "policy": self.policy,
            "rounds": len(self.records),
            "accuracy": last["accuracy"],
            "accuracy_best": float(accuracy.max()),
            "accuracy_last5": float(accuracy[-5:].mean()),
            "client_accuracy_mean": last["client_accuracy_mean"],
            "client_accuracy_worst_decile": last["client_accuracy_worst_decile"],
            "rounds_to_target": None if target is None else self.rounds_to(target),
            "simulated_time": last.get("simulated_time"),
            "simulated_time_to_target": None if target is None else self.time_to(target),
            "bytes_down": self._total("bytes_down"),
            "bytes_up": self._total("bytes_up"),
            "load_cv": _mean(self.series("load_cv")),
            "client_jain": last.get("client_jain"),
            "expert_jain": self.expert_jain(),
            "fitness_given_up": _mean(self.series("fitness_given_up")),
            "gap": _mean(self.series("gap")),
            "solve_seconds": _mean(self.series("solve_seconds")),
            "seconds": self.total(*PHASES),
        }

    def _total(self, key: str) -> int | None:
        known = [int(record[key]) for record in self.records if record.get(key) is not None]
        return sum(known) if known else None


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _array_of(file: Path, key: str) -> npt.NDArray[Any]:
    try:
        return read_archive(file)[0][key]
    except OSError as error:
        msg = f"{file}: cannot be read ({error.strerror})"
        raise StateFileError(msg) from error


def read_run(folder: str | os.PathLike[str]) -> Run:
    """Read a run folder; the run may still be going on.

    Raises
    ------
    InputError
        It is no run folder, or no round is finished yet.
    StateFileError
        A file in it is corrupted.
    """
    files = RunFolder(folder)
    try:
        config = tomllib.loads(files.config_file.read_text(encoding="utf-8"))
        clients, _ = read_archive(files.clients_file)
        text = files.metrics_file.read_bytes() if files.metrics_file.exists() else b""
    except tomllib.TOMLDecodeError as error:
        msg = f"{files.config_file}: is not TOML ({error})"
        raise StateFileError(msg) from error
    except OSError as error:
        msg = f"run folder {files.path}: {error.filename} cannot be read ({error.strerror})"
        raise InputError(msg) from error
    # What follows the last line end is just being written.
    records = _records(files.metrics_file, text.split(b"\n")[:-1])
    if not records:
        msg = f"run folder {files.path}: no round is finished yet"
        raise InputError(msg)
    return Run(files.path, config, records, clients["counts"], clients["groups"], clients["capacity"])


def _records(path: Path, lines: Sequence[bytes]) -> tuple[dict[str, Any], ...]:
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            msg = f"{path}, line {number}: is not JSON ({error})"
            raise StateFileError(msg) from error
        if not isinstance(record, dict) or record.get("round") != number:
            msg = f"{path}, line {number}: must be the record of round {number}"
            raise StateFileError(msg)
        records.append(record)
    return tuple(records)
