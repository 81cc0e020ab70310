"""Experiments: arms to compare over several seeds, from one TOML file; imports no torch.

An experiment has a base, the settings of a training run; arms, each with its changes on top of the base; and
perhaps a grid, whose entries are crossed with the arms. Every (grid entry, arm, seed) is one training run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.config import TrainConfig, checked, read_toml
from fedmoe_sched.federated.methods.cached import refuse_cache
from fedmoe_sched.policies import make_policy

__all__ = ["Arm", "Experiment", "PlannedRun"]

Label = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _File(_Part):
    """The outer level of an experiment file."""

    name: Label
    title: str = ""
    seeds: Annotated[list[Seed], Field(min_length=1)] = [0]
    target: Annotated[float, Field(gt=0, le=1)] | None = None
    base: dict[str, Any] = {}
    arms: Annotated[list[dict[str, Any]], Field(min_length=1)]
    grid: list[dict[str, Any]] = []


class _GridEntry(_Part):
    label: Label
    set: dict[str, Any] = {}


class _ArmEntry(_GridEntry):
    policy: Label | None = None


_Entry = TypeVar("_Entry", bound=_GridEntry)


@dataclass(frozen=True)
class Arm:
    """One line of the result table, or one entry of the grid.

    Parameters
    ----------
    label : str
        Empty for the one entry of an experiment without a grid.
    changes : dict
        Dotted setting to value, on top of the base.
    """

    label: str
    changes: dict[str, Any]

    @property
    def slug(self) -> str:
        """The label as part of a folder name.

        Examples
        --------
        >>> Arm("balanced, tolerance 0.1", {}).slug
        'balanced-tolerance-0.1'
        """
        return re.sub(r"[^a-z0-9._]+", "-", self.label.lower()).strip("-.")


@dataclass(frozen=True)
class PlannedRun:
    """One training run of an experiment.

    Parameters
    ----------
    grid, arm : str
        Labels; `grid` is empty without a grid.
    seed : int
    config : TrainConfig
    folder : Path
        Within the output folder: ``runs/[GRID--]ARM/seed-SEED``.
    """

    grid: str
    arm: str
    seed: int
    config: TrainConfig
    folder: Path

    @property
    def name(self) -> str:
        """What to call it on a screen."""
        return " / ".join(part for part in (self.grid, self.arm, f"seed {self.seed}") if part)


@dataclass(frozen=True)
class Experiment:
    """A checked experiment.

    Parameters
    ----------
    name, title : str
        In short, and as the heading of tables and figures.
    seeds : tuple of int
    target : float or None
        Accuracy for rounds and time to target.
    base : TrainConfig
    arms : tuple of Arm
    grid : tuple of Arm
        One without label and changes where the file has no grid.
    source : str
        The file, for messages.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    target: float | None
    base: TrainConfig
    arms: tuple[Arm, ...]
    grid: tuple[Arm, ...]
    source: str

    @classmethod
    def from_toml(cls, path: str | Path) -> Experiment:
        """Read an experiment file.

        Raises
        ------
        InputError
            No such file, not TOML, or a wrong setting in any of its runs.
        """
        return cls.from_dict(read_toml(path, "experiment file"), source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "experiment") -> Experiment:
        """Check nested plain values; also the settings of every run that they define.

        Parameters
        ----------
        values : mapping
            Nested like the TOML file.
        source : str
            Where the values come from, for messages.

        Raises
        ------
        InputError
            Names arm or grid entry, key and value: ``e.toml: arms[1] 'balanced': clients.count = -1: ...``.
        """
        file = checked(_File, values, source)
        if "seed" in file.base:
            msg = f"{source}: base.seed = {file.base['seed']!r}: give seeds = [...] at the top of the file"
            raise InputError(msg)
        experiment = cls(
            file.name,
            file.title or file.name,
            tuple(dict.fromkeys(file.seeds)),
            file.target,
            TrainConfig.from_dict(file.base, source=f"{source}: base"),
            _arms(_ArmEntry, file.arms, f"{source}: arms"),
            _arms(_GridEntry, file.grid, f"{source}: grid") or (Arm("", {}),),
            source,
        )
        experiment._check_runs()
        return experiment

    def plan(
        self,
        *,
        seeds: Sequence[int] | None = None,
        only: Sequence[str] = (),
        changes: Mapping[str, Any] | None = None,
    ) -> list[PlannedRun]:
        """Return the runs, seed by seed: an experiment that was interrupted has all arms with the first seeds.

        Parameters
        ----------
        seeds : sequence of int, optional
            Instead of the experiment's own.
        only : sequence of str
            Labels of arms or grid entries to keep; those of both kinds are crossed. None is all of a kind.
        changes : mapping, optional
            Dotted setting to value, on top of everything.

        Raises
        ------
        InputError
            A wrong setting, or a label that there is not.
        """
        self._refuse_unknown(only)
        return [
            PlannedRun(
                entry.label,
                arm.label,
                seed,
                self._settings(entry, arm, {**(changes or {}), "seed": seed}),
                Path("runs") / "--".join(one.slug for one in (entry, arm) if one.slug) / f"seed-{seed}",
            )
            for seed in (self.seeds if seeds is None else dict.fromkeys(seeds))
            for entry in _chosen(self.grid, only)
            for arm in _chosen(self.arms, only)
        ]

    def _settings(self, entry: Arm, arm: Arm, changes: Mapping[str, Any]) -> TrainConfig:
        return self.base.updated({**entry.changes, **arm.changes, **changes}, source=self._where(entry, arm))

    def _where(self, entry: Arm, arm: Arm) -> str:
        crossed = f", grid {entry.label!r}" if entry.label else ""
        return f"{self.source}: arm {arm.label!r}{crossed}"

    def _refuse_unknown(self, labels: Sequence[str]) -> None:
        known = [one.label for one in (*self.arms, *self.grid) if one.label]
        for label in labels:
            if label not in known:
                msg = f"{self.source}: {label!r}: must be the label of an arm or grid entry ({', '.join(known)})"
                raise InputError(msg)

    def _check_runs(self) -> None:
        for entry in self.grid:
            for arm in self.arms:
                config = self._settings(entry, arm, {})
                options = {"seed": self.seeds[0], **config.policy_options}
                try:
                    policy = make_policy(config.policy, config.model.experts, **options)
                    refuse_cache(config.clients.cache, config.policy, policy.method)
                except InputError as error:
                    msg = f"{self._where(entry, arm)}: {error}"
                    raise InputError(msg) from error


