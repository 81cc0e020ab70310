"""The round problem: validated, frozen arrays (docs/problem.md has the mathematics)."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from fedmoe_sched._arrays import (
    BoolArray,
    FloatArray,
    IntArray,
    KnownMatrix,
    as_bool_matrix,
    as_counts,
    as_matrix,
    read_only,
    row_blocks,
    split_labels,
)
from fedmoe_sched._layers import open_layers
from fedmoe_sched._mapped import release_rows
from fedmoe_sched._problem_parts import (
    checked_budgets,
    checked_labels,
    checked_layers,
    checked_part,
    checked_penalty,
    part_of,
    refuse_crossed,
    span,
)
from fedmoe_sched.errors import InputError
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.resource_budget import ResourceBudget

__all__ = ["AssignmentProblem"]


@dataclass(frozen=True, eq=False, init=False, repr=False)
class AssignmentProblem:
    """Which client trains which experts in one round, as a capacity-constrained assignment problem.

    Maximise ``sum_ij d_ij x_ij - sum_j phi_j(load_j)`` over binary x, with ``load_j = sum_i x_ij``, subject to
    ``min_experts_i <= sum_j x_ij <= capacity_i`` for every client i,
    ``load_min_j <= load_j <= load_max_j`` for every expert j,
    ``layer_min_ig <= sum_{j in layer g} x_ij <= layer_max_ig`` for every client i and layer g,
    ``sum_j size_rij x_ij <= budget_ri`` for every client i and resource r,
    and ``x_ij = 0`` where the pair is not eligible. Without resources the constraint matrix is totally unimodular;
    with them this is a generalised assignment problem.

    Parameters
    ----------
    desirability : array_like, shape (n, m)
        Score of each (client, expert) pair; any finite numbers, negative ones too. float16, float32 and float64
        arrays are kept without a copy, memory maps too: those are read in blocks and never loaded whole.
        Everything else becomes float64; all arithmetic is float64. A pandas DataFrame gives labels.
    capacity : array_like of int, shape (n,), or int
        The most experts each client may train this round.
    min_experts : array_like of int, shape (n,), or int, default 0
        The fewest experts each client must train.
    load_min : array_like of int, shape (m,), or int, default 0
        The fewest clients each expert must get.
    load_max : array_like of int, shape (m,), or int, optional
        The most clients each expert may get; None is no limit (n).
    eligible : array_like of bool, shape (n, m), optional
        Pairs that are possible at all; None is all of them. Arrays of bool, memory maps too, are kept without a
        copy.
    load_penalty : LoadPenalty, optional
        The convex phi_j, in units of desirability; None is no penalty.
    budgets : sequence of ResourceBudget, default ()
        What clients have of memory, seconds, ..., and what experts take of it.
    layers : ExpertLayers, optional
        Which experts are in which layer, and how many of each layer clients train; None is one layer of all.
    client_labels, expert_labels : sequence of hashable, optional
        Names for the answer; by default those of the DataFrame, else none.

    Attributes
    ----------
    desirability : ndarray, shape (n, m), float16, float32 or float64
    capacity, min_experts : ndarray, shape (n,), int64
    load_min, load_max : ndarray, shape (m,), int64
    eligible : ndarray, shape (n, m), bool, or None
    load_penalty : LoadPenalty or None
    budgets : tuple of ResourceBudget
    layers : ExpertLayers or None
    client_labels, expert_labels : tuple of hashable, or None

    Raises
    ------
    InputError
        A wrong shape, type, sign or value; the message names argument, position and value.

    Examples
    --------
    >>> problem = AssignmentProblem([[3.0, 1.0], [2.0, 0.5]], capacity=[1, 1], load_max=1)
    >>> problem.n_clients, problem.n_experts
    (2, 2)
    """

    desirability: FloatArray
    capacity: IntArray
    min_experts: IntArray
    load_min: IntArray
    load_max: IntArray
    eligible: BoolArray | None
    load_penalty: LoadPenalty | None
    budgets: tuple[ResourceBudget, ...]
    layers: ExpertLayers | None
    client_labels: tuple[Hashable, ...] | None
    expert_labels: tuple[Hashable, ...] | None

    def __init__(
        self,
        desirability: Any,
        capacity: Any,
        *,
        min_experts: Any = 0,
        load_min: Any = 0,
        load_max: Any = None,
        eligible: Any = None,
        load_penalty: LoadPenalty | None = None,
        budgets: Sequence[ResourceBudget] = (),
        layers: ExpertLayers | None = None,
        client_labels: Sequence[Hashable] | None = None,
        expert_labels: Sequence[Hashable] | None = None,
    ) -> None:
        bare = split_labels(desirability)
        scores = as_matrix("desirability", bare.values)
        n, m = scores.shape
        if load_max is None:
            load_max = np.full(m, n, dtype=np.int64)
        fields: dict[str, Any] = {
            "desirability": read_only(scores),
            "capacity": read_only(as_counts("capacity", capacity, n, "one per client")),
            "min_experts": read_only(as_counts("min_experts", min_experts, n, "one per client")),
            "load_min": read_only(as_counts("load_min", load_min, m, "one per expert")),
            "load_max": read_only(as_counts("load_max", load_max, m, "one per expert")),
            "eligible": None if eligible is None else read_only(as_bool_matrix("eligible", eligible, (n, m))),
            "load_penalty": checked_penalty(load_penalty, m),
            "budgets": checked_budgets(budgets, (n, m)),
            "layers": checked_layers(layers, (n, m)),
            "client_labels": checked_labels("client_labels", client_labels, bare.rows, n),
            "expert_labels": checked_labels("expert_labels", expert_labels, bare.columns, m),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        refuse_crossed("min_experts", self.min_experts, "capacity", self.capacity)
        refuse_crossed("load_min", self.load_min, "load_max", self.load_max)

    @property
    def n_clients(self) -> int:
        """The number of clients n."""
        return int(self.desirability.shape[0])

    @property
    def n_experts(self) -> int:
        """The number of experts m."""
        return int(self.desirability.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        return self.n_clients, self.n_experts

    @cached_property
    def eligible_counts(self) -> IntArray:
        """Eligible experts of each client; shape (n,), int64, read-only."""
        if self.eligible is None:
            return np.broadcast_to(np.int64(self.n_experts), self.n_clients)
        return read_only(self._count_eligible())

    @cached_property
    def slots(self) -> IntArray:
        """Experts each client can take; shape (n,), int64, read-only.

        ``min(capacity, eligible_counts)``; with layers no more than the eligible ones within every ``layer_max``.
        """
        if self.layers is not None:
            return read_only(np.minimum(self.capacity, self._layer_room[0]))
        if self.eligible is not None:
            slots = self._count_eligible()
            return read_only(np.minimum(self.capacity, slots, out=slots))
        if int(self.capacity.max()) <= self.n_experts:
            return self.capacity
        return read_only(np.minimum(self.capacity, self.n_experts))

    @cached_property
    def demands(self) -> IntArray:
        """Experts each client must take: ``min_experts``, or all ``layer_min`` together if they are more.

        Shape (n,), int64, read-only.
        """
        if self.layers is None:
            return self.min_experts
        minima = self.layers.layer_min.sum(axis=-1)
        return read_only(np.maximum(self.min_experts, minima))

    @cached_property
    def overstretched(self) -> BoolArray:
        """Clients that cannot keep their own bounds, whatever the others do; shape (n,), bool, read-only."""
        beyond = self.demands > self.slots
        if self.layers is not None:
            beyond |= self._layer_room[1]
        return read_only(beyond)

    @cached_property
    def _layer_room(self) -> tuple[IntArray, BoolArray]:
        """Eligible experts of each client within every layer_max; whether some layer has too few for layer_min."""
        room, short = np.empty(self.n_clients, dtype=np.int64), np.empty(self.n_clients, dtype=np.bool_)
        for block in self.blocks():
            low, high = open_layers(self, block)
            np.sum(high, axis=1, out=room[block])
            np.any(low > high, axis=1, out=short[block])
        return room, short

    def _count_eligible(self) -> IntArray:
        counts = np.empty(self.n_clients, dtype=np.int64)
        for block in self.blocks():
            np.sum(self.eligible[block], axis=1, dtype=np.int64, out=counts[block])  # type: ignore[index]
        return counts

    @cached_property
    def largest_score(self) -> float:
        """The largest absolute desirability: what rounding errors are relative to."""
        largest = 0.0
        for block in self.blocks():
            part = self.desirability[block]
            largest = max(largest, float(part.max()), -float(part.min()))
        return largest

    @property
    def has_load_bounds(self) -> bool:
        """Whether some load bound could exclude an assignment."""
        return bool((self.load_min > 0).any() or (self.load_max < self.n_clients).any())

    @property
    def is_separable(self) -> bool:
        """Whether clients do not compete, and choose by rank: no load bound, load penalty or budget matters."""
        return self.load_penalty is None and not self.has_load_bounds and not self.budgets

    def replace(self, **changes: Any) -> AssignmentProblem:
        """Return a problem with some arguments changed (the names are those of the constructor)."""
        arguments: dict[str, Any] = {
            "desirability": KnownMatrix(self.desirability),
            "capacity": self.capacity,
            "min_experts": self.min_experts,
            "load_min": self.load_min,
            "load_max": self.load_max,
            "eligible": self.eligible,
            "load_penalty": self.load_penalty,
            "budgets": self.budgets,
            "layers": self.layers,
            "client_labels": self.client_labels,
            "expert_labels": self.expert_labels,
        }
        unknown = sorted(set(changes) - set(arguments))
        if unknown:
            msg = f"replace: no argument called {unknown[0]!r}; there are {', '.join(arguments)}"
            raise InputError(msg)
        return AssignmentProblem(**(arguments | changes))

    def restrict(self, clients: Any = None, experts: Any = None, **changes: Any) -> AssignmentProblem:
        """Return the problem of some clients and experts, with all that belongs to them; bounds stay as they are.

        Parameters
        ----------
        clients, experts : array_like of int, optional
            Numbers, in any order; None is all. Neighbours give views of the matrices, and no copies.
        **changes
            Arguments to change at once, as in `replace`, of the new shape.

        Raises
        ------
        InputError
            A number is out of range or occurs twice, or a wrong change.

        Examples
        --------
        >>> problem = AssignmentProblem([[3.0, 1.0, 2.0], [2.0, 0.5, 1.0]], capacity=[1, 2], load_max=[1, 2, 2])
        >>> part = problem.restrict(experts=[2, 0])
        >>> part.desirability.tolist(), part.load_max.tolist()
        ([[2.0, 3.0], [1.0, 2.0]], [2, 1])
        """
        rows = checked_part("clients", clients, self.n_clients)
        columns = checked_part("experts", experts, self.n_experts)
        penalty, layers = self.load_penalty, self.layers
        parts = {
            "desirability": KnownMatrix(part_of(self.desirability, rows, columns)),
            "capacity": self.capacity[rows],
            "min_experts": self.min_experts[rows],
            "load_min": self.load_min[columns],
            "load_max": self.load_max[columns],
            "eligible": None if self.eligible is None else part_of(self.eligible, rows, columns),
            "load_penalty": penalty if penalty is None or experts is None else penalty.restrict(columns),
            "budgets": [resource.restrict(rows, columns) for resource in self.budgets],
            "layers": None if layers is None else layers.restrict(rows, columns),
            "client_labels": _taken(self.client_labels, rows),
            "expert_labels": _taken(self.expert_labels, columns),
        }
        return self.replace(**(parts | changes))

    def blocks(self) -> Iterator[slice]:
        """Slices of clients small enough for a float64 temporary of a block to stay around 4 MiB.

        Where the problem's matrices are memory maps, the pages of a block are handed back when the next one is
        asked for: a pass over all clients keeps little in memory.
        """
        for block in row_blocks(self.shape):
            yield block
            self.release(block)

    def release(self, block: slice) -> None:
        """Hand back the memory of some clients' rows where desirability or eligibility is a memory map.

        Changes no value, and does nothing for arrays in memory. Threads may call it at any time.

        Parameters
        ----------
        block : slice
            Clients ``block.start`` to ``block.stop - 1``.
        """
        release_rows(self.desirability, block.start, block.stop)
        release_rows(self.eligible, block.start, block.stop)

    def client_name(self, client: int) -> Hashable:
        """Return the label of client number `client`, or the number where there are no labels."""
        return client if self.client_labels is None else self.client_labels[client]

    def expert_name(self, expert: int) -> Hashable:
        """Return the label of expert number `expert`, or the number where there are no labels."""
        return expert if self.expert_labels is None else self.expert_labels[expert]

    def __repr__(self) -> str:
        n, m = self.shape
        penalty = "" if self.load_penalty is None else ", penalised"
        budgets = "".join(f", {resource.name} budgets" for resource in self.budgets)
        layers = "" if self.layers is None else f", {self.layers.n_layers} layers"
        return (
            f"AssignmentProblem({n} clients x {m} experts, {int(self.slots.sum())} slots, "
            f"load {span(self.load_min)}..{span(self.load_max)}{penalty}{budgets}{layers})"
        )


def _taken(labels: tuple[Hashable, ...] | None, part: slice | IntArray) -> tuple[Hashable, ...] | None:
    if labels is None:
        return None
    return labels[part] if isinstance(part, slice) else tuple(labels[at] for at in part.tolist())
