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

_AXES = ("expert", "client", "pair")


@dataclass(frozen=True)
class StateVariable:
    """One thing that a policy keeps from round to round: a float64 for every expert, client or pair.

    Parameters
    ----------
    per : {"expert", "client", "pair"}
        The array is of shape (m,), (n,) or (n, m), with n the number of known clients: it grows with them.
    start : float, default 0.0
        Value at the start, and of every client that is new.

    Raises
    ------
    InputError
        Neither of the three, or a start that is not finite.
    """

    per: Literal["expert", "client", "pair"]
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.per not in _AXES:
            msg = f"per = {self.per!r}: must be one of {', '.join(_AXES)}"
            raise InputError(msg)
        if not math.isfinite(self.start):
            msg = f"start = {self.start}: must be finite"
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
        return {"expert": (m,), "client": (n,), "pair": (n, m)}[kind.per]

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
            self._values[name].rows[...] = value

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
        if array.shape != shape:
            msg = f"variable {name!r}: has shape {array.shape}, must be {shape} (one per {kind.per})"
            raise InputError(msg)
        return as_vector(f"variable {name!r}", array.reshape(-1), array.size, "numbers").reshape(shape)
