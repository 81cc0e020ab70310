"""Empty figures and files of them, for all that draws; needs the `plot` extra."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from fedmoe_sched.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "new_figure", "save_figure"]

#: Distinguishable by readers with any colour vision (Okabe and Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure; width and height in inches.

    Raises
    ------
    MissingDependencyError
        matplotlib is not installed.
    """
    # Not pyplot: no window system is asked for, and no figure is kept alive behind the caller's back.
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        msg = "figures need the package 'matplotlib': pip install 'fedmoe-sched[plot]'"
        raise MissingDependencyError(msg) from error
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, path: str | os.PathLike[str], *, dpi: int = 110) -> None:
    """Write a figure; the same figure gives the same file, byte by byte.

    Parameters
    ----------
    figure : Figure
    path : path-like
        Ends in .svg, .png or .pdf.
    dpi : int, default 110
        Dots per inch, where the format has dots.
    """
    import matplotlib as mpl

    suffix = os.fspath(path).lower().rpartition(".")[2]
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(suffix)
    with mpl.rc_context({"svg.hashsalt": "fedmoe-sched", "svg.fonttype": "none"}):
        figure.savefig(path, dpi=dpi, metadata=metadata)
