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
from collections.abc import Hashable
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, IntArray
from fedmoe_sched._fixed_pair import Fixed, with_pair, without_pair
from fedmoe_sched._layer_exchange import LayerRoom
from fedmoe_sched._network_explain import binding_bounds, fitness_change
from fedmoe_sched.certify import OPTIMALITY_GAP, is_whole, load_terms, responses_bound, rounded_down
from fedmoe_sched.errors import InputError
from fedmoe_sched.explain import BudgetExplanation, ResourceUse
from fedmoe_sched.problem import AssignmentProblem
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

    def explain(self, client: int, expert: int, seconds: float) -> BudgetExplanation:
        """Explain one pair, by numbers.

        Parameters
        ----------
        client, expert : int
        seconds : float
            For solving the problem anew; 0 to do without.
        """
        problem, schedule = self.problem, self.schedule
        held = self._held(client)
        chosen = bool(held[expert])
        eligible = problem.eligible is None or bool(problem.eligible[client, expert])
        loss = self._loss(client, expert, held, seconds) if eligible else _Loss(math.inf, math.inf, None)
        exact = loss.least == loss.most
        others = held if loss.experts is None else loss.experts
        given_up, taken = held & ~others, others & ~held
        given_up[expert] = taken[expert] = False
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
            (),
            self._binding(client, expert, held),
            loss.most,
            self._names(given_up if chosen else taken),
            self._uses(client, expert, held),
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
            fair = self._price_bound - responses_bound(alone, prices) + choice
            bound = min(bound, self._rounded(fair))
        return self._objective - bound

    @cached_property
    def _price_bound(self) -> float:
        """The bound by prices, before it is rounded."""
        assert self.schedule.prices is not None
        return load_terms(self.problem, self.schedule.prices) + responses_bound(self.problem, self.schedule.prices)

    @cached_property
    def _whole(self) -> bool:
        return is_whole(self.problem)

    def _rounded(self, bound: float) -> float:
        return rounded_down(bound) if self._whole else bound

    def _alone(self, client: int, expert: int, held: BoolArray) -> _Loss:
        """Arrange the experts of this client anew, all others as they are: a problem of one client."""
        problem = self.problem
        others = self.pairs.loads - held
        scores = problem.desirability[client].astype(np.float64)
        if problem.load_penalty is not None:
            scores -= problem.load_penalty.marginal_of(np.arange(problem.n_experts), others + 1)
        one = problem.restrict(
            [client],
            desirability=scores[None],
            load_min=np.maximum(problem.load_min - others, 0),
            load_max=np.maximum(problem.load_max - others, 0),
            load_penalty=None,
        )
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
        """Say what one more place at an expert is worth at most, and one client less that it must get."""
        if self.schedule.prices is None:
            return "", ""
        more, less = (
            max(0.0, self._wider_bound(expert, step) - self._objective) for step in ("load_max", "load_min")
        )
        return (
            f"one more place is worth {more:.6g} at most (a bound by prices)",
            f"one less is worth {less:.6g} at most (a bound by prices)",
        )

    def _wider_bound(self, expert: int, name: str) -> float:
        """Bound the objective with one bound of an expert wider by one, at the prices of the schedule."""
        assert self.schedule.prices is not None
        bounds: IntArray = getattr(self.problem, name).copy()
        bounds[expert] = bounds[expert] + 1 if name == "load_max" else max(0, bounds[expert] - 1)
        wider: AssignmentProblem = self.problem.replace(**{name: bounds})
        prices = self.schedule.prices
        change = load_terms(wider, prices) - load_terms(self.problem, prices)
        return self._rounded(self._price_bound + change)

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
