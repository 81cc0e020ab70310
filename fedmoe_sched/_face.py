"""The optima of a network problem as the assignments of another one: what is complementary to optimal prices.

Some pairs are in all of them, some in none, and some bounds are tight (Schrijver, *Theory of Linear and Integer
Programming*, section 7.9). What is left to choose is again a network problem.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedmoe_sched._arrays import BoolArray, IntArray
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.problem import AssignmentProblem

__all__ = ["Face", "rest_of"]


class Face(NamedTuple):
    """All assignments that have the forced pairs, of the others only free ones, and numbers within bounds.

    Parameters
    ----------
    forced, free : ndarray, shape (n, m), bool
    least, most : ndarray, shape (n,), int64
        Experts of each client, forced ones too.
    low, high : ndarray, shape (n, G), int64, or None
        Experts of each layer and client; None without layers.
    load_min, load_max : ndarray, shape (m,), int64
    """

    forced: BoolArray
    free: BoolArray
    least: IntArray
    most: IntArray
    low: IntArray | None
    high: IntArray | None
    load_min: IntArray
    load_max: IntArray


def rest_of(problem: AssignmentProblem, face: Face) -> AssignmentProblem:
    """Return what the forced pairs leave to choose: scores and penalty of `problem`, bounds and pairs of the face.

    Its objective lacks the scores of the forced pairs, and the penalty of their loads alone.
    """
    taken, loads = face.forced.sum(axis=1, dtype=np.int64), face.forced.sum(axis=0, dtype=np.int64)
    layers, penalty = problem.layers, problem.load_penalty
    if layers is not None and face.low is not None and face.high is not None:
        within = layers.count(face.forced)
        layers = ExpertLayers(layers.layer_of, np.maximum(face.low - within, 0), face.high - within)
    return problem.replace(
        eligible=face.free,
        capacity=face.most - taken,
        min_experts=np.maximum(face.least - taken, 0),
        load_min=np.maximum(face.load_min - loads, 0),
        load_max=face.load_max - loads,
        layers=layers,
        load_penalty=None if penalty is None else penalty.after(loads),
    )
