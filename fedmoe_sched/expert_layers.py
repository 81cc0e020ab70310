"""Layers of experts: how many experts of each layer of the model a client trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedmoe_sched._arrays import BoolArray, IntArray, as_array, as_count_matrix, as_counts, read_only, vector_size
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError

__all__ = ["ExpertLayers"]


@dataclass(frozen=True, eq=False, repr=False)
class ExpertLayers:
    """To which layer of the model each expert belongs, and how many of each layer a client trains.

    ``layer_min_ig <= sum over experts j of layer g of x_ij <= layer_max_ig`` for every client i and layer g.

    Parameters
    ----------
    layer_of : array_like of int, shape (m,)
        Layer 0 .. G - 1 of each expert, in any order; every layer has at least one.
    layer_min : array_like of int, shape (G,) or (n, G), or int, default 0
        The fewest experts of each layer that a client must train, the same for all clients or by client.
    layer_max : array_like of int, shape (G,) or (n, G), or int, optional
        The most experts of each layer that a client may train; None is no limit (all experts of the layer).

    Attributes
    ----------
    layer_of : ndarray, shape (m,), int64
    layer_min, layer_max : ndarray, shape (G,) or (n, G), int64

    Raises
    ------
    InputError
        A wrong shape or value, a layer without experts, or a minimum above its maximum; the message names
        argument, position and value.

    Examples
    --------
    >>> ExpertLayers([0, 0, 0, 1, 1], layer_min=1, layer_max=[2, 1])
    ExpertLayers(5 experts in 2 layers, of each layer 1..[1-2])
    """

    layer_of: IntArray
    layer_min: IntArray
    layer_max: IntArray

    def __init__(self, layer_of: Any, layer_min: Any = 0, layer_max: Any = None) -> None:
        layers = as_counts("layer_of", layer_of, vector_size("layer_of", layer_of), "one per expert")
        _refuse_gaps(layers)
        sizes = np.bincount(layers)
        fields = {
            "layer_of": layers,
            "layer_min": _bounds("layer_min", layer_min, len(sizes)),
            "layer_max": _bounds("layer_max", sizes if layer_max is None else layer_max, len(sizes)),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, read_only(value))
        _refuse_different_lengths(self.layer_min, self.layer_max)
        _refuse_crossed(self.layer_min, self.layer_max)

    @property
    def n_experts(self) -> int:
        """The number of experts m."""
        return len(self.layer_of)

    @property
    def n_layers(self) -> int:
        """The number of layers G."""
        return int(self.layer_min.shape[-1])

    @property
    def n_clients(self) -> int | None:
        """The number of clients that have bounds of their own; None where bounds are the same for all."""
        return next((len(bounds) for bounds in (self.layer_min, self.layer_max) if bounds.ndim == 2), None)

    @cached_property
    def members(self) -> tuple[IntArray, ...]:
        """The experts of each layer, ascending."""
        return tuple(np.flatnonzero(self.layer_of == layer) for layer in range(self.n_layers))

    def bounds_of(self, clients: slice | IntArray, size: int) -> tuple[IntArray, IntArray]:
        """Return layer_min and layer_max of some clients; each of shape (size, G), int64, perhaps read-only.

        Parameters
        ----------
        clients : slice or ndarray of int
        size : int
            How many clients they are.
        """
        low, high = (
            bounds[clients] if bounds.ndim == 2 else np.broadcast_to(bounds, (size, len(bounds)))
            for bounds in (self.layer_min, self.layer_max)
        )
        return low, high

    def restrict(self, clients: slice | IntArray, experts: slice | IntArray = slice(None)) -> ExpertLayers:
        """Return the layers of some clients and experts, in this order; layers without experts are left out."""
        kept, layer_of = np.unique(self.layer_of[experts], return_inverse=True)
        low, high = (
            bounds[clients][:, kept] if bounds.ndim == 2 else bounds[kept]
            for bounds in (self.layer_min, self.layer_max)
        )
        return ExpertLayers(layer_of, low, high)

    def count(self, chosen: BoolArray) -> IntArray:
        """Count the chosen experts of each layer, row by row; (rows, m) bool gives (rows, G) int64."""
        counts = np.empty((len(chosen), self.n_layers), dtype=np.int64)
        for layer, experts in enumerate(self.members):
            np.sum(chosen[:, experts], axis=1, dtype=np.int64, out=counts[:, layer])
        return counts

    def count_pairs(self, assignment: Assignment, block: slice) -> IntArray:
        """Count the experts of each layer that some clients have; shape (clients, G), int64."""
        rows, experts = assignment.pairs_of(block)
        size = block.stop - block.start
        cells = rows * self.n_layers + self.layer_of[experts]
        return np.bincount(cells, minlength=size * self.n_layers).reshape(size, self.n_layers)

    def __repr__(self) -> str:
        bounds = f"{_span(self.layer_min)}..{_span(self.layer_max)}"
        return f"ExpertLayers({self.n_experts} experts in {self.n_layers} layers, of each layer {bounds})"


def _span(bounds: IntArray) -> str:
    low, high = int(bounds.min()), int(bounds.max())
    return str(low) if low == high else f"[{low}-{high}]"


def _bounds(name: str, value: Any, n_layers: int) -> IntArray:
    if as_array(name, value).ndim == 2:
        return as_count_matrix(name, value, n_layers, "clients, layers")
    return as_counts(name, value, n_layers, "one per layer, or one row of them per client")


def _refuse_gaps(layers: IntArray) -> None:
    if not len(layers):
        msg = "layer_of: has no entries, needs at least one expert"
        raise InputError(msg)
    if int(layers.max()) >= len(layers):
        at = int(np.argmax(layers))
        msg = f"layer_of[{at}] = {layers[at]}: must be below the number of experts, {len(layers)}"
        raise InputError(msg)
    empty = np.flatnonzero(np.bincount(layers) == 0)
    if len(empty):
        msg = f"layer_of: has no expert in layer {empty[0]}, but some in layer {layers.max()}"
        raise InputError(msg)


def _refuse_different_lengths(low: IntArray, high: IntArray) -> None:
    if low.ndim == high.ndim == 2 and len(low) != len(high):
        msg = f"layer_max: has {len(high)} rows, layer_min has {len(low)}"
        raise InputError(msg)


def _refuse_crossed(low: IntArray, high: IntArray) -> None:
    crossed = low > high
    if not crossed.any():
        return
    where = np.unravel_index(int(np.argmax(crossed)), crossed.shape)
    names = []
    for name, bounds in (("layer_min", low), ("layer_max", high)):
        place = where[-bounds.ndim :]
        names.append(f"{name}[{', '.join(str(int(at)) for at in place)}] = {bounds[place]}")
    msg = f"{names[0]}: must be <= {names[1]}"
    raise InputError(msg)
