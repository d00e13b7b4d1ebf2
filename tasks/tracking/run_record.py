"""What a tracking server is to know of one variant, the dense model or a sweep, as plain data."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

PREFIX = "foldstack."
"""What the names of our tags begin with."""

Status = Literal["RUNNING", "FINISHED", "FAILED"]


@dataclass(frozen=True)
class DatasetUse:
    """Text that a run read: where from, the digest of its content, and for what."""

    name: str
    digest: str
    source: str
    context: str
    profile: Mapping[str, int | float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecord:
    """All that MLflow is to know of one variant, the dense model, or a sweep."""

    name: str
    fingerprint: str
    params: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    series: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """Curves, as (step, value) points."""
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[DatasetUse] = ()
    files: Mapping[str, Path] = field(default_factory=dict)
    """Local file or folder by its path inside the run."""
    texts: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Sequence[object]]] = field(default_factory=dict)
    """Columns of values, by the table's path inside the run: MLflow shows and compares them."""
    status: Status = "FINISHED"
    sweep: str = ""
    links: Mapping[str, str] = field(default_factory=dict)
    """Tags that change from run to run (addresses): written, but no reason to write again."""

    @property
    def digest(self) -> str:
        """Changes when there is something new to log."""
        content = asdict(self) | {"links": {}, "sweep": "", "files": sorted(self.files)}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
