"""What the study runs: instances, solvers, limits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.study.families import FAMILIES, FLOAT32_PAIRS, SINGLE
from benchmarks.study.peers import PEERS
from fedmoe_sched import solvers

__all__ = ["FULL", "QUICK", "Case", "Plan", "case_of"]

# Ours and its nearest rivals stand side by side, so that whatever disturbs the machine disturbs them alike.
_RIVALS = ("flow-pruned", "exact", "flow-ortools", "flow-pylmcf")
_SINGLE_SOLVERS = ("emd-pot", "lap-scipy", *_RIVALS)

#: May use as many threads as it likes; all others are told to use one.
THREADED = "exact"


@dataclass(frozen=True)
class Case:
    """One instance of the study.

    Parameters
    ----------
    family : str
        See `benchmarks.study.families.instance`.
    n_clients, n_experts : int
    """

    family: str
    n_clients: int
    n_experts: int

    @property
    def name(self) -> str:
        """As in the rows: ``"clustered 1000x16"``."""
        return f"{self.family} {self.size}"

    @property
    def size(self) -> str:
        """``"1000x16"``."""
        return f"{self.n_clients}x{self.n_experts}"

    @property
    def pairs(self) -> int:
        """Clients times experts."""
        return self.n_clients * self.n_experts


def case_of(instance: str) -> Case:
    """Return the case that a row's instance name stands for.

    Examples
    --------
    >>> case_of("clustered 1000x16")
    Case(family='clustered', n_clients=1000, n_experts=16)
    """
    family, size = instance.rsplit(" ", 1)
    n, m = size.split("x")
    return Case(family, int(n), int(m))


@dataclass(frozen=True)
class Plan:
    """A study.

    Parameters
    ----------
    sizes : tuple of (int, int)
        Clients and experts, ascending.
    families : tuple of str
    single_sizes : tuple of (int, int)
        Sizes for one expert per client.
    single_families : tuple of str
    seconds : float
        Limit of a solve below `FLOAT32_PAIRS` pairs.
    large_seconds, largest_seconds : float
        Limit from `FLOAT32_PAIRS` pairs on, and from ten times as many on.
    repeats : int
        The most solves of one solver on one instance.
    repeat_seconds : float
        No further solve is begun after so long.
    """

    sizes: tuple[tuple[int, int], ...]
    families: tuple[str, ...] = FAMILIES
    single_sizes: tuple[tuple[int, int], ...] = ()
    single_families: tuple[str, ...] = ("clustered",)
    seconds: float = 30.0
    large_seconds: float = 60.0
    largest_seconds: float = 240.0
    repeats: int = 5
    repeat_seconds: float = 4.0

    def cases(self) -> Iterator[Case]:
        """All instances, by ascending size: an interrupted study has the same part of every family."""
        for n, m in self.sizes:
            yield from (Case(family, n, m) for family in self.families)
        for n, m in self.single_sizes:
            yield from (Case(family + SINGLE, n, m) for family in self.single_families)

    def limit(self, case: Case) -> float:
        """Seconds that a solve may take."""
        if case.pairs >= 10 * FLOAT32_PAIRS:
            return self.largest_seconds
        return self.large_seconds if case.pairs >= FLOAT32_PAIRS else self.seconds

    def solvers(self, case: Case) -> tuple[str, ...]:
        """Names of the solvers to run on an instance, in the order of the runs."""
        if case.family.endswith(SINGLE):
            return _SINGLE_SOLVERS
        others = [entry.name for entry in solvers() if entry.name not in {*_RIVALS, *PEERS}]
        return (*others, *_RIVALS)


FULL = Plan(
    sizes=((100, 8), (1_000, 16), (10_000, 32), (20_000, 64), (100_000, 64), (1_000_000, 64)),
    single_sizes=((100, 8), (1_000, 16), (10_000, 32), (20_000, 64), (100_000, 64)),
)

QUICK = Plan(
    sizes=((100, 8), (1_000, 16), (4_000, 16)),
    single_sizes=((100, 8), (1_000, 16)),
    seconds=5.0,
    repeats=3,
    repeat_seconds=1.0,
)
