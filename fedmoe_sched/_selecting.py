"""Client selection inside a scheduler: what it keeps of every client, and how a round uses and renews it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from fedmoe_sched._arrays import FloatArray, IntArray
from fedmoe_sched._variables import StateVariable, Variables
from fedmoe_sched.rounds import RoundReports
from fedmoe_sched.scores.selection import SelectionOptions, select_clients, selection_scores

__all__ = ["SELECTION_VARIABLES", "learned_selection", "selected"]

#: Utility that clients tell, the last round each answered in (0: none yet), and its last round time (0: not told).
SELECTION_VARIABLES: Final[Mapping[str, StateVariable]] = {
    "oort_utility": StateVariable("client", told="after"),
    "oort_round": StateVariable("client"),
    "oort_seconds": StateVariable("client"),
}


def selected(
    variables: Variables, rows: IntArray, estimated: FloatArray, round_: int, options: SelectionOptions, seed: int
) -> IntArray:
    """Choose among clients; return their positions, ascending.

    Parameters
    ----------
    variables : Variables
    rows : ndarray, shape (k,)
        Of the clients that could take part; -1 for new ones.
    estimated : ndarray, shape (k,)
        Seconds that each would take by its profile; 0 where that is not known.
    round_ : int
        The round that is planned.
    options : SelectionOptions
    seed : int
    """
    utility, last, seconds = (variables.at(name, rows) for name in SELECTION_VARIABLES)
    known = last > 0
    scores = np.zeros(len(rows))
    scores[known] = selection_scores(utility[known], seconds[known], last[known], round_, options)
    told = estimated > 0
    speed = np.ones(len(rows))
    if told.any():
        speed[told] = 1 / estimated[told]
        speed[~told] = np.median(speed[told])
    return select_clients(scores, known, speed, round_, options, seed)


def learned_selection(
    variables: Variables, clients: IntArray, reports: RoundReports, round_: int
) -> dict[str, FloatArray]:
    """Return the new values of what the server sees itself.

    Parameters
    ----------
    variables : Variables
    clients : ndarray, shape (k,)
        Rows of the clients of the round that closes.
    reports : RoundReports
    round_ : int
        Its number.
    """
    last, seconds = variables.of("oort_round").copy(), variables.of("oort_seconds").copy()
    last[clients[reports.answered]] = round_
    told = ~np.isnan(reports.seconds)
    seconds[clients[told]] = reports.seconds[told]
    return {"oort_round": last, "oort_seconds": seconds}
