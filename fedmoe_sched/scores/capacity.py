"""Client capacity: device profiles in; experts per round, eligible pairs and round times out.

The time of a round follows FedScale's model (Lai et al. 2022, in its code [T]): computing takes
``3 * samples * ms_per_sample / 1000`` seconds, the 3 being forward and backward pass in units of the forward pass;
sending takes ``bytes / bandwidth``. Latency, and how both split over experts, are our additions [I]::

    seconds_i(S) = correction_i * ( latency_i
                   + 3 samples ms_per_sample_i / 1000 * (shared_compute + sum_{j in S} expert_compute_j)
                   + (1 / down_i + 1 / up_i) * sum_{j in S} expert_bytes_j
                   + shared_bytes / down_i + shared_up_bytes / up_i )
    memory(S)    = memory_overhead * (shared_bytes + sum_{j in S} expert_bytes_j)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray, as_vector
from fedmoe_sched.errors import InputError
from fedmoe_sched.resource_budget import ResourceBudget

__all__ = [
    "TRAINING_FACTOR",
    "CapacityProfile",
    "ExpertCost",
    "capacity_and_eligibility",
    "corrected_speed",
    "estimate_profile",
    "profile_table",
    "resource_budgets",
    "round_seconds",
]

#: Cost of forward and backward pass over that of the forward pass alone, as in FedScale.
TRAINING_FACTOR = 3.0

_SMALLEST = 1e-300  # of what is divided by: 1 / it is still finite
_BLOCK_CELLS = 2_097_152  # about 16 MB of float64


@dataclass(frozen=True)
class CapacityProfile:
    """What one client's device can do. What is left out is no limit.

    Parameters
    ----------
    ms_per_sample : float, default 0.0
        Milliseconds of one forward pass over one sample through what has compute 1.0 in `ExpertCost`;
        smaller is faster.
    memory_bytes : float, default inf
        Memory that training may use, in bytes.
    down_bandwidth, up_bandwidth : float, default inf
        Bytes (not bits) per second.
    latency : float, default 0.0
        Seconds of each round that depend on neither work nor size: connection, start-up.

    Raises
    ------
    InputError
        A value out of range or NaN.

    Examples
    --------
    >>> phone = CapacityProfile(ms_per_sample=20, memory_bytes=4e9, down_bandwidth=5e6, up_bandwidth=1e6)
    >>> phone.latency
    0.0
    """

    ms_per_sample: float = 0.0
    memory_bytes: float = math.inf
    down_bandwidth: float = math.inf
    up_bandwidth: float = math.inf
    latency: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            limited = field.name in ("ms_per_sample", "latency")
            if limited and not (0 <= value < math.inf):
                msg = f"{field.name} = {value}: must be finite and >= 0"
                raise InputError(msg)
            if not limited and not value >= _SMALLEST:
                msg = f"{field.name} = {value}: must be > 0 (inf is no limit)"
                raise InputError(msg)
            object.__setattr__(self, field.name, float(value))


@dataclass(frozen=True)
class ExpertCost:
    """What training experts costs a client in a round.

    Parameters
    ----------
    expert_bytes : float or sequence of m floats, default 0.0
        Size of an expert's parameters, as sent and as held.
    expert_compute : float or sequence of m floats, default 1.0
        Compute of one sample through an expert, in units of what `CapacityProfile.ms_per_sample` measured.
    shared_bytes, shared_compute : float, default 0.0
        The same for what every client trains beside its experts (feature extractor, gate).
    memory_overhead : float, default 4.0
        Memory per byte of parameters, >= 1: parameters, gradients and Adam's two moments make 4; activations
        come on top.
    samples : float, default 0.0
        Samples that a client trains on per round (batch size times local steps); each passes through all its
        experts in the worst case, which is the one counted.
    shared_up_bytes : float, optional
        What of the shared part is sent back; less than `shared_bytes`, the default, where some of it is frozen.

    Raises
    ------
    InputError
        A value out of range or not finite.
    """

    expert_bytes: float | tuple[float, ...] = 0.0
    expert_compute: float | tuple[float, ...] = 1.0
    shared_bytes: float = 0.0
    shared_compute: float = 0.0
    memory_overhead: float = 4.0
    samples: float = 0.0
    shared_up_bytes: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None and field.default is None:
                continue
            given = np.asarray(getattr(self, field.name))
            least = 1.0 if field.name == "memory_overhead" else 0.0
            values = as_vector(field.name, given.reshape(-1), given.size, "one per expert", least=least).tolist()
            scalar = given.ndim == 0
            if not scalar and field.name not in ("expert_bytes", "expert_compute"):
                msg = f"{field.name}: has shape {given.shape}, must be one number"
                raise InputError(msg)
            object.__setattr__(self, field.name, values[0] if scalar else tuple(values))

    @property
    def shared_upload(self) -> float:
        """Bytes of the shared part that are sent back."""
        return self.shared_bytes if self.shared_up_bytes is None else self.shared_up_bytes

    def bytes_of(self, n_experts: int) -> FloatArray:
        """Return the size of each of m experts; shape (m,), float64."""
        return _per_expert("expert_bytes", self.expert_bytes, n_experts)

    def compute_of(self, n_experts: int) -> FloatArray:
        """Return the relative compute of each of m experts; shape (m,), float64."""
        return _per_expert("expert_compute", self.expert_compute, n_experts)

    def to_dict(self) -> dict[str, Any]:
        """Return the costs as plain values; ``ExpertCost(**values)`` restores them."""
        return asdict(self)


def _per_expert(name: str, value: float | tuple[float, ...], n_experts: int) -> FloatArray:
    if isinstance(value, tuple):
        return as_vector(name, value, n_experts, "one per expert")
    return np.full(n_experts, value)


def profile_table(profiles: Sequence[CapacityProfile]) -> FloatArray:
    """Return profiles as rows; shape (n, 5), float64, columns in the order of the fields."""
    return np.array([astuple(profile) for profile in profiles], dtype=np.float64).reshape(len(profiles), 5)


def _checked(
    profiles: npt.ArrayLike | Sequence[CapacityProfile], correction: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    if not isinstance(profiles, np.ndarray):
        listed: Any = profiles
        profiles = profile_table(listed)
    if profiles.ndim != 2 or profiles.shape[1] != 5:
        msg = f"profiles: has shape {profiles.shape}, must be (n, 5), see profile_table"
        raise InputError(msg)
    factors = np.asarray(correction, dtype=np.float64)
    if factors.ndim == 0:
        factors = np.full(len(profiles), factors)
    return profiles, as_vector("correction", factors, len(profiles), "one per client", least=0)


def _rates(
    profiles: FloatArray, cost: ExpertCost, correction: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Seconds per unit of compute, seconds per byte, and seconds before the first expert; each of shape (n,)."""
    compute = correction * TRAINING_FACTOR * cost.samples * profiles[:, 0] / 1000
    transfer = correction * (1 / profiles[:, 2] + 1 / profiles[:, 3])
    shared = correction * (cost.shared_bytes / profiles[:, 2] + cost.shared_upload / profiles[:, 3])
    fixed = correction * profiles[:, 4] + compute * cost.shared_compute + shared
    return compute, transfer, fixed


