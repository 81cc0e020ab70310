"""Image data sets as plain arrays: digits (offline), Fashion-MNIST and CIFAR-10 from the publishers' files."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched.errors import InputError

__all__ = ["DATA_DIR_VARIABLE", "DataFileError", "Dataset", "load_dataset", "stratified_part"]

DATA_DIR_VARIABLE = "FEDMOE_SCHED_DATA"

Images = npt.NDArray[np.uint8]


class DataFileError(InputError):
    """A data file is missing, truncated or corrupted; the message names the file and what was expected."""


@dataclass(frozen=True)
class Dataset:
    """Images with labels, as stored by the publisher, or features in their place.

    Parameters
    ----------
    name : str
    train_images, test_images : ndarray, shape (samples, channels, height, width), uint8, float16 for features
    train_labels, test_labels : ndarray, shape (samples,), int64
    class_names : tuple of str
    """

    name: str
    train_images: npt.NDArray[Any]
    train_labels: IntArray
    test_images: npt.NDArray[Any]
    test_labels: IntArray
    class_names: tuple[str, ...]

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @cached_property
    def _statistics(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        return _channel_statistics(self.train_images)

    def normalised(self, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return images as float32, shifted and scaled to mean 0, deviation 1 per channel of the training set."""
        mean, deviation = self._statistics
        return ((images - mean) / deviation).astype(np.float32, copy=False)


def _channel_statistics(
    images: npt.NDArray[Any],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    # Sums of bytes are exact in integers, and need no float copy of the whole set.
    exact = np.int64 if images.dtype == np.uint8 else np.float64
    axes = (0, 2, 3)
    count = images.size // images.shape[1]
    total = images.sum(axis=axes, dtype=exact)
    squares = sum(np.square(part.astype(exact)).sum(axis=axes) for part in np.array_split(images, 50))
    mean = total / count
    deviation = np.sqrt(np.maximum(np.asarray(squares) / count - mean**2, 1e-12))
    shape = (1, -1, 1, 1)
    return mean.reshape(shape).astype(np.float32), deviation.reshape(shape).astype(np.float32)


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    download: bool = False,
    seed: int = 0,
    train_samples: int | None = None,
    test_samples: int | None = None,
) -> Dataset:
    """Load a data set.

    Parameters
    ----------
    name : {"digits", "fashion-mnist", "cifar10"}
    data_dir : path, optional
        Folder of the publisher's files; else the environment variable ``FEDMOE_SCHED_DATA``. A sub-folder named
        ``fashion_mnist`` or ``fashion-mnist`` is looked into as well. ``digits`` needs none.
    download : bool
        Fetch missing files into `data_dir` and check their checksums.
    seed : int
        Of the split of digits and of the parts.
    train_samples, test_samples : int, optional
        Keep a stratified part of this size.

    Raises
    ------
    DataFileError
        A file is missing, truncated or corrupted.
    InputError
        No such data set, or a part larger than the whole.
    """
    if name == "digits":
        data = _load_digits(seed)
    elif name in _LOADERS:
        data = _LOADERS[name](_folder(name, data_dir), download)
    else:
        msg = f"data.name = {name!r}: must be 'digits' or one of {', '.join(map(repr, _LOADERS))}"
        raise InputError(msg)
    if train_samples is not None:
        keep = stratified_part("train_samples", data.train_labels, train_samples, seed)
        data = replace(data, train_images=data.train_images[keep], train_labels=data.train_labels[keep])
    if test_samples is not None:
        keep = stratified_part("test_samples", data.test_labels, test_samples, seed)
        data = replace(data, test_images=data.test_images[keep], test_labels=data.test_labels[keep])
    return data


def stratified_part(name: str, labels: IntArray, size: int, seed: int) -> IntArray:
    """Choose `size` samples with the class shares of the whole.

    Parameters
    ----------
    name : str
        For messages.
    labels : ndarray, shape (samples,), int64
    size : int
    seed : int

    Returns
    -------
    ndarray, shape (size,), int64
        Ascending sample numbers.
    """
    if not 0 < size <= len(labels):
        msg = f"{name} = {size}: must be from 1 to {len(labels)}, the samples there are"
        raise InputError(msg)
    rng = np.random.default_rng([seed, size])
    order = rng.permutation(len(labels))
    # Rank of each sample within its class, relative to the class size: the smallest ranks are a stratified part.
    ranks = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        ranks[members] = (np.arange(len(members)) + 0.5) / len(members)
    chosen = order[np.argsort(ranks[order], kind="stable")[:size]]
    return np.sort(chosen).astype(np.int64)


