"""Compiled kernels of the exact price backend: best responses, and the exchange graph in motion.

Nodes 0 .. m - 1 are the experts; node m is the hub, where unused client slots and the load bounds meet.
``potential`` has one entry per node; the price of expert j is ``potential[j] - potential[m]``. Throughout, every
client plays a best response to the potentials, so all arcs of the exchange graph have a reduced cost >= 0.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

__all__ = ["BALANCED", "NO_PATH", "WINDOW_EXCEEDED", "augment", "respond"]

#: What `augment` returns.
BALANCED, WINDOW_EXCEEDED, NO_PATH = 0, 1, 2

_jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@_jit
def respond(
    scores: Any,
    eligible: Any,
    rows: Any,
    tilt: Any,
    slope: Any,
    least: Any,
    most: Any,
    potential: Any,
    choice: Any,
    count: Any,
    slack: Any,
    arcs: Any,
    loads: Any,
    start: int,
    stop: int,
) -> float:
    """Let the clients at positions ``start .. stop - 1`` choose their best experts under the potentials.

    Parameters
    ----------
    scores : ndarray, shape (n, m), float
        Desirability, of any float type, as it is.
    eligible : ndarray, shape (n, m), bool, or (0, 0) for all
    rows : ndarray, shape (s,), int64
        Client number of each position.
    tilt : ndarray, shape (s,); slope : ndarray, shape (m,)
        Client i's score of expert j is ``scores[i, j] + tilt[i] * slope[j]``: a perturbation that parts ties.
    least, most : ndarray, shape (s,), int64
        Fewest and most experts of each position; ``most`` not above the number of eligible ones.
    potential : ndarray, shape (m + 1,), float64
    choice : ndarray, shape (s, widest), int16
        Out: chosen experts, best first.
    count : ndarray, shape (s,), int16
        Out: how many.
    slack : ndarray, shape (s,), float32
        Out: by how much the best response beats the next one; rounded down.
    arcs : ndarray, shape (s, 2), int16
        Out: tail and head of the exchange arc that costs this little; -1 where there is none.
    loads : ndarray, shape (m,), int64
        Out: increased by the clients that each expert gets.

    Returns
    -------
    float
        Sum of the values, net of prices, of all that was chosen.
    """
    m = scores.shape[1]
    masked = eligible.shape[0] > 0
    widest = choice.shape[1]
    best = np.empty(widest + 2)
    who = np.empty(widest + 2, np.int64)
    base = np.empty(m)
    for j in range(m):
        base[j] = potential[j] - potential[m]
    total = 0.0
    for at in range(start, stop):
        i = rows[at]
        k = most[at]
        for r in range(k + 1):
            best[r] = -np.inf
            who[r] = -1
        bar = -np.inf
        for j in range(m):
            value = scores[i, j] + tilt[at] * slope[j] - base[j]
            if value > bar:
                if masked and not eligible[i, j]:
                    continue
                r = k
                while r > 0 and best[r - 1] < value:
                    best[r] = best[r - 1]
                    who[r] = who[r - 1]
                    r -= 1
                best[r] = value
                who[r] = j
                bar = best[k]
        taken = least[at]
        while taken < k and best[taken] > 0.0:
            taken += 1
        margin = np.inf
        tail, head = -1, -1
        if taken > 0 and best[taken - 1] - best[taken] < margin:
            margin = best[taken - 1] - best[taken]
            tail, head = who[taken - 1], who[taken]
        if taken > least[at] and best[taken - 1] < margin:
            margin = best[taken - 1]
            tail, head = who[taken - 1], m
        if taken < k and -best[taken] < margin:
            margin = -best[taken]
            tail, head = m, who[taken]
        slack[at] = np.nextafter(np.float32(margin), np.float32(-1.0))
        arcs[at, 0] = tail
        arcs[at, 1] = head
        count[at] = taken
        for r in range(taken):
            choice[at, r] = who[r]
            loads[who[r]] += 1
            total += best[r]
    return total


@_jit
def _meld(heap: Any, a: int, b: int) -> int:
    """Meld two pairing heaps (Fredman, Sedgewick, Sleator and Tarjan 1986); -1 is the empty heap."""
    key, _, child, sibling = heap
    if a < 0:
        return b
    if b < 0:
        return a
    if key[b] < key[a]:
        a, b = b, a
    sibling[b] = child[a]
    child[a] = b
    return a


@_jit
def _pop(heap: Any, root: int) -> int:
    """Remove the root; the new root by two-pass pairing."""
    _, _, child, sibling = heap
    first = child[root]
    paired = -1
    while first >= 0:
        second = sibling[first]
        sibling[first] = -1
        rest = -1
        if second >= 0:
            rest = sibling[second]
            sibling[second] = -1
        tree = _meld(heap, first, second)
        sibling[tree] = paired
        paired = tree
        first = rest
    root = -1
    while paired >= 0:
        rest = sibling[paired]
        sibling[paired] = -1
        root = _meld(heap, root, paired)
        paired = rest
    return root


@_jit
def _new_heap(room: int) -> Any:
    """Make room for heap nodes: key, client, first child, next sibling."""
    return np.empty(room), np.empty(room, np.int32), np.empty(room, np.int32), np.empty(room, np.int32)


@_jit
def _doubled(heap: Any) -> Any:
    """Copy the heap nodes into twice the room."""
    used = len(heap[0])
    larger = _new_heap(2 * used)
    larger[0][:used] = heap[0]
    larger[1][:used] = heap[1]
    larger[2][:used] = heap[2]
    larger[3][:used] = heap[3]
    return larger


@_jit
def _valid(clients: Any, client: int, tail: int, head: int) -> bool:
    """Whether a client can give up `tail` and take `head` as things stand."""
    _, held, count, least, most = clients
    hub = held.shape[1]
    if tail == hub:
        return count[client] < most[client] and not held[client, head]
    if not held[client, tail]:
        return False
    if head == hub:
        return bool(count[client] > least[client])
    return not held[client, head]


@_jit
def _surface(heap: Any, root: Any, top: Any, clients: Any, tail: int, head: int) -> None:
    """Bring the cheapest valid arc tail -> head to the top of its heap and note its cost."""
    at = root[tail, head]
    while at >= 0 and not _valid(clients, heap[1][at], tail, head):
        at = _pop(heap, at)
    root[tail, head] = at
    top[tail, head] = heap[0][at] if at >= 0 else np.inf


@_jit
def _push_arcs(
    heap: Any, used: int, root: Any, top: Any, clients: Any, base: Any, window: float, i: int, gave: int, took: int
) -> Any:
    """Add the arcs of client i that are new after it gave up and took something; -1 and -1 adds them all."""
    scores, held, count, least, most = clients
    hub = held.shape[1]
    for tail in range(hub + 1):
        if tail == hub:
            if count[i] >= most[i]:
                continue
        elif not held[i, tail]:
            continue
        lost = 0.0 if tail == hub else scores[i, tail]
        bar = lost - base[tail] - window
        for head in range(hub + 1):
            gain = 0.0 if head == hub else scores[i, head]
            if gain - base[head] < bar or head == tail or gain == -np.inf:
                continue
            if head == hub:
                if count[i] <= least[i]:
                    continue
            elif held[i, head]:
                continue
            # New are the arcs out of what was taken and into what was given up, and those at the hub when the
            # number of experts changed.
            known = took >= 0 and tail != took and head != gave
            if known and (hub not in (took, gave) or hub not in (tail, head)):
                continue
            if used == len(heap[0]):
                heap = _doubled(heap)
            heap[0][used] = lost - gain
            heap[1][used] = i
            heap[2][used] = -1
            heap[3][used] = -1
            root[tail, head] = _meld(heap, root[tail, head], used)
            top[tail, head] = heap[0][root[tail, head]]
            used += 1
    return heap, used


@_jit
def _flows(loads: Any, potential: Any, load_min: Any, load_max: Any, flow: Any, excess: Any) -> None:
    """Set the flow from each expert to the hub by complementary slackness, and what is then out of balance."""
    hub = len(loads)
    excess[hub] = 0
    for j in range(hub):
        price = potential[j] - potential[hub]
        if price > 0:
            flow[j] = load_max[j]
        elif price < 0:
            flow[j] = load_min[j]
        else:
            flow[j] = min(max(loads[j], load_min[j]), load_max[j])
        excess[j] = loads[j] - flow[j]
        excess[hub] -= excess[j]


@_jit
def _nearest_deficit(
    top: Any, potential: Any, flow: Any, load_min: Any, load_max: Any, excess: Any, distance: Any, parent: Any
) -> int:
    """Dijkstra from all nodes with a surplus to the nearest node that lacks load; -1 if none is reached.

    ``parent[v]`` is the node before v, plus the number of nodes where the step moves a load within its bounds and
    no client.
    """
    size = len(excess)
    hub = size - 1
    final = np.zeros(size, np.bool_)
    for v in range(size):
        parent[v] = -1
        distance[v] = 0.0 if excess[v] > 0 else np.inf
    while True:
        node = -1
        nearest = np.inf
        for v in range(size):
            if not final[v] and distance[v] < nearest:
                nearest = distance[v]
                node = v
        if node < 0 or excess[node] < 0:
            return node
        final[node] = True
        here = potential[node]
        for v in range(size):
            length = nearest + max(0.0, top[node, v] - here + potential[v])
            if length < distance[v]:
                distance[v] = length
                parent[v] = node
        if node == hub:
            for v in range(hub):
                length = nearest + max(0.0, potential[v] - here)
                if flow[v] > load_min[v] and length < distance[v]:
                    distance[v] = length
                    parent[v] = node + size
        elif flow[node] < load_max[node]:
            length = nearest + max(0.0, potential[hub] - here)
            if length < distance[hub]:
                distance[hub] = length
                parent[hub] = node + size


@_jit
def _raise(potential: Any, base: Any, distance: Any, reach: float, window: float) -> bool:
    """Raise the potentials nearer than `reach` so that the path costs nothing; False if the window forbids it."""
    low, high = np.inf, -np.inf
    for v in range(len(potential)):
        shift = potential[v] - base[v] + max(0.0, reach - distance[v])
        low, high = min(low, shift), max(high, shift)
    if high - low > window:
        return False
    for v in range(len(potential)):
        potential[v] += max(0.0, reach - distance[v])
    return True


@_jit
def _push_load(
    target: int,
    parent: Any,
    flow: Any,
    load_min: Any,
    load_max: Any,
    excess: Any,
    root: Any,
    owner: Any,
    moves: Any,
) -> int:
    """Move load along the path to `target`, and list the (client, gave, took) of its arcs; return how many."""
    size = len(excess)
    hub = size - 1
    units = -excess[target]
    v = target
    while parent[v] >= 0:
        node = parent[v]
        if node < size:
            units = 1
        else:
            node -= size
            units = min(units, load_max[node] - flow[node] if v == hub else flow[v] - load_min[v])
        v = node
    units = min(units, excess[v])
    excess[v] -= units
    excess[target] += units
    n_moves = 0
    v = target
    while parent[v] >= 0:
        node = parent[v]
        if node < size:
            moves[n_moves, 0] = owner[root[node, v]]
            moves[n_moves, 1] = node
            moves[n_moves, 2] = v
            n_moves += 1
        else:
            node -= size
            if v == hub:
                flow[node] += units
            else:
                flow[v] -= units
        v = node
    return n_moves


@_jit
def _move_clients(moves: Any, clients: Any, loads: Any) -> None:
    """Let each listed client give up one expert for another."""
    _, held, count, _, _ = clients
    hub = held.shape[1]
    for at in range(len(moves)):
        client, gave, took = moves[at]
        if gave != hub:
            held[client, gave] = False
            count[client] -= 1
            loads[gave] -= 1
        if took != hub:
            held[client, took] = True
            count[client] += 1
            loads[took] += 1


@_jit
def augment(
    scores: Any,
    held: Any,
    least: Any,
    most: Any,
    base: Any,
    potential: Any,
    loads: Any,
    load_min: Any,
    load_max: Any,
    window: float,
) -> int:
    """Move clients along shortest paths of the exchange graph until every load is in its place.

    Parameters
    ----------
    scores : ndarray, shape (q, m), float64
        Scores of the clients that may move; -inf where not eligible.
    held : ndarray, shape (q, m), bool
        In and out: their experts.
    least, most : ndarray, shape (q,), int64
        Fewest and most experts.
    base, potential : ndarray, shape (m + 1,), float64
        Potentials for which the window was chosen; potentials now (in and out).
    loads : ndarray, shape (m,), int64
        In and out: clients of each expert, those that may not move included.
    load_min, load_max : ndarray, shape (m,), int64
    window : float
        Arcs with a larger reduced cost under `base` are left out; sound while the potentials have moved by no
        more than this against one another.

    Returns
    -------
    int
        BALANCED, WINDOW_EXCEEDED (widen it and go on) or NO_PATH (none within the window).
    """
    q, m = scores.shape
    size = m + 1
    count = np.zeros(q, np.int64)
    for i in range(q):
        count[i] = held[i].sum()
    clients = (scores, held, count, least, most)
    # One heap of arcs per ordered pair of nodes; entries are checked for validity when they surface.
    heap, used = _new_heap(4096 + 2 * q), 0
    root = np.full((size, size), -1, np.int32)
    top = np.full((size, size), np.inf)
    for i in range(q):
        heap, used = _push_arcs(heap, used, root, top, clients, base, window, i, -1, -1)
    flow, excess = np.zeros(m, np.int64), np.zeros(size, np.int64)
    _flows(loads, potential, load_min, load_max, flow, excess)
    distance, parent = np.empty(size), np.empty(size, np.int64)
    moves = np.empty((size, 3), np.int64)
    while (excess > 0).any():
        target = _nearest_deficit(top, potential, flow, load_min, load_max, excess, distance, parent)
        if target < 0:
            return NO_PATH
        if not _raise(potential, base, distance, distance[target], window):
            # An arc that was left out may be shorter by now: the potentials stay where all is proved.
            return WINDOW_EXCEEDED
        n_moves = _push_load(target, parent, flow, load_min, load_max, excess, root, heap[1], moves)
        _move_clients(moves[:n_moves], clients, loads)
        for at in range(n_moves):
            client, gave, took = moves[at]
            for node in range(size):
                _surface(heap, root, top, clients, gave, node)
                _surface(heap, root, top, clients, node, took)
                _surface(heap, root, top, clients, m, node)
                _surface(heap, root, top, clients, node, m)
        for at in range(n_moves):
            client, gave, took = moves[at]
            heap, used = _push_arcs(heap, used, root, top, clients, base, window, client, gave, took)
    return BALANCED
