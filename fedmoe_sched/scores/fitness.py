"""Client-expert fitness: a moving average of rewards, and the rewards themselves.

The marks of the formulas: [T] read in the source's own text or code, [S] from a secondary account, which may be
wrong, [I] inferred by us.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import FloatArray, IntArray, as_matrix, as_vector, read_only
from fedmoe_sched._growing import GrowingRows
from fedmoe_sched.errors import InputError

__all__ = [
    "FitnessOptions",
    "FitnessScores",
    "accuracy_reward",
    "flux_reward",
    "loss_reward",
    "oort_reward",
    "router_frequency_reward",
]


@dataclass(frozen=True)
class FitnessOptions:
    """How fitness learns from rewards.

    Parameters
    ----------
    rate : float, default 0.3
        ``beta`` in ``Q <- (1 - beta) Q + beta s``, in (0, 1].
    prior : float or sequence of m floats, default 1.0
        Fitness of a pair that was never trained. The best possible reward is the optimistic start: every expert is
        tried before one that disappoints is kept (Sutton and Barto, *Reinforcement Learning*, section 2.6). The
        default is that for rewards in [0, 1]; with 0.0, "nothing is known to suit", clients stay with the experts
        that they happened to begin with.
    on_idle : {"keep", "decay"}, default "keep"
        What becomes of pairs that were not trained in a round: kept as they are (FLEX-MoE, arXiv 2512.23070 [S]),
        or moved towards the prior, ``Q <- (1 - idle_decay) Q + idle_decay * prior`` (Chen et al. 2025,
        arXiv 2507.05685, say "slowly decayed"; towards what is our reading [I]).
    idle_decay : float, default 0.02
        In [0, 1]; used with ``on_idle="decay"``.
    exploration : float, default 0.0 (off)
        Weight of the bonus for rarely trained pairs in `FitnessScores.scores`, in units of fitness.

    Raises
    ------
    InputError
        A value out of range.
    """

    rate: float = 0.3
    prior: float | tuple[float, ...] = 1.0
    on_idle: Literal["keep", "decay"] = "keep"
    idle_decay: float = 0.02
    exploration: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            msg = f"rate = {self.rate}: must be > 0 and <= 1"
            raise InputError(msg)
        if not 0 <= self.idle_decay <= 1:
            msg = f"idle_decay = {self.idle_decay}: must be from 0 to 1"
            raise InputError(msg)
        if not (self.exploration >= 0 and math.isfinite(self.exploration)):
            msg = f"exploration = {self.exploration}: must be finite and >= 0"
            raise InputError(msg)
        if self.on_idle not in ("keep", "decay"):
            msg = f"on_idle = {self.on_idle!r}: must be 'keep' or 'decay'"
            raise InputError(msg)
        object.__setattr__(self, "prior", _plain_prior(self.prior))

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values; ``FitnessOptions(**values)`` restores them."""
        return asdict(self)


def _plain_prior(prior: Any) -> float | tuple[float, ...]:
    values = np.asarray(prior)
    if values.ndim == 0:
        return float(as_vector("prior", values.reshape(1), 1, "one number")[0])
    return tuple(as_vector("prior", values, values.size, "one per expert").tolist())


