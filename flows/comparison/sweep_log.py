"""From the rows of a comparison to what MLflow is told of them."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from foldstack.compression.storage.digest import digest_json
from foldstack.flows.comparison.dataset_uses import dataset_uses
from foldstack.flows.comparison.files import summary
from foldstack.flows.comparison.item_table import ITEMS_TABLE, item_table
from foldstack.flows.comparison.result import QUALITY, Comparison, Row
from foldstack.flows.comparison.rows import row_of
from foldstack.flows.comparison.tables import records
from foldstack.flows.config.method_entries import sparsity_text
from foldstack.flows.config.run_config import RunConfig
from foldstack.flows.running.branches import Branch, Layout
from foldstack.flows.running.provenance import provenance
from foldstack.flows.running.stage_runs import StageRuns
from foldstack.tasks import score_variants
from foldstack.tasks.environment.redaction import redacted
from foldstack.tasks.models import MODEL_FOLDER
from foldstack.tasks.rank_blocks import PLOT_FILE, TABLE_FILE
from foldstack.tasks.recover_model import load_history
from foldstack.tasks.running.usage import samples_of
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import MANIFEST
from foldstack.tasks.tracking.mlflow_pages import view_tag
from foldstack.tasks.tracking.run_record import PREFIX, ModelFiles, RunRecord, Status
from foldstack.tasks.tracking.tracker import Tracker
from foldstack.tasks.tracking.tracking_database import ARTIFACTS

# Parts of a config that change nothing that is computed.
BESIDE_THE_POINT = (
    "name", "best_by", "best_within", "tracking", "output", "execution", "workers",
)  # fmt: skip
CURVES = ("loss", "cross_entropy", "divergence", "gradient_norm", "learning_rate_fraction")
SMALL_BYTES = 32 << 20
MODEL_REFERENCE = "model/reference.json"


def tracking_uri(config: RunConfig) -> str:
    """Where runs are logged: as configured, as MLflow's own variable says, or a file at home."""
    home = config.output.home.expanduser().resolve()
    chosen = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    return chosen or f"sqlite:///{home / 'mlflow.db'}"


