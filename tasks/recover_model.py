"""The stages that train compressed models back, and keep the one of several that heals best."""

import csv
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from foldstack.compression.training.recovery import Recovery
from foldstack.tasks.compress_model import CARD_FILE
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.models import MODEL_FOLDER, model_folder, open_model
from foldstack.tasks.running.ranks import compute_together, fsdp_environment, is_rank, part
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

if TYPE_CHECKING:
    from torch import Tensor

HISTORY_FILE = "training.jsonl"
RELOAD_FILE = "reload_check.json"
TABLE_FILE = "finalists.csv"


class RecoverModel(ComputedStage):
    """A compressed model directory, of the same structure and with other weights."""

    stage: ClassVar[str] = "recover_model"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "peft", "accelerate")
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution", "processes", "name"})

    compressed: Artifact
    windows: Artifact
    settings: Recovery
    teacher: ModelRef | None = None
    """The dense model, where `settings` distils."""
    dtype: Dtype = "auto"
    execution: Execution = Execution()
    processes: int = 1
    """How many share the models out between them while they train."""
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

        if self.processes > 1 and not is_rank():
            environment = fsdp_environment(self.execution, self.processes)
            return compute_together(self, self.processes, environment, folder, work, progress)
        place = self.execution
        if is_rank():  # what it computes with are its parts of the whole models
            place = place.model_copy(update={"device": "cpu"})
        model = open_model(self.compressed, self.dtype, place)
        teacher = open_model(self.teacher, self.dtype, place) if self.teacher else None
        windows = Windows.load(self.windows.open()).tokens
        out, source = folder / MODEL_FOLDER, model_folder(self.compressed)
        plan = load_plan(source)
        result = recover(
            model, windows, self.settings, teacher=teacher, plan=plan, work=work, progress=progress
        )
        if not part():
            return {}
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


class ChooseFinalist(ComputedStage):
    """A compressed model directory: that of the finalist which is best once it is healed, as it was
    before."""

    stage: ClassVar[str] = "choose_finalist"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution", "name"})

    finalists: tuple[Artifact, ...]
    healed: tuple[Artifact, ...]
    """The same models after a few steps of recovery, one for one."""
    windows: Artifact
    """Its last ones decide: the first `num_trained` are what recovery trains on."""
    num_trained: int
    dtype: Dtype = "auto"
    execution: Execution = Execution()
    name: str = ""

    def modules(self) -> tuple[str, ...]:
        return (
            "foldstack.compression.checkpoints.checkpoint",
            "foldstack.compression.training.finalists",
            "foldstack.compression.evaluation.token_losses",
        )

    @property
    def label(self) -> str:
        return f"choose {self.name}".strip()

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.text.calibration import Windows
        from foldstack.compression.training.finalists import Finalist, told, winner

        windows = Windows.load(self.windows.open()).tokens[self.num_trained :].long()
        found = []
        for number, (made, healed) in enumerate(zip(self.finalists, self.healed, strict=True)):
            progress("loss of finalists", number, len(self.finalists))
            facts = made.manifest().facts
            found.append(
                Finalist(
                    name=f"{facts['num_blocks']} blocks",
                    before=self._losses(made, windows),
                    healed=self._losses(healed, windows),
                    flops=int(str(facts["flops_per_token"])),
                )
            )
        kept = winner(found)
        with (folder / TABLE_FILE).open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(["finalist", "window", "before", "healed"])
            for number, each in enumerate(found):
                pairs = enumerate(zip(each.before, each.healed, strict=True))
                writer.writerows([number + 1, window, *losses] for window, losses in pairs)
        chosen = self.finalists[kept]
        shutil.copytree(model_folder(chosen), folder / MODEL_FOLDER)
        for name in (CARD_FILE, RELOAD_FILE):
            shutil.copy2(chosen.folder / name, folder / name)
        steps = int(str(self.healed[kept].manifest().facts["steps"]))
        return {
            **chosen.manifest().facts,
            "finalist": kept + 1,
            "contest": told(found, kept, steps),
        }

    def _losses(self, model: Artifact, windows: "Tensor") -> tuple[float, ...]:
        """Mean over the tokens of each window, in nats."""
        import torch

        from foldstack.compression.evaluation.token_losses import plain_head, token_losses

        opened = open_model(model, self.dtype, self.execution)
        with torch.inference_mode():
            head = plain_head(opened, windows[0])
            rows = [token_losses(opened, window[None], head).mean() for window in windows]
        return tuple(float(row) for row in rows)


def load_history(recovered: Artifact) -> list[dict[str, float]]:
    """One row per optimizer step."""
    text = (recovered.open() / HISTORY_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
