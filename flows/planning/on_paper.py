"""The dry run for another machine, from a model's config alone: hours, memory, and what streams."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from foldstack.compression.errors import InputError
from foldstack.flows.config.run_config import RunConfig
from foldstack.flows.planning.forecast import expected_models
from foldstack.flows.planning.machine_rates import Rates
from foldstack.flows.planning.needs import PROCESS_BYTES, needs_of
from foldstack.flows.planning.stage_arithmetic import StageArithmetic
from foldstack.flows.running.branches import Layout, lay_out
from foldstack.tasks.stage import ModelRef

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STREAMING = ("gather_statistics", "compress_model")
"""Stages that hold one block of the model at a time."""
ON_DEVICE = (
    *STREAMING, "recover_model", "choose_finalist", "evaluate_model", "evaluate_track",
    "write_windows", "write_samples", "score_variants", "time_variants", "benchmark_speed",
)  # fmt: skip
GIB = 1 << 30


@dataclass(frozen=True)
class Machine:
    """A kind of accelerator, and what it was seen to do.

    Args:
        device_bytes: of one accelerator's memory.
        half, float64: operations per second of products as large as a model's.
        link: bytes per second from a disk to the accelerator.
        passing, closed: what passes block by block, with their sums, and closed forms took over
            their arithmetic.
        lone_tokens: bytes of weights per second of a token decoded by itself.
    """

    device_bytes: int
    half: float
    float64: float
    link: float
    passing: float
    closed: float
    lone_tokens: float


# Of one H100 on record (docs/performance.md): 34,409 tokens a second of a 7B are 4.6e14 operations,
# statistics took 16 and closed forms 28 times their floor. An H200 is that chip with more memory,
# 1.4 times as fast.
_HOPPER = partial(Machine, half=4.6e14, float64=4.5e13, link=5e9, passing=16.0, closed=28.0)
MACHINES = {
    "h100": _HOPPER(device_bytes=80 * 10**9, lone_tokens=1.2e12),
    "h200": _HOPPER(device_bytes=141 * 10**9, lone_tokens=1.7e12),
}


class PaperStage(BaseModel):
    """A stage on that machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    label: str
    stage: str
    seconds: float
    """On one accelerator."""
    device_bytes: int
    """That it holds there at its peak."""
    host_bytes: int
    """Beside it."""
    disk_bytes: int
    """Of its artifact."""
    streamed_bytes: int
    """Weights that are read block by block, and hidden states that are in files meanwhile."""
    fits: bool
    """In the memory of one accelerator."""


class Paper(BaseModel):
    """A run on that machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str
    machine: str
    devices: int
    parameters: dict[str, int]
    """By model."""
    stages: tuple[PaperStage, ...]
    seconds: float
    """Of what fits, where the accelerators share the stages out, no faster than the longest one."""
    disk_bytes: int


def plan_on_paper(config: RunConfig, machine: str, devices: int) -> Paper:
    """What `config` would take on `devices` accelerators of a kind; its model may be a folder with
    nothing but a config.json.

    Raises:
        InputError: the machine is not known, or the model or a method is refused.
    """
    if machine not in MACHINES:
        raise InputError(f"machines on paper are {', '.join(MACHINES)}, got {machine!r}")
    if config.recovery.processes > devices:
        raise InputError(
            f"recovery.processes {config.recovery.processes} wants as many accelerators, and the "
            f"plan is of {devices}"
        )
    kind = MACHINES[machine]
    folder = Path(config.model.name).expanduser()
    model = ModelRef(name=config.model.name, folder=folder, fingerprint="0" * 16)
    layout = lay_out(config, on_paper=model if (folder / "config.json").is_file() else None)
    models, needs = expected_models(layout), needs_of(layout)
    arithmetic = StageArithmetic(
        layout, needs, {m.label: m.flops_per_token for m in models.values()}, partial(_rates, kind)
    )
    dense = next(iter(models.values()))
    tokens = config.calibration.num_windows * config.calibration.window_tokens
    hidden = arithmetic.hidden_size
    stages = []
    for stage in layout.stages:
        need = needs[stage.fingerprint]
        on_device = need.memory_bytes - PROCESS_BYTES if stage.stage in ON_DEVICE else 0
        streams = stage.stage in STREAMING
        # Two files of hidden states for each stream: before a block and behind it.
        states = 2 * arithmetic.streams_of(stage) * tokens * hidden * 2 if streams else 0
        streamed = dense.bytes if streams else 0
        seconds = max(arithmetic.seconds(stage), streamed / kind.link)
        stages.append(
            PaperStage(
                label=stage.label, stage=stage.stage, seconds=seconds, device_bytes=on_device,
                host_bytes=need.memory_bytes - on_device, disk_bytes=need.disk_bytes,
                streamed_bytes=streamed + states, fits=on_device <= kind.device_bytes,
            )
        )  # fmt: skip
    times = [stage.seconds for stage in stages if stage.fits]
    # Where several share a stage out, all of them are taken.
    busy = [
        stage.seconds * (config.recovery.processes if stage.stage == "recover_model" else 1)
        for stage in stages
        if stage.fits
    ]
    return Paper(
        title=config.title,
        machine=machine,
        devices=devices,
        parameters={m.label: m.parameters for m in models.values()},
        stages=tuple(stages),
        seconds=max(sum(busy) / devices, max(times, default=0.0)),
        disk_bytes=sum(stage.disk_bytes for stage in stages),
    )


def _rates(kind: Machine, model: "PreTrainedModel", layout: Layout) -> Rates:
    from foldstack.compression.structure.architectures import architecture_of
    from foldstack.compression.structure.size import count_parameters

    text = model.config.get_text_config(decoder=True)
    weights = count_parameters(architecture_of(model).blocks(model)[0])
    attention = 2 * layout.config.calibration.window_tokens * text.hidden_size
    block = (2 * weights + attention) / kind.half
    return Rates(
        block_seconds=block,
        stream_block_seconds=kind.passing * block,
        float32=kind.half / kind.passing,  # products of half precision, summed in float32
        float64=kind.float64 / kind.closed,
        head_seconds=2 * text.hidden_size * text.vocab_size / kind.half,
        lone_seconds=2 * weights / kind.lone_tokens,
        fresh_seconds=10.0,
    )


def print_paper(paper: Paper, console: Console) -> None:
    """A table of stages, and the totals."""
    table = Table(title=f"{paper.title} on {paper.devices} x {paper.machine}", title_justify="left")
    for head in ("stage", "hours", "on the GPU GiB", "beside it GiB", "streams GiB", "disk GiB"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for s in paper.stages:
        sizes = (s.device_bytes, s.host_bytes, s.streamed_bytes, s.disk_bytes)
        label = s.label if s.fits else f"{s.label} (does not fit)"
        table.add_row(label, f"{s.seconds / 3600:.2f}", *(f"{b / GIB:,.1f}" for b in sizes))
    console.print(table)
    left_out = [s.label for s in paper.stages if not s.fits]
    without = f", without {', '.join(left_out)}" if left_out else ""
    console.print(
        f"about {paper.seconds / 3600:.1f} hours{without}; {paper.disk_bytes / GIB:,.0f} GiB of "
        "disk. Rates are those of one H100 on record, and not measured on this machine.",
        highlight=False,
    )
