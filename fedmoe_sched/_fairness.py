"""Fairness over time inside a scheduler: the queues that it keeps, and how a round uses and renews them."""

from __future__ import annotations

import dataclasses

import numpy as np

from fedmoe_sched._arrays import FloatArray, IntArray
from fedmoe_sched._selecting import selected
from fedmoe_sched._variables import StateVariable, Variables
from fedmoe_sched.rounds import OpenRound, RoundReports
from fedmoe_sched.scores.fairness import FairnessOptions, client_queues, expert_deficits, fairness_gains
from fedmoe_sched.scores.selection import SelectionOptions

__all__ = ["fair_variables", "gains", "learned_fairness", "selected_fairly"]


def fair_variables(options: FairnessOptions) -> dict[str, StateVariable]:
    """Return the variables: rounds owed to clients, the rate of each, and clients owed to experts."""
    return {
        "fair_queue": StateVariable("client"),
        "fair_rate": StateVariable("client", start=options.client_rate),
        "fair_deficit": StateVariable("expert"),
    }


def gains(variables: Variables, rows: IntArray, options: FairnessOptions) -> FloatArray:
    """Return what fairness adds to the fitness of the clients of a round, -1 for new ones; shape (k, m)."""
    return fairness_gains(variables.at("fair_queue", rows), variables.of("fair_deficit"), options)


def selected_fairly(
    variables: Variables, rows: IntArray, estimated: FloatArray, round_: int, options: SelectionOptions, seed: int
) -> IntArray:
    """Choose among clients as `selected` does, but first those that are owed a round, the longest queue first."""
    queue = variables.at("fair_queue", rows)
    ranked = np.argsort(-queue, kind="stable")[: options.clients]
    owed = ranked[queue[ranked] >= 1]
    others = np.setdiff1d(np.arange(len(rows)), owed)
    left = options.clients - len(owed)
    if left:
        fewer = dataclasses.replace(options, clients=left)
        others = others[selected(variables, rows[others], estimated[others], round_, fewer, seed)]
    return np.sort(np.concatenate([owed, others[:left]]))


def learned_fairness(
    variables: Variables, opened: OpenRound, reports: RoundReports, options: FairnessOptions
) -> dict[str, FloatArray]:
    """Return the new queues and deficits.

    A client that was given experts has had its turn, even if it fails: one that never answers would else take the
    places of all others. Experts have got what was trained.
    """
    queue, deficit = variables.of("fair_queue"), variables.of("fair_deficit")
    able, participated = np.zeros((2, len(queue)), dtype=np.bool_)
    able[opened.able] = True
    participated[opened.clients[opened.pairs.counts > 0]] = True
    loads = np.bincount(reports.experts, minlength=len(deficit))
    return {
        "fair_queue": client_queues(queue, variables.of("fair_rate"), able, participated),
        "fair_deficit": expert_deficits(deficit, loads, options.expert_share),
    }
