"""A real Flower deployment on this machine: SuperLink and SuperNodes as processes on 127.0.0.1, for trials.

Every process gets a session of its own, which ends with the `Deployment`; ports are whatever is free; every wait
ends. With ``tls`` the connections are encrypted with certificates made for the occasion, and only nodes whose keys
were registered are let in.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fedmoe_sched.errors import WorkerError
from fedmoe_sched.flower.keys import make_node_key, make_server_certificate

__all__ = ["Deployment", "RunReport", "flower_environment"]

_CONNECTION = "loopback"
_GRACE = 10.0  # seconds that a process gets to end by itself
_POLL = 1.0  # seconds; each look at a run takes a second of processor time itself


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment for Flower's commands: this Python, its own home, nothing sent to anybody.

    Parameters
    ----------
    home : Path
        Where Flower keeps its state.
    """
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "NO_COLOR": "1",
        "TERM": "dumb",
        # They start programs of their own by name, which must find the same packages as this process.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }


@dataclass(frozen=True)
class RunReport:
    """What the engine says of a run.

    Parameters
    ----------
    run_id : str
    status : str
        ``"finished:completed"`` if all is well.
    bytes_received, bytes_sent : int
        Network traffic of the SuperLink by its own count.
    seconds : float
        From the submission to the end, by the clock of the caller.
    """

    run_id: str
    status: str
    bytes_received: int
    bytes_sent: int
    seconds: float