def has_tracking_server(config: RunConfig) -> bool:
    """Whether somebody said where runs are logged."""
    return bool(config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"))


def experiment_of(config: RunConfig) -> str:
    """Name of the MLflow experiment, one per base model unless the config says otherwise."""
    return config.tracking.experiment or f"foldstack/{config.model.short_name}"


def registered_name(config: RunConfig) -> str:
    """Name of the registered model whose versions are the best variants."""
    return f"foldstack-{_clean(config.model.short_name)}"


class SweepLog:
    """Logs the branches of one sweep as they get ready, and the sweep at its end."""

    def __init__(self, layout: Layout, links: Mapping[str, str]) -> None:
        self._layout = layout
        self._links = dict(links)
        self._tracker: Tracker | None = None
        config = layout.config
        if config.tracking.enabled:
            home = config.output.home.expanduser().resolve()
            self._links |= provenance()
            self._tracker = Tracker(
                tracking_uri(config), experiment_of(config), home / "tracking", home / ARTIFACTS
            )

    def branch_evaluated(self, branch: Branch, runs: StageRuns) -> None:
        """Let a branch be seen before its speed is known, unless all of it was there already."""
        outcomes = [runs.outcomes.get(stage.fingerprint) for stage in branch.stages.values()]
        if self._tracker is None or not any(o is not None and o.kind == "done" for o in outcomes):
            return
        row = row_of(self._layout, branch, runs.outcomes)
        if row.state == "done":
            self._tracker.log(self._record(branch, row, runs, "RUNNING"))

    def finish(
        self, comparison: Comparison, runs: StageRuns, files: Mapping[str, Path]
    ) -> tuple[dict[str, str], list[str]]:
        """Log everything; gives links for a person, and warnings."""
        tracker = self._tracker
        if tracker is None:
            return {}, []
        records: dict[str, RunRecord] = {}
        uploaded = _to_upload(self._layout.config, comparison)
        sweep = self._sweep_record(comparison, files)
        tracker.log(sweep)  # first: the others are shown below it
        for branch, row in zip(self._layout.branches, comparison.rows, strict=True):
            status: Status = "FINISHED" if row.state == "done" else "FAILED"
            upload = row.label in uploaded
            record = self._record(branch, row, runs, status, upload=upload)
            records[row.label] = replace(record, parent=sweep.fingerprint)
            tracker.log(records[row.label])
        if self._layout.config.tracking.register_best and not _is_complete(tracker, records):
            for sparsity, row in comparison.best().items():
                alias = f"best-at-{sparsity_text(sparsity).replace('.', '-')}"
                name = registered_name(self._layout.config)
                told = f"{row.label}: {comparison.best_rule}"
                tracker.register_best(name, records[row.label], alias, told, _figures(row))
        tracker.finish()
        links = {"mlflow": redacted(tracker.uri), "mlflow experiment": tracker.experiment}
        links |= tracker.pages(self._layout.sweep)
        return links, tracker.warnings

    def settle(self) -> None:
        """Wait for what is being logged, so that nothing else runs while speed is measured."""
        if self._tracker is not None:
            self._tracker.finish()

    def _record(
        self, branch: Branch, row: Row, runs: StageRuns, status: Status, *, upload: bool = False
    ) -> RunRecord:
        layout = self._layout
        config = variant_config(layout.resolved_config, row)
        tags = {"kind": "variant", "method": row.method, "base_model": layout.model.name}
        tags |= {"base_fingerprint": layout.model.fingerprint, "cause": row.cause}
        if row.verdict is not None and row.verdict.verdict is not None:
            tags["verdict"] = row.verdict.verdict
        tags |= {f"stage.{part}": name for part, name in row.fingerprints.items()}
        artifacts = {
            part: artifact
            for part, stage in branch.stages.items()
            if (artifact := runs.artifact(stage)) is not None
        }
        evaluated = artifacts.get("evaluate_after") or artifacts.get("evaluate_before")
        texts = {"config.yaml": yaml.safe_dump(config, sort_keys=False)}
        maker, model = artifacts.get("recover") or artifacts.get("compress"), None
        if maker is not None:
            reference = model_reference(maker)
            texts[MODEL_REFERENCE] = json.dumps(reference, indent=1)
            texts["environment.json"] = json.dumps(_environment(maker), indent=1)
            tags |= {"grade": str(row.structure.get("grade")), "model_uri": str(reference["uri"])}
            tags["model_digest"] = str(reference["digest"])
            model = ModelFiles(maker.folder / MODEL_FOLDER, tags["model_digest"], upload)
        return RunRecord(
            name=row.label,
            fingerprint=branch.fingerprint,
            params=flatten(config),
            metrics=metrics(row),
            series=_curves(artifacts.get("recover")),
            system=_usage(branch),
            tags={PREFIX + name: value for name, value in tags.items() if value} | run_note(row),
            datasets=dataset_uses(layout),
            files=_files(layout, runs, artifacts),
            texts=texts,
            tables={ITEMS_TABLE: partial(item_table, evaluated)} if evaluated else {},
            model=model,
            status=status,
            started=_started(artifacts.values()),
            seconds=sum(artifact.manifest().seconds for artifact in artifacts.values()),
            sweep=layout.sweep,
            links=self._links,
        )

    def _sweep_record(self, comparison: Comparison, files: Mapping[str, Path]) -> RunRecord:
        status: Status = "FAILED" if comparison.failed else "FINISHED"
        counts = {"variants": len(comparison.rows) - 1, "failed": len(comparison.failed)}
        best = {
            f"best/{sparsity_text(sparsity)}/{QUALITY}": row.number(QUALITY) or 0.0
            for sparsity, row in comparison.best().items()
        }
        return RunRecord(
            name=comparison.title,
            fingerprint=digest_json({"sweep": comparison.sweep, "failed": counts["failed"]}),
            params={"model.name": comparison.model, "best_rule": comparison.best_rule},
            metrics={**counts, **best},
            tags={
                PREFIX + "kind": "sweep",
                PREFIX + "view": view_tag(comparison.sweep)[0],
                "mlflow.note.content": summary(comparison),
            },
            files=files,
            tables={"comparison_table.json": _columns_of(comparison)},
            status=status,
            sweep=comparison.sweep,
            links=self._links,
        )


def run_note(row: Row) -> dict[str, str]:
    """What MLflow shows at the top of a run's page: the verdict, and what is left in each track."""
    if row.verdict is None:
        return {}
    lines = [f"**{row.verdict}**", ""]
    for track in row.tracks:
        for task in track.tasks:
            left = "dense is at chance" if task.retained is None else (
                f"{task.retained:.3f} ± {task.stderr or 0:.3f} left, {task.verdict}"
            )  # fmt: skip
            lines.append(
                f"- {track.track}, {task.task} ({task.metric}): {task.other:.4g} beside "
                f"{task.dense:.4g}, {left} ({task.read})"
            )
    return {"mlflow.note.content": "\n".join(lines)}


def variant_config(config: RunConfig, row: Row) -> dict[str, Any]:
    """The config that makes this row alone: it stays the same when a sweep gets more variants."""
    data = config.model_dump(mode="json", exclude=set(BESIDE_THE_POINT))
    for name in ("methods", "sparsities", "seeds"):
        del data[name]
    if row.is_dense:
        return {name: data[name] for name in ("model", "evaluation", "speed", "export")}
    settings = {k: v for k, v in row.settings.items() if k not in ("sparsity", "seed")}
    return {**data, "methods": [settings], "sparsities": [row.sparsity], "seeds": [row.seed]}


def flatten(config: Mapping[str, Any]) -> dict[str, str | int | float | bool]:
    """Nested settings as one level of dotted names: "method.rank", "recovery.steps"."""
    flat: dict[str, str | int | float | bool] = {}
    for key, value in config.items():
        if key == "methods":
            flat |= {f"method.{name}": inner for name, inner in flatten(value[0]).items()}
        elif key in ("sparsities", "seeds"):
            flat[{"sparsities": "sparsity", "seeds": "seed"}[key]] = value[0]
        elif isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in flatten(value).items()}
        elif value is not None and value != "":
            flat[key] = json.dumps(value) if isinstance(value, (list, tuple)) else value
    return flat


