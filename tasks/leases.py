"""Leases: one process at a time makes an artifact, on whatever machine, and a dead one loses it.

    <folder>/7        held, by whom the file says; its holder touches it every BEAT_SECONDS
    <folder>/7.free   given back

A folder has the leases of one artifact, numbered; only the highest counts, and who creates the
next number holds it. To create a file that is not there yet is atomic on local disks and on NFS
alike, where the kernel's locks may not reach the other machines. A lease may be taken over when its
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


class Lease:
    """The right to make one artifact, kept alive by a thread until it is released."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._released = threading.Event()
        threading.Thread(target=self._beat, name=f"lease {file}", daemon=True).start()

    @classmethod
    def take(cls, folder: Path) -> "Lease":
        """The next lease of the folder.

        Raises:
            Held: somebody else has it.
            OSError: the folder cannot be written to.
        """
        while True:
            number, is_free = _latest(folder)
            if number and not is_free:
                holder = living_holder(folder)
                if holder is not None:
                    raise Held(holder)
            file = folder / str(number + 1)
            if not _create(file):
                continue
            if _latest(folder) == (number + 1, False):
                _remove_below(folder, number + 1)
                return cls(file)
            file.unlink(missing_ok=True)  # what we had read was old: this number was used before

    def is_lost(self) -> bool:
        """True when somebody took it over."""
        return not self._file.exists()

    def release(self) -> None:
        """Give it back: the next one need not wait."""
        self._released.set()
        with suppress(FileNotFoundError):  # it was taken over
            self._file.rename(self._file.with_name(self._file.name + FREE))

    def discard(self) -> None:
        """Give it back for good, with its folder: its artifact is not wanted any more."""
        self._released.set()
        with suppress(OSError):
            self._file.unlink()
            self._file.parent.rmdir()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._file)


@contextmanager
def leased(folder: Path, on_wait: Callable[[str], None]) -> Iterator[Lease]:
    """Hold the folder's lease; `on_wait` is told again and again who has it until then."""
    pause, longest = POLL_SECONDS
    while True:
        try:
            lease = Lease.take(folder)
            break
        except Held as held:
            on_wait(str(held))
        time.sleep(pause)
        pause = min(2 * pause, longest)
    try:
        yield lease
    finally:
        lease.release()


def living_holder(folder: Path) -> str | None:
    """Who holds the folder's lease, "host:pid"; None when it is free or may be taken over."""
    number, is_free = _latest(folder)
    if is_free:
        return None
    file = folder / str(number)
    try:
        text, beat = file.read_text(encoding="utf-8"), file.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):  # it is being written; if its maker died of that, time tells
        return None if _is_stale(folder, beat) else "another process"
    return None if holder.is_dead() or _is_stale(folder, beat) else str(holder)


def _latest(folder: Path) -> tuple[int, bool]:
    """The highest number, and whether it was given back; 0 where there is none yet."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0, True
    numbers = [(int(n.removesuffix(FREE)), n) for n in names if n.removesuffix(FREE).isdigit()]
    if not numbers:
        return 0, True
    highest, name = max(numbers)  # "7.free" sorts after "7": a copy that was left counts as free
    return highest, name.endswith(FREE)


def _create(file: Path) -> bool:
    """Make the lease with our name in it; False when somebody else was first."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        stream = file.open("x", encoding="utf-8")
    except (FileExistsError, FileNotFoundError):  # the latter: `discard` removed the folder
        return False
    try:
        with stream:
            json.dump(asdict(Holder.this_process()), stream)
    except OSError:
        file.unlink(missing_ok=True)
        raise
    return True


def _remove_below(folder: Path, number: int) -> None:
    for name in os.listdir(folder):
        stem = name.removesuffix(FREE)
        if stem.isdigit() and int(stem) < number:
            (folder / name).unlink(missing_ok=True)


def _is_stale(folder: Path, beat: float) -> bool:
    """Compares with the clock that dates the beats: the file system's, which may be a server's."""
    with tempfile.TemporaryFile(dir=folder) as probe:
        return os.fstat(probe.fileno()).st_mtime - beat > STALE_SECONDS


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
