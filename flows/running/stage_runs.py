"""The task runs of one sweep: submitted with what they wait for, and what became of each."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, as_completed
from prefect.tasks import Task

from foldstack.compression.errors import InputError
from foldstack.flows.running.branches import Branch, Layout
from foldstack.flows.running.engines import Engine
from foldstack.flows.running.progress import Display
from foldstack.tasks.environment.home import disk_full, is_disk_full
from foldstack.tasks.environment.redaction import redacted
from foldstack.tasks.running.prefect_cache import stage_task
from foldstack.tasks.stage import Stage
from foldstack.tasks.store.artifacts import Artifact

Future = PrefectFuture[Artifact]
WORKERS_DIED = "every worker that ran it died, perhaps for want of memory"


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    kind: Literal["done", "cached", "failed", "skipped"]
    artifact: Artifact | None = None
    cause: str = ""
    """Why it failed, in one line."""
    is_input_error: bool = False
    """True when that is a mistake of the user's."""


class StageRuns:
    """Submits stages as Prefect tasks, each once, and collects their outcomes."""

    def __init__(
        self,
        layout: Layout,
        display: Display,
        engine: Engine,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """`limits` has the seconds after which a stage is ended, by fingerprint."""
        self.layout = layout
        self._limits = limits or {}
        self.outcomes: dict[str, Outcome] = {}
        """By the stage's fingerprint."""
        self._display = display
        self._engine = engine
        self._tasks: dict[str, Task[..., Artifact]] = {}
        self._futures: dict[str, Future] = {}
        self._labels: dict[str, str] = {}
        display.begin(layout.config.title, len(layout.stages))

    @property
    def num_cached(self) -> int:
        return sum(outcome.kind == "cached" for outcome in self.outcomes.values())

    def artifact(self, stage: Stage) -> Artifact | None:
        """What the stage made, if it did."""
        outcome = self.outcomes.get(stage.fingerprint)
        return outcome.artifact if outcome else None

    def submit(self, stage: Stage) -> Future:
        """Have the stage run once its inputs are there."""
        fingerprint = stage.fingerprint
        if fingerprint in self._futures:
            return self._futures[fingerprint]
        if stage.stage not in self._tasks:
            name = stage.stage.replace("_", " ")
            self._tasks[stage.stage] = stage_task(name, self.layout.store)
        inputs = [reference.rpartition("/")[2] for reference in stage.inputs()]
        self._labels[fingerprint] = stage.label
        self._futures[fingerprint] = self._engine.runner.submit(
            self._tasks[stage.stage],
            {
                "stage": stage,
                "store_root": self.layout.store.root,
                "report": self._engine.report,
                "store_url": self.layout.store.url,
                "limit_seconds": self._limits.get(fingerprint),
            },
            wait_for=[self._futures[name] for name in inputs if name in self._futures],
        )
        return self._futures[fingerprint]

    def require(self, stages: Iterable[Stage]) -> None:
        """Run these and wait for them: without them there is nothing to do.

        Raises:
            InputError: one of them failed for a mistake of the user's.
        """
        for stage in stages:
            self.submit(stage)
        for stage in stages:
            self._note(stage.fingerprint, self.submit(stage))
            outcome = self.outcomes[stage.fingerprint]
            if outcome.is_input_error:
                raise InputError(outcome.cause)

    def run_alone(self, stages: Iterable[Stage]) -> None:
        """Run these one after the other, before anything else is submitted."""
        for stage in stages:
            self._note(stage.fingerprint, self.submit(stage))

    def collect_branches(self) -> Iterator[Branch]:
        """Wait for everything submitted; gives each branch as soon as all it waits for is over."""
        fingerprints = {
            future: name for name, future in self._futures.items() if name not in self.outcomes
        }
        waiting = list(self.layout.branches)
        for future in as_completed(list(fingerprints)):
            self._note(fingerprints[future], future)
            for branch in [branch for branch in waiting if self._is_over(branch)]:
                waiting.remove(branch)
                yield branch

    def run_speeds(self) -> None:
        """Run the speed stages one after the other, where there is a model to measure."""
        for branch in self.layout.branches:
            for stage in branch.speeds:
                references = {reference.rpartition("/")[2] for reference in stage.inputs()}
                missing = [
                    name
                    for name in references
                    if name in self.outcomes and self.outcomes[name].artifact is None
                ]
                if missing:
                    self._finish(stage.fingerprint, stage.label, Outcome("skipped"))
                else:
                    self._note(stage.fingerprint, self.submit(stage))

    def _is_over(self, branch: Branch) -> bool:
        timed = {stage.fingerprint for stage in branch.speeds}
        awaited = {stage.fingerprint for stage in branch.stages.values()} - timed
        return all(fingerprint in self.outcomes for fingerprint in awaited)

    def _note(self, fingerprint: str, future: Future) -> None:
        future.wait()  # also a future that is over does not know its own state before
        self._finish(fingerprint, self._labels[fingerprint], outcome_of(future.state))

    def _finish(self, fingerprint: str, label: str, outcome: Outcome) -> None:
        self.outcomes[fingerprint] = outcome
        seconds = 0.0
        if outcome.kind == "done" and outcome.artifact is not None:
            seconds = outcome.artifact.manifest().seconds
        said = f"failed: {outcome.cause}" if outcome.kind == "failed" else outcome.kind
        self._display.finished(label, said, seconds)


def outcome_of(state: State[Any]) -> Outcome:
    """What the final state of a task run says."""
    if state.is_completed():
        kind: Literal["cached", "done"] = "cached" if state.name == "Cached" else "done"
        return Outcome(kind, artifact=state.result())
    if state.name == "NotReady" or state.is_pending():  # of Dask's no worker began it
        return Outcome("skipped")
    if not state.is_final():
        return Outcome("failed", cause=WORKERS_DIED)
    error = state.result(raise_on_failure=False)
    said = str(error if isinstance(error, BaseException) else state.message or "")
    lines = redacted(said).splitlines()
    first = lines[0] if lines else type(error).__name__
    if isinstance(error, InputError):
        return Outcome("failed", cause=first, is_input_error=True)
    if isinstance(error, Exception) and is_disk_full(error):  # when Prefect kept the result
        first = disk_full(getattr(error, "filename", None) or "the store")
        return Outcome("failed", cause=first, is_input_error=True)
    return Outcome("failed", cause=f"{type(error).__name__}: {first}")
