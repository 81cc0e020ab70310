"""Rows, or nodes, of the layers of every client, for backends that take a constraint matrix or a network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._layers import open_layers
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solvers._matrix import Bounds, Pairs

if TYPE_CHECKING:
    from scipy.sparse import csr_array

__all__ = ["ClientSide", "LayerRows", "client_side", "layer_rows"]


class LayerRows(NamedTuple):
    """One row per client and layer, client by client.

    ``rows`` has the row of each pair, shape (pairs,); ``low`` and ``high`` the fewest and most pairs of each row,
    shape (n * G,); all int64. Where there are too few eligible pairs, both bounds are one more than there are.
    """

    rows: npt.NDArray[np.int64]
    low: npt.NDArray[np.int64]
    high: npt.NDArray[np.int64]
    n_pairs: int

    def matrix(self) -> csr_array[Any, Any]:
        """Return the rows as a sparse matrix; shape (rows, pairs)."""
        from scipy.sparse import csr_array

        columns = np.arange(len(self.rows))
        return csr_array((np.ones(len(columns)), (self.rows, columns)), shape=(len(self.low), self.n_pairs))


def layer_rows(problem: AssignmentProblem, pairs: Pairs) -> LayerRows:
    """Return the rows of the layers; none where the problem has no layers."""
    if problem.layers is None:
        none = np.zeros(0, dtype=np.int64)
        return LayerRows(none, none, none, len(pairs.clients))
    n, n_layers = problem.n_clients, problem.layers.n_layers
    low = np.empty((n, n_layers), dtype=np.int64)
    high = np.empty_like(low)
    for block in problem.blocks():
        wanted, open_ = open_layers(problem, block)
        low[block] = np.minimum(wanted, open_ + 1)
        high[block] = np.maximum(low[block], open_)
    rows = pairs.clients * n_layers + problem.layers.layer_of[pairs.experts]
    return LayerRows(rows, low.reshape(-1), high.reshape(-1), len(rows))


class ClientSide(NamedTuple):
    """The part of a network around the clients: where their pairs leave from, and what comes to them.

    Clients are nodes 0 .. n - 1, experts n .. n + m - 1, then comes the hub; with layers one node per client and
    layer follows, client by client. Lower bounds are supplies. All int64.
    """

    tails: npt.NDArray[np.int64]  # of each pair, where it leaves from
    room: npt.NDArray[np.int64]  # of each client, how much beyond its supply it may get from the hub
    supply: npt.NDArray[np.int64]  # of each client
    owners: npt.NDArray[np.int64]  # of each layer node, its client
    layer_room: npt.NDArray[np.int64]  # of each layer node, how much beyond its supply it may get from its client
    layer_supply: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        """What all clients must take."""
        return int(self.supply.sum() + self.layer_supply.sum())


def client_side(problem: AssignmentProblem, pairs: Pairs, bounds: Bounds) -> ClientSide | None:
    """Return the network around the clients; None if some client cannot keep its own bounds in all layers."""
    none = np.zeros(0, dtype=np.int64)
    if problem.layers is None:
        room = bounds.client_max - bounds.client_min
        return ClientSide(pairs.clients, room, bounds.client_min, none, none, none)
    if problem.overstretched.any():
        return None
    n, m = problem.shape
    rows, low, high, _ = layer_rows(problem, pairs)
    fewest = low.reshape(n, -1).sum(axis=1)
    least = np.maximum(bounds.client_min, fewest)
    owners = np.repeat(np.arange(n), len(low) // n)
    return ClientSide(n + m + 1 + rows, bounds.client_max - least, least - fewest, owners, high - low, low)
