"""Problems in which what gives way has a price: their optimum is the least relaxation, and of these the best.

Load bounds that give way are a convex penalty of the loads. Choices of clients know what an expert is worth more
up to the lower bound of a layer. Experts that a client lacks in all are taken from some "not given", which use no
resource and cost what a place weighs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedmoe_sched._arrays import BoolArray, IntArray
from fedmoe_sched._budgets import fitting_counts, fitting_pairs
from fedmoe_sched._elastic import total_above
from fedmoe_sched.assignment import Assignment
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.resource_budget import ResourceBudget

__all__ = ["PricedRelaxation"]


class PricedRelaxation:
    """Problems whose objective is a share of the desirability, less the weight of what gives way, plus `total`.

    Parameters
    ----------
    problem : AssignmentProblem
        With budgets.
    weights : mapping of str to int
        What one place of ``"min_experts"``, ``"layer_min"``, ``"load_min"`` and ``"load_max"`` counts; those that
        are not named are hard, as are all others.

    Attributes
    ----------
    hopeless : bool
        Whether the budgets alone exclude some hard bound.
    total : int
        What the objective of `at` lacks, with a minus, where nothing is given.
    scale : float
        The mean size of a possible pair's score, and of the penalty of one client.
    lightest : int
        The least weight.
    """

    def __init__(self, problem: AssignmentProblem, weights: Mapping[str, int]) -> None:
        self.problem, self._weights = problem, weights
        self._fits = fits = fitting_pairs(problem)
        self._layers = problem.layers or ExpertLayers(np.zeros(problem.n_experts, dtype=np.int64))
        self._asked, self._top = self._in_layers()
        most = np.minimum(fitting_counts(problem, fits)[1], self._top.sum(axis=1))
        least, reach = np.minimum(problem.min_experts, most), fits.sum(axis=0)
        self._low = np.minimum(problem.load_min, reach)
        self._high = np.minimum(problem.load_max, problem.n_clients)
        beyond = {
            "min_experts": total_above(problem.min_experts, most),
            "layer_min": total_above(self._asked, self._top),
            "load_min": total_above(problem.load_min, reach),
        }
        self.hopeless = any(kind not in weights and lost for kind, lost in beyond.items())
        place = weights.get("min_experts", 0)
        # Who can have no more than the fewest loses by every expert less: that needs no experts "not given".
        self._earns = np.where(least == most, place, 0)
        missing = np.where((self._earns > 0) | (place == 0), 0, least)
        self._absent: BoolArray = np.arange(missing.max(initial=0)) < missing[:, None]
        self._least, self._most = np.where(self._earns > 0, 0, least), most
        self._needed = np.minimum(self._asked, self._top)
        self.total = (
            sum(weights.get(kind, 0) * lost for kind, lost in beyond.items())
            + int((self._earns * least).sum())
            + weights.get("layer_min", 0) * int(self._needed.sum())
            + weights.get("load_min", 0) * int(self._low.sum())
        )
        self.scale = self._mean_worth(reach)
        self.lightest = min(weights.values(), default=1)

    def _in_layers(self) -> tuple[IntArray, IntArray]:
        """Return how many experts of each layer are asked for, and how many no choice exceeds; each (n, G)."""
        n, fits, problem = self.problem.n_clients, self._fits, self.problem
        asked, high = self._layers.bounds_of(slice(0, n), n)
        if problem.layers is None:
            return asked, np.minimum(high, fits.sum(axis=1)[:, None])
        together = [
            fitting_counts(problem, fits & (problem.layers.layer_of == layer))[1]
            for layer in range(problem.layers.n_layers)
        ]
        return asked, np.minimum(high, np.stack(together, axis=1))

    def _mean_worth(self, reach: IntArray) -> float:
        penalty, scores = self.problem.load_penalty, self.problem.desirability[self._fits]
        if not len(scores):
            return 0.0
        size = float(np.abs(scores.astype(np.float64)).mean())
        if penalty is not None:
            size += float((np.abs(penalty.total(reach)) / np.maximum(reach, 1)).mean())
        return size

    def lacks(self, assignment: Assignment) -> int:
        """Return the weight of what gives way."""
        counts, loads, problem = assignment.counts, assignment.loads, self.problem
        within = self._layers.count_pairs(assignment, slice(0, problem.n_clients))
        weigh = self._weights.get
        return (
            weigh("min_experts", 0) * total_above(problem.min_experts, counts)
            + weigh("layer_min", 0) * total_above(self._asked, within)
            + weigh("load_min", 0) * total_above(problem.load_min, loads)
            + weigh("load_max", 0) * total_above(loads, problem.load_max)
        )

    def lowest(self) -> float:
        """Return what any assignment is worth at least."""
        scores = np.where(self._fits, self.problem.desirability, 0.0).astype(np.float64)
        losses = np.sort(scores.clip(max=0.0), axis=1)
        losses[np.arange(losses.shape[1]) >= self._most[:, None]] = 0.0
        penalty = self.problem.load_penalty
        if penalty is None:
            return float(losses.sum())
        return float(losses.sum() - penalty.total(self._fits.sum(axis=0)).clip(min=0.0).sum())

    def at(self, share: float) -> AssignmentProblem:
        """Return the problem where such a share of the desirability counts; the last experts are "not given"."""
        problem, absent = self.problem, self._absent
        extra = absent.shape[1]
        gain = share * problem.desirability.astype(np.float64) + self._earns[:, None]
        hard_min = self._low if "load_min" not in self._weights else np.zeros_like(self._low)
        hard_max = self._high if "load_max" not in self._weights else np.full_like(self._high, problem.n_clients)
        none = np.zeros(extra, dtype=np.int64)
        return AssignmentProblem(
            np.hstack([gain, np.full(absent.shape, -float(self._weights.get("min_experts", 0)))]),
            self._most,
            min_experts=self._least,
            load_min=np.concatenate([hard_min, none]),
            load_max=np.concatenate([hard_max, none + problem.n_clients]),
            eligible=np.hstack([self._fits, absent]),
            load_penalty=self._penalty(share, extra),
            layers=self._with_not_given(),
            budgets=[_with_columns(resource, extra) for resource in problem.budgets],
        )

    def _with_not_given(self) -> ExpertLayers | None:
        """Return the layers, and one of what is not given."""
        if self.problem.layers is None:
            return None
        extra, layer_of = self._absent.shape[1], self.problem.layers.layer_of
        low, high = np.zeros_like(self._needed) if "layer_min" in self._weights else self._needed, self._top
        if extra:
            layer_of = np.append(layer_of, np.full(extra, low.shape[1]))
            low, high = np.pad(low, ((0, 0), (0, 1))), np.pad(high, ((0, 0), (0, 1)), constant_values=extra)
        return ExpertLayers(layer_of, low, high)

    @property
    def floors(self) -> tuple[IntArray, float] | None:
        """The lower bounds of layers that give way, shape (n, layers of `at`), and what a place of them weighs."""
        if self.problem.layers is None or "layer_min" not in self._weights:
            return None
        beside = int(self._absent.shape[1] > 0)
        return np.pad(self._needed, ((0, 0), (0, beside))), float(self._weights["layer_min"])

    def _penalty(self, share: float, extra: int) -> LoadPenalty:
        """Penalise loads below `load_min` and above `load_max`, and such a share of what the problem does."""
        known = self.problem.load_penalty or LoadPenalty.quadratic(0.0, n_experts=self.problem.n_experts)
        below, above = (float(self._weights.get(kind, 0)) for kind in ("load_min", "load_max"))
        parts: list[tuple[Any, Any, Any]] = []
        for j, (low, high) in enumerate(zip(self._low.tolist(), self._high.tolist(), strict=True)):
            segments = slice(known.indptr[j], known.indptr[j + 1])
            start = np.union1d(known.start[segments], [1, low + 1, high + 1])
            slope = share * known.slope[segments][np.searchsorted(known.start[segments], start, "right") - 1]
            value = share * known.marginal_of(np.full(len(start), j), start)
            value += np.where(start <= low, -below, 0.0) + np.where(start > high, above, 0.0)
            for k in range(1, len(start)):  # rounding must not make it fall
                value[k] = max(value[k], value[k - 1] + slope[k - 1] * (start[k] - 1 - start[k - 1]))
            parts.append((start, value, slope))
        parts += [(np.ones(1, dtype=np.int64), np.zeros(1), np.zeros(1))] * extra
        indptr = np.append(0, np.cumsum([len(start) for start, _, _ in parts]))
        return LoadPenalty(indptr, *(np.concatenate(each) for each in zip(*parts, strict=True)))


def _with_columns(resource: ResourceBudget, extra: int) -> ResourceBudget:
    """Add experts that take nothing of a resource."""
    size = resource.size
    return ResourceBudget(
        resource.name, np.concatenate([size, np.zeros((*size.shape[:-1], extra))], axis=-1), resource.budget
    )
