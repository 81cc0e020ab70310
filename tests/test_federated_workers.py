"""Clients trained in worker processes: the same results, errors that arrive, deaths that are told, no orphans."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

pytest.importorskip("torch")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

from test_federated_simulation import contents, small

from fedmoe_sched.errors import InputError, WorkerError
from fedmoe_sched.federated import run_training
from fedmoe_sched.federated.data import load_dataset
from fedmoe_sched.federated.methods import Brief
from fedmoe_sched.federated.model import build_model
from fedmoe_sched.federated.workers import ClientJob, _pickled, client_pool

pytestmark = pytest.mark.train

MODULE = "fedmoe_sched.federated.workers"


def workers_of(pid=None):
    """Worker processes that a process has started."""
    return [child for child in psutil.Process(pid).children() if MODULE in child.cmdline()]


def gone(processes, seconds=20):
    return not psutil.wait_procs(processes, timeout=seconds)[1]


@pytest.fixture(scope="module")
def parts():
    """Data, samples of five clients of very different size, state."""
    data = load_dataset("digits", train_samples=200, test_samples=50)
    samples = np.split(np.arange(200), [5, 100, 120, 130])
    state = build_model(small().model, 1, 10, seed=0).state_dict()
    return data, samples, state


def jobs(count=5):
    return [ClientJob(f"client-{i}", i, brief(i % 4, (i + 1) % 4), (7, i)) for i in range(count)]


def brief(*experts):
    return Brief(experts, experts, experts)


def plain(results):
    """Everything in results but the wall time."""
    return [
        (r.update.client, r.update.samples, r.update.expert_samples, r.rewards, r.loss,
         {name: value.tobytes() for name, value in r.update.parameters.items()})
        for r in results
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pool_of_two(parts):
    """Two workers, and their processes; a start takes seconds."""
    data, samples, _ = parts
    with client_pool(small(workers=2), data, samples) as pool:
        yield pool, workers_of()


def test_results_are_those_of_one_process_in_the_order_of_the_jobs(parts, pool_of_two):
    data, samples, state = parts
    moved = {name: value + 0.01 for name, value in state.items()}
    with client_pool(small(), data, samples) as pool:
        expected = [plain(pool.train(s, jobs())) for s in (state, moved)]
    assert [r[0] for r in expected[0]] == [job.client for job in jobs()]
    assert expected[0] != expected[1]
    pool, started = pool_of_two
    assert len(started) == 2
    assert [plain(pool.train(s, jobs())) for s in (state, moved)] == expected
    assert workers_of() == started
    assert pool.train(state, []) == []


def test_an_exception_arrives_with_the_name_of_the_client(parts, pool_of_two):
    data, samples, state = parts
    bad = [*jobs(3), ClientJob("client-3", 3, brief(), (7,))]
    notes = []
    with client_pool(small(), data, samples) as alone:
        for pool in (alone, pool_of_two[0]):
            with pytest.raises(InputError, match="client 'client-3': has 0 experts") as caught:
                pool.train(state, bad)
            notes.append(caught.value.__notes__)
            assert len(pool.train(state, jobs(3))) == 3  # the pool is still good
    assert notes[0] == notes[1][:1] == ["while client-3 was training experts []"]
    assert "train_client" in notes[1][1]  # the traceback in the worker


class OddError(Exception):
    def __init__(self, left, right):
        super().__init__(f"{left} and {right}")


def test_an_exception_that_cannot_be_sent_becomes_one_that_can():
    import pickle

    error = pickle.loads(_pickled(OddError("salt", "pepper")))
    assert type(error) is WorkerError
    assert str(error) == "OddError: salt and pepper"
    assert "OddError" in error.__notes__[0]
    assert type(pickle.loads(_pickled(KeyError("salt")))) is KeyError


def test_no_more_workers_than_clients_and_what_is_printed_as_one_starts_is_no_answer(parts, monkeypatch, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('good morning', end='')")
    monkeypatch.syspath_prepend(tmp_path)
    data, samples, state = parts
    before = workers_of()
    with client_pool(small(workers=9), data, samples[:1]) as pool:
        [started] = set(workers_of()) - set(before)
        assert [r.update.client for r in pool.train(state, jobs(1))] == ["client-0"]
    assert gone([started], 0)


def test_only_the_cpu_has_several_workers(parts):
    data, samples, _ = parts
    with pytest.raises(InputError, match="workers = 2: must be 1 on device 'meta'"):
        client_pool(small(workers=2, device="meta"), data, samples)


def test_a_worker_that_dies_stops_the_run_which_can_be_resumed(tmp_path):
    before = set(workers_of())

    def kill_one(record):
        if record["round"] == 2:
            next(worker for worker in workers_of() if worker not in before).kill()

    folder = tmp_path / "run"
    with pytest.raises(WorkerError, match=r"worker process \d+: was killed by signal 9 while it .*can be resumed"):
        run_training(small(workers=2), folder, callbacks=[kill_one])
    assert set(workers_of()) <= before
    assert len(contents(folder)) == 2
    run_training(small(), folder, resume=True)
    run_training(small(), tmp_path / "whole")
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_worker_that_cannot_start_is_told(parts, monkeypatch, capfd):
    data, samples, _ = parts
    monkeypatch.setattr("fedmoe_sched.federated.workers.__name__", "fedmoe_sched.no_such_module")
    with (
        pytest.raises(WorkerError, match="ended with exit status 1 while it started"),
        client_pool(small(workers=2), data, samples),
    ):
        pass
    assert "no_such_module" in capfd.readouterr().err


# No guard on __name__: a script like this must not start itself over and over.
SCRIPT = """
import sys
from fedmoe_sched.federated import TrainConfig, run_training
run_training(TrainConfig.from_toml(sys.argv[1]), sys.argv[2], callbacks=[lambda r: print(r["round"], flush=True)])
"""


def test_a_worker_whose_answer_nobody_reads_ends_without_a_word():
    script = """if True:
        import os
        from fedmoe_sched.federated.workers import _send
        read, write = os.pipe()
        os.close(read)
        _send(os.fdopen(write, "wb"), b"answer")
        print("is still there")"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("send", "number"),
    [
        (os.kill, signal.SIGKILL),
        # As Ctrl-C does. That of a whole experiment is among the fast tests.
        pytest.param(os.killpg, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(os.kill, signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(os.killpg, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_no_worker_outlives_the_run(tmp_path, send, number):
    (tmp_path / "config.toml").write_text(small(workers=2, rounds=100_000).to_toml())
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, tmp_path / "script.py", tmp_path / "config.toml", tmp_path / "run"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as run:
        assert [run.stdout.readline().strip() for _ in range(2)] == ["1", "2"]
        started = workers_of(run.pid)
        assert len(started) == 2
        time.sleep(0.05)
        send(run.pid, number)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == -number
    assert gone(started)
    # Only the interrupted caller has something to say, not its workers.
    assert errors.count("Traceback") == (number == signal.SIGINT)
