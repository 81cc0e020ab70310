"""Compiled kernels of the exact price backend: the arcs of the exchange graph, cheapest first.

An arc is a client that gives up one of its candidates and takes another one, by their positions in the list of
all candidates. The arcs of every ordered pair of nodes form a pairing heap (Fredman, Sedgewick, Sleator and
Tarjan 1986). Arc number a has the cost ``key[a]``, and in the rows of ``link`` the positions that are given up and
taken, and the first child and the next sibling in the heap. From the cost ``cut`` on, arcs are left out. ``root``
has the cheapest arc of each pair, or -1, and ``short`` its cost, or the cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmoe_sched.solvers._compile import part

__all__ = ["ALL", "GAVE", "HUB", "TOOK", "choose_cuts", "extend", "pop", "push_arcs", "refresh"]

#: What stands for a position where there is none: an exchange with the hub, and all exchanges.
HUB, ALL = -1, -2

GAVE, TOOK, _CHILD, _SIBLING = 0, 1, 2, 3

_LEVELS = 10  # of the costs by which arcs are chosen


@part
def _meld(key: Any, link: Any, a: Any, b: Any) -> Any:
    """Meld two heaps; -1 is the empty one."""
    if a < 0:
        return b
    if b < 0:
        return a
    if key[b] < key[a]:
        a, b = b, a
    link[b, _SIBLING] = link[a, _CHILD]
    link[a, _CHILD] = b
    return a


@part
def pop(key: Any, link: Any, root: Any) -> Any:
    """Remove the root; the new root by two-pass pairing."""
    first: Any
    paired: Any
    first, paired, rest = np.int64(link[root, _CHILD]), np.int64(-1), np.int64(-1)
    while first >= 0:
        second = np.int64(link[first, _SIBLING])
        link[first, _SIBLING] = -1
        rest = np.int64(-1)
        if second >= 0:
            rest = np.int64(link[second, _SIBLING])
            link[second, _SIBLING] = -1
        tree = _meld(key, link, first, second)
        link[tree, _SIBLING] = paired
        paired = tree
        first = rest
    while paired >= 0:
        rest = np.int64(link[paired, _SIBLING])
        link[paired, _SIBLING] = -1
        first = _meld(key, link, first, paired)
        paired = rest
    return first


@part
def push_arcs(
    key: Any,
    link: Any,
    used: Any,
    root: Any,
    short: Any,
    cut: Any,
    indptr: Any,
    expert: Any,
    score: Any,
    held: Any,
    count: Any,
    least: Any,
    most: Any,
    start: Any,
    stop: Any,
    gave: Any,
    took: Any,
) -> Any:
    """Add the arcs that clients ``start .. stop - 1`` gain by giving up one position and taking another.

    `ALL` instead of positions adds all they have.
    """
    hub = len(root) - 1
    everything = gave == ALL
    for i in range(start, stop):
        may_add, may_drop = count[i] < most[i], count[i] > least[i]
        # One position before a client's first candidate stands for the hub, on either side.
        none = indptr[i] - 1
        for a in range(none, indptr[i + 1]):
            if not (may_add if a == none else held[a]):
                continue
            tail, lost = (hub, 0.0) if a == none else (np.int64(expert[a]), score[a])
            for b in range(none, indptr[i + 1]):
                if b == none:
                    if a == none or not may_drop:
                        continue
                elif held[b]:
                    continue
                # New are the arcs out of what was taken and into what was given up, and those at the hub when the
                # number of experts changed.
                if not (everything or a == took or b == gave or ((gave < 0 or took < 0) and none in (a, b))):
                    continue
                head, gain = (hub, 0.0) if b == none else (np.int64(expert[b]), score[b])
                cost = lost - gain
                if cost > cut[tail, head]:
                    continue
                key[used] = cost
                link[used, GAVE] = HUB if a == none else a
                link[used, TOOK] = HUB if b == none else b
                link[used, _CHILD] = -1
                link[used, _SIBLING] = -1
                # Melding by hand: a call would count references to its arrays, which takes longer.
                first = np.int64(root[tail, head])
                if first < 0 or cost < key[first]:
                    link[used, _CHILD] = first
                    root[tail, head] = used
                    short[tail, head] = cost
                else:
                    link[used, _SIBLING] = link[first, _CHILD]
                    link[first, _CHILD] = used
                used += 1
    return used


@part
def _level(cost: float, window: float) -> Any:
    """Where a reduced cost lies on a scale of powers of eight below the window; the last level is beyond it."""
    level = _LEVELS - 1
    while level > 0 and cost <= window:
        window *= 0.125
        level -= 1
    return level


@part
def choose_cuts(  # noqa: PLR0912
    indptr: Any,
    expert: Any,
    score: Any,
    held: Any,
    count: Any,
    least: Any,
    most: Any,
    base: Any,
    window: float,
    enough: int,
    cut: Any,
) -> None:
    """Choose from which cost on the arcs of each pair of nodes are left out.

    Of each pair about `enough` of the cheapest arcs stay in, or some times as many.
    """
    size = len(base)
    hub = size - 1
    counts = np.empty((size, size, _LEVELS), np.int32)
    for tail in range(size):
        for head in range(size):
            cut[tail, head] = np.inf
            for level in range(_LEVELS):
                counts[tail, head, level] = 0
    if window == np.inf:
        return
    for i in range(len(least)):
        may_add, may_drop = count[i] < most[i], count[i] > least[i]
        for a in range(indptr[i], indptr[i + 1]):
            tail = expert[a]
            worth = score[a] - base[tail]
            if not held[a]:
                if may_add:
                    counts[hub, tail, _level(-base[hub] - worth, window)] += 1
                continue
            if may_drop:
                counts[tail, hub, _level(worth + base[hub], window)] += 1
            for b in range(indptr[i], indptr[i + 1]):
                if not held[b]:
                    counts[tail, expert[b], _level(worth - score[b] + base[expert[b]], window)] += 1
    for tail in range(size):
        for head in range(size):
            inside, level = counts[tail, head, 0], 0
            while level < _LEVELS - 2 and inside < enough:
                level += 1
                inside += counts[tail, head, level]
            cut[tail, head] = window / 8.0 ** (_LEVELS - 2 - level) + base[tail] - base[head]


@part
def extend(
    key: Any,
    link: Any,
    used: Any,
    root: Any,
    short: Any,
    cut: Any,
    indptr: Any,
    expert: Any,
    score: Any,
    held: Any,
    count: Any,
    least: Any,
    most: Any,
    tail: Any,
    head: Any,
    longest: float,
) -> Any:
    """Let in the arcs tail -> head up to the cost `longest`; return how many arcs there are then; -1: no room."""
    hub = len(root) - 1
    shortest = cut[tail, head]
    cut[tail, head] = longest
    if root[tail, head] < 0:
        short[tail, head] = longest
    for i in range(len(least)):
        gave, took = np.int64(HUB), np.int64(HUB)
        for at in range(indptr[i], indptr[i + 1]):
            if held[at] and expert[at] == tail:
                gave = np.int64(at)
            elif not held[at] and expert[at] == head:
                took = np.int64(at)
        gives = count[i] < most[i] if tail == hub else gave >= 0
        takes = count[i] > least[i] if head == hub else took >= 0
        if not (gives and takes):
            continue
        cost = (score[gave] if gave >= 0 else 0.0) - (score[took] if took >= 0 else 0.0)
        if shortest < cost <= longest:
            if used == len(key):
                return np.int64(-1)
            key[used] = cost
            link[used, GAVE] = gave
            link[used, TOOK] = took
            link[used, _CHILD] = -1
            link[used, _SIBLING] = -1
            root[tail, head] = _meld(key, link, np.int64(root[tail, head]), used)
            short[tail, head] = key[root[tail, head]]
            used += 1
    return used


@part
def _surface(
    key: Any,
    link: Any,
    root: Any,
    short: Any,
    cut: Any,
    owner: Any,
    held: Any,
    count: Any,
    least: Any,
    most: Any,
    tail: Any,
    head: Any,
) -> None:
    """Bring up the cheapest arc tail -> head that its client can still use."""
    at = np.int64(root[tail, head])
    while at >= 0:
        gave, took = link[at, GAVE], link[at, TOOK]
        who = owner[max(gave, took)]
        gives = held[gave] if gave >= 0 else count[who] < most[who]
        takes = not held[took] if took >= 0 else count[who] > least[who]
        if gives and takes:
            break
        at = pop(key, link, at)
    root[tail, head] = at
    short[tail, head] = key[at] if at >= 0 else cut[tail, head]


@part
def refresh(
    key: Any,
    link: Any,
    root: Any,
    short: Any,
    cut: Any,
    owner: Any,
    held: Any,
    count: Any,
    least: Any,
    most: Any,
    client: Any,
    tail: Any,
    head: Any,
) -> None:
    """Look again for arcs out of `tail`, and into `head`, where the cheapest was that of a client that moved."""
    for node in range(len(root)):
        at = root[tail, node]
        if at >= 0 and owner[max(link[at, GAVE], link[at, TOOK])] == client:
            _surface(key, link, root, short, cut, owner, held, count, least, most, tail, np.int64(node))
        at = root[node, head]
        if at >= 0 and owner[max(link[at, GAVE], link[at, TOOK])] == client:
            _surface(key, link, root, short, cut, owner, held, count, least, most, np.int64(node), head)
