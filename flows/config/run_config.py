"""RunConfig: the YAML of a run, and what becomes of it."""

import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.records import PerplexityProtocol
from foldstack.compression.evaluation.samples import SampleSpec
from foldstack.compression.evaluation.speed import SpeedSpec
from foldstack.compression.evaluation.tracks.result import BENCHMARKS_TRACK, TEXT_TRACK
from foldstack.compression.evaluation.tracks.sequential import SequentialRule
from foldstack.compression.evaluation.tracks.settings import Name, Track
from foldstack.compression.evaluation.tracks.verdict import VerdictRule
from foldstack.compression.export.forms import Form
from foldstack.compression.statistics.gathering import Kind
from foldstack.compression.statistics.sensitivity import SCORE_TOKENS
from foldstack.compression.text.calibration import WindowSpec
from foldstack.compression.text.corpus import TextSource
from foldstack.compression.training.recovery import Recovery
from foldstack.flows.config.config_errors import problems
from foldstack.flows.config.config_file import find_config, read_config
from foldstack.flows.config.method_entries import AnyEntry, Seed, Sparsity, Variant, expand
from foldstack.flows.config.track_presets import with_preset
from foldstack.tasks.environment.execution import Dtype
from foldstack.tasks.environment.home import foldstack_home, store_url
from foldstack.tasks.environment.redaction import redacted

Limit = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        hide_input_in_errors=True,  # Prefect logs such errors, and the input may be a secret
    )


class ModelChoice(_Section):
    """The model to compress."""

    name: str = "reference"
    """"reference" (comes with foldstack), a hub id, a local directory, or a GGUF file."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the run records the commit that it stands for."""
    dtype: Dtype = "auto"
    """Precision to compute in; auto: the one that the weights are stored in."""
    device: str = "auto"
    """auto: a GPU where there is one, else the CPU."""

    @property
    def short_name(self) -> str:
        """The last part of the name, for titles and folders: never one that leads elsewhere."""
        return Path(os.path.abspath(self.name)).name.removesuffix(".gguf") or "model"


