"""One group of servers per folder: who holds it is said, and what a killed one left is ended."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from foldstack.compression.errors import InputError
from foldstack.flows.cli.processes import Parts, end_families
from foldstack.tasks.store.leases import Held, Lease

PARTS_FILE = "parts.json"


@contextmanager
def claimed(folder: Path, what: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Hold the folder for one group of servers; gives the file in which they are noted.

    What a group that was killed has left running is ended first.

    Raises:
        InputError: another process holds the folder; says where its servers are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / PARTS_FILE
    try:
        lease = Lease.take(folder / "lease")
    except Held as holder:
        pages = ", ".join(f"{name} {part['page']}" for name, part in _noted(file).items())
        raise InputError(
            f"{what} runs already for {folder.parent} (process {str(holder).rpartition(':')[2]}): "
            f"{pages or 'it is just starting'}; stop it first, or choose another --home"
        ) from None
    try:
        if ended := _end_leftovers(file):
            say(f"ended what was left of one that was killed: {', '.join(ended)}")
        yield file
    finally:
        file.unlink(missing_ok=True)
        lease.discard()


def note(file: Path, parts: Parts) -> None:
    """Write down which processes there are now, for whoever finds them without their parent."""
    noted = {
        part.server.name: {"pid": part.pid, "created": _created(part.pid), "page": part.server.page}
        for part in parts.running
    }
    written = file.with_suffix(f".{os.getpid()}.tmp")
    written.write_text(json.dumps(noted, indent=1))
    written.replace(file)


def _noted(file: Path) -> dict[str, dict[str, str | int | float]]:
    try:
        noted: dict[str, dict[str, str | int | float]] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return noted


def _end_leftovers(file: Path) -> list[str]:
    """End the process groups that are noted and still there; gives their names."""
    left = {
        name: int(part["pid"])
        for name, part in reversed(_noted(file).items())
        # Otherwise it is gone, or another process has its number by now.
        if _created(int(part["pid"])) == part["created"]
    }
    end_families(left.values())
    return list(left)


def _created(pid: int) -> float:
    """When the process began; 0 where there is none."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return 0.0
