"""The stages that write a model for another program, and measure how fast that decodes it."""

from pathlib import Path
from typing import ClassVar

from foldstack.tasks.environment.execution import Execution
from foldstack.tasks.models import MODEL_FOLDER, model_folder
from foldstack.tasks.running.worker_pool import ComputedStage
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.store.manifest import Facts

RATES_FILE = "rates.json"
REFUSED = "refused"
DENSE, MINE = "dense", "this"


class ExportModel(ComputedStage):
    """A model in the form that another program loads, compared with transformers there.

    What has no such form makes an artifact as well, which says why: a method that no engine knows
    is a result of the comparison, and no failure of it.
    """

    stage: ClassVar[str] = "export_model"
    packages: ClassVar[tuple[str, ...]] = ("torch", "transformers", "safetensors", "gguf")
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"execution", "name"})

    model: ModelRef | Artifact
    form: str
    """"gguf-q4_k_m", "vllm": see `forms`."""
    engines: tuple[str, ...] = ()
    """Those that are here, with their versions: with others it is checked again."""
    execution: Execution = Execution()
    name: str = ""

    def modules(self) -> tuple[str, ...]:
        # These run as files, which no import says: in an engine, and in mlx-lm.
        files = ("in_engine", "foldstack_mlx")
        return tuple(f"foldstack.compression.export.{name}" for name in ("exported", *files))

    @property
    def label(self) -> str:
        return f"export {self.name} to {self.form}"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        from foldstack.compression.export.exported import export_model
        from foldstack.compression.export.forms import Form, NoSuchForm

        progress("write and check", 0, 1)
        self.execution.begin()
        try:
            report = export_model(
                model_folder(self.model), Form.of(self.form), folder / MODEL_FOLDER
            )
        except NoSuchForm as error:
            return {REFUSED: str(error)}
        facts: Facts = {
            "form": report.form,
            "parameters": report.parameters_after,
            "bytes": report.bytes,
            "checked_with": ", ".join(check.version for check in report.checks) or None,
        }
        if report.checks:
            facts["difference"] = max(check.difference for check in report.checks)
            facts["greedy_is_equal"] = all(check.greedy_is_equal for check in report.checks)
        return facts


class BenchmarkEngine(ComputedStage):
    """Decoding speed of an exported model in its engine, in turns with the dense one's export."""

    stage: ClassVar[str] = "benchmark_engine"
    packages: ClassVar[tuple[str, ...]] = ()
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"name"})

    dense_model: ModelRef
    dense: Artifact
    """The dense model's export."""
    model: ModelRef | Artifact
    exported: Artifact
    form: str
    engine: str
    """The one that is measured in, with its version; empty where none is here."""
    machine: str
    """In words; on another one it is measured again."""
    execution: Execution
    """Part of the fingerprint here: other threads, another speed."""
    prompt_tokens: int
    new_tokens: int
    turns: int
    name: str = ""

    def modules(self) -> tuple[str, ...]:
        return tuple(f"foldstack.compression.export.{name}" for name in ("engines", "in_engine"))

    @property
    def label(self) -> str:
        return f"bench {self.name} as {self.form}"

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        import json

        from foldstack.compression.evaluation.generation import make_prompt
        from foldstack.compression.evaluation.speed import Spread
        from foldstack.compression.export.engines import engine_of, rates_in_turns
        from foldstack.compression.export.export_report import ExportReport
        from foldstack.compression.export.forms import Form

        progress("decode in turns", 0, 1)
        made = {DENSE: (self.dense, self.dense_model), MINE: (self.exported, self.model)}
        engine = engine_of(Form.of(self.form))
        if engine is None or any(
            REFUSED in exported.manifest().facts for exported, _ in made.values()
        ):
            return {}
        paths, vocabulary = {}, 0
        for name, (exported, model) in made.items():
            out = exported.open() / MODEL_FOLDER
            report = ExportReport.load(out)
            paths[name], vocabulary = report.path(out, model_folder(model)), report.vocabulary
        if self.dense == self.exported:
            del paths[MINE]
        prompt = make_prompt(self.prompt_tokens, 1, vocabulary, seed=0)[0].tolist()
        rates = rates_in_turns(
            engine, paths, prompt, generate=self.new_tokens, turns=self.turns,
            threads=self.execution.threads,
        )  # fmt: skip
        (folder / RATES_FILE).write_text(json.dumps(rates, indent=1))
        mine, dense = rates.get(MINE, rates[DENSE]), rates[DENSE]
        ratio = Spread.of([one / other for one, other in zip(mine, dense, strict=True)])
        return {
            "decode_tokens_per_second": Spread.of(mine).median,
            "dense_decode_tokens_per_second": Spread.of(dense).median,
            "decode_speedup": ratio.median,
            "decode_speedup_lower_quartile": ratio.lower_quartile,
            "decode_speedup_upper_quartile": ratio.upper_quartile,
        }
