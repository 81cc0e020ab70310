"""Clients and experts in messages: names up to ten of them, and the grammar around."""

from __future__ import annotations

from fedmoe_sched._arrays import IntArray

__all__ = ["ints", "listed", "them", "verb"]

_NAMED = 10  # how many clients or experts a message names one by one


def ints(numbers: IntArray) -> tuple[int, ...]:
    """Return the numbers as plain ones."""
    return tuple(numbers.tolist())


def them(numbers: IntArray) -> str:
    """Return the pronoun for so many."""
    return "it" if len(numbers) == 1 else "them"


def verb(numbers: IntArray, plural: str) -> str:
    """Return a verb as it follows so many."""
    return plural + "s" if len(numbers) == 1 else plural


def listed(kind: str, labels: tuple[object, ...] | None, numbers: IntArray) -> str:
    """Name some clients, experts or layers by their labels, or numbers."""
    names = [str(i if labels is None else labels[i]) for i in numbers[:_NAMED].tolist()]
    if len(numbers) == 1:
        return f"{kind} {names[0]}"
    more = f", ... ({len(numbers)} in all)" if len(numbers) > _NAMED else ""
    return f"{kind}s {{{', '.join(names)}{more}}}"
