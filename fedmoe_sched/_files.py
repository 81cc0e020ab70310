"""Files that are either the old one or the new one, whole: atomic writes and sealed .npz archives; locked folders.

A sealed archive is an ordinary .npz file whose zip comment is the SHA-256 of all bytes before it: any single
changed, missing or surplus byte is noticed before anything is read out of it, and ``numpy.load`` opens it still.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fedmoe_sched.errors import InputError, StateFileError

__all__ = [
    "PathLike",
    "atomic_file",
    "locked_folder",
    "read_archive",
    "write_archive",
    "write_bytes",
    "write_text",
]

PathLike: TypeAlias = str | os.PathLike[str]

_SEAL = 64  # hexadecimal digits of a SHA-256
_METADATA = "metadata"
_CHUNK = 1 << 20
_LOCK = ".lock"


@contextlib.contextmanager
def atomic_file(path: PathLike) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` when the block ends, and leaves no trace if it fails.

    Parameters
    ----------
    path : str or path-like
        Its folder must exist.

    Yields
    ------
    binary file
        A temporary file in the same folder, open for writing and reading.
    """
    target = Path(path)
    mode = _mode_of(target)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _mode_of(target: Path) -> int:
    """Return the permissions of the file that is replaced, or those that a new file would get."""
    with contextlib.suppress(OSError):
        return target.stat().st_mode & 0o777
    # The mask can only be read by setting it; mkstemp's own 0600 would lock out colleagues.
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut; systems that cannot open folders have no need or no way."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: PathLike, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_file(path) as file:
        file.write(data)


def write_text(path: PathLike, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8 with the line ends that it has."""
    write_bytes(path, text.encode("utf-8"))


def write_archive(path: PathLike, arrays: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, Any]) -> None:
    """Write arrays and metadata to a sealed .npz file, atomically.

    Parameters
    ----------
    path : str or path-like
        Used as it is: no suffix is added.
    arrays : mapping of str to ndarray
        Numbers and booleans; no objects, and none called "metadata".
    metadata : mapping
        Anything that JSON can hold.
    """
    text = np.frombuffer(json.dumps(metadata).encode("ascii"), dtype=np.uint8)
    with atomic_file(path) as file:
        np.savez(file, allow_pickle=False, **{_METADATA: text}, **arrays)
        with zipfile.ZipFile(file, mode="a") as archive:
            archive.comment = b"0" * _SEAL
        seal = _digest(file)
        file.seek(-_SEAL, os.SEEK_END)
        file.write(seal)


def _digest(file: IO[bytes]) -> bytes:
    """SHA-256 of all but the last `_SEAL` bytes, in hexadecimal."""
    left = file.seek(0, os.SEEK_END) - _SEAL
    file.seek(0)
    digest = hashlib.sha256()
    while left > 0:
        chunk = file.read(min(_CHUNK, left))
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest().encode("ascii")


def read_archive(path: PathLike) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Read what `write_archive` wrote.

    Returns
    -------
    arrays : dict of str to ndarray
    metadata : dict

    Raises
    ------
    StateFileError
        The file is truncated or corrupted, or never was such a file; the message names it.
    OSError
        There is no such file, or it may not be read.
    """
    with Path(path).open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size <= _SEAL:
            msg = f"{os.fspath(path)}: truncated or not a state file ({size} bytes)"
            raise StateFileError(msg)
        seal = _digest(file)
        file.seek(-_SEAL, os.SEEK_END)
        if file.read() != seal:
            msg = f"{os.fspath(path)}: truncated, corrupted, or not a state file (its checksum does not match)"
            raise StateFileError(msg)
        file.seek(0)
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            metadata = json.loads(arrays.pop(_METADATA).tobytes())
        except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
            msg = f"{os.fspath(path)}: not a state file ({error})"
            raise StateFileError(msg) from error
    if not isinstance(metadata, dict):
        msg = f"{os.fspath(path)}: not a state file (its metadata is {type(metadata).__name__}, not an object)"
        raise StateFileError(msg)
    return arrays, metadata


@contextlib.contextmanager
def locked_folder(path: PathLike, what: str) -> Iterator[None]:
    """Keep a folder for the caller while the block runs.

    The operating system keeps the lock on an open file, ``.lock`` in the folder, and takes it back when the
    process ends, however it ends: the file that stays behind locks nobody out.

    Parameters
    ----------
    path : str or path-like
        Made where it does not exist.
    what : str
        What messages call the folder.

    Raises
    ------
    InputError
        The folder is in use, or cannot be made or written to.
    """
    from filelock import FileLock, Timeout  # of the extra `train`

    folder = Path(path)
    lock = FileLock(folder / _LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        msg = f"{what} {folder}: is in use by another command; wait for its end, or choose another folder"
        raise InputError(msg) from None
    except OSError as error:
        msg = f"{what} {folder}: cannot be made or written to ({error.strerror})"
        raise InputError(msg) from error
    try:
        yield
    finally:
        lock.release()
