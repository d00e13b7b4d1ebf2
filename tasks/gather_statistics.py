"""The stages that run the model over the calibration windows once, for every method."""

from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.statistics.gathering import Kind
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

if TYPE_CHECKING:
    from torch import Tensor


class Shard(BaseModel):
    """Every `count`-th window, from the one at `index` on."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    index: int = Field(default=0, ge=0)
    count: int = Field(default=1, ge=1)

    @property
    def is_all(self) -> bool:
        return self.count == 1

    def of(self, windows: "Tensor") -> "Tensor":
        """This shard's windows."""
        return windows[self.index :: self.count]

    def share_of(self, tokens: int) -> int:
        """Its part of so many tokens, rounded up."""
        return -(-tokens // self.count)

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


class GatherStatistics(ComputedStage):
    """Additive sums over the calibration windows: similarities of hidden states, Grams."""

    stage: ClassVar[str] = "gather_statistics"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution", "batch_size"})

    model: ModelRef
    calibration: Artifact
    kinds: tuple[Kind, ...]
    shard: Shard = Shard()
    dtype: Dtype = "auto"
    batch_size: int = 8
    execution: Execution = Execution()

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.statistics.gathering",
            "foldstack.compression.checkpoints.checkpoint",
        )

    @property
    def label(self) -> str:
        return "gather statistics" if self.shard.is_all else f"gather statistics {self.shard}"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.out_of_memory import with_smaller_batches
        from foldstack.compression.statistics.gathering import gather
        from foldstack.compression.statistics.similarity import SIMILARITY_TOKENS
        from foldstack.compression.text.calibration import Windows
        from foldstack.tasks.models import open_model

        model = open_model(self.model, self.dtype, self.execution, blocks="in turn")
        windows = self.shard.of(Windows.load(self.calibration.open()).tokens)
        statistics = with_smaller_batches(
            lambda batch_size: gather(
                model,
                windows,
                self.kinds,
                batch_size=batch_size,
                progress=progress,
                similarity_tokens=self.shard.share_of(SIMILARITY_TOKENS),
                folder=folder,
                work=work,
                warn_of_ranks=self.shard.is_all,
            ),
            self.batch_size,
            windows.shape[1],
        )
        statistics.save(folder)
        return {"tokens": statistics.num_tokens, "blocks": statistics.num_blocks}


class AddStatistics(ComputedStage):
    """The sums of all shards of the calibration windows, added."""

    stage: ClassVar[str] = "add_statistics"
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    shards: tuple[Artifact, ...]

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.statistics.gathering",)

    @property
    def label(self) -> str:
        return f"add statistics of {len(self.shards)} shards"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.statistics.gathering import Statistics, report_deficient_grams

        statistics = reduce(add, [Statistics.load(shard.open()) for shard in self.shards])
        statistics.save(folder)
        report_deficient_grams(Statistics.load(folder))
        return {"tokens": statistics.num_tokens, "blocks": statistics.num_blocks}
