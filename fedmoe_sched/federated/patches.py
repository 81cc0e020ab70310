"""A frozen feature extractor that needs no labels: responses to a dictionary of whitened image patches.

The single-layer network of Coates, Ng and Lee, "An Analysis of Single-Layer Networks in Unsupervised Feature
Learning" (AISTATS 2011): patches are normalised for brightness and contrast and whitened (ZCA), a dictionary of
unit vectors is learnt by spherical k-means (Coates and Ng, "Learning Feature Representations with K-means", 2012),
and a filter's response z becomes max(z - threshold, 0) and max(-z - threshold, 0) (soft threshold: Coates and Ng,
ICML 2011), averaged over a grid of cells. Principal components of that, scaled to unit variance, are the features.

In federated training it stands for an extractor that the server learns from a few public images, and sends once.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedmoe_sched._files import atomic_file
from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.config import PatchesConfig

__all__ = ["CACHE_DIR_VARIABLE", "PatchExtractor", "cached_features", "learn_extractor"]

CACHE_DIR_VARIABLE = "FEDMOE_SCHED_CACHE"

Images = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]

_PATCHES = 100_000
_ITERATIONS = 10
_CONTRAST = 10.0  # added to the variance of a patch of pixels 0 to 255, as in Coates and Ng 2012
_WHITENING = 0.1  # added to the eigenvalues of the covariance, as there
_BATCH = 20  # images whose responses fit a processor's cache
_FORMAT = 1  # of what is kept in the cache


@dataclass(frozen=True)
class PatchExtractor:
    """What turns images into features.

    Parameters
    ----------
    filters : ndarray, shape (k, channels, size, size), float32
        Whitening and dictionary in one: the response of a patch p, divided by its contrast, is
        ``filters . p - offsets``.
    offsets : ndarray, shape (k,), float32
    threshold : float
    grid : int
        Cells per side over which responses are averaged.
    mean : ndarray, shape (2 k grid grid,), float32
        Of the averaged responses.
    projection : ndarray, shape (2 k grid grid, components), float32
        From averaged responses, less their mean, to features.
    """

    filters: Floats
    offsets: Floats
    threshold: float
    grid: int
    mean: Floats
    projection: Floats

    def features(self, images: Images) -> Features:
        """Return features, one channel per component.

        Parameters
        ----------
        images : ndarray, shape (samples, channels, height, width), uint8

        Returns
        -------
        ndarray, shape (samples, components, 1, 1), float16
        """
        answer = np.empty((len(images), self.projection.shape[1], 1, 1), dtype=np.float16)
        for start in range(0, len(images), _BATCH):
            part = slice(start, start + _BATCH)
            answer[part, :, 0, 0] = (self.responses(images[part]) - self.mean) @ self.projection
        return answer

    def responses(self, images: Images) -> Floats:
        """Return averaged responses of a few images; shape (samples, 2 k grid grid), float32."""
        pixels, size = torch.from_numpy(images).float(), self.filters.shape[2]
        pooling = _pooling(images.shape[2] - size + 1, images.shape[3] - size + 1, self.grid)
        response = functional.conv2d(pixels, torch.from_numpy(self.filters)).flatten(2)
        response *= _inverse_contrast(pixels, size).flatten(2)
        response -= torch.from_numpy(self.offsets)[:, None]
        high = (response - self.threshold).clamp_(min=0) @ pooling
        low = response.add_(self.threshold).clamp_(max=0) @ -pooling
        both: Floats = torch.cat([high, low], dim=1).flatten(1).numpy()
        return both


def _inverse_contrast(pixels: Tensor, size: int) -> Tensor:
    """Return one over the deviation of the patch at every place; shape (samples, 1, height - size + 1, ...)."""
    count = pixels.shape[1] * size**2
    mean = functional.avg_pool2d(pixels, size, stride=1).mean(dim=1, keepdim=True)
    square = functional.avg_pool2d(pixels.square(), size, stride=1).mean(dim=1, keepdim=True)
    variance = (square - mean.square()).clamp_min(0) * (count / (count - 1))
    return torch.rsqrt(variance + _CONTRAST)


def _pooling(height: int, width: int, grid: int) -> Tensor:
    """Return the matrix that averages a map over ``grid x grid`` cells; shape (height width, grid grid)."""
    cells = torch.zeros(height, width, grid, grid)
    for y, rows in enumerate(np.array_split(np.arange(height), grid)):
        for x, columns in enumerate(np.array_split(np.arange(width), grid)):
            cells[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, y, x] = 1 / (len(rows) * len(columns))
    return cells.reshape(height * width, grid * grid)


def learn_extractor(images: Images, config: PatchesConfig, *, seed: int) -> PatchExtractor:
    """Learn dictionary and components from images, without labels.

    Parameters
    ----------
    images : ndarray, shape (samples, channels, height, width), uint8
    config : PatchesConfig
    seed : int

    Raises
    ------
    InputError
        Patches larger than the images, a grid finer than the responses, or more components than images.
    """
    _refuse_misfit(images, config)
    rng = np.random.default_rng([seed, 0xD1C7])
    filters, offsets = _learn_filters(images, config, rng)
    width = 2 * config.filters * config.grid**2
    bare = PatchExtractor(
        filters,
        offsets,
        config.threshold,
        config.grid,
        np.zeros(width, np.float32),
        np.eye(width, dtype=np.float32),
    )
    parts = [bare.responses(images[start : start + _BATCH]) for start in range(0, len(images), _BATCH)]
    responses = np.concatenate(parts).astype(np.float64)
    mean = responses.mean(axis=0)
    _, spread, directions = np.linalg.svd(responses - mean, full_matrices=False)
    deviations = np.maximum(spread[: config.components] / np.sqrt(len(images)), 1e-6)
    projection = directions[: config.components].T / deviations
    return PatchExtractor(
        filters, offsets, config.threshold, config.grid, mean.astype(np.float32), projection.astype(np.float32)
    )


def _refuse_misfit(images: Images, config: PatchesConfig) -> None:
    side = min(images.shape[2:])
    most = min(len(images), 2 * config.filters * config.grid**2)
    limits = (("size", config.size, side), ("grid", config.grid, side - config.size + 1))
    for name, value, limit in (*limits, ("components", config.components, most)):
        if value > limit:
            msg = f"data.patches.{name} = {value}: must be <= {limit} here"
            raise InputError(msg)


def _learn_filters(images: Images, config: PatchesConfig, rng: np.random.Generator) -> tuple[Floats, Floats]:
    patches = _random_patches(images, config.size, rng)
    mean = patches.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(patches.T))
    whitening = (vectors / np.sqrt(values + _WHITENING)) @ vectors.T
    dictionary = _spherical_k_means((patches - mean) @ whitening, config.filters, rng) @ whitening.T
    # A filter without mean answers to a patch as to the patch less its mean: nothing is left to subtract.
    centred = dictionary - dictionary.mean(axis=1, keepdims=True)
    shape = (config.filters, images.shape[1], config.size, config.size)
    return centred.reshape(shape).astype(np.float32), (dictionary @ mean).astype(np.float32)


def _random_patches(images: Images, size: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    height, width = (side - size + 1 for side in images.shape[2:])
    rows, tops, lefts = (rng.integers(high, size=_PATCHES) for high in (len(images), height, width))
    window = np.arange(size)
    y, x = (tops[:, None] + window)[:, :, None], (lefts[:, None] + window)[:, None, :]
    patches = images[rows[:, None, None], :, y, x].transpose(0, 3, 1, 2).reshape(_PATCHES, -1).astype(np.float64)
    patches -= patches.mean(axis=1, keepdims=True)
    patches /= np.sqrt(patches.var(axis=1, ddof=1, keepdims=True) + _CONTRAST)
    return patches


def _spherical_k_means(
    points: npt.NDArray[np.float64], count: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(_ITERATIONS):
        centres /= np.linalg.norm(centres, axis=1, keepdims=True)
        products = points @ centres.T
        nearest = np.abs(products).argmax(axis=1)
        signs = np.sign(products[np.arange(len(points)), nearest])
        sums = np.zeros_like(centres)
        np.add.at(sums, nearest, signs[:, None] * points)
        centres = np.where(np.any(sums, axis=1, keepdims=True), sums, centres)
    unit: npt.NDArray[np.float64] = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    return unit


def cached_features(extractor: PatchExtractor, images: Images) -> Features:
    """Return features, kept in a folder from one run to the next and mapped into memory from there.

    The folder is the one that the environment variable ``FEDMOE_SCHED_CACHE`` names, else ``fedmoe_sched`` in the
    user's cache folder. Where it cannot be written the features are computed each time.

    Parameters
    ----------
    extractor : PatchExtractor
    images : ndarray, shape (samples, channels, height, width), uint8
    """
    path = _cache_folder() / f"patches-{_key(extractor, images)}.npy"
    if not path.exists():
        features = extractor.features(images)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as stream:
                np.save(stream, features)
        except OSError:
            return features
    mapped: Features = np.load(path, mmap_mode="r")
    return mapped


def _cache_folder() -> Path:
    chosen = os.environ.get(CACHE_DIR_VARIABLE)
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmoe_sched"


def _key(extractor: PatchExtractor, images: Images) -> str:
    digest = hashlib.sha256(repr((_FORMAT, images.shape, extractor.threshold, extractor.grid)).encode())
    arrays: tuple[npt.NDArray[Any], ...] = (
        extractor.filters,
        extractor.offsets,
        extractor.mean,
        extractor.projection,
        images,
    )
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:32]
