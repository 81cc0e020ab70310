"""FedAMoLE: every expert chooses so many clients, solved exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._layer_dealing import mean_layer_loads
from fedmoe_sched._scheduler_options import count_option
from fedmoe_sched.errors import InfeasibleError, InputError
from fedmoe_sched.feasibility import find_conflict, widen_load_bounds
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.policies.base import RulePolicy
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.result import Conflict, Relaxation, Schedule
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Limits

__all__ = ["FedAmolePolicy"]

_LEAST, _MOST = 1, 8  # experts of a client, unless given


class FedAmolePolicy(RulePolicy):
    """Every expert gets exactly so many clients, every client so few to so many experts, of most relevance in sum.

    Maximises the summed relevance of the pairs, where every expert has exactly `clients_per_expert` clients and
    every client between `min_experts` and `max_experts` experts, never more than its capacity. Clients are not
    filled up to their capacity: the experts choose.

    Source: FedAMoLE (arXiv 2411.19128, WWW 2026): an integer program per module and round in which experts choose
    clients, every expert exactly 2 clients, every client 2 to 8 experts, for 30 experts and 10 clients; an
    infeasible program raises [T]. Ours [I]:

    - The relevance is our fitness, exploration bonus included; usage does not count.
    - The program is a flow with integral bounds, so that every exact backend solves it, not only an ILP solver.
    - ``clients_per_expert=None``, the default, takes as many as fill the capacities evenly: the room of all
      available clients over m, rounded down, at least 1. The paper's 2 suits 10 clients that share out 60 places;
      with 20 clients and 8 experts, most would have nothing to train.
    - ``min_experts=1``, the default, lets every client take part. The paper's 2 excludes clients of capacity 1,
      and leaves no choice where the capacities are 2.
    - Degrees that exclude one another are relaxed, by the fewest places in total, and the schedule's ``relaxed``
      says which: experts get fewer clients where these are too few, shared evenly; clients get fewer than
      `min_experts` where they have less room, or where the experts have no more places, again evenly, and then by
      relevance. No expert ever gets more than its number. ``strict=True`` raises as the paper does.
    - Layers are the modules of the paper, that a client's capacity ties together. Their bounds take the place of
      `min_experts` and `max_experts`, and are kept as in every policy: of clients that cannot keep them nothing is
      asked. ``clients_per_expert=None`` fills the room of each layer, and is no less than its clients must take.
      Only numbers of clients are relaxed, by the fewest places in total, evenly: experts get fewer, and more than
      their number only where clients could not keep their layers else.

    Parameters
    ----------
    experts : int or iterable of hashable
    clients_per_expert : int, optional
        Clients of each expert, at least 1; the paper has 2. None is as many as fill the capacities evenly.
    min_experts, max_experts : int, default 1 and 8
        Experts of each client, ``0 <= min_experts <= max_experts``; the paper has 2 and 8. Neither with layers.
    strict : bool, default False
        Raise where the degrees exclude one another, instead of relaxing them.
    **options
        Those of `fedmoe_sched.Scheduler`; ``balance=None``, no `load_min` or `load_max`, ``fill=False``,
        ``usage_weight=0``, ``fitness_weight=1`` and no `switching_cost` are fixed.

    Raises
    ------
    InputError
        A wrong option, a solver that is not exact, or one that the policy fixes otherwise.

    Examples
    --------
    >>> policy = FedAmolePolicy(["x", "y"], clients_per_expert=2, default_capacity=2)
    >>> for client, row in {"anna": [0.9, 0.8], "ben": [0.7, 0.1], "carl": [0.6, 0.2]}.items():
    ...     policy.add_client(client, fitness=row)
    >>> policy.plan(["anna", "ben", "carl"]).experts_by_client()
    {'anna': ['x', 'y'], 'ben': ['x'], 'carl': ['y']}
    """

    name: ClassVar[str] = "fedamole"
    fixed: ClassVar[Mapping[str, Any]] = {
        "balance": None,
        "load_min": None,
        "load_max": None,
        "fill": False,
        "usage_weight": 0.0,
        "fitness_weight": 1.0,
        "switching_cost": 0.0,
    }
    needs_exact: ClassVar[bool] = True

    def __init__(
        self,
        experts: int | Iterable[Hashable],
        *,
        clients_per_expert: int | None = None,
        min_experts: int | None = None,
        max_experts: int | None = None,
        strict: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(experts, **options)
        given = None if clients_per_expert is None else count_option("clients_per_expert", clients_per_expert, 1)
        self.clients_per_expert = given
        if self._options.layers is not None:
            for name, value in (("min_experts", min_experts), ("max_experts", max_experts)):
                if value is not None:
                    msg = f"{name} = {value}: layer_min and layer_max say that where there are layers"
                    raise InputError(msg)
        self.min_experts = count_option("min_experts", _LEAST if min_experts is None else min_experts, 0)
        self.max_experts = count_option("max_experts", _MOST if max_experts is None else max_experts, 1)
        self.strict = bool(strict)
        if self.strict and self._options.soft:
            msg = "soft = True: excludes strict = True, by which degrees never give way"
            raise InputError(msg)
        if self.min_experts > self.max_experts:
            msg = f"min_experts = {self.min_experts}: must be <= max_experts = {self.max_experts}"
            raise InputError(msg)

    def options(self) -> dict[str, Any]:
        """Return the constructor's options as plain values."""
        own = ["clients_per_expert", "strict"]
        own += ["min_experts", "max_experts"] if self._options.layers is None else []
        return super().options() | {name: getattr(self, name) for name in own}

    def decide(
        self,
        fitness: FloatArray,
        usage: FloatArray,
        capacity: IntArray,
        eligible: BoolArray | None,
        *,
        clients: tuple[Hashable, ...],
        seed: int,
        warm_start: FloatArray | None,
    ) -> Schedule:
        """Set the degrees, relax them where they exclude one another, and solve."""
        layers = self.layers_of(clients, capacity)
        problem = AssignmentProblem(
            fitness,
            capacity,
            eligible=eligible,
            layers=layers,
            client_labels=clients,
            expert_labels=self.experts,
        )
        relaxed: tuple[Relaxation, ...] = ()
        if layers is None:
            problem, relaxed = self._degrees(problem.replace(capacity=np.minimum(capacity, self.max_experts)))
        else:
            places = self.clients_per_expert or _filling(problem)[layers.layer_of]
            problem = problem.replace(load_min=places, load_max=places)
            if not self.strict:
                problem, relaxed = _relaxed_loads(problem)
        answer = solve(
            problem,
            self._options.solver,
            limits=Limits(time=self._options.time_limit, seed=seed),
            certify=self._options.certify,
            warm_start=warm_start,
        )
        return dataclasses.replace(answer, relaxed=relaxed)

    def _degrees(self, problem: AssignmentProblem) -> tuple[AssignmentProblem, tuple[Relaxation, ...]]:
        """Set the degrees of clients and experts, and say which were relaxed."""
        least = np.minimum(self.min_experts, problem.slots)
        if self.strict:
            _refuse_small_clients(problem, least, self.min_experts)
        places = self.clients_per_expert or max(1, int(problem.slots.sum()) // len(self.experts))
        problem = problem.replace(min_experts=least, load_min=places, load_max=places)
        return (problem, ()) if self.strict else _relaxed(problem, self.min_experts)


def _filling(problem: AssignmentProblem) -> IntArray:
    """Return how many clients of each expert of a layer fill its room, and are enough for its clients.

    Returns
    -------
    ndarray, shape (G,), int64
    """
    assert problem.layers is not None
    low, _ = problem.layers.bounds_of(slice(0, problem.n_clients), problem.n_clients)
    needed = -(-low.sum(axis=0) // np.bincount(problem.layers.layer_of))
    # A hair more, so that rounding errors of the mean take no client away.
    room = np.floor(mean_layer_loads(problem) + 1e-9).astype(np.int64)
    places: IntArray = np.maximum(np.maximum(room, needed), 1)
    return places


def _relaxed_loads(problem: AssignmentProblem) -> tuple[AssignmentProblem, tuple[Relaxation, ...]]:
    """Relax the numbers of clients by the fewest places in total, upwards only where that is not enough."""
    none = np.zeros_like(problem.load_min)
    widened, relaxed = widen_load_bounds(problem, hard=(none, problem.load_max))
    if find_conflict(widened) is None:
        return widened, relaxed
    return widen_load_bounds(problem, hard=(none, none + problem.n_clients))


def _refuse_small_clients(problem: AssignmentProblem, least: IntArray, asked: int) -> None:
    """Raise for clients that have less room than they must take."""
    small = np.flatnonzero(least < asked)
    if not len(small):
        return
    required, room = asked * len(small), int(least[small].sum())
    more = f" (and {len(small) - 1} more)" if len(small) > 1 else ""
    name, first = problem.client_name(int(small[0])), least[small[0]]
    message = f"client {name}{more}: must take {asked} experts (min_experts), has room for {first}"
    raise InfeasibleError(Conflict("clients overflow", tuple(small.tolist()), (), required, room, message))


def _relaxed(problem: AssignmentProblem, asked: int) -> tuple[AssignmentProblem, tuple[Relaxation, ...]]:
    """Relax degrees by the fewest places in total, spread evenly, so that an assignment exists.

    The two sides can be relaxed one after the other: if some flow gives every expert its places, and another one
    gives every client its own, then one flow does both (Mendelsohn and Dulmage 1958, for bipartite matchings; Pym
    1969, for flows).

    Parameters
    ----------
    problem : AssignmentProblem
        With the degrees wished for: `load_min` and `load_max` alike, and no client with more than its room.
    asked : int
        Least degree of the clients, whatever their room.
    """
    relaxed: tuple[Relaxation, ...] = ()
    if find_conflict(problem) is not None:
        anyone = problem.replace(min_experts=0)
        widened, relaxed = widen_load_bounds(anyone, hard=(np.zeros_like(problem.load_min), problem.load_max))
        problem = widened.replace(min_experts=problem.min_experts)
    if find_conflict(problem) is not None:
        problem = problem.replace(min_experts=_fair_degrees(problem))
    short = np.flatnonzero(problem.min_experts < asked)
    used = problem.min_experts[short].tolist()
    clients = zip(short.tolist(), used, strict=True)
    return problem, relaxed + tuple(Relaxation(None, "min_experts", asked, has, client=i) for i, has in clients)


def _fair_degrees(problem: AssignmentProblem) -> IntArray:
    """Share the places of the experts among clients that want more of them, evenly, then by relevance.

    The same problem with clients and experts exchanged: a client's k-th place is worth more than any gain in
    relevance, and than anyone's (k + 1)-th. The degrees that flows can have form a polymatroid, on which sharing
    evenly costs nothing of the sum (Federgruen and Groenevelt 1986).

    Returns
    -------
    ndarray, shape (n,), int64
        At most `min_experts`.
    """
    wanted, most = problem.min_experts, int(problem.min_experts.max())
    # To hand a place from one client to another, each expert on the way gives up one pair and takes one.
    worth = 2 * (problem.n_experts + 1) * (problem.largest_score or 1.0)
    rank = np.arange(most)
    costs = np.where(rank < wanted[:, None], (rank - most) * worth, 0.0)
    exchanged = AssignmentProblem(
        np.ascontiguousarray(problem.desirability.T),
        problem.load_max,
        min_experts=problem.load_min,
        load_max=problem.slots,
        eligible=None if problem.eligible is None else np.ascontiguousarray(problem.eligible.T),
        load_penalty=LoadPenalty.from_marginals(np.pad(costs, ((0, 0), (0, 1)))),
    )
    return np.minimum(solve(exchanged).loads, wanted)