class FitnessScores:
    """Fitness of every known (client, expert) pair: a dense (n, m) table that grows with the clients.

    Clients are row numbers here, 0..n-1 in the order in which they were added.

    Parameters
    ----------
    n_experts : int
        m.
    options : FitnessOptions, optional

    Examples
    --------
    >>> fitness = FitnessScores(2, FitnessOptions(rate=0.5, prior=0.2))
    >>> fitness.add(1)
    >>> fitness.update([0], [1], [1.0])
    >>> fitness.values.tolist()
    [[0.2, 0.6]]
    """

    def __init__(self, n_experts: int, options: FitnessOptions | None = None) -> None:
        self.options = options or FitnessOptions()
        prior = self.options.prior
        if isinstance(prior, tuple):
            self.prior: FloatArray = as_vector("prior", prior, n_experts, "one per expert")
        else:
            self.prior = np.full(n_experts, prior)
        self.rounds = 0
        self._values = GrowingRows(np.zeros((0, n_experts)))
        self._trials = GrowingRows(np.zeros((0, n_experts if self.options.exploration else 0), dtype=np.int64))

    def __len__(self) -> int:
        return len(self._values)

    @property
    def values(self) -> FloatArray:
        """The fitness of all pairs, read-only; shape (n, m), float64."""
        return read_only(self._values.rows)

    @property
    def trials(self) -> IntArray | None:
        """How often each pair was trained, shape (n, m), int64; counted only if `exploration` is on."""
        return read_only(self._trials.rows) if self.options.exploration else None

    def add(self, count: int) -> None:
        """Add `count` clients, with the prior."""
        self._values.append(np.broadcast_to(self.prior, (count, len(self.prior))))
        self._trials.append(np.zeros((count, self._trials.rows.shape[1]), dtype=np.int64))

    def put(self, client: int, values: npt.ArrayLike) -> None:
        """Replace the fitness of one client, shape (m,), for example by what is known from elsewhere."""
        self._values.rows[client] = as_vector("fitness", values, len(self.prior), "one per expert")

    def scores(self, clients: npt.ArrayLike) -> FloatArray:
        """Return the fitness to schedule by, exploration bonus included.

        ``Q_ij + exploration * sqrt(ln(1 + t) / (1 + n_ij))`` with t closed rounds and n_ij trials of the pair: the
        shape of UCB1 (Auer, Cesa-Bianchi and Fischer 2002), with 1 + n so that untried pairs stay finite [I].

        Parameters
        ----------
        clients : array_like of int, shape (k,)
            Row numbers; -1 stands for a client that is not known yet, which has the prior and no trials.

        Returns
        -------
        ndarray, shape (k, m), float64
            A copy.
        """
        return self.of(clients) + self.bonus(clients) if self.options.exploration else self.of(clients)

    def of(self, clients: npt.ArrayLike) -> FloatArray:
        """Return the bare fitness of some clients, shape (k, m), a copy; -1 is a client not known yet."""
        rows = np.asarray(clients, dtype=np.int64)
        if not len(self):
            return np.broadcast_to(self.prior, (len(rows), len(self.prior))).copy()
        values = self._values.rows[rows]
        values[rows < 0] = self.prior
        return values

    def bonus(self, clients: npt.ArrayLike) -> FloatArray:
        """Return the exploration bonus of some clients, shape (k, m); see `scores`."""
        rows = np.asarray(clients, dtype=np.int64)
        trials = np.zeros((len(rows), len(self.prior)))
        if self.options.exploration and len(self):
            trials[rows >= 0] = self._trials.rows[rows[rows >= 0]]
        weight = self.options.exploration * math.sqrt(math.log1p(self.rounds))
        bonus: FloatArray = weight / np.sqrt(1.0 + trials)
        return bonus

    def update(self, clients: npt.ArrayLike, experts: npt.ArrayLike, rewards: npt.ArrayLike) -> None:
        """Learn from one round: the moving average for trained pairs, `on_idle` for all others.

        Parameters
        ----------
        clients, experts : array_like of int, shape (k,)
            The pairs that were trained; each at most once.
        rewards : array_like, shape (k,)
            Finite.

        Raises
        ------
        InputError
            A reward is not finite, a pair does not exist or occurs twice; nothing was changed then.
        """
        rows, columns = np.asarray(clients, dtype=np.int64), np.asarray(experts, dtype=np.int64)
        seen = as_vector("rewards", rewards, len(rows), "one per pair")
        self._refuse_bad_pairs(rows, columns)
        options, values = self.options, self._values.rows
        learned = (1 - options.rate) * values[rows, columns] + options.rate * seen
        if options.on_idle == "decay":
            values *= 1 - options.idle_decay
            values += options.idle_decay * self.prior
        values[rows, columns] = learned
        if options.exploration:
            self._trials.rows[rows, columns] += 1
        self.rounds += 1

    def _refuse_bad_pairs(self, rows: IntArray, columns: IntArray) -> None:
        n, m = self._values.rows.shape
        if rows.shape != columns.shape or rows.ndim != 1:
            msg = f"experts: has shape {columns.shape}, clients has {rows.shape}; must be equal and flat"
            raise InputError(msg)
        outside = (rows < 0) | (rows >= n) | (columns < 0) | (columns >= m)
        if outside.any():
            at = int(np.argmax(outside))
            msg = f"pair[{at}] = ({rows[at]}, {columns[at]}): must lie within {n} clients x {m} experts"
            raise InputError(msg)
        keys = np.sort(rows * m + columns)
        if (keys[1:] == keys[:-1]).any():
            key = int(keys[int(np.argmax(keys[1:] == keys[:-1]))])
            msg = f"pair ({key // m}, {key % m}): occurs twice"
            raise InputError(msg)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return copies of all that changes over the rounds; `restore` takes them back."""
        return {
            "values": self._values.rows.copy(),
            "trials": self._trials.rows.copy(),
            "rounds": np.array(self.rounds, dtype=np.int64),
        }

    def restore(self, arrays: dict[str, npt.NDArray[Any]]) -> None:
        """Take back what `arrays` returned.

        Raises
        ------
        InputError
            The arrays do not fit these options or one another.
        """
        values, trials, rounds = arrays["values"], arrays["trials"], arrays["rounds"]
        if len(values):
            as_matrix("values", values, (len(values), len(self.prior)))
        shape = (len(values), self._trials.rows.shape[1])
        if values.shape != (len(values), len(self.prior)) or values.dtype != np.float64:
            msg = f"values: a {values.dtype} array of shape {values.shape} for {len(self.prior)} experts"
            raise InputError(msg)
        if trials.shape != shape or trials.dtype != np.int64:
            msg = f"trials: a {trials.dtype} array of shape {trials.shape}, must be int64 of {shape}"
            raise InputError(msg)
        self._values, self._trials, self.rounds = GrowingRows(values), GrowingRows(trials), int(rounds)


def _numbers(name: str, value: npt.ArrayLike, *, least: float | None = 0.0) -> FloatArray:
    """Read finite numbers of any shape."""
    array = np.asarray(value, dtype=np.float64)
    as_vector(name, array.reshape(-1), array.size, "numbers", least=least)
    return array


def accuracy_reward(correct: npt.ArrayLike, samples: npt.ArrayLike) -> FloatArray:
    """Return the accuracy on the client's samples routed to the expert (FLEX-MoE, arXiv 2512.23070 [S]).

    Parameters
    ----------
    correct, samples : array_like of the same shape
        Samples classified right, and all samples routed to the expert.

    Returns
    -------
    ndarray
        ``correct / samples``, in [0, 1]; NaN where there are no samples: leave such experts out of the report.

    Examples
    --------
    >>> accuracy_reward([3, 5], [4, 10]).tolist()
    [0.75, 0.5]
    """
    right, total = np.broadcast_arrays(_numbers("correct", correct), _numbers("samples", samples))
    if (right > total).any():
        at = int(np.argmax(right > total))
        msg = f"correct[{at}] = {right.flat[at]:g}: must be <= samples[{at}] = {total.flat[at]:g}"
        raise InputError(msg)
    shares: FloatArray = np.divide(right, total, out=np.full(right.shape, np.nan), where=total > 0)
    return shares


def loss_reward(mean_loss: npt.ArrayLike, alpha: float = 1.0) -> FloatArray:
    """Return ``exp(-alpha * mean loss)`` over the samples routed to the expert (FLEX-MoE, arXiv 2512.23070 [S]).

    Parameters
    ----------
    mean_loss : array_like
        Finite; of any sign, though a loss is rarely negative.
    alpha : float, default 1.0
        Steepness, > 0, per unit of loss.

    Returns
    -------
    ndarray
        In (0, 1] for losses >= 0.

    Examples
    --------
    >>> loss_reward([0.0, 1.0]).round(4).tolist()
    [1.0, 0.3679]
    """
    if not (alpha > 0 and math.isfinite(alpha)):
        msg = f"alpha = {alpha}: must be finite and > 0"
        raise InputError(msg)
    reward: FloatArray = np.exp(-alpha * _numbers("mean_loss", mean_loss, least=None))
    return reward


def router_frequency_reward(counts: npt.ArrayLike) -> FloatArray:
    """Return the share of the client's samples that its router sends to each expert (Chen et al. 2025 [T]).

    Parameters
    ----------
    counts : array_like, shape (..., m)
        Samples (or gate mass) sent to each expert, by client.

    Returns
    -------
    ndarray, shape (..., m)
        Shares that sum to 1 along the last axis; zeros where nothing was sent at all.

    Examples
    --------
    >>> router_frequency_reward([30, 10, 0, 0]).tolist()
    [0.75, 0.25, 0.0, 0.0]
    """
    sent = _numbers("counts", counts)
    total = sent.sum(axis=-1, keepdims=True)
    shares: FloatArray = np.divide(sent, total, out=np.zeros_like(sent), where=total > 0)
    return shares


def oort_reward(samples: npt.ArrayLike, mean_squared_loss: npt.ArrayLike) -> FloatArray:
    """Return Oort's statistical utility, ``samples * sqrt(mean of squared losses)`` (Lai et al. 2021 [T]).

    Parameters
    ----------
    samples : array_like
        Samples of the client, or those routed to the expert.
    mean_squared_loss : array_like
        Mean over these samples of the squared loss.

    Returns
    -------
    ndarray
        >= 0, in samples times loss: rescale it before it is mixed with rewards in [0, 1].

    Examples
    --------
    >>> float(oort_reward(10, 4.0))
    20.0
    """
    reward: FloatArray = _numbers("samples", samples) * np.sqrt(_numbers("mean_squared_loss", mean_squared_loss))
    return reward


def flux_reward(samples: npt.ArrayLike, mean_gradient: npt.ArrayLike) -> FloatArray:
    """Return the utility of Flux per expert, ``samples_e * sqrt(mean gradient magnitude)`` (arXiv 2508.19078 [S]).

    Parameters
    ----------
    samples : array_like
        Samples routed to the expert.
    mean_gradient : array_like
        Mean magnitude of the expert's gradient over them.

    Returns
    -------
    ndarray
        >= 0; rescale it before it is mixed with rewards in [0, 1].

    Examples
    --------
    >>> float(flux_reward(10, 0.25))
    5.0
    """
    reward: FloatArray = _numbers("samples", samples) * np.sqrt(_numbers("mean_gradient", mean_gradient))
    return reward
