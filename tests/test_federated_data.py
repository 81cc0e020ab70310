"""Data sets: the publishers' formats, and clear errors for missing, truncated and corrupted files."""

import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated import data as module
from fedmoe_sched.federated.data import DataFileError, load_dataset, stratified_part

pytestmark = pytest.mark.train


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return gzip.compress(header + array.tobytes(), mtime=0)


def as_published(files, contents):
    """The table of a publisher's files as if `contents` were what was published."""
    return tuple(
        type(file)(file.name, len(content), hashlib.sha256(content).hexdigest())
        for file, content in zip(files, contents, strict=True)
    )


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (size, 28, 28), dtype=np.uint8) for size in (30, 10)]
    labels = [np.arange(size, dtype=np.uint8) % 10 for size in (30, 10)]
    contents = [idx(a) for a in (images[0], labels[0], images[1], labels[1])]
    monkeypatch.setattr(module, "_FASHION_FILES", as_published(module._FASHION_FILES, contents))
    for file, content in zip(module._FASHION_FILES, contents, strict=True):
        (tmp_path / file.name).write_bytes(content)
    return tmp_path, images, labels


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (4, 3073), dtype=np.uint8) for _ in range(6)]
    for batch in batches:
        batch[:, 0] %= 10
    contents = [batch.tobytes() for batch in batches]
    monkeypatch.setattr(module, "_CIFAR_FILES", as_published(module._CIFAR_FILES, contents))
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for file, content in zip(module._CIFAR_FILES, contents, strict=True):
        (folder / file.name).write_bytes(content)
    return tmp_path, batches


def test_digits_are_split_three_to_one_and_stratified():
    pytest.importorskip("sklearn")
    data = load_dataset("digits")
    assert data.train_images.shape == (1348, 1, 8, 8)
    assert data.test_images.shape == (449, 1, 8, 8)
    assert (np.abs(np.bincount(data.train_labels) - 3 * np.bincount(data.test_labels)) <= 4).all()
    x = data.normalised(data.train_images)
    assert x.dtype == np.float32
    assert abs(float(x.mean())) < 1e-4
    assert abs(float(x.std()) - 1) < 1e-3
    other = load_dataset("digits", seed=1)
    assert not np.array_equal(data.test_images, other.test_images)


def test_digits_are_those_of_scikit_learn_and_without_its_file_come_from_its_function(monkeypatch):
    pytest.importorskip("sklearn")
    from sklearn.datasets import load_digits

    monkeypatch.setattr("sklearn.datasets.load_digits", lambda **kw: read.append(kw) or load_digits(**kw))
    read = []
    data = load_dataset("digits")
    assert not read
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    same = load_dataset("digits")
    assert read
    for part in ("train_images", "train_labels", "test_images", "test_labels"):
        ours, theirs = getattr(data, part), getattr(same, part)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)


def test_fashion_mnist_reads_the_four_files(fashion):
    folder, images, labels = fashion
    data = load_dataset("fashion-mnist", folder)
    assert np.array_equal(data.train_images[:, 0], images[0])
    assert np.array_equal(data.test_images[:, 0], images[1])
    assert np.array_equal(data.train_labels, labels[0])
    assert np.array_equal(data.test_labels, labels[1])


def test_the_folder_may_come_from_the_environment(fashion, monkeypatch):
    monkeypatch.setenv("FEDMOE_SCHED_DATA", str(fashion[0]))
    assert len(load_dataset("fashion-mnist").train_labels) == 30


def test_cifar10_reads_the_binary_layout(cifar):
    folder, batches = cifar
    for start in (folder, folder / "cifar-10-batches-bin"):
        data = load_dataset("cifar10", start)
        assert data.train_images.shape == (20, 3, 32, 32)
        # Record: a label, then the red, green and blue planes row by row.
        assert data.train_images[5, 1, 2, 3] == batches[1][1, 1 + 1024 + 2 * 32 + 3]
        assert np.array_equal(data.test_labels, batches[5][:, 0])


def test_channels_are_normalised_one_by_one(cifar):
    data = load_dataset("cifar10", cifar[0])
    x = data.normalised(data.train_images)
    assert np.allclose(x.mean(axis=(0, 2, 3)), 0, atol=1e-3)
    assert np.allclose(x.std(axis=(0, 2, 3)), 1, atol=1e-3)


def test_no_folder_says_how_to_set_one(monkeypatch):
    monkeypatch.delenv("FEDMOE_SCHED_DATA", raising=False)
    with pytest.raises(DataFileError, match=r"cifar10.*--data-dir.*FEDMOE_SCHED_DATA.*cifar-10-binary\.tar\.gz"):
        load_dataset("cifar10")


def test_a_missing_file_is_named(fashion):
    file = fashion[0] / "t10k-labels-idx1-ubyte.gz"
    file.unlink()
    with pytest.raises(DataFileError, match=r"t10k-labels-idx1-ubyte\.gz is missing; get the four"):
        load_dataset("fashion-mnist", fashion[0])


