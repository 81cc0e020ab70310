"""What happens around the assignment, by name: what is sent, trained, frozen, kept by the client, and merged.

A policy names its method (`fedmoe_sched.Scheduler.method`); most have the plain one, ``"shared"``. Each method is
one file with one class, imported when first used. Methods know names and arrays, neither torch nor the training
loop: any engine can carry them.
"""

from __future__ import annotations

import importlib

from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.methods.base import Brief, Method, Setting, View, work_of

__all__ = ["METHODS", "Brief", "Method", "Setting", "View", "make_method", "register_method", "work_of"]

#: Name to ``"module:Class"``.
METHODS: dict[str, str] = {
    "shared": "fedmoe_sched.federated.methods.base:Method",
    "fedmix": "fedmoe_sched.federated.methods.fedmix:FedMix",
    "pfedmoe": "fedmoe_sched.federated.methods.pfedmoe:PFedMoe",
    "pfedmoap": "fedmoe_sched.federated.methods.pfedmoap:PFedMoap",
    "fedmoe-da": "fedmoe_sched.federated.methods.fedmoe_da:FedMoeDa",
}


def register_method(name: str, path: str) -> None:
    """Add a method of your own under a name, or replace one.

    Parameters
    ----------
    name : str
        What policies have as their ``method``.
    path : str
        ``"module:Class"``, a subclass of `Method`.

    Raises
    ------
    InputError
        `path` does not read so.
    """
    module, _, cls = path.partition(":")
    if not module or not cls:
        msg = f"path = {path!r}: must read 'module:Class'"
        raise InputError(msg)
    METHODS[name] = path


def make_method(name: str, setting: Setting) -> Method:
    """Make the method that a policy names.

    Parameters
    ----------
    name : str
        One of `METHODS`.
    setting : Setting
        Of the run.

    Raises
    ------
    InputError
        There is no such method, or it does not fit the setting.
    """
    if name not in METHODS:
        msg = f"method = {name!r}: must be one of {', '.join(METHODS)}"
        raise InputError(msg)
    module, _, cls = METHODS[name].partition(":")
    found: type[Method] = getattr(importlib.import_module(module), cls)
    return found(setting)
