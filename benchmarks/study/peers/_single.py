"""What the peers for one expert per client share."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedmoe_sched import AssignmentProblem
from fedmoe_sched.assignment import Assignment

__all__ = ["assignment_of", "places", "refusal", "worth"]


def places(problem: AssignmentProblem) -> npt.NDArray[np.int64]:
    """Return how many clients each expert can have, shape (m,): upper load bounds beyond n bind nobody."""
    return np.minimum(problem.load_max, problem.n_clients)


def refusal(name: str, problem: AssignmentProblem) -> str | None:
    """Return why a peer for one expert per client does not take `problem`, or None."""
    if (problem.capacity != 1).any():
        return f"{name} takes one expert per client only"
    if (problem.load_min > 0).any():
        return f"{name} does not take lower load bounds"
    if places(problem).sum() < problem.n_clients:
        return f"{name} takes no fewer places than clients"
    return None


def worth(problem: AssignmentProblem) -> npt.NDArray[np.float64]:
    """Return scores under which every client may be placed, shape (n, m), float64.

    A client that may stay idle is placed at a worth of 0 where its score is negative; `assignment_of` takes it
    off again.
    """
    scores = problem.desirability.astype(np.float64)
    free = problem.min_experts == 0
    scores[free] = np.maximum(scores[free], 0.0)
    return scores


def assignment_of(problem: AssignmentProblem, expert: npt.NDArray[np.int64]) -> Assignment:
    """Return the assignment that gives client i expert ``expert[i]``, without the clients better left idle."""
    clients = np.arange(problem.n_clients)
    kept = (problem.min_experts > 0) | (problem.desirability[clients, expert] > 0)
    return Assignment.from_pairs(clients[kept], expert[kept], problem.shape)
