"""Compiled kernels of the exact price backend for clients whose layers interact: shortest paths.

Nodes, layers and bounds are those of `_layer_kernels`, heaps of arcs those of `_arc_kernels`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._arc_kernels import pop
from fedmoe_sched.solvers._compile import jit, part
from fedmoe_sched.solvers._layer_kernels import may_give, may_take, note_exchanges
from fedmoe_sched.solvers._path_kernels import (
    BALANCED,
    NO_PATH,
    OUT_OF_ROOM,
    WINDOW_EXCEEDED,
    first_left_out,
    load_room,
    nearest_deficit,
    open_loads,
    set_marginals,
    surplus_left,
)

__all__ = ["augment_layered"]

_CLIENT, _CHILD, _SIBLING = 0, 2, 3  # columns of ``link``: the owner of an arc, and its place in the heap


@part
def _add_arcs(
    i: Any, score: Any, layer_of: Any, cut: Any, gives: Any, takes: Any, key: Any, link: Any, used: Any, root: Any,
    short: Any,
) -> Any:  # fmt: skip
    """Add the arcs that a client has by row 1 and had not by row 0; without room for any, count them only."""
    size = len(layer_of)
    hub, counting = size - 1, len(key) == 0
    for tail in range(size):
        give, gave = gives[1, tail], gives[0, tail]
        if give == 0:
            continue
        lost = score[i, tail] if tail < hub else 0.0
        for head in range(size):
            take = takes[1, head]
            cost = lost - (score[i, head] if head < hub else 0.0)
            if take == 0 or not cost <= cut[tail, head]:
                continue
            across = layer_of[tail] != layer_of[head]
            if tail == head or (across and (give < 2 or take < 2)):
                continue
            took = takes[0, head]
            if gave > 0 and took > 0 and not (across and (gave < 2 or took < 2)):
                continue
            if not counting:
                key[used] = cost
                link[used, _CLIENT] = i
                link[used, _CHILD] = -1
                link[used, _SIBLING] = -1
                # Melding by hand: a call would count references to its arrays, which takes longer.
                top = np.int64(root[tail, head])
                if top < 0 or cost < key[top]:
                    link[used, _CHILD] = top
                    root[tail, head] = used
                    short[tail, head] = cost
                else:
                    link[used, _SIBLING] = link[top, _CHILD]
                    link[top, _CHILD] = used
            used += 1
    return used


@part
def _drop_stale(
    moved: Any, key: Any, link: Any, root: Any, short: Any, cut: Any, score: Any, held: Any, count: Any, low: Any,
    high: Any, least: Any, most: Any, layer_of: Any,
) -> None:  # fmt: skip
    """Bring up the cheapest arc that its client can still use, for pairs of nodes where it was a moved one's."""
    size = len(layer_of)
    for tail in range(size):
        for head in range(size):
            at = np.int64(root[tail, head])
            if at < 0 or not moved[link[at, _CLIENT]]:
                continue
            across = layer_of[tail] != layer_of[head]
            while at >= 0:
                i = link[at, _CLIENT]
                if may_give(i, tail, held, count, low, most, layer_of, across) and may_take(
                    i, head, score, held, count, high, least, layer_of, across
                ):
                    break
                at = pop(key, link, at)
            root[tail, head] = at
            short[tail, head] = key[at] if at >= 0 else cut[tail, head]


@part
def _apply(path: Any, length: Any, client: Any, held: Any, count: Any, loads: Any, layer_of: Any) -> None:
    """Make all exchanges of a client on a path."""
    m, n_layers = held.shape[1], count.shape[1] - 1
    for at in range(length):
        if path[at, 2] != client:
            continue
        for end in range(2):
            node, step = path[at, end], 2 * end - 1
            if node < m:
                held[client, node] = step > 0
                count[client, layer_of[node]] += step
                count[client, n_layers] += step
                loads[node] += step


@part
def _shares_a_bound(layer_of: Any, one: Any, two: Any) -> bool:
    """Whether two exchanges of a client, each (tail, head, client), change the same count of its."""
    a, b, c, d = layer_of[one[0]], layer_of[one[1]], layer_of[two[0]], layer_of[two[1]]
    return (a != b and c != d) or a in (c, d) or b in (c, d)


@part
def _trace(target: Any, parent: Any, root: Any, link: Any, layer_of: Any, path: Any) -> Any:
    """List the arcs of a shortest path from its end to its start, (tail, head, client or -1); return how many.

    Where a client has two exchanges that share a bound, one exchange leads from the start of the first one to the
    end of the second one: what lies between is a cycle that costs nothing, and together they might be forbidden.
    """
    size = len(parent)
    length, v = 0, target
    while parent[v] >= 0:
        node = parent[v]
        client = -1
        if node < size:
            client = link[root[node, v], _CLIENT]
        else:
            node -= size
        path[length, 0], path[length, 1], path[length, 2] = node, v, client
        if client >= 0:
            for later in range(length):
                if path[later, 2] == client and _shares_a_bound(layer_of, path[later], path[length]):
                    path[later, 0] = node
                    length = later
                    break
        length += 1
        v = node
    return length


