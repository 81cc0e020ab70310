"""Client-expert scheduling for federated Mixture-of-Experts training.

``schedule(fitness, usage, capacity)`` decides which client trains which experts in a round, and proves how good
the answer is; see the documentation for the problem, the backends and the round loop.
"""

from fedmoe_sched._version import __version__
from fedmoe_sched.certify import Certificate, Violation, certify, dual_bound
from fedmoe_sched.errors import (
    InfeasibleError,
    InputError,
    MissingDependencyError,
    NoAssignmentError,
    StateFileError,
    UnsupportedProblemError,
    WorkerError,
)
from fedmoe_sched.expert_layers import ExpertLayers
from fedmoe_sched.load_penalty import LoadPenalty
from fedmoe_sched.max_min import Level, MaxMin, max_min
from fedmoe_sched.problem import AssignmentProblem
from fedmoe_sched.registry import SolverEntry, register_solver, solvers
from fedmoe_sched.resource_budget import ResourceBudget
from fedmoe_sched.result import Bound, Conflict, Relaxation, Schedule, Status, StopReason
from fedmoe_sched.rounds import RoundRecord
from fedmoe_sched.schedule import schedule
from fedmoe_sched.scheduler import Scheduler
from fedmoe_sched.scores import CapacityProfile, ExpertCost, FitnessOptions, UsageOptions
from fedmoe_sched.solve import solve
from fedmoe_sched.solver import Capability, Limits, Solver

__all__ = [
    "AssignmentProblem",
    "Bound",
    "Capability",
    "CapacityProfile",
    "Certificate",
    "Conflict",
    "ExpertCost",
    "ExpertLayers",
    "FitnessOptions",
    "InfeasibleError",
    "InputError",
    "Level",
    "Limits",
    "LoadPenalty",
    "MaxMin",
    "MissingDependencyError",
    "NoAssignmentError",
    "Relaxation",
    "ResourceBudget",
    "RoundRecord",
    "Schedule",
    "Scheduler",
    "Solver",
    "SolverEntry",
    "StateFileError",
    "Status",
    "StopReason",
    "UnsupportedProblemError",
    "UsageOptions",
    "Violation",
    "WorkerError",
    "__version__",
    "certify",
    "dual_bound",
    "max_min",
    "register_solver",
    "schedule",
    "solve",
    "solvers",
]
