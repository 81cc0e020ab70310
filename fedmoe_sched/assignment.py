"""The bare answer of a backend: which (client, expert) pairs are chosen, in compressed-row layout."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, IntArray
from fedmoe_sched.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["Assignment"]


@dataclass(frozen=True, eq=False)
class Assignment:
    """Chosen pairs of n clients and m experts, client by client.

    Parameters
    ----------
    indptr : ndarray, shape (n + 1,), int64
        ``indices[indptr[i]:indptr[i + 1]]`` are the experts of client i.
    indices : ndarray, shape (number of pairs,), int64
        Expert numbers, ascending within each client.
    n_experts : int
        m.
    """

    indptr: IntArray
    indices: IntArray
    n_experts: int

    @classmethod
    def from_pairs(cls, clients: npt.ArrayLike, experts: npt.ArrayLike, shape: tuple[int, int]) -> Assignment:
        """Build from parallel arrays of client and expert numbers, in any order.

        Raises
        ------
        InputError
            A pair lies outside `shape` or occurs twice.
        """
        n, m = shape
        rows = np.asarray(clients, dtype=np.int64)
        columns = np.asarray(experts, dtype=np.int64)
        outside = (rows < 0) | (rows >= n) | (columns < 0) | (columns >= m)
        if outside.any():
            at = int(np.argmax(outside))
            msg = f"pair[{at}] = ({rows[at]}, {columns[at]}): must lie within {n} clients x {m} experts"
            raise InputError(msg)
        keys = np.sort(rows * m + columns)
        twice = keys[1:] == keys[:-1]
        if twice.any():
            key = int(keys[int(np.argmax(twice))])
            msg = f"pair ({key // m}, {key % m}): occurs twice"
            raise InputError(msg)
        rows, columns = np.divmod(keys, m)
        indptr = np.zeros(n + 1, dtype=np.int64)
        np.cumsum(np.bincount(rows, minlength=n), out=indptr[1:])
        return cls(indptr, columns, m)

    @classmethod
    def from_mask(cls, mask: BoolArray) -> Assignment:
        """Build from a boolean matrix of shape (n, m)."""
        return cls.from_mask_blocks([mask], mask.shape[1])

    @classmethod
    def from_mask_blocks(cls, masks: Iterable[BoolArray], n_experts: int) -> Assignment:
        """Build from boolean matrices of some clients each, in order, of which only one need exist at a time.

        Parameters
        ----------
        masks : iterable of ndarray, each of shape (some clients, m)
        n_experts : int
            m.
        """
        counts, indices = [np.zeros(1, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        for mask in masks:
            counts.append(np.count_nonzero(mask, axis=1))
            indices.append(np.nonzero(mask)[1])
        indptr = np.concatenate(counts, dtype=np.int64)
        return cls(np.cumsum(indptr, out=indptr), np.concatenate(indices, dtype=np.int64), n_experts)

    @property
    def n_clients(self) -> int:
        """The number of clients n."""
        return len(self.indptr) - 1

    @property
    def counts(self) -> IntArray:
        """Experts of each client; shape (n,), int64; computed anew each time, to be small at rest."""
        return np.diff(self.indptr)

    @cached_property
    def loads(self) -> IntArray:
        """Clients of each expert; shape (m,), int64."""
        return np.bincount(self.indices, minlength=self.n_experts).astype(np.int64, copy=False)

    @property
    def clients(self) -> IntArray:
        """Client number of each chosen pair, parallel to `indices`; shape (number of pairs,), int64; not kept."""
        return np.repeat(np.arange(self.n_clients, dtype=np.int64), self.counts)

    def clients_of(self, expert: int) -> IntArray:
        """Return the numbers of the clients that one expert gets, ascending; shape (load,), int64."""
        at = np.flatnonzero(self.indices == expert)
        return np.searchsorted(self.indptr, at, side="right") - 1

    def pairs_of(self, block: slice) -> tuple[IntArray, IntArray]:
        """List the chosen pairs of some clients.

        Parameters
        ----------
        block : slice
            Clients ``block.start`` to ``block.stop - 1``.

        Returns
        -------
        rows, experts : ndarray, each of shape (pairs,), int64
            Client number less ``block.start``, and expert number.
        """
        ends = self.indptr[block.start : block.stop + 1]
        rows = np.repeat(np.arange(len(ends) - 1, dtype=np.int64), np.diff(ends))
        return rows, self.indices[ends[0] : ends[-1]]

    def mask(self) -> BoolArray:
        """Return the assignment as a boolean matrix of shape (n, m)."""
        mask = np.zeros((self.n_clients, self.n_experts), dtype=np.bool_)
        mask[self.clients, self.indices] = True
        return mask

    def to_csr(self) -> csr_array[Any, Any]:
        """Return the assignment as a boolean SciPy CSR array of shape (n, m)."""
        from scipy.sparse import csr_array  # a fifth of a second to import

        data = np.ones(len(self.indices), dtype=np.bool_)
        return csr_array((data, self.indices, self.indptr), shape=(self.n_clients, self.n_experts))
