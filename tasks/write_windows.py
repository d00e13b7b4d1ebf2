"""The stage in which the dense model writes token windows itself, where no text is given."""

from pathlib import Path
from typing import ClassVar, Literal

from foldstack.compression.text.calibration import WindowSpec
from foldstack.compression.text.corpus import SELF, TextSource
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.models import model_folder, open_model
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.manifest import Facts


class WriteWindows(ComputedStage):
    """Token windows as of `CollectCalibration`, sampled from the model."""

    stage: ClassVar[str] = "write_windows"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution", "purpose"})

    model: ModelRef
    split: str
    temperature: float
    windows: WindowSpec
    dtype: Dtype = "auto"
    execution: Execution = Execution()
    purpose: Literal["calibration", "recovery", "evaluation"] = "calibration"

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.text.self_written",
            "foldstack.compression.checkpoints.checkpoint",
        )

    @property
    def label(self) -> str:
        return f"write {self.purpose} windows"

    @property
    def source(self) -> TextSource:
        """What it stands for in a config."""
        return TextSource(corpus=SELF, split=self.split, temperature=self.temperature)

    @property
    def source_digest(self) -> str:
        """The text is known by what it is made from."""
        return self.fingerprint

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.checkpoints.checkpoint import load_tokenizer
        from foldstack.compression.out_of_memory import with_smaller_batches
        from foldstack.compression.text.self_written import WRITING_BATCH, write_windows

        progress("load the model", 0, 1)
        model = open_model(self.model, self.dtype, self.execution)
        tokenizer = load_tokenizer(model_folder(self.model))
        windows = with_smaller_batches(
            lambda batch_size: write_windows(
                model,
                tokenizer,
                self.windows,
                split=self.split,
                temperature=self.temperature,
                batch_size=batch_size,
                progress=progress,
            ),
            WRITING_BATCH,
            self.windows.window_tokens,
        )
        windows.save(folder)
        return {"corpus": SELF, **windows.facts}
