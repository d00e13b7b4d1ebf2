"""How MLflow is told, and when: whole records, in the background, nothing twice.

A run is brought up to its `RunRecord`: what is missing is added, what is there stays. So logging
the same record twice changes nothing, a run that was cut off is completed by the next sweep, and a
record that is known to be complete costs no MLflow call at all (its receipt lies in the results
folder). Logging happens on one background thread; a server that is away costs a warning.
"""

import importlib
import json
import logging
import os
import queue
import re
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from foldstack.tasks.environment.redaction import redacted
from foldstack.tasks.tracking import logged_models, mlflow_pages
from foldstack.tasks.tracking.logged_models import FINGERPRINT_TAG
from foldstack.tasks.tracking.receipts import Receipts
from foldstack.tasks.tracking.registry import name_best
from foldstack.tasks.tracking.run_record import PREFIX, DatasetUse, RunRecord
from foldstack.tasks.tracking.tracking_database import follow_home, make_database

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

T = TypeVar("T")

# MLflow's own limits; it cuts a longer value silently, so that we cut it visibly.
ITEMS_PER_BATCH = 100
METRICS_PER_BATCH = 1000
PARAM_CHARACTERS = 6000
TAG_CHARACTERS = 8000
DIGEST_CHARACTERS = 36
PARENT_TAG = "mlflow.parentRunId"
REACHABLE_SECONDS = 3.0
SLOWEST_BYTES_PER_SECOND = 1 << 20
"""At which a file of weights is still waited for."""


