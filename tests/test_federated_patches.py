"""Patch features: the arithmetic against a slow reference, what they are worth, and the cache."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.train

from fedmoe_sched import InputError  # noqa: E402
from fedmoe_sched.federated.config import PatchesConfig  # noqa: E402
from fedmoe_sched.federated.data import load_dataset  # noqa: E402
from fedmoe_sched.federated.patches import PatchExtractor, cached_features, learn_extractor  # noqa: E402

SMALL = PatchesConfig(filters=12, size=3, grid=2, components=20, images=200)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def extractor(digits):
    return learn_extractor(digits.train_images[:200], SMALL, seed=0)


def slow_responses(extractor: PatchExtractor, image: np.ndarray) -> np.ndarray:
    """Go through the patches one by one, as the text of Coates and Ng reads."""
    size, grid = extractor.filters.shape[2], extractor.grid
    places = image.shape[1] - size + 1
    filters = extractor.filters.reshape(len(extractor.filters), -1).astype(np.float64)
    maps = np.zeros((2 * len(filters), places, places))
    for y in range(places):
        for x in range(places):
            patch = image[:, y : y + size, x : x + size].astype(np.float64).ravel()
            patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 10)
            z = filters @ patch - extractor.offsets
            maps[:, y, x] = np.r_[np.maximum(z - 0.25, 0), np.maximum(-z - 0.25, 0)]
    cells = np.array_split(np.arange(places), grid)
    pooled = [[maps[:, r][:, :, c].mean(axis=(1, 2)) for c in cells] for r in cells]
    return np.array(pooled).transpose(2, 0, 1).ravel()


def test_responses_are_those_of_the_text(extractor, digits):
    images = digits.train_images[300:303]
    expected = [slow_responses(extractor, image) for image in images]
    np.testing.assert_allclose(extractor.responses(images), expected, rtol=1e-4, atol=1e-5)


def test_features_of_the_images_learnt_from_are_white(extractor, digits):
    features = extractor.features(digits.train_images[:200]).astype(np.float64)[:, :, 0, 0]
    np.testing.assert_allclose(features.mean(axis=0), 0, atol=0.01)
    np.testing.assert_allclose(np.cov(features.T, ddof=0), np.eye(20), atol=0.02)


def test_components_come_in_the_order_of_their_spread(extractor, digits):
    spread = (extractor.responses(digits.train_images[:200]) @ extractor.projection).std(axis=0)
    lengths = np.linalg.norm(extractor.projection, axis=0)
    np.testing.assert_allclose(spread, 1, rtol=1e-3)
    assert (np.diff(lengths) >= 0).all()  # one over the deviation along a unit direction


def test_a_linear_rule_on_few_features_reads_digits(extractor, digits):
    def of(images: np.ndarray) -> np.ndarray:
        return np.c_[extractor.features(images)[:, :, 0, 0].astype(np.float64), np.ones(len(images))]

    targets = np.eye(10)[digits.train_labels]
    rule = np.linalg.lstsq(of(digits.train_images), targets, rcond=None)[0]
    right = (of(digits.test_images) @ rule).argmax(axis=1) == digits.test_labels
    assert right.mean() > 0.85


def test_the_seed_decides(digits, extractor):
    again = learn_extractor(digits.train_images[:200], SMALL, seed=0)
    other = learn_extractor(digits.train_images[:200], SMALL, seed=1)
    assert np.array_equal(again.projection, extractor.projection)
    assert not np.array_equal(other.filters, extractor.filters)


def test_cached_features_are_the_features(extractor, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDMOE_SCHED_CACHE", str(tmp_path / "cache"))
    images = digits.train_images[:30]
    first = cached_features(extractor, images)
    monkeypatch.setattr(PatchExtractor, "features", lambda *_: pytest.fail("computed again"))
    again = cached_features(extractor, images)
    assert isinstance(again, np.memmap)
    assert np.array_equal(first, again)
    monkeypatch.undo()
    monkeypatch.setenv("FEDMOE_SCHED_CACHE", str(tmp_path / "cache"))
    changed = images.copy()
    changed[3, 0, 4, 4] += 1
    np.testing.assert_array_equal(cached_features(extractor, changed), extractor.features(changed))
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_done_without(extractor, digits, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDMOE_SCHED_CACHE", str(tmp_path / "file" / "cache"))
    images = digits.train_images[:5]
    np.testing.assert_array_equal(cached_features(extractor, images), extractor.features(images))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 9}, r"data\.patches\.size = 9: must be <= 8"),
        ({"grid": 7}, r"data\.patches\.grid = 7: must be <= 6"),
        ({"components": 97}, r"data\.patches\.components = 97: must be <= 96"),
    ],
)
def test_what_does_not_fit_the_images_is_refused(digits, changes, message):
    with pytest.raises(InputError, match=message):
        learn_extractor(digits.train_images[:200], SMALL.model_copy(update=changes), seed=0)
