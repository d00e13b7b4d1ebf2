"""The stage in which a method makes the model smaller, and a fresh process proves the result."""

import json
from pathlib import Path
from typing import ClassVar

from foldstack.compression.methods import AnyMethod
from foldstack.tasks.benchmark_speed import load_seconds
from foldstack.tasks.environment.execution import Dtype, Execution
from foldstack.tasks.models import MODEL_FOLDER, model_folder, open_model
from foldstack.tasks.rank_blocks import load_ranking
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.score_variants import load_sensitivity
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

RELOAD_FILE = "reload_check.json"
CARD_FILE = "card.json"


class CompressModel(ComputedStage):
    """A compressed model directory and its plan."""

    stage: ClassVar[str] = "compress_model"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "safetensors")
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution", "name"})

    model: ModelRef
    calibration: Artifact
    statistics: Artifact
    ranking: Artifact
    sensitivity: tuple[Artifact, ...] = ()
    """Scores of the variants that the method asks for, a family or a shard of one each."""
    seconds: tuple[Artifact, ...] = ()
    """What variants save of the time, where the method asks for that, a family each."""
    method: AnyMethod
    dtype: Dtype = "auto"
    execution: Execution = Execution()
    name: str = ""
    """What the variant is called, e.g. "svd_llm 0.20"."""

    def modules(self) -> tuple[str, ...]:
        return (
            *self.method.modules(),
            "foldstack.compression.checkpoints.checkpoint",
            "foldstack.compression.checkpoints.model_card",
            "foldstack.compression.export.what_runs",
            "foldstack.compression.structure.folding",
            "foldstack.compression.structure.size",
            "foldstack.compression.structure.surgery",
        )

    @property
    def label(self) -> str:
        return f"compress {self.name or self.method.name}"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.checkpoints.checkpoint import check_reload, save_model
        from foldstack.compression.checkpoints.model_card import (
            CardFacts,
            save_facts,
            write_model_card,
        )
        from foldstack.compression.export.what_runs import programs_of
        from foldstack.compression.methods.method import Evidence, missed
        from foldstack.compression.statistics.gathering import Statistics
        from foldstack.compression.structure.architectures import architecture_of
        from foldstack.compression.structure.folding import fold, unpaid_factors
        from foldstack.compression.structure.size import size_of, sparsity_between
        from foldstack.compression.structure.surgery import cut
        from foldstack.compression.text.calibration import Windows

        model = open_model(self.model, self.dtype, self.execution, blocks="where they fit")
        evidence = Evidence(
            calibration=Windows.load(self.calibration.open()).tokens,
            statistics=Statistics.load(self.statistics.open()),
            ranking=load_ranking(self.ranking),
            sensitivity=load_sensitivity(self.sensitivity),
            seconds=load_seconds(self.seconds),
            work=work,
            progress=progress,
        )
        # On the CPU, where the fresh process will be: other hardware computes other last digits.
        change = self.method.compress(model, evidence)
        smaller, plan = cut(model, change, share_memory=True).cpu(), change.plan
        unpaid = unpaid_factors(smaller)
        smaller, plan = fold(smaller, plan)
        forecast = {f"forecast/{name}": value for name, value in change.forecast.items()}
        del change  # with those of its tensors that were copied
        size, dense = size_of(smaller), size_of(model)
        out = folder / MODEL_FOLDER
        grade = save_model(smaller, out, tokenizer_from=model_folder(self.model), plan=plan)
        card = CardFacts(
            base_model=self.model.name,
            model_type=architecture_of(model).model_type,
            grade=grade,
            steps=(*filter(None, [self.model.origin]), f"Compressed: {self.method!r}"),
            dense=dense,
            compressed=size,
            fingerprints={"base model": self.model.fingerprint, self.stage: self.fingerprint},
            programs=programs_of(plan),
        )
        save_facts(folder / CARD_FILE, card)
        write_model_card(out, card)
        progress("check in a fresh process", 0, 1)
        report = check_reload(smaller, out, tokenizer_from=model_folder(self.model))
        (folder / RELOAD_FILE).write_text(json.dumps(report.as_dict(), indent=1))
        realised = sparsity_between(dense, size)
        return {
            "grade": grade,
            "sparsity": self.method.sparsity,
            "realised_sparsity": realised,
            "missed": missed(self.method, realised),
            "multiplied_out": len(unpaid),
            "block_linear_sparsity": 1
            - size.block_linear_parameters / dense.block_linear_parameters,
            **size.as_dict(),
            **forecast,
        }
