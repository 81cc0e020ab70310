"""Why a pair is in a schedule of a problem with budgets or not: what is exact there, and what is only bounded.

With budgets the problem is NP-hard, and no cycle of exchanges gives a margin. Three things hold whatever else:

- another arrangement with the decision turned round shows that no more is lost than by it: first the client's own
  experts are arranged anew, all others as they are, to the end; then the problem with the pair fixed is solved;
- prices show that no less is lost: in the Lagrangian bound a pair that is fixed changes the best choice of its
  client alone (Geoffrion 1974, *Mathematical Programming Study* 2, on fixing variables by conditional bounds);
- where the backend proves an optimum of the problem with the pair fixed, what is lost is known exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray
from fedmoe_sched._budget_sensitivity import BudgetWorth
from fedmoe_sched._budget_wider import WiderBounds
from fedmoe_sched._client_alone import client_alone
from fedmoe_sched._fixed_pair import Fixed, with_pair, without_pair
from fedmoe_sched._layer_exchange import LayerRoom
from fedmoe_sched._network_explain import binding_bounds, fitness_change
from fedmoe_sched.certify import OPTIMALITY_GAP, responses_bound
from fedmoe_sched.errors import InputError
from fedmoe_sched.explain import BudgetExplanation, BudgetSensitivity, ResourceUse
from fedmoe_sched.result import Status
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Limits

if TYPE_CHECKING:
    from fedmoe_sched.result import Schedule

__all__ = ["BudgetExplainer"]

_ENGINE = "milp-scipy"


class _Loss(NamedTuple):
    """What turning a decision round loses: at least, at most, and what the client has where it loses the most."""

    least: float
    most: float
    experts: BoolArray | None

    def and_(self, other: _Loss) -> _Loss:
        nearer = other if other.most < self.most else self
        return _Loss(max(self.least, other.least), nearer.most, nearer.experts)


class BudgetExplainer:
    """Answers questions about one schedule of a problem with budgets.

    Parameters
    ----------
    schedule : Schedule
        Feasible; it need not be optimal.

    Raises
    ------
    InputError
        The schedule breaks constraints.
    """

    def __init__(self, schedule: Schedule) -> None:
        schedule.loads  # noqa: B018  (raises, with the reason, where there is no assignment)
        assert schedule.pairs is not None
        if schedule.certificate is None or not schedule.certificate.feasible:
            msg = f"schedule: breaks {len(schedule.violations)} constraints; there is no reason for it"
            raise InputError(msg)
        self.schedule, self.problem, self.pairs = schedule, schedule.problem, schedule.pairs
        self._objective = schedule.certificate.objective
        self._worth = BudgetWorth(schedule)

    def explain(self, client: int, expert: int, seconds: float) -> BudgetExplanation:
        """Explain one pair, by numbers.

        Parameters
        ----------
        client, expert : int
        seconds : float
            For solving the problem anew, with the pair turned round, then with wider bounds; 0 to do without.
        """
        end = time.perf_counter() + seconds
        problem, schedule = self.problem, self.schedule
        held = self._held(client)
        chosen = bool(held[expert])
        eligible = problem.eligible is None or bool(problem.eligible[client, expert])
        loss = self._loss(client, expert, held, seconds) if eligible else _Loss(math.inf, math.inf, None)
        exact = loss.least == loss.most
        others = held if loss.experts is None else loss.experts
        given_up, taken = held & ~others, others & ~held
        given_up[expert] = taken[expert] = False
        uses = self._uses(client, expert, held)
        brought_in_by: tuple[tuple[str, ...], ...] = ()
        if eligible and not chosen:
            left = max(0.0, end - time.perf_counter())
            brought_in_by = WiderBounds(self._worth, client, expert, (use.missing for use in uses), left).enough()
        return BudgetExplanation(
            problem.client_name(client),
            problem.expert_name(expert),
            chosen,
            eligible,
            float(problem.desirability[client, expert]),
            None if schedule.prices is None else float(schedule.prices[expert]),
            loss.least,
            fitness_change(loss.least, schedule.fitness_weight, chosen=chosen) if exact else None,
            self._names(taken if chosen else given_up),
            brought_in_by,
            self._binding(client, expert, held),
            loss.most,
            self._names(given_up if chosen else taken),
            uses,
        )

    def _names(self, experts: BoolArray) -> tuple[Hashable, ...]:
        return tuple(self.problem.expert_name(j) for j in np.flatnonzero(experts).tolist())

    def _held(self, client: int) -> BoolArray:
        held = np.zeros(self.problem.n_experts, dtype=np.bool_)
        held[self.pairs.indices[self.pairs.indptr[client] : self.pairs.indptr[client + 1]]] = True
        return held

    # What turning a decision round loses ------------------------------------------------------------------------

    def _loss(self, client: int, expert: int, held: BoolArray, seconds: float) -> _Loss:
        turn = without_pair if held[expert] else with_pair
        fixed = turn(self.problem, client, expert)
        if fixed is None:
            return _Loss(math.inf, math.inf, None)
        loss = _Loss(self._by_prices(client, expert, chosen=bool(held[expert])), math.inf, None)
        loss = loss.and_(self._alone(client, expert, held))
        if seconds > 0:
            loss = loss.and_(self._anew(fixed, client, expert, Limits(time=seconds)))
        least, most = loss.least, loss.most
        if self.schedule.status is Status.OPTIMAL:
            least, most = max(0.0, least), max(0.0, most)
        if most - least <= OPTIMALITY_GAP * max(1.0, abs(self._objective)):  # as far as float64 can tell
            least = most
        return _Loss(least, most, loss.experts)

    def _by_prices(self, client: int, expert: int, *, chosen: bool) -> float:
        """Return what is lost at least, by the prices of the schedule."""
        bound = math.inf if self.schedule.bound is None else self.schedule.bound
        prices = self.schedule.prices
        if prices is not None:
            alone = self.problem.restrict([client], load_min=0, load_max=1, load_penalty=None)
            fixed = without_pair(alone, 0, expert) if chosen else with_pair(alone, 0, expert)
            assert fixed is not None  # else the pair would not fit into the whole problem
            choice = responses_bound(fixed.rest, prices)
            choice += 0.0 if chosen else fixed.worth - float(prices[expert])
            fair = self._worth.price_bound - responses_bound(alone, prices) + choice
            bound = min(bound, self._worth.rounded(fair))
        return self._objective - bound

    def _alone(self, client: int, expert: int, held: BoolArray) -> _Loss:
        """Arrange the experts of this client anew, all others as they are: a problem of one client."""
        one = client_alone(self.problem, client, self.pairs.loads - held)
        scores = one.desirability[0]
        fixed = without_pair(one, 0, expert) if held[expert] else with_pair(one, 0, expert)
        if fixed is None:
            return _Loss(-math.inf, math.inf, None)
        answer = solve(fixed.rest, _ENGINE)
        if answer.objective is None or answer.pairs is None:
            return _Loss(-math.inf, math.inf, None)
        experts = answer.pairs.mask()[0]
        if not held[expert]:
            experts[expert] = True
        return _Loss(-math.inf, float(scores[held].sum()) - fixed.worth - answer.objective, experts)

    def _anew(self, fixed: Fixed, client: int, expert: int, limits: Limits) -> _Loss:
        """Solve the problem with the pair fixed: by an integer program, which proves small ones soonest."""
        answer = solve(fixed.rest, _ENGINE, limits=limits)
        if answer.status is Status.INFEASIBLE:
            return _Loss(math.inf, math.inf, None)
        bound = math.inf if answer.bound is None else answer.bound
        least, most, experts = self._objective - fixed.worth - bound, math.inf, None
        if answer.pairs is not None and answer.certificate is not None and answer.certificate.feasible:
            most = self._objective - fixed.worth - answer.certificate.objective
            experts = answer.pairs.mask()[client]
            if not self._held(client)[expert]:
                experts[expert] = True
        return _Loss(most if answer.status is Status.OPTIMAL else least, most, experts)

    # What binds -------------------------------------------------------------------------------------------------

    def _binding(self, client: int, expert: int, held: BoolArray) -> tuple[str, ...]:
        reasons = []
        if self.problem.layers is not None:
            room = LayerRoom(self.problem.restrict([client], load_min=0, load_penalty=None), held[None])
            reasons = room.binding(0, expert, f"client {self.problem.client_name(client)!r}")
        counts = int(held.sum()), int(self.pairs.loads[expert])
        return binding_bounds(self.problem, client, expert, counts, reasons, *self.place_words(expert))

    def place_words(self, expert: int) -> tuple[str, str]:
        """Say what one more place at an expert is worth, and one client less that it must get."""
        worth = self._worth
        sides = (worth.places, worth.releases)
        more, less = (_between(float(most[expert]), float(least[expert])) for most, least in sides)
        return f"one more place is worth {more}" if more else "", f"one less is worth {less}" if less else ""

    def resource_words(self, resource: int) -> str:
        """Say what no limit on a resource is worth."""
        most = self._worth.without(resource)
        return "" if math.isinf(most) else f"; no limit on it is worth {most:.6g} at most (a bound by prices)"

    def sensitivity(self) -> BudgetSensitivity:
        """Return what wider bounds are worth."""
        return self._worth.sensitivity()

    def _uses(self, client: int, expert: int, held: BoolArray) -> tuple[ResourceUse, ...]:
        """Return what the client's budgets have left for the pair."""
        uses = []
        for resource in self.problem.budgets:
            sizes = resource.sizes_of(np.array([client]))[0]
            budget, used, size = float(resource.budget[client]), float(sizes[held].sum()), float(sizes[expert])
            after = used if held[expert] else used + size
            missing = after - budget if after > float(resource.allowed[client]) else 0.0
            uses.append(ResourceUse(resource.name, budget, used, size, missing))
        return tuple(uses)


def _between(most: float, least: float) -> str:
    """Name what lies between two bounds; nothing where there is none from above, or from below."""
    if most == least:
        return f"{least:.6g}"
    if math.isinf(most):
        return f"{least:.6g} at least" if least > 0 else ""
    return f"{most:.6g} at most (a bound by prices)" + (f", {least:.6g} at least" if least > 0 else "")
