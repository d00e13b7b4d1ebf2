"""Stages compute in processes of their own: several at once, and none disturbs another.

Threads of one process would share torch's random numbers, Accelerate's and lm-eval's state, and
Python's lock. A worker process keeps its imports from stage to stage; it is started when the first
stage has to run, so that a run which finds everything in the store starts none. It ends with the
process that started it, however that ends.
"""

import multiprocessing
import os
import pickle
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from foldstack.tasks.environment.inherited import own_environment
from foldstack.tasks.running.messages import (
    PACKAGE_LOGGER,
    ProcessDied,
    begun,
    how_it_ended,
    passed_on,
    portable,
)
from foldstack.tasks.running.usage import sampled
from foldstack.tasks.stage import Progress, Stage
from foldstack.tasks.store.manifest import Facts

SECONDS_TO_LEAVE = 5.0


time_limit: ContextVar[float | None] = ContextVar("time_limit", default=None)
"""Seconds after which a stage that is begun in this context is ended."""


class ComputedStage(Stage):
    """A stage whose work is done by a worker process where there is a pool, else right here."""

    def produce(self, folder: Path, work: Path, progress: Progress) -> Facts:
        if _pool is None:
            return self.compute(folder, work, progress)
        return _pool.run(self, folder, work, progress)

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        """What `produce` promises."""
        raise NotImplementedError


class WorkerPool:
    """Worker processes, as many as there are stages running at once."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._all: list[_Worker] = []
        self._lock = threading.Lock()
        self._is_told_to_end = False

    def run(self, stage: ComputedStage, folder: Path, work: Path, progress: Progress) -> Facts:
        """The facts that `stage` computes in a worker process.

        Raises:
            ProcessDied: the process was killed, for example for want of memory, or took too long.
            Exception: whatever the stage raises.
        """
        if self._is_told_to_end:
            raise RuntimeError(f"{stage.label}: the run was told to end")
        worker = self._idle_or_new()
        try:
            with sampled(worker.pid, stage.fingerprint):
                facts = worker.run(stage, folder, work, progress)
        except _WorkerDied as death:
            with self._lock:
                if worker in self._all:
                    self._all.remove(worker)
            if self._is_told_to_end:  # not worth another try
                raise RuntimeError(f"{stage.label}: the run was told to end") from None
            raise ProcessDied(f"{stage.label}: {death}") from None
        except BaseException:
            self._rest(worker)
            raise
        self._rest(worker)
        return facts

    def _idle_or_new(self) -> "_Worker":
        with self._lock:
            while self._idle:
                worker = self._idle.pop()
                if worker.is_alive():
                    return worker
                self._all.remove(worker)  # killed while it had nothing to do: nothing is lost
            worker = _Worker()
            self._all.append(worker)
            return worker

    def close(self) -> None:
        """Let every process end; one that still computes is killed."""
        with self._lock:
            workers, self._all, self._idle = self._all, [], []
        for worker in workers:
            worker.dismiss()
        for worker in workers:
            worker.end(SECONDS_TO_LEAVE)

    def kill(self) -> None:
        """End every process, whatever it is doing; nothing is tried again, and nothing begun."""
        self._is_told_to_end = True
        for worker in list(self._all):
            worker.end(0)

    def _rest(self, worker: "_Worker") -> None:
        with self._lock:
            if worker in self._all:
                self._idle.append(worker)


_pool: WorkerPool | None = None


@contextmanager
def worker_processes() -> Iterator[WorkerPool]:
    """Inside, stages compute in processes of their own."""
    global _pool
    before, pool = _pool, WorkerPool()
    _pool = pool
    try:
        yield pool
    finally:
        _pool = before
        pool.close()


def end_workers() -> None:
    """Kill the processes of the pool in use, if there is one."""
    if _pool is not None:
        _pool.kill()


class _WorkerDied(Exception):
    pass


class _Worker:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, os.getpid(), PACKAGE_LOGGER.getEffectiveLevel())
        self._process: BaseProcess = context.Process(
            target=_serve, args=arguments, name="foldstack-worker", daemon=True
        )
        self._process.start()
        theirs.close()

    def run(self, stage: ComputedStage, folder: Path, work: Path, progress: Progress) -> Facts:
        try:
            self._connection.send_bytes(pickle.dumps((stage, folder, work)))
            limit = time_limit.get()
            deadline = None if limit is None else time.monotonic() + limit
            while True:
                self._wait_until(deadline, limit)
                kind, content = self._connection.recv()
                if not passed_on(kind, content, progress):
                    facts: Facts = content
                    return facts
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(5)
            raise _WorkerDied(f"its process {how_it_ended(self._process.exitcode)}") from None

    def _wait_until(self, deadline: float | None, limit: float | None) -> None:
        """Return when something has come; ends the process at the deadline."""
        if deadline is None:
            return
        if not self._connection.poll(max(0.0, deadline - time.monotonic())):
            self.end(0)
            raise _WorkerDied(f"it was ended, as it took longer than {limit:.0f} s")

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def dismiss(self) -> None:
        """Tell the process that nothing comes any more."""
        self._connection.close()

    def end(self, seconds: float) -> None:
        """Wait so long for the process to end by itself, then kill it."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(SECONDS_TO_LEAVE)


def _serve(connection: Connection, parent: int, level: int) -> None:
    """The life of a worker process: compute what comes, until nobody is there any more."""
    sender = begun(connection, parent, level)
    own_environment()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            message = connection.recv_bytes()
            try:
                stage, folder, work = pickle.loads(message)
                with _temporary_files_in(work / "temporary"):
                    facts = stage.compute(folder, work, sender.progress)
            except Exception as error:
                sender.send("error", portable(error))
            else:
                sender.send("facts", facts)


@contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """What a killed stage leaves of its temporary files goes with its work, and not never."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = None
        os.environ.pop("TMPDIR")
        if before is not None:
            os.environ["TMPDIR"] = before
