"""`foldstack ui`: the Prefect and the MLflow server on loopback, until Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from foldstack.compression.errors import InputError
from foldstack.flows.prefect_defaults import DEFAULTS as PREFECT_DEFAULTS

START_SECONDS = 180.0
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Server:
    """A program that serves a page, and how to know that it does."""

    name: str
    command: tuple[str, ...]
    page: str
    health: str
    settings: dict[str, str]


def prefect(port: int) -> Server:
    address = f"http://127.0.0.1:{port}"
    arguments = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    return Server(
        name="Prefect",
        command=(sys.executable, "-m", "prefect", *arguments),
        page=address,
        health=f"{address}/api/health",
        settings=PREFECT_DEFAULTS | {"PREFECT_UI_API_URL": f"{address}/api"},
    )


def mlflow(port: int, uri: str, artifacts: Path) -> Server:
    address = f"http://127.0.0.1:{port}"
    arguments = (
        "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", uri, "--artifacts-destination", str(artifacts),
    )  # fmt: skip
    return Server(
        name="MLflow",
        command=(sys.executable, "-m", "mlflow", *arguments),
        page=address,
        health=f"{address}/health",
        settings={
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # eight processes and 0.8 GB less
        },
    )


def serve(servers: Sequence[Server], logs: Path, say: Callable[[str], None]) -> None:
    """Start the servers, say where they are once they answer, and stop all of them at the end.

    Raises:
        InputError: a server ends instead of answering.
        KeyboardInterrupt: the person has seen enough.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        processes = [stack.enter_context(_running(server, logs)) for server in servers]
        for server, process in zip(servers, processes, strict=True):
            _wait_for(server, process, logs)
            say(f"{server.name}: {server.page}")
        say(f"logs are in {logs}; Ctrl-C stops both")
        while True:
            for server, process in zip(servers, processes, strict=True):
                if process.poll() is not None:
                    raise InputError(_ended(server, process, logs))
            time.sleep(0.5)


class _running:
    """The process group of a server, ended on exit: first asked to, then made to."""

    def __init__(self, server: Server, logs: Path) -> None:
        with _log(server, logs).open("w") as log:
            self.process = subprocess.Popen(
                server.command,
                env={**os.environ, **{k: os.environ.get(k, v) for k, v in server.settings.items()}},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
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
            urllib.request.urlopen(server.health, timeout=5).close()
            return
        time.sleep(0.2)
    raise InputError(
        f"{server.name} did not answer at {server.health} within {START_SECONDS:.0f} s; "
        f"see {_log(server, logs)}"
    )


def _ended(server: Server, process: "subprocess.Popen[bytes]", logs: Path) -> str:
    lines = _log(server, logs).read_text(errors="replace").strip().splitlines()
    last = lines[-1] if lines else "it said nothing"
    return (
        f"{server.name} ended with code {process.returncode} ({last}); see {_log(server, logs)}, "
        "or choose another port"
    )


def _log(server: Server, logs: Path) -> Path:
    return logs / f"{server.name.lower()}.log"
