"""Helpers shared by the tests of the scheduler: comparing states and records, simulated clients."""

from __future__ import annotations

import numpy as np

TIMES = ("plan_seconds", "build_seconds", "solve_seconds", "certify_seconds")


def frozen(scheduler) -> tuple:
    """Everything that a scheduler knows, wall times apart, as values that compare by content and bit by bit."""
    state = scheduler.state_dict()
    metadata = dict(state["metadata"])
    if metadata["open"] is not None:
        metadata["open"] = {k: v for k, v in metadata["open"].items() if k not in TIMES}
    arrays = {name: (str(a.dtype), a.shape, a.tobytes()) for name, a in state["arrays"].items()}
    return repr(metadata), arrays


def record_values(record) -> dict:
    """A record without wall times."""
    return {name: value for name, value in record.to_dict().items() if name not in TIMES}


def simulate(scheduler, clients, generator, *, drop: float = 0.2) -> dict:
    """Run one round with made-up feedback; return plan and record, wall times apart."""
    answer = scheduler.plan(clients)
    finish(scheduler, generator, drop=drop)
    return {"plan": answer.experts_by_client(), "record": record_values(scheduler.close_round())}


def finish(scheduler, generator, *, drop: float = 0.2) -> None:
    """Report for the clients of the open round that have not failed."""
    for client, experts in scheduler.assigned().items():
        if generator.random() < drop:
            continue
        results = {e: (int(generator.integers(1, 50)), float(generator.random())) for e in experts}
        scheduler.report(client, results, seconds=float(generator.uniform(1, 9)))


def assert_unchanged(scheduler, before: tuple) -> None:
    assert frozen(scheduler) == before


def plain(schedule) -> np.ndarray:
    return schedule.pairs.mask()
