"""From settings to what clients hold: held-out images, shifts, kinds of test samples."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytestmark = pytest.mark.train

from fedmoe_sched import InputError  # noqa: E402
from fedmoe_sched.federated import TrainConfig  # noqa: E402
from fedmoe_sched.federated.preparation import prepare, shifted_images, shifted_labels  # noqa: E402


def config(**changes) -> TrainConfig:
    return TrainConfig().updated({"clients.count": 8, "clients.split": "iid", **changes})


def test_without_shift_kinds_are_classes():
    ready = prepare(config())
    assert np.array_equal(ready.cells, ready.data.test_labels)
    np.testing.assert_allclose(ready.shares, ready.partition.shares())


def test_images_are_turned_and_from_the_fifth_group_on_mirrored():
    image = np.array([[[[1, 2], [3, 4]]]], dtype=np.uint8)
    turned = {group: shifted_images(image, np.array([group]))[0, 0].tolist() for group in (0, 1, 2, 3, 4, 5)}
    assert turned == {
        0: [[1, 2], [3, 4]],
        1: [[2, 4], [1, 3]],
        2: [[4, 3], [2, 1]],
        3: [[3, 1], [4, 2]],
        4: [[2, 1], [4, 3]],
        5: [[1, 3], [2, 4]],
    }


def test_labels_are_shifted_by_the_group():
    assert shifted_labels(np.array([0, 8, 9]), np.array([0, 1, 3]), 10).tolist() == [0, 9, 2]


@pytest.mark.parametrize("shift", ["rotate", "relabel"])
def test_a_shift_turns_what_each_client_holds(shift):
    plain = prepare(config())
    ready = prepare(config(**{"clients.shift": shift, "clients.domains": 4}))
    assert sorted(ready.partition.groups.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    moved = 1 if shift == "relabel" else 0
    for client, samples in enumerate(ready.partition.samples):
        group = int(ready.partition.groups[client])
        before = plain.data.train_images[samples]
        assert np.array_equal(ready.data.train_images[samples], np.rot90(before, group, axes=(2, 3)))
        labels = (plain.data.train_labels[samples] + moved * group) % 10
        assert np.array_equal(ready.data.train_labels[samples], labels)
        assert np.array_equal(ready.partition.counts[client], np.bincount(labels, minlength=10))


def test_with_a_shift_a_client_is_judged_in_its_own_domain():
    ready = prepare(config(**{"clients.shift": "relabel", "clients.domains": 4}))
    assert ready.shares.shape == (8, 40)
    np.testing.assert_allclose(ready.shares.sum(axis=1), 1)
    for client, group in enumerate(ready.partition.groups):
        own = ready.shares[client].reshape(4, 10)
        assert own.sum(axis=1).argmax() == group
        assert (own.sum(axis=1) > 0).sum() == 1
        np.testing.assert_allclose(
            own[group], ready.partition.counts[client] / ready.partition.counts[client].sum()
        )
    domains = ready.cells // 10
    assert np.bincount(domains).tolist() == [113, 112, 112, 112]
    assert np.array_equal(ready.cells % 10, ready.data.test_labels)
    plain = prepare(config())
    for at in (1, 2, 7):
        turned = np.rot90(plain.data.test_images[at], at % 4, axes=(1, 2))
        assert np.array_equal(ready.data.test_images[at], turned)


def test_no_client_gets_the_images_that_the_server_keeps(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDMOE_SCHED_CACHE", str(tmp_path))
    patches = {"filters": 10, "size": 3, "grid": 2, "components": 16, "images": 150}
    ready = prepare(config(**{"data.patches": patches}))
    held = np.concatenate(ready.partition.samples)
    assert len(ready.data.train_labels) == 1348 - 150
    assert sorted(held.tolist()) == list(range(1348 - 150))
    assert ready.data.train_images.shape == (1348 - 150, 16, 1, 1)
    assert ready.data.test_images.shape == (449, 16, 1, 1)
    assert ready.data.normalised(ready.data.train_images[:3]).dtype == np.float32


def test_a_shift_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"clients\.shift = 'rotate': the split 'domains'"):
        config(**{"clients.shift": "rotate", "clients.split": "domains"})
    with pytest.raises(InputError, match=r"clients\.domains = 9: with a shift must be <= 8"):
        config(**{"clients.shift": "rotate", "clients.domains": 9})
