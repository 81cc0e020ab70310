"""Seeded splits of the training samples over clients, from IID to one domain per client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.config import ClientsConfig

__all__ = ["Partition", "partition", "split_by_classes", "split_by_domain", "split_dirichlet", "split_iid"]


@dataclass(frozen=True)
class Partition:
    """Which client holds which samples.

    Parameters
    ----------
    samples : tuple of ndarray of int64
        Ascending sample numbers of every client; disjoint.
    counts : ndarray, shape (n, classes), int64
        Samples of every client by class.
    groups : ndarray, shape (n,), int64
        Clients with alike data: the domain where there are domains, or else the client's most frequent class.
    """

    samples: tuple[IntArray, ...]
    counts: IntArray
    groups: IntArray

    def shares(self) -> npt.NDArray[np.float64]:
        """Class shares of every client; shape (n, classes), rows sum to 1."""
        shares: npt.NDArray[np.float64] = self.counts / self.counts.sum(axis=1, keepdims=True)
        return shares


def partition(labels: IntArray, config: ClientsConfig, *, n_classes: int, seed: int) -> Partition:
    """Deal samples out as the config says.

    Parameters
    ----------
    labels : ndarray, shape (samples,), int64
    config : ClientsConfig
    n_classes : int
    seed : int

    Raises
    ------
    InputError
        The split is impossible: too few samples for so many clients, or more classes asked than there are.
    """
    n, groups = config.count, None
    if n * config.min_samples > len(labels):
        msg = f"clients.count = {n}: with min_samples = {config.min_samples} needs more than {len(labels)} samples"
        raise InputError(msg)
    rng = np.random.default_rng([seed, 0x5EED])
    if config.split == "iid":
        parts = split_iid(len(labels), n, rng)
    elif config.split == "dirichlet":
        parts = split_dirichlet(labels, n, config.alpha, config.min_samples, rng)
    elif config.split == "classes":
        parts = split_by_classes(labels, n, config.classes_per_client, n_classes, rng)
    else:
        parts, groups = split_by_domain(labels, n, config.domains, n_classes, rng)
    smallest = min(range(n), key=lambda i: len(parts[i]))
    if len(parts[smallest]) < config.min_samples:
        msg = (
            f"clients.min_samples = {config.min_samples}: the split {config.split!r} leaves client {smallest} "
            f"only {len(parts[smallest])} of {len(labels)} samples; use fewer clients"
        )
        raise InputError(msg)
    counts = np.stack([np.bincount(labels[part], minlength=n_classes) for part in parts]).astype(np.int64)
    if config.shift != "none":
        groups = _spread_groups(n, config.domains, rng)
    if groups is None:
        groups = counts.argmax(axis=1).astype(np.int64)
    return Partition(tuple(np.sort(part) for part in parts), counts, groups)


def split_iid(n_samples: int, n_clients: int, rng: np.random.Generator) -> list[IntArray]:
    """Shuffle and deal out evenly."""
    return [part.astype(np.int64) for part in np.array_split(rng.permutation(n_samples), n_clients)]


def split_by_classes(
    labels: IntArray, n_clients: int, classes_per_client: int, n_classes: int, rng: np.random.Generator
) -> list[IntArray]:
    """Give every client samples of only some classes ("pathological" non-IID split).

    Classes are handed out as evenly as can be: whole shuffled decks of all classes one after the other, so that
    every class has holders as soon as there are enough clients. The samples of a class are divided evenly over its
    holders; those of a class without holder stay unused.

    Raises
    ------
    InputError
        More classes per client than there are.
    """
    if classes_per_client > n_classes:
        msg = f"clients.classes_per_client = {classes_per_client}: must be <= {n_classes}, the classes of the data"
        raise InputError(msg)
    holders: list[list[int]] = [[] for _ in range(n_classes)]
    deck: list[int] = []
    for client in range(n_clients):
        mine: list[int] = []
        while len(mine) < classes_per_client:
            fresh = [c for c in deck if c not in mine]
            if not fresh:
                deck += rng.permutation(n_classes).tolist()
                continue
            deck.remove(fresh[0])
            mine.append(fresh[0])
        for label in mine:
            holders[label].append(client)
    return _deal_by_class(labels, holders, n_clients, rng)


def split_by_domain(
    labels: IntArray, n_clients: int, domains: int, n_classes: int, rng: np.random.Generator
) -> tuple[list[IntArray], IntArray]:
    """Divide the classes into disjoint domains and give every client data of one domain.

    This is the situation of figure 3 of Chen et al. 2025 (arXiv 2507.05685), as we read it: every client's data
    suit one expert.

    Returns
    -------
    parts : list of ndarray
    groups : ndarray, shape (n,), int64
        Domain of every client: groups of nearly equal size, spread over the client numbers at random, so that no
        policy can hit upon them by going through the clients in order.
    """
    if not 1 <= domains <= min(n_classes, n_clients):
        msg = f"clients.domains = {domains}: must be from 1 to {min(n_classes, n_clients)} (classes, clients)"
        raise InputError(msg)
    groups = _spread_groups(n_clients, domains, rng)
    domain_of_class = np.empty(n_classes, dtype=np.int64)
    domain_of_class[rng.permutation(n_classes)] = np.arange(n_classes) % domains
    holders = [np.flatnonzero(groups == domain_of_class[label]).tolist() for label in range(n_classes)]
    return _deal_by_class(labels, holders, n_clients, rng), groups


def _spread_groups(n_clients: int, groups: int, rng: np.random.Generator) -> IntArray:
    numbers: IntArray = rng.permutation(np.arange(n_clients, dtype=np.int64) % groups)
    return numbers


def split_dirichlet(
    labels: IntArray, n_clients: int, alpha: float, min_samples: int, rng: np.random.Generator
) -> list[IntArray]:
    """Divide each class over the clients by shares drawn from a Dirichlet distribution.

    As in Hsu, Qi and Brown 2019 (arXiv 1909.06335). Clients that end up below `min_samples` are filled up with
    samples of those that have the most.

    Parameters
    ----------
    labels : ndarray, shape (samples,), int64
    n_clients : int
    alpha : float
        Concentration > 0.
    min_samples : int
        ``n_clients * min_samples`` must not exceed the samples.
    rng : Generator
    """
    parts: list[list[int]] = [[] for _ in range(n_clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        ends = (np.cumsum(rng.dirichlet(np.full(n_clients, alpha))) * len(members)).round().astype(int)
        for part, chosen in zip(parts, np.split(members, ends[:-1]), strict=True):
            part.extend(chosen.tolist())
    for part in parts:
        while len(part) < min_samples:
            richest = max(parts, key=len)
            part.append(richest.pop(int(rng.integers(len(richest)))))
    return [np.array(part, dtype=np.int64) for part in parts]


def _deal_by_class(
    labels: IntArray, holders: Sequence[Sequence[int]], n_clients: int, rng: np.random.Generator
) -> list[IntArray]:
    """Divide the samples of each class evenly over its holders."""
    parts: list[list[IntArray]] = [[np.empty(0, dtype=np.int64)] for _ in range(n_clients)]
    for label, clients in enumerate(holders):
        members = rng.permutation(np.flatnonzero(labels == label))
        if clients:
            for client, chosen in zip(clients, np.array_split(members, len(clients)), strict=True):
                parts[client].append(chosen.astype(np.int64))
    return [np.concatenate(part) for part in parts]
