"""The parts of the local stack: where their files are, their ports and secrets, how each starts.

Everything listens on loopback and asks for a password; the passwords are made at the first start
and lie in <home>/secrets.json, readable by their owner only; the ports, chosen then too, lie in
<home>/ports.json.
"""

import asyncio
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from foldstack.compression.errors import InputError
from foldstack.flows.cli.processes import Server
from foldstack.flows.cli.servers import mlflow, prefect
from foldstack.flows.prefect_defaults import AGAINST_OUTAGES  # before Prefect

DATABASES = ("prefect", "mlflow")
OWNER = "foldstack"
POOL = "local-process"
PARTS = ("postgres", "prefect", "mlflow", "worker")
SECRETS = ("postgres", "prefect", "mlflow", "mlflow_sessions")


@dataclass(frozen=True)
class Stack:
    """Where everything is, and the secrets that open it."""

    home: Path
    data: Path
    """Postgres's files; they belong to the user that it runs as."""
    user: str | None
    ports: dict[str, int]
    secrets: dict[str, str]

    def database(self, name: str, driver: str = "postgresql") -> str:
        address = f"127.0.0.1:{self.ports['postgres']}"
        return f"{driver}://{OWNER}:{self.secrets['postgres']}@{address}/{name}"

    @property
    def client(self) -> dict[str, str]:
        """The environment of everyone who talks to the servers."""
        return {
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.ports['prefect']}/api",
            "PREFECT_API_AUTH_STRING": f"admin:{self.secrets['prefect']}",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.ports['mlflow']}",
            "MLFLOW_TRACKING_USERNAME": "admin",
            "MLFLOW_TRACKING_PASSWORD": self.secrets["mlflow"],
            "FOLDSTACK_HOME": str(self.home / "results"),
            **AGAINST_OUTAGES,
        }


def stack_in(home: Path, ports: Mapping[str, int | None] | None = None) -> Stack:
    """The stack whose files are in `home`.

    A port is the one that was asked for, else that of the last start, else a free one: links,
    bookmarks and the settings of clients outlive a restart.

    Raises:
        InputError: Postgres is not installed.
    """
    binary("postgres")
    home.mkdir(parents=True, exist_ok=True)
    file = home / "secrets.json"
    if not file.exists():
        words = {name: secrets.token_urlsafe(24) for name in SECRETS}
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            json.dump(words, opened)
    return Stack(
        home=home,
        data=home / "postgres",
        user=postgres_user(),
        ports=_kept_ports(home / "ports.json", ports or {}),
        secrets=json.loads(file.read_text()),
    )


def _kept_ports(file: Path, wanted: Mapping[str, int | None]) -> dict[str, int]:
    kept: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    chosen = kept | {name: port for name, port in wanted.items() if port is not None}
    missing = [name for name in PARTS if name not in chosen]
    chosen |= zip(missing, free_ports(len(missing)), strict=True)
    if chosen != kept:
        written = file.with_suffix(".tmp")
        written.write_text(json.dumps(chosen))
        written.replace(file)
    return chosen


def binary(name: str) -> str:
    """Path of a program of Postgres.

    Raises:
        InputError: it is not installed.
    """
    debian = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    found = shutil.which(name) or (str(debian[-1]) if debian else "")
    if not found:
        raise InputError(
            f"{name} is neither on the PATH nor under /usr/lib/postgresql; install it with "
            "`apt-get install postgresql`"
        )
    return found


def postgres_user() -> str | None:
    """Whom Postgres runs as: it refuses to be root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


def free_ports(number: int) -> list[int]:
    listeners = [socket.socket() for _ in range(number)]
    try:
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def initialise(stack: Stack) -> None:
    """Make the database cluster, if there is none; who connects has to know the password.

    Raises:
        InputError: initdb failed.
    """
    if (stack.data / "PG_VERSION").exists():
        return
    stack.data.mkdir(mode=0o700)
    if stack.user is not None:
        shutil.chown(stack.data, stack.user)
    with tempfile.NamedTemporaryFile("w", prefix="foldstack-") as password:
        password.write(stack.secrets["postgres"])
        password.flush()
        if stack.user is not None:
            shutil.chown(password.name, stack.user)
        done = subprocess.run(
            [binary("initdb"), "-D", str(stack.data), "-U", OWNER, f"--pwfile={password.name}",
             "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"],
            user=stack.user, cwd="/", capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode != 0:
        shutil.rmtree(stack.data)
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        hint = f"; {stack.user} must be able to enter {stack.home}" if stack.user else ""
        raise InputError(f"initdb made no database in {stack.data} ({reason}){hint}")


def postgres(stack: Stack) -> Server:
    port = stack.ports["postgres"]
    options = ("listen_addresses=127.0.0.1", "unix_socket_directories=", f"port={port}")
    arguments = [text for option in options for text in ("-c", option)]
    address = f"tcp://127.0.0.1:{port}"
    return Server(
        name="Postgres",
        command=(binary("postgres"), "-D", str(stack.data), *arguments),
        page=address,
        health=address,
        user=stack.user,
        port_option="--postgres_port",
    )


def worker(stack: Stack) -> Server:
    port = stack.ports["worker"]
    arguments = ("worker", "start", "--pool", POOL, "--type", "process", "--with-healthcheck")
    return Server(
        name="Worker",
        command=(sys.executable, "-m", "prefect", *arguments),
        page=f"pool {POOL}",
        health=f"http://127.0.0.1:{port}/health",
        settings=stack.client
        | {
            "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
            "PREFECT_WORKER_WEBSERVER_PORT": str(port),
            # A worker looks for due runs every 10 s by default.
            "PREFECT_WORKER_QUERY_SECONDS": "5",
        },
        port_option="--worker_port",
    )


def web_servers(stack: Stack) -> list[Server]:
    """The Prefect and the MLflow server on Postgres, both with a password."""
    users = stack.home / "mlflow-users.ini"
    users.write_text(
        "[mlflow]\ndefault_permission = READ\n"
        f"database_uri = sqlite:///{stack.home / 'mlflow-users.db'}\n"
    )
    return [
        prefect(
            stack.ports["prefect"],
            {
                "PREFECT_HOME": str(stack.home / "prefect"),
                "PREFECT_API_DATABASE_CONNECTION_URL": stack.database(
                    "prefect", "postgresql+asyncpg"
                ),
                "PREFECT_SERVER_API_AUTH_STRING": f"admin:{stack.secrets['prefect']}",
                "PREFECT_API_AUTH_STRING": f"admin:{stack.secrets['prefect']}",
            },
        ),
        mlflow(
            stack.ports["mlflow"],
            stack.database("mlflow"),
            stack.home / "mlartifacts",
            {
                "MLFLOW_AUTH_CONFIG_PATH": str(users),
                "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
                "MLFLOW_AUTH_ADMIN_PASSWORD": stack.secrets["mlflow"],
                "MLFLOW_FLASK_SERVER_SECRET_KEY": stack.secrets["mlflow_sessions"],
            },
            app="basic-auth",
        ),
    ]


async def make_databases(stack: Stack) -> None:
    """Make the databases that are missing; waits while Postgres still gets ready."""
    import asyncpg

    for attempt in range(50):
        try:
            connection = await asyncpg.connect(stack.database("postgres"))
            break
        except asyncpg.CannotConnectNowError:
            if attempt == 49:
                raise
            await asyncio.sleep(0.2)
    try:
        rows = await connection.fetch("SELECT datname FROM pg_database")
        there = {row["datname"] for row in rows}
        for name in DATABASES:
            if name not in there:
                await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