class Calibration(WindowSpec):
    """The text that statistics are gathered on, and how it is cut into windows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    source: TextSource = TextSource(split="train")


class StatisticsChoice(_Section):
    """What the one pass over the calibration windows gathers."""

    kinds: tuple[Kind, ...] = ("gram", "similarity")
    """All by default, so that a method that is added later finds what it needs."""
    batch_size: int = Field(default=8, ge=1)
    """Windows per forward pass."""
    shards: int = Field(default=1, ge=1)
    """Parts of the windows that are passed through the model side by side; their sums are added."""


class SensitivityChoice(_Section):
    """How variants are scored alone in the dense model, where a method asks for that."""

    tokens: int = Field(default=SCORE_TOKENS, ge=1)
    """Of the calibration windows, in whole windows from the first one."""
    shards: int = Field(default=1, ge=1)
    """Parts of the blocks that are scored side by side."""


class RecoveryChoice(Recovery):
    """How compressed models are trained back, and on what."""

    source: TextSource = TextSource(split="train")
    windows: WindowSpec = WindowSpec(seed=1)
    processes: int = Field(default=1, ge=1)
    """Processes that share the model and each batch out between them (FSDP), one on each GPU, for
    what one GPU does not hold; the steps are those of one process."""
    finalist_steps: int = Field(default=16, ge=1)
    """Steps that every finalist of a search gets (`finalists`), at most `steps`, before the best is
    kept and trained for all of them."""

    @model_validator(mode="after")
    def _batches_can_be_shared_out(self) -> Self:
        if self.batch_size % self.processes:
            raise ValueError(
                f"batch_size is shared out over the processes; {self.batch_size} is not a multiple "
                f"of {self.processes}"
            )
        return self


class PerplexityChoice(_Section):
    """Text and protocol of perplexity and bits per byte."""

    source: TextSource = TextSource(split="test")
    protocol: PerplexityProtocol = PerplexityProtocol()


class Evaluation(_Section):
    """What every model of the sweep is measured by."""

    perplexity: PerplexityChoice = PerplexityChoice()
    benchmarks: tuple[str, ...] = ()
    """lm-eval tasks: those that come with foldstack, with lm-eval, or under `include_paths`."""
    include_paths: tuple[Path, ...] = ()
    """Folders with task YAML files of your own."""
    limit: Limit | dict[str, Limit] | None = None
    """Items per benchmark, from its beginning; or a number for each that is not to be whole."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; null leaves it to the benchmark."""
    batch_size: int = Field(default=8, ge=1)
    preset: str | None = None
    """Tracks to begin with: llmcbench, kick or quick; `tracks` adds to them, changes them, or sets
    one to null. A resolved config has the tracks in its place."""
    tracks: dict[Name, Track] = {}
    """Questions about a model by name, each measured and cached by itself."""
    verdict: VerdictRule = VerdictRule()
    """When a compressed model matches the dense one."""
    sequential: SequentialRule | None = None
    """Tracks are read until each verdict is known; null: every item of every model."""
    samples: SampleSpec | None = None
    """Prompts that every model continues, to be read side by side in the report; null: none."""

    @model_validator(mode="before")
    @classmethod
    def _preset_is_tracks(cls, value: Any) -> Any:
        return with_preset(value) if isinstance(value, Mapping) else value

    @field_validator("tracks")
    @classmethod
    def _names_are_free(cls, value: dict[str, Track]) -> dict[str, Track]:
        if taken := sorted({TEXT_TRACK, BENCHMARKS_TRACK} & value.keys()):
            raise ValueError(
                f"{taken[0]} is the track of what is measured anyway; give yours another name"
            )
        return value

    @field_validator("include_paths")
    @classmethod
    def _know_the_users_home(cls, value: tuple[Path, ...]) -> tuple[Path, ...]:
        return tuple(path.expanduser() for path in value)

    @model_validator(mode="after")
    def _limits_are_of_benchmarks(self) -> Self:
        limited = self.limit if isinstance(self.limit, dict) else {}
        if strangers := [name for name in limited if name not in self.benchmarks]:
            known = ", ".join(self.benchmarks) or "none"
            raise ValueError(f"limit names {strangers[0]}, and the benchmarks are {known}")
        return self

    @property
    def limits(self) -> dict[str, int | None]:
        """Items of each benchmark; None for all."""
        limit = self.limit
        if isinstance(limit, dict):
            return {name: limit.get(name) for name in self.benchmarks}
        return dict.fromkeys(self.benchmarks, limit)


class Speed(SpeedSpec):
    """How fast the models are: each in turns with the dense one, after everything else."""

    enabled: bool = True
    threads: int = Field(default=0, ge=0)
    """Threads that torch computes with; 0: as many as there are cores. Small models like one."""


