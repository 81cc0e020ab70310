"""Numbers that a policy keeps from round to round, per expert, per client or per pair."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray, as_vector, read_only
from fedmoe_sched._growing import GrowingRows
from fedmoe_sched.errors import InputError

__all__ = ["StateVariable", "Variables"]

_AXES = ("expert", "client", "pair", "vector")
_TOLD = (None, "once", "before", "after", "server")


@dataclass(frozen=True)
class StateVariable:
    """One thing that a policy keeps from round to round: a float64 for every expert, client or pair.

    Parameters
    ----------
    per : {"expert", "client", "pair", "vector"}
        The array is of shape (m,), (n,), (n, m) or (n, w), with n the number of known clients: it grows with them.
        The width w of a vector is that of the first one that a client tells, 0 before.
    start : float, default 0.0
        Value at the start, and of every client that is new.
    told : {None, "once", "before", "after", "server"}
        Whether clients tell it, and when the policy asks them for it: once when they first appear; all available
        ones before every plan; those that trained, of what they trained with, after the round. ``"server"``: no
        client is asked, the policy's method tells it of them. See `Scheduler.tell`.
    least : float, optional
        The least value that may be told; None is no limit.

    Raises
    ------
    InputError
        None of these, a start that is not finite, or something per expert that a client should tell.
    """

    per: Literal["expert", "client", "pair", "vector"]
    start: float = 0.0
    told: Literal["once", "before", "after", "server"] | None = None
    least: float | None = None

    def __post_init__(self) -> None:
        if self.per not in _AXES:
            msg = f"per = {self.per!r}: must be one of {', '.join(_AXES)}"
            raise InputError(msg)
        if not math.isfinite(self.start):
            msg = f"start = {self.start}: must be finite"
            raise InputError(msg)
        if self.told not in _TOLD:
            msg = f"told = {self.told!r}: must be one of {', '.join(map(repr, _TOLD))}"
            raise InputError(msg)
        if self.told and self.per == "expert":
            msg = f"told = {self.told!r}: clients tell what is kept per client, pair or vector, not per expert"
            raise InputError(msg)


class Variables:
    """The values of a policy's variables.

    Parameters
    ----------
    n_experts : int
        m.
    kinds : mapping of str to StateVariable
    """

    def __init__(self, n_experts: int, kinds: Mapping[str, StateVariable]) -> None:
        self._n_experts = n_experts
        self._kinds = dict(kinds)
        self._size = 0
        self._values = {
            name: GrowingRows(np.full(self._shape(kind), kind.start)) for name, kind in self._kinds.items()
        }

    def _shape(self, kind: StateVariable) -> tuple[int, ...]:
        m, n = self._n_experts, self._size
        return {"expert": (m,), "client": (n,), "pair": (n, m), "vector": (n, 0)}[kind.per]

    @property
    def kinds(self) -> Mapping[str, StateVariable]:
        """The variables by name."""
        return self._kinds

    def add(self, count: int) -> None:
        """Add clients."""
        for name, kind in self._kinds.items():
            if kind.per != "expert":
                store = self._values[name]
                store.append(np.full((count, *store.rows.shape[1:]), kind.start))
        self._size += count

    def of(self, name: str) -> FloatArray:
        """Return all values of a variable, read-only.

        Raises
        ------
        InputError
            There is no such variable.
        """
        return read_only(self._values[self._known(name)].rows)

    def at(self, name: str, clients: IntArray) -> FloatArray:
        """Return the rows of some clients, a copy; the start value for those that are new (-1).

        Raises
        ------
        InputError
            There is no such variable, or it is one per expert.
        """
        kind = self._kinds[self._known(name)]
        if kind.per == "expert":
            msg = f"variable {name!r}: is kept per expert, not per client"
            raise InputError(msg)
        rows = self._values[name].rows
        taken = np.full((len(clients), *rows.shape[1:]), kind.start)
        known = clients >= 0
        taken[known] = rows[clients[known]]
        return taken

    def checked(self, news: Mapping[str, Any]) -> dict[str, FloatArray]:
        """Check new values of some of the variables; nothing is stored.

        Raises
        ------
        InputError
            An unknown name, a wrong shape, or a value that is not finite.
        """
        return {self._known(name): self._array(name, value) for name, value in news.items()}

    def put(self, values: Mapping[str, FloatArray]) -> None:
        """Store what `checked` returned."""
        for name, value in values.items():
            rows = self._values[name].rows
            if value.shape == rows.shape:
                rows[...] = value
            else:  # a vector that has got its width
                self._values[name] = GrowingRows(value)

    def told(self, client: int, news: Mapping[str, Any]) -> dict[str, FloatArray]:
        """Check what a client tells, and return its row of each variable; nothing is stored.

        Parameters
        ----------
        client : int
            Its row; -1 for a client that is new.
        news : mapping of str to float or array_like
            One number for a variable per client, m for one per pair (NaN leaves what is known), w for a vector.

        Raises
        ------
        InputError
            A name that clients are not asked for, a wrong length, or a value that is not finite or too low.
        """
        return {name: self._row(name, client, value) for name, value in news.items()}

    def put_row(self, client: int, rows: Mapping[str, FloatArray]) -> None:
        """Store the rows of one client."""
        for name, row in rows.items():
            values = self._values[name].rows
            if self._kinds[name].per == "vector" and values.shape[1] == 0:
                self._values[name] = GrowingRows(np.full((self._size, len(row)), self._kinds[name].start))
                values = self._values[name].rows
            values[client] = row

    def _row(self, name: str, client: int, value: Any) -> FloatArray:
        kind = self._kinds.get(name)
        if kind is None or kind.told is None:
            asked = [one for one, its in self._kinds.items() if its.told]
            msg = f"signal {name!r}: must be one of {', '.join(asked) or 'none'}"
            raise InputError(msg)
        known = self.at(name, np.array([client], dtype=np.int64))[0]
        given = np.asarray(value, dtype=np.float64).copy()
        widths = {
            "client": (),
            "pair": (self._n_experts,),
            "vector": known.shape if known.size else given.shape[:1],
        }
        if given.shape != widths[kind.per]:
            msg = f"signal {name!r}: has shape {given.shape}, must be {widths[kind.per]} (per {kind.per})"
            raise InputError(msg)
        if kind.per == "pair":
            given = np.where(np.isnan(given), known, given)
        flat = as_vector(f"signal {name!r}", given.reshape(-1), given.size, "numbers", least=kind.least)
        return flat.reshape(given.shape)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of all values; `restored` takes them back."""
        return {name: store.rows.copy() for name, store in self._values.items()}

    @classmethod
    def restored(
        cls,
        n_experts: int,
        n_clients: int,
        kinds: Mapping[str, StateVariable],
        arrays: Mapping[str, npt.NDArray[Any]],
    ) -> Variables:
        """Make the variables that `arrays` were taken from.

        Raises
        ------
        InputError
            Some are missing or in excess, of another shape, or not finite.
        """
        if arrays.keys() != kinds.keys():
            odd = ", ".join(sorted(arrays.keys() ^ kinds.keys()))
            msg = f"variables: the state lacks or has in excess: {odd}"
            raise InputError(msg)
        restored = cls(n_experts, kinds)
        restored.add(n_clients)
        restored.put(restored.checked(arrays))
        return restored

    def _known(self, name: str) -> str:
        if name not in self._kinds:
            msg = f"variable {name!r}: must be one of {', '.join(self._kinds) or 'none'}"
            raise InputError(msg)
        return name

    def _array(self, name: str, value: Any) -> FloatArray:
        kind, array = self._kinds[name], np.asarray(value)
        shape = self._shape(kind)
        if kind.per == "vector" and array.ndim == 2:
            shape = (shape[0], array.shape[1])
        if array.shape != shape:
            msg = f"variable {name!r}: has shape {array.shape}, must be {shape} (one per {kind.per})"
            raise InputError(msg)
        return as_vector(f"variable {name!r}", array.reshape(-1), array.size, "numbers").reshape(shape)
