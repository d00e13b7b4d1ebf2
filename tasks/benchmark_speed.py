"""The stages that measure speed beside the dense one: of a model, as an assistant, of variants."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from foldstack.compression.evaluation.speed import SpeedResult, SpeedSpec
from foldstack.compression.statistics.sensitivity import Family
from foldstack.tasks.environment.execution import Dtype, Execution, torch_dtype
from foldstack.tasks.models import model_folder, open_model
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

if TYPE_CHECKING:
    from foldstack.compression.statistics.variant_times import Seconds

SPEED_FILE = "speed.json"
ASSISTED_FILE = "assisted.json"
SECONDS_FILE = "seconds.json"
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


class TimeVariants(ComputedStage):
    """What one family of variants saves of prefill and decoding, from whole models in turns with
    the dense one."""

    stage: ClassVar[str] = "time_variants"

    model: ModelRef
    family: Family
    spec: SpeedSpec
    execution: Execution
    """Part of the fingerprint here: other threads, another speed."""
    machine: str
    """In words; on another one it is measured again."""
    dtype: Dtype = "auto"

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.methods.search.seconds",)

    @property
    def label(self) -> str:
        return f"time {self.family}"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.methods.search.library import Library
        from foldstack.compression.methods.search.seconds import measure_seconds
        from foldstack.tasks.models import open_model

        model = open_model(self.model, self.dtype, self.execution)
        found = measure_seconds(Library(model), self.family, self.spec, progress)
        (folder / SECONDS_FILE).write_text(found.model_dump_json(indent=1), encoding="utf-8")
        return {
            "models": len(found.measured),
            "dense_prefill_seconds": found.dense_prefill,
            "dense_decode_seconds": found.dense_decode,
            "prefill_error": found.prefill_error,
            "decode_error": found.decode_error,
        }


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


class BenchmarkAssistant(ComputedStage):
    """Assisted decoding: how many tokens of the assistant the dense model keeps, and what time that
    saves beside decoding alone, on the text that perplexity is measured on."""

    stage: ClassVar[str] = "benchmark_assistant"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"name"})

    dense: ModelRef
    model: ModelRef | Artifact
    prompt_tokens: int
    new_tokens: int
    turns: int
    machine: str
    """In words; on another one it is measured again."""
    execution: Execution
    """Part of the fingerprint here: other threads, another speed."""
    dtype: Dtype = "auto"
    name: str = ""

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.evaluation.generation",
            "foldstack.compression.text.corpus",
        )

    @property
    def label(self) -> str:
        return f"bench {self.name} as the assistant of dense"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        import json
        from dataclasses import asdict

        from foldstack.compression.checkpoints.checkpoint import load_tokenizer
        from foldstack.compression.evaluation.generation import generate_assisted
        from foldstack.compression.evaluation.speed import Spread
        from foldstack.compression.text.corpus import TextSource, documents

        dense = open_model(self.dense, self.dtype, self.execution)
        model = open_model(self.model, self.dtype, self.execution)
        text = "\n".join(documents(TextSource(split="test")))[
            : 40 * self.prompt_tokens * self.turns
        ]
        ids = load_tokenizer(model_folder(self.dense))(text, return_tensors="pt", verbose=False)[
            "input_ids"
        ]
        windows = ids[0].unfold(0, self.prompt_tokens, self.prompt_tokens).to(dense.device)
        runs = []
        for number in range(self.turns + 1):
            progress("decode alone and assisted", number, self.turns + 1)
            prompt = windows[number % len(windows)][None]
            runs.append(generate_assisted(dense, model, prompt, self.new_tokens))
        runs = runs[1:]  # the first one warms up
        (folder / ASSISTED_FILE).write_text(json.dumps([asdict(run) for run in runs], indent=1))
        kept = [run.tokens / run.passes - 1 for run in runs]
        return {
            "assistant_accepted_per_pass": sum(kept) / len(kept),
            "assistant_speedup": Spread.of([run.alone / run.assisted for run in runs]).median,
            "assistant_same_text": all(run.is_same_text for run in runs),
        }


def load_seconds(timed: tuple[Artifact, ...]) -> "Seconds | None":
    """The times in some artifacts of this stage, together; None where there are none."""
    from functools import reduce
    from operator import add

    from foldstack.compression.statistics.variant_times import Seconds

    parts = [
        Seconds.model_validate_json((each.open() / SECONDS_FILE).read_text(encoding="utf-8"))
        for each in timed
    ]
    return reduce(add, parts) if parts else None
