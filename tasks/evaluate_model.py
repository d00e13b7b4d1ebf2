"""The stage that measures a model's quality: perplexity, bits per byte, benchmarks."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from foldstack.compression.evaluation.records import PerplexityProtocol, PerplexityResult
from foldstack.compression.reference import BENCHMARKS_FOLDER
from foldstack.compression.storage.digest import digest_folder, digest_json
from foldstack.compression.text.corpus import TextSource, source_digest
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.models import model_folder, open_model
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

if TYPE_CHECKING:
    from foldstack.compression.evaluation.beside_dense import Evaluation

PERPLEXITY_FILE = "perplexity.json"
TASK_FILES = ("**/*.yaml", "**/*.yml", "**/*.py", "**/*.json", "**/*.jsonl", "**/*.txt")


class EvaluateModel(ComputedStage):
    """Quality of one model, with what each number was computed from."""

    stage: ClassVar[str] = "evaluate_model"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "lm-eval", "datasets")
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset(
        {"source", "include_paths", "batch_size", "execution", "name"}
    )

    model: ModelRef | Artifact
    source: TextSource
    source_digest: str
    written: Artifact | None = None
    """The text as windows that the dense model wrote; None: `source` is read."""
    protocol: PerplexityProtocol
    benchmarks: dict[str, int | None] = Field(default={})
    """lm-eval's names, and how many items of each; None takes all."""
    benchmarks_digest: str = ""
    """Of the files that say what the benchmarks are; see `benchmarks_digest`."""
    include_paths: tuple[Path, ...] = ()
    num_fewshot: int | None = None
    batch_size: int = 8
    dtype: Dtype = "auto"
    execution: Execution = Execution()
    name: str = ""
    """What the model is called, e.g. "svd_llm 0.20 after recovery"."""

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.checkpoints.checkpoint",
            "foldstack.compression.evaluation.harness",
            "foldstack.compression.evaluation.perplexity",
            "foldstack.compression.structure.size",
            "foldstack.compression.text.corpus",
            "foldstack.compression.text.self_written",
        )

    @property
    def label(self) -> str:
        return f"evaluate {self.name}".strip()

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.checkpoints.checkpoint import load_tokenizer
        from foldstack.compression.evaluation.perplexity import measure_perplexity
        from foldstack.compression.structure.size import size_of
        from foldstack.compression.text.self_written import texts_of

        progress("load the model", 0, 1)
        model = open_model(self.model, self.dtype, self.execution)
        tokenizer = load_tokenizer(model_folder(self.model))
        written = None if self.written is None else self.written.open()
        texts = texts_of(self.source, written, tokenizer)
        result = measure_perplexity(model, tokenizer, texts, self.protocol, progress)
        (folder / PERPLEXITY_FILE).write_text(result.model_dump_json(indent=1), encoding="utf-8")
        facts: Facts = {
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "nll": result.nll,
            "unknown_tokens": result.num_unknown / result.num_tokens,
        }
        if self.benchmarks:
            facts |= self._benchmarks(folder, progress, model, tokenizer)
        return facts | {f"size/{name}": value for name, value in size_of(model).as_dict().items()}

    def _benchmarks(self, folder: Path, progress: Progress, model: Any, tokenizer: Any) -> Facts:
        from foldstack.compression.evaluation.harness import evaluate, write_items

        facts: Facts = {}
        for number, limit in enumerate(dict.fromkeys(self.benchmarks.values())):
            result = evaluate(
                model,
                tokenizer,
                [name for name, its_limit in self.benchmarks.items() if its_limit == limit],
                include_paths=self.include_paths,
                num_fewshot=self.num_fewshot,
                limit=limit,
                batch_size=self.batch_size,
                progress=progress,
            )
            suffix = f".{number}" if number else ""
            text = result.model_dump_json(indent=1)
            (folder / f"benchmarks{suffix}.json").write_text(text, encoding="utf-8")
            write_items(result.items, folder / f"items{suffix}.jsonl")
            for name, benchmark in result.benchmarks.items():
                for metric, score in benchmark.scores.items():
                    facts[f"{name}/{metric}"] = score.value
                    facts[f"{name}/{metric}_stderr"] = score.stderr
        return facts


def load_perplexity(evaluated: Artifact) -> PerplexityResult:
    """The loss on every window that a stage measured."""
    text = (evaluated.open() / PERPLEXITY_FILE).read_text(encoding="utf-8")
    return PerplexityResult.model_validate_json(text)


@lru_cache(maxsize=2)  # the dense model's, beside that of one after the other
def load_evaluation(evaluated: Artifact) -> "Evaluation":
    """What a stage measured, with every window and item."""
    from foldstack.compression.evaluation.beside_dense import Evaluation
    from foldstack.compression.evaluation.harness import read_items
    from foldstack.compression.evaluation.records import HarnessResult

    folder = evaluated.open()
    results = [
        HarnessResult.model_validate_json(file.read_text(encoding="utf-8"))
        for file in sorted(folder.glob("benchmarks*.json"))
    ]
    return Evaluation(
        load_perplexity(evaluated),
        {name: found for result in results for name, found in result.benchmarks.items()},
        [item for file in sorted(folder.glob("items*.jsonl")) for item in read_items(file)],
    )


def benchmarks_digest(benchmarks: Sequence[str], include_paths: Sequence[Path]) -> str:
    """Digest of the task files that come with foldstack or with the user, and of the text that the
    former are made of; lm-eval's own tasks change with its version, which counts by itself.
    """
    if not benchmarks:
        return ""
    files = [Path(name) for name in benchmarks if name.endswith((".yaml", ".yml"))]
    return digest_json(
        {
            "folders": [digest_folder(folder, TASK_FILES) for folder in include_paths],
            "files": [digest_folder(file.parent, [file.name]) for file in files],
            "packaged": digest_folder(BENCHMARKS_FOLDER, TASK_FILES),
            "text": source_digest(TextSource(split="test")),
        }
    )
