"""Compiled kernels of the exact price backend: shortest paths between experts, and clients that move along them.

Nodes 0 .. m - 1 are the experts; node m is the hub, where unused client slots and the load bounds meet.
``potential`` has one entry per node; the price of expert j is ``potential[j] - potential[m]``. Throughout, every
client plays a best response to the potentials, so all arcs of the exchange graph have a reduced cost >= 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._arc_kernels import ALL, GAVE, TOOK, choose_cuts, extend, push_arcs, refresh
from fedmoe_sched.solvers._compile import jit, part
from fedmoe_sched.solvers._newton_kernels import marginal, wanted_loads

__all__ = [
    "BALANCED",
    "NO_PATH",
    "OUT_OF_ROOM",
    "WINDOW_EXCEEDED",
    "augment",
    "first_left_out",
    "jump",
    "load_room",
    "nearest_deficit",
    "open_loads",
    "set_marginals",
    "surplus_left",
]

#: What `augment` returns.
BALANCED, WINDOW_EXCEEDED, NO_PATH, OUT_OF_ROOM = 0, 1, 2, 3


@part
def open_loads(
    penalty: Any,
    loads: Any,
    potential: Any,
    load_min: Any,
    load_max: Any,
    flow: Any,
    up: Any,
    down: Any,
    excess: Any,
) -> None:
    """Set the flow from each expert to the hub by complementary slackness, and what is then out of balance."""
    hub = len(loads)
    excess[hub] = 0
    for j in range(hub):
        low, high = wanted_loads(penalty, j, potential[j] - potential[hub], load_min[j], load_max[j])
        flow[j] = min(max(loads[j], low), high)
        excess[j] = loads[j] - flow[j]
        excess[hub] -= excess[j]
        set_marginals(penalty, j, flow[j], load_min[j], load_max[j], up, down)


@part
def set_marginals(penalty: Any, j: int, flow: int, low: int, high: int, up: Any, down: Any) -> None:
    """Note what one client more costs expert j, and what one less saves."""
    up[j] = marginal(penalty, j, flow + 1) if flow < high else np.inf
    down[j] = marginal(penalty, j, flow) if flow > low else -np.inf


@part
def nearest_deficit(  # noqa: PLR0912
    short: Any, potential: Any, up: Any, down: Any, excess: Any, distance: Any, parent: Any, wanted: Any
) -> Any:
    """Dijkstra from all nodes with a surplus to `wanted` nodes that lack load; return the last one reached, or -1.

    ``parent[v]`` is the node before v, plus the number of nodes where the step moves a load within its bounds and
    no client.
    """
    size = len(excess)
    hub = size - 1
    waiting = np.empty(size)  # distances, infinite where they are final
    last = -1
    for v in range(size):
        parent[v] = -1
        distance[v] = 0.0 if excess[v] > 0 else np.inf
        waiting[v] = distance[v]
    while True:
        node = -1
        nearest = np.inf
        for v in range(size):
            if waiting[v] < nearest:
                nearest = waiting[v]
                node = v
        if node < 0:
            return last
        if excess[node] < 0:
            last = node
            wanted -= 1
            if wanted == 0:
                return last
        here = potential[node]
        row = short[node]
        for v in range(size):
            # Selects, which the compiler turns into vector instructions. What is final is never nearer.
            length = nearest + max(0.0, row[v] - here + potential[v])
            nearer = length < distance[v]
            distance[v] = length if nearer else distance[v]
            waiting[v] = length if nearer else waiting[v]
            parent[v] = node if nearer else parent[v]
        waiting[node] = np.inf
        if node == hub:
            for v in range(hub):
                length = nearest + max(0.0, potential[v] - here - down[v])
                if length < distance[v]:
                    distance[v] = length
                    waiting[v] = length
                    parent[v] = node + size
        else:
            length = nearest + max(0.0, up[node] - here + potential[hub])
            if length < distance[hub]:
                distance[hub] = length
                waiting[hub] = length
                parent[hub] = node + size


@part
def load_room(penalty: Any, j: int, flow: int, rising: bool, low: int, high: int) -> Any:
    """Units by which the flow of expert j can rise or fall at the same marginal cost."""
    indptr, _, _, slope = penalty
    if indptr[j + 1] > indptr[j] + 1 or slope[indptr[j]] > 0.0:
        return 1
    return int(high - flow if rising else flow - low)


@part
def _push_load(
    penalty: Any,
    target: int,
    parent: Any,
    flow: Any,
    load_min: Any,
    load_max: Any,
    up: Any,
    down: Any,
    excess: Any,
    root: Any,
    link: Any,
    moves: Any,
) -> Any:
    """Move load along the path to `target`; list the positions (given up, taken) of its arcs; return how many."""
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
            j = node if v == hub else v
            units = min(units, load_room(penalty, j, flow[j], v == hub, load_min[j], load_max[j]))
        v = node
    units = min(units, excess[v])
    excess[v] -= units
    excess[target] += units
    n_moves = 0
    v = target
    while parent[v] >= 0:
        node = parent[v]
        if node < size:
            at = root[node, v]
            moves[n_moves, 0] = link[at, GAVE]
            moves[n_moves, 1] = link[at, TOOK]
            n_moves += 1
        else:
            node -= size
            j = node if v == hub else v
            flow[j] += units if v == hub else -units
            set_marginals(penalty, j, flow[j], load_min[j], load_max[j], up, down)
        v = node
    return n_moves


@part
def surplus_left(excess: Any) -> bool:
    """Whether some node has more load than it wants."""
    for v in range(len(excess)):  # noqa: SIM110, no generators in compiled code
        if excess[v] > 0:
            return True
    return False


@part
def first_left_out(target: Any, parent: Any, root: Any, arc: Any) -> bool:
    """Note the last arc of the path to `target` that stands for arcs that are left out; False if there is none."""
    size = len(parent)
    v = target
    while parent[v] >= 0:
        node = parent[v]
        if node < size and root[node, v] < 0:
            arc[0], arc[1] = node, v
            return True
        v = node if node < size else node - size
    return False


@jit
def augment(  # noqa: PLR0912, PLR0915
    penalty: Any,
    indptr: Any,
    owner: Any,
    expert: Any,
    score: Any,
    held: Any,
    count: Any,
    least: Any,
    most: Any,
    base: Any,
    potential: Any,
    loads: Any,
    load_min: Any,
    load_max: Any,
    window: float,
    enough: int,
    spare: int,
) -> Any:
    """Move clients along shortest paths of the exchange graph until every load is in its place.

    Parameters
    ----------
    penalty : tuple of ndarray
    indptr : ndarray, shape (q + 1,), int64
        Where the candidates of each of the q clients that may move start: positions in the next arrays.
    owner, expert : ndarray, shape (positions,), int32 and int16
        Client (0 .. q - 1) and expert of each candidate.
    score : ndarray, shape (positions,), float64
    held : ndarray, shape (positions,), bool
        In and out: whether the client has the expert.
    count, least, most : ndarray, shape (q,), int16
        Experts of each client (in and out), and its fewest and most.
    base, potential : ndarray, shape (m + 1,), float64
        Potentials for which the window was chosen; potentials now (in and out).
    loads : ndarray, shape (m,), int64
        In and out: clients of each expert, those that may not move included.
    load_min, load_max : ndarray, shape (m,), int64
    window : float
        Arcs with a larger reduced cost under `base` are left out; sound while the potentials have moved by no
        more than this against one another.
    enough : int
        About how many arcs of each pair of nodes to look at first.
    spare : int
        Room for arcs that clients gain by moving.

    Returns
    -------
    int
        BALANCED, WINDOW_EXCEEDED (widen it), NO_PATH (none within the window) or OUT_OF_ROOM (call again).
    """
    m = len(loads)
    size = m + 1
    cut = np.empty((size, size))
    choose_cuts(indptr, expert, score, held, count, least, most, base, window, enough, cut)
    # No arc can lack room, however costs round; what is never written to takes no memory.
    room = spare
    for i in range(len(least)):
        size_i = indptr[i + 1] - indptr[i]
        room += (count[i] + 1) * (size_i - count[i] + 1)
    key, link = np.empty(room), np.empty((room, 4), np.int32)
    used, everything = np.int64(0), np.int64(ALL)
    root, short = np.empty((size, size), np.int32), np.empty((size, size))
    for node in range(size):
        for v in range(size):
            root[node, v] = -1
            short[node, v] = cut[node, v]
    used = push_arcs(
        key, link, used, root, short, cut, indptr, expert, score, held, count, least, most,
        np.int64(0), np.int64(len(least)), everything, everything,
    )  # fmt: skip
    flow, excess = np.empty(m, np.int64), np.empty(size, np.int64)
    up, down = np.empty(m), np.empty(m)
    open_loads(penalty, loads, potential, load_min, load_max, flow, up, down, excess)
    distance, parent = np.empty(size), np.empty(size, np.int64)
    moves, missing = np.empty((size, 2), np.int64), np.empty(2, np.int64)
    while surplus_left(excess):
        target = nearest_deficit(short, potential, up, down, excess, distance, parent, np.int64(1))
        if target < 0:
            return NO_PATH
        if first_left_out(target, parent, root, missing):
            tail, head = missing[0], missing[1]
            gap = base[tail] - base[head]
            longest = min(8.0 * (cut[tail, head] - gap), window) + gap
            if not longest > cut[tail, head]:  # nor can it be by less than costs are rounded
                return WINDOW_EXCEEDED
            used = extend(
                key, link, used, root, short, cut, indptr, expert, score, held, count, least, most,
                tail, head, longest,
            )  # fmt: skip
            if used < 0:
                return OUT_OF_ROOM
            continue
        for v in range(size):
            potential[v] += max(0.0, distance[target] - distance[v])
        n_moves = _push_load(
            penalty, target, parent, flow, load_min, load_max, up, down, excess, root, link, moves
        )
        needed = used
        for at in range(n_moves):
            client = owner[max(moves[at, 0], moves[at, 1])]
            needed += 3 * (indptr[client + 1] - indptr[client])
        if needed > room:
            return OUT_OF_ROOM
        for at in range(n_moves):
            gave, took = moves[at]
            client = owner[max(gave, took)]
            if gave >= 0:
                held[gave] = False
                count[client] -= 1
                loads[expert[gave]] -= 1
            if took >= 0:
                held[took] = True
                count[client] += 1
                loads[expert[took]] += 1
        for at in range(n_moves):
            gave, took = moves[at]
            client = np.int64(owner[max(gave, took)])
            tail = np.int64(expert[gave]) if gave >= 0 else np.int64(m)
            head = np.int64(expert[took]) if took >= 0 else np.int64(m)
            refresh(key, link, root, short, cut, owner, held, count, least, most, client, tail, head)
            if gave < 0 or took < 0:  # what else it can do at the hub has changed with the number of its experts
                hub = np.int64(m)
                refresh(key, link, root, short, cut, owner, held, count, least, most, client, hub, hub)
        for at in range(n_moves):
            gave, took = moves[at]
            client = np.int64(owner[max(gave, took)])
            used = push_arcs(
                key, link, used, root, short, cut, indptr, expert, score, held, count, least, most,
                client, client + 1, gave, took,
            )  # fmt: skip
    return BALANCED


@jit
def jump(penalty: Any, cost: Any, potential: Any, loads: Any, load_min: Any, load_max: Any) -> Any:
    """Raise the potentials until every deficit is reached over arcs that cost nothing, of all clients.

    Parameters
    ----------
    penalty : tuple of ndarray
    cost : ndarray, shape (m + 1, m + 1), float64
        As `exchange_costs` finds them, under `potential`.
    potential : ndarray, shape (m + 1,), float64
        In and out.
    loads, load_min, load_max : ndarray, shape (m,), int64

    Returns
    -------
    int
        Units of load that are out of place; -1 if some of them cannot be brought into place by any path.
    """
    m = len(loads)
    flow, excess = np.empty(m, np.int64), np.empty(m + 1, np.int64)
    up, down = np.empty(m), np.empty(m)
    open_loads(penalty, loads, potential, load_min, load_max, flow, up, down, excess)
    distance, parent, zero = np.empty(m + 1), np.empty(m + 1, np.int64), np.empty(m + 1)
    for v in range(m + 1):
        zero[v] = 0.0  # the costs are reduced ones
    for j in range(m):
        up[j] -= potential[j] - potential[m]
        down[j] -= potential[j] - potential[m]
    target = nearest_deficit(cost, zero, up, down, excess, distance, parent, np.int64(m + 1))
    if target < 0:
        return -1
    off = 0
    for v in range(m + 1):
        potential[v] += max(0.0, distance[target] - distance[v])
        off += max(0, excess[v])
    return off
