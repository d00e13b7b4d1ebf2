"""The stage in which a model continues a few prompts, to be read beside what others write."""

from pathlib import Path
from typing import ClassVar

from pydantic import TypeAdapter

from foldstack.compression.evaluation.records import Sample
from foldstack.compression.evaluation.samples import SampleSpec
from foldstack.compression.text.corpus import TextSource
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.models import model_folder, open_model
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

SAMPLES_FILE = "samples.json"
_SAMPLES = TypeAdapter(list[Sample])


class WriteSamples(ComputedStage):
    """Greedy continuations of one model."""

    stage: ClassVar[str] = "write_samples"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"source", "execution", "name"})

    model: ModelRef | Artifact
    spec: SampleSpec
    source: TextSource
    source_digest: str
    """Of the text that prompts begin."""
    written: Artifact | None = None
    """The text as windows that the dense model wrote; None: `source` is read."""
    dtype: Dtype = "auto"
    execution: Execution = Execution()
    name: str = ""

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.checkpoints.checkpoint",
            "foldstack.compression.evaluation.samples",
            "foldstack.compression.text.corpus",
            "foldstack.compression.text.self_written",
        )

    @property
    def label(self) -> str:
        return f"samples of {self.name}".strip()

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.checkpoints.checkpoint import load_tokenizer
        from foldstack.compression.evaluation.samples import beginnings, write_samples
        from foldstack.compression.text.self_written import texts_of

        progress("load the model", 0, 1)
        model = open_model(self.model, self.dtype, self.execution)
        tokenizer = load_tokenizer(model_folder(self.model))
        prompts = list(self.spec.prompts)
        if not prompts:
            written = None if self.written is None else self.written.open()
            prompts = beginnings(texts_of(self.source, written, tokenizer), tokenizer, self.spec)
        found = write_samples(model, tokenizer, prompts, self.spec.new_tokens, progress)
        (folder / SAMPLES_FILE).write_bytes(_SAMPLES.dump_json(found, indent=1))
        return {"samples": len(found)}


def load_samples(written: Artifact) -> list[Sample]:
    """What a stage wrote."""
    return _SAMPLES.validate_json((written.open() / SAMPLES_FILE).read_bytes())
