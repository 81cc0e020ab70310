"""Local training of many clients: one after the other in the calling process, or in worker processes.

A worker is a fresh interpreter (``python -m fedmoe_sched.federated.workers``) that takes pickled messages on its
standard input and answers on its standard output: once a `_Setup`, then the global parameters once per round and
any number of jobs. It ends as soon as its standard input does, so none outlives the process that started it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmoe_sched._arrays import IntArray
from fedmoe_sched._processes import start_module
from fedmoe_sched.errors import InputError, WorkerError
from fedmoe_sched.federated.client import LocalResult, train_client
from fedmoe_sched.federated.config import TrainConfig
from fedmoe_sched.federated.data import Dataset
from fedmoe_sched.federated.methods import Brief
from fedmoe_sched.federated.model import build_model
from fedmoe_sched.federated.signals import experts_needed, observe, tell_signals

__all__ = ["ClientJob", "ClientPool", "ClientQuestion", "LocalTrainer", "client_pool"]

# Before its first answer a worker sends this line: what Python itself may print as it starts is before it.
_BEGIN = b"answers follow\n"


class ClientJob(NamedTuple):
    """What one client has to do in a round.

    Parameters
    ----------
    client : str
        Its name.
    number : int
        Its position among the clients.
    brief : Brief
        What it gets, and what it does with it.
    seed : sequence of int
        Of the local training.
    signals : sequence of str
        What else it tells, see `fedmoe_sched.federated.signals`.
    """

    client: str
    number: int
    brief: Brief
    seed: Sequence[int]
    signals: Sequence[str] = ()


class ClientQuestion(NamedTuple):
    """What one client is asked before a round is planned.

    Parameters
    ----------
    client : str
        Its name.
    number : int
        Its position among the clients.
    signals : sequence of str
        See `fedmoe_sched.federated.signals`; they are of all experts.
    experts : sequence of int
        Experts whose parameters it takes to tell them.
    parts : mapping of str to ndarray
        Parameters that take the place of the global ones.
    """

    client: str
    number: int
    signals: Sequence[str]
    experts: Sequence[int]
    parts: Mapping[str, Any]


class LocalTrainer:
    """Trains any client in this process, in one workspace.

    Parameters
    ----------
    config : TrainConfig
    data : Dataset
    samples : sequence of ndarray of int64
        Sample numbers of every client.
    """

    def __init__(self, config: TrainConfig, data: Dataset, samples: Sequence[IntArray]) -> None:
        self.config, self.data, self.samples = config, data, samples
        self.device = torch.device(config.device)
        model = build_model(config.model, data.train_images.shape[1], data.n_classes, seed=config.seed)
        self._workspace = model.to(self.device)

    def train(self, state: Mapping[str, Tensor], job: ClientJob) -> LocalResult:
        """Do one job; parameters come back as NumPy arrays, an exception gets the client's name as a note."""
        try:
            images, labels = self._samples_of(job.number)
            result = train_client(
                self._workspace,
                self._with_parts(state, job.brief.parts),
                images,
                labels,
                job.brief.experts,
                config=self.config.local,
                client=job.client,
                seed=job.seed,
                trained=job.brief.trained,
                judged=job.brief.judged,
                signals=job.signals,
            )
        except Exception as error:
            error.add_note(f"while {job.client} was training experts {list(job.brief.trained)}")
            raise
        arrays = {name: value.cpu().numpy() for name, value in result.update.parameters.items()}
        return replace(result, update=replace(result.update, parameters=arrays))

    def answer(self, state: Mapping[str, Tensor], question: ClientQuestion) -> dict[str, npt.NDArray[np.float64]]:
        """Return the signals that a client is asked for, by name."""
        every = range(self.config.model.experts)
        held, judged = experts_needed(question.signals, every, every)
        self._workspace.load_parts(self._with_parts(state, question.parts), {*held, *judged})
        images, labels = self._samples_of(question.number)
        seen = observe(self._workspace, images, labels, held, judged, n_classes=self.data.n_classes)
        return tell_signals(question.signals, seen)

    def _samples_of(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the training images, normalised, and labels of one client."""
        rows = self.samples[number]
        images = np.asarray(self.data.normalised(self.data.train_images[rows]))
        labels = torch.from_numpy(self.data.train_labels[rows])
        return torch.from_numpy(images).to(self.device), labels.to(self.device)

    def _with_parts(self, state: Mapping[str, Tensor], parts: Mapping[str, Any]) -> dict[str, Tensor]:
        return {**state, **{name: torch.as_tensor(value).to(self.device) for name, value in parts.items()}}


class ClientPool(ABC):
    """Trains the clients of a round; a context manager that holds what it needs for that."""

    @abstractmethod
    def train(self, state: Mapping[str, Tensor], jobs: Sequence[ClientJob]) -> list[LocalResult]:
        """Train clients.

        Parameters
        ----------
        state : mapping of str to Tensor
            Global parameters; not changed.
        jobs : sequence of ClientJob

        Returns
        -------
        list of LocalResult
            In the order of the jobs, the same however many workers there are.

        Raises
        ------
        WorkerError
            A worker process ended before its work was done.
        Exception
            Whatever a job raised, with the client's name as a note.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def client_pool(config: TrainConfig, data: Dataset, samples: Sequence[IntArray]) -> ClientPool:
    """Choose a pool by ``config.workers``.

    Parameters
    ----------
    config : TrainConfig
    data : Dataset
    samples : sequence of ndarray of int64
        Sample numbers of every client.

    Raises
    ------
    InputError
        Several workers on a device other than the CPU.
    """
    if config.workers == 1:
        return _SameProcess(config, data, samples)
    if torch.device(config.device).type != "cpu":
        msg = (
            f"workers = {config.workers}: must be 1 on device {config.device!r}: processes would share it without "
            "being faster, and each would take memory there for itself"
        )
        raise InputError(msg)
    return _WorkerProcesses(config, data, samples)


class _SameProcess(ClientPool):
    """One client after the other, in the calling process."""

    def __init__(self, config: TrainConfig, data: Dataset, samples: Sequence[IntArray]) -> None:
        self._trainer = LocalTrainer(config, data, samples)

    def train(self, state: Mapping[str, Tensor], jobs: Sequence[ClientJob]) -> list[LocalResult]:
        return [self._trainer.train(state, job) for job in jobs]


# --- the caller's side -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Setup:
    """First message to a worker; `data` comes without images, those for training are in the file `images`."""

    config: TrainConfig
    data: Dataset
    samples: Sequence[IntArray]
    images: Path


class _WorkerProcesses(ClientPool):
    """As many processes as there are workers, but no more than clients; a thread waits for each."""

    def __init__(self, config: TrainConfig, data: Dataset, samples: Sequence[IntArray]) -> None:
        self._config, self._data, self._samples = config, data, samples
        self._count = min(config.workers, len(samples))
        self._threads = ThreadPoolExecutor(self._count)
        self._workers: list[_Worker] = []
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        """Start all workers; they map the images from one file, so that memory holds them once for all workers."""
        data = self._data
        # The mappings outlive the file, so that it is gone whatever happens to this process later; Windows, which
        # cannot remove a file in use, leaves it to the cleaning of its temporary folder.
        with tempfile.TemporaryDirectory(prefix="fedmoe-sched-", ignore_cleanup_errors=True) as folder:
            images = Path(folder) / "train_images.npy"
            np.save(images, data.train_images)
            bare = replace(data, train_images=data.train_images[:0], test_images=data.test_images[:0])
            setup = pickle.dumps(_Setup(self._config, bare, self._samples, images))
            for _ in range(self._count):
                self._workers.append(_Worker())
            for worker in self._workers:
                worker.send(setup)
            for worker in self._workers:
                worker.wait()
                self._idle.put(worker)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Workers hold nothing that could be lost. Without them the threads have nothing to wait for.
        for worker in self._workers:
            worker.kill()
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def train(self, state: Mapping[str, Tensor], jobs: Sequence[ClientJob]) -> list[LocalResult]:
        message = pickle.dumps({name: value.numpy() for name, value in state.items()})
        # The longest first: what is left for the end is short, and no worker idles long.
        order = sorted(range(len(jobs)), key=lambda k: self._effort(jobs[k]), reverse=True)
        futures = {k: self._threads.submit(self._ask, message, jobs[k]) for k in order}
        done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
        for future in futures.values():
            future.cancel()  # of no effect where all are done
        for future in done:
            future.result()  # raises what a job has raised
        return [futures[k].result() for k in range(len(jobs))]

    def _effort(self, job: ClientJob) -> tuple[int, int]:
        return len(self._samples[job.number]), len(job.brief.experts)

    def _ask(self, state: bytes, job: ClientJob) -> LocalResult:
        worker = self._idle.get()
        try:
            return worker.train(state, job)
        finally:
            self._idle.put(worker)


class _Worker:
    """The caller's end of one worker process."""

    def __init__(self) -> None:
        self._process = start_module(__name__, stdout=subprocess.PIPE, stderr=None)
        self._state: bytes | None = None
        self._doing = "started"

    def train(self, state: bytes, job: ClientJob) -> LocalResult:
        """Have one job done; the parameters are sent only if they are not those of the job before."""
        self._doing = f"trained {job.client}"
        if self._state is not state:
            self.send(state)
            self._state = state
        self.send(pickle.dumps(job))
        answer = self.receive()
        if isinstance(answer, BaseException):
            raise answer
        result: LocalResult = answer
        return result

    def send(self, message: bytes) -> None:
        """Send a pickled object."""
        stream = self._process.stdin
        assert stream is not None
        try:
            stream.write(message)
            stream.flush()
        except OSError as error:
            raise self._death() from error

    def wait(self) -> None:
        """Wait until the worker is ready for jobs."""
        assert self._process.stdout is not None
        if not any(line.endswith(_BEGIN) for line in self._process.stdout):
            raise self._death()

    def receive(self) -> Any:
        """Wait for an object."""
        assert self._process.stdout is not None
        try:
            return pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._death() from error

    def _death(self) -> WorkerError:
        try:
            code = self._process.wait(timeout=10)  # its pipes are closed: it has ended, or is about to
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
        return WorkerError(
            f"worker process {self._process.pid}: {how} while it {self._doing}; finished rounds are kept, the run "
            "can be resumed (--resume)"
        )

    def kill(self) -> None:
        """End the process, at once."""
        self._process.kill()

    def close(self) -> None:
        """Let go of the pipes, and of the ended process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not yet sent has nowhere to go
                stream.close()
        self._process.wait()


# --- the worker's side -------------------------------------------------------------------------------------------


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Train what is asked for, until the requests end."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests, inbox), daemon=True).start()
    setup: _Setup = inbox.get()
    torch.set_num_threads(setup.config.threads)
    data = replace(setup.data, train_images=np.load(setup.images, mmap_mode="r"))
    trainer = LocalTrainer(setup.config, data, setup.samples)
    _send(answers, _BEGIN)
    state: dict[str, Tensor] = {}
    while True:
        message = inbox.get()
        if isinstance(message, ClientJob):
            _send(answers, _answer(trainer, state, message))
        else:
            state = {name: torch.from_numpy(value) for name, value in message.items()}


def _send(answers: IO[bytes], content: bytes) -> None:
    """Answer; end the process if nobody is there any more, which `_read` may not have seen yet."""
    try:
        answers.write(content)
        answers.flush()
    except BrokenPipeError:
        os._exit(0)


def _read(requests: IO[bytes], inbox: queue.SimpleQueue[Any]) -> None:
    """Pass requests on; end the process with them, even in the middle of a job that nobody waits for."""
    code = 1
    try:
        while True:
            inbox.put(pickle.load(requests))
    except EOFError:
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def _answer(trainer: LocalTrainer, state: Mapping[str, Tensor], job: ClientJob) -> bytes:
    """Return the pickled result of a job, or the pickled exception."""
    try:
        return pickle.dumps(trainer.train(state, job))
    except Exception as error:
        return _pickled(error)


def _pickled(error: Exception) -> bytes:
    """Pickle an exception; one that cannot be read back becomes a `WorkerError` of the same words."""
    error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
    try:
        content = pickle.dumps(error)
        pickle.loads(content)
    except Exception:
        substitute = WorkerError(f"{type(error).__name__}: {error}")
        substitute.__notes__ = error.__notes__
        return pickle.dumps(substitute)
    return content


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides when a worker ends
    # What anybody prints goes to standard error, not between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    # Messages are pickled under the module's real name, not as __main__.ClientJob.
    from fedmoe_sched.federated.workers import _main as main

    main()
