"""The stage that runs the model over the calibration windows once, for every method."""

from pathlib import Path
from typing import ClassVar

from foldstack.compression.statistics import Kind
from foldstack.tasks.artifacts import Artifact
from foldstack.tasks.execution import Dtype, Execution
from foldstack.tasks.manifest import Facts
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.worker_pool import ComputedStage


class GatherStatistics(ComputedStage):
    """Additive sums over the calibration windows: similarities of hidden states, Grams."""

    stage: ClassVar[str] = "gather_statistics"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution", "batch_size"})

    model: ModelRef
    calibration: Artifact
    kinds: tuple[Kind, ...]
    dtype: Dtype = "auto"
    batch_size: int = 8
    execution: Execution = Execution()

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.statistics", "foldstack.compression.checkpoint")

    @property
    def label(self) -> str:
        return "gather statistics"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.calibration import Windows
        from foldstack.compression.out_of_memory import with_smaller_batches
        from foldstack.compression.statistics import gather
        from foldstack.tasks.models import open_model

        model = open_model(self.model, self.dtype, self.execution, blocks="in turn")
        windows = Windows.load(self.calibration.open())
        statistics = with_smaller_batches(
            lambda batch_size: gather(
                model,
                windows.tokens,
                self.kinds,
                batch_size=batch_size,
                progress=progress,
                folder=folder,
                work=work,
            ),
            self.batch_size,
            windows.tokens.shape[1],
        )
        statistics.save(folder)
        return {"tokens": statistics.num_tokens, "blocks": statistics.num_blocks}
