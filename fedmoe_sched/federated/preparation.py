"""From settings to what clients hold: data set, split, shift between domains, features.

With a shift, clients of different domains see the same classes differently, so that an expert trained for one
domain is of little use to another: images are turned by a multiple of 90 degrees (as in the rotated data sets of
Ghosh et al. 2020, arXiv 2006.04088), and with ``relabel`` the class numbers are shifted as well, so that domains
contradict one another (as the permuted labels of Sattler et al. 2019, arXiv 1910.01991).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.data import Dataset, Images, load_dataset
from fedmoe_sched.federated.partition import Partition, partition

__all__ = ["Prepared", "prepare", "shifted_images", "shifted_labels"]


@dataclass(frozen=True)
class Prepared:
    """What a run trains on and is judged by.

    Parameters
    ----------
    data : Dataset
        As clients see it: shifted, and features in place of pixels where configured.
    partition : Partition
        Sample numbers refer to `data`.
    cells : ndarray, shape (test samples,), int64
        Kind of each test sample: its class, or with a shift its domain and class.
    shares : ndarray, shape (n, cells), float64
        Share of every kind in each client's own data: its test distribution. Rows sum to 1.
    """

    data: Dataset
    partition: Partition
    cells: IntArray
    shares: npt.NDArray[np.float64]


def prepare(config: TrainConfig) -> Prepared:
    """Load, split, shift and turn into features what the settings name.

    Raises
    ------
    DataFileError
        A data file is missing or corrupted.
    InputError
        The settings ask for the impossible.
    """
    settings, clients = config.data, config.clients
    data = load_dataset(
        settings.name,
        settings.dir,
        download=settings.download,
        seed=config.seed,
        train_samples=settings.train_samples,
        test_samples=settings.test_samples,
    )
    rng = np.random.default_rng([config.seed, 0x5417])
    public = data.train_images[:0]
    if settings.patches is not None:
        data, public = _set_apart(data, settings.patches.images, rng)
    parts = partition(data.train_labels, clients, n_classes=data.n_classes, seed=config.seed)
    cells, shares = data.test_labels, parts.shares()
    if clients.shift != "none":
        public = shifted_images(public, rng.integers(clients.domains, size=len(public)))
        groups = np.arange(len(data.test_labels)) % clients.domains
        data, parts = _shifted(data, parts, groups, relabel=clients.shift == "relabel")
        cells = groups * data.n_classes + data.test_labels
        shares = np.zeros((clients.count, clients.domains * data.n_classes))
        columns = parts.groups[:, None] * data.n_classes + np.arange(data.n_classes)
        np.put_along_axis(shares, columns, parts.shares(), axis=1)
    if settings.patches is not None:
        from fedmoe_sched.federated.patches import cached_features, learn_extractor

        extractor = learn_extractor(public, settings.patches, seed=config.seed)
        train, test = (cached_features(extractor, images) for images in (data.train_images, data.test_images))
        data = replace(data, train_images=train, test_images=test)
    return Prepared(data, parts, cells, shares)


def _set_apart(data: Dataset, count: int, rng: np.random.Generator) -> tuple[Dataset, Images]:
    """Take images, without their labels, out of the training set for the server."""
    order = rng.permutation(len(data.train_labels))
    kept = np.sort(order[count:])
    public = data.train_images[np.sort(order[:count])]
    return replace(data, train_images=data.train_images[kept], train_labels=data.train_labels[kept]), public


def _shifted(
    data: Dataset, parts: Partition, test_groups: IntArray, *, relabel: bool
) -> tuple[Dataset, Partition]:
    """Shift the training samples by their client's domain, the test samples by `test_groups`."""
    groups = np.zeros(len(data.train_labels), dtype=np.int64)
    for samples, group in zip(parts.samples, parts.groups, strict=True):
        groups[samples] = group
    train, test = data.train_labels, data.test_labels
    if relabel:
        train = shifted_labels(train, groups, data.n_classes)
        test = shifted_labels(test, test_groups, data.n_classes)
    counts = np.stack([np.bincount(train[samples], minlength=data.n_classes) for samples in parts.samples])
    images = (shifted_images(data.train_images, groups), shifted_images(data.test_images, test_groups))
    moved = replace(data, train_images=images[0], test_images=images[1], train_labels=train, test_labels=test)
    return moved, replace(parts, counts=counts.astype(np.int64))


def shifted_images(images: Images, groups: IntArray) -> Images:
    """Turn each image by its group times 90 degrees; from the fifth group on mirrored first.

    Parameters
    ----------
    images : ndarray, shape (samples, channels, side, side), uint8
    groups : ndarray, shape (samples,), int64
        0 leaves the image as it is; below 8.
    """
    answer = images.copy()
    for group in np.unique(groups):
        rows = groups == group
        part = images[rows]
        if group >= 4:
            part = part[..., ::-1]
        answer[rows] = np.rot90(part, int(group) % 4, axes=(2, 3))
    return answer


def shifted_labels(labels: IntArray, groups: IntArray, n_classes: int) -> IntArray:
    """Shift the class numbers of each group: ``(label + group) modulo n_classes``."""
    return (labels + groups) % n_classes
