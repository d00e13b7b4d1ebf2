"""The stages of a run, laid out before any has run: each one's artifact is known by then."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from foldstack.compression.methods.method import Method
from foldstack.compression.statistics.sensitivity import FAMILIES
from foldstack.compression.storage.digest import digest_json
from foldstack.compression.text.calibration import WindowSpec
from foldstack.compression.text.corpus import SELF, TextSource, source_digest
from foldstack.flows.config.method_entries import Variant
from foldstack.flows.config.run_config import RunConfig
from foldstack.flows.running.measures import (
    EvaluationDigests,
    engine_speed_of,
    evaluation_digests,
    evaluation_of,
    exports_of,
    samples_of,
    speed_of,
    timing_of,
    tracks_of,
)
from foldstack.tasks.benchmark_speed import BenchmarkSpeed, TimeVariants
from foldstack.tasks.collect_calibration import CollectCalibration
from foldstack.tasks.compress_model import CompressModel
from foldstack.tasks.dequantize_model import find_model
from foldstack.tasks.environment.execution import Execution, cores
from foldstack.tasks.evaluate_model import EvaluateModel
from foldstack.tasks.evaluate_track import EvaluateTrack
from foldstack.tasks.export_model import BenchmarkEngine, ExportModel
from foldstack.tasks.gather_statistics import AddStatistics, GatherStatistics, Shard
from foldstack.tasks.rank_blocks import RankBlocks
from foldstack.tasks.recover_model import ChooseFinalist, RecoverModel
from foldstack.tasks.score_variants import ScoreVariants
from foldstack.tasks.stage import ModelRef, Stage
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.write_samples import WriteSamples
from foldstack.tasks.write_windows import WriteWindows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

DENSE = "dense"
_PARTS = {"compress_model": "finalist", "recover_model": "heal"}
TRACK = "track_"
"""What the name of a branch's part begins with that measures a track."""
EXPORT, ENGINE_SPEED = "export_", "engine_"
"""How the parts of a branch begin that write a form of its model, and measure it."""
Purpose = Literal["calibration", "recovery"]
CollectWindows = CollectCalibration | WriteWindows
"""From text, or from the dense model itself."""
DECIDING_WINDOWS = 32
"""Of the text of recovery, on which finalists are held against one another."""
WRITTEN_FOR_EVALUATION = 64
"""Windows that the dense model writes to be measured on, where no number of tokens is given."""


