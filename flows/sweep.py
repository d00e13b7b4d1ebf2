"""The Prefect flow: one model, methods times sparsities times seeds, one comparison."""

import foldstack.flows.prefect_defaults  # noqa: F401 (before Prefect)

# isort: split

import base64
import logging
import re
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any

from prefect import flow, runtime
from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)
from prefect.states import Completed

from foldstack.compression.errors import InputError
from foldstack.compression.storage.durable import write_whole
from foldstack.flows.comparison import files as result_files
from foldstack.flows.comparison.findings import findings
from foldstack.flows.comparison.report import REPORT, is_drawn, page_key, write_report
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.rows import rivals, row_of
from foldstack.flows.comparison.sweep_log import SweepLog, has_tracking_server
from foldstack.flows.comparison.tables import records
from foldstack.flows.config.run_config import RunConfig, to_yaml
from foldstack.flows.planning.forecast import stage_limits
from foldstack.flows.planning.preflight import check
from foldstack.flows.running.branches import Layout, lay_out
from foldstack.flows.running.engines import Engine, engine_for
from foldstack.flows.running.prefect_server import has_pages, note_flow_run
from foldstack.flows.running.progress import Display, Silent
from foldstack.flows.running.provenance import git_commit
from foldstack.flows.running.stage_runs import StageRuns
from foldstack.tasks import score_variants
from foldstack.tasks.environment.redaction import hide_in_logs, without_secrets
from foldstack.tasks.environment.unheard import outlive_readers
from foldstack.tasks.rank_blocks import PLOT_FILE, load_ranking
from foldstack.tasks.running.messages import PACKAGE_LOGGER
from foldstack.tasks.running.prefect_cache import is_deployed
from foldstack.tasks.running.worker_pool import worker_processes

logger = logging.getLogger(__name__)

SENTENCES_IN_A_LIST = 6
"""Of an answer that stands in a list of many runs."""
SILENT = Silent()
display: ContextVar[Display] = ContextVar("display", default=SILENT)
"""Where progress is shown."""
prepared: ContextVar[Layout | None] = ContextVar("prepared", default=None)
"""A layout that was checked already: the command line does so before it waits for a server."""
on_sigterm: ContextVar[Any] = ContextVar("on_sigterm", default=None)
"""Who hears of SIGTERM while the flow runs; None: Prefect, which then raises an error in it."""


class SweepFailed(RuntimeError):
    """Some models failed; `comparison` has the others."""

    def __init__(self, comparison: Comparison) -> None:
        first = comparison.failed[0]
        super().__init__(
            f"{len(comparison.failed)} of {len(comparison.rows)} models failed, the first is "
            f"{first.label}: {first.cause}"
        )
        self.comparison = comparison


def run_name(beginning: str = "") -> str:
    """What a flow run is called: thirty nights of one sweep are thirty names."""
    config = runtime.flow_run.parameters["config"]
    title = config.title if isinstance(config, RunConfig) else "sweep"
    return dated(beginning, title)


def dated(*words: str) -> str:
    """The words that are there, with when the flow run around us begins, and the commit."""
    moment = runtime.flow_run.scheduled_start_time or datetime.now(UTC)
    told = [*words, moment.strftime("%Y-%m-%d %H:%M"), git_commit()[:7]]
    return " ".join(word for word in told if word)


@flow(name="sweep", flow_run_name=run_name, persist_result=False)
def sweep(config: RunConfig) -> Comparison:
    """Compress, recover, evaluate and compare, as `config` says.

    Raises:
        InputError: something in `config` cannot work; nothing has been computed then.
        SweepFailed: some variants failed; the others are in its comparison.
    """
    if is_deployed() and config.tracking.enabled and not has_tracking_server(config):
        raise InputError(
            "a deployment's run must know its MLflow server, and neither MLFLOW_TRACKING_URI nor "
            "tracking.uri is set: it would log to a file that nobody looks at; set one, or "
            "tracking.enabled=false"
        )
    note_flow_run(str(runtime.flow_run.id))
    hide_in_logs()
    if PACKAGE_LOGGER.level == logging.NOTSET:  # Prefect gives it handlers, but no level
        PACKAGE_LOGGER.setLevel(logging.INFO)
    # Models cannot be loaded in several threads at once; the command line has its own processes.
    if is_deployed():
        outlive_readers()
    workers = worker_processes() if is_deployed() else nullcontext()
    with _sigterm_heard_by_the_caller(), workers, without_secrets():
        return answered(_run(config))


