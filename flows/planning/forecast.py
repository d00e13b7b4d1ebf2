"""The dry run: sizes of every variant, what is in the store already, time and memory to come."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from statistics import median
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from foldstack.flows.config.run_config import RunConfig
from foldstack.flows.planning.needs import needs_of, stored_dtype
from foldstack.flows.planning.preflight import check, is_stored
from foldstack.flows.planning.stage_arithmetic import StageArithmetic
from foldstack.flows.running.branches import Layout, lay_out
from foldstack.tasks.stage import Stage
from foldstack.tasks.store.garbage import list_artifacts
from foldstack.tasks.store.manifest import Manifest

GRACE_SECONDS = 600.0
"""Beyond what is expected: for imports, for a busy machine, for a forecast of seconds."""


EACH_ITS_OWN = frozenset(
    {
        "compress_model", "recover_model", "score_variants", "time_variants", "evaluate_track",
        "export_model", "benchmark_engine",
    }
)  # fmt: skip
"""Kinds of stages in which one method, track or form says nothing of the time that another takes:
SLEB measures a model for every block that may go, where ShortGPT measures none."""
Basis = Literal["stored", "earlier runs", "arithmetic"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ExpectedModel(_Record):
    """A variant, or the dense model, as it will be."""

    label: str
    sparsity: float | None
    realised_sparsity: float | None
    parameters: int
    bytes: int
    flops_per_token: int
    kv_bytes_per_token: int
    num_blocks: int


class ExpectedStage(_Record):
    """One stage of the run."""

    label: str
    stage: str
    is_stored: bool
    seconds: float
    """Expected; 0 when it is stored."""
    basis: Basis
    memory_bytes: int
    """Expected peak, interpreter and libraries included."""
    disk_bytes: int
    """Expected size of its artifact."""


class DryRun(_Record):
    """What a run would do."""

    title: str
    models: tuple[ExpectedModel, ...]
    stages: tuple[ExpectedStage, ...]
    workers: int
    seconds: float
    """Expected wall time of what is not stored."""
    memory_bytes: int
    """Expected peak: of the stages that may run at once, those that take most."""
    disk_bytes: int
    """What the stages that are not stored will add to the store."""


def dry_run(config: RunConfig) -> DryRun:
    """What `run` would do with `config`; computes nothing but how fast this machine is.

    Raises:
        InputError: what `run` would refuse.
    """
    layout = lay_out(config)
    check(layout)
    models = expected_models(layout)
    stages = expected_stages(layout, models)
    timed = ("benchmark_speed", "benchmark_engine")
    alone = sum(stage.seconds for stage in stages if stage.stage in timed)
    shared = sum(stage.seconds for stage in stages) - alone
    longest = max((stage.seconds for stage in stages), default=0.0)
    return DryRun(
        title=config.title,
        models=tuple(models.values()),
        stages=tuple(stages),
        workers=layout.workers,
        seconds=max(shared / layout.workers, longest) + alone,
        memory_bytes=sum(
            sorted((s.memory_bytes for s in stages if not s.is_stored), reverse=True)[
                : layout.workers
            ]
        ),
        disk_bytes=sum(stage.disk_bytes for stage in stages if not stage.is_stored),
    )


def expected_models(layout: Layout) -> dict[str, ExpectedModel]:
    """The size of every model of the run, by label, from its outline on the meta device."""
    from foldstack.compression.structure.size import size_of, size_of_plan, sparsity_between
    from foldstack.compression.structure.surgery import build_on_meta
    from foldstack.tasks.environment.execution import torch_dtype

    config = layout.model_config()
    meta = build_on_meta(config)
    dtype = torch_dtype(layout.config.model.dtype) or stored_dtype(meta)
    dense = size_of(meta, dtype)
    found: dict[str, ExpectedModel] = {}
    for branch in layout.branches:
        size, asked, realised = dense, None, None
        if branch.variant is not None:
            size = size_of_plan(config, branch.variant.method.outline(meta), dtype)
            asked, realised = branch.variant.sparsity, sparsity_between(dense, size)
        found[branch.label] = ExpectedModel(
            label=branch.label,
            sparsity=asked,
            realised_sparsity=realised,
            **{name: value for name, value in size.as_dict().items() if name in _SIZES},
        )
    return found


_SIZES = ("parameters", "bytes", "flops_per_token", "kv_bytes_per_token", "num_blocks")


def expected_stages(layout: Layout, models: Mapping[str, ExpectedModel]) -> list[ExpectedStage]:
    """Every stage with the time it will take."""
    needs = needs_of(layout)
    arithmetic = StageArithmetic(
        layout, needs, {m.label: m.flops_per_token for m in models.values()}
    )
    told = Seconds(layout.stages, _seconds_of_earlier_runs(layout), arithmetic.seconds)
    expected = []
    for stage in layout.stages:
        basis: Basis = "stored"
        seconds = 0.0
        if not is_stored(stage, layout):
            seconds, basis = told.of(stage)
        expected.append(
            ExpectedStage(
                label=stage.label, stage=stage.stage, is_stored=basis == "stored",
                seconds=seconds, basis=basis,
                **asdict(needs[stage.fingerprint]),
            )
        )  # fmt: skip
    return expected


class Seconds:
    """What stages will take: as they or their like took in earlier runs, else by their arithmetic,
    at the pace of those of the same kind that ran earlier."""

    def __init__(
        self,
        stages: Sequence[Stage],
        history: Mapping[tuple[str, str], Sequence[float]],
        arithmetic: Callable[[Stage], float],
    ) -> None:
        """`history` has the seconds by kind and label, and those of all labels of a kind under an
        empty one."""
        self._stages, self._history = stages, history
        self._arithmetic, self._pace = arithmetic, cache(self._pace_of)

    def of(self, stage: Stage) -> tuple[float, Basis]:
        earlier = self._earlier(stage)
        if not earlier and stage.stage not in EACH_ITS_OWN:
            earlier = self._history.get((stage.stage, ""))
        if earlier:
            return median(earlier), "earlier runs"
        return self._arithmetic(stage) * self._pace(stage.stage), "arithmetic"

    def _earlier(self, stage: Stage) -> Sequence[float] | None:
        return self._history.get((stage.stage, stage.label))

    def _pace_of(self, kind: str) -> float:
        ratios = [
            median(earlier) / forecast
            for stage in self._stages
            if stage.stage == kind
            and (earlier := self._earlier(stage))
            and (forecast := self._arithmetic(stage)) > 0
        ]
        return median(ratios) if ratios else 1.0


def stage_limits(layout: Layout) -> dict[str, float]:
    """Seconds after which each stage is ended, by fingerprint; empty where none ever is."""
    patience = layout.config.execution.patience
    if patience is None:
        return {}
    expected = expected_stages(layout, expected_models(layout))
    return {
        stage.fingerprint: patience * each.seconds + GRACE_SECONDS
        for stage, each in zip(layout.stages, expected, strict=True)
        if not each.is_stored
    }


def _seconds_of_earlier_runs(layout: Layout) -> dict[tuple[str, str], list[float]]:
    """Wall times of stages of the same model, by kind and label; all labels of a kind under ""."""
    model = f"model/{layout.model.fingerprint}"
    manifests: dict[str, Manifest] = {
        f"{row.artifact.stage}/{row.artifact.fingerprint}": row.manifest
        for row in list_artifacts(layout.store)
        if row.manifest is not None
    }

    def is_of_model(manifest: Manifest) -> bool:
        return model in manifest.inputs or any(
            name in manifests and is_of_model(manifests[name]) for name in manifest.inputs
        )

    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for manifest in manifests.values():
        if is_of_model(manifest):
            for label in (manifest.label, ""):
                seconds[manifest.stage, label].append(manifest.seconds)
    return seconds


def print_dry_run(expected: DryRun, console: Console) -> None:
    """One table of models, one of stages, and the totals."""
    models = Table(title=expected.title, title_justify="left")
    heads = ("model", "sparsity", "realised", "blocks", "parameters", "bytes", "FLOPs/token",
             "KV bytes/token")  # fmt: skip
    for index, head in enumerate(heads):
        models.add_column(head, justify="left" if index == 0 else "right")
    for m in expected.models:
        asked = "" if m.sparsity is None else f"{m.sparsity:g}"
        realised = "" if m.realised_sparsity is None else f"{m.realised_sparsity:.3f}"
        counts = (m.num_blocks, m.parameters, m.bytes, m.flops_per_token, m.kv_bytes_per_token)
        models.add_row(m.label, asked, realised, *(f"{count:,}" for count in counts))
    stages = Table()
    for head in ("stage", "in the store", "seconds", "memory MiB", "disk MiB", "from"):
        is_number = head.startswith(("seconds", "memory", "disk"))
        stages.add_column(head, justify="right" if is_number else "left")
    for s in expected.stages:
        room = (f"{size / 2**20:,.0f}" for size in (s.memory_bytes, s.disk_bytes))
        is_stored = "yes" if s.is_stored else "no"
        stages.add_row(s.label, is_stored, f"{s.seconds:.1f}", *room, s.basis)
    console.print(models, stages)
    stored = sum(stage.is_stored for stage in expected.stages)
    console.print(
        f"{stored} of {len(expected.stages)} stages are in the store; about "
        f"{expected.seconds / 60:.1f} minutes with {expected.workers} at a time, and "
        f"{expected.memory_bytes / 2**30:.2f} GiB of memory, {expected.disk_bytes / 2**30:.2f} GiB "
        "of disk",
        highlight=False,
    )
