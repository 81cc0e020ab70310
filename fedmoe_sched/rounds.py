"""One round of training: what was planned, what was reported, and the record of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.errors import InputError
from fedmoe_sched.metrics import fitness_given_up, load_cv
from fedmoe_sched.result import Schedule

__all__ = [
    "ClientReport",
    "LabelledMatrix",
    "OpenRound",
    "RoundRecord",
    "RoundReports",
    "labelled_answer",
    "plan_summary",
]

#: Fields of a `RoundRecord` that the plan alone decides.
_SUMMARY = frozenset(
    {"available", "loads", "load_cv", "objective", "bound", "gap", "solver", "status", "stop_reason", "relaxed"}
    | {"relaxations", "experts_resent", "switching_paid"}
    | {"violations", "fitness_given_up", "plan_seconds", "build_seconds", "solve_seconds", "certify_seconds"}
)
_MOST_SAMPLES = 2**53  # sums of whole numbers are exact up to here


@dataclass(frozen=True)
class RoundRecord:
    """What one closed round was.

    Parameters
    ----------
    round : int
        1 for the first.
    policy : str
    available : int
        Clients that were there.
    planned, answered, failed : tuple of hashable
        Clients that were assigned experts; of these, those that reported, and those that did not or reported
        failure. In the order of the plan.
    loads : tuple of int
        Planned clients per expert, in the order of the scheduler's experts.
    trained_loads : tuple of int
        Clients that reported on each expert.
    load_cv : float
        Of `loads`, see `fedmoe_sched.metrics.load_cv`.
    usage : tuple of float
        After this round, in the unit of the scheduler's usage.
    samples : float
        Samples reported, over all experts.
    objective, bound, gap : float or None
        Of the schedule.
    solver, status, stop_reason : str
        Of the schedule.
    relaxed, violations : int
        Bounds that were widened, and constraints that a heuristic broke.
    relaxations : tuple of str
        Each widened bound in words, as in ``load_min[vision]: 4 -> 3``.
    fitness_given_up : float
        See `fedmoe_sched.metrics.fitness_given_up`.
    experts_resent : int
        Planned pairs that the client did not hold from before: experts that have to be sent to it.
    switching_paid : float
        What the objective has lost to the switching cost of these; 0 without one.
    client_jain : float
        Jain's index of the rounds answered so far, over all known clients.
    expert_jain : float
        Jain's index of the clients that reported on each expert so far.
    slowest_seconds : float or None
        Longest round time that a client reported.
    plan_seconds, build_seconds, solve_seconds, certify_seconds : float
        Wall time of `plan` as a whole, and of its steps in the backend; reading back counts as certifying.
    """

    round: int
    policy: str
    available: int
    planned: tuple[Hashable, ...]
    answered: tuple[Hashable, ...]
    failed: tuple[Hashable, ...]
    loads: tuple[int, ...]
    trained_loads: tuple[int, ...]
    load_cv: float
    usage: tuple[float, ...]
    samples: float
    objective: float | None
    bound: float | None
    gap: float | None
    solver: str
    status: str
    stop_reason: str
    relaxed: int
    relaxations: tuple[str, ...]
    violations: int
    fitness_given_up: float
    experts_resent: int
    switching_paid: float
    client_jain: float
    expert_jain: float
    slowest_seconds: float | None
    plan_seconds: float
    build_seconds: float
    solve_seconds: float
    certify_seconds: float

    @classmethod
    def of(cls, opened: OpenRound, reports: RoundReports, names: Sequence[Hashable], **rest: Any) -> RoundRecord:
        """Make the record of a round.

        Parameters
        ----------
        opened : OpenRound
        reports : RoundReports
        names : sequence of hashable
            Of all clients, by row.
        **rest
            The fields that follow from neither.
        """
        planned = opened.pairs.counts > 0

        def chosen(mask: BoolArray) -> tuple[Hashable, ...]:
            return tuple(names[row] for row in opened.clients[mask].tolist())

        told = reports.seconds[~np.isnan(reports.seconds)]
        trained = np.bincount(reports.experts, minlength=opened.pairs.n_experts)
        return cls(
            planned=chosen(planned),
            answered=chosen(planned & reports.answered),
            failed=chosen(planned & ~reports.answered),
            trained_loads=tuple(trained.tolist()),
            samples=float(reports.samples.sum()),
            slowest_seconds=float(told.max()) if len(told) else None,
            **(opened.summary | {name: tuple(opened.summary[name]) for name in ("loads", "relaxations")}),
            **rest,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values that `json.dumps` takes.

        Clients become counts; those that failed are listed as text in ``"failed_clients"``.
        """
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in ("planned", "answered", "failed"):
            values[name] = len(values[name])
        for name in ("loads", "trained_loads", "usage", "relaxations"):
            values[name] = list(values[name])
        values["failed_clients"] = [str(client) for client in self.failed]
        return values


