"""FedMix: all experts are sent and judged, the assigned ones trained and merged by their responsibilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.federated.aggregate import Aggregation, Update
from fedmoe_sched.federated.methods.base import Arrays, Brief, Method
from fedmoe_sched.policies.base import Policy
from fedmoe_sched.policies.fedmix import responsibilities

__all__ = ["FedMix"]


class FedMix(Method):
    """Every client gets all experts, judges each on its own samples, and trains those assigned to it.

    Expert e is averaged over the clients that trained it with weights ``n_i * pi_ie``: n_i samples, and pi_ie the
    responsibility (`fedmoe_sched.policies.fedmix.responsibilities`) over all experts, as they were sent in this
    round. An update whose losses are not finite is rejected.

    Source: FedMix (arXiv 2107.06724), used as a baseline elsewhere with all M experts sent to every client and
    these weights [S]; the formula of pi is a reconstruction [I]. That a client mixes only the experts assigned to
    it, and asks the others one by one, is ours [I]: its capacity then says what it has to hold at once. The
    download of all experts does not count in the capacity that profiles and deadlines give; the clock counts it.
    """

    name: ClassVar[str] = "fedmix"
    signals: ClassVar[tuple[str, ...]] = ("expert_loss",)

    def brief(self, client: int, experts: Sequence[int], state: Arrays) -> Brief:
        """Send all experts, and have all of them judged."""
        every = tuple(range(self.setting.experts))
        return replace(super().brief(client, experts, state), judged=every, down=every)

    def merge(
        self, state: Arrays, updates: Sequence[Update], briefs: Mapping[str, Brief], policy: Policy
    ) -> Aggregation:
        """Average with the responsibilities in place of what the router sent to the experts."""
        return super().merge(state, [self._weighted(update) for update in updates], briefs, policy)

    def _weighted(self, update: Update) -> Update:
        shares = self._shares(update)
        weights = {j: update.samples * float(shares[j]) for j in update.expert_samples if j < len(shares)}
        return replace(update, expert_samples={**update.expert_samples, **weights})

    def _shares(self, update: Update) -> npt.NDArray[np.float64]:
        """Return the responsibilities of all experts; NaN, which nobody merges, where their losses are missing."""
        m = self.setting.experts
        losses = np.asarray(update.signals.get("expert_loss", ()), dtype=np.float64)
        return responsibilities(losses if losses.shape == (m,) else np.full(m, np.nan))
