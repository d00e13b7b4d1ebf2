"""The deployment on one machine without containers: Postgres, both servers, a worker.

    python deploy/local_stack.py [--home DIR]            # until Ctrl-C

Everything listens on loopback and asks for a password; the passwords are made at the first start
and lie in <home>/secrets.json, readable by their owner only. Postgres is Debian's package (or any
`initdb` and `postgres` on the PATH); foldstack is installed with its extra "deploy".
"""

import argparse
import asyncio
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldstack.compression.errors import InputError
from foldstack.flows.cli.servers import Parts, Server, mlflow, prefect
from foldstack.flows.prefect_defaults import AGAINST_OUTAGES  # before Prefect

DEPLOY = Path(__file__).resolve().parent
DATABASES = ("prefect", "mlflow")
OWNER = "foldstack"
POOL = "local-process"
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


def stack_in(home: Path) -> Stack:
    """The stack whose files are in `home`; free ports are chosen anew at every start.

    Raises:
        InputError: Postgres is not installed, or may not be run by this user.
    """
    binary("postgres")
    home.mkdir(parents=True, exist_ok=True)
    file = home / "secrets.json"
    if not file.exists():
        words = {name: secrets.token_urlsafe(24) for name in SECRETS}
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as opened:
            json.dump(words, opened)
    names = ("postgres", "prefect", "mlflow", "worker")
    return Stack(
        home=home,
        data=home / "postgres",
        user=postgres_user(),
        ports=dict(zip(names, free_ports(len(names)), strict=True)),
        secrets=json.loads(file.read_text()),
    )


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


@contextmanager
def up(stack: Stack, say: Any = lambda _: None) -> Iterator[Parts]:
    """The whole stack, with its deployments registered.

    Raises:
        InputError: a part of it does not start.
    """
    logs = stack.home / "logs"
    initialise(stack)
    with ExitStack() as held:
        parts = Parts(logs, held)
        parts.add(postgres(stack))
        asyncio.run(make_databases(stack))
        for server in web_servers(stack):
            parts.add(server)
            say(f"{server.name}: {server.page}, user admin, password in secrets.json")
        prefect_command(stack, "work-pool", "create", POOL, "--type", "process", "--overwrite")
        prefect_command(stack, "deploy", "--all", "--prefect-file", str(DEPLOY / "prefect.yaml"))
        parts.add(worker(stack))
        yield parts


def prefect_command(stack: Stack, *arguments: str) -> None:
    """Run Prefect's command line against the stack.

    Raises:
        InputError: it failed.
    """
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        env=os.environ | stack.client, cwd=stack.home, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        log = stack.home / "logs" / f"prefect-{arguments[0]}.log"
        log.write_text(done.stdout + done.stderr)
        raise InputError(f"prefect {' '.join(arguments[:2])} failed; see {log}")


@contextmanager
def temporary_or(home: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that goes away again."""
    if home is not None:
        yield home.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="foldstack-") as folder:
        Path(folder).chmod(0o711)  # Postgres's user passes through
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, help="where files are; by default a temporary folder")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is stopped
    try:
        with temporary_or(arguments.home) as home, up(stack_in(home), print) as parts:
            print(f"files and logs are in {home}; Ctrl-C stops everything", flush=True)
            parts.watch()
    except InputError as error:
        sys.exit(f"local_stack: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