def answered(comparison: Comparison, answer: str = "") -> Comparison:
    """What a flow gives back so that its final state says what was found: Prefect shows that in
    every list of runs. Who calls the flow gets the comparison itself.
    """
    message = answer or " ".join(findings(comparison)[:SENTENCES_IN_A_LIST])
    return Completed(message=message, data=comparison)  # type: ignore[return-value]


@contextmanager
def _sigterm_heard_by_the_caller() -> Iterator[None]:
    handler = on_sigterm.get()  # not in the flow: Dask pickles that, and what it names
    if not callable(handler) or current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(config: RunConfig) -> Comparison:
    started = time.monotonic()
    layout = prepared.get()
    if layout is None or layout.config != config:
        layout = lay_out(config)
        check(layout)
    with engine_for(layout, display.get()) as engine:
        return _run_on(engine, layout, started)


def _run_on(engine: Engine, layout: Layout, started: float) -> Comparison:
    runs = StageRuns(layout, display.get(), engine, stage_limits(layout))
    log = SweepLog(layout, _flow_run_tags())
    runs.require(layout.windows)
    runs.run_alone(layout.times)  # what runs beside would slow them down, and one more than another
    for stage in layout.before_speeds:
        runs.submit(stage)
    for branch in runs.collect_branches():
        log.branch_evaluated(branch, runs)
    _show_ranking(layout, runs)
    log.settle()
    runs.run_speeds()  # alone and one by one: whatever else runs would slow them down
    rows = tuple(row_of(layout, branch, runs.outcomes) for branch in layout.branches)
    comparison = Comparison(
        title=layout.config.title,
        sweep=layout.sweep,
        model=layout.config.model.name,
        rows=rows,
        num_stages=len(layout.stages),
        num_cached=runs.num_cached,
        best_by=layout.config.best_by,
        best_within=layout.config.best_within,
        made_at=datetime.now(UTC).replace(microsecond=0),
    )
    found = rivals(layout, comparison, runs.outcomes)
    comparison = comparison.model_copy(update={"rivals": found})
    return _publish(layout, comparison, runs, log, started)


def run_sweep(layout: Layout, shown_on: Display) -> Comparison:
    """Run the flow on a layout that was checked; SIGTERM stays with whoever hears of it here."""
    tokens = prepared.set(layout), display.set(shown_on)
    heard = on_sigterm.set(signal.getsignal(signal.SIGTERM))
    try:
        return sweep(layout.config)
    finally:
        prepared.reset(tokens[0])
        display.reset(tokens[1])
        on_sigterm.reset(heard)


def _publish(
    layout: Layout, comparison: Comparison, runs: StageRuns, log: SweepLog, started: float
) -> Comparison:
    """Write, show and log the comparison; fail the flow when a variant failed."""
    folder = layout.report_folder
    config = to_yaml(layout.resolved_config)
    stages = (layout.ranking, *layout.scores, layout.branches[0].before)
    key = page_key(comparison, [config, *(stage.fingerprint for stage in stages)])
    drawn = is_drawn(folder, key)  # to draw the same again is half of what a cached run takes
    files = result_files.save(comparison, folder, is_drawn=drawn)
    files[REPORT] = (
        folder / REPORT if drawn else _report(layout, comparison, runs, folder, config, key)
    )
    write_whole(folder / "config.yaml", config)
    links, warnings = log.finish(comparison, runs, {**files, "config.yaml": folder / "config.yaml"})
    comparison = comparison.model_copy(
        update={
            "links": {"report": str(folder), "page": str(files[REPORT]), **links},
            "warnings": (*warnings, *comparison.unread),
            "seconds": time.monotonic() - started,
        }
    )
    result_files.save_texts(comparison, folder)
    _show_comparison(comparison, files)
    _show_links(comparison)
    if comparison.failed:
        raise SweepFailed(comparison)
    return comparison