@dataclass(frozen=True)
class Branch:
    """What is done for one variant, or for the dense model."""

    label: str
    variant: Variant | None
    compress: CompressModel | ChooseFinalist | None
    before: EvaluateModel
    recover: RecoverModel | None = None
    after: EvaluateModel | None = None
    speed: BenchmarkSpeed | None = None
    tracks: Mapping[str, EvaluateTrack] = field(default_factory=dict)
    """Of the model that the branch ends with."""
    samples: WriteSamples | None = None
    """Of that model."""
    exports: dict[str, ExportModel] = field(default_factory=dict)
    """By the name of the form."""
    engine_speeds: dict[str, BenchmarkEngine] = field(default_factory=dict)
    """Of those forms whose engine is here."""
    contest: tuple[CompressModel | RecoverModel, ...] = ()
    """Where several models are made to keep one: each finalist, and each after a few steps."""

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages that are there, in their order, by the part they play."""
        parts: dict[str, Stage | None] = {
            **{f"{_PARTS[stage.stage]}_{number}": stage for number, stage in self._numbered()},
            "compress": self.compress,
            "evaluate_before": self.before,
            "recover": self.recover,
            "evaluate_after": self.after,
            **{f"{TRACK}{name}": stage for name, stage in self.tracks.items()},
            "samples": self.samples,
            **{EXPORT + form: stage for form, stage in self.exports.items()},
            "speed": self.speed,
            **{ENGINE_SPEED + form: stage for form, stage in self.engine_speeds.items()},
        }
        return {part: stage for part, stage in parts.items() if stage is not None}

    def _numbered(self) -> Iterator[tuple[int, Stage]]:
        """The stages of the contest, those of a kind from 1 on."""
        half = len(self.contest) // 2
        for index, stage in enumerate(self.contest):
            yield index % half + 1, stage

    @property
    def speeds(self) -> list[BenchmarkSpeed | BenchmarkEngine]:
        """The stages that are to run alone."""
        timed = (BenchmarkSpeed, BenchmarkEngine)
        return [stage for stage in self.stages.values() if isinstance(stage, timed)]

    @property
    def final_maker(self) -> CompressModel | ChooseFinalist | RecoverModel | None:
        """The stage that makes the branch's last model; None for the dense one."""
        return self.recover or self.compress

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything that is done."""
        return digest_json({part: stage.fingerprint for part, stage in self.stages.items()})


@dataclass(frozen=True)
class Layout:
    """All stages of one run."""

    config: RunConfig
    store: ArtifactStore
    model: ModelRef
    calibration: CollectWindows
    recovery_windows: CollectWindows | None
    contest_windows: CollectWindows | None
    """Those of recovery and some more, which decide between finalists; None where there are none.
    """
    evaluation_windows: WriteWindows | None
    """The text to measure on, where the dense model writes it."""
    shards: tuple[GatherStatistics, ...]
    statistics: GatherStatistics | AddStatistics
    """The only shard, or what adds them."""
    ranking: RankBlocks
    scores: tuple[ScoreVariants, ...]
    """Of the families of variants that a method asks for, in shards."""
    times: tuple[TimeVariants, ...]
    """Of the families of which a method asks for the time they save."""
    branches: tuple[Branch, ...]
    """The dense model's first."""
    on_paper: bool = False
    """Whether of the model there need be no more than a config."""

    def model_config(self) -> "PreTrainedConfig":
        """Of the dense model.

        Raises:
            InputError: the model is none that foldstack supports.
        """
        from foldstack.compression.checkpoints.agreement import read_config
        from foldstack.compression.checkpoints.checkpoint import load_config

        return (read_config if self.on_paper else load_config)(self.model.folder)

    @cached_property
    def workers(self) -> int:
        """Stages that run at once."""
        return num_workers(self.config)

    @property
    def stages(self) -> list[Stage]:
        """Every stage once, inputs before what is made from them, the speeds last."""
        return list({stage.fingerprint: stage for stage in self._in_order()}.values())

    @property
    def windows(self) -> list[CollectWindows]:
        """The stages that everything begins with."""
        stages = (
            self.calibration, self.recovery_windows, self.contest_windows, self.evaluation_windows,
        )  # fmt: skip
        wanted = {stage.fingerprint: stage for stage in stages if stage is not None}
        return list(wanted.values())  # one, where recovery trains on what calibration reads

    @property
    def before_speeds(self) -> list[Stage]:
        """The stages that may run side by side."""
        timed = (BenchmarkSpeed, BenchmarkEngine, TimeVariants)
        return [stage for stage in self.stages if not isinstance(stage, timed)]

    @property
    def resolved_config(self) -> RunConfig:
        """The config with the commit that a branch of the hub stood for."""
        folder = self.model.folder
        if folder.parent.name != "snapshots":  # how the hub's cache names a commit's folder
            return self.config
        pinned = self.config.model.model_copy(update={"revision": folder.name})
        return self.config.model_copy(update={"model": pinned})

    @property
    def report_folder(self) -> Path:
        """Where the comparison is written to."""
        return self.config.output.home / "sweeps" / f"{self.config.model.short_name}-{self.sweep}"

    @cached_property
    def sweep(self) -> str:
        """Digest of everything that is done: short, for tags and folders."""
        return digest_json([branch.fingerprint for branch in self.branches])[:12]

    def _in_order(self) -> Iterator[Stage]:
        yield from self.windows
        yield from self.times
        yield from self.shards
        yield self.statistics
        yield self.ranking
        yield from self.scores
        for branch in self.branches:
            yield from branch.contest
        for parts in (
            ("compress",),
            ("recover", "evaluate_before"),
            ("evaluate_after",),
            (*(TRACK + name for name in self.config.evaluation.tracks), "samples"),
        ):
            for branch in self.branches:
                yield from (branch.stages[part] for part in parts if part in branch.stages)
        for branch in self.branches:
            yield from branch.exports.values()
        for branch in self.branches:
            yield from branch.speeds


