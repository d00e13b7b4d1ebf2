"""What stages run on: processes of this machine, or the workers of a Dask scheduler.

Dask's workers are processes that somebody started, on whatever machines, one stage at a time each:

    dask worker tcp://SCHEDULER:8786 --nthreads 1 --preload foldstack.flows.prefect_defaults

When one dies its stage runs anew on another one, and what was finished is found in the store.
"""

import foldstack.flows.prefect_defaults  # noqa: F401 (before Prefect)

# isort: split

import asyncio
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from prefect.settings import get_current_settings
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner

from foldstack.compression.errors import InputError
from foldstack.flows.running.dask_scheduler import (
    ANSWER_SECONDS,
    START_A_WORKER,
    connected,
    explained,
    workers_of,
)
from foldstack.flows.running.prefect_server import deliver_what_waits
from foldstack.flows.running.progress import Display
from foldstack.tasks.running.messages import SECONDS_BETWEEN_REPORTS
from foldstack.tasks.running.prefect_cache import Report
from foldstack.tasks.running.worker_pool import end_workers
from foldstack.tasks.stage import Stage

if TYPE_CHECKING:
    from foldstack.flows.running.branches import Layout


@dataclass(frozen=True)
class Engine:
    """Where tasks are submitted to, and how they tell of their progress."""

    runner: TaskRunner[Any]
    report: Report


@contextmanager
def engine_for(layout: "Layout", display: Display) -> Iterator[Engine]:
    """Inside, the stages of `layout` can be submitted.

    Raises:
        InputError: the Dask scheduler or one of its workers cannot be used.
    """

    if layout.config.execution.engine == "processes":
        runner: ThreadPoolTaskRunner[Any] = ThreadPoolTaskRunner(max_workers=layout.workers)
        with runner, _stages_ending_with_the_flow(display) as report:
            yield Engine(runner, report)
        return
    with _dask_runner(layout.config.execution.address) as dask:
        topic = f"foldstack-{uuid.uuid4().hex[:8]}"
        dask.client.subscribe_topic(topic, lambda event: display.report(*event[1]))
        yield Engine(dask, _ByScheduler(topic))
        with suppress(
            Exception
        ):  # the server may end with us: what workers have to say comes first
            dask.client.run(_deliver, on_error="ignore")


@contextmanager
def _stages_ending_with_the_flow(display: Display) -> Iterator[Report]:
    """Gives a report by which stages end as well when the flow is interrupted from outside.

    The runner waits for every stage that has begun, which may be hours, and Prefect's SIGTERM only
    raises TerminationSignal in the flow. So what computes is killed, and what waits for another
    process, which reports every second, is stopped there.
    """
    interrupted = Event()

    def report(stage: Stage, what: str, done: int, total: int) -> None:
        if interrupted.is_set():
            raise RuntimeError(f"{stage.label}: the flow run was told to end")
        display.report(stage.label, what, done, total)

    try:
        yield report
    except Exception:
        raise
    except BaseException:
        interrupted.set()
        end_workers()
        raise


async def _deliver() -> None:
    """Runs on a worker, in its event loop, where Prefect's own delivery cannot wait."""
    await asyncio.to_thread(deliver_what_waits)


@dataclass
class _ByScheduler:
    """Tells of progress from a worker, by way of the scheduler."""

    topic: str
    _last: dict[str, float] = field(default_factory=dict)

    def __call__(self, stage: Stage, what: str, done: int, total: int) -> None:
        from distributed import get_worker

        now = time.monotonic()
        if done < total and now - self._last.get(what, 0.0) < SECONDS_BETWEEN_REPORTS:
            return
        self._last[what] = now
        get_worker().log_event(self.topic, [stage.label, what, done, total])


def check_dask_workers(layout: "Layout") -> None:
    """Refuse workers that would compute something else, or could not share what they compute.

    Raises:
        InputError: the scheduler does not answer, or a worker cannot be used.
    """
    address = layout.config.execution.address
    stages = {stage.stage: stage for stage in layout.stages}
    expected = {stage.fingerprint: stage for stage in stages.values()}
    home = layout.config.output.home.expanduser().resolve()
    probe = home / f".probe-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    with connected(address) as client:
        for worker, about in workers_of(client, address).items():
            if about["nthreads"] != 1:
                raise InputError(
                    f"a Dask worker must run one stage at a time, and {worker} runs "
                    f"{about['nthreads']}; start it as `{START_A_WORKER.format(address)}`"
                )
        probe.touch()
        try:
            _ask(client, _objection, expected, {"output.home": probe, "model": layout.model.folder})
        finally:
            probe.unlink()


def _objection(expected: Mapping[str, Stage], places: Mapping[str, Path]) -> str:
    """Runs on a worker: why that cannot be used; empty when it can."""
    for name, place in places.items():
        if not place.exists():
            where = place.parent if place.name.startswith(".probe") else place
            return f"does not see {name}, {where}: it must be on a file system that all share"
    for fingerprint, stage in expected.items():
        if stage.fingerprint != fingerprint:
            return (
                "has another version of foldstack or of its libraries than this process: install "
                "the same ones, and start the worker again"
            )
    return ""


def _cannot_reach(url: str) -> str:
    """Runs on a worker: the same about the Prefect server."""
    with suppress(urllib.error.HTTPError):  # somebody answers
        try:
            urllib.request.urlopen(f"{url}/health", timeout=ANSWER_SECONDS).close()
        except urllib.error.URLError as error:
            return (
                f"does not reach the Prefect server at {url} ({error.reason}): set PREFECT_API_URL "
                "to one that every worker reaches"
            )
    return ""


def _ask(client: Any, question: Any, *arguments: Any) -> None:
    """Raises InputError when a worker answers with more than an empty string."""
    for worker, answer in client.run(question, *arguments, on_error="return").items():
        if isinstance(answer, Exception):
            raise InputError(
                f"the Dask worker {worker} cannot run foldstack ({type(answer).__name__}: {answer})"
                "; install the same version there, and start the worker again"
            )
        if answer:
            raise InputError(f"the Dask worker {worker} {answer}")


@contextmanager
def _dask_runner(address: str) -> Iterator[Any]:
    with explained(address):
        from prefect_dask import DaskTaskRunner

        runner = DaskTaskRunner(address=address, client_kwargs={"timeout": ANSWER_SECONDS})
    with runner:
        with explained(address):
            client = runner.client
        _ask(client, _cannot_reach, str(get_current_settings().api.url))
        yield runner