def _arms(model: type[_Entry], entries: Sequence[Mapping[str, Any]], source: str) -> tuple[Arm, ...]:
    """Check the arms or the grid of a file."""
    arms: list[Arm] = []
    for number, values in enumerate(entries):
        where = f"{source}[{number}]"
        if "label" in values:
            where += f" {values['label']!r}"
        entry = checked(model, values, where)
        policy = {"policy": entry.policy} if isinstance(entry, _ArmEntry) and entry.policy else {}
        arm = Arm(entry.label, policy | _dotted(entry.set, where))
        _refuse_arm(arm, arms, where)
        arms.append(arm)
    return tuple(arms)


def _refuse_arm(arm: Arm, earlier: Sequence[Arm], where: str) -> None:
    if "seed" in arm.changes:
        msg = f"{where}: set.seed = {arm.changes['seed']!r}: give seeds = [...] at the top of the file"
        raise InputError(msg)
    if not arm.slug:
        msg = f"{where}: label = {arm.label!r}: must have a letter or a digit"
        raise InputError(msg)
    for other in earlier:
        if other.slug == arm.slug:
            msg = f"{where}: label = {arm.label!r}: would share the run folders of {other.label!r}"
            raise InputError(msg)


def _dotted(changes: Mapping[str, Any], where: str, prefix: str = "") -> dict[str, Any]:
    """Flatten tables, so that ``clients = { alpha = 1 }`` changes one setting and leaves the others alone."""
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        name = prefix + key.replace("-", "_")
        inner = _dotted(value, where, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
        for twice in inner.keys() & flat.keys():
            msg = f"{where}: set.{twice}: is given twice"
            raise InputError(msg)
        flat |= inner
    return flat


def _chosen(arms: Sequence[Arm], labels: Sequence[str]) -> list[Arm]:
    """Return the arms that are named; all where none is."""
    return [arm for arm in arms if arm.label in labels] or list(arms)