@part
def _shift_load(
    penalty: Any, path: Any, length: Any, flow: Any, load_min: Any, load_max: Any, up: Any, down: Any, excess: Any
) -> None:
    """Move what is out of balance along a path: one client, or as much load as costs the same."""
    hub = len(flow)
    source, target = path[length - 1, 0], path[0, 1]
    units = min(excess[source], -excess[target])
    for at in range(length):
        tail, head, client = path[at]
        if client >= 0:
            units = 1
        else:
            j = tail if head == hub else head
            units = min(units, load_room(penalty, j, flow[j], head == hub, load_min[j], load_max[j]))
    excess[source] -= units
    excess[target] += units
    for at in range(length):
        tail, head, client = path[at]
        if client < 0:
            j = tail if head == hub else head
            flow[j] += units if head == hub else -units
            set_marginals(penalty, j, flow[j], load_min[j], load_max[j], up, down)


@jit
def augment_layered(  # noqa: PLR0912
    penalty: Any,
    layer_of: Any,
    score: Any,
    held: Any,
    count: Any,
    low: Any,
    high: Any,
    least: Any,
    most: Any,
    base: Any,
    potential: Any,
    loads: Any,
    load_min: Any,
    load_max: Any,
    window: float,
    spare: int,
) -> Any:
    """Move clients along shortest paths until every load is in its place; see `_path_kernels.augment`.

    Parameters
    ----------
    layer_of : ndarray, shape (m + 1,), int16
        The hub's is G.
    score : ndarray, shape (q, m), float64
        Of the clients that may move; -inf where not eligible.
    held : ndarray, shape (q, m), bool
        In and out.
    count : ndarray, shape (q, G + 1), int64
        In and out: experts of each layer, and of all.
    low, high : ndarray, shape (q, G), int16
    least, most : ndarray, shape (q,), int16
    window : float
        Arcs with a larger reduced cost under `base` are left out.
    spare : int
        Room for arcs that clients gain by moving.

    Returns
    -------
    int
        BALANCED, WINDOW_EXCEEDED (widen it), NO_PATH (none within the window) or OUT_OF_ROOM (call again).
    """
    q, m = score.shape
    size = m + 1
    cut, short, root = np.empty((size, size)), np.empty((size, size)), np.empty((size, size), np.int32)
    for tail in range(size):
        for head in range(size):
            cut[tail, head] = window + base[tail] - base[head]
            short[tail, head] = cut[tail, head]
            root[tail, head] = -1
    gives, takes = np.empty((2, size), np.int8), np.empty((2, size), np.int8)
    for node in range(size):
        gives[0, node] = 0
        takes[0, node] = 0
    # Counted first, then added: what is never written to takes no memory.
    key, link, room = np.empty(0), np.empty((0, 4), np.int32), np.int64(0)
    used = np.int64(0)
    for filling in range(2):
        if filling == 1:
            room = used + spare
            key, link, used = np.empty(room), np.empty((room, 4), np.int32), np.int64(0)
        for i in range(q):
            note_exchanges(i, score, held, count, low, high, least, most, layer_of, 1, gives, takes)
            used = _add_arcs(i, score, layer_of, cut, gives, takes, key, link, used, root, short)
    flow, excess = np.empty(m, np.int64), np.empty(size, np.int64)
    up, down = np.empty(m), np.empty(m)
    open_loads(penalty, loads, potential, load_min, load_max, flow, up, down, excess)
    distance, parent = np.empty(size), np.empty(size, np.int64)
    path, missing = np.empty((size, 3), np.int64), np.empty(2, np.int64)
    moved = np.empty(q, np.bool_)
    for i in range(q):
        moved[i] = False
    while surplus_left(excess):
        target = nearest_deficit(short, potential, up, down, excess, distance, parent, np.int64(1))
        if target < 0:
            return NO_PATH
        if first_left_out(target, parent, root, missing):
            return WINDOW_EXCEEDED
        for v in range(size):
            potential[v] += max(0.0, distance[target] - distance[v])
        length = _trace(target, parent, root, link, layer_of, path)
        if used + length * size * size > room:
            return OUT_OF_ROOM
        _shift_load(penalty, path, length, flow, load_min, load_max, up, down, excess)
        for at in range(length):
            i = path[at, 2]
            if i < 0 or moved[i]:
                continue
            moved[i] = True
            note_exchanges(i, score, held, count, low, high, least, most, layer_of, 0, gives, takes)
            _apply(path, length, i, held, count, loads, layer_of)
            note_exchanges(i, score, held, count, low, high, least, most, layer_of, 1, gives, takes)
            used = _add_arcs(i, score, layer_of, cut, gives, takes, key, link, used, root, short)
        _drop_stale(moved, key, link, root, short, cut, score, held, count, low, high, least, most, layer_of)
        for at in range(length):
            if path[at, 2] >= 0:
                moved[path[at, 2]] = False
    return BALANCED
