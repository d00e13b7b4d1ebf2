"""What the processes of long stages take of the machine, sampled while they compute.

It is no part of what a stage makes: the same stage takes something else on the next machine.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Thread

import psutil  # type: ignore[import-untyped]

SECONDS_BETWEEN_SAMPLES = 10.0


@dataclass(frozen=True)
class Sample:
    """One look at a process and what it started."""

    moment: float
    """Seconds since 1970."""
    memory_bytes: int
    """Resident; pages that several of them share are counted once for each."""
    cpu_percent: float
    """Since the look before: 100 is one core."""


_samples: dict[str, list[Sample]] = {}


def samples_of(fingerprint: str) -> list[Sample]:
    """Those of a stage that this process had computed; none of one that was over before the first
    look, or came from the store."""
    return list(_samples.get(fingerprint, ()))


@contextmanager
def sampled(pid: int | None, fingerprint: str) -> Iterator[None]:
    """Inside, the process is looked at now and then for this stage."""
    over = Event()
    if pid is not None:
        Thread(target=_look, args=[pid, fingerprint, over], name="usage", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _look(pid: int, fingerprint: str, over: Event) -> None:
    before = _cpu_seconds(pid), time.monotonic()
    while not over.wait(SECONDS_BETWEEN_SAMPLES):
        now = _cpu_seconds(pid), time.monotonic()
        memory = _memory(pid)
        if memory:
            # What a child took is lost when it ends: never less than nothing.
            percent = 100 * max(0.0, now[0] - before[0]) / (now[1] - before[1])
            sample = Sample(time.time(), memory, percent)
            _samples.setdefault(fingerprint, []).append(sample)
        before = now


def _family(pid: int) -> list[psutil.Process]:
    with suppress(psutil.Error):
        leader = psutil.Process(pid)
        return [leader, *leader.children(recursive=True)]
    return []


def _cpu_seconds(pid: int) -> float:
    seconds = 0.0
    for process in _family(pid):
        with suppress(psutil.Error):
            times = process.cpu_times()
            seconds += times.user + times.system
    return seconds


def _memory(pid: int) -> int:
    total = 0
    for process in _family(pid):
        with suppress(psutil.Error):
            total += int(process.memory_info().rss)
    return total
