"""Save the local stack, running or not, into a folder, and restore it on an empty home.

    python deploy/backup.py save --home DIR --to FOLDER
    python deploy/backup.py restore --home EMPTY --from FOLDER

The folder holds a dump of both databases, the secrets, and a copy of the results and of MLflow's
files; saved again, only what is new is copied. The databases are dumped first, so that what they
speak of is there. The folder is as secret as the stack itself: it is readable by its owner only.
"""

import argparse
import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from stack import DATABASES, OWNER, Stack, binary, initialise, make_databases, postgres, stack_in

from foldstack.compression.errors import InputError
from foldstack.flows.cli.claims import claimed
from foldstack.flows.cli.processes import answers, last_words, running
from foldstack.tasks.store.leases import living_holder

FOLDERS = ("results", "mlartifacts")
FILES = ("secrets.json", "ports.json", "versions.json")
USERS = "mlflow-users.db"
PASSING = ("tmp", "leases", "damaged")
"""Folders of a store that mean nothing to another time."""
DONE = "backup.json"
"""Written last: without it a backup was cut off."""


def save(home: Path, to: Path) -> dict[str, float | int | str]:
    """Bring the backup in `to` up to date; gives figures about it.

    Raises:
        InputError: there is no stack in `home`, or Postgres does not hand its databases out.
    """
    if not (home / "secrets.json").exists():
        raise InputError(f"there is no local stack in {home}: it holds no secrets.json")
    started = time.monotonic()
    to.mkdir(parents=True, exist_ok=True, mode=0o700)
    stack = stack_in(home)
    (to / DONE).unlink(missing_ok=True)
    with database_server(stack):
        for name in DATABASES:
            _dump(stack, name, to / f"{name}.dump")
    if (home / USERS).exists():
        _copy_sqlite(home / USERS, to / USERS)
    for name in FILES:
        if (home / name).exists():
            shutil.copy2(home / name, to / name)
    copied = sum(_mirror(home / name, to / name) for name in FOLDERS)
    about: dict[str, float | int | str] = {
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "copied_bytes": copied,
        "seconds": time.monotonic() - started,
        **{name: version(name) for name in ("foldstack", "prefect", "mlflow")},
    }
    written = to / f".{DONE}"
    written.write_text(json.dumps(about, indent=1))
    written.replace(to / DONE)
    return about


def restore(home: Path, source: Path) -> dict[str, float | int | str]:
    """Make the stack in an empty `home` what it was; gives the figures of the backup.

    Raises:
        InputError: the backup is not whole, something is in `home`, or Postgres refuses.
    """
    if not (source / DONE).exists():
        raise InputError(f"{source} is no whole backup: it holds no {DONE}")
    if home.exists() and any(home.iterdir()):
        raise InputError(f"{home} must be empty: a restore overwrites nothing")
    home.mkdir(parents=True, exist_ok=True)
    home.chmod(0o711)  # Postgres's user passes through
    about: dict[str, float | int | str] = json.loads((source / DONE).read_text())
    for name in (*FILES, USERS):
        if (source / name).exists():
            shutil.copy2(source / name, home / name)
    for name in FOLDERS:
        _mirror(source / name, home / name)
    stack = stack_in(home)
    with claimed(home / "stack", "the local stack", print):
        initialise(stack)
        with running(postgres(stack), home / "logs"):
            asyncio.run(make_databases(stack))
            for name in DATABASES:
                _load(stack, name, source / f"{name}.dump")
    return about


@contextmanager
def database_server(stack: Stack) -> Iterator[None]:
    """Postgres, as it runs, or for this time only.

    Raises:
        InputError: the stack runs and its Postgres does not answer, or it does not start.
    """
    server = postgres(stack)
    if living_holder(stack.home / "stack" / "lease") is None:
        with (
            claimed(stack.home / "stack", "the local stack", print),
            running(server, stack.home / "logs"),
        ):
            yield
        return
    if not answers(server.health):
        raise InputError(f"the stack in {stack.home} runs, and its Postgres does not answer")
    yield


def _dump(stack: Stack, name: str, file: Path) -> None:
    written = file.with_suffix(".unfinished")
    _postgres(stack, "pg_dump", "--format=custom", f"--file={written}", f"--dbname={name}")
    written.chmod(0o600)
    written.replace(file)


def _load(stack: Stack, name: str, file: Path) -> None:
    arguments = ("--exit-on-error", "--no-owner", "--clean", "--if-exists", f"--dbname={name}")
    _postgres(stack, "pg_restore", *arguments, str(file))


def _postgres(stack: Stack, program: str, *arguments: str) -> None:
    """Run a program of Postgres's against the stack; the password goes by its environment.

    Raises:
        InputError: it failed.
    """
    address = ("--host=127.0.0.1", f"--port={stack.ports['postgres']}", f"--username={OWNER}")
    done = subprocess.run(
        [binary(program), *address, *arguments],
        env={**os.environ, "PGPASSWORD": stack.secrets["postgres"]},
        cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode != 0:
        raise InputError(f"{program} failed ({last_words(done.stderr.splitlines())})")


def _copy_sqlite(source: Path, to: Path) -> None:
    """A copy of one moment, whoever writes meanwhile."""
    written = to.with_suffix(".unfinished")
    written.unlink(missing_ok=True)
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(written)) as new:
        old.backup(new)
    written.replace(to)


def _mirror(source: Path, to: Path) -> int:
    """Copy what is new or changed, file by file and each of them whole; gives the bytes.

    What is gone from the source goes here too: else a collected store would grow here for ever.
    """
    copied = 0
    wanted = set()
    for folder, folders, names in os.walk(source):
        place = to / Path(folder).relative_to(source)
        place.mkdir(parents=True, exist_ok=True)
        if Path(folder).name == "store":
            folders[:] = [name for name in folders if name not in PASSING]
        wanted.add(place)
        for name in [*names, *(each for each in folders if (Path(folder) / each).is_symlink())]:
            wanted.add(place / name)
            copied += _copy_changed(Path(folder) / name, place / name)
    for folder, folders, names in os.walk(to, topdown=False):
        for name in (*names, *folders):
            path = Path(folder) / name
            if path in wanted:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    return copied


def _copy_changed(source: Path, to: Path) -> int:
    try:
        if source.is_symlink():
            if not to.is_symlink() or os.readlink(to) != os.readlink(source):
                to.unlink(missing_ok=True)
                to.symlink_to(os.readlink(source))
            return 0
        status = source.stat()
        if to.exists():
            there = to.stat()
            if (there.st_size, there.st_mtime_ns) == (status.st_size, status.st_mtime_ns):
                return 0
        written = to.with_name(f".{to.name}.unfinished")
        shutil.copy2(source, written)
        written.replace(to)
    except FileNotFoundError:  # the stack runs, and removed it meanwhile
        return 0
    return status.st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    for name, place in (("save", "--to"), ("restore", "--from")):
        action = actions.add_parser(name)
        action.add_argument("--home", type=Path, required=True, help="of the local stack")
        action.add_argument(place, type=Path, required=True, dest="folder", help="the backup")
        action.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    do = {"save": save, "restore": restore}[arguments.action]
    try:
        about = do(arguments.home.resolve(), arguments.folder.resolve())
    except InputError as error:
        sys.exit(f"backup: {error}")
    if arguments.json:
        print(json.dumps(about))
    elif arguments.action == "save":
        print(f"saved to {arguments.folder}: {about['copied_bytes'] / 2**20:.1f} MiB were new")
    else:
        print(f"restored as it was on {about['made']}; start it with local_stack.py")


if __name__ == "__main__":
    main()