def round_seconds(
    profiles: npt.ArrayLike | Sequence[CapacityProfile],
    cost: ExpertCost,
    trained: npt.ArrayLike,
    *,
    correction: npt.ArrayLike = 1.0,
    received: npt.ArrayLike | None = None,
    sent: npt.ArrayLike | None = None,
) -> FloatArray:
    """Estimate how long each client's round takes.

    Parameters
    ----------
    profiles : sequence of n CapacityProfile, or ndarray of shape (n, 5)
        See `profile_table`.
    cost : ExpertCost
    trained : array_like of bool or float, shape (n, m)
        The experts of each client; a third for one that is only asked, not trained (FedScale's factor 3 is one
        pass forward and two back).
    correction : float or array_like, shape (n,), default 1.0
        Observed over estimated time so far, see `corrected_speed`.
    received, sent : array_like, shape (n, m), optional
        How often each client receives and sends each expert; as in `trained` by default.

    Returns
    -------
    ndarray, shape (n,), float64
        Seconds, by the model of this module.

    Examples
    --------
    >>> device = CapacityProfile(ms_per_sample=10, down_bandwidth=1e6, up_bandwidth=5e5)
    >>> cost = ExpertCost(expert_bytes=1e6, samples=100)
    >>> round_seconds([device], cost, [[True, True, False]]).tolist()
    [12.0]
    """
    table, factors = _checked(profiles, correction)
    mask = np.asarray(trained, dtype=np.float64)
    m = mask.shape[1]
    down, up = (mask if given is None else np.asarray(given, dtype=np.float64) for given in (received, sent))
    compute, _, fixed = _rates(table, cost, factors)
    sizes = cost.bytes_of(m)
    transfer = factors * (down @ sizes / table[:, 2] + up @ sizes / table[:, 3])
    seconds: FloatArray = fixed + compute * (mask @ cost.compute_of(m)) + transfer
    return seconds


