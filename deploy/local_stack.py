"""The deployment on one machine without containers: Postgres, both servers, a worker.

    python deploy/local_stack.py [--home DIR]                                # until Ctrl-C
    python deploy/local_stack.py --home DIR --run foldstack cache gc         # as a client of it

A part that dies is started again; a second start for the same home says where the first one is,
and ends what a killed one has left. Ports are kept from start to start. `deploy/systemd/` makes a
service of it, `backup.py` saves and restores it. Postgres is Debian's package (or any `initdb` and
`postgres` on the PATH); foldstack is installed with its extra "deploy".
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from stack import (
    PARTS,
    POOL,
    Stack,
    initialise,
    make_databases,
    postgres,
    stack_in,
    web_servers,
    worker,
)

from foldstack.compression.errors import InputError
from foldstack.flows.cli.claims import claimed, note
from foldstack.flows.cli.processes import Parts, last_words
from foldstack.flows.cli.servers import ending_on_signals

DEPLOY = Path(__file__).resolve().parent
QUEUE, AT_A_TIME = "gpu", 1
"""Where prefect.yaml sends what computes, and how many of it this machine takes at once."""
UPGRADED = ("prefect", "mlflow")
"""Programs whose databases a new version may have to change."""
UPGRADE_MLFLOW = (
    "import os; from mlflow.db import commands; "
    "commands(['upgrade', os.environ['MLFLOW_BACKEND_STORE_URI']])"
)
"""`mlflow db upgrade`, without the password among its arguments."""


@contextmanager
def up(stack: Stack, say: Callable[[str], None] = lambda _: None) -> Iterator[Parts]:
    """The whole stack, with its deployments registered.

    Raises:
        InputError: it runs already, or a part of it does not start.
    """
    with (
        claimed(stack.home / "stack", "the local stack", say) as file,
        Parts(stack.home / "logs", say, changed=lambda parts: note(file, parts)) as parts,
    ):
        initialise(stack)
        parts.add(postgres(stack))
        asyncio.run(make_databases(stack))
        upgrade(stack, say)
        for server in web_servers(stack):
            parts.add(server)
            say(f"{server.name}: {server.page}, user admin, password in secrets.json")
        register(stack)
        for sentence in command(stack, str(DEPLOY / "interrupted.py")).splitlines():
            say(sentence)
        parts.add(worker(stack))
        yield parts


def register(stack: Stack) -> None:
    """Have the Prefect server know the pool, its limits, the deployments, and what is to be done
    about runs that give no sign of life (and whom to tell, with FOLDSTACK_ALERT_URL).

    Raises:
        InputError: it refuses.
    """
    prefect_command(stack, "work-pool", "create", POOL, "--type", "process", "--overwrite")
    prefect_command(stack, "deploy", "--all", "--prefect-file", str(DEPLOY / "prefect.yaml"))
    limit = ("set-concurrency-limit", QUEUE, str(AT_A_TIME), "--pool", POOL)
    prefect_command(stack, "work-queue", *limit)
    command(stack, str(DEPLOY / "alerts.py"))


def upgrade(stack: Stack, say: Callable[[str], None]) -> None:
    """Bring MLflow's tables up to this version's; the Prefect server does so with its own.

    Raises:
        InputError: they cannot be.
    """
    file = stack.home / "versions.json"
    now = {name: version(name) for name in UPGRADED}
    before = json.loads(file.read_text()) if file.exists() else now
    if before != now:
        told = ", ".join(f"{name} {before.get(name)} -> {now[name]}" for name in UPGRADED)
        say(f"upgrading the databases: {told}")
        environment = {"MLFLOW_BACKEND_STORE_URI": stack.database("mlflow")}
        command(stack, "-c", UPGRADE_MLFLOW, environment=environment)
    file.write_text(json.dumps(now))


def prefect_command(stack: Stack, *arguments: str) -> None:
    """Run Prefect's command line against the stack.

    Raises:
        InputError: it failed.
    """
    command(stack, "-m", "prefect", "--no-prompt", *arguments)


def command(stack: Stack, *arguments: str, environment: Mapping[str, str] | None = None) -> str:
    """Run Python with the stack's environment, of which secrets are a part and arguments none;
    gives what it prints.

    Raises:
        InputError: it failed.
    """
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **stack.client, **(environment or {})},
        cwd=stack.home, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        log = stack.home / "logs" / "commands.log"
        said = done.stdout + done.stderr
        with log.open("a") as file:
            file.write(said)
        raise InputError(
            f"`python {' '.join(arguments)[:100]}` failed ({last_words(said.splitlines())}); "
            f"see {log}"
        )
    return done.stdout


@contextmanager
def temporary_or(home: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or one that goes away again."""
    if home is not None:
        yield home.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="foldstack-") as folder:
        Path(folder).chmod(0o711)  # Postgres's user passes through
        yield Path(folder)


def add_ports(parser: argparse.ArgumentParser) -> None:
    """An option for each port that is to be fixed."""
    for name in PARTS:
        told = "default: that of the last start, else a free one"
        parser.add_argument(f"--{name}_port", type=int, metavar="PORT", help=told)


def ports_of(arguments: argparse.Namespace) -> dict[str, int | None]:
    return {name: getattr(arguments, f"{name}_port") for name in PARTS}


def run_as_client(home: Path | None, words: Sequence[str]) -> int | str:
    """Exit code of a command that knows of the stack; the programs beside this Python come first.

    A sentence where there is no stack, or no such program.
    """
    if home is None or not (home / "secrets.json").exists():
        return f"local_stack: --run needs the --home of a stack, and {home} is none"
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = os.environ | stack_in(home.resolve()).client | {"PATH": programs}
    if (program := shutil.which(words[0], path=programs)) is None:
        return f"local_stack: there is no program {words[0]}"
    return subprocess.run([program, *words[1:]], env=environment).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--home", type=Path, help="where files are; by default a temporary folder")
    add_ports(parser)
    told = "start nothing; run a command with the addresses and passwords of the stack in --home"
    parser.add_argument("--run", nargs=argparse.REMAINDER, metavar="COMMAND", help=told)
    arguments = parser.parse_args()
    if arguments.run:
        sys.exit(run_as_client(arguments.home, arguments.run))
    say = partial(print, flush=True)
    try:
        with (
            ending_on_signals(),
            temporary_or(arguments.home) as home,
            up(stack_in(home, ports_of(arguments)), say) as parts,
        ):
            say(f"files and logs are in {home}; Ctrl-C stops everything")
            parts.watch()
    except InputError as error:
        sys.exit(f"local_stack: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