class Deployment:
    """A SuperLink and its SuperNodes; a context manager.

    Parameters
    ----------
    folder : path
        For logs, state and keys; made where it does not exist.
    app : path
        Folder of the app that runs.
    nodes : sequence of mapping
        Node config of each SuperNode.
    tls : bool
        Encrypted connections, and registered node keys.
    start_timeout : float
        Seconds until everything must be up.

    Raises
    ------
    WorkerError
        Something did not start in time, or ended; the message names its log.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        app: str | os.PathLike[str],
        nodes: Sequence[Mapping[str, Any]],
        *,
        tls: bool = False,
        start_timeout: float = 120.0,
    ) -> None:
        self.folder, self.app, self.nodes, self.tls = Path(folder).resolve(), Path(app).resolve(), nodes, tls
        self._timeout = start_timeout
        self._home = self.folder / "flwr"
        self._environment = flower_environment(self._home)
        self.superlink: subprocess.Popen[bytes] | None = None
        self.supernodes: dict[int, subprocess.Popen[bytes]] = {}
        self._port = 0

    def __enter__(self) -> Self:
        self._home.mkdir(parents=True, exist_ok=True)
        try:
            self.start_superlink()
            for place in range(len(self.nodes)):
                self._register(place)
                self.start_supernode(place)
            self.wait_online(len(self.nodes))
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # Processes -----------------------------------------------------------------------------------------------

    def start_superlink(self) -> None:
        """Start a SuperLink, and wait until it listens."""
        self._port = _free_port()
        security = ["--insecure"]
        if self.tls:
            files = make_server_certificate(self.folder)
            security = ["--ssl-certfile", str(files.certificate), "--ssl-keyfile", str(files.key)]
            security += ["--ssl-ca-certfile", str(files.authority), "--enable-supernode-auth"]
        self._write_connection()
        command = ["flower-superlink", *security, "--host", "127.0.0.1", "--port", str(self._port)]
        self.superlink = self._start("superlink", [*command, "--disable-runtime-dependency-installation"])
        self._wait("the SuperLink to listen", self._listens, self.superlink, "superlink")

    def _write_connection(self) -> None:
        security = f'root-certificates = "{self.folder / "ca.pem"}"' if self.tls else "insecure = true"
        text = f'[superlink]\ndefault = "{_CONNECTION}"\n\n[superlink.{_CONNECTION}]\n'
        text += f'address = "127.0.0.1:{self._port}"\n{security}\n'
        (self._home / "config.toml").write_text(text, encoding="utf-8")

    def _listens(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
            return True
        return False

    def _register(self, place: int) -> None:
        if self.tls:
            public = make_node_key(self.folder / f"node-{place}")
            self._ask("supernode", "register", str(public), _CONNECTION)

    def start_supernode(self, place: int) -> None:
        """Start a SuperNode with the config of that place."""
        security = ["--insecure"]
        if self.tls:
            security = ["--root-certificates", str(self.folder / "ca.pem")]
            # The programs that it starts talk to it over the loopback interface: encrypted too.
            security += ["--ssl-certfile", str(self.folder / "server.pem")]
            security += ["--ssl-keyfile", str(self.folder / "server.key")]
            security += ["--ssl-ca-certfile", str(self.folder / "ca.pem")]
            security += ["--auth-supernode-private-key", str(self.folder / f"node-{place}")]
        command = ["flower-supernode", *security, "--superlink", f"127.0.0.1:{self._port}"]
        command += ["--host", "127.0.0.1", "--port", str(_free_port())]
        config = " ".join(f"{key}={json.dumps(value)}" for key, value in self.nodes[place].items())
        self.supernodes[place] = self._start(f"supernode-{place}", [*command, "--node-config", config])

    def _start(self, name: str, command: Sequence[str]) -> subprocess.Popen[bytes]:
        program = Path(sys.executable).with_name(command[0])
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [str(program), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=self._environment,
                start_new_session=True,
            )

    def kill_superlink(self) -> None:
        """Kill the SuperLink and what it started, at once."""
        assert self.superlink is not None
        _end(self.superlink, signal.SIGKILL)

    def kill_supernode(self, place: int) -> None:
        """Kill a SuperNode and what it started, at once."""
        _end(self.supernodes[place], signal.SIGKILL)

    def stop(self) -> None:
        """End all processes: politely, then at once."""
        running = [*self.supernodes.values(), *([] if self.superlink is None else [self.superlink])]
        for process in running:
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + _GRACE
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.1, end - time.monotonic()))
        for process in running:
            _end(process, signal.SIGKILL)

    # Runs ----------------------------------------------------------------------------------------------------

    def wait_online(self, count: int) -> None:
        """Wait until so many SuperNodes are online.

        Raises
        ------
        WorkerError
            They are not in time.
        """
        self._wait(f"{count} SuperNodes", lambda: self.online() >= count, self.superlink, "superlink")

    def online(self) -> int:
        """Return how many SuperNodes the SuperLink sees."""
        answer = self._ask("supernode", "list", _CONNECTION, "--format", "json")
        return sum(node.get("status") == "online" for node in answer.get("nodes", []))

    def submit(self, settings: Mapping[str, Any]) -> str:
        """Submit a run, and return its number.

        Parameters
        ----------
        settings : mapping of str to bool, int, float or str
            On top of those of the app, see `fedmoe_sched.flower.settings.read_run_config`.
        """
        config = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
        answer = self._ask("run", str(self.app), _CONNECTION, "--run-config", config, "--format", "json")
        return str(answer["run-id"])

    def status(self, run_id: str) -> dict[str, Any]:
        """Return what the engine says of a run."""
        answer = self._ask("list", _CONNECTION, "--run-id", run_id, "--format", "json")
        found: dict[str, Any] = answer["runs"][0]
        return found

    def wait_finished(self, run_id: str, timeout: float) -> dict[str, Any]:
        """Wait until a run is over, and return what the engine says of it.

        Raises
        ------
        WorkerError
            It is not in time.
        """
        found: dict[str, Any] = {}

        def finished() -> bool:
            found.update(self.status(run_id))
            return str(found["status"]).startswith("finished")

        self._wait(f"run {run_id} to finish", finished, self.superlink, "superlink", timeout)
        return found

    def run(self, settings: Mapping[str, Any], *, timeout: float = 600.0) -> RunReport:
        """Submit a run, and wait until it is over.

        Parameters
        ----------
        settings : mapping
            As for `submit`.
        timeout : float
            Seconds.

        Raises
        ------
        WorkerError
            It is not over in time, or the app is refused.
        """
        started = time.monotonic()
        run_id = self.submit(settings)
        found = self.wait_finished(run_id, timeout)
        traffic = found.get("network-traffic", {})
        return RunReport(
            run_id,
            str(found["status"]),
            int(traffic.get("inbound-bytes", 0)),
            int(traffic.get("outbound-bytes", 0)),
            time.monotonic() - started,
        )

    def _ask(self, *arguments: str) -> dict[str, Any]:
        """Call ``flwr``, and return its JSON answer."""
        program = Path(sys.executable).with_name("flwr")
        try:
            done = subprocess.run(
                [str(program), *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                cwd=self.folder,
                env=self._environment,
                timeout=60,
            )
        except subprocess.TimeoutExpired as error:
            msg = f"flwr {arguments[0]}: no answer within {error.timeout:g} s"
            raise WorkerError(msg) from error
        answer = _json_in(done.stdout)
        if done.returncode or answer.get("success") is False:  # some failures end with exit status 0
            said = " ".join((done.stderr + done.stdout).split())[-500:]
            msg = f"flwr {arguments[0]}: refused: {said}"
            raise WorkerError(msg)
        return answer

    def _wait(
        self,
        what: str,
        there: Callable[[], bool],
        process: subprocess.Popen[bytes] | None,
        name: str,
        timeout: float | None = None,
    ) -> None:
        end = time.monotonic() + (self._timeout if timeout is None else timeout)
        while not there():
            log = self.folder / f"{name}.log"
            if process is not None and process.poll() is not None:
                msg = f"waiting for {what}: {name} ended with exit status {process.returncode}, see {log}"
                raise WorkerError(msg)
            if time.monotonic() > end:
                msg = f"waiting for {what}: time is over, see {log}"
                raise WorkerError(msg)
            time.sleep(_POLL)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _toml(value: Any) -> str:
    """Write a value for ``--run-config``; text as TOML, which JSON's notation is."""
    return json.dumps(value)


def _json_in(output: str) -> dict[str, Any]:
    """Return the JSON object in what a command printed; some print a line before it."""
    start = output.find("{")
    if start < 0:
        return {}
    found: dict[str, Any] = json.JSONDecoder().raw_decode(output[start:])[0]
    return found


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # its session: the process and whatever it started


def _end(process: subprocess.Popen[bytes], number: int) -> None:
    _signal(process, number)
    process.wait()
