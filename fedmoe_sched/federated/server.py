"""The server of a run, wherever its clients are: model, policy, method, run folder, and the steps of a round.

The loop on one machine (`fedmoe_sched.federated.simulation`) and the coordinator of clients elsewhere
(`fedmoe_sched.federated.coordinator`) are built on it. They differ in who trains, and in what becomes of clients
that do not answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmoe_sched._files import write_archive
from fedmoe_sched.errors import InputError
from fedmoe_sched.federated.bookkeeping import (
    Arrays,
    Laps,
    Stream,
    client_arrays,
    client_names,
    learning_record,
    restored_state,
    round_arrays,
)
from fedmoe_sched.federated.client import LocalResult
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.evaluate import Evaluation, evaluate
from fedmoe_sched.federated.methods import Brief, Method, Setting, make_method
from fedmoe_sched.federated.methods.cached import CachedExperts, copy_options, refuse_cache
from fedmoe_sched.federated.model import build_model
from fedmoe_sched.federated.preparation import prepare
from fedmoe_sched.federated.runs import RunFolder
from fedmoe_sched.federated.signals import experts_needed, refuse_unknown_signals
from fedmoe_sched.federated.workers import ClientJob, ClientQuestion
from fedmoe_sched.policies import load_policy, make_policy, policy_class
from fedmoe_sched.scheduler import Scheduler

__all__ = ["Record", "Server"]

Record = dict[str, Any]

# What belongs to the method, among the arrays of a checkpoint.
_OF_METHOD = "method:"


class Server:
    """State of one run, and what is the same in every round; subclasses make the `policy`.

    Parameters
    ----------
    config : TrainConfig
    folder : RunFolder

    Attributes
    ----------
    round : int
        Finished rounds.
    state : dict of str to Tensor
        Global parameters.
    sizes : dict of str to int
        Their bytes.
    names : list of str
        All clients, in the order of their numbers.
    held : list of list of int
        Experts of each client, when it was last planned.
    told : set of int
        Clients that have told what they are asked for once.

    Raises
    ------
    InputError
        Wrong settings.
    """

    policy: Scheduler

    def __init__(self, config: TrainConfig, folder: RunFolder) -> None:
        self.config, self.folder = config, folder
        self.device = _device(config.device)
        self.prepared = prepare(config)
        self.capacity = config.clients.capacities()
        self.names = client_names(config.clients.count)
        self.numbers = {name: i for i, name in enumerate(self.names)}
        data = self.prepared.data
        model = build_model(config.model, data.train_images.shape[1], data.n_classes, seed=config.seed)
        self.model = model.to(self.device)
        self.state: dict[str, Tensor] = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.sizes = {name: value.numel() * value.element_size() for name, value in self.state.items()}
        self.method = _method(config, Setting(tuple(self.names), config.model.experts))
        self.told: set[int] = set()
        self.held: list[list[int]] = [[] for _ in self.names]
        self.round = 0

    def make_policy(self, options: Mapping[str, Any]) -> Scheduler:
        """Make the policy of the settings.

        It counts as held the copies that clients go on from, unless the settings say otherwise.

        Parameters
        ----------
        options : mapping
            Options of the policy; those of the settings come on top.

        Raises
        ------
        InputError
            A wrong option, or a signal that nobody knows.
        """
        config = self.config
        copies = copy_options(config.policy, config.clients.oldest_copy)
        options = {"seed": config.seed, **copies, **options, **config.policy_options}
        self.policy = make_policy(config.policy, config.model.experts, **options)
        refuse_unknown_signals(self.signals("once", "before", "after"), f"policy {config.policy!r}")
        return self.policy

    def begin(self, *, resume: bool) -> None:
        """Begin the run folder, or go on after its last checkpoint.

        Raises
        ------
        InputError
            It is in use, or holds a run with other settings.
        StateFileError
            The checkpoint is corrupted.
        """
        if resume and self.folder.config_file.exists():
            self.config.refuse_to_continue(self.folder.config_file)
            self.restore()
            self.folder.write_config(self.config.to_toml())
        else:
            self.folder.begin(self.config.to_toml())
        write_archive(self.folder.clients_file, self.client_arrays(), {"names": self.names})

    def client_arrays(self) -> Arrays:
        """Return what figures need to know of the clients."""
        return client_arrays(self.prepared.partition, self.capacity)

    # Steps of a round ----------------------------------------------------------------------------------------

    def signals(self, *times: str) -> tuple[str, ...]:
        """Name what clients are asked for at these times, by the policy and, after training, by the method."""
        asked = [name for when in times for name in self.policy.signals(when)]
        return tuple(dict.fromkeys([*asked, *(self.method.signals if "after" in times else ())]))

    def questions_to(self, clients: Sequence[int]) -> list[ClientQuestion]:
        """Return what clients are to be asked before the round is planned; nothing for most policies."""
        always, every = self.signals("before"), range(self.config.model.experts)
        questions = []
        for client in clients:
            signals = always if client in self.told else (*self.signals("once"), *always)
            if signals:
                held, judged = experts_needed(signals, every, every)
                experts, parts = tuple(sorted({*held, *judged})), self.method.personal_parts(client)
                questions.append(ClientQuestion(self.names[client], client, signals, experts, parts))
        return questions

    def hear(self, question: ClientQuestion, signals: Mapping[str, Any]) -> None:
        """Take in the answer to a question."""
        self.policy.tell(question.client, {name: signals[name] for name in question.signals})
        self.told.add(question.number)

    def decide(self, capacities: Mapping[str, int], clock: Laps) -> tuple[dict[str, list[int]], dict[str, Brief]]:
        """Have the policy plan, and the method say what comes of it.

        Parameters
        ----------
        capacities : mapping of client name to int
            Of those that take part.
        clock : Laps

        Returns
        -------
        assigned : dict of client name to list of int
            The experts of all that take part.
        briefs : dict of client name to Brief
            Of those that have any.
        """
        clients = [self.numbers[name] for name in capacities]
        self.method.before_plan(self.policy, self.state, clients)
        clock.lap("ask_seconds")
        schedule = self.policy.plan(dict(capacities))
        assigned = {str(name): [int(j) for j in experts] for name, experts in schedule.experts_by_client().items()}  # type: ignore[call-overload]
        clock.lap("schedule_seconds")
        briefs = {
            name: self.method.brief(self.numbers[name], experts, self.state)
            for name, experts in assigned.items()
            if experts
        }
        return assigned, briefs

    def job(self, number: int, name: str, brief: Brief) -> ClientJob:
        """Return what a client has to do in a round."""
        client = self.numbers[name]
        seed = (self.config.seed, int(Stream.LOCAL), number, client)
        return ClientJob(name, client, brief, seed, self.signals("after"))

    def teach(
        self,
        briefs: Mapping[str, Brief],
        results: Sequence[LocalResult],
        seconds: Mapping[str, float],
        *,
        counts: bool = True,
    ) -> Record:
        """Feed the policy, in the order of the plan, and close its round.

        Parameters
        ----------
        briefs : mapping of client name to Brief
            Of all that were planned; those without a result have failed.
        results : sequence of LocalResult
        seconds : mapping of client name to float
            The round times that the policy is told.
        counts : bool
            Whether what was trained is in the model. Where it is not, no expert was used; what the clients found
            out about the experts that they received is true all the same.
        """
        answers = {str(result.update.client): result for result in results}
        for name in briefs:
            result = answers.get(name)
            if result is None:
                self.policy.report(name, failed=True)
                continue
            samples = result.update.expert_samples
            feedback = {j: (samples[j] if counts else 0.0, reward) for j, reward in result.rewards.items()}
            self.policy.report(name, feedback, seconds=seconds.get(name))
        record = self.policy.close_round().to_dict()
        asked = self.policy.signals("after")
        for name, result in answers.items():
            if asked:
                self.policy.tell(name, {signal: result.update.signals[signal] for signal in asked})
        return record

    def settle(
        self,
        number: int,
        assigned: Mapping[str, list[int]],
        results: Sequence[LocalResult],
        closed: Mapping[str, Any],
        more: Mapping[str, Any],
        clock: Laps,
    ) -> Record:
        """Evaluate, and put the record of the round, its arrays and a checkpoint on disk.

        Parameters
        ----------
        number : int
            Of the round.
        assigned : mapping of client name to list of int
        results : sequence of LocalResult
            Those that metrics are made of.
        closed, more : mapping
            What the policy, and others, say of the round.
        clock : Laps
        """
        for name, experts in assigned.items():
            self.held[self.numbers[name]] = experts
        evaluation = self._evaluate()
        clock.lap("evaluate_seconds")
        record = {**closed, **learning_record(results, evaluation), **more, **clock.laps}
        m = self.config.model.experts
        arrays = round_arrays(self.numbers, m, assigned, results, evaluation, self.policy)
        self.folder.write_schedule(number, arrays)
        self._checkpoint(number, self.folder.append(record))
        return record

    def _evaluate(self) -> Evaluation:
        views = [self.method.client_view(client, held) for client, held in enumerate(self.held)]
        whole = self.method.global_view()
        return evaluate(self.model, self.state, self.prepared, views, device=self.device, whole=whole)

    # Checkpoints ---------------------------------------------------------------------------------------------

    def simulated(self) -> dict[str, Any]:
        """Return what a checkpoint holds of simulated devices; there are none here."""
        return {"simulated_time": 0.0, "devices": None}

    def restore_simulated(self, metadata: Mapping[str, Any]) -> None:
        """Take back what `simulated` returned."""

    def _checkpoint(self, number: int, metrics_bytes: int) -> None:
        arrays: Arrays = {name: value.cpu().numpy() for name, value in self.state.items()}
        arrays |= {_OF_METHOD + name: np.asarray(value) for name, value in self.method.arrays().items()}
        metadata = {"metrics_bytes": metrics_bytes, "held": self.held, "told": sorted(self.told)}
        self.folder.save_checkpoint(number, arrays, {**metadata, **self.simulated()}, self.policy)
        self.round = number

    def restore(self) -> None:
        """Go back to the latest checkpoint; to the start if there is none."""
        found = self.folder.load_checkpoint()
        if found is None:
            self.folder.rewind(0, 0)
            return
        arrays, metadata, policy_file = found
        state = restored_state(self.state, arrays, policy_file.with_name("model.npz"))
        self.restore_simulated(metadata)
        self.state = state
        self.method.restore(
            {name.removeprefix(_OF_METHOD): v for name, v in arrays.items() if name.startswith(_OF_METHOD)}
        )
        self.told = set(metadata.get("told", ()))
        self.policy = load_policy(policy_file)
        self.held, self.round = metadata["held"], metadata["round"]
        self.folder.rewind(self.round, metadata["metrics_bytes"])


def _method(config: TrainConfig, setting: Setting) -> Method:
    name, clients = policy_class(config.policy).method, config.clients
    refuse_cache(clients.cache, config.policy, name)
    if clients.cache == "none":
        return make_method(name, setting)
    return CachedExperts(setting, clients.max_staleness if clients.cache == "stale" else None)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        msg = f"device = {name!r}: cannot be used here ({str(error).splitlines()[0]})"
        raise InputError(msg) from error
    return device
