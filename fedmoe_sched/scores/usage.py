"""Expert usage: a decayed average of the training work that each expert received."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, as_vector, read_only
from fedmoe_sched.errors import InputError

__all__ = ["UsageOptions", "UsageScores"]


@dataclass(frozen=True)
class UsageOptions:
    """How usage is counted.

    Parameters
    ----------
    decay : float, default 0.3
        In (0, 1]: the weight of the newest round; 1 forgets all others.
    unit : {"samples", "compute"}, default "samples"
        Work in samples, or in samples times the relative compute of the expert (`ExpertCost.expert_compute`).

    Raises
    ------
    InputError
        A value out of range.
    """

    decay: float = 0.3
    unit: Literal["samples", "compute"] = "samples"

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            msg = f"decay = {self.decay}: must be > 0 and <= 1"
            raise InputError(msg)
        if self.unit not in ("samples", "compute"):
            msg = f"unit = {self.unit!r}: must be 'samples' or 'compute'"
            raise InputError(msg)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values; ``UsageOptions(**values)`` restores them."""
        return asdict(self)


class UsageScores:
    """Usage of m experts: ``u <- (1 - decay) u + decay * work``, zero at the start (Chen et al. 2025 [T]).

    Parameters
    ----------
    n_experts : int
        m.
    options : UsageOptions, optional
    expert_compute : array_like, shape (m,), optional
        Compute per sample of each expert, relative to one another; used with ``unit="compute"``, where it is 1
        for all experts unless given.

    Examples
    --------
    >>> usage = UsageScores(2, UsageOptions(decay=0.5))
    >>> usage.update([100, 0])
    >>> usage.update([0, 60])
    >>> usage.values.tolist()
    [25.0, 30.0]
    """

    def __init__(
        self,
        n_experts: int,
        options: UsageOptions | None = None,
        expert_compute: npt.ArrayLike | None = None,
    ) -> None:
        self.options = options or UsageOptions()
        weights = np.ones(n_experts) if expert_compute is None else expert_compute
        weights = as_vector("expert_compute", weights, n_experts, "one per expert", least=0)
        self._weights = weights if self.options.unit == "compute" else np.ones(n_experts)
        self._values: FloatArray = np.zeros(n_experts)

    @property
    def values(self) -> FloatArray:
        """Usage of each expert, read-only; shape (m,), float64, in samples or compute."""
        return read_only(self._values)

    def update(self, samples: npt.ArrayLike) -> None:
        """Take in one round.

        Parameters
        ----------
        samples : array_like, shape (m,)
            Samples that each expert was trained on, summed over the clients; 0 for those nobody trained.

        Raises
        ------
        InputError
            Wrong shape, negative or not finite; nothing was changed then.
        """
        work = as_vector("samples", samples, len(self._values), "one per expert", least=0) * self._weights
        decay = self.options.decay
        self._values = (1 - decay) * self._values + decay * work

    def restore(self, values: npt.ArrayLike) -> None:
        """Set the usage of all experts, as read from `values` before."""
        self._values = as_vector("usage", values, len(self._values), "one per expert", least=0).copy()
