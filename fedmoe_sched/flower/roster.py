"""Which nodes are there, which clients they are, and whether they are idle.

The engine knows nodes by numbers that change when a node is started anew; the scheduler knows clients by names
that do not. Nodes tell their name, and what their device can do, when they are asked. A node works through its
messages in turn: one that owes an answer is asked again, in vain while it is busy, and is idle once it answers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.coordinator import ClientOffer
from fedmoe_sched.flower.messages import read_offer

__all__ = ["Roster"]

_POLL = 0.25  # seconds between looks while waiting
_NEW = 20.0  # seconds for which a node that has just come is waited for

_log = logging.getLogger("flwr")  # what the engine shows and sends to `flwr log`


@dataclass
class _Node:
    """What is known of a node; `asked` is the open query, `idle` whether it can get work, `since` when it came."""

    name: str = ""
    offer: ClientOffer = field(default_factory=ClientOffer)
    asked: Message | None = None
    idle: bool = False
    since: float = field(default_factory=time.monotonic)

    @property
    def introducing(self) -> bool:
        """Whether it has just come, and has not said yet who it is."""
        return not self.name and self.asked is not None and time.monotonic() < self.since + _NEW


class Roster:
    """The nodes of a run.

    Parameters
    ----------
    names : collection of str
        The clients there may be; nodes with other names are left alone.
    query_timeout : float
        Seconds for which a query is valid; it is repeated then.
    """

    def __init__(self, names: Collection[str], *, query_timeout: float) -> None:
        self._names = frozenset(names)
        self._ttl = query_timeout
        self._nodes: dict[int, _Node] = {}  # in the order in which they appeared

    def busy(self) -> list[str]:
        """Return the clients that are connected and owe an answer."""
        idle = self.idle()
        return sorted({node.name for node in self._nodes.values() if node.name} - set(idle))

    def idle(self) -> dict[str, int]:
        """Return the node of every client that can be given work; of several nodes of a client the newest."""
        newest = {node.name: number for number, node in self._nodes.items() if node.name}
        return {name: number for name, number in newest.items() if self._nodes[number].idle}

    def offers(self) -> dict[str, ClientOffer]:
        """Return what the idle clients say of themselves."""
        return {name: self._nodes[number].offer for name, number in self.idle().items()}

    def occupy(self, number: int) -> None:
        """Note that a node has been given work."""
        self._nodes[number].idle = False

    def release(self, number: int) -> None:
        """Note that a node has answered."""
        if number in self._nodes:  # it may be gone already
            self._nodes[number].idle = True

    def wait_for(self, grid: Grid, count: int, timeout: float) -> bool:
        """Wait until so many clients are idle; return whether they are.

        Nodes that have just come are waited for as well, for a short time: else whoever answers first would begin
        without those that were started together with it.
        """
        end = time.monotonic() + timeout
        while True:
            self.refresh(grid)
            enough = len(self.idle()) >= count
            if enough and not any(node.introducing for node in self._nodes.values()):
                return True
            if time.monotonic() >= end:
                return enough
            time.sleep(_POLL)

    def refresh(self, grid: Grid) -> None:
        """See which nodes are there, ask those that are new or owe an answer, and hear answers; never wait."""
        present = set(grid.get_node_ids())
        self._nodes = {number: node for number, node in self._nodes.items() if number in present}
        for number in sorted(present - set(self._nodes)):
            self._nodes[number] = _Node()
        self._ask(grid)
        self._hear(grid)

    def _ask(self, grid: Grid) -> None:
        queries = []
        for number, node in self._nodes.items():
            if not node.idle and node.asked is None:
                node.asked = Message(RecordDict(), number, MessageType.QUERY, ttl=self._ttl, group_id="query")
                queries.append(node.asked)
        if queries:
            grid.push_messages(queries)

    def _hear(self, grid: Grid) -> None:
        asked = {node.asked.metadata.message_id: number for number, node in self._nodes.items() if node.asked}
        if not asked:
            return
        for reply in grid.pull_messages(list(asked)):
            number = asked[reply.metadata.reply_to_message_id]
            node = self._nodes[number]
            node.asked = None  # whatever came back, the next look asks again if the node is still not idle
            if reply.has_error():
                _log.warning("node %d: query: %s", number, reply.error.reason)
            else:
                self._take_in(number, node, reply.content)

    def _take_in(self, number: int, node: _Node, content: RecordDict) -> None:
        try:
            name, offer = read_offer(content)
        except InputError as error:
            _log.warning("node %d: %s", number, error)
            return
        if name not in self._names:
            _log.warning("node %d: there is no client %r in this run", number, name)
            return
        if name in self.idle() and not node.name:
            _log.warning("node %d: takes the place of an earlier node of %s", number, name)
        node.name, node.offer, node.idle = name, offer, True
