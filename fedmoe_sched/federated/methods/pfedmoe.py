"""pFedMoE: expert 0 is averaged; expert 1 and the gate are each client's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from fedmoe_sched.federated.aggregate import Aggregation, Update, expert_of
from fedmoe_sched.federated.methods.base import Arrays, Brief, Method, View
from fedmoe_sched.policies.base import Policy

__all__ = ["PFedMoe"]

_SHARED, _LOCAL = 0, 1


class PFedMoe(Method):
    """Clients keep an expert and a gate of their own; the server averages the shared expert and the extractor.

    What is personal is never sent: the server keeps its initial values, and a client that comes late starts from
    these, not from what others have learned. Somebody who takes no part in the training uses the shared expert
    alone, and so does a client that was never given experts.

    Source: pFedMoE (arXiv 2402.01350): only the shared expert is averaged [A]. That the shared extractor, on which
    both experts and the gate stand here, is averaged as well is ours [I]: with ``model.channels = []`` and
    ``expert_channels`` the experts have all blocks to themselves.
    """

    name: ClassVar[str] = "pfedmoe"

    def is_personal(self, name: str) -> bool:
        """Return whether a parameter is of the local expert or the gate."""
        return name.startswith("gate.") or expert_of(name) == _LOCAL

    def merge(
        self, state: Arrays, updates: Sequence[Update], briefs: Mapping[str, Brief], policy: Policy
    ) -> Aggregation:
        """Average what is shared; the server sees nothing of the rest."""
        combined = super().merge(state, updates, briefs, policy)
        initial = {name: value for name, value in state.items() if self.is_personal(name)}
        weights = {j: weight for j, weight in combined.expert_samples.items() if j != _LOCAL}
        return replace(combined, state={**combined.state, **initial}, expert_samples=weights)

    def client_view(self, client: int, held: Sequence[int]) -> View:
        """Return the client's mixture of the shared expert and its own."""
        return View(tuple(held) or (_SHARED,), self.personal_parts(client))

    def global_view(self) -> View:
        """Return the shared expert alone."""
        return View((_SHARED,))
