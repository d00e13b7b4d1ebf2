"""The stage that measures a model on one track, whole or until its verdict is known."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.tracks.sequential import SequentialRule
from foldstack.compression.evaluation.tracks.settings import Track, files_of
from foldstack.compression.evaluation.tracks.verdict import VerdictRule
from foldstack.compression.storage.digest import digest_folder, digest_json
from foldstack.compression.text.corpus import source_digest
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.evaluate_model import benchmarks_digest
from foldstack.tasks.models import model_folder, open_model
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

if TYPE_CHECKING:
    from foldstack.compression.evaluation.tracks.track_evaluation import TrackEvaluation


class EvaluateTrack(ComputedStage):
    """Every item of a track's tasks, and every window of its texts."""

    stage: ClassVar[str] = "evaluate_track"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "lm-eval", "datasets")
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset(
        {"include_paths", "batch_size", "execution", "track_name", "name"}
    )

    model: ModelRef | Artifact
    track: Track
    digest: str
    """Of the files that the track is read from; see `track_digest`."""
    dense: Artifact | None = None
    """What the dense model made of the track, where reading stops at a verdict, or a judge compares
    answers."""
    rule: VerdictRule | None = None
    """Of that verdict; None where all is read."""
    sequential: SequentialRule | None = None
    include_paths: tuple[Path, ...] = ()
    batch_size: int = 8
    dtype: Dtype = "auto"
    execution: Execution = Execution()
    track_name: str = ""
    name: str = ""
    """What the model is called."""

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.checkpoints.checkpoint",
            "foldstack.compression.evaluation.tracks.measure",
            "foldstack.compression.evaluation.tracks.track_beside_dense",
        )

    @property
    def label(self) -> str:
        return f"evaluate {self.track_name} of {self.name}".strip()

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.checkpoints.checkpoint import load_tokenizer
        from foldstack.compression.evaluation.tracks.measure import TrackMeasurement
        from foldstack.compression.evaluation.tracks.track_beside_dense import (
            evidence_gains,
            judged,
        )

        progress("load the model", 0, 1)
        measurement = TrackMeasurement(
            open_model(self.model, self.dtype, self.execution),
            load_tokenizer(model_folder(self.model)),
            self.track, self.include_paths, self.batch_size, progress,
        )  # fmt: skip
        dense = None if self.dense is None else load_track(self.dense)
        if dense is None or self.rule is None or self.sequential is None:
            found = measurement.whole()
        else:
            found = measurement.until_decided(dense, self.rule, self.sequential)
        if dense is not None:
            found = judged(found, dense, self.track, progress)
        found.save(folder)
        facts = track_facts(found)
        for name, gain in evidence_gains(found, self.track).items():
            facts[f"{name}/gain_by_evidence"] = gain.difference
            facts[f"{name}/gain_by_evidence_stderr"] = gain.stderr
        return facts


def track_facts(found: "TrackEvaluation") -> Facts:
    """The scores of what was read whole, and how far the rest was read."""
    facts: Facts = {}
    for name, text in found.texts.items():
        facts[f"{name}/perplexity"] = text.perplexity
        facts[f"{name}/bits_per_byte"] = text.bits_per_byte
    for name, looks in found.looks.items():
        facts[f"{name}/items"] = looks.counts[-1]
    if not found.looks:
        for name, benchmark in found.benchmarks.items():
            facts |= {f"{name}/{metric}": each.value for metric, each in benchmark.scores.items()}
        facts |= {f"{name}_spread": value for name, value in found.spread.items()}
    return facts


@lru_cache(maxsize=16)  # the dense model's of every track, beside one after the other
def load_track(evaluated: Artifact) -> "TrackEvaluation":
    """What a stage measured."""
    from foldstack.compression.evaluation.tracks.track_evaluation import TrackEvaluation

    return TrackEvaluation.load(evaluated.open())


def track_digest(track: Track, include_paths: tuple[Path, ...]) -> str:
    """Digest of the texts and files that a track is read from.

    Raises:
        InputError: one of them is not there.
    """
    for file in files_of(track):
        if not file.is_file():
            raise InputError(f"a track's items are read from {file}, which is no file")
    return digest_json(
        {
            "tasks": benchmarks_digest(track.tasks, include_paths),
            "files": [digest_folder(file.parent, [file.name]) for file in files_of(track)],
            "texts": {name: source_digest(text.source) for name, text in track.texts.items()},
        }
    )
