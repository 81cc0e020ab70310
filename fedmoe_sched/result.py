"""The answer of a round: statuses, conflicts, relaxed bounds, and the Schedule itself."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedmoe_sched._arrays import IntArray
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.certify import Certificate, certify, relative_gap
from fedmoe_sched.errors import InfeasibleError, InputError, NoAssignmentError
from fedmoe_sched.problem import AssignmentProblem

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from fedmoe_sched._budget_explain import BudgetExplainer
    from fedmoe_sched._network_explain import Explainer
    from fedmoe_sched.explain import BudgetSensitivity, Explanation, Sensitivity

__all__ = ["Bound", "Conflict", "Relaxation", "Schedule", "Status", "StopReason"]


class Status(StrEnum):
    """What the answer is. Why the backend stopped is another question: see `StopReason`."""

    OPTIMAL = "optimal"
    FEASIBLE = "feasible"
    VIOLATED = "violated"
    INFEASIBLE = "infeasible"
    UNKNOWN = "unknown"

    @property
    def advice(self) -> str:
        """What to do about it, in one sentence."""
        return _STATUS_ADVICE[self]


_STATUS_ADVICE = {
    Status.OPTIMAL: "No feasible assignment is better: use it; `bound_source` says who proved it.",
    Status.FEASIBLE: "All constraints hold; the gap, where one is given, says how much may be missing.",
    Status.VIOLATED: "A heuristic broke some load bounds: see `violations`, or use an exact backend.",
    Status.INFEASIBLE: "No assignment exists: `conflict` names the bounds that exclude one another.",
    Status.UNKNOWN: "Nothing was found within the limits: allow more time or use another backend.",
}


class StopReason(StrEnum):
    """Why the backend stopped."""

    COMPLETED = "completed"
    TIME_LIMIT = "time limit"
    PROVED_INFEASIBLE = "proved infeasible"
    FAILED = "failed"

    @property
    def advice(self) -> str:
        """What to do about it, in one sentence."""
        return _STOP_ADVICE[self]


_STOP_ADVICE = {
    StopReason.COMPLETED: "The backend ran to its end.",
    StopReason.TIME_LIMIT: "The time limit was reached first: raise it if the gap is too large.",
    StopReason.PROVED_INFEASIBLE: "Relax a bound named in `conflict`.",
    StopReason.FAILED: "The backend gave up on its own: `message` has its words; try another one.",
}


class Bound(NamedTuple):
    """One bound by name: ``kind`` as `AssignmentProblem` and `ExpertLayers` call it, of a client or an expert.

    Parameters
    ----------
    kind : str
        ``"min_experts"`` or ``"layer_min"`` of a client, ``"load_min"`` or ``"load_max"`` of an expert.
    number : int
        Of the client or expert.
    layer : int or None
        Of a ``"layer_min"``.
    """

    kind: str
    number: int
    layer: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}[{self.number}{'' if self.layer is None else f', {self.layer}'}]"


@dataclass(frozen=True)
class Conflict:
    """Bounds that exclude one another: a cut of the network that no flow can cross, or what a search says.

    Parameters
    ----------
    kind : str
        ``"experts starve"``: these experts need more clients than can reach them;
        ``"clients overflow"``: these clients must take more places than are open to them;
        ``"budgets"``: no cut shows it, but a backend that searched all assignments within budgets says so.
    clients, experts : tuple of int
        The numbers of the clients and experts in the cut.
    required, available : int
        Places demanded, and places that exist; ``required > available``, or 0 both where there is no cut.
    message : str
        The same in words, with the labels of the problem.
    bounds : tuple of Bound
        The bounds that exclude one another, given what clients can do: capacities, ``layer_max``, eligibility and
        budgets. Empty where nobody looked for a minimal set of them, see `fedmoe_sched.minimal_conflict`.
    minimal : bool
        Whether every one of `bounds` is needed: without it, the others can be met.
    """

    kind: str
    clients: tuple[int, ...]
    experts: tuple[int, ...]
    required: int
    available: int
    message: str
    bounds: tuple[Bound, ...] = ()
    minimal: bool = False


@dataclass(frozen=True)
class Relaxation:
    """One bound that was widened so that the round can be scheduled.

    Parameters
    ----------
    expert : int or None
        Expert number; None for a bound of a client.
    bound : str
        ``"load_min"`` or ``"load_max"``; ``"min_experts"`` or ``"capacity"`` of a client; ``"layer_min"`` or
        ``"layer_max"`` of a client and a layer.
    asked, used : int
        The bound as derived from `balance`, or as the policy has it, and as used.
    client : int or None, default None
        Client number, for a bound of a client.
    price : float or None, default None
        By how much the objective would rise if the bound gave way by one place more; None where nobody asked.
    layer : int or None, default None
        Layer number, for a bound of a client and a layer.
    """

    expert: int | None
    bound: str
    asked: int
    used: int
    client: int | None = None
    price: float | None = None
    layer: int | None = None

    def __str__(self) -> str:
        return self._told(self.expert if self.client is None else self.client)

    def named(self, problem: AssignmentProblem) -> str:
        """Return the text with the label of the client or expert, where the problem has labels."""
        if self.client is not None:
            return self._told(problem.client_name(self.client))
        return self._told(None if self.expert is None else problem.expert_name(self.expert))

    def _told(self, whose: Hashable) -> str:
        layer = "" if self.layer is None else f", {self.layer}"
        worth = "" if self.price is None else f" (one more place is worth {self.price:.6g})"
        return f"{self.bound}[{whose}{layer}]: {self.asked} -> {self.used}{worth}"


@dataclass(frozen=True, eq=False, repr=False)
class Schedule:
    """The assignment of one round with its certificate.

    Client and expert arguments and answers are labels where the problem has labels, else numbers.

    Parameters
    ----------
    problem : AssignmentProblem
        What was solved, after any widening of bounds.
    solver : str
        Name of the backend.
    status : Status
    stop_reason : StopReason
    pairs : Assignment or None
        The chosen pairs; None where there is no assignment.
    certificate : Certificate or None
        Recomputed from `pairs` and `prices`, not taken from the backend.
    prices : ndarray, shape (m,), float64, or None
        Dual prices of the loads: what one more place at each expert is worth.
    solver_bound : float or None
        An upper bound that only the backend vouches for (branch and bound); used where there are no prices, and
        with budgets where it is less than what the prices prove.
    conflict : Conflict or None
        For an infeasible problem, why.
    relaxed : tuple of Relaxation
        Bounds that were widened; empty if none were.
    relaxed_proved : bool or None
        In soft mode, whether fewer places are proved not to be enough; None where it widened nothing.
    build_seconds, solve_seconds, read_seconds, certify_seconds : float
        Wall time to build the model, to solve it, to read the answer back, and to certify it.
    solver_reason : str
        Why ``solver="auto"`` picked this backend; empty otherwise.
    message : str
        The backend's own words, where it has any, and what it could not heed.
    fitness_weight : float or None
        What a unit of fitness adds to desirability; None where the scores are not made of fitness.
    """

    problem: AssignmentProblem
    solver: str
    status: Status
    stop_reason: StopReason
    pairs: Assignment | None = None
    certificate: Certificate | None = None
    prices: npt.NDArray[np.float64] | None = None
    solver_bound: float | None = None
    conflict: Conflict | None = None
    relaxed: tuple[Relaxation, ...] = ()
    relaxed_proved: bool | None = None
    build_seconds: float = 0.0
    solve_seconds: float = 0.0
    read_seconds: float = 0.0
    certify_seconds: float = 0.0
    solver_reason: str = ""
    message: str = ""
    fitness_weight: float | None = None
    _numbers: dict[str, dict[Hashable, int]] = field(default_factory=dict)

    @property
    def _chosen(self) -> Assignment:
        if self.pairs is not None:
            return self.pairs
        if self.conflict is not None:
            raise InfeasibleError(self.conflict)
        msg = f"no assignment: {self.status} ({self.stop_reason}). {self.status.advice}"
        if self.message:
            msg += f" {self.solver} says: {self.message}"
        raise NoAssignmentError(msg)

    @cached_property
    def assignment(self) -> csr_array[Any, Any]:
        """The assignment as a SciPy CSR array of bool; shape (n, m).

        Raises
        ------
        InfeasibleError, NoAssignmentError
            There is none; so do `loads`, `experts_of`, `clients_of` and `experts_by_client`.
        """
        return self._chosen.to_csr()

    @property
    def loads(self) -> IntArray:
        """Number of clients that each expert gets; shape (m,), int64."""
        return self._chosen.loads

    @property
    def client_jain(self) -> float:
        """Jain's index of the experts of each client: 1 if all have as many, see `metrics.jain_index`."""
        from fedmoe_sched.metrics import jain_index  # on top of what a schedule is

        return jain_index(self._chosen.counts)

    @property
    def expert_jain(self) -> float:
        """Jain's index of the loads: 1 if all are the same."""
        from fedmoe_sched.metrics import jain_index

        return jain_index(self.loads)

    @property
    def objective(self) -> float | None:
        """Total desirability of the assignment, less the load penalty; None where there is none."""
        return None if self.certificate is None else self.certificate.objective

    @property
    def bound(self) -> float | None:
        """Upper bound on the objective of every feasible assignment; None where nothing vouches for one."""
        if self.bound_source == "backend":
            return self.solver_bound
        return None if self.certificate is None else self.certificate.bound

    @property
    def bound_source(self) -> str | None:
        """What vouches for the bound: ``"prices"``, ``"backend"`` alone, or None where there is none.

        Only a bound by prices is proved independently of the backend. Where it proves the assignment optimal, it
        is the one that counts.
        """
        if self.certificate is not None and self.certificate.optimal:
            return "prices"
        proved = None if self.certificate is None else self.certificate.bound
        if self.solver_bound is not None and (proved is None or self.solver_bound < proved):
            return "backend"
        return None if proved is None else "prices"

    @property
    def gap(self) -> float | None:
        """``(bound - objective) / max(1, abs(objective))``; None without a bound, or if constraints are broken."""
        if self.certificate is None or self.bound is None or not self.certificate.feasible:
            return None
        return relative_gap(self.bound, self.certificate.objective)

    @property
    def violations(self) -> tuple[Any, ...]:
        """Broken constraints; see `fedmoe_sched.certify.Violation`."""
        return () if self.certificate is None else self.certificate.violations

    def experts_of(self, client: Hashable) -> list[Hashable]:
        """Experts that one client trains this round, in the order of the problem."""
        pairs = self._chosen
        i = self._number("client", client, self.problem.client_labels, self.problem.n_clients)
        experts = pairs.indices[pairs.indptr[i] : pairs.indptr[i + 1]]
        return [self.problem.expert_name(int(j)) for j in experts]

    def clients_of(self, expert: Hashable) -> list[Hashable]:
        """Clients that train one expert this round, in the order of the problem."""
        pairs = self._chosen
        j = self._number("expert", expert, self.problem.expert_labels, self.problem.n_experts)
        return [self.problem.client_name(i) for i in pairs.clients_of(j).tolist()]

    def experts_by_client(self) -> dict[Hashable, list[Hashable]]:
        """Return the whole assignment as ``{client: [experts]}``."""
        pairs, problem = self._chosen, self.problem
        names = [problem.expert_name(j) for j in range(problem.n_experts)]
        experts = [names[j] for j in pairs.indices.tolist()]
        ends = pairs.indptr.tolist()
        return {problem.client_name(i): experts[ends[i] : ends[i + 1]] for i in range(problem.n_clients)}

    def _number(self, kind: str, name: Hashable, labels: Sequence[Hashable] | None, size: int) -> int:
        if labels is None:
            if isinstance(name, (int, np.integer)) and 0 <= name < size:
                return int(name)
            msg = f"{kind} = {name!r}: must be a number from 0 to {size - 1}"
            raise InputError(msg)
        if kind not in self._numbers:
            self._numbers[kind] = {label: i for i, label in enumerate(labels)}
        try:
            return self._numbers[kind][name]
        except (KeyError, TypeError):
            msg = f"{kind} = {name!r}: there is no {kind} of that name"
            raise InputError(msg) from None

    @cached_property
    def _explainer(self) -> Explainer:
        from fedmoe_sched._network_explain import Explainer  # on top of what a schedule is

        return Explainer(self.problem, self._chosen, self.prices, self.fitness_weight)

    @cached_property
    def _budget_explainer(self) -> BudgetExplainer:
        from fedmoe_sched._budget_explain import BudgetExplainer

        return BudgetExplainer(self)

    def explain(self, client: Hashable, expert: Hashable, *, time_limit: float = 2.0) -> Explanation:
        """Say why a client trains an expert, or does not, and by how much its desirability would have to change.

        Parameters
        ----------
        client, expert : hashable
            Labels where the problem has labels, else numbers.
        time_limit : float, default 2.0
            With budgets only: seconds for solving the problem with the decision turned round, and what is left of
            them for solving it with wider bounds; 0 to do without.

        Returns
        -------
        Explanation
            Exact, see `fedmoe_sched.explain`. The first question to a schedule prepares the answers to all. With
            budgets it is a `BudgetExplanation`: exact where the problem with the decision turned round is solved
            within the time, else between bounds.

        Raises
        ------
        InputError
            There is no such client or expert; the schedule is not optimal, or with budgets not feasible.
        InfeasibleError, NoAssignmentError
            There is no assignment.
        """
        i = self._number("client", client, self.problem.client_labels, self.problem.n_clients)
        j = self._number("expert", expert, self.problem.expert_labels, self.problem.n_experts)
        if not time_limit >= 0:
            msg = f"time_limit = {time_limit}: must be >= 0 seconds"
            raise InputError(msg)
        if self.problem.budgets:
            return self._budget_explainer.explain(i, j, time_limit)
        return self._explainer.explain(i, j)

    def sensitivity(self) -> Sensitivity | BudgetSensitivity:
        """Return what one unit more or less of every bound is worth: places at experts, slots of clients.

        Returns
        -------
        Sensitivity or BudgetSensitivity
            With budgets, the latter: at most, by prices, and at least, by one client arranged anew.

        Raises
        ------
        InputError
            The schedule is not optimal, or with budgets not feasible.
        InfeasibleError, NoAssignmentError
            There is no assignment.
        """
        if self.problem.budgets:
            return self._budget_explainer.sensitivity()
        return self._explainer.sensitivity()

    def summary(self) -> str:
        """Return the schedule expert by expert: load, bounds, price, and what one more or less place is worth.

        What places are worth is there for optimal schedules. With budgets it is bounded, see `BudgetSensitivity`,
        and a line for each resource says how much of it is used, for how many clients an expert does not fit that
        they have a slot for, and by prices what no limit on it would be worth at most.
        """
        from fedmoe_sched._summary import summary_table

        return summary_table(self)

    def verify(self) -> Certificate:
        """Recompute feasibility, objective, bound and gap from the raw problem, independently of the backend.

        Returns
        -------
        Certificate
            Its bound comes from the prices alone: None where the schedule has no prices.
        """
        return certify(self.problem, self._chosen, self.prices)

    def to_dict(self) -> dict[str, Any]:
        """Return the answer as plain Python values that `json.dumps` takes; labels become text."""
        certificate = self.certificate
        answer: dict[str, Any] = {
            "solver": self.solver,
            "status": str(self.status),
            "stop_reason": str(self.stop_reason),
            "objective": self.objective,
            "bound": self.bound,
            "bound_source": self.bound_source,
            "gap": self.gap,
            "build_seconds": self.build_seconds,
            "solve_seconds": self.solve_seconds,
            "read_seconds": self.read_seconds,
            "certify_seconds": self.certify_seconds,
            "solver_reason": self.solver_reason,
            "message": self.message,
            "prices": None if self.prices is None else self.prices.tolist(),
            "relaxed": [str(r) for r in self.relaxed],
            "relaxed_proved": self.relaxed_proved,
            "violations": [] if certificate is None else [str(v) for v in certificate.violations],
            "conflict": None if self.conflict is None else self.conflict.message,
            "conflict_bounds": [] if self.conflict is None else list(map(str, self.conflict.bounds)),
            "loads": None,
            "client_jain": None,
            "expert_jain": None,
            "assignment": None,
        }
        if self.pairs is not None:
            names = [str(self.problem.expert_name(j)) for j in range(self.problem.n_experts)]
            answer["loads"] = dict(zip(names, self.loads.tolist(), strict=True))
            answer["client_jain"], answer["expert_jain"] = self.client_jain, self.expert_jain
            answer["assignment"] = {
                str(client): [e if isinstance(e, int) else str(e) for e in experts]
                for client, experts in self.experts_by_client().items()
            }
        return answer

    def to_json(self, **options: Any) -> str:
        """Return `to_dict` as JSON text; `options` go to `json.dumps`."""
        return json.dumps(self.to_dict(), **options)

    def __repr__(self) -> str:
        n, m = self.problem.shape
        lines = [f"Schedule: {self.status} ({self.stop_reason}) by {self.solver}, {n} clients x {m} experts"]
        if self.solver_reason:
            lines[0] += f" [auto: {self.solver_reason}]"
        if self.certificate is not None and self.pairs is not None:
            bound = "none" if self.bound is None else f"{self.bound:.6g}"
            if self.bound_source == "backend":
                bound += " (the backend's word)"
            gap = "none" if self.gap is None else f"{self.gap:.2g}"
            lines.append(f"  objective {self.objective:.6g}, bound {bound}, gap {gap}")
            low, high = int(self.loads.min()), int(self.loads.max())
            jain = f"Jain's index {self.client_jain:.3f} (clients), {self.expert_jain:.3f} (experts)"
            lines.append(f"  {len(self.pairs.indices)} pairs, loads {low} to {high}, {jain}")
        if self.relaxed:
            perhaps = ", perhaps by more than it takes" if self.relaxed_proved is False else ""
            lines.append(f"  {len(self.relaxed)} bounds widened{perhaps}: {_some(self.relaxed)}")
        if self.violations:
            lines.append(f"  {len(self.violations)} violations: {_some(self.violations)}")
        if self.conflict is not None:
            lines.append(f"  {self.conflict.message}")
        if self.message:
            lines.append(f"  {self.message}")
        lines.append(f"  build {self.build_seconds:.3g} s, solve {self.solve_seconds:.3g} s")
        return "\n".join(lines)


def _some(items: Sequence[Any], most: int = 3) -> str:
    text = "; ".join(str(item) for item in items[:most])
    return text + ("; ..." if len(items) > most else "")
