"""Copies inside a scheduler: which of the experts that clients hold are too old to count.

A copy is in step with an expert at the start of the round in which it is sent, and after a round in which its
client alone trained the expert: the new average is the copy then. It counts as long as nobody has changed the
expert since, and else for so many rounds. These are the rules of `fedmoe_sched.federated.methods.cached` [I].
"""

from __future__ import annotations

import numpy as np

from fedmoe_sched._arrays import BoolArray, FloatArray, IntArray
from fedmoe_sched._variables import StateVariable, Variables
from fedmoe_sched.rounds import OpenRound, RoundReports

__all__ = ["COPY_VARIABLES", "copies_that_count", "learned_copies"]

#: The round at whose start a client's copy was last in step, 0 without one; and the last that changed an expert.
COPY_VARIABLES = {"copy_in_step": StateVariable("pair"), "expert_changed": StateVariable("expert")}


def copies_that_count(variables: Variables, rows: IntArray, now: int, oldest: int) -> BoolArray:
    """Return which copies of clients (-1: a new one) count in a round; shape (k, m).

    Parameters
    ----------
    variables : Variables
    rows : ndarray, shape (k,), int64
    now : int
        The round, 1 for the first.
    oldest : int
        Rounds up to which a copy counts that is not in step any more.
    """
    since: FloatArray = variables.at("copy_in_step", rows)
    counts: BoolArray = (since > 0) & ((now - since <= oldest) | _is_current(variables, since))
    return counts


def _is_current(variables: Variables, since: FloatArray) -> BoolArray:
    current: BoolArray = variables.of("expert_changed") < since
    return current


def learned_copies(
    variables: Variables, opened: OpenRound, reports: RoundReports, now: int, oldest: int
) -> dict[str, FloatArray]:
    """Return the variables after a round: who answered has trained copies of what it was assigned, and no others.

    Of who did not answer nobody knows whether it got what was sent: it has the copies that it was to go on from.
    Who was assigned nothing has what it had.
    """
    since, changed = variables.of("copy_in_step").copy(), variables.of("expert_changed").copy()
    busy = opened.pairs.counts > 0
    rows, got, answered = opened.clients[busy], opened.pairs.mask()[busy], reports.answered[busy, None]
    kept, before = copies_that_count(variables, rows, now, oldest), since[rows]
    in_step = np.where(~kept | _is_current(variables, before), now, before)
    done = reports.samples > 0
    trained = np.bincount(reports.experts[done], minlength=len(changed))
    alone = np.zeros(opened.pairs.mask().shape, dtype=np.bool_)
    by_one = done & (trained[reports.experts] == 1)
    alone[reports.positions[by_one], reports.experts[by_one]] = True
    trained_copies = np.where(alone[busy], now + 1, in_step)
    since[rows] = np.where(got, np.where(answered, trained_copies, np.where(kept, in_step, 0)), 0)
    changed[trained > 0] = now
    return {"copy_in_step": since, "expert_changed": changed}