def _report(
    layout: Layout,
    comparison: Comparison,
    runs: StageRuns,
    folder: Path,
    config: str,
    key: str,
) -> Path:
    ranked = runs.artifact(layout.ranking)
    scored = [found for stage in layout.scores if (found := runs.artifact(stage)) is not None]
    evaluated = runs.artifact(layout.branches[0].before)
    manifest = None if evaluated is None else evaluated.manifest()
    return write_report(
        comparison,
        folder,
        ranking=None if ranked is None else load_ranking(ranked),
        sensitivity=score_variants.load_sensitivity(tuple(scored)),
        config=config,
        origin={} if manifest is None else {"hardware": manifest.hardware, **manifest.versions},
        key=key,
    )


def page_of(what: str, model: str) -> str:
    """Key of a page among Prefect's artifacts. It is the same for all sweeps of a model, so that
    Prefect's history of a page is that of the results.
    """
    return re.sub("[^a-z0-9]+", "-", f"{what}-{Path(model).name}".lower()).strip("-")


def _show_ranking(layout: Layout, runs: StageRuns) -> None:
    """The ranking as a table and a picture on the page of the flow run."""
    ranked = runs.artifact(layout.ranking)
    if ranked is None:
        return
    model = layout.config.model.name
    rows: list[dict[str, Any]] = load_ranking(ranked).table()
    key, told = page_of("ranking", model), f"Scores of the blocks of {layout.model.name}"
    _create(create_table_artifact, table=[_short(row) for row in rows], key=key, description=told)
    pictures = {f"Blocks of {layout.model.name}": ranked.folder / PLOT_FILE}
    for stage in layout.scores:
        scored = runs.artifact(stage)
        if scored is not None and (file := scored.folder / score_variants.PLOT_FILE).is_file():
            pictures[stage.label.capitalize()] = file
    _show_pictures(pictures, f"{key}-plot", told)


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Numbers with as many digits as mean something."""
    return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()}


def _show_comparison(comparison: Comparison, files: dict[str, Any]) -> None:
    found = findings(comparison)
    for sentence in found:
        logger.info("%s", sentence)  # Prefect's page of logs is where many look first
    told = "\n".join(f"- {sentence}" for sentence in found)
    page = f"# {comparison.title}\n\n{result_files.summary(comparison)}"
    key = page_of("sweep-of", comparison.model)
    _create(create_markdown_artifact, markdown=page, key=key, description=told)
    key = page_of("comparison", comparison.model)
    described = f"{comparison.title}\n\n{told}"
    table = records(comparison.frame())
    _create(create_table_artifact, table=table, key=key, description=described)
    if "quality_against_size.png" in files:
        pictures = {"Quality against size": files["quality_against_size.png"]}
        _show_pictures(pictures, f"{key}-plot", described)


def _show_links(comparison: Comparison) -> None:
    """From Prefect's page to MLflow's; the way back is a tag of every MLflow run."""
    for name in ("mlflow runs", "mlflow compare"):
        if page := comparison.links.get(name):
            key = page_of(name, comparison.model)
            _create(create_link_artifact, link=page, link_text=name, key=key)


def _show_pictures(pictures: Mapping[str, Path], key: str, description: str) -> None:
    """As a page with the pictures in it: an image artifact wants an address of a server, and shows
    what it was given as a text below the picture.
    """
    shown = [
        f"![{title}](data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()})"
        for title, file in pictures.items()
    ]
    page = "\n\n".join(shown)
    _create(create_markdown_artifact, markdown=page, key=key, description=description)


def _create(create: Any, **what: Any) -> None:
    try:
        create(**what)
    except Exception as error:  # a server that is away must not cost a finished computation
        logger.warning("Prefect shows no %s: %s", what["key"], error)


def _flow_run_tags() -> dict[str, str]:
    run_id = runtime.flow_run.id
    if run_id is None:
        return {}
    url = runtime.flow_run.ui_url if has_pages() else None
    return {"prefect.flow_run_id": str(run_id), **({"prefect.flow_run_url": url} if url else {})}