class Tracker:
    """Writes records to one experiment of one tracking server, on a thread of its own."""

    def __init__(
        self, uri: str, experiment: str, folder: Path, artifact_location: Path | None = None
    ) -> None:
        self.uri = uri
        self.experiment = experiment
        self.run_ids: dict[str, str] = {}
        """Run id by fingerprint, of everything that is known to be logged."""
        self.warnings: list[str] = []
        self._artifact_location = artifact_location
        self._receipts = Receipts(folder, uri, experiment)
        self._queue: queue.SimpleQueue[RunRecord | _Best | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._num_steps = 0  # that the thread has done, for whoever waits for it
        self._more_patience = 0.0  # for the file that is sent just now
        self._shown: set[str] = set()  # sweeps that have their view
        self._client: MlflowClient | None = None
        self._experiment_id: str | None = self._receipts.experiment_id

    def log(self, record: RunRecord) -> None:
        """Have `record` written soon; returns at once, and never raises."""
        run_id = self._receipts.run_id(record)
        if run_id is not None:
            self.run_ids[record.fingerprint] = run_id
            return
        self._enqueue(record)

    def register_best(
        self,
        model: str,
        record: RunRecord,
        alias: str,
        description: str,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Have the model of `record` named the best version of the registered `model`."""
        self._enqueue(_Best(model, record.fingerprint, alias, description, dict(tags or {})))

    @property
    def is_busy(self) -> bool:
        """True when there was something to write since the last `finish`."""
        return self._thread is not None

    def finish(self, patience_seconds: float = 60.0) -> None:
        """Wait until everything is written, or until nothing was for so long."""
        if self._thread is None:
            return
        self._queue.put(None)
        while self._thread.is_alive():
            before, patience = self._num_steps, patience_seconds + self._more_patience
            self._thread.join(patience)
            if self._thread.is_alive() and self._num_steps == before:
                self._warn(f"MLflow at {self.uri} did not answer within {patience:.0f} s")
                break
        self._thread = None

    def pages(self, sweep: str) -> dict[str, str]:
        """Addresses of MLflow's pages that show a sweep's runs, once some are logged."""
        if not self.run_ids or self._experiment_id is None:
            return {}
        return mlflow_pages.pages(self.uri, self._experiment_id, sweep)

    def _enqueue(self, item: "RunRecord | _Best") -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()
        self._queue.put(item)

    def _work(self) -> None:
        """Write what is queued. After a failure the rest is left for the next sweep: a server that
        is away would cost its time-out for every single record.
        """
        while (item := self._queue.get()) is not None:
            if self.warnings:
                continue
            try:
                with impatient_mlflow():
                    self._write(item)
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                self._warn(f"MLflow at {self.uri} could not be written: {reason[0][:300]}")
            self._num_steps += 1

    def _warn(self, sentence: str) -> None:
        sentence = redacted(sentence)
        sentence += "; nothing computed is lost, and the next run logs what is missing"
        self.warnings.append(sentence)
        log.warning("%s", sentence)

    def _write(self, item: "RunRecord | _Best") -> None:
        if self._client is None:
            check_reachable(self.uri)
            importlib.import_module("mlflow")  # seconds, and on a busy machine many
            self._num_steps += 1
            self._client, self._experiment_id = open_experiment(
                self.uri, self.experiment, self._artifact_location
            )
            self._client.set_experiment_tag(self._experiment_id, *mlflow_pages.view_tag())
        assert self._experiment_id is not None
        if isinstance(item, _Best):
            if item.fingerprint in self.run_ids:
                name_best(
                    self._client,
                    item.model,
                    item.alias,
                    self.run_ids[item.fingerprint],
                    item.description,
                    item.tags,
                )
            return
        if item.sweep and item.sweep not in self._shown:
            view = mlflow_pages.view_tag(item.sweep)
            self._client.set_experiment_tag(self._experiment_id, *view)
            self._shown.add(item.sweep)
        run_id = bring_up_to(
            self._client,
            self._experiment_id,
            item,
            self._about_to_send,
            parent_id=self.run_ids.get(item.parent),
        )
        self._more_patience = 0.0
        self.run_ids[item.fingerprint] = run_id
        if item.status != "RUNNING":
            self._receipts.add(item, run_id, self._experiment_id)

    def _about_to_send(self, size_bytes: int) -> None:
        self._more_patience = size_bytes / SLOWEST_BYTES_PER_SECOND
        self._num_steps += 1


@dataclass(frozen=True)
class _Best:
    model: str
    fingerprint: str
    alias: str
    description: str
    tags: Mapping[str, str]


def check_reachable(uri: str) -> None:
    """Raise OSError within seconds when nothing listens at an http address."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname or "localhost", port), REACHABLE_SECONDS):
        pass


@contextmanager
def impatient_mlflow() -> Iterator[None]:
    """MLflow retries for minutes by default; what the user set stays."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    yield


def open_experiment(
    uri: str, name: str, artifact_location: Path | None
) -> "tuple[MlflowClient, str]":
    """A client of the server at `uri`, and the id of the experiment, made if it is new."""
    # Its first use of a database reports every migration as INFO.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    make_database(uri)
    if artifact_location is not None:
        follow_home(uri, artifact_location.parent)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    found = client.get_experiment_by_name(name)
    if found is None:
        location = (
            None if uri.startswith("http") or artifact_location is None else artifact_location
        )
        try:
            return client, client.create_experiment(
                name, artifact_location=location.resolve().as_uri() if location else None
            )
        except MlflowException:  # somebody made it in the meantime
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return client, found.experiment_id


def bring_up_to(
    client: "MlflowClient",
    experiment_id: str,
    record: RunRecord,
    about_to_send: Callable[[int], None] = lambda _: None,
    *,
    parent_id: str | None = None,
) -> str:
    """Find or make the run of `record` and add what it lacks; return its id.

    Args:
        client: of the server.
        experiment_id: where the run is, or is made.
        record: what is to be known of it.
        about_to_send: told the size in bytes of each file of weights before it is sent.
        parent_id: the run below which MLflow shows this one, unless it is below another already.
    """
    run = find_run(client, experiment_id, record.fingerprint)
    if run is None:
        tags = {FINGERPRINT_TAG: record.fingerprint}
        started = None if record.started is None else int(record.started * 1000)
        run = client.create_run(experiment_id, started, tags, record.name)
    run_id = str(run.info.run_id)
    model_id = None
    if record.model is not None:
        model_id = logged_models.log_model(client, experiment_id, run_id, record, about_to_send)
    _add_values(client, run, record, model_id)
    if parent_id is not None and PARENT_TAG not in run.data.tags:
        client.set_tag(run_id, PARENT_TAG, parent_id)
    if record.datasets and not (run.inputs and run.inputs.dataset_inputs):
        _add_datasets(client, run_id, record.datasets)
    for place, path in record.files.items():
        folder, _, _ = place.rpartition("/")
        if path.is_dir():
            client.log_artifacts(run_id, str(path), place)
        elif path.exists():
            client.log_artifact(run_id, str(path), folder or None)
    for place, text in record.texts.items():
        client.log_text(run_id, text, place)
    for place, table in record.tables.items():
        columns = table() if callable(table) else table
        if any(columns.values()):
            _log_table(client, run_id, columns, place)
    if record.status != "RUNNING":
        ended = None
        if record.seconds is not None:  # what it took to compute, not to log
            ended = run.info.start_time + int(record.seconds * 1000)
        client.set_terminated(run_id, record.status, ended)
    return run_id


def _log_table(
    client: "MlflowClient", run_id: str, columns: Mapping[str, Sequence[object]], place: str
) -> None:
    """Log a table in place of the one that is there: MLflow would add its rows to that one's."""
    values = {head: list(column) for head, column in columns.items()}
    folder = place.rpartition("/")[0] or None
    if all(file.path != place for file in client.list_artifacts(run_id, folder)):
        client.log_table(run_id, values, place)
        return
    import pandas

    frame = pandas.DataFrame(values)
    client.log_text(run_id, frame.to_json(orient="split", index=False, date_format="iso"), place)


def find_run(client: "MlflowClient", experiment_id: str, fingerprint: str) -> "Run | None":
    """The run that carries this fingerprint, if there is one."""
    found = client.search_runs(
        [experiment_id], filter_string=f"tags.`{FINGERPRINT_TAG}` = '{fingerprint}'", max_results=1
    )
    return found[0] if found else None


def _add_values(
    client: "MlflowClient", run: "Run", record: RunRecord, model_id: str | None
) -> None:
    from mlflow.entities import Metric, Param, RunTag

    run_id, now = run.info.run_id, int(time.time() * 1000)
    params = [
        Param(_name(key), _cut(str(value), PARAM_CHARACTERS))
        for key, value in record.params.items()
        if _name(key) not in run.data.params
    ]
    curves = {key: points for key, points in record.series.items() if points}
    curves |= {key: [(0, value)] for key, value in record.metrics.items()}
    metrics = [
        Metric(_name(key), float(value), now, step, model_id=model_id)
        for key, points in curves.items()
        if _name(key) not in run.data.metrics
        for step, value in points
    ]
    metrics += [
        Metric(f"system/{_name(key)}", value, int(1000 * moment), step)
        for key, points in record.system.items()
        if f"system/{_name(key)}" not in run.data.metrics
        for step, (moment, value) in enumerate(points)
    ]
    wanted = {**record.tags, **record.links}
    if record.sweep:
        sweeps = set(run.data.tags.get(PREFIX + "sweeps", "").split()) | {record.sweep}
        wanted[PREFIX + "sweeps"] = " ".join(sorted(sweeps))
    tags = [RunTag(key, _cut(str(value), TAG_CHARACTERS)) for key, value in wanted.items()]
    for some_params in _batches(params, ITEMS_PER_BATCH):
        client.log_batch(run_id, params=some_params)
    for some_tags in _batches(tags, ITEMS_PER_BATCH):
        client.log_batch(run_id, tags=some_tags)
    for some_metrics in _batches(metrics, METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=some_metrics)


def _add_datasets(client: "MlflowClient", run_id: str, datasets: Sequence[DatasetUse]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    client.log_inputs(
        run_id,
        [
            DatasetInput(
                Dataset(
                    name=use.name,
                    digest=use.digest[:DIGEST_CHARACTERS],
                    source_type=use.source_type,
                    source=json.dumps(dict(use.origin) or {"uri": use.source}),
                    profile=json.dumps(dict(use.profile)),
                ),
                [InputTag(MLFLOW_DATASET_CONTEXT, use.context)],
            )
            for use in datasets
        ],
    )


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _name(key: str) -> str:
    """`key` with what MLflow does not allow in a name replaced."""
    return re.sub(r"[^\w\-./ :]", "_", key)[:250]


def _cut(value: str, limit: int) -> str:
    return value if len(value) <= limit else value[: limit - 20] + " ... (cut, see files)"
