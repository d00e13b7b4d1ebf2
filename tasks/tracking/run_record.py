"""What a tracking server is to know of one variant, the dense model or a sweep, as plain data."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

PREFIX = "foldstack."
"""What the names of our tags begin with."""

Columns = Mapping[str, Sequence[object]]
Status = Literal["RUNNING", "FINISHED", "FAILED"]


@dataclass(frozen=True)
class DatasetUse:
    """Text that a run read: where from, the digest of its content, and for what."""

    name: str
    digest: str
    source: str
    context: str
    profile: Mapping[str, int | float | str] = field(default_factory=dict)
    source_type: str = "local"
    """One of MLflow's: local (then `source` is a path), hugging_face, code."""
    origin: Mapping[str, Any] = field(default_factory=dict)
    """What MLflow's class of that type is made from; empty for a path."""


@dataclass(frozen=True)
class ModelFiles:
    """A model that a run ended with."""

    folder: Path
    """Its Hugging Face directory."""
    digest: str
    upload: bool = False
    """Whether MLflow is to hold the weights, and not only where they are."""


@dataclass(frozen=True)
class RunRecord:
    """All that MLflow is to know of one variant, the dense model, or a sweep."""

    name: str
    fingerprint: str
    params: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Curves, as (step, value) points."""
    system: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """What its stages took of the machine: curves of (seconds since 1970, value) points, which are
    there only where the stages were computed just now."""
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[DatasetUse] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    """Local file or folder by its path inside the run."""
    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Columns | Callable[[], Columns]] = field(default_factory=dict)
    """Columns of values, by the table's path inside the run: MLflow shows and compares them. What
    is long and follows from the fingerprint is made when it is logged.
    """
    model: ModelFiles | None = None
    status: Status = "FINISHED"
    started: float | None = None
    """When the first of its stages began, in seconds since 1970."""
    seconds: float | None = None
    """What all of its stages took; None: until now."""
    sweep: str = ""
    parent: str = ""
    """Fingerprint of the run below which MLflow shows this one; logged before it."""
    links: Mapping[str, str] = field(default_factory=dict)
    """Tags that change from run to run (addresses, who ran it): no reason to write again."""

    @property
    def uploads(self) -> bool:
        """True when MLflow is to hold the model's weights."""
        return self.model is not None and self.model.upload

    @property
    def digest(self) -> str:
        """Changes when there is something new to log."""
        content = asdict(self) | {"links": {}, "sweep": "", "files": sorted(self.files)}
        del content["parent"], content["system"]
        content["tables"] = {k: None if callable(v) else v for k, v in self.tables.items()}
        content["model"] = self.model.digest if self.model else ""  # wherever it lies by now
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
