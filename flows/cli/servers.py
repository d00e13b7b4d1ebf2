"""`foldstack ui`: the Prefect and the MLflow server on loopback, until Ctrl-C.

Secrets (a database's password, who may log in) reach a server by its environment: what stands in a
command line is read by everybody on the machine.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from foldstack.compression.errors import InputError
from foldstack.flows.prefect_defaults import DEFAULTS as PREFECT_DEFAULTS

START_SECONDS = 180.0
STOP_SECONDS = 10.0
RESTARTS = 10


@dataclass(frozen=True)
class Server:
    """A program that serves, and how to know that it does."""

    name: str
    command: tuple[str, ...]
    page: str
    health: str
    """Address that answers once it is up: http, or tcp where a connection is enough."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Settings in its environment where the user has set nothing else."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings in its environment, whatever the user has set."""
    user: str | None = None
    """Whom to run it as; None: the one who runs us."""


def prefect(port: int, settings: Mapping[str, str] | None = None) -> Server:
    """The Prefect server on loopback; `settings` are more of its environment."""
    address = f"http://127.0.0.1:{port}"
    arguments = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    return Server(
        name="Prefect",
        command=(sys.executable, "-m", "prefect", *arguments),
        page=address,
        health=f"{address}/api/health",
        defaults=PREFECT_DEFAULTS
        | {
            "PREFECT_UI_API_URL": f"{address}/api",
            "PREFECT_UI_URL": address,  # links in alerts
        },
        settings=settings or {},
    )


def mlflow(
    port: int, uri: str, artifacts: Path, settings: Mapping[str, str] | None = None, app: str = ""
) -> Server:
    """The MLflow server on loopback, which hands artifacts out and takes them in.

    Args:
        port: where it listens.
        uri: the database of its runs.
        artifacts: the folder of their files.
        settings: more of its environment.
        app: MLflow's plugin to serve, "basic-auth" for one that asks who is there.
    """
    address = f"http://127.0.0.1:{port}"
    arguments = (
        "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--artifacts-destination", str(artifacts), *(("--app-name", app) if app else ()),
    )  # fmt: skip
    return Server(
        name="MLflow",
        command=(sys.executable, "-m", "mlflow", *arguments),
        page=address,
        health=f"{address}/health",
        defaults={
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes and 0.8 GB less
        },
        settings={"MLFLOW_BACKEND_STORE_URI": uri, **(settings or {})},
    )


def serve(servers: Sequence[Server], logs: Path, say: Callable[[str], None]) -> None:
    """Start the servers, say where they are once they answer, and stop all of them at the end.

    Raises:
        InputError: a server ends instead of answering.
        KeyboardInterrupt: the person has seen enough.
    """
    with ExitStack() as stack:
        processes = [stack.enter_context(_running(server, logs)) for server in servers]
        for server, process in zip(servers, processes, strict=True):
            _wait_for(server, process, logs)
            say(f"{server.name}: {server.page}")
        say(f"logs are in {logs}; Ctrl-C stops them")
        watch(servers, processes, logs)


def watch(
    servers: Sequence[Server], processes: Sequence["subprocess.Popen[bytes]"], logs: Path
) -> None:
    """Return never, unless a server ends.

    Raises:
        InputError: it did.
    """
    while True:
        for server, process in zip(servers, processes, strict=True):
            if process.poll() is not None:
                raise InputError(_ended(server, process, logs))
        time.sleep(0.5)


@contextmanager
def running(server: Server, logs: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """The server while it is needed: it answers at the beginning and is gone at the end.

    Raises:
        InputError: it ends instead of answering.
    """
    with _running(server, logs) as process:
        _wait_for(server, process, logs)
        yield process


@dataclass
class Parts:
    """The servers and their processes, in the order in which they were started."""

    logs: Path
    held: ExitStack
    servers: list[Server] = field(default_factory=list)
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    def add(self, server: Server) -> None:
        """Start it; it is stopped with the others, before those that were there first."""
        self.processes.append(self.held.enter_context(running(server, self.logs)))
        self.servers.append(server)

    def watch(self) -> None:
        """Return never, unless one ends.

        Raises:
            InputError: it did.
        """
        watch(self.servers, self.processes, self.logs)

    def kill(self, name: str) -> None:
        """End one at once, as a machine would that fails."""
        process = self.processes[self._place(name)]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def restart(self, name: str) -> None:
        """Start one again that has ended; Postgres refuses as long as its children are there.

        Raises:
            InputError: it does not start.
        """
        place = self._place(name)
        for attempt in range(RESTARTS):
            try:
                started = self.held.enter_context(running(self.servers[place], self.logs))
            except InputError:
                if attempt == RESTARTS - 1:
                    raise
                time.sleep(1)
            else:
                self.processes[place] = started
                return

    def _place(self, name: str) -> int:
        return [server.name for server in self.servers].index(name)


class _running:
    """The process group of a server, ended on exit: first asked to, then made to."""

    def __init__(self, server: Server, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        with _log(server, logs).open("w") as log:
            self.process = subprocess.Popen(
                server.command,
                env={**server.defaults, **os.environ, **server.settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=server.user,
                start_new_session=True,  # Ctrl-C is for us; we end them in order
            )

    def __enter__(self) -> "subprocess.Popen[bytes]":
        return self.process

    def __exit__(self, *error: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
                return


def _wait_for(server: Server, process: "subprocess.Popen[bytes]", logs: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise InputError(_ended(server, process, logs))
        with suppress(OSError, urllib.error.URLError):
            _call(server.health)
            return
        time.sleep(0.2)
    raise InputError(
        f"{server.name} did not answer at {server.health} within {START_SECONDS:.0f} s; "
        f"see {_log(server, logs)}"
    )


def _call(address: str) -> None:
    """Raises OSError when nothing answers."""
    parts = urllib.parse.urlsplit(address)
    if parts.scheme == "tcp":
        socket.create_connection((parts.hostname, parts.port), timeout=5).close()
    else:
        urllib.request.urlopen(address, timeout=5).close()


def _ended(server: Server, process: "subprocess.Popen[bytes]", logs: Path) -> str:
    lines = _log(server, logs).read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it said nothing"
    return (
        f"{server.name} ended with code {process.returncode} ({last}); see {_log(server, logs)}, "
        "or choose another port"
    )


def _log(server: Server, logs: Path) -> Path:
    return logs / f"{server.name.lower()}.log"
