"""Alignment policies by name: rules for which client trains which experts, ready for a training loop.

Each policy is one file with one class; a module is imported when its policy is first used.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Hashable, Iterable
from typing import Any

from fedmoe_sched._files import PathLike, read_archive
from fedmoe_sched._variables import StateVariable
from fedmoe_sched.errors import InputError, StateFileError
from fedmoe_sched.policies.base import Policy, RulePolicy
from fedmoe_sched.scheduler import Scheduler

__all__ = [
    "POLICIES",
    "Policy",
    "RulePolicy",
    "StateVariable",
    "load_policy",
    "make_policy",
    "policy_class",
    "register_policy",
    "takes_option",
]

#: Name to ``"module:Class"``.
POLICIES: dict[str, str] = {
    "scheduler": "fedmoe_sched.scheduler:Scheduler",
    "random": "fedmoe_sched.policies.random_policy:RandomPolicy",
    "greedy": "fedmoe_sched.policies.greedy:GreedyPolicy",
    "desirability": "fedmoe_sched.policies.desirability:DesirabilityPolicy",
    "balanced": "fedmoe_sched.policies.balanced:BalancedPolicy",
    "flex-moe": "fedmoe_sched.policies.flex_moe:FlexMoePolicy",
    "fedamole": "fedmoe_sched.policies.fedamole:FedAmolePolicy",
    "fedjets": "fedmoe_sched.policies.fedjets:FedJetsPolicy",
    "fedmix": "fedmoe_sched.policies.fedmix:FedMixPolicy",
    "pfedmoe": "fedmoe_sched.policies.pfedmoe:PFedMoePolicy",
    "flux": "fedmoe_sched.policies.flux:FluxPolicy",
    "hfedmoe": "fedmoe_sched.policies.hfedmoe:HFedMoePolicy",
    "fedmoe": "fedmoe_sched.policies.fedmoe:FedMoePolicy",
    "pfedmoap": "fedmoe_sched.policies.pfedmoap:PFedMoapPolicy",
    "fedmoe-da": "fedmoe_sched.policies.fedmoe_da:FedMoeDaPolicy",
}


def register_policy(name: str, path: str) -> None:
    """Add a policy of your own under a name, or replace one.

    Parameters
    ----------
    name : str
        What to pass to `make_policy`; equal to the class attribute ``name``, which state files carry.
    path : str
        ``"module:Class"``, a subclass of `fedmoe_sched.Scheduler`; imported when first used.

    Raises
    ------
    InputError
        `path` does not read so.
    """
    module, _, cls = path.partition(":")
    if not module or not cls:
        msg = f"path = {path!r}: must read 'module:Class'"
        raise InputError(msg)
    POLICIES[name] = path


def policy_class(name: str) -> type[Scheduler]:
    """Return the class of a policy.

    Raises
    ------
    InputError
        There is no policy of that name.
    """
    try:
        module, _, cls = POLICIES[name].partition(":")
    except (KeyError, TypeError):
        msg = f"policy = {name!r}: must be one of {', '.join(POLICIES)}"
        raise InputError(msg) from None
    found: type[Scheduler] = getattr(importlib.import_module(module), cls)
    return found


def takes_option(name: str, option: str) -> bool:
    """Return whether a policy leaves an option to its user.

    Parameters
    ----------
    name : str
        One of `POLICIES`.
    option : str
        A keyword argument.

    Returns
    -------
    bool
        False where no constructor knows the option, and where the policy fixes it (`RulePolicy.fixed`).

    Raises
    ------
    InputError
        There is no policy of that name.

    Examples
    --------
    >>> takes_option("random", "seed"), takes_option("random", "solver"), takes_option("random", "colour")
    (True, False, False)
    """
    cls = policy_class(name)
    if option in getattr(cls, "fixed", ()):
        return False
    for base in cls.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters
            if option in parameters:
                return True
            if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
                break  # what it does not name, it does not hand on
    return False


def make_policy(name: str, experts: int | Iterable[Hashable], **options: Any) -> Scheduler:
    """Make a policy by name.

    Parameters
    ----------
    name : str
        One of `POLICIES`.
    experts : int or iterable of hashable
        m, or the names of the experts.
    **options
        Those of `fedmoe_sched.Scheduler`, and the policy's own.

    Returns
    -------
    Scheduler
        It satisfies `Policy`.

    Raises
    ------
    InputError
        No such policy, a wrong option, or one that the policy fixes otherwise.

    Examples
    --------
    >>> make_policy("greedy", 4, seed=1).name
    'greedy'
    """
    cls = policy_class(name)
    try:
        return cls(experts, **options)
    except TypeError as error:
        msg = f"policy {name!r}: {error}"
        raise InputError(msg) from error


def load_policy(path: PathLike) -> Scheduler:
    """Load a saved policy, whichever it is.

    Parameters
    ----------
    path : str or path-like
        Written by `Scheduler.save`.

    Returns
    -------
    Scheduler
        Of the class that saved it.

    Raises
    ------
    StateFileError
        The file is corrupted, truncated, of another version, or of a policy that is not registered.
    OSError
        There is no such file.
    """
    _, metadata = read_archive(path)
    try:
        cls = policy_class(str(metadata.get("policy")))
    except InputError as error:
        msg = f"{path}: {error}"
        raise StateFileError(msg) from error
    return cls.load(path)