@pytest.mark.parametrize(("change", "state"), [(-5, "truncated"), (7, "too long")])
def test_a_file_of_another_size_is_refused_with_both_sizes(cifar, change, state):
    file = cifar[0] / "cifar-10-batches-bin" / "data_batch_3.bin"
    content = file.read_bytes()
    file.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(DataFileError, match=rf"data_batch_3\.bin: is {state}: {12292 + change} bytes.*12292"):
        load_dataset("cifar10", cifar[0])


@pytest.mark.parametrize("kind", ["fashion-mnist", "cifar10"])
def test_one_changed_byte_is_noticed(kind, request):
    if kind == "fashion-mnist":
        folder = request.getfixturevalue("fashion")[0]
        file = folder / "train-images-idx3-ubyte.gz"
    else:
        folder = request.getfixturevalue("cifar")[0]
        file = folder / "cifar-10-batches-bin" / "test_batch.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataFileError, match=rf"{file.name}: is corrupted: sha256"):
        load_dataset(kind, folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"not gzip at all", "cannot be decompressed"),
        (idx(np.zeros((3, 2, 2), np.uint8))[:-9], "cannot be decompressed"),
        (idx(np.zeros((3, 2), np.uint8)), "begins with 00000802"),
        (
            gzip.compress(gzip.decompress(idx(np.zeros((3, 2, 2), np.uint8)))[:-1], mtime=0),
            "holds 27 bytes.*expected 28",
        ),
    ],
)
def test_broken_idx_files(tmp_path, content, words):
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataFileError, match=rf"images\.gz.*{words}"):
        module._read_idx(path, 3)


def test_labels_out_of_range_are_refused(tmp_path, cifar, monkeypatch):
    file = cifar[0] / "cifar-10-batches-bin" / "data_batch_1.bin"
    content = bytearray(file.read_bytes())
    content[3073] = 10
    file.write_bytes(content)
    contents = [(file.parent / f.name).read_bytes() for f in module._CIFAR_FILES]
    monkeypatch.setattr(module, "_CIFAR_FILES", as_published(module._CIFAR_FILES, contents))
    with pytest.raises(DataFileError, match=r"data_batch_1\.bin: label\[1\] = 10: must be below 10"):
        load_dataset("cifar10", cifar[0])


# The download is exercised with file:// addresses: the same code, without a network.


def test_fashion_mnist_is_downloaded_and_checked(fashion, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(module, "_FASHION_URL", fashion[0].as_uri())
    target = tmp_path_factory.mktemp("fresh") / "sub"
    assert len(load_dataset("fashion-mnist", target, download=True).train_labels) == 30
    assert len(load_dataset("fashion-mnist", target).train_labels) == 30
    assert not list(target.glob("*.part"))


def test_a_corrupted_download_is_not_kept(fashion, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(module, "_FASHION_URL", fashion[0].as_uri())
    (fashion[0] / "train-labels-idx1-ubyte.gz").write_bytes(b"an error page")
    target = tmp_path_factory.mktemp("fresh")
    with pytest.raises(DataFileError, match=r"train-labels.*download.*is corrupted: sha256.*expected"):
        load_dataset("fashion-mnist", target, download=True)
    assert sorted(p.name for p in target.iterdir()) == ["train-images-idx3-ubyte.gz"]


def test_a_failed_download_names_file_and_place(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CIFAR_URL", (tmp_path / "nowhere" / "cifar-10-binary.tar.gz").as_uri())
    with pytest.raises(DataFileError, match=r"cifar-10-binary\.tar\.gz: download of file.*failed.*other means"):
        load_dataset("cifar10", tmp_path / "data", download=True)


def test_cifar10_archive_is_downloaded_and_unpacked(cifar, tmp_path_factory, monkeypatch):
    archive = tmp_path_factory.mktemp("publisher") / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for file in module._CIFAR_FILES:
            content = (cifar[0] / "cifar-10-batches-bin" / file.name).read_bytes()
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{file.name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(module, "_CIFAR_URL", archive.as_uri())
    monkeypatch.setattr(module, "_CIFAR_ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    target = tmp_path_factory.mktemp("fresh")
    assert len(load_dataset("cifar10", target, download=True).train_labels) == 20


def test_parts_are_stratified_and_seeded(fashion):
    labels = np.repeat(np.arange(10), [100, 50, 50, 50, 50, 50, 50, 50, 50, 500])
    part = stratified_part("train_samples", labels, 100, seed=0)
    assert np.bincount(labels[part]).tolist() == [10, 5, 5, 5, 5, 5, 5, 5, 5, 50]
    assert np.array_equal(part, stratified_part("train_samples", labels, 100, seed=0))
    assert not np.array_equal(part, stratified_part("train_samples", labels, 100, seed=1))
    assert len(load_dataset("fashion-mnist", fashion[0], train_samples=12).train_labels) == 12
    with pytest.raises(InputError, match="train_samples = 31: must be from 1 to 30"):
        load_dataset("fashion-mnist", fashion[0], train_samples=31)


def test_an_unknown_data_set_is_refused():
    with pytest.raises(InputError, match=r"data\.name = 'mnist'.*'digits'.*'cifar10'"):
        load_dataset("mnist")
