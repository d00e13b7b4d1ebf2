"""The flows that run by themselves: the nightly sweep with its quality gate, and the refresh."""

import foldstack.flows.prefect_defaults  # noqa: F401 (before Prefect)

# isort: split

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Timer
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.events import emit_event

from foldstack.compression.errors import InputError
from foldstack.compression.storage.digest import digest_json
from foldstack.flows.comparison.files import comparisons_in
from foldstack.flows.comparison.findings import findings
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.sweep_log import experiment_of, registered_name, tracking_uri
from foldstack.flows.comparison.tables import records
from foldstack.flows.config.method_entries import sparsity_text
from foldstack.flows.config.run_config import RunConfig
from foldstack.flows.sweep import SweepFailed, answered, page_of, run_name, sweep
from foldstack.tasks.environment.redaction import without_secrets
from foldstack.tasks.running.worker_pool import end_workers
from foldstack.tasks.tracking.quality_gate import Gate, Verdict, apply_gate, refused

log = logging.getLogger(__name__)
DEFAULT_GATE = Gate()


class GateRefused(RuntimeError):
    """A model is worse than the accepted one by more than the gate allows."""


class TookTooLong(RuntimeError):
    """A night that would run into the next day was ended."""


def _name() -> str:
    return run_name("nightly")


@flow(name="nightly", flow_run_name=_name, persist_result=False)
def nightly(
    config: RunConfig, gate: Gate = DEFAULT_GATE, limit_hours: float | None = None
) -> Comparison:
    """Run the sweep of `config`, and hold the best model at each sparsity against the accepted one.

    Args:
        config: the sweep.
        gate: the rule by which the best models are judged.
        limit_hours: the sweep is ended after so long; what is finished is kept.

    Raises:
        InputError: something in `config` cannot work, or there is no MLflow to ask.
        SweepFailed: some variants failed.
        GateRefused: a model is worse than the accepted one by more than `gate` allows.
        TookTooLong: the sweep was ended after `limit_hours`.
    """
    if not config.tracking.enabled:
        raise InputError("tracking.enabled must be true for the gate: accepted models are MLflow's")
    with stages_ended_after(limit_hours) as was_ended:
        try:
            comparison = sweep(config)
        except SweepFailed:
            if not was_ended.is_set():
                raise
            raise TookTooLong(
                f"the sweep was ended after {limit_hours:g} h; what is finished is kept, and the "
                "next run goes on from there"
            ) from None
    verdicts = quality_gate(config, comparison, gate)
    create_table_artifact(
        table=[verdict.model_dump() for verdict in verdicts],
        key=page_of("gate", comparison.model),
        description="The best model at each sparsity beside the accepted one",
    )
    for verdict in verdicts:
        announce(registered_name(config), verdict)
    if bad := refused(verdicts):
        raise GateRefused(f"{len(bad)} of {len(verdicts)} models refused, the first is {bad[0]}")
    return answered(comparison, ". ".join(map(str, verdicts)))


@contextmanager
def stages_ended_after(hours: float | None) -> Iterator[Event]:
    """Inside, no stage computes any longer than that; the event says whether they were ended.

    Not by `timeout_seconds` of Prefect's: that raises an error in a thread which waits for others,
    and which hears of it when they have ended by themselves.
    """
    was_ended = Event()

    def end() -> None:
        was_ended.set()
        end_workers()

    timer = Timer(0 if hours is None else 3600 * hours, end)
    timer.daemon = True
    if hours is not None:
        timer.start()
    try:
        yield was_ended
    finally:
        timer.cancel()


def announce(model: str, verdict: Verdict) -> None:
    """Emit `foldstack.model.accepted`, `.passed` or `.refused`: automations may deploy, or tell."""
    emit_event(
        event=f"foldstack.model.{verdict.outcome}",
        resource={
            "prefect.resource.id": f"foldstack.model.{model}.{verdict.sparsity}",
            "prefect.resource.name": f"{model} at sparsity {verdict.sparsity}",
            "foldstack.verdict": str(verdict),
        },
        payload=verdict.model_dump(mode="json"),
    )


@task(name="quality gate", task_run_name="quality gate", cache_policy=NO_CACHE)
def quality_gate(config: RunConfig, comparison: Comparison, gate: Gate) -> list[Verdict]:
    """The verdict on the best model at each sparsity; accepted ones get their alias."""
    best = {
        sparsity_text(sparsity): digest_json(row.fingerprints)
        for sparsity, row in comparison.best().items()
    }
    with without_secrets():
        return apply_gate(
            tracking_uri(config), experiment_of(config), registered_name(config), best, gate
        )


@flow(name="refresh comparison", flow_run_name="comparison {model}", persist_result=False)
def refresh_comparison(model: str = "", home: Path | None = None) -> int:
    """Publish the results of all sweeps of a model, or of all, as one table; gives its rows.

    Raises:
        InputError: there is no sweep of that model.
    """
    there = comparisons_in(home, model)
    for sentence in there.damaged:
        log.warning("left out: %s", sentence)
    rows: list[dict[str, Any]] = []
    told = [f"Sweeps of {model or 'all'}", *(f"left out: {each}" for each in there.damaged)]
    for comparison in there.readable:
        rows += [{"sweep": comparison.title} | row for row in records(comparison.frame())]
        told += [f"**{comparison.title}**", *(f"- {each}" for each in findings(comparison))]
    create_table_artifact(table=rows, key="all-sweeps", description="\n\n".join(told))
    return len(rows)