def lay_out(config: RunConfig, *, on_paper: ModelRef | None = None) -> Layout:
    """The stages of `config`; reads the model's and the texts' bytes, computes nothing but plain
    weights of quantised ones.

    Args:
        on_paper: the model, of which nothing but the config is read: none of the stages can run.

    Raises:
        InputError: the model or a text cannot be found or read.
    """
    store = ArtifactStore(config.output.home / "store", config.output.store)
    chosen = config.model
    model = on_paper or find_model(store, chosen.name, chosen.revision, chosen.dtype)
    if model.origin:
        logger.warning("%s", model.origin)
    # A worker of Dask's is told by its environment how many threads it may use.
    is_here = config.execution.engine == "processes"
    threads = max(1, cores() // num_workers(config)) if is_here else 0
    shared = Execution(device=config.model.device, threads=threads)
    digest = cache(source_digest)

    def collect(source: TextSource, windows: WindowSpec, purpose: Purpose) -> CollectWindows:
        if source.corpus == SELF:
            return WriteWindows(
                model=model, split=source.split, temperature=source.temperature, windows=windows,
                dtype=chosen.dtype, execution=shared, purpose=purpose,
            )  # fmt: skip
        return CollectCalibration(
            model=model, source=source, source_digest=digest(source), windows=windows,
            purpose=purpose,
        )  # fmt: skip

    calibration = collect(config.calibration.source, config.calibration_windows, "calibration")
    recovery_windows = None
    if config.recovery.steps:
        recovery_windows = collect(config.recovery.source, config.recovery.windows, "recovery")
    contest_windows = None
    if any(len(variant.method.contenders) > 1 for variant in config.variants):
        spec = config.recovery.windows
        more = spec.model_copy(update={"num_windows": spec.num_windows + DECIDING_WINDOWS})
        contest_windows = collect(config.recovery.source, more, "recovery")
    evaluation_windows = _evaluation_windows(config, model, shared)
    written = None if evaluation_windows is None else evaluation_windows.artifact(store)
    shards = _shards(config, model, calibration.artifact(store), shared)
    statistics: GatherStatistics | AddStatistics = shards[0]
    if len(shards) > 1:
        statistics = AddStatistics(shards=tuple(shard.artifact(store) for shard in shards))
    ranking = RankBlocks(statistics=statistics.artifact(store))
    scores = _scores(config, model, calibration, statistics, store, shared)
    times = _times(config, model)
    builder = _BranchBuilder(
        config, store, model, calibration, recovery_windows, contest_windows, statistics, ranking,
        scores, times, shared, evaluation_digests(config, written),
    )  # fmt: skip
    return Layout(
        config, store, model, calibration, recovery_windows, contest_windows, evaluation_windows,
        shards, statistics, ranking, scores, times,
        (builder.dense(), *(builder.of(variant) for variant in config.variants)),
        on_paper is not None,
    )  # fmt: skip


def _evaluation_windows(
    config: RunConfig, model: ModelRef, execution: Execution
) -> WriteWindows | None:
    """The stage that writes the text to measure on; None where that is given."""
    perplexity = config.evaluation.perplexity
    if perplexity.source.corpus != SELF:
        return None
    tokens = perplexity.protocol.window_tokens
    count = -(-perplexity.protocol.max_tokens // tokens) or WRITTEN_FOR_EVALUATION
    return WriteWindows(
        model=model,
        split=perplexity.source.split,
        temperature=perplexity.source.temperature,
        windows=WindowSpec(num_windows=count, window_tokens=tokens, bos=config.calibration.bos),
        dtype=config.model.dtype,
        execution=execution,
        purpose="evaluation",
    )


def _shards(
    config: RunConfig, model: ModelRef, calibration: Artifact, execution: Execution
) -> tuple[GatherStatistics, ...]:
    count = config.statistics.shards
    return tuple(
        GatherStatistics(
            model=model,
            calibration=calibration,
            kinds=tuple(sorted(config.statistics.kinds)),
            shard=Shard(index=index, count=count),
            dtype=config.model.dtype,
            batch_size=config.statistics.batch_size,
            execution=execution,
        )
        for index in range(count)
    )


def _scores(
    config: RunConfig,
    model: ModelRef,
    calibration: CollectWindows,
    statistics: GatherStatistics | AddStatistics,
    store: ArtifactStore,
    execution: Execution,
) -> tuple[ScoreVariants, ...]:
    """Only what some method asks for."""
    asked = {family for variant in config.variants for family in variant.method.scores}
    count = config.sensitivity.shards
    return tuple(
        ScoreVariants(
            model=model,
            calibration=calibration.artifact(store),
            statistics=statistics.artifact(store),
            family=family,
            tokens=config.sensitivity.tokens,
            shard=Shard(index=index, count=count),
            dtype=config.model.dtype,
            execution=execution,
        )
        for family in FAMILIES
        if family in asked
        for index in range(count)
    )


def _times(config: RunConfig, model: ModelRef) -> tuple[TimeVariants, ...]:
    """Only what some method asks for; of the request that speeds are measured by."""
    asked = {family for variant in config.variants for family in variant.method.times}
    return tuple(timing_of(config, model, family) for family in FAMILIES if family in asked)


def num_workers(config: RunConfig) -> int:
    """Stages that run at once.

    Raises:
        InputError: the Dask scheduler does not answer.
    """
    if config.execution.engine == "dask":
        from foldstack.flows.running.dask_scheduler import num_dask_workers

        return num_dask_workers(config.execution.address)
    if isinstance(config.workers, int):
        return max(1, config.workers)
    if config.model.device == "cpu":
        return cores()
    import torch

    return cores() if config.model.device == "auto" and not torch.cuda.is_available() else 1


@dataclass(frozen=True)
class _BranchBuilder:
    config: RunConfig
    store: ArtifactStore
    model: ModelRef
    calibration: CollectWindows
    recovery_windows: CollectWindows | None
    contest_windows: CollectWindows | None
    statistics: GatherStatistics | AddStatistics
    ranking: RankBlocks
    scores: tuple[ScoreVariants, ...]
    times: tuple[TimeVariants, ...]
    execution: Execution
    evaluation_digests: EvaluationDigests

    def dense(self) -> Branch:
        return Branch(
            DENSE,
            None,
            None,
            self._evaluate(self.model, DENSE),
            speed=self._speed(self.model, DENSE),
            tracks=self._dense_tracks,
            samples=self._samples(self.model, DENSE),
            **self._engines(self.model, DENSE),
        )

    def _engines(self, model: ModelRef | Artifact, name: str) -> dict[str, Any]:
        """The exports of a branch, and their speeds."""
        exports = exports_of(self.config, model, name, self.execution)
        speeds = {
            form: engine_speed_of(
                self.config,
                (self.model, self._dense_exports[form].artifact(self.store)),
                (model, stage.artifact(self.store)),
                form,
                name,
            )
            for form, stage in exports.items()
            if self.config.speed.enabled
        }
        there = {form: stage for form, stage in speeds.items() if stage is not None}
        return {"exports": exports, "engine_speeds": there}

    @cached_property
    def _dense_exports(self) -> dict[str, ExportModel]:
        return exports_of(self.config, self.model, DENSE, self.execution)

    def of(self, variant: Variant) -> Branch:
        contenders = variant.method.contenders
        if len(contenders) == 1:
            return self._finished(variant, self._compress(variant, variant.method, variant.label))
        made = [
            self._compress(variant, method, f"{variant.label} finalist {number}")
            for number, method in enumerate(contenders, start=1)
        ]
        compressed = [stage.artifact(self.store) for stage in made]
        healed = [
            self._recover(finalist, variant, stage.name, self.config.recovery.finalist_steps)
            for stage, finalist in zip(made, compressed, strict=True)
        ]
        assert self.contest_windows is not None
        choose = ChooseFinalist(
            finalists=tuple(compressed),
            healed=tuple(stage.artifact(self.store) for stage in filter(None, healed)),
            windows=self.contest_windows.artifact(self.store),
            num_trained=self.config.recovery.windows.num_windows,
            dtype=self.config.model.dtype,
            execution=self.execution,
            name=variant.label,
        )
        contest: tuple[CompressModel | RecoverModel, ...] = (*made, *filter(None, healed))
        return replace(self._finished(variant, choose), contest=contest)

    def _compress(self, variant: Variant, method: Method, name: str) -> CompressModel:
        return CompressModel(
            model=self.model,
            calibration=self.calibration.artifact(self.store),
            statistics=self.statistics.artifact(self.store),
            ranking=self.ranking.artifact(self.store),
            sensitivity=tuple(
                stage.artifact(self.store)
                for stage in self.scores
                if stage.family in variant.method.scores
            ),
            seconds=tuple(
                stage.artifact(self.store)
                for stage in self.times
                if stage.family in variant.method.times
            ),
            method=method,  # type: ignore[arg-type]  # a member of the union
            dtype=self.config.model.dtype,
            execution=self.execution,
            name=name,
        )

    def _finished(self, variant: Variant, compress: CompressModel | ChooseFinalist) -> Branch:
        """What is done with a compressed model."""
        compressed = compress.artifact(self.store)
        recover, name = self._recover(compressed, variant, variant.label), variant.label
        if recover is None:
            final, before, after = compressed, self._evaluate(compressed, name), None
        else:
            final = recover.artifact(self.store)
            before = self._evaluate(compressed, f"{name} before recovery")
            after = self._evaluate(final, f"{name} after recovery")
        return Branch(
            name, variant, compress, before, recover, after, self._speed(final, name),
            self._tracks(final, name), self._samples(final, name), **self._engines(final, name),
        )  # fmt: skip

    def _recover(
        self, compressed: Artifact, variant: Variant, name: str, most_steps: int | None = None
    ) -> RecoverModel | None:
        if self.recovery_windows is None:
            return None
        settings = self.config.recovery_settings
        steps = settings.steps if most_steps is None else min(settings.steps, most_steps)
        settings = settings.model_copy(
            update={"seed": settings.seed + variant.seed, "steps": steps}
        )
        return RecoverModel(
            compressed=compressed,
            windows=self.recovery_windows.artifact(self.store),
            settings=settings,
            teacher=self.model if settings.needs_teacher else None,
            dtype=self.config.model.dtype,
            execution=self.execution,
            processes=self.config.recovery.processes,
            name=name,
        )

    def _evaluate(self, model: ModelRef | Artifact, name: str) -> EvaluateModel:
        return evaluation_of(self.config, model, name, self.execution, self.evaluation_digests)

    def _samples(self, model: ModelRef | Artifact, name: str) -> WriteSamples | None:
        return samples_of(self.config, model, name, self.execution, self.evaluation_digests)

    @cached_property
    def _dense_tracks(self) -> dict[str, EvaluateTrack]:
        return tracks_of(self.config, self.model, DENSE, self.execution, self.evaluation_digests)

    def _tracks(self, model: Artifact, name: str) -> dict[str, EvaluateTrack]:
        dense = {each: stage.artifact(self.store) for each, stage in self._dense_tracks.items()}
        return tracks_of(self.config, model, name, self.execution, self.evaluation_digests, dense)

    def _speed(self, model: ModelRef | Artifact, name: str) -> BenchmarkSpeed | None:
        if not self.config.speed.enabled:
            return None
        return speed_of(self.config, self.model, model, name)
