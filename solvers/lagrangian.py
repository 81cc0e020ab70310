"""Anytime schedules for problems with budgets: prices for the bound, recombination of clients for the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.solver import NETWORK_PROBLEMS, Answer, Capability, Limits, Solver
from fedmoe_sched.solvers.lp_scipy import SciPyLP

__all__ = ["Lagrangian"]

_MANY = 2  # clients per expert from which on choices of clients are generated


@dataclass(eq=False)
class _Model:
    problem: AssignmentProblem
    network: Any = None  # the model of the linear program, where there are no budgets
    start: npt.NDArray[np.float64] | None = None
    answer: Answer | None = None


class Lagrangian(Solver[_Model]):
    """Anytime search for problems with budgets, exact where it ends by itself.

    The bound comes from Lagrangian relaxation of the load bounds, as in the certificate: the linear relaxation
    gives first prices, and subgradient steps whose clients solve true knapsacks improve them (Fisher, Jaikumar and
    Van Wassenhove 1986, *Management Science* 32). The first answer comes from the rounded linear relaxation by a
    local search that passes through exceeded budgets (Yagiura, Ibaraki and Glover 2004, *INFORMS Journal on
    Computing* 16), or what misses of it is filled up.

    It is improved by recombination of some clients at a time, all others fixed. At prices of their own, the
    choices of each client that lose little against its best one are listed, and combined by depth-first search so
    that all loads are kept; the limit of the loss rises until a better answer is found or proved not to exist.
    Parts grow with success: where they reach all clients, the answer is optimal, on the word of this search. Now
    and then an integer program is tried (`milp-scipy`): of the most promising pairs, or of all pairs that a better
    answer could hold; first of all where there are several resources, whose choices are listed slowly.

    Where there are many clients of few experts, or loads have a penalty, prices and a first answer come from
    column generation over choices of clients, and loads of experts (Dantzig and Wolfe 1960, *Operations Research*
    8), and integer programs in what loses little improve and prove it.

    Answers within a time limit depend on the clock, and may differ from run to run. The kernels are compiled when
    they are first used, and kept on disk.

    Without budgets the problem is a network, and handed to `lp-scipy`.
    """

    name: ClassVar[str] = "lagrangian"
    exact: ClassVar[bool] = True
    capabilities: ClassVar[frozenset[Capability]] = NETWORK_PROBLEMS | {
        Capability.LAYERS,
        Capability.LOAD_PENALTY,
        Capability.BUDGETS,
        Capability.PRICES,
        Capability.TIME_LIMIT,
        Capability.WARM_START,
    }
    requires: ClassVar[tuple[str, ...]] = ("numba", "ortools", "scipy")
    summary: ClassVar[str] = "own anytime solver for budgets: prices, and some clients solved anew at a time"

    def build(self, problem: AssignmentProblem, limits: Limits, prices: npt.NDArray[np.float64] | None) -> _Model:
        """Load the compiled kernels, or compile them; there is no model apart from the problem."""
        if not problem.budgets:
            return _Model(problem, SciPyLP().build(problem, limits, prices))
        from fedmoe_sched.solvers import _budget_search, _choice_search

        _budget_search.load_kernels()
        _choice_search.load_kernels()
        return _Model(problem, start=prices)

    def run(self, model: _Model, limits: Limits) -> None:
        """Search until the answer is proved or the time is over."""
        from fedmoe_sched.solvers._budget_search import Search
        from fedmoe_sched.solvers._choice_search import ChoiceSearch

        problem = model.problem
        if problem.budgets:
            many = problem.n_clients >= _MANY * problem.n_experts or problem.load_penalty is not None
            search = (ChoiceSearch if many else Search)(problem, limits)
            model.answer = search.run(model.start)
        else:
            SciPyLP().run(model.network, limits)

    def read(self, model: _Model) -> Answer:
        """Hand over the best answer, the prices and the bound."""
        if model.answer is not None:
            return model.answer
        return SciPyLP().read(model.network)
