"""Leases: one process at a time makes an artifact, on whatever machine, and a dead one loses it.

    <folder>/7        held, by whom the file says; its holder touches it every BEAT_SECONDS
    <folder>/7.free   given back

A folder has the leases of one artifact, numbered; only the highest counts, and who creates the
next number holds it. To create a file that is not there yet is atomic on local disks and on NFS
alike, where the kernel's locks may not reach the other machines, and so it is on object storage
(object_leases.py). A lease may be taken over when its
holder's process is dead (seen at once on the same machine), or did not touch it for STALE_SECONDS.
A holder that was only paused then works for nothing, but does no harm: when it comes to publish,
it finds what its successor made.
"""

import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from foldstack.compression.errors import InputError

BEAT_SECONDS = 10.0
STALE_SECONDS = 90.0  # clients of NFS may see times that are 60 s old
POLL_SECONDS = (0.05, 1.0)
FREE = ".free"


@dataclass(frozen=True)
class Holder:
    """A process that holds a lease."""

    host: str
    pid: int
    machine: str
    """Names one boot of one machine and its space of process numbers; empty where unknown."""
    started: str
    """When the process started, as numbers of processes are used again."""

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(socket.gethostname(), os.getpid(), _machine(), _start_of(os.getpid()))

    def is_dead(self) -> bool:
        """True when that is certain: the process ran on this machine, and is gone."""
        is_here = bool(self.machine) and self.machine == _machine()
        return is_here and _start_of(self.pid) != self.started

    def __str__(self) -> str:
        return f"{self.host}:{self.pid}"


class Held(Exception):
    """Somebody else holds the lease; the text says who."""


class LeaseFiles(Protocol):
    """The leases of one artifact, by name; a name that is gone raises FileNotFoundError."""

    def names(self) -> list[str]:
        """All there are."""

    def create(self, name: str, text: str) -> bool:
        """Make one; False when it is there already: of several who try, one succeeds."""

    def read(self, name: str) -> str:
        """What its maker wrote, or the beginning of it."""

    def is_stale(self, name: str) -> bool:
        """True when it is gone, or was not touched for STALE_SECONDS."""

    def touch(self, name: str) -> None:
        """Note that its holder is alive."""

    def rename(self, name: str, to: str) -> None:
        """Call it otherwise."""

    def remove(self, name: str) -> None:
        """Remove it, if it is there."""

    def remove_empty(self) -> None:
        """Remove the place, if nothing is in it."""


class LeaseFolder:
    """Leases as files in a folder, on a disk that all who want them can write to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        try:
            return os.listdir(self._folder)
        except FileNotFoundError:
            return []

    def create(self, name: str, text: str) -> bool:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / name
        try:
            stream = file.open("x", encoding="utf-8")
        except (FileExistsError, FileNotFoundError):  # the latter: `discard` removed the folder
            return False
        try:
            with stream:
                stream.write(text)
        except OSError:
            file.unlink(missing_ok=True)
            raise
        return True

    def read(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8")

    def is_stale(self, name: str) -> bool:
        """Compares with the clock that dates the beats: the file system's, maybe a server's."""
        try:
            beat = (self._folder / name).stat().st_mtime
        except FileNotFoundError:
            return True
        with tempfile.TemporaryFile(dir=self._folder) as probe:
            return os.fstat(probe.fileno()).st_mtime - beat > STALE_SECONDS

    def touch(self, name: str) -> None:
        os.utime(self._folder / name)

    def rename(self, name: str, to: str) -> None:
        (self._folder / name).rename(self._folder / to)

    def remove(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def remove_empty(self) -> None:
        self._folder.rmdir()


class Lease:
    """The right to make one artifact, kept alive by a thread until it is released."""

    def __init__(self, files: LeaseFiles, number: int) -> None:
        self._files, self._number = files, number
        self._released = threading.Event()
        threading.Thread(target=self._beat, name=f"lease {number}", daemon=True).start()

    @classmethod
    def take(cls, where: "Path | LeaseFiles") -> "Lease":
        """The next lease of the folder.

        Raises:
            Held: somebody else has it.
            OSError: the folder cannot be written to.
        """
        files = _files(where)
        while True:
            number, is_free = _latest(files)
            if number and not is_free:
                holder = living_holder(files)
                if holder is not None:
                    raise Held(holder)
            name = str(number + 1)
            if not files.create(name, json.dumps(asdict(Holder.this_process()))):
                continue
            if _latest(files) == (number + 1, False):
                _remove_below(files, number + 1)
                return cls(files, number + 1)
            files.remove(name)  # what we had read was old: this number was used before

    def is_lost(self) -> bool:
        """True when somebody took it over."""
        return _latest(self._files) != (self._number, False)

    def release(self) -> None:
        """Give it back: the next one need not wait."""
        self._released.set()
        with suppress(FileNotFoundError):  # it was taken over
            self._files.rename(str(self._number), f"{self._number}{FREE}")

    def discard(self) -> None:
        """Give it back for good, with its folder: its artifact is not wanted any more."""
        self._released.set()
        with suppress(OSError):
            self._files.remove(str(self._number))
            self._files.remove_empty()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError, InputError):
                self._files.touch(str(self._number))


@contextmanager
def leased(where: Path | LeaseFiles, on_wait: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the lease there; `on_wait` is told again and again who has it until then."""
    files = _files(where)
    pause, longest = POLL_SECONDS
    while True:
        try:
            lease = Lease.take(files)
            break
        except Held as held:
            on_wait(str(held))
        time.sleep(pause)
        pause = min(2 * pause, longest)
    try:
        yield lease
    finally:
        lease.release()


def living_holder(where: Path | LeaseFiles) -> str | None:
    """Who holds the lease there, "host:pid"; None when it is free or may be taken over."""
    files = _files(where)
    number, is_free = _latest(files)
    if is_free:
        return None
    try:
        text = files.read(str(number))
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):  # it is being written; if its maker died of that, time tells
        return None if files.is_stale(str(number)) else "another process"
    return None if holder.is_dead() or files.is_stale(str(number)) else str(holder)


def _files(where: Path | LeaseFiles) -> LeaseFiles:
    return LeaseFolder(where) if isinstance(where, Path) else where


def _latest(files: LeaseFiles) -> tuple[int, bool]:
    """The highest number, and whether it was given back; 0 where there is none yet."""
    names = [n for n in files.names() if n.removesuffix(FREE).isdigit()]
    numbers = [(int(n.removesuffix(FREE)), n) for n in names]
    if not numbers:
        return 0, True
    highest, name = max(numbers)  # "7.free" sorts after "7": a copy that was left counts as free
    return highest, name.endswith(FREE)


def _remove_below(files: LeaseFiles, number: int) -> None:
    for name in files.names():
        stem = name.removesuffix(FREE)
        if stem.isdigit() and int(stem) < number:
            files.remove(name)


@lru_cache(maxsize=1)
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> str:
    """When the process started, in ticks since boot; empty when there is none (or no /proc)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    state, ticks = fields[0], fields[19]
    return "" if state in "ZX" else ticks
