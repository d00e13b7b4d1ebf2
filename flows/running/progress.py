"""What a person sees in the terminal while a sweep runs."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 60.0
NO_SCREEN = 120
"""Characters in a line where there is no screen, and no COLUMNS that says how many."""


class Display(Protocol):
    """Told what happens; may be told by several threads at once."""

    def begin(self, title: str, num_stages: int) -> None: ...
    def report(self, label: str, what: str, done: int, total: int) -> None: ...
    def finished(self, label: str, outcome: str, seconds: float) -> None: ...
    def say(self, sentence: str) -> None: ...


class Silent:
    """For callers that are not a terminal."""

    def begin(self, title: str, num_stages: int) -> None: ...
    def report(self, label: str, what: str, done: int, total: int) -> None: ...
    def finished(self, label: str, outcome: str, seconds: float) -> None: ...
    def say(self, sentence: str) -> None: ...


@dataclass
class _Pace:
    """Since when a stage does what it does, how far it was then, and when that was last told."""

    what: str
    since: float
    done_then: int
    told_at: float

    def seconds_left(self, now: float, done: int, total: int) -> float | None:
        """At the pace so far; None while nothing is known of it."""
        if done <= self.done_then or total <= done:
            return None
        return (now - self.since) * (total - done) / (done - self.done_then)


class Lines:
    """One line per event, and one a minute for a stage that takes longer, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._paces: dict[str, _Pace] = {}
        self._num_done = self._num_stages = 0

    def begin(self, title: str, num_stages: int) -> None:
        self._num_stages = num_stages
        self._print(f"{title}: {num_stages} stages")

    def report(self, label: str, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        with self._lock:
            pace = self._paces.setdefault(label, _Pace(what, now, done, now))
            if pace.what != what or done < pace.done_then:
                pace.what, pace.since, pace.done_then = what, now, done
            if now - pace.told_at < SECONDS_BETWEEN_LINES:
                return
            pace.told_at = now
            left = pace.seconds_left(now, done, total)
        place = f" {done}/{total}" if total else ""
        until = "" if left is None else f", about {_duration(left)} left"
        self._print(f"        {label}: {what}{place}{until}")

    def finished(self, label: str, outcome: str, seconds: float) -> None:
        with self._lock:
            self._num_done += 1
            self._paces.pop(label, None)
            width = len(str(self._num_stages))
            place = f"[{self._num_done:>{width}}/{self._num_stages}]"
        took = f" {seconds:.1f} s" if seconds >= 0.05 and outcome != "cached" else ""
        self._print(f"{place} {label}: {outcome}{took}")

    def say(self, sentence: str) -> None:
        self._print(sentence)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bars:
    """A bar for the sweep and one for each running stage, with the time that is left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._running: dict[str, TaskID] = {}
        self._whole: TaskID | None = None

    def __enter__(self) -> "Bars":
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def begin(self, title: str, num_stages: int) -> None:
        self._whole = self._progress.add_task(f"[bold]{title}", total=num_stages)

    def report(self, label: str, what: str, done: int, total: int) -> None:
        text = f"  {label}: {what}"
        with self._lock:
            if label not in self._running:
                self._running[label] = self._progress.add_task(text, total=total or None)
        self._progress.update(
            self._running[label], description=text, completed=done, total=total or None
        )

    def finished(self, label: str, outcome: str, seconds: float) -> None:
        with self._lock:
            task = self._running.pop(label, None)
        if task is not None:
            self._progress.remove_task(task)
        if self._whole is not None:
            self._progress.advance(self._whole)
        if outcome != "cached":
            self.say(f"{label}: {outcome} {seconds:.1f} s")

    def say(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, highlight=False)


@contextmanager
def display_on(console: Console) -> Iterator[Display]:
    """Bars on a terminal, lines elsewhere."""
    if console.is_terminal:
        with Bars(console) as bars:
            yield bars
    else:
        yield Lines(console)


def console_on(stream: TextIO) -> Console:
    """A console as wide as the screen, or where there is none as COLUMNS says."""
    if stream.isatty():
        return Console(file=stream)
    said = os.environ.get("COLUMNS", "")
    return Console(file=stream, width=int(said) if said.isdigit() and int(said) else NO_SCREEN)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