@dataclass(frozen=True, eq=False)
class ClientReport:
    """What one client sent back.

    Parameters
    ----------
    experts : ndarray, shape (k,), int64
        Ascending.
    samples, rewards : ndarray, shape (k,), float64
    seconds : float
        Round time; NaN if not told.
    failed : bool
    """

    experts: IntArray
    samples: FloatArray
    rewards: FloatArray
    seconds: float = math.nan
    failed: bool = False

    @classmethod
    def checked(
        cls,
        client: Hashable,
        results: Any,
        assigned: Mapping[Hashable, int],
        seconds: float | None,
        *,
        failed: bool,
    ) -> ClientReport:
        """Check what a caller passed to `Scheduler.report`.

        Parameters
        ----------
        client : hashable
            For messages.
        results : mapping of expert to (samples, reward)
        assigned : mapping of expert to int
            Experts of this client this round, with their numbers.
        seconds : float or None
        failed : bool

        Raises
        ------
        InputError
            The message names client, expert and value.
        """
        who = f"client {client!r}"
        if seconds is not None and not (_is_number(seconds) and 0 <= seconds < math.inf):
            msg = f"{who}: seconds = {seconds!r}: must be finite and >= 0, or None"
            raise InputError(msg)
        if not isinstance(results, Mapping):
            msg = f"{who}: results = {results!r}: must map each expert to (samples, reward)"
            raise InputError(msg)
        if failed and results:
            msg = f"{who}: reported failure together with results for {len(results)} experts"
            raise InputError(msg)
        triples = sorted(_checked_result(who, expert, value, assigned) for expert, value in results.items())
        columns: list[tuple[Any, ...]] = list(zip(*triples, strict=True)) or [(), (), ()]
        return cls(
            np.array(columns[0], dtype=np.int64),
            np.array(columns[1], dtype=np.float64),
            np.array(columns[2], dtype=np.float64),
            math.nan if seconds is None else float(seconds),
            failed,
        )


def _checked_result(
    who: str, expert: Hashable, value: Any, assigned: Mapping[Hashable, int]
) -> tuple[int, float, float]:
    if expert not in assigned:
        have = ", ".join(repr(name) for name in assigned) or "none"
        msg = f"{who}: expert {expert!r} was not assigned to it this round (assigned: {have})"
        raise InputError(msg)
    try:
        samples, reward = value
    except (TypeError, ValueError):
        msg = f"{who}, expert {expert!r}: {value!r}: must be a pair (samples, reward)"
        raise InputError(msg) from None
    if not (_is_number(samples) and 0 <= samples <= _MOST_SAMPLES):
        msg = f"{who}, expert {expert!r}: samples = {samples!r}: must be a number from 0 to 2**53"
        raise InputError(msg)
    if not (_is_number(reward) and math.isfinite(reward)):
        msg = f"{who}, expert {expert!r}: reward = {reward!r}: must be a finite number"
        raise InputError(msg)
    return assigned[expert], float(samples), float(reward)


def _is_number(value: Any) -> bool:
    """Whether a value is one real number: also a NumPy or torch scalar, but not text."""
    if isinstance(value, (str, bytes)):
        return False
    try:
        float(value)
    except (TypeError, ValueError, OverflowError):
        return False
    return True


@dataclass(frozen=True, eq=False)
class RoundReports:
    """The results of a round as parallel arrays, in the order of the plan.

    Parameters
    ----------
    positions : ndarray, shape (k,), int64
        Position in the plan of the client of each trained pair.
    experts, samples, rewards : ndarray, shape (k,)
        Expert number, samples and reward of each trained pair.
    answered : ndarray, shape (number of clients in the plan,), bool
        Clients that reported, and not a failure.
    seconds : ndarray, shape (number of clients in the plan,), float64
        Reported round times; NaN where there is none.
    """

    positions: IntArray
    experts: IntArray
    samples: FloatArray
    rewards: FloatArray
    answered: BoolArray
    seconds: FloatArray


