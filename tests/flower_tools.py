"""A Flower grid in this process, for tests: no network, no waiting, faults on demand."""

from __future__ import annotations

import contextlib
import itertools

from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

ENGINE = 1  # the node number under which the engine itself answers


def let_messages_be_made():
    """Give this process the identity without which newer versions of Flower make no messages."""
    with contextlib.suppress(ImportError):
        from flwr.supercore.task_identity import TaskIdentity

        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, ENGINE, 1


class FakeGrid(Grid):
    """Nodes that run a ClientApp as soon as they are asked for an answer.

    Parameters
    ----------
    app : ClientApp
    node_configs : iterable of dict
        One node each.
    fault : callable, optional
        Called with (client number, round, the reply) for every training task. What it returns is the reply; None
        is no reply, and the node is busy from then on (`recover`); an exception is one of the ClientApp.
    question_fault : callable, optional
        The same for every question before a round.
    """

    def __init__(self, app, node_configs, fault=None, question_fault=None):
        let_messages_be_made()
        self.app, self.faults = app, {"task": fault, "question": question_fault}
        self.nodes, self.busy = {}, set()
        self.sent = []  # (node number, message) of every training task
        self.asked = []  # of every question before a round
        self._open, self._numbers = {}, itertools.count(1001)
        self._ids = itertools.count()
        self.started = [self.add(config) for config in node_configs]

    def add(self, node_config):
        number = next(self._numbers)
        self.nodes[number] = Context(1, number, dict(node_config), RecordDict(), {})
        return number

    def restart(self, number):
        """Start a node anew: it comes back with another number and an empty state."""
        config = self.nodes.pop(number).node_config
        self.busy.discard(number)
        return self.add(config)

    def recover(self, number):
        self.busy.discard(number)

    # The interface of the engine ----------------------------------------------------------------------------

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message {next(self._ids)}"
            ids.append(message.metadata.message_id)
            self._open[ids[-1]] = message
            node = message.metadata.dst_node_id
            kind = _kind(message)
            if kind is not None:
                assert node not in self.busy, "work for a node that owes an answer"
                (self.sent if kind == "task" else self.asked).append((node, message))
        return ids

    def pull_messages(self, message_ids):
        # In no helpful order, as from the network.
        replies = [self._answer(self._open[i]) for i in sorted(message_ids, reverse=True) if i in self._open]
        replies = [reply for reply in replies if reply is not None]
        for reply in replies:
            del self._open[reply.metadata.reply_to_message_id]
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        """Return what comes back; what does not come at once, comes never."""
        return self.pull_messages(list(self.push_messages(list(messages))))

    def _answer(self, message):
        number = message.metadata.dst_node_id
        if number not in self.nodes or number in self.busy:
            return None
        fault = self.faults.get(_kind(message))
        try:
            reply = self.app(message, self.nodes[number])
            if fault is not None:
                client = self.nodes[number].node_config["partition-id"]
                reply = fault(client, int(message.metadata.group_id), reply)
        except Exception as error:
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
        if reply is None:
            self.busy.add(number)
        return reply


def _kind(message):
    """Tell tasks, questions, and queries who a node is (None)."""
    if message.metadata.message_type == MessageType.TRAIN:
        return "task"
    return "question" if "question" in message.content else None


def expired(reply):
    """Return what the engine says in the place of a node that did not answer in time."""
    error = Message(Error(5, "the message has expired"), reply_to=reply)
    error.metadata.__dict__["_src_node_id"] = ENGINE
    error.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    return error
