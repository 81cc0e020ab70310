"""What the commands share in writing to terminals and files."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedmoe_sched.errors import InputError

__all__ = [
    "bytes_text",
    "checked_output",
    "complain",
    "console",
    "duration_text",
    "gap_text",
    "number_text",
    "plain_table",
    "seconds_text",
]


def console() -> Console:
    """Return a console on standard output; wide where it is not a terminal, so that no cell is folded."""
    return Console(width=None if sys.stdout.isatty() else 280, highlight=False, soft_wrap=False)


def complain(message: str) -> None:
    """Write one line to standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        "[bold red]error:[/] " + " ".join(message.replace("[", r"\[").split())
    )


def plain_table(*columns: str, right: tuple[str, ...] = ()) -> Table:
    """Return an empty table; the columns named in `right` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def number_text(value: float | None) -> str:
    """Return a number of six digits, or a dash."""
    return "-" if value is None else f"{value:.6g}"


def gap_text(gap: float | None) -> str:
    """Return a relative gap in percent, or a dash; what float64 cannot tell from 0 is 0."""
    if gap is None:
        return "-"
    return "0 %" if abs(gap) < 1e-9 else f"{100 * gap:.3g} %"


def seconds_text(seconds: float | None) -> str:
    """Return a time in the unit that suits it, or a dash."""
    if seconds is None:
        return "-"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def duration_text(seconds: float | None) -> str:
    """Return a time of seconds to days in the unit that suits it, or a dash."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def bytes_text(size: int | None) -> str:
    """Return a memory size in MB, or a dash."""
    return "-" if size is None else f"{size / 1e6:.0f} MB"


def checked_output(option: str, path: Path | None, suffixes: tuple[str, ...]) -> None:
    """Refuse an output file that could not be written, before any work is done for it.

    Raises
    ------
    InputError
        Another suffix, or no such folder.
    """
    if path is None:
        return
    if path.suffix.lower() not in suffixes:
        msg = f"{option} {path}: must end in {' or '.join(suffixes)}"
        raise InputError(msg)
    if not path.parent.is_dir():
        msg = f"{option} {path}: there is no folder {path.parent}"
        raise InputError(msg)
