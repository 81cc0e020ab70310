"""Further solvers to compare with, one per file; the study alone uses them, the package never does."""

from __future__ import annotations

from fedmoe_sched import register_solver

__all__ = ["PEERS", "register_peers"]

#: Where each peer is found, by its name in tables.
PEERS = {
    "flow-pylmcf": "benchmarks.study.peers.pylmcf_simplex:PylmcfSimplex",
    "flow-pruned": "benchmarks.study.peers.pruned_flow:PrunedFlow",
    "emd-pot": "benchmarks.study.peers.pot_emd:PotEmd",
    "lap-scipy": "benchmarks.study.peers.scipy_lap:SciPyLap",
}


def register_peers() -> None:
    """Let `fedmoe_sched.solve` and `fedmoe_sched.compare` find the peers by name, in this process."""
    for name, path in PEERS.items():
        register_solver(name, path)
