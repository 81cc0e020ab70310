"""Deal the places of clients out to experts: a maximum flow for many clients and few experts.

Clients with the same bounds and the same eligible experts are interchangeable and form a group. The flow from the
groups to the experts is kept as a table, one row per expert and one for the slots that stay unused, and improved
along shortest paths in the graph of these m + 1 nodes, whose arc a -> b stands for all groups that can give up a
place at a for one at b. A path moves as many places at once as all its arcs allow, whoever they belong to: it is
the method of Edmonds and Karp on the residual network (Ahuja, Magnanti and Orlin, *Network Flows*, section 7.2)
with the groups contracted, and it ends at a cut just so.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, IntArray, row_blocks
from fedmoe_sched.problem import AssignmentProblem

__all__ = [
    "Cut",
    "Groups",
    "Table",
    "alike_clients",
    "deal",
    "deal_loads",
    "distinct_rows",
    "first_open",
    "group_clients",
    "pack_open",
    "rank_in_group",
]

_ENDLESS = np.iinfo(np.int64).max
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplying by it loses nothing


@dataclass(frozen=True, eq=False)
class Groups:
    """Interchangeable clients; g groups.

    Parameters
    ----------
    member : ndarray, shape (n,), int64
        Group of each client.
    size, least, most : ndarray, shape (g,), int64
        Number of clients, and the fewest and most experts of each of them.
    open : ndarray, shape (g, m), bool
        Eligible experts.
    """

    member: IntArray
    size: IntArray
    least: IntArray
    most: IntArray
    open: BoolArray

    def table(self) -> Table:
        """Return the flow to start from."""
        return Table(self)


def group_clients(problem: AssignmentProblem) -> Groups:
    """Find the clients that differ in neither bounds nor eligible experts.

    ``least`` is at most m + 1, which is as impossible as anything larger, and ``most`` is never below it.
    """
    m = problem.n_experts
    least = np.minimum(problem.min_experts, m + 1)
    bounds = least * (m + 1) + problem.slots
    if problem.eligible is None:
        size = np.bincount(bounds)
        kinds = np.flatnonzero(size)
        number = np.cumsum(size > 0) - 1
        few, many = np.divmod(kinds, m + 1)
        open_ = np.ones((len(kinds), m), dtype=np.bool_)
        return Groups(number[bounds], size[kinds], few, np.maximum(few, many), open_)
    first, member, size = distinct_rows(_as_words(problem, bounds))
    few, many = least[first], problem.slots[first]
    return Groups(member, size, few, np.maximum(few, many), problem.eligible[first])


def alike_clients(problem: AssignmentProblem) -> tuple[IntArray, IntArray, IntArray]:
    """Find the clients that differ in no bound of theirs, nor in eligible experts; budgets are not looked at.

    Bounds beyond all eligible experts count as alike, as far as they can be told apart from none at all.

    Returns
    -------
    first : ndarray, shape (g,), int64
        One client of each kind.
    member : ndarray, shape (n,), int64
        Kind of each client.
    size : ndarray, shape (g,), int64
    """
    n, m = problem.shape
    top = problem.eligible_counts
    bounds = [np.minimum(problem.min_experts, top + 1)[:, None], np.minimum(problem.capacity, top)[:, None]]
    if problem.layers is not None:
        # Without a stride they are the same for all clients.
        by_layer = problem.layers.bounds_of(slice(0, n), n)
        bounds += [np.minimum(part, m + 1) for part in by_layer if part.strides[0]]
    words = [np.hstack(bounds).astype(np.uint64)]
    if problem.eligible is not None:
        words.append(pack_open(problem))
    return distinct_rows(np.hstack(words))


def rank_in_group(member: IntArray) -> IntArray:
    """Return the number of each client within its group, in order; shape (n,), int64."""
    order = np.argsort(member, kind="stable")
    sorted_ = member[order]
    rank = np.empty_like(member)
    rank[order] = np.arange(len(member)) - np.searchsorted(sorted_, sorted_)
    return rank


def _as_words(problem: AssignmentProblem, bounds: IntArray) -> npt.NDArray[np.uint64]:
    """Put bounds and eligible experts of each client into a row of 64-bit words; shape (n, words)."""
    return np.hstack([bounds[:, None].astype(np.uint64), pack_open(problem)])


def pack_open(problem: AssignmentProblem) -> npt.NDArray[np.uint64]:
    """Put the eligible experts of each client into a row of 64-bit words; shape (n, words)."""
    n, m = problem.shape
    words = np.zeros((n, -(-m // 64)), dtype=np.uint64)
    bits = words.view(np.uint8)
    for block in problem.blocks():
        bits[block, : -(-m // 8)] = np.packbits(problem.eligible[block], axis=1)  # type: ignore[index]
    return words


def distinct_rows(words: npt.NDArray[np.uint64]) -> tuple[IntArray, IntArray, IntArray]:
    """Return a row of each kind, the kind of each row, and how many there are of each."""
    mixed = np.zeros(len(words), dtype=np.uint64)
    for column in words.T:
        mixed ^= column
        mixed *= _MIX
        mixed ^= mixed >> np.uint64(32)
    # Sorting one number per row is some ten times faster than sorting rows.
    _, first, member, size = np.unique(mixed, return_index=True, return_inverse=True, return_counts=True)
    if not all((column == column[first][member]).all() for column in words.T):  # two kinds share a number
        _, first, member, size = np.unique(
            words, axis=0, return_index=True, return_inverse=True, return_counts=True
        )
    return first, member.reshape(-1), size


@dataclass(frozen=True, eq=False)
class Cut:
    """Why loads cannot be brought into their bounds.

    Parameters
    ----------
    experts : ndarray, int64
        Experts that cannot be relieved (``overfull``), or cannot get more.
    groups : ndarray, shape (g,), bool
        Groups with a place at any of them.
    overfull : bool
        Whether these experts have too many places, or too few.
    """

    experts: IntArray
    groups: BoolArray
    overfull: bool


def deal(groups: Groups, load_min: IntArray, load_max: IntArray) -> Cut | None:
    """Try to deal the places out so that every load is within its bounds.

    Parameters
    ----------
    groups : Groups
        None of whose clients must take more experts than are open to it.
    load_min, load_max : ndarray, shape (m,), int64

    Returns
    -------
    Cut or None
        None: it can be done.
    """
    table = groups.table()
    for overfull, bounds in ((True, load_max), (False, load_min)):
        stuck = _approach(table, bounds, overfull=overfull)
        if stuck.any():
            return table.cut(stuck, overfull=overfull)
    return None


def deal_loads(
    groups: Groups, soft: tuple[IntArray, IntArray], hard: tuple[IntArray, IntArray]
) -> IntArray | None:
    """Find loads that keep the hard bounds and miss the soft ones by the fewest places in total, spread evenly.

    Parameters
    ----------
    groups : Groups
        None of whose clients must take more experts than are open to it.
    soft, hard : (ndarray, ndarray), each of shape (m,), int64
        Fewest and most clients of each expert; the soft bounds lie within the hard ones.

    Returns
    -------
    ndarray, shape (m,), int64, or None
        None: the hard bounds cannot be kept.
    """
    table = groups.table()
    sides = ((True, soft[1], hard[1]), (False, soft[0], hard[0]))
    for overfull, _, most in sides:
        if _approach(table, most, overfull=overfull).any():
            return None
    # What is left stuck then is the least there is: no path leads from a place too many, or from any place that
    # may be given up, to where it is missing, and the sum of the violations is convex in the loads.
    for overfull, wished, _ in sides:
        _approach(table, wished, overfull=overfull)
    for overfull, wished, most in sides:
        _even_out(table, wished, most, overfull=overfull)
    return table.loads


def _approach(table: Table, bounds: IntArray, *, overfull: bool) -> BoolArray:
    """Move places away from experts above their bounds (``overfull``), or to experts below them, while possible.

    Returns
    -------
    ndarray, shape (m + 1,), bool
        Nodes that nothing leads out of, or into, among them all experts that are still out of bounds. Moves
        between other nodes never change that: together they are one cut.
    """
    stuck = np.zeros(len(bounds) + 1, dtype=np.bool_)
    while True:
        spare = bounds - table.loads if overfull else table.loads - bounds
        wrong = np.where(stuck[:-1], 0, -spare)
        node = int(np.argmax(wrong))
        if wrong[node] <= 0:
            return stuck
        worth = np.minimum(np.append(spare, _ENDLESS), wrong[node])
        reached = table.move(node, worth, overfull=overfull)
        if reached is not None:
            stuck |= reached


def _even_out(table: Table, wished: IntArray, most: IntArray, *, overfull: bool) -> None:
    """Share what is beyond the wished bounds among the experts that can share it, none of them beyond `most`."""
    sign = 1 if overfull else -1
    done = np.zeros(len(wished), dtype=np.bool_)
    while True:
        beyond = sign * (table.loads - wished)
        node = int(np.argmax(np.where(done, 0, beyond)))
        if done[node] or beyond[node] < 2:
            return
        worth = np.minimum((beyond[node] - beyond) // 2, sign * (most - table.loads))
        done[node] = table.move(node, np.append(worth, 0), overfull=overfull) is not None


def _shortest_path(arcs: BoolArray, start: int, worth: IntArray) -> tuple[list[int], BoolArray]:
    """Find a shortest path from `start` to a node of positive worth, the one of most worth among the nearest.

    Returns
    -------
    path : list of int
        Nodes from `start` on; empty if there is no path.
    reached : ndarray, shape (nodes,), bool
    """
    parent = np.full(len(arcs), -1)
    reached = np.zeros(len(arcs), dtype=np.bool_)
    reached[start] = True
    front = np.array([start])
    while len(front):
        fresh = np.flatnonzero(arcs[front].any(axis=0) & ~reached)
        parent[fresh] = front[np.argmax(arcs[np.ix_(front, fresh)], axis=0)] if len(fresh) else -1
        reached[fresh] = True
        front = fresh
        if len(fresh) and worth[fresh].max() > 0:
            path = [int(fresh[np.argmax(worth[fresh])])]
            while path[-1] != start:
                path.append(int(parent[path[-1]]))
            return path[::-1], reached
    return [], reached


class Table:
    """How many places each group has at each expert; the last row counts slots that it leaves unused.

    Attributes
    ----------
    loads : ndarray, shape (m,), int64
    links : ndarray, shape (m + 1, m + 1), int64
        ``links[a, b]``: groups that have a place at a and could have one more at b.
    """

    def __init__(self, groups: Groups) -> None:
        g, m = groups.open.shape
        # Few groups have many members, or many groups have few: the smallest type keeps either table small.
        kind: np.dtype[Any] = np.min_scalar_type(int((groups.size * np.maximum(groups.most, 1)).max()))
        self._limit = np.empty((m + 1, g), dtype=kind)
        self._held = np.zeros((m + 1, g), dtype=kind)
        self._limit[m] = groups.size * (groups.most - groups.least)
        self.links = np.zeros((m + 1, m + 1), dtype=np.int64)
        for block in row_blocks((g, m)):
            size = groups.size[block].astype(kind)
            open_ = np.ascontiguousarray(groups.open[block].T)
            np.multiply(open_, size, out=self._limit[:m, block])
            # Each group starts at another expert, so that the loads come out roughly even.
            starts = np.arange(block.start, block.stop) % m
            np.multiply(self._first_places(groups, open_, starts, block), size, out=self._held[:m, block])
            self.links += self._links_of(block)
        self.loads: IntArray = self._held[:m].sum(axis=1, dtype=np.int64)

    def _first_places(self, groups: Groups, open_: BoolArray, starts: IntArray, block: slice) -> BoolArray:
        return first_open(open_, starts, groups.most[block])

    def _links_of(self, columns: slice | IntArray) -> IntArray:
        held, limit = self._held[:, columns], self._limit[:, columns]
        # float32 counts to 2**24, more than a block has groups; a matrix product of whole numbers is slow.
        have, may = (held > 0).astype(np.float32), (held < limit).astype(np.float32)
        links: IntArray = (have @ may.T).astype(np.int64)
        return links

    def move(self, node: int, worth: IntArray, *, overfull: bool) -> BoolArray | None:
        """Move places from `node` (``overfull``), or to it, along a shortest path to a node of positive worth.

        No more places than that node is worth. Returns None, or the nodes that were reached if there is no path.
        """
        arcs = self.links if overfull else self.links.T
        path, reached = _shortest_path(arcs > 0, node, worth)
        if not path:
            return reached
        self.shift(path if overfull else path[::-1], int(worth[path[-1]]))
        return None

    def shift(self, path: list[int], most: int) -> None:
        """Move places along the arcs of `path`, as many as all of them allow, but no more than `most`."""
        arcs = list(itertools.pairwise(path))
        movable = [self._movable(a, b) for a, b in arcs]
        places = min(most, *(int(part.sum(dtype=np.int64)) for part in movable))
        # No group can be moved along two arcs in a row by what it had before: the arcs do not disturb one another.
        for (a, b), part in zip(arcs, movable, strict=True):
            columns = np.flatnonzero(part)
            total = np.cumsum(part[columns], dtype=np.int64)
            end = int(np.searchsorted(total, places)) + 1
            columns, moved = columns[:end], part[columns[:end]]
            moved[-1] -= total[end - 1] - places
            for piece in row_blocks((len(columns), len(self.links))):
                self._move(a, b, columns[piece], moved[piece])
        spare = len(self.loads)
        for node, change in ((path[0], -places), (path[-1], places)):
            if node != spare:
                self.loads[node] += change

    def _movable(self, a: int, b: int) -> npt.NDArray[Any]:
        """Places of each group that can move from a to b."""
        places: npt.NDArray[Any] = np.minimum(self._held[a], self._limit[b] - self._held[b])
        return places

    def _move(self, a: int, b: int, columns: IntArray, moved: npt.NDArray[Any]) -> None:
        self.links -= self._links_of(columns)
        self._change(a, b, columns, moved)
        self.links += self._links_of(columns)

    def _change(self, a: int, b: int, columns: IntArray, moved: npt.NDArray[Any]) -> None:
        self._held[a, columns] -= moved
        self._held[b, columns] += moved

    def cut(self, stuck: BoolArray, *, overfull: bool) -> Cut:
        """Describe the cut around the nodes that nothing can be done for."""
        experts = np.flatnonzero(stuck[:-1])
        groups: BoolArray = np.any(self._held[experts] > 0, axis=0)
        return Cut(experts, groups, overfull)


def first_open(open_: BoolArray, starts: IntArray, wanted: IntArray) -> BoolArray:
    """Mark the first `wanted` open experts of each group, cyclically from its start; shape (m, groups)."""
    m, g = open_.shape
    count = np.zeros((m + 1, g), dtype=np.int32)
    for expert in range(m):  # row by row: NumPy's cumsum along the first axis is ten times slower
        np.add(count[expert], open_[expert], out=count[expert + 1])
    place = count[1:] - count[starts, np.arange(g)]
    place += np.where(place <= 0, count[m], np.int32(0))
    chosen: BoolArray = open_ & (place <= wanted)
    return chosen