def capacity_and_eligibility(
    profiles: npt.ArrayLike | Sequence[CapacityProfile],
    cost: ExpertCost,
    n_experts: int,
    *,
    deadline: float | None = None,
    correction: npt.ArrayLike = 1.0,
) -> tuple[IntArray, BoolArray]:
    """Return how many experts each client can train, and which.

    A pair is eligible if the client can train that expert alone within its memory and the deadline. The capacity
    is the largest k for which *any* k eligible experts fit: with experts of one size that is exact, with
    different sizes it is on the safe side.

    Parameters
    ----------
    profiles : sequence of n CapacityProfile, or ndarray of shape (n, 5)
    cost : ExpertCost
    n_experts : int
        m.
    deadline : float, optional
        Seconds that a round may take; None is no limit.
    correction : float or array_like, shape (n,), default 1.0
        See `corrected_speed`.

    Returns
    -------
    capacity : ndarray, shape (n,), int64
        0 for a client that can train none.
    eligible : ndarray, shape (n, m), bool

    Examples
    --------
    >>> cost = ExpertCost(expert_bytes=[1e6, 1e6, 8e6], memory_overhead=4)
    >>> capacity, eligible = capacity_and_eligibility([CapacityProfile(memory_bytes=9e6)], cost, 3)
    >>> capacity.tolist(), eligible.tolist()
    ([2], [[True, True, False]])
    """
    table, factors = _checked(profiles, correction)
    _refuse_bad_deadline(deadline)
    n = len(table)
    capacity, eligible = np.zeros(n, dtype=np.int64), np.zeros((n, n_experts), dtype=np.bool_)
    step = max(1, _BLOCK_CELLS // n_experts)
    for start in range(0, n, step):
        part = slice(start, start + step)
        capacity[part], eligible[part] = _fits(table[part], cost, n_experts, deadline, factors[part])
    return capacity, eligible


def resource_budgets(
    profiles: npt.ArrayLike | Sequence[CapacityProfile],
    cost: ExpertCost,
    n_experts: int,
    *,
    deadline: float | None = None,
    upload_bytes: npt.ArrayLike | None = None,
    correction: npt.ArrayLike = 1.0,
) -> tuple[ResourceBudget, ...]:
    """Return what clients have, and what each expert takes of it, to the byte and the second.

    `capacity_and_eligibility` counts experts, and stays on the safe side where they differ in size. With these
    budgets a schedule uses all there is: pass them as ``schedule(..., budgets=...)``, with a capacity that is no
    longer about memory or time, such as `n_experts` for as many as fit. Clients without room for what is shared
    have budgets of 0, and take no expert that costs anything.

    Parameters
    ----------
    profiles : sequence of n CapacityProfile, or ndarray of shape (n, 5)
    cost : ExpertCost
    n_experts : int
        m.
    deadline : float, optional
        Seconds that a round may take; None is no limit.
    upload_bytes : array_like, shape (n,), optional
        Bytes that each client may send in a round, what is shared included; None is no limit.
    correction : float or array_like, shape (n,), default 1.0
        See `corrected_speed`.

    Returns
    -------
    tuple of ResourceBudget
        ``"memory"`` in bytes; ``"seconds"`` if there is a deadline; ``"upload"`` in bytes if that is limited.

    Examples
    --------
    >>> cost = ExpertCost(expert_bytes=[1e6, 1e6, 8e6], memory_overhead=4)
    >>> [memory] = resource_budgets([CapacityProfile(memory_bytes=9e6)], cost, 3)
    >>> memory.size.tolist(), memory.budget.tolist()
    ([4000000.0, 4000000.0, 32000000.0], [9000000.0])
    """
    table, factors = _checked(profiles, correction)
    _refuse_bad_deadline(deadline)
    compute, transfer, fixed = _rates(table, cost, factors)
    sizes, work = cost.bytes_of(n_experts), cost.compute_of(n_experts)
    free = table[:, 1] - cost.memory_overhead * cost.shared_bytes
    budgets = [ResourceBudget("memory", cost.memory_overhead * sizes, np.maximum(free, 0.0))]
    if deadline is not None:
        seconds = compute[:, None] * work + transfer[:, None] * sizes
        budgets.append(ResourceBudget("seconds", seconds, np.maximum(deadline - fixed, 0.0)))
    if upload_bytes is not None:
        most = as_vector("upload_bytes", upload_bytes, len(table), "one per client", least=0)
        budgets.append(ResourceBudget("upload", sizes, np.maximum(most - cost.shared_upload, 0.0)))
    return tuple(budgets)


def _refuse_bad_deadline(deadline: float | None) -> None:
    if deadline is not None and not deadline > 0:
        msg = f"deadline = {deadline}: must be > 0 seconds, or None"
        raise InputError(msg)


def _fits(
    table: FloatArray, cost: ExpertCost, n_experts: int, deadline: float | None, correction: FloatArray
) -> tuple[IntArray, BoolArray]:
    compute, transfer, fixed = _rates(table, cost, correction)
    sizes, work = cost.bytes_of(n_experts), cost.compute_of(n_experts)
    memory = np.broadcast_to(cost.memory_overhead * sizes, (len(table), n_experts))
    free = table[:, 1] - cost.memory_overhead * cost.shared_bytes
    seconds = compute[:, None] * work + transfer[:, None] * sizes
    left = np.full(len(table), np.inf) if deadline is None else deadline - fixed
    eligible = (memory <= _forgiving(free)[:, None]) & (seconds <= _forgiving(left)[:, None])
    capacity = np.minimum(_largest_count(memory, free, eligible), _largest_count(seconds, left, eligible))
    return capacity, eligible


def _forgiving(budget: FloatArray) -> FloatArray:
    """Let a sum that equals the budget up to rounding fit."""
    return budget + 1e-12 * np.abs(np.where(np.isfinite(budget), budget, 0.0))


def _largest_count(need: FloatArray, budget: FloatArray, eligible: BoolArray) -> IntArray:
    """Return how many eligible entries of each row fit the budget, whichever they are."""
    sums = np.cumsum(-np.sort(np.where(eligible, -need, 0.0), axis=1), axis=1)
    fitting = (sums <= _forgiving(budget)[:, None]).sum(axis=1)
    counts: IntArray = np.minimum(fitting, eligible.sum(axis=1)).astype(np.int64)
    return counts


def corrected_speed(
    correction: npt.ArrayLike, observed: npt.ArrayLike, estimated: npt.ArrayLike, rate: float = 0.3
) -> FloatArray:
    """Learn from observed round times how much slower or faster clients are than their profiles say.

    ``r <- (1 - rate) r + rate * observed / estimated``: for a client that always takes r* times as long as its
    profile says, the error shrinks by ``1 - rate`` with each round.

    Parameters
    ----------
    correction : array_like, shape (k,)
        Factors so far; 1.0 trusts the profile.
    observed, estimated : array_like, shape (k,)
        Seconds that the round took, and that `round_seconds` gives with correction 1. Where the estimate is 0
        there is nothing to compare with, and the factor stays.
    rate : float, default 0.3
        In (0, 1].

    Returns
    -------
    ndarray, shape (k,), float64

    Examples
    --------
    >>> corrected_speed([1.0], observed=[20.0], estimated=[10.0], rate=0.5).tolist()
    [1.5]
    """
    if not 0 < rate <= 1:
        msg = f"rate = {rate}: must be > 0 and <= 1"
        raise InputError(msg)
    k = np.size(correction)
    factors = as_vector("correction", correction, k, "one per client", least=0)
    took = as_vector("observed", observed, k, "one per client", least=0)
    expected = as_vector("estimated", estimated, k, "one per client", least=0)
    ratio: FloatArray = np.divide(took, expected, out=factors.copy(), where=expected > 0)
    learned: FloatArray = (1 - rate) * factors + rate * ratio
    return learned


def estimate_profile(
    seconds: npt.ArrayLike,
    compute: npt.ArrayLike,
    down_bytes: npt.ArrayLike,
    up_bytes: npt.ArrayLike,
    *,
    memory_bytes: float = math.inf,
) -> CapacityProfile:
    """Estimate a client's profile from rounds it has already done, by non-negative least squares.

    Fits ``seconds = 3 ms_per_sample / 1000 * compute + down_bytes / down + up_bytes / up + latency`` with all
    four unknowns >= 0 (Lawson and Hanson, *Solving Least Squares Problems*, chapter 23). Rounds that do not differ
    in work or size cannot tell the causes apart: the sum is then right, the split is not.

    Parameters
    ----------
    seconds : array_like, shape (k,)
        Observed round times.
    compute : array_like, shape (k,)
        Samples times relative compute of what was trained, summed over it.
    down_bytes, up_bytes : array_like, shape (k,)
        Bytes received and sent.
    memory_bytes : float, default inf
        Cannot be seen from times, and is handed on.

    Returns
    -------
    CapacityProfile
        A cause that explains nothing is no limit.

    Examples
    --------
    >>> profile = estimate_profile([4.0, 7.0], [100, 200], [0, 0], [0, 0])
    >>> round(profile.ms_per_sample, 6), round(profile.latency, 6)
    (10.0, 1.0)
    """
    from scipy.optimize import nnls  # a quarter of a second to import

    k = np.asarray(seconds).size
    if k == 0:
        msg = "seconds: holds no observation"
        raise InputError(msg)
    took = as_vector("seconds", seconds, k, "one per round", least=0)
    given = (("compute", compute), ("down_bytes", down_bytes), ("up_bytes", up_bytes))
    columns = [as_vector(name, value, k, "one per round", least=0) for name, value in given]
    matrix = np.column_stack([columns[0] * (TRAINING_FACTOR / 1000), *columns[1:], np.ones(k)])
    # Bytes and samples differ by orders of magnitude; unit columns keep the fit well conditioned.
    scale = np.maximum(matrix.max(axis=0), np.finfo(np.float64).tiny)
    solution = nnls(matrix / scale, took)[0] / scale
    ms, down, up, latency = (float(value) for value in solution)
    return CapacityProfile(
        ms, memory_bytes, 1 / down if down > 0 else math.inf, 1 / up if up > 0 else math.inf, latency
    )
