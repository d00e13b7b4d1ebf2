"""`foldstack ui`: the Prefect and the MLflow server on loopback, until Ctrl-C.

Secrets (a database's password, who may log in) reach a server by its environment: what stands in a
command line is read by everybody on the machine.
"""

import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from foldstack.flows.cli.claims import claimed, note
from foldstack.flows.cli.processes import Parts, Server, check_free
from foldstack.flows.prefect_defaults import DEFAULTS as PREFECT_DEFAULTS
from foldstack.flows.running.prefect_database import database_settings

LEASES = "prefect.server.concurrency.lease_storage.filesystem"
"""Where the server keeps who holds a place of a deployment. Its memory, the default, is gone when
it is started again, and Prefect ends a run whose place is lost.
"""


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
        | database_settings()
        | {
            "PREFECT_UI_API_URL": f"{address}/api",
            "PREFECT_UI_URL": address,  # links in alerts
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": LEASES,
        },
        settings=settings or {},
        port_option="--prefect_port",
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
        port_option="--mlflow_port",
    )


def serve(servers: Sequence[Server], home: Path, say: Callable[[str], None]) -> None:
    """Start the servers, say where they are once they answer, and end all of them at the end.

    One that dies is started again. SIGTERM and a closed terminal end them as Ctrl-C does.

    Raises:
        InputError: they run already, a port is taken, a server ends instead of answering, or does
            not come back.
        KeyboardInterrupt: the person has seen enough.
    """
    logs = home / "logs"
    with (
        ending_on_signals(),
        claimed(home / "ui", "`foldstack ui`", say) as file,
        Parts(logs, say, changed=lambda parts: note(file, parts)) as parts,
    ):
        for server in servers:  # refused before one is started
            check_free(server)
        for part in [parts.start(server) for server in servers]:
            part.wait_until_it_answers()
            say(f"{part.server.name}: {part.server.page}")
        say(f"logs are in {logs}; Ctrl-C stops them")
        parts.watch()


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise SystemExit, so that whatever was started is ended."""

    def leave(number: int, _: FrameType | None) -> None:
        sys.exit(128 + number)

    before = {each: signal.signal(each, leave) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