def _load_digits(seed: int) -> Dataset:
    """Load scikit-learn's 1,797 digits, a stratified quarter of them for the test."""
    table = _digits_table()
    images = table[:, :64].reshape(-1, 1, 8, 8)
    labels = table[:, 64].astype(np.int64)
    test = stratified_part("test part", labels, round(len(labels) / 4), seed)
    train = np.setdiff1d(np.arange(len(labels)), test)
    names = tuple(str(digit) for digit in range(10))
    return Dataset("digits", images[train], labels[train], images[test], labels[test], names)


def _digits_table() -> npt.NDArray[np.uint8]:
    """Return rows of 64 pixels and the label, from scikit-learn's file: to import scikit-learn takes longer."""
    spec = find_spec("sklearn")
    if spec is not None and spec.origin is not None:
        file = Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",", dtype=np.uint8)
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels]).astype(np.uint8)


# --- files of the publishers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _DataFile:
    """A publisher's file: size in bytes, checksum in hexadecimal."""

    name: str
    size: int
    sha256: str


_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
_FASHION_FILES = (
    _DataFile(
        "train-images-idx3-ubyte.gz", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"
    ),
    _DataFile(
        "train-labels-idx1-ubyte.gz", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"
    ),
    _DataFile(
        "t10k-images-idx3-ubyte.gz", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"
    ),
    _DataFile(
        "t10k-labels-idx1-ubyte.gz", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"
    ),
)
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
_CIFAR_ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as the publisher's page lists it
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_FILES = (
    _DataFile("data_batch_1.bin", 30730000, "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5"),
    _DataFile("data_batch_2.bin", 30730000, "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed"),
    _DataFile("data_batch_3.bin", 30730000, "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67"),
    _DataFile("data_batch_4.bin", 30730000, "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48"),
    _DataFile("data_batch_5.bin", 30730000, "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add"),
    _DataFile("test_batch.bin", 30730000, "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"),
)
_CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip


def _folder(name: str, data_dir: str | Path | None) -> Path:
    chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    if not chosen:
        msg = (
            f"data set {name!r}: needs the folder of its files: set data.dir (--data-dir) or the environment "
            f"variable {DATA_DIR_VARIABLE}; {_how_to_get(name)}"
        )
        raise DataFileError(msg)
    return Path(chosen).expanduser()


def _how_to_get(name: str) -> str:
    if name == "cifar10":
        return (
            f"get {_CIFAR_URL} and unpack it there (it makes the folder {_CIFAR_FOLDER}), "
            "or set data.download where a network allows"
        )
    return (
        f"get the four .gz files from {_FASHION_URL} into that folder, or set data.download where a network allows"
    )


def _load_fashion_mnist(folder: Path, download: bool) -> Dataset:
    homes = (folder, folder / "fashion_mnist", folder / "fashion-mnist")
    home = next((h for h in homes if (h / _FASHION_FILES[0].name).exists()), folder)
    arrays = []
    for file, dimensions in zip(_FASHION_FILES, (3, 1, 3, 1), strict=True):
        path = home / file.name
        if not path.exists() and download:
            _download(f"{_FASHION_URL}/{file.name}", path, "sha256", file.sha256)
        _check_file("fashion-mnist", path, file)
        arrays.append(_read_idx(path, dimensions))
    x_train, y_train, x_test, y_test = arrays
    for kind, images, labels in (("train", x_train, y_train), ("t10k", x_test, y_test)):
        _check_labels(home / f"{kind}-labels-idx1-ubyte.gz", labels, len(_FASHION_CLASSES), len(images))
    return Dataset(
        "fashion-mnist",
        x_train[:, None],
        y_train.astype(np.int64),
        x_test[:, None],
        y_test.astype(np.int64),
        _FASHION_CLASSES,
    )


