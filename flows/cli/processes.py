"""Processes that serve: started, logged, watched over, started again when they die, and ended.

Nothing is left behind: a guardian, a process of its own that does nothing else, ends them all when
the one that started them is gone, also by kill -9. Their logs are appended to and rotated, so that
what was said before a crash is still there after it.
"""

import logging
import logging.handlers
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from foldstack.compression.errors import InputError

START_SECONDS = 180.0
STOP_SECONDS = 10.0
LOG_BYTES = 16 << 20
LOG_FILES = 5
REMEMBERED_LINES = 200
REASON_CHARACTERS = 800
BACK_OFF_SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0)
"""Between the end of a part and its next start, the more often it ended of late."""
CALM_SECONDS = 600.0
"""A part that ran for so long begins to count anew."""
ENDINGS = 8
"""After so many in a row nobody believes any more that it will start."""


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
    port_option: str = ""
    """By which the command line takes another port."""

    def log(self, logs: Path) -> Path:
        return logs / f"{self.name.lower()}.log"


class Running:
    """A server's process group, with its log; `end` ends all of it."""

    def __init__(self, server: Server, logs: Path, guardian: "Guardian | None" = None) -> None:
        self.server = server
        self.log = server.log(logs)
        self._guardian = guardian
        self._said: deque[str] = deque(maxlen=REMEMBERED_LINES)
        self._started = time.monotonic()
        self.is_up = False
        """True once it has answered."""
        logs.mkdir(parents=True, exist_ok=True)
        self.process = subprocess.Popen(
            server.command,
            env={**server.defaults, **os.environ, **server.settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            user=server.user,
            start_new_session=True,  # Ctrl-C is for us; we end them in order
        )
        if guardian is not None:
            guardian.look_after(self.process.pid)
        self._reader = threading.Thread(target=self._keep_log, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None

    @property
    def is_late(self) -> bool:
        """True when it should have answered by now, and never did."""
        return not self.is_up and time.monotonic() - self._started > START_SECONDS

    @property
    def was_calm(self) -> bool:
        """True when it has been there for long."""
        return self.is_up and time.monotonic() - self._started > CALM_SECONDS

    def look(self) -> bool:
        """Whether it answers."""
        self.is_up = not self.has_ended and answers(self.server.health)
        return self.is_up

    def wait_until_it_answers(self) -> None:
        """Return as soon as it does.

        Raises:
            InputError: it ends instead, or is too slow.
        """
        while not self.is_late:
            if self.has_ended:
                raise InputError(self.ending)
            if self.look():
                return
            time.sleep(0.2)
        raise InputError(
            f"{self.server.name} did not answer at {self.server.health} within "
            f"{START_SECONDS:.0f} s; see {self.log}"
        )

    @property
    def ending(self) -> str:
        """The sentence for a server that ended by itself."""
        self._reader.join(1.0)  # what it said last is still on its way
        said = last_words(list(self._said)) or "it said nothing"
        code = self.process.returncode
        how = signal.Signals(-code).name if code < 0 else f"code {code}"
        return f"{self.server.name} ended with {how} ({said}); see {self.log}"

    def kill(self) -> None:
        """End it at once, as a machine would that fails."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """End it and all that it started: first asked to, then made to.

        Flow runs have process groups of their own, and would outlive the worker that started them.
        """
        end_families([self.pid])
        with suppress(ProcessLookupError):  # its children, where it died before us
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()
        if self._guardian is not None:
            self._guardian.forget(self.pid)

    def _keep_log(self) -> None:
        """Runs in a thread: from the process into its file, which is rotated."""
        assert self.process.stdout is not None
        kept = logging.handlers.RotatingFileHandler(
            self.log, maxBytes=LOG_BYTES, backupCount=LOG_FILES, encoding="utf-8", delay=True
        )
        with self.process.stdout as said:
            for line in said:
                text = line.decode(errors="replace").rstrip("\n")
                self._said.append(text)
                with suppress(OSError, ValueError):  # a full disk ends no server
                    kept.emit(logging.makeLogRecord({"msg": text.replace("%", "%%")}))
        kept.close()


def last_words(lines: Sequence[str]) -> str:
    """Why a program ended, from the last lines that it wrote: whole, in one line.

    A traceback's last line with what belongs to it, else the last paragraph.
    """
    text = "\n".join(lines).rstrip()
    errors = list(re.finditer(r"^\S*(?:Error|Exception|Exit|FATAL)\b.*", text, re.MULTILINE))
    paragraph = re.split(r"\n\s*\n", text)[-1]
    chosen = text[errors[-1].start() :] if errors else paragraph
    said = " ".join(chosen.split())
    return said if len(said) <= REASON_CHARACTERS else "... " + said[-REASON_CHARACTERS:]


def answers(address: str) -> bool:
    """Whether somebody is there: at an http address one who says that all is well."""
    parts = urllib.parse.urlsplit(address)
    try:
        if parts.scheme == "tcp":
            socket.create_connection((parts.hostname, parts.port), timeout=5).close()
        else:
            urllib.request.urlopen(address, timeout=5).close()
    except (OSError, urllib.error.URLError, ValueError):
        return False
    return True


def check_free(server: Server) -> None:
    """Refuse a port that somebody listens on: what answers there would be taken for ours.

    Raises:
        InputError: it is taken, with who has it where that can be seen.
    """
    parts = urllib.parse.urlsplit(server.health)
    assert parts.port is not None
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", parts.port))
    except OSError as error:
        other = f"; choose another with {server.port_option}" if server.port_option else ""
        raise InputError(
            f"{server.name} cannot listen on port {parts.port}: {_holder(parts.port) or error}"
            f"{other}"
        ) from None


def _holder(port: int) -> str:
    """Who listens on a port, as far as this user may see it."""
    import psutil  # type: ignore[import-untyped]

    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections(kind="tcp"):
            is_it = connection.laddr and connection.laddr.port == port
            if is_it and connection.status == psutil.CONN_LISTEN and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f"process {connection.pid} does already ({command[:120]})"
    return ""


def end_families(leaders: Iterable[int]) -> None:
    """End processes with everything that they started, and wait until they are gone."""
    import psutil

    family = []
    for pid in leaders:
        with suppress(psutil.Error):
            leader = psutil.Process(pid)
            family += [leader, *leader.children(recursive=True)]
    for process in family:
        with suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(family, timeout=STOP_SECONDS)
    for process in alive:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_SECONDS)


class Guardian:
    """A process that ends others as soon as this one is gone, however that went."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is not for it
        )

    def look_after(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def dismiss(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def guard() -> None:
    """Be a guardian: read until the pipe's other end is closed, which the kernel sees to."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as long as the other one is there
    leaders: set[int] = set()
    for line in sys.stdin:
        (leaders.add if line[0] == "+" else leaders.discard)(int(line[1:]))
    end_families(leaders)


@contextmanager
def running(server: Server, logs: Path) -> Iterator[Running]:
    """The server while it is needed: it answers at the beginning and is gone at the end.

    Raises:
        InputError: its port is taken, or it ends instead of answering.
    """
    with Parts(logs) as parts:
        parts.add(server)
        yield parts.running[0]


class Parts:
    """Servers that need each other, in the order in which they were started."""

    def __init__(
        self,
        logs: Path,
        say: Callable[[str], None] = lambda _: None,
        changed: "Callable[[Parts], None]" = lambda _: None,
    ) -> None:
        """`say` is told what happens to them, `changed` whenever one was started."""
        self.logs = logs
        self.running: list[Running] = []
        self._say = say
        self._changed = changed
        self._endings: dict[str, int] = {}
        """In a row, by the server's name."""
        self._due: dict[str, float] = {}
        """When what ended is started again."""
        self._guardian = Guardian()

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *error: object) -> None:
        for part in reversed(self.running):
            part.end()
        self.running.clear()
        self._guardian.dismiss()

    def start(self, server: Server) -> Running:
        """Start it without waiting.

        Raises:
            InputError: its port is taken.
        """
        check_free(server)
        self.running.append(Running(server, self.logs, self._guardian))
        self._changed(self)
        return self.running[-1]

    def add(self, server: Server) -> None:
        """Start it, and wait for it; it is ended before those that were there first.

        Raises:
            InputError: its port is taken, or it ends instead of answering.
        """
        self.start(server).wait_until_it_answers()

    def watch(self) -> None:
        """Return never: what dies is started again, soon and then ever more slowly.

        Raises:
            InputError: a part does not come back, however often it is started.
        """
        while True:
            self.look_once()
            time.sleep(0.5)

    def look_once(self) -> None:
        """Do for each part what there is to do just now; waits for none of them."""
        for part in list(self.running):
            name = part.server.name
            if name in self._due:
                if time.monotonic() >= self._due[name]:
                    del self._due[name]
                    self._start_again(part)
            elif part.has_ended:
                self._note_ending(part)
            elif part.is_late:
                part.kill()  # neither dead nor alive: the next look finds it ended
            elif not part.is_up and part.look():
                self._say(f"{name} answers again")

    def kill(self, name: str) -> None:
        """End one at once, as a machine would that fails."""
        self._named(name).kill()

    def restart(self, name: str) -> None:
        """Start one again that has ended, and wait for it.

        Raises:
            InputError: it does not come back, however often it is started.
        """
        while not ((part := self._named(name)).is_up and not part.has_ended):
            self.look_once()
            time.sleep(0.1)

    def _note_ending(self, part: Running) -> None:
        name = part.server.name
        number = 1 if part.was_calm else self._endings.get(name, 0) + 1
        self._endings[name] = number
        if number > ENDINGS:
            raise InputError(f"{part.ending}; it ended {number} times in a row")
        seconds = BACK_OFF_SECONDS[min(number, len(BACK_OFF_SECONDS)) - 1]
        self._due[name] = time.monotonic() + seconds
        self._say(f"{part.ending}; it is started again in {seconds:.0f} s")

    def _start_again(self, part: Running) -> None:
        part.end()  # of its children, those that are left: Postgres would refuse to start
        again = Running(part.server, self.logs, self._guardian)
        self.running[self.running.index(part)] = again
        self._changed(self)

    def _named(self, name: str) -> Running:
        return next(part for part in self.running if part.server.name == name)


if __name__ == "__main__":
    guard()