class Tracking(_Section):
    """Where MLflow runs go."""

    enabled: bool = True
    uri: str = ""
    """MLflow tracking URI; when empty MLFLOW_TRACKING_URI, else an SQLite file in the home."""
    experiment: str = ""
    """When empty, foldstack/<model>."""
    register_best: bool = True
    """Register the best variant at each sparsity as a version of foldstack-<model>."""
    upload_models: Literal["best", "all", "none"] = "best"
    """Whose weights MLflow holds, so that `mlflow.transformers.load_model` finds them: the best
    variant's at each sparsity, every variant's, or nobody's (then it knows where they lie)."""

    @field_validator("uri")
    @classmethod
    def _holds_no_password(cls, value: str) -> str:
        # The config is written into reports, and into the parameters of flow runs.
        if redacted(value) != value:
            raise ValueError(
                "tracking.uri must hold no password; set it without one, and "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return value


class Output(_Section):
    """Where results are kept."""

    home: Path = Field(default_factory=foldstack_home)
    """Holds the store, reports and the MLflow file; by default FOLDSTACK_HOME, else runs/."""
    store: str = Field(default_factory=store_url)
    """Object storage for artifacts of machines that share no disk, e.g. s3://bucket/prefix; by
    default FOLDSTACK_STORE, else none. The store in the home is then this machine's part of it."""

    @field_validator("home")
    @classmethod
    def _can_be_a_path(cls, value: Path) -> Path:
        if not str(value).isprintable():
            raise ValueError(f"output.home must be a path, got {str(value)!r}")
        return value

    @field_validator("store")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if value and not re.fullmatch(r"[a-z][a-z0-9+]*://[^\s@]+", value):
            raise ValueError(
                "output.store must be an address like s3://bucket/prefix, without a password; got "
                f"{redacted(value)!r}"
            )
        return value


class ExecutionChoice(_Section):
    """What stages run on."""

    engine: Literal["processes", "dask"] = "processes"
    """processes: of this machine; dask: the workers of a Dask scheduler, also of other machines."""
    address: str = ""
    """The Dask scheduler's, e.g. tcp://127.0.0.1:8786."""

    patience: float | None = Field(default=None, gt=1)
    """A stage that takes so many times what the plan expects of it, and ten minutes more, is ended
    and tried again; null: it may take as long as it likes. Not of Dask's workers."""

    @model_validator(mode="after")
    def _address_belongs_to_dask(self) -> Self:
        if self.engine == "dask" and not re.fullmatch(r"(tcp|tls)://[^\s/@]+:\d+", self.address):
            raise ValueError(
                "execution.address must be where the Dask scheduler listens, like "
                f"tcp://127.0.0.1:8786, got {redacted(self.address)!r}"
            )
        if self.engine != "dask" and self.address:
            raise ValueError(
                f"execution.address is for Dask, and execution.engine is {self.engine}; set it to "
                "dask"
            )
        return self


class RunConfig(_Section):
    """One sweep: a model, methods times sparsities times seeds, recovery, and evaluation."""

    name: str = ""
    """Title of the sweep; when empty it is made from the model and the methods."""
    model: ModelChoice = ModelChoice()
    calibration: Calibration = Calibration()
    statistics: StatisticsChoice = StatisticsChoice()
    sensitivity: SensitivityChoice = SensitivityChoice()
    methods: tuple[AnyEntry, ...] = Field(min_length=1)
    """Each entry names a method and sets what is not to be its default."""
    sparsities: tuple[Sparsity, ...] = Field(default=(0.2,), min_length=1)
    """Fractions of the whole model's stored parameters to remove."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    recovery: RecoveryChoice = RecoveryChoice(steps=0)
    """Left out, or with steps 0: no recovery."""
    evaluation: Evaluation = Evaluation()
    speed: Speed = Speed()
    export: tuple[str, ...] = ()
    """Forms that every model is written in, the dense one too, and what it decodes with in their
    engines: vllm, gguf, gguf-q4_k_m (any scheme of llama.cpp's), deci, openelm, mlx, stock."""
    target: str = ""
    """A form of those: what it cannot keep is refused before anything is computed, and where a
    method has multiples (of ranks, of MLP widths), they are those that it wants."""
    best_by: Literal["quality", "speed_at_quality", "size_at_quality"] = "quality"
    """What the best variant of a sparsity is best in, in tables, aliases and at the gate: quality:
    the lowest in bits per byte; else the fastest or the smallest of those near the lowest."""
    best_within: float = Field(default=0.01, ge=0)
    """How near: the lowest bits per byte times one plus this; what the text cannot tell from the
    lowest is near it too."""
    tracking: Tracking = Tracking()
    output: Output = Field(default_factory=Output)
    execution: ExecutionChoice = ExecutionChoice()
    workers: int | Literal["auto"] = "auto"
    """Stages that run at once; auto: one on a GPU, else as many as there are cores. Of Dask's
    workers each runs one."""

    @field_validator("model", mode="before")
    @classmethod
    def _a_name_alone_is_a_model(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("methods", mode="before")
    @classmethod
    def _names_alone_are_methods(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [{"name": entry} if isinstance(entry, str) else entry for entry in value]
        return value

    @field_validator("export")
    @classmethod
    def _forms_are_known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            names = [Form.of(name).name for name in value]
        except InputError as error:
            raise ValueError(str(error)) from None
        return tuple(dict.fromkeys(names))

    @field_validator("target")
    @classmethod
    def _target_is_known(cls, value: str) -> str:
        try:
            return Form.of(value).name if value else ""
        except InputError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _workers_are_ours(self) -> Self:
        if self.execution.engine == "dask" and self.workers != "auto":
            raise ValueError(
                "workers is for execution.engine processes; with dask as many stages run at once "
                f"as it has workers, got {self.workers}"
            )
        return self

    @model_validator(mode="after")
    def _windows_are_enough(self) -> Self:
        if self.statistics.shards > self.calibration.num_windows:
            raise ValueError(
                f"statistics.shards may be at most the {self.calibration.num_windows} windows of "
                f"calibration.num_windows, got {self.statistics.shards}"
            )
        return self

    @model_validator(mode="after")
    def _variants_are_valid(self) -> Self:
        for index, entry in enumerate(self.methods):
            try:
                expand([entry], self.sparsities, self.seeds, self.target)
            except ValidationError as error:
                reasons = problems(error, type(entry).model_json_schema())
                raise ValueError(f"methods[{index}]: {reasons[0]}") from None
        expand(self.methods, self.sparsities, self.seeds, self.target)
        return self

    @model_validator(mode="after")
    def _finalists_can_be_healed(self) -> Self:
        contest = next((v for v in self.variants if len(v.method.contenders) > 1), None)
        if contest is not None and not self.recovery.steps:
            raise ValueError(
                f"{contest.label} has {len(contest.method.contenders)} finalists, which recovery "
                "heals before one is kept: set recovery.steps and recovery.source"
            )
        return self

    @model_validator(mode="after")
    def _best_can_be_told(self) -> Self:
        if self.best_by == "speed_at_quality" and not self.speed.enabled:
            raise ValueError("best_by speed_at_quality needs speed.enabled, which is false")
        return self

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Every (method, sparsity, seed)."""
        return expand(self.methods, self.sparsities, self.seeds, self.target)

    @property
    def recovery_settings(self) -> Recovery:
        """The part of `recovery` that the library takes."""
        return Recovery(**{name: getattr(self.recovery, name) for name in Recovery.model_fields})

    @property
    def calibration_windows(self) -> WindowSpec:
        """The part of `calibration` that says how text is cut."""
        spec = {name: getattr(self.calibration, name) for name in WindowSpec.model_fields}
        return WindowSpec(**spec)

    @property
    def title(self) -> str:
        """`sweep reference 4 methods x 2`."""
        if self.name:
            return self.name
        names = list(dict.fromkeys(variant.name for variant in self.variants))
        what = names[0] if len(names) == 1 else f"{len(names)} methods"
        return f"sweep {self.model.short_name} {what} x {len(self.variants) // len(names)}"


@cache
def json_schema() -> dict[str, Any]:
    """JSON schema of the YAML files, for editors."""
    schema = RunConfig.model_json_schema(mode="validation")
    schema["title"] = "foldstack run"
    return schema


def load_config(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in a file or recipe, with `key.sub=value` overrides.

    Raises:
        InputError: everything that is wrong with it, a sentence each.
    """
    path = find_config(name)
    return parse_config(read_config(path, overrides), where=str(path))


def parse_config(data: Mapping[str, Any], where: str = "the config") -> RunConfig:
    """The config that plain data stands for.

    Raises:
        InputError: everything that is wrong with it, a sentence each.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise InputError(f"{where}: " + "; ".join(problems(error, json_schema()))) from None


def to_yaml(config: RunConfig) -> str:
    """The config with every default written out, as YAML that can be run again."""
    text: str = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    return text
