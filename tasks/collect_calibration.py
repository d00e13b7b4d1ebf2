"""The stage that cuts text into token windows: for statistics, or for recovery."""

from pathlib import Path
from typing import ClassVar, Literal

from foldstack.compression.text.calibration import WindowSpec
from foldstack.compression.text.corpus import TextSource
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.manifest import Facts


class CollectCalibration(ComputedStage):
    """Token windows of equal length, and where documents begin in them."""

    stage: ClassVar[str] = "collect_calibration"
    packages: ClassVar[tuple[str, ...]] = ("transformers", "tokenizers")
    # The digest says which text it is; where it lies changes nothing.
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"source", "purpose"})

    model: ModelRef
    source: TextSource
    source_digest: str
    windows: WindowSpec
    purpose: Literal["calibration", "recovery"] = "calibration"

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.text.calibration", "foldstack.compression.text.corpus")

    @property
    def label(self) -> str:
        return f"collect {self.purpose} windows"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.checkpoints.checkpoint import load_config, load_tokenizer
        from foldstack.compression.text.calibration import check_tokens, token_windows
        from foldstack.compression.text.corpus import documents

        model = self.model.open()
        tokenizer = load_tokenizer(model)
        windows = token_windows(tokenizer, documents(self.source), self.windows)
        check_tokens(windows.tokens, load_config(model).get_text_config(decoder=True).vocab_size)
        windows.save(folder)
        return {"corpus": self.source.corpus, **windows.facts}
