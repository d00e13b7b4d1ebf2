"""The stages that measure a model, as a config says: quality, and speed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from foldstack.compression.evaluation.speed import SpeedSpec
from foldstack.compression.export.engines import ENGINES, engine_of
from foldstack.compression.export.forms import ENGINES_OF, Form
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.text.corpus import source_digest
from foldstack.flows.config.run_config import RunConfig
from foldstack.tasks.benchmark_speed import BenchmarkAssistant, BenchmarkSpeed, TimeVariants
from foldstack.tasks.environment.execution import Execution, cores
from foldstack.tasks.environment.hardware import hardware
from foldstack.tasks.evaluate_model import EvaluateModel, benchmarks_digest
from foldstack.tasks.evaluate_track import EvaluateTrack, track_digest
from foldstack.tasks.export_model import BenchmarkEngine, ExportModel
from foldstack.tasks.stage import ModelRef
from foldstack.tasks.store.artifacts import Artifact
from foldstack.tasks.write_samples import WriteSamples


@dataclass(frozen=True)
class EvaluationDigests:
    """Of what evaluations read, beside the model."""

    text: str
    benchmarks: str
    written: Artifact | None = None
    """The text, where the dense model writes it."""
    tracks: Mapping[str, str] = field(default_factory=dict)
    """Of every track, by its name."""


def evaluation_digests(config: RunConfig, written: Artifact | None = None) -> EvaluationDigests:
    """Digests of the text and the task files that `config` evaluates on; `written` is the text
    where the dense model writes it.

    Raises:
        InputError: the text cannot be read.
    """
    evaluation = config.evaluation
    source = evaluation.perplexity.source
    return EvaluationDigests(
        source_digest(source) if written is None else written.fingerprint,
        benchmarks_digest(evaluation.benchmarks, evaluation.include_paths),
        written,
        {
            name: track_digest(track, evaluation.include_paths)
            for name, track in evaluation.tracks.items()
        },
    )


def evaluation_of(
    config: RunConfig,
    model: ModelRef | Artifact,
    name: str,
    execution: Execution,
    digests: EvaluationDigests,
) -> EvaluateModel:
    """The stage that evaluates `model` as `config` says."""
    evaluation = config.evaluation
    return EvaluateModel(
        model=model,
        source=evaluation.perplexity.source,
        source_digest=digests.text,
        written=digests.written,
        protocol=evaluation.perplexity.protocol,
        benchmarks=evaluation.limits,
        benchmarks_digest=digests.benchmarks,
        include_paths=evaluation.include_paths,
        num_fewshot=evaluation.num_fewshot,
        batch_size=evaluation.batch_size,
        dtype=config.model.dtype,
        execution=execution,
        name=name,
    )


def tracks_of(
    config: RunConfig,
    model: ModelRef | Artifact,
    name: str,
    execution: Execution,
    digests: EvaluationDigests,
    dense: Mapping[str, Artifact] | None = None,
) -> dict[str, EvaluateTrack]:
    """The stages that measure `model` on each track; `dense` has what the dense model made of them,
    which is read whole."""
    evaluation = config.evaluation
    is_stopped = evaluation.sequential is not None and dense is not None
    return {
        track_name: EvaluateTrack(
            model=model,
            track=track,
            digest=digests.tracks[track_name],
            dense=dense[track_name] if dense and (is_stopped or track.judge) else None,
            rule=evaluation.verdict if is_stopped else None,
            sequential=evaluation.sequential if is_stopped else None,
            include_paths=evaluation.include_paths,
            batch_size=evaluation.batch_size,
            dtype=config.model.dtype,
            execution=execution,
            track_name=track_name,
            name=name,
        )
        for track_name, track in evaluation.tracks.items()
    }


def samples_of(
    config: RunConfig,
    model: ModelRef | Artifact,
    name: str,
    execution: Execution,
    digests: EvaluationDigests,
) -> WriteSamples | None:
    """The stage that has `model` continue prompts; None where the config asks for none."""
    spec = config.evaluation.samples
    if spec is None:
        return None
    return WriteSamples(
        model=model,
        spec=spec,
        source=config.evaluation.perplexity.source,
        source_digest="" if spec.prompts else digests.text,
        written=None if spec.prompts else digests.written,
        dtype=config.model.dtype,
        execution=execution,
        name=name,
    )


def speed_of(
    config: RunConfig, dense: ModelRef, model: ModelRef | Artifact, name: str
) -> BenchmarkSpeed:
    """The stage that measures the speed of `model` in turns with `dense`."""
    return BenchmarkSpeed(
        dense=dense,
        model=model,
        spec=_speed_spec(config),
        execution=_alone(config),
        machine=hardware(),
        dtype=config.model.dtype,
        name=name,
    )


def assistant_of(
    config: RunConfig, dense: ModelRef, model: ModelRef | Artifact, name: str
) -> BenchmarkAssistant:
    """The stage that measures `model` as the assistant of `dense`."""
    return BenchmarkAssistant(
        dense=dense,
        model=model,
        prompt_tokens=config.speed.prompt_tokens,
        new_tokens=config.speed.new_tokens,
        turns=config.speed.repeats,
        execution=_alone(config),
        machine=hardware(),
        dtype=config.model.dtype,
        name=name,
    )


def exports_of(
    config: RunConfig, model: ModelRef | Artifact, name: str, execution: Execution
) -> dict[str, ExportModel]:
    """The stages that write `model` in every form that `config` names."""
    stages = {}
    for form in config.export:
        names = ENGINES_OF[Form.of(form).target]
        here = tuple(version for name in names if (version := ENGINES[name].version()))
        stages[form] = ExportModel(
            model=model, form=form, engines=here, execution=execution, name=name
        )
    return stages


def engine_speed_of(
    config: RunConfig,
    dense: tuple[ModelRef, Artifact],
    exported: tuple[ModelRef | Artifact, Artifact],
    form: str,
    name: str,
) -> BenchmarkEngine | None:
    """The stage that measures an export in its engine beside the dense model's; None where the
    engine is not here. Each of both is a model and its export."""
    engine = engine_of(Form.of(form))
    if engine is None:
        return None
    return BenchmarkEngine(
        dense_model=dense[0],
        dense=dense[1],
        model=exported[0],
        exported=exported[1],
        form=form,
        engine=engine.version(),
        machine=hardware(),
        execution=_alone(config),
        prompt_tokens=config.speed.prompt_tokens,
        new_tokens=config.speed.new_tokens,
        turns=config.speed.repeats,
        name=name,
    )


def timing_of(config: RunConfig, model: ModelRef, family: Family) -> TimeVariants:
    """The stage that measures what variants of `model` save of the time of the same request."""
    return TimeVariants(
        model=model,
        family=family,
        spec=_speed_spec(config),
        execution=_alone(config),
        machine=hardware(),
        dtype=config.model.dtype,
    )


def _speed_spec(config: RunConfig) -> SpeedSpec:
    return SpeedSpec(**{field: getattr(config.speed, field) for field in SpeedSpec.model_fields})


def _alone(config: RunConfig) -> Execution:
    """Of a stage beside which no other one runs."""
    return Execution(device=config.model.device, threads=config.speed.threads or cores())
