"""What a process that computes a stage tells the one that waits for it, and how it ends."""

import logging
import os
import pickle
import signal
import threading
import time
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from foldstack.tasks.environment.redaction import hide_in_logs
from foldstack.tasks.environment.unheard import outlive_readers
from foldstack.tasks.stage import Progress

SECONDS_BETWEEN_REPORTS = 0.2
PACKAGE_LOGGER = logging.getLogger("foldstack")


class ProcessDied(RuntimeError):
    """A stage's process was ended from outside: by the system for want of memory, by a person, or
    because it took too long. The stage itself may be in order, so it is worth another try.
    """


def how_it_ended(code: int | None) -> str:
    """An exit code for a person."""
    reason = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    hint = ", perhaps for want of memory" if code == -signal.SIGKILL else ""
    return f"ended with {reason}{hint}"


def end_with(parent: int) -> None:
    """End this process when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def portable(error: Exception) -> Exception:
    """The error as it can be sent, with the place where it happened in a note."""
    trace = "".join(traceback.format_exception(error))
    try:
        copy: Exception = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"In the worker process:\n{trace}")
    return copy


def passed_on(kind: str, content: Any, progress: Progress) -> bool:
    """Whether a message told how the work gets on, or was logged; it is said here then.

    Raises:
        Exception: the one that the message holds.
    """
    match kind:
        case "progress":
            progress(*content)
        case "log":
            name, level, message = content
            logging.getLogger(name).log(level, "%s", message)
        case "error":
            raise content
        case _:
            return False
    return True


def begun(connection: Connection, parent: int, level: int) -> "Sender":
    """Make this process one that computes for another, and ends with it; by the sender it tells."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends us
    threading.Thread(target=end_with, args=[parent], daemon=True).start()
    outlive_readers()
    tqdm.set_lock(threading.RLock())  # its own lock is a semaphore that a killed process leaves
    hide_in_logs()
    sender = Sender(connection)
    PACKAGE_LOGGER.setLevel(level)
    PACKAGE_LOGGER.addHandler(LogSender(sender))
    return sender


class Sender:
    """To the process that waits, from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._last_report = 0.0

    def send(self, kind: str, content: Any) -> None:
        with self._lock:
            self._connection.send((kind, content))

    def progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last_report < SECONDS_BETWEEN_REPORTS:
            return
        self._last_report = now
        self.send("progress", (what, done, total))


class LogSender(logging.Handler):
    """What is logged here is logged there."""

    def __init__(self, sender: Sender) -> None:
        super().__init__()
        self._sender = sender

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            self._sender.send("log", (record.name, record.levelno, record.getMessage()))
