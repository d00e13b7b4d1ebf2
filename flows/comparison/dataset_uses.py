"""The texts of a sweep as MLflow's datasets: where each is from, and the digest of its content."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foldstack.compression.text.corpus import PYTHON_STDLIB, TextSource
from foldstack.flows.running.branches import CollectWindows, Layout
from foldstack.tasks.tracking.run_record import DatasetUse


def dataset_uses(layout: Layout) -> list[DatasetUse]:
    """What every variant of a sweep read."""
    collected = [layout.calibration, layout.recovery_windows]
    uses = [_windows(stage) for stage in collected if stage is not None]
    source = layout.config.evaluation.perplexity.source
    return [*uses, _use(source, layout.branches[0].before.source_digest, "evaluation", {})]


def _windows(stage: CollectWindows) -> DatasetUse:
    """By the windows, not by their text: two cuts of one text are two datasets."""
    spec = stage.windows.model_dump(mode="json")
    profile = {name: value for name, value in spec.items() if value is not None}
    profile["text_digest"] = stage.source_digest
    return _use(stage.source, stage.fingerprint, stage.purpose, profile)


def _use(
    source: TextSource, digest: str, purpose: str, profile: Mapping[str, int | float | str]
) -> DatasetUse:
    # MLflow keeps one use of a dataset per run, and knows datasets by name and digest.
    name = f"{Path(source.corpus).name} for {purpose}"
    kind, origin = _origin(source)
    return DatasetUse(name, digest, source.corpus, purpose, profile, kind, origin)


def _origin(source: TextSource) -> tuple[str, dict[str, Any]]:
    """MLflow's type of the source, and what that is made from."""
    if source.corpus == PYTHON_STDLIB:
        told = f"the standard library of Python {platform.python_version()}, split {source.split}"
        return "code", {"tags": {"mlflow.source.type": "LOCAL", "mlflow.source.name": told}}
    if source.corpus.endswith((".txt", ".jsonl")):
        return "local", {"uri": source.corpus}
    return "hugging_face", {
        "path": source.corpus,
        "config_name": source.subset,
        "data_dir": None,
        "data_files": None,
        "split": source.split,
        "revision": source.revision,
    }
