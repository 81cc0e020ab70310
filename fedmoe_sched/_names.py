"""Names of clients and experts: what may be one, and their way into JSON and back with their types."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, as_vector
from fedmoe_sched.errors import InputError

__all__ = ["ExpertNames", "check_names", "decode_name", "encode_name"]

_LARGEST_PLAIN = 2**63  # larger ones go as hexadecimal text: JSON readers limit or round decimal digits


def check_names(argument: str, names: Iterable[Any]) -> tuple[Hashable, ...]:
    """Return the names as a tuple of distinct hashable values.

    Parameters
    ----------
    argument : str
        The argument's name, for messages.
    names : iterable
        A NumPy array's elements become plain Python values.

    Raises
    ------
    InputError
        `names` is a single text, or a name cannot be hashed, differs from itself (NaN), or occurs twice.
    """
    if isinstance(names, (str, bytes)):
        msg = f"{argument} = {names!r}: must be several names, in a list for example"
        raise InputError(msg)
    try:
        listed = names.tolist() if isinstance(names, np.ndarray) else list(names)
    except TypeError:
        msg = f"{argument} = {names!r}: must be an iterable of names"
        raise InputError(msg) from None
    first: dict[Hashable, int] = {}
    for position, name in enumerate(listed):
        _check_name(f"{argument}[{position}]", name)
        if name in first:
            msg = f"{argument}[{position}] = {name!r}: already at position {first[name]}"
            raise InputError(msg)
        first[name] = position
    return tuple(listed)


def _check_name(argument: str, name: Any) -> None:
    try:
        hash(name)
        same = bool(name == name)  # noqa: PLR0124  (not so for NaN)
    except Exception:
        msg = f"{argument} = {name!r}: must be hashable, to serve as a name"
        raise InputError(msg) from None
    if not same:
        msg = f"{argument} = {name!r}: differs from itself and cannot serve as a name"
        raise InputError(msg)


class ExpertNames:
    """The names of the experts, and their numbers.

    Parameters
    ----------
    experts : int or iterable of hashable
        m, for the names 0..m-1, or the names.
    """

    def __init__(self, experts: Any) -> None:
        if isinstance(experts, (int, np.integer)) and not isinstance(experts, bool):
            self.names: tuple[Hashable, ...] = tuple(range(int(experts)))
        else:
            self.names = check_names("experts", experts)
        if not self.names:
            msg = f"experts = {experts!r}: must be at least one"
            raise InputError(msg)
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def number(self, argument: str, expert: Any) -> int:
        """Return the number of an expert.

        Raises
        ------
        InputError
            There is none of that name; the message names `argument`.
        """
        try:
            return self._numbers[expert]
        except (KeyError, TypeError):
            msg = f"{argument}: there is no expert {expert!r}"
            raise InputError(msg) from None

    def mask(self, argument: str, experts: Iterable[Hashable]) -> BoolArray:
        """Return which experts are named; shape (m,), bool."""
        mask = np.zeros(len(self.names), dtype=np.bool_)
        for expert in check_names(argument, experts):
            mask[self.number(argument, expert)] = True
        return mask

    def values(self, argument: str, given: Any, known: FloatArray) -> FloatArray:
        """Return one number per expert, of a list of all or of a mapping of some; the rest from `known`."""
        if not isinstance(given, Mapping):
            return as_vector(argument, given, len(self.names), "one per expert")
        values = known.copy()
        for expert, value in given.items():
            number = self.number(argument, expert)
            values[number] = as_vector(f"{argument}[{expert!r}]", [value], 1, "one number")[0]
        return values


def encode_name(name: Hashable) -> Any:
    """Return a JSON value from which `decode_name` makes an equal name of the same hash.

    Raises
    ------
    TypeError
        The name is not made of text, numbers, bool, bytes, None and tuples of these.
    """
    code = _encode(name)
    back = decode_name(code)
    if back != name or hash(back) != hash(name):
        msg = f"a {type(name).__name__} does not come back equal to itself"
        raise TypeError(msg)
    return code


def _encode(name: Any) -> Any:
    if isinstance(name, np.generic):
        name = name.item()
    if name is None or isinstance(name, bool):
        return name
    if isinstance(name, str):
        return str.__str__(name)  # without what a subclass adds
    if isinstance(name, int):
        return int(name) if abs(name) < _LARGEST_PLAIN else {"int": hex(name)}
    if isinstance(name, float):
        return {"float": float(name).hex()}
    if isinstance(name, bytes):
        return {"bytes": name.hex()}
    if isinstance(name, tuple):
        return {"tuple": [_encode(part) for part in name]}
    msg = f"a {type(name).__name__} is neither text, number, bool, bytes, None nor a tuple of these"
    raise TypeError(msg)


def decode_name(code: Any) -> Hashable:
    """Undo `encode_name`.

    Raises
    ------
    ValueError
        `code` is not what `encode_name` returns.
    """
    if code is None or isinstance(code, (bool, int, str)):
        return code
    if isinstance(code, dict) and len(code) == 1:
        [(kind, value)] = code.items()
        if kind == "tuple" and isinstance(value, list):
            return tuple(decode_name(part) for part in value)
        if isinstance(value, str) and kind in ("int", "float", "bytes"):
            readers: dict[str, Any] = {"int": lambda t: int(t, 16), "float": float.fromhex, "bytes": bytes.fromhex}
            decoded: Hashable = readers[kind](value)
            return decoded
    msg = f"{code!r} is not a stored name"
    raise ValueError(msg)
