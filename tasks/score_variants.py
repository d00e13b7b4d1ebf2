"""The stage that scores variants of a model's sites, alone in the dense model."""

import csv
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from foldstack.compression.statistics.sensitivity import SCORE_TOKENS, Family
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.gather_statistics import Shard
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

if TYPE_CHECKING:
    from foldstack.compression.statistics.sensitivity import Sensitivity

TABLE_FILE = "sensitivity.csv"
PLOT_FILE = "sensitivity.png"


class ScoreVariants(ComputedStage):
    """What one family of variants costs, at every `shard.count`-th block.

    One scoring serves every method that asks for the family, at every sparsity and budget.
    """

    stage: ClassVar[str] = "score_variants"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution"})

    model: ModelRef
    calibration: Artifact
    statistics: Artifact
    family: Family
    tokens: int = SCORE_TOKENS
    """Of the calibration windows' first ones."""
    shard: Shard = Shard()
    """Which blocks."""
    dtype: Dtype = "auto"
    execution: Execution = Execution()

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.methods.search.scoring",
            "foldstack.compression.checkpoints.checkpoint",
        )

    @property
    def label(self) -> str:
        return f"score {self.family}" + ("" if self.shard.is_all else f" {self.shard}")

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.evaluation.candidate_loss import windows_of
        from foldstack.compression.methods.method import Evidence
        from foldstack.compression.methods.search.assembly import Assembly
        from foldstack.compression.methods.search.library import Library
        from foldstack.compression.methods.search.scoring import score_variants
        from foldstack.compression.statistics.gathering import Statistics
        from foldstack.compression.statistics.ranking import rank_blocks
        from foldstack.compression.statistics.sensitivity import plot
        from foldstack.compression.text.calibration import Windows
        from foldstack.tasks.models import open_model

        model = open_model(self.model, self.dtype, self.execution, blocks="where they fit")
        windows = Windows.load(self.calibration.open()).tokens
        statistics = Statistics.load(self.statistics.open())
        evidence = Evidence(windows, statistics, rank_blocks(statistics), work=work)
        library = Library(model)
        variants = [
            variant
            for variant in library.variants([self.family])
            if variant.first % self.shard.count == self.shard.index
        ]
        sensitivity = score_variants(
            Assembly(library, evidence),
            windows_of(windows, self.tokens),
            variants,
            families=[self.family],
            spool=evidence.spool(),
            progress=progress,
        )
        sensitivity.save(folder)
        rows = sensitivity.table()
        if rows:
            with (folder / TABLE_FILE).open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            plot(sensitivity, folder / PLOT_FILE)
        tokens = sensitivity.num_windows * sensitivity.window_tokens
        return {"variants": len(rows), "tokens": tokens}


def load_sensitivity(scored: tuple[Artifact, ...]) -> "Sensitivity | None":
    """The scores in some artifacts of this stage, together; None where there are none."""
    from functools import reduce
    from operator import add

    from foldstack.compression.statistics.sensitivity import Sensitivity

    parts = [Sensitivity.load(artifact.open()) for artifact in scored]
    return reduce(add, parts) if parts else None
