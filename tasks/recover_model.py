"""The stage that trains a compressed model back, after its dense teacher or by itself."""

import json
from pathlib import Path
from typing import ClassVar

from foldstack.compression.training.recovery import Recovery
from foldstack.tasks.compress_model import CARD_FILE
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.models import MODEL_FOLDER, model_folder, open_model
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

HISTORY_FILE = "training.jsonl"
RELOAD_FILE = "reload_check.json"


class RecoverModel(ComputedStage):
    """A compressed model directory, of the same structure and with other weights."""

    stage: ClassVar[str] = "recover_model"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "accelerate")
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution", "name"})

    compressed: Artifact
    windows: Artifact
    settings: Recovery
    teacher: ModelRef | None = None
    """The dense model, where `settings` distils."""
    dtype: Dtype = "auto"
    execution: Execution = Execution()
    name: str = ""
    """What the variant is called, e.g. "svd_llm 0.20"."""

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.checkpoints.checkpoint",
            "foldstack.compression.checkpoints.model_card",
            "foldstack.compression.training.recovery",
            "foldstack.compression.structure.size",
        )

    @property
    def label(self) -> str:
        return f"recover {self.name}".strip()

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.checkpoints.checkpoint import check_reload, load_plan, save_model
        from foldstack.compression.checkpoints.model_card import (
            load_facts,
            save_facts,
            write_model_card,
        )
        from foldstack.compression.structure.size import size_of
        from foldstack.compression.text.calibration import Windows
        from foldstack.compression.training.recovery import recover

        model = open_model(self.compressed, self.dtype, self.execution)
        teacher = open_model(self.teacher, self.dtype, self.execution) if self.teacher else None
        windows = Windows.load(self.windows.open()).tokens
        out, source = folder / MODEL_FOLDER, model_folder(self.compressed)
        plan = load_plan(source)
        result = recover(
            model, windows, self.settings, teacher=teacher, plan=plan, work=work, progress=progress
        )
        recovered = result.model.cpu().eval()
        size = size_of(recovered)
        grade = save_model(recovered, out, tokenizer_from=source, plan=plan)
        card = load_facts(self.compressed.folder / CARD_FILE)
        card = card.then(f"Trained back: {self.settings!r}", **{self.stage: self.fingerprint})
        save_facts(folder / CARD_FILE, card)
        write_model_card(out, card)
        progress("check in a fresh process", 0, 1)
        report = check_reload(recovered, out, tokenizer_from=source)
        (folder / RELOAD_FILE).write_text(json.dumps(report.as_dict(), indent=1))
        lines = [json.dumps(row) + "\n" for row in result.history]
        (folder / HISTORY_FILE).write_text("".join(lines))
        return {
            "grade": grade,
            "steps": len(result.history),
            "tokens": result.tokens,
            "seconds_training": result.seconds,
            "first_loss": result.history[0]["loss"] if result.history else None,
            "last_loss": result.history[-1]["loss"] if result.history else None,
            "validation_before": result.validation_before,
            "validation_after": result.validation_after,
            "is_as_it_was": result.is_worse,
            **size.as_dict(),
        }


def load_history(recovered: Artifact) -> list[dict[str, float]]:
    """One row per optimizer step."""
    text = (recovered.open() / HISTORY_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
