"""What a penalty on usage does without load bounds: 30 rounds of unchanging fitness, rule by rule.

The published rule ranks experts by fitness less a penalty on usage, and gives every client its best ones. Within a
round all clients see the same usage, so they leave a hot expert together, and come back together.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.study.families import instance
from benchmarks.study.tables import markdown_table
from fedmoe_sched import AssignmentProblem, schedule
from fedmoe_sched.scores import UsageScores

__all__ = ["ROUNDS", "Round", "Rule", "rules", "simulate", "write_oscillation"]

ROUNDS = 30
FAMILIES = ("clustered", "trained")
PENALTIES = (0.1, 0.3, 1.0, 3.0)  # the first is the default of `schedule`


@dataclass(frozen=True)
class Rule:
    """A way to decide every round.

    Parameters
    ----------
    name : str
    solver : str
    usage_weight : float
        Units of fitness per fair share of usage.
    bounded : bool
        Whether the load bounds of the instance hold.
    """

    name: str
    solver: str
    usage_weight: float
    bounded: bool


def rules() -> list[Rule]:
    """Return the published rule with growing penalties, then the exact schedule with bounds."""
    greedy = [Rule(f"greedy, penalty {weight:g}", "greedy", weight, bounded=False) for weight in PENALTIES]
    return [*greedy, Rule("exact, load bounds", "exact", PENALTIES[0], bounded=True)]


@dataclass(frozen=True)
class Round:
    """One round of one rule.

    Parameters
    ----------
    largest : float
        Largest load over the mean load.
    idle : int
        Experts without any client.
    given_up : float
        Share of the fitness given up against every client's own best experts, 0 to 1.
    """

    largest: float
    idle: int
    given_up: float


def simulate(problem: AssignmentProblem, rule: Rule, n_rounds: int = ROUNDS) -> list[Round]:
    """Schedule round after round with the same fitness; usage is learnt from the loads.

    Parameters
    ----------
    problem : AssignmentProblem
        Its desirability is the fitness; capacities and load bounds as they are.
    rule : Rule
    n_rounds : int, default 30

    Returns
    -------
    list of Round
    """
    usage = UsageScores(problem.n_experts)
    best = _free_fitness(problem)
    rounds = []
    for _ in range(n_rounds):
        answer = schedule(
            problem.desirability,
            usage.values,
            problem.capacity,
            usage_weight=rule.usage_weight,
            load_min=problem.load_min if rule.bounded else None,
            load_max=problem.load_max if rule.bounded else None,
            balance=None,
            solver=rule.solver,
        )
        pairs = answer.pairs
        if pairs is None:
            msg = f"{rule.name}: no schedule, {answer!r}"
            raise RuntimeError(msg)
        usage.update(pairs.loads)
        fitness = float(problem.desirability[pairs.clients, pairs.indices].sum(dtype=np.float64))
        loads = pairs.loads
        rounds.append(Round(float(loads.max() / loads.mean()), int((loads == 0).sum()), 1 - fitness / best))
    return rounds


def _free_fitness(problem: AssignmentProblem) -> float:
    """Return the fitness of every client's own best experts, as many as it can take."""
    ranked = -np.sort(-problem.desirability, axis=1)
    return float(ranked[np.arange(problem.n_experts) < problem.slots[:, None]].sum(dtype=np.float64))


def write_oscillation(
    folder: Path, size: tuple[int, int], seed: int = 0, on_line: Callable[[str], None] | None = None
) -> list[Path]:
    """Simulate all rules on all families; write rows, table and figure."""
    from benchmarks.study.plots import oscillation_figure
    from fedmoe_sched.pictures import save_figure

    found: dict[tuple[str, str], list[Round]] = {}
    bound = 0.0
    for family in FAMILIES:
        problem = instance(family, *size, seed=seed)
        bound = float(problem.load_max[0] * problem.n_experts / problem.slots.sum())
        for rule in rules():
            found[family, rule.name] = simulate(problem, rule)
            if on_line is not None:
                on_line(f"{family} {size[0]}x{size[1]}: {rule.name}")
    paths = [folder / f"oscillation.{suffix}" for suffix in ("csv", "md", "svg")]
    _write_rows(found, paths[0])
    paths[1].write_text(_table(found, size), encoding="utf-8")
    largest = {key: [each.largest for each in rounds] for key, rounds in found.items()}
    save_figure(oscillation_figure(largest, bound), paths[2])
    return paths


def _write_rows(found: Mapping[tuple[str, str], list[Round]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["family", "rule", "round", "largest_over_mean_load", "idle_experts", "fitness_given_up"])
        for (family, rule), rounds in found.items():
            for number, each in enumerate(rounds, 1):
                writer.writerow([family, rule, number, f"{each.largest:.6g}", each.idle, f"{each.given_up:.6g}"])


def _table(found: Mapping[tuple[str, str], list[Round]], size: tuple[int, int]) -> str:
    body = []
    for (family, rule), rounds in found.items():
        late = rounds[len(rounds) // 3 :]
        body.append(
            [
                f"{family}, {rule}",
                f"{rounds[0].largest:.2f}",
                f"{np.mean([each.largest for each in late]):.2f}",
                f"{max(each.largest for each in late):.2f}",
                f"{np.mean([each.idle for each in late]):.1f}",
                f"{100 * np.mean([each.given_up for each in late]):.1f} %",
            ]
        )
    header = [
        f"family, rule ({size[0]:,} x {size[1]})",
        "round 1",
        "later rounds, mean",
        "worst",
        "idle experts",
        "fitness given up",
    ]
    return markdown_table(header, body)
