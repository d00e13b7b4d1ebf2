"""Stages as Prefect tasks: a task run is Cached exactly when the store holds the artifact.

Prefect finds a cached result as a file in its result storage. Ours is <store>/records, the key of
a stage is its fingerprint, and while the key is computed the record is brought in line with the
store: written when the artifact is there, whoever made it, and removed when it is not, or damaged.
So the answer is the store's, also from another process, another server or another database.
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import CachePolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.filesystems import LocalFileSystem
from prefect.results import ResultStore
from prefect.serializers import JSONSerializer

from foldstack.tasks.environment.redaction import hide_in_logs, without_secrets
from foldstack.tasks.running.messages import ProcessDied
from foldstack.tasks.running.worker_pool import time_limit
from foldstack.tasks.stage import Stage, run_stage
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore

logger = logging.getLogger(__name__)

Report = Callable[[Stage, str, int, int], None]
"""Told of a running stage what it does, how much is done, and how much there is."""

SECONDS_BETWEEN_UPDATES = 10.0
RETRY_SECONDS = (5.0, 30.0)
"""Before each next try of a stage whose process died."""


@dataclass
class StoreHoldsArtifact(CachePolicy):
    """Cache policy of tasks that take `stage` and `store_root`: hit where the store hits."""

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str:
        stage: Stage = inputs["stage"]
        store = ArtifactStore(inputs["store_root"], inputs.get("store_url", ""))
        fingerprint = stage.fingerprint
        key = f"{stage.stage}/{fingerprint}.json"
        artifact = store.find(stage.stage, fingerprint)
        if artifact is None:
            (records_folder(store) / key).unlink(missing_ok=True)
        else:
            _write_record(store, key, artifact)
        return key


def records_folder(store: ArtifactStore) -> Path:
    return store.root / "records"


def _write_record(store: ArtifactStore, key: str, artifact: Artifact) -> None:
    """Let Prefect find the artifact; in a store that is read-only, the task looks by itself."""
    file = records_folder(store) / key
    storage = LocalFileSystem(basepath=str(records_folder(store)))
    results = ResultStore(result_storage=storage, serializer=JSONSerializer())
    record = results.create_result_record(artifact, key=key).serialize()
    with suppress(OSError):
        if file.exists() and file.read_bytes() == record:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_name(f".{file.name}.{os.getpid()}")
        written.write_bytes(record)
        written.replace(file)


def died_without_its_own_fault(task: Any, task_run: Any, state: State[Any]) -> bool:
    """Whether a stage that failed is worth another try: its process was ended from outside."""
    return isinstance(state.result(raise_on_failure=False), ProcessDied | MemoryError)


@task(
    cache_policy=StoreHoldsArtifact(),
    persist_result=True,
    result_serializer="json",
    task_run_name="{stage.label}",
    retries=len(RETRY_SECONDS),
    retry_delay_seconds=list(RETRY_SECONDS),
    retry_condition_fn=died_without_its_own_fault,
)
def _stage_in_prefect(
    stage: Stage,
    store_root: Path,
    report: Report | None = None,
    store_url: str = "",
    limit_seconds: float | None = None,
) -> Artifact:
    hide_in_logs()  # also in a worker of Dask's
    context = TaskRunContext.get()
    before = context.task_run.run_count - 1 if context else 0
    progress = _Progress(stage, report)
    with without_secrets(), limited(limit_seconds), progress:
        store = ArtifactStore(store_root, store_url)
        return run_stage(stage.in_smaller_batches(before), store, progress)


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Inside, a stage that takes longer is ended."""
    token = time_limit.set(seconds)
    try:
        yield
    finally:
        time_limit.reset(token)


def is_deployed() -> bool:
    """Whether the flow run around us is one of a deployment, or a part of such a one.

    The process of a deployment's run is told its id; a flow that this one calls has a run of its
    own, which knows no deployment. (`prefect.runtime` asks the server where the answer is no.)
    """
    return bool(os.environ.get("PREFECT__FLOW_RUN_ID"))


def stage_task(name: str, store: ArtifactStore, **options: Any) -> Task[..., Artifact]:
    """The thin Prefect task of one kind of stage: `stage_task("compress", store)`.

    Its runs are called by the stage's label. Submit it with the stages it waits for, as a stage
    knows its inputs before they are made and so Prefect cannot see them:

        compress.submit(stage=stage, store_root=store.root, wait_for=[ranking])

    Args:
        name: what Prefect calls the task.
        store: where the stages that it runs find and put their artifacts.
        options: more options of Prefect tasks, e.g. tags.
    """
    tags = set(options.pop("tags", ()))
    if is_deployed():
        # By which an operator may limit a kind. Prefect asks for each tag's limit before each run,
        # over a connection of its own per tag: half of what a task costs where nobody limits any.
        tags.add(name)
    return _stage_in_prefect.with_options(
        name=name, result_storage=records_folder(store), tags=tags, **options
    )


class _Progress:
    """Passes progress on: at once to `report`, now and then to Prefect's page of the task run.

    What it shows there ends at 100 %, or goes when the stage fails: a bar that stands still for
    ever says nothing that is true.
    """

    def __init__(self, stage: Stage, report: Report | None) -> None:
        self.stage = stage
        self.report = report
        # A short stage is over before the first update, and asks nothing of the server.
        self.last_update = time.monotonic()
        self.artifact: Any = None

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.artifact is not None:
            self._try(self._complete if kind is None else self._remove)

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.report is not None:
            self.report(self.stage, what, done, total)
        moment = time.monotonic()
        if moment - self.last_update < SECONDS_BETWEEN_UPDATES:
            return
        self.last_update = moment
        logger.info("%s: %s, %d of %d", self.stage.label, what, done, total)
        self._try(lambda: self._show(what, 100.0 * done / max(total, 1)))

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # a server that is away must not stop hours of work
            logger.debug("no progress on the Prefect page: %s", error)

    def _show(self, what: str, percent: float) -> None:
        if self.artifact is None:
            key = re.sub(r"[^a-z0-9]+", "-", self.stage.label.lower()).strip("-")
            description = f"{self.stage.label}: {what}"
            self.artifact = create_progress_artifact(percent, key=key, description=description)
        else:
            update_progress_artifact(artifact_id=self.artifact, progress=percent)

    def _complete(self) -> None:
        update_progress_artifact(
            artifact_id=self.artifact, progress=100.0, description=self.stage.label
        )

    def _remove(self) -> None:
        with get_client(sync_client=True) as client:
            client.delete_artifact(self.artifact)