def metrics(row: Row) -> dict[str, float]:
    """The numbers of a row by names with slashes; "quality" is that of the final model."""
    return {
        name: value
        for name, value in numbers(row.numbers()).items()
        if name.removeprefix("recovery/") not in CURVES
    }


def _columns_of(comparison: Comparison) -> dict[str, list[Any]]:
    """The table of a sweep, column by column, for MLflow's page of the run."""
    rows = records(comparison.frame())
    return {head: [row.get(head) for row in rows] for head in dict.fromkeys(chain(*rows))}


def model_reference(maker: Artifact) -> dict[str, Any]:
    """Where the weights are and what they are: they are not uploaded."""
    files = {
        file.name.removeprefix(f"{MODEL_FOLDER}/"): file.sha256
        for file in maker.manifest().files
        if file.name.startswith(f"{MODEL_FOLDER}/")
    }
    folder = maker.folder / MODEL_FOLDER
    return {"uri": folder.as_uri(), "digest": digest_json(files), "sha256": files}


def _to_upload(config: RunConfig, comparison: Comparison) -> set[str]:
    """Labels of the rows whose weights MLflow is to hold."""
    match config.tracking.upload_models:
        case "all":
            return {row.label for row in comparison.rows if not row.is_dense}
        case "best":
            return {row.label for row in comparison.best().values()}
        case _:
            return set()


def _figures(row: Row) -> dict[str, str]:
    """What a person who chooses among a model's versions wants to know of each."""
    figures = {
        "sparsity": row.sparsity,
        "method": row.method,
        "verdict": row.verdict and row.verdict.verdict,
        "grade": row.structure.get("grade"),
        "parameters": row.structure.get("parameters"),
        QUALITY: row.number(QUALITY),
        "decode_speedup": row.number("decode_speedup", "speed"),
    }
    return {name: _text(value) for name, value in figures.items() if value is not None}


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _started(artifacts: Iterable[Artifact]) -> float | None:
    begun = [each.manifest().created.timestamp() - each.manifest().seconds for each in artifacts]
    return min(begun, default=None)


def _environment(maker: Artifact) -> dict[str, Any]:
    manifest = maker.manifest()
    return {"versions": manifest.versions, "hardware": manifest.hardware}


def _curves(recovered: Artifact | None) -> dict[str, list[tuple[int, float]]]:
    if recovered is None:
        return {}
    history = load_history(recovered)
    return {
        f"recovery/{name}": [(int(row["step"]), row[name]) for row in history if name in row]
        for name in CURVES
    }


def _usage(branch: Branch) -> dict[str, list[tuple[float, float]]]:
    """Memory and processor time of the branch's stages, by names like MLflow's own."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for part, stage in branch.stages.items():
        if samples := samples_of(stage.fingerprint):
            name = part.replace("/", "_")
            memory = [(each.moment, each.memory_bytes / 1e6) for each in samples]
            curves[f"{name}_memory_usage_megabytes"] = memory
            curves[f"{name}_cpu_utilization_percentage"] = [
                (each.moment, each.cpu_percent) for each in samples
            ]
    return curves


def _files(layout: Layout, runs: StageRuns, artifacts: Mapping[str, Artifact]) -> dict[str, Path]:
    """Everything of the artifacts but weights, tokenizers and what is large."""
    files: dict[str, Path] = {}
    for part, artifact in artifacts.items():
        for file in artifact.manifest().files:
            if not file.name.startswith(f"{MODEL_FOLDER}/") and file.size_bytes <= SMALL_BYTES:
                files[f"{part}/{file.name}"] = artifact.folder / file.name
        files[f"{part}/{MANIFEST}"] = artifact.folder / MANIFEST
    if "compress" in artifacts:
        files["plan.json"] = artifacts["compress"].folder / MODEL_FOLDER / "plan.json"
        ranked = runs.artifact(layout.ranking)
        if ranked is not None:
            files |= {f"ranking/{name}": ranked.folder / name for name in (TABLE_FILE, PLOT_FILE)}
        for stage in layout.scores:
            scored = runs.artifact(stage)
            if scored is not None:
                place = f"ranking/{stage.label.replace(' ', '-').replace('/', '-of-')}"
                files |= {
                    f"{place}/{name}": scored.folder / name
                    for name in (score_variants.TABLE_FILE, score_variants.PLOT_FILE)
                    if (scored.folder / name).is_file()
                }
    return files


def _is_complete(tracker: Tracker, records: Mapping[str, RunRecord]) -> bool:
    """True when everything was logged by an earlier run, so the best is registered too."""
    return not tracker.is_busy and all(r.fingerprint in tracker.run_ids for r in records.values())


def _clean(name: str) -> str:
    return re.sub(r"[^\w-]", "-", name)


def numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among facts."""
    return {
        name: float(value)
        for name, value in facts.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
