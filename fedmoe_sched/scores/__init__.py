"""The three living quantities of the scheduler: fitness, usage and capacity; arrays in, arrays out."""

from fedmoe_sched.scores.capacity import (
    CapacityProfile,
    ExpertCost,
    capacity_and_eligibility,
    corrected_speed,
    estimate_profile,
    profile_table,
    resource_budgets,
    round_seconds,
)
from fedmoe_sched.scores.fairness import FairnessOptions, client_queues, expert_deficits, fairness_gains
from fedmoe_sched.scores.fitness import (
    FitnessOptions,
    FitnessScores,
    accuracy_reward,
    flux_reward,
    loss_reward,
    oort_reward,
    router_frequency_reward,
)
from fedmoe_sched.scores.selection import SelectionOptions, select_clients, selection_scores
from fedmoe_sched.scores.usage import UsageOptions, UsageScores

__all__ = [
    "CapacityProfile",
    "ExpertCost",
    "FairnessOptions",
    "FitnessOptions",
    "FitnessScores",
    "SelectionOptions",
    "UsageOptions",
    "UsageScores",
    "accuracy_reward",
    "capacity_and_eligibility",
    "client_queues",
    "corrected_speed",
    "estimate_profile",
    "expert_deficits",
    "fairness_gains",
    "flux_reward",
    "loss_reward",
    "oort_reward",
    "profile_table",
    "resource_budgets",
    "round_seconds",
    "router_frequency_reward",
    "select_clients",
    "selection_scores",
]
