"""The stage that measures how fast a model is, in turns with the dense one."""

from pathlib import Path
from typing import ClassVar

from foldstack.compression.evaluation.speed import SpeedResult, SpeedSpec
from foldstack.tasks.environment.execution import Dtype, Execution, torch_dtype
from foldstack.tasks.models import model_folder
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

SPEED_FILE = "speed.json"
DENSE, MINE = "dense", "this"


class BenchmarkSpeed(ComputedStage):
    """Speed, memory and load time of one model on this machine, beside those of the dense one."""

    stage: ClassVar[str] = "benchmark_speed"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"name"})

    dense: ModelRef
    model: ModelRef | Artifact
    spec: SpeedSpec
    execution: Execution
    """Part of the fingerprint here: other threads, another speed."""
    machine: str
    """In words; on another one it is measured again."""
    dtype: Dtype = "auto"
    name: str = ""

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.evaluation.speed",)

    @property
    def label(self) -> str:
        return f"bench {self.name}".strip()

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.evaluation.speed import measure_speed

        progress("memory and loading", 0, 1)
        device = self.execution.begin()
        folders = {DENSE: self.dense.open()}
        if self.model != self.dense:
            folders[MINE] = model_folder(self.model)
        results = measure_speed(
            folders, self.spec, device=device, dtype=torch_dtype(self.dtype), progress=progress
        )
        result = results.get(MINE, results[DENSE])
        (folder / SPEED_FILE).write_text(result.model_dump_json(indent=1), encoding="utf-8")
        return speed_facts(result)


def speed_facts(result: SpeedResult) -> Facts:
    """The medians, with the quartiles of the rates; a batch size above the first has its suffix."""
    facts: Facts = {
        "load_seconds": result.load_seconds.median,
        "peak_memory_bytes": result.peak_memory_bytes,
        "weight_bytes_on_disk": result.weight_bytes_on_disk,
    }
    for number, batch in enumerate(result.batches):
        suffix = "" if number == 0 else f"/batch_{batch.batch_size}"
        for name in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            spread = getattr(batch, name)
            facts[name + suffix] = spread.median
            facts[f"{name}_lower_quartile{suffix}"] = spread.lower_quartile
            facts[f"{name}_upper_quartile{suffix}"] = spread.upper_quartile
        first = batch.time_to_first_token_seconds.median
        facts[f"time_to_first_token_seconds{suffix}"] = first
        beside = batch.baseline_decode_tokens_per_second.median
        facts[f"dense_decode_tokens_per_second{suffix}"] = beside
        for part in ("decode", "prefill"):
            ratio = getattr(batch.speedup, part)
            facts[f"{part}_speedup{suffix}"] = ratio.median
            facts[f"{part}_speedup_lower_quartile{suffix}"] = ratio.lower_quartile
            facts[f"{part}_speedup_upper_quartile{suffix}"] = ratio.upper_quartile
    return facts
