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

SECONDS_BETWEEN_REPORTS = 0.2


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