def _load_cifar10(folder: Path, download: bool) -> Dataset:
    homes = (folder / _CIFAR_FOLDER, folder / "cifar10" / _CIFAR_FOLDER, folder)
    home = next((h for h in homes if (h / _CIFAR_FILES[0].name).exists()), homes[0])
    if download and not all((home / file.name).exists() for file in _CIFAR_FILES):
        _download_cifar10(folder)
    parts = []
    for file in _CIFAR_FILES:
        path = home / file.name
        _check_file("cifar10", path, file)
        records = np.fromfile(path, dtype=np.uint8).reshape(-1, _CIFAR_RECORD)
        _check_labels(path, records[:, 0], len(_CIFAR_CLASSES), len(records))
        parts.append(records)
    train = np.concatenate(parts[:-1])
    return Dataset("cifar10", *_cifar_arrays(train), *_cifar_arrays(parts[-1]), _CIFAR_CLASSES)


def _cifar_arrays(records: Images) -> tuple[Images, IntArray]:
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


_LOADERS: dict[str, Callable[[Path, bool], Dataset]] = {
    "fashion-mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
}


def _check_file(name: str, path: Path, file: _DataFile) -> None:
    """Refuse a missing file, one of another size, or one whose checksum differs."""
    if not path.is_file():
        msg = f"data set {name!r}: file {path} is missing; {_how_to_get(name)}"
        raise DataFileError(msg)
    size = path.stat().st_size
    if size != file.size:
        state = "truncated" if size < file.size else "too long"
        msg = f"data file {path}: is {state}: {size} bytes, expected {file.size}; {_how_to_get(name)}"
        raise DataFileError(msg)
    digest = _digest(path, "sha256")
    if digest != file.sha256:
        msg = f"data file {path}: is corrupted: sha256 {digest}, expected {file.sha256}; {_how_to_get(name)}"
        raise DataFileError(msg)


def _check_labels(path: Path, labels: Images, n_classes: int, count: int) -> None:
    if len(labels) != count:
        msg = f"data file {path}: has {len(labels)} labels for {count} images"
        raise DataFileError(msg)
    if labels.max(initial=0) >= n_classes:
        at = int(np.argmax(labels >= n_classes))
        msg = f"data file {path}: label[{at}] = {labels[at]}: must be below {n_classes}"
        raise DataFileError(msg)


def _read_idx(path: Path, dimensions: int) -> Images:
    """Read a gzip-compressed IDX file of unsigned bytes: magic number, big-endian sizes, data."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        msg = f"data file {path}: cannot be decompressed ({error})"
        raise DataFileError(msg) from error
    header = 4 * (1 + dimensions)
    magic = bytes([0, 0, 8, dimensions])
    if raw[:4] != magic or len(raw) < header:
        msg = f"data file {path}: begins with {raw[:4].hex()}, an IDX file of its kind with {magic.hex()}"
        raise DataFileError(msg)
    shape = tuple(int(k) for k in np.frombuffer(raw, dtype=">u4", count=dimensions, offset=4))
    expected = header + int(np.prod(shape))
    if len(raw) != expected:
        msg = f"data file {path}: holds {len(raw)} bytes after decompression, expected {expected} for {shape}"
        raise DataFileError(msg)
    return np.frombuffer(raw, dtype=np.uint8, offset=header).reshape(shape)


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def _download(url: str, path: Path, algorithm: str, checksum: str) -> None:
    """Fetch a file and put it in place only when whole and of the right checksum."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as answer, part.open("wb") as out:
            while block := answer.read(1 << 20):
                out.write(block)
    except (OSError, urllib.error.URLError) as error:
        part.unlink(missing_ok=True)
        msg = f"data file {path}: download of {url} failed ({error}); fetch it by other means and put it there"
        raise DataFileError(msg) from error
    found = _digest(part, algorithm)
    if found != checksum:
        part.unlink()
        msg = f"data file {path}: download of {url} is corrupted: {algorithm} {found}, expected {checksum}"
        raise DataFileError(msg)
    part.replace(path)


def _download_cifar10(folder: Path) -> None:
    archive = folder / _CIFAR_URL.rpartition("/")[2]
    if not archive.exists() or _digest(archive, "md5") != _CIFAR_ARCHIVE_MD5:
        _download(_CIFAR_URL, archive, "md5", _CIFAR_ARCHIVE_MD5)
    home = folder / _CIFAR_FOLDER
    home.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for file in _CIFAR_FILES:
            member = tar.extractfile(f"{_CIFAR_FOLDER}/{file.name}")
            if member is None:
                msg = f"data file {archive}: holds no {_CIFAR_FOLDER}/{file.name}"
                raise DataFileError(msg)
            part = home / (file.name + ".part")
            part.write_bytes(member.read())
            part.replace(home / file.name)
