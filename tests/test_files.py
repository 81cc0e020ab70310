"""Atomic writes and sealed archives: the old file or the new one, and every flaw noticed."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from fedmoe_sched import InputError, StateFileError
from fedmoe_sched._files import atomic_file, locked_folder, read_archive, write_archive, write_bytes, write_text

ARRAYS = {
    "a": np.arange(12.0).reshape(3, 4),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 3), dtype=int),
}
METADATA = {"name": "naïve \ud800", "big": 2**200, "none": None, "list": [1, 0.1]}


@pytest.fixture
def sealed(tmp_path):
    path = tmp_path / "state.bin"
    write_archive(path, ARRAYS, METADATA)
    return path


def test_archive_round_trip(sealed):
    arrays, metadata = read_archive(sealed)
    assert metadata == METADATA
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_archive_is_an_ordinary_npz(sealed):
    with np.load(sealed, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["a", "empty", "flags", "metadata"]


def test_same_content_same_bytes(sealed, tmp_path):
    write_archive(tmp_path / "again", ARRAYS, METADATA)
    assert (tmp_path / "again").read_bytes() == sealed.read_bytes()


def test_every_changed_byte_is_noticed(sealed, tmp_path):
    data, bad = sealed.read_bytes(), tmp_path / "bad"
    for at in range(len(data)):
        bad.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(StateFileError, match=r"bad: truncated, corrupted"):
            read_archive(bad)


def test_every_truncation_is_noticed(sealed, tmp_path):
    data, bad = sealed.read_bytes(), tmp_path / "bad"
    for size in range(len(data)):
        bad.write_bytes(data[:size])
        with pytest.raises(StateFileError, match=r"bad: truncated"):
            read_archive(bad)


def test_surplus_bytes_are_noticed(sealed):
    with sealed.open("ab") as file:
        file.write(b"0")
    with pytest.raises(StateFileError, match="checksum"):
        read_archive(sealed)


def test_the_untouched_file_passes_where_the_flawed_ones_do_not(sealed, tmp_path):
    # The checker's other side: the same bytes written back are accepted.
    copy = tmp_path / "copy"
    copy.write_bytes(sealed.read_bytes())
    assert read_archive(copy)[1] == METADATA


def test_objects_are_never_pickled(tmp_path):
    with pytest.raises(ValueError, match="allow_pickle"):
        write_archive(tmp_path / "state", {"a": np.array([object()])}, {})
    assert list(tmp_path.iterdir()) == []


def test_a_plain_npz_is_refused(tmp_path):
    np.savez(tmp_path / "plain.npz", a=np.arange(100))
    with pytest.raises(StateFileError, match=r"plain\.npz"):
        read_archive(tmp_path / "plain.npz")


def test_missing_file_stays_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_archive(tmp_path / "nowhere")


def test_failure_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "file"
    write_text(path, "old\n")

    def interrupted():
        with atomic_file(path) as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_see_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_failed_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def refuse(*_):
        raise OSError("no rename today")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(OSError, match="no rename today"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_permissions_are_those_of_an_ordinary_file(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    write_bytes(tmp_path / "new", b"")
    mode = stat.S_IMODE((tmp_path / "new").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    (tmp_path / "new").chmod(0o640)
    write_bytes(tmp_path / "new", b"again")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_bytes(tmp_path / "none" / "file", b"")


HOLD = """
import sys
from fedmoe_sched._files import locked_folder
with locked_folder(sys.argv[1], "folder"):
    print("held", flush=True)
    sys.stdin.read()
"""


class TestLockedFolder:
    @pytest.fixture(autouse=True)
    def _needs_filelock(self):
        pytest.importorskip("filelock")

    @pytest.mark.parametrize("killed", [False, True])
    def test_another_process_keeps_it_until_it_ends_however_it_ends(self, tmp_path, killed):
        folder = tmp_path / "new" / "folder"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        command = [sys.executable, "-c", HOLD, str(folder)]
        with subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout.readline() == "held\n"
            with pytest.raises(InputError, match="folder: is in use by another command") as error:
                locked_folder(folder, "output folder").__enter__()
            assert str(error.value).startswith(f"output folder {folder}: ")
            if killed:
                process.kill()
            process.communicate(timeout=60)
        assert (process.returncode != 0) == killed
        with locked_folder(folder, "output folder"):
            assert folder.is_dir()

    def test_it_is_free_again_after_a_failure(self, tmp_path):
        with pytest.raises(ZeroDivisionError), locked_folder(tmp_path, "folder"):
            _ = 1 / 0
        with locked_folder(tmp_path, "folder"), pytest.raises(InputError, match="is in use"):
            locked_folder(tmp_path, "folder").__enter__()

    def test_what_cannot_be_made_is_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"folder .*file: cannot be made or written to \(File exists\)"):
            locked_folder(tmp_path / "file", "folder").__enter__()