@dataclass(eq=False)
class OpenRound:
    """A round that is planned and not yet closed.

    Parameters
    ----------
    clients : ndarray, shape (k,), int64
        Row of each available client in the client table.
    pairs : Assignment
        Of shape (k, m).
    summary : dict
        Fields of `RoundRecord` that are known from the plan; JSON values.
    prices : ndarray, shape (m,), or None
        Dual prices of the schedule.
    reports : dict of int to ClientReport
        By position in `clients`.
    able : ndarray of int64
        Rows of the available clients that could train any expert, chosen or not; only with a fairness option.
    """

    clients: IntArray
    pairs: Assignment
    summary: dict[str, Any]
    prices: FloatArray | None
    reports: dict[int, ClientReport] = field(default_factory=dict)
    able: IntArray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    @classmethod
    def of(cls, clients: IntArray, answer: Schedule, summary: Mapping[str, Any]) -> OpenRound:
        """Open a round with a schedule that has an assignment."""
        answer.loads  # noqa: B018  (raises, with the reason, where there is none)
        assert answer.pairs is not None
        prices = None if answer.prices is None else np.array(answer.prices, dtype=np.float64)
        return cls(clients, answer.pairs, dict(summary), prices)

    def __post_init__(self) -> None:
        self._positions = {row: position for position, row in enumerate(self.clients.tolist())}

    def position(self, row: int) -> int | None:
        """Return the position of a client in this round, None if it is not part of it."""
        return self._positions.get(row)

    def experts_at(self, position: int) -> list[int]:
        """Return the expert numbers of the client at a position."""
        indptr = self.pairs.indptr
        numbers: list[int] = self.pairs.indices[indptr[position] : indptr[position + 1]].tolist()
        return numbers

    def gathered(self) -> RoundReports:
        """Put all reports together; the order in which they came makes no difference."""
        order = sorted(self.reports)
        reports = [self.reports[position] for position in order]
        counts = [len(report.experts) for report in reports]
        answered = np.zeros(len(self.clients), dtype=np.bool_)
        seconds = np.full(len(self.clients), np.nan)
        for position, report in zip(order, reports, strict=True):
            answered[position] = not report.failed
            seconds[position] = report.seconds
        return RoundReports(
            np.repeat(np.array(order, dtype=np.int64), counts),
            np.concatenate([np.zeros(0, dtype=np.int64), *(report.experts for report in reports)]),
            np.concatenate([np.zeros(0), *(report.samples for report in reports)]),
            np.concatenate([np.zeros(0), *(report.rewards for report in reports)]),
            answered,
            seconds,
        )

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return all but the summary as arrays; `restored` takes them back."""
        order = sorted(self.reports)
        gathered = self.gathered()
        return {
            "clients": self.clients.copy(),
            "able": self.able.copy(),
            "indptr": self.pairs.indptr.copy(),
            "indices": self.pairs.indices.copy(),
            "prices": np.zeros(0) if self.prices is None else self.prices.copy(),
            "reported": np.array(order, dtype=np.int64),
            "report_indptr": np.cumsum([0, *(len(self.reports[p].experts) for p in order)], dtype=np.int64),
            "report_experts": gathered.experts,
            "report_samples": gathered.samples,
            "report_rewards": gathered.rewards,
            "report_seconds": gathered.seconds[order],
            "report_failed": ~gathered.answered[order],
        }

    @classmethod
    def restored(
        cls,
        n_experts: int,
        n_clients: int,
        summary: Mapping[str, Any],
        arrays: Mapping[str, npt.NDArray[Any]],
    ) -> OpenRound:
        """Make an open round of its summary and of what `arrays` returned.

        Raises
        ------
        InputError
            They do not fit one another, the experts or the clients.
        """
        clients, indptr, indices = arrays["clients"], arrays["indptr"], arrays["indices"]
        prices, ends, reported = arrays["prices"], arrays["report_indptr"], arrays["reported"]
        able = arrays.get("able", np.zeros(0, dtype=np.int64))  # not in older states
        fits = (
            len(np.unique(clients)) == len(clients) > 0
            and _within(clients, n_clients)
            and _within(able, n_clients)
            and _is_index(indptr, len(clients), len(indices))
            and _within(indices, n_experts)
            and len(prices) in (0, n_experts)
            and _within(reported, len(clients))
            and _is_index(ends, len(reported), len(arrays["report_experts"]))
            and _within(arrays["report_experts"], n_experts)
            and len(arrays["report_samples"]) == len(arrays["report_rewards"]) == ends[-1]
            and len(arrays["report_seconds"]) == len(arrays["report_failed"]) == len(reported)
        )
        if "relaxations" not in summary:  # older states
            summary = {**summary, "relaxations": []}
        if summary.keys() != _SUMMARY:
            odd = sorted(summary.keys() ^ _SUMMARY)
            msg = f"the open round's plan summary lacks or has in excess: {', '.join(odd)}"
            raise InputError(msg)
        if not fits:
            msg = "the open round's arrays do not fit one another"
            raise InputError(msg)
        pairs = Assignment(indptr.copy(), indices.copy(), n_experts)
        open_round = cls(clients.copy(), pairs, dict(summary), prices.copy() if len(prices) else None)
        open_round.able = able.copy()
        for at, position in enumerate(reported.tolist()):
            part = slice(int(ends[at]), int(ends[at + 1]))
            open_round.reports[position] = ClientReport(
                arrays["report_experts"][part].copy(),
                arrays["report_samples"][part].copy(),
                arrays["report_rewards"][part].copy(),
                float(arrays["report_seconds"][at]),
                bool(arrays["report_failed"][at]),
            )
        return open_round


@dataclass(frozen=True, eq=False)
class LabelledMatrix:
    """A matrix with names on its axes, in the way that `fedmoe_sched.schedule` recognises without pandas."""

    values: FloatArray
    index: tuple[Hashable, ...]
    columns: tuple[Hashable, ...]

    def to_numpy(self) -> FloatArray:
        """Return the bare matrix."""
        return self.values


def labelled_answer(answer: Schedule, clients: tuple[Hashable, ...], experts: tuple[Hashable, ...]) -> Schedule:
    """Put names on a schedule that has none.

    Raises
    ------
    InputError
        The schedule is of another shape.
    """
    problem, shape = answer.problem, (len(clients), len(experts))
    if problem.shape != shape:
        msg = f"decide: returned a schedule of shape {problem.shape}, must be {shape} (clients, experts)"
        raise InputError(msg)
    if problem.client_labels == clients and problem.expert_labels == experts:
        return answer
    named = problem.replace(client_labels=clients, expert_labels=experts)
    return dataclasses.replace(answer, problem=named)


def plan_summary(
    answer: Schedule, fitness: FloatArray, capacity: IntArray, eligible: BoolArray | None
) -> dict[str, Any]:
    """Return the fields of `RoundRecord` that follow from the plan alone, as JSON values.

    Raises
    ------
    InfeasibleError, NoAssignmentError
        The schedule has no assignment.
    """
    loads = answer.loads
    return {
        "available": len(fitness),
        "loads": loads.tolist(),
        "load_cv": load_cv(loads),
        "objective": answer.objective,
        "bound": answer.bound,
        "gap": answer.gap,
        "solver": answer.solver,
        "status": str(answer.status),
        "stop_reason": str(answer.stop_reason),
        "relaxed": len(answer.relaxed),
        "relaxations": [one.named(answer.problem) for one in answer.relaxed],
        "violations": len(answer.violations),
        "fitness_given_up": fitness_given_up(
            fitness, capacity, answer, eligible=eligible, layers=answer.problem.layers
        ),
        "build_seconds": answer.build_seconds,
        "solve_seconds": answer.solve_seconds,
        "certify_seconds": answer.read_seconds + answer.certify_seconds,
    }


def _within(numbers: IntArray, size: int) -> bool:
    return bool(((numbers >= 0) & (numbers < size)).all())


def _is_index(indptr: IntArray, rows: int, size: int) -> bool:
    """Whether `indptr` cuts `size` entries into `rows` pieces."""
    ends = len(indptr) == rows + 1 and indptr[0] == 0 and indptr[-1] == size
    return bool(ends and (np.diff(indptr) >= 0).all())
