"""Splits of the samples over clients: disjoint, complete where promised, seeded, and as uneven as asked."""

import numpy as np
import pytest
from drawn import drawn
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("pydantic")

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.config import ClientsConfig
from fedmoe_sched.federated.partition import partition

pytestmark = pytest.mark.train

LABELS = np.random.default_rng(0).integers(0, 10, 2000)


def split(labels=LABELS, seed=0, **options):
    return partition(labels, ClientsConfig(**options), n_classes=10, seed=seed)


@settings(max_examples=drawn(40), deadline=None)
@given(
    kind=st.sampled_from(["classes", "dirichlet", "iid", "domains"]),
    count=st.integers(10, 60),
    alpha=st.floats(0.05, 100),
    seed=st.integers(0, 1000),
)
def test_every_sample_has_one_owner_at_most(kind, count, alpha, seed):
    answer = split(seed=seed, split=kind, count=count, alpha=alpha, min_samples=2)
    everything = np.concatenate(answer.samples)
    assert len(np.unique(everything)) == len(everything)
    assert min(map(len, answer.samples)) >= 2
    # Ten clients with two classes each hold every class: nothing is left over.
    assert len(everything) == len(LABELS)
    for part, counts in zip(answer.samples, answer.counts, strict=True):
        assert np.array_equal(np.bincount(LABELS[part], minlength=10), counts)
    assert np.allclose(answer.shares().sum(axis=1), 1)


@pytest.mark.parametrize("kind", ["classes", "dirichlet", "iid", "domains"])
def test_the_split_follows_the_seed(kind):
    one, same, other = (split(seed=seed, split=kind) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one.samples, same.samples, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one.samples, other.samples, strict=True))


@pytest.mark.parametrize("classes", [1, 2, 3, 10])
def test_classes_per_client(classes):
    answer = split(count=20, classes_per_client=classes)
    assert ((answer.counts > 0).sum(axis=1) == classes).all()
    holders = (answer.counts > 0).sum(axis=0)
    assert holders.tolist() == [2 * classes] * 10


def test_a_class_without_holder_is_left_out():
    answer = split(count=3, classes_per_client=2)
    assert sum(map(len, answer.samples)) == np.isin(LABELS, np.flatnonzero(answer.counts.sum(axis=0))).sum()
    assert (answer.counts.sum(axis=0) == 0).sum() == 4


def test_dirichlet_is_uneven_for_small_alpha_and_even_for_large():
    def spread(alpha):
        return split(split="dirichlet", count=20, alpha=alpha).shares().max(axis=1).mean()

    assert spread(0.05) > 0.6
    assert spread(1000) < 0.2


def test_dirichlet_keeps_the_least_number_of_samples():
    answer = split(split="dirichlet", count=50, alpha=0.05, min_samples=20)
    assert min(map(len, answer.samples)) >= 20


def test_domains_have_disjoint_classes_and_equal_numbers_of_clients():
    answer = split(split="domains", count=20, domains=5)
    assert np.bincount(answer.groups).tolist() == [4] * 5
    assert answer.groups.tolist() != sorted(answer.groups)
    classes = [set(np.flatnonzero(answer.counts[answer.groups == d].sum(axis=0))) for d in range(5)]
    assert all(len(c) == 2 for c in classes)
    assert set.union(*classes) == set(range(10))


def test_iid_is_even():
    sizes = [len(part) for part in split(split="iid", count=7).samples]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 1001, "min_samples": 2}, "clients.count = 1001"),
        ({"classes_per_client": 11}, "clients.classes_per_client = 11: must be <= 10"),
        ({"split": "domains", "domains": 11}, "clients.domains = 11: must be from 1 to 10"),
        ({"split": "domains", "domains": 6, "count": 5}, "clients.domains = 6: must be from 1 to 5"),
        ({"split": "iid", "count": 30, "min_samples": 67}, "needs more than 2000 samples"),
        ({"split": "classes", "count": 60, "min_samples": 33}, "min_samples = 33.*leaves client"),
    ],
)
def test_impossible_splits_name_the_setting(options, words):
    with pytest.raises(InputError, match=words):
        split(**options)
