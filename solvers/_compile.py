"""How kernels are compiled, and when those that Numba keeps on disk are out of date."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba

__all__ = ["compiling", "jit", "part"]

Function = TypeVar("Function", bound=Callable[..., Any])


def jit(function: Function) -> Function:
    """Compile a kernel that Python calls, and keep it on disk.

    Arrays are filled by loops: any other way, ``np.zeros`` too, takes the compiler a tenth of a second for each
    shape and type.
    """
    options: Any = {"nogil": True, "error_model": "numpy"}
    try:
        kernel: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to
        kernel = numba.njit(**options)(function)
    # Numba stamps what it keeps with the kernel's own file only, yet what the kernel calls is compiled into it. No
    # public setting is for some functions only; without this attribute kernels work, but may be stale.
    index: Any = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    if hasattr(index, "_source_stamp"):
        index._source_stamp = (index._source_stamp, _sources(Path(function.__code__.co_filename)))
    compiled: Function = kernel
    return compiled


def part(function: Function) -> Function:
    """Compile what only kernels call: it is kept on disk with them, and callable from nowhere else."""
    bare: Any = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}  # options without a type
    kernel: Any = numba.njit(nogil=True, error_model="numpy", **bare)(function)
    # A number that starts from 0 before a loop is taken for the constant 0 first, and for any number later: what
    # is called with it, and what that calls, would be compiled for both. Without the attribute it is.
    template = getattr(kernel, "get_call_template", None)
    if template is not None:
        kernel.get_call_template = lambda args, kws: template(tuple(map(numba.types.unliteral, args)), kws)
    compiled: Function = kernel
    return compiled


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Collect no garbage: little is among what the compiler makes, and it would take a tenth longer."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@cache
def _sources(path: Path) -> str:
    """Digest of a file and of the files of its folder that it imports, at any depth; empty where it is no file."""
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8")
    words = sorted(set(re.findall(r"\w+", " ".join(re.findall(r"^(?:from|import) .*", text, re.MULTILINE)))))
    imported = [path.with_name(f"{word}.py") for word in words if word != path.stem]
    return hashlib.sha256("".join([text, *map(_sources, imported)]).encode()).hexdigest()
