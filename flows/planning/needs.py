"""What each stage takes of memory and disk, from shapes alone; and whether this machine has it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldstack.compression.methods.method import Method
from foldstack.flows.running.branches import Branch, Layout
from foldstack.tasks.environment.cgroup import memory_left
from foldstack.tasks.environment.home import disk_too_small
from foldstack.tasks.evaluate_track import EvaluateTrack
from foldstack.tasks.stage import Stage
from foldstack.tasks.write_windows import WriteWindows

MEMORY_FILE = Path("/proc/meminfo")
GIB = 1 << 30
PROCESS_BYTES = 450 << 20
"""The interpreter and the libraries of one worker."""
FLOAT64_COPIES = 5
"""Matrices of the widest Gram's size that a closed form holds at once."""
FLOAT64_BYTES = 8
LOGIT_COPIES = 5
"""Of a slice of logits, float32: they, their log-probabilities, and what goes back through both."""
TEACHER_LOGIT_COPIES = 3
"""More where they are held against a teacher's."""
COMPARED_COPIES = 3
"""Of the hidden states that are compared at once."""
TOKENS_PER_ITEM = 400
"""Of a benchmark, by a guess."""
KNOBS = {
    "write_windows": "lower calibration.window_tokens, or give a text",
    "gather_statistics": "lower statistics.batch_size or calibration.window_tokens",
    "score_variants": "lower sensitivity.tokens, or set model.dtype or model.device",
    "time_variants": "set model.dtype to bfloat16, or give no budget of seconds",
    "compress_model": "set model.dtype to bfloat16, model.device to cpu, or take another method",
    "evaluate_model": "lower evaluation.perplexity.protocol.batch_size or its window_tokens",
    "evaluate_track": "lower evaluation.batch_size, or the window_tokens of the track's texts",
    "write_samples": "leave evaluation.samples out",
    "recover_model": (
        "lower recovery.batch_size and raise recovery.gradient_accumulation, or share the model "
        "out over several GPUs by recovery.processes"
    ),
    "export_model": "leave forms out of export",
    "benchmark_engine": "leave forms out of export",
    "benchmark_speed": "lower speed.batch_sizes, or set speed.enabled to false",
}


@dataclass(frozen=True)
class Need:
    """Of one stage."""

    memory_bytes: int
    """At its peak, the process's own included."""
    disk_bytes: int
    """Of its artifact."""


@dataclass(frozen=True)
class _Shapes:
    """What the needs are computed from."""

    dtype: Any
    dense_bytes: int
    block_bytes: int
    hidden: int
    widest: int
    gram_elements: int
    """Of all Grams of one block."""
    num_blocks: int
    vocabulary: int

    @property
    def element_bytes(self) -> int:
        """Of one weight."""
        size: int = self.dtype.itemsize
        return size

    def activations(self, tokens: int) -> int:
        """Bytes of what lives at once inside a block that `tokens` pass without gradients."""
        return tokens * (2 * self.widest + 6 * self.hidden) * self.element_bytes


def needs_of(layout: Layout) -> dict[str, Need]:
    """The need of every stage, by its fingerprint."""
    from foldstack.compression.structure.size import count_parameters
    from foldstack.compression.structure.surgery import build_on_meta, config_for

    config = layout.model_config()
    meta = build_on_meta(config)
    shapes = _shapes(meta, layout)
    needs: dict[str, Need] = {}
    for branch in layout.branches:
        made = meta
        if branch.variant is not None:
            made = build_on_meta(config_for(config, branch.variant.method.outline(meta)))
        model_bytes = count_parameters(made) * shapes.element_bytes
        trained = 0
        for stage in branch.stages.values():
            if stage.stage == "compress_model":
                memory = _of_compressing(branch, meta, model_bytes, shapes, layout)
                need = Need(PROCESS_BYTES + memory, model_bytes)
            elif stage.stage == "choose_finalist":
                batch = shapes.activations(layout.config.recovery.windows.window_tokens)
                need = Need(PROCESS_BYTES + model_bytes + batch, model_bytes)
            elif stage.stage == "recover_model":
                # Once for all of a branch: the model is not the same after.
                trained = trained or _of_recovering(made, shapes, layout)
                need = Need(PROCESS_BYTES + trained, model_bytes)
            else:
                need = _of_measuring(stage, branch, model_bytes, shapes, layout)
            needs[stage.fingerprint] = need
    for stage in layout.stages:
        if stage.fingerprint not in needs:
            needs[stage.fingerprint] = _shared_need(stage, shapes, layout)
    return needs


def _shapes(meta: Any, layout: Layout) -> _Shapes:
    from foldstack.compression.structure.architectures import architecture_of
    from foldstack.compression.structure.size import count_parameters
    from foldstack.tasks.environment.execution import torch_dtype

    architecture = architecture_of(meta)
    block = architecture.blocks(meta)[0]
    widths = {
        site.reads: architecture.weight(block.get_submodule(site.name)).shape[1]
        for site in architecture.linears
    }
    text = meta.config.get_text_config(decoder=True)
    dtype = torch_dtype(layout.config.model.dtype) or stored_dtype(meta)
    return _Shapes(
        dtype=dtype,
        dense_bytes=count_parameters(meta) * dtype.itemsize,
        block_bytes=count_parameters(block) * dtype.itemsize,
        hidden=text.hidden_size,
        widest=max(widths.values()),
        gram_elements=sum(width**2 for width in widths.values()),
        num_blocks=len(architecture.blocks(meta)),
        vocabulary=text.vocab_size,
    )


def stored_dtype(meta: Any) -> Any:
    """The precision of a model's weights, which on the meta device are in that of new ones."""
    return getattr(meta.config.get_text_config(decoder=True), "dtype", None) or meta.dtype


def _float32_copies(shapes: _Shapes, layout: Layout) -> int:
    """Size over that of a block as stored, where it computes: a CPU multiplies in float32."""
    return 1 if layout.on_paper else max(1, 4 // shapes.element_bytes)


def autocast_of(layout: Layout) -> Any:
    """What recovery casts its products to, where it trains; None for float32."""
    import torch

    from foldstack.compression.training.recovery import autocast_dtype
    from foldstack.tasks.environment.execution import device_named

    if layout.on_paper:
        return None if layout.config.recovery.precision == "float32" else torch.bfloat16
    name = layout.config.model.device
    # A named one may be another machine's, which a run on Dask does not look for here.
    device = torch.device(device_named(name) if name == "auto" else name)
    return autocast_dtype(layout.config.recovery.precision, device)


def _shared_need(stage: Stage, shapes: _Shapes, layout: Layout) -> Need:
    """Of a stage that no variant owns."""
    from foldstack.compression.statistics.similarity import BYTES_AT_ONCE

    chosen = layout.config
    tokens = chosen.calibration.num_windows * chosen.calibration.window_tokens
    if isinstance(stage, WriteWindows):
        return _of_writing(stage, shapes)
    if stage.stage == "score_variants":
        return Need(PROCESS_BYTES + _of_scoring(shapes, layout), 0)
    if stage.stage == "time_variants":
        return Need(PROCESS_BYTES + 2 * shapes.dense_bytes, 0)
    if stage.stage not in ("gather_statistics", "add_statistics"):
        return Need(PROCESS_BYTES, 4 * tokens)
    has_grams = "gram" in chosen.statistics.kinds
    elements = shapes.gram_elements if has_grams else 0
    disk = 4 * elements * shapes.num_blocks
    if stage.stage == "add_statistics":
        return Need(PROCESS_BYTES + 12 * elements, disk)
    batch = chosen.statistics.batch_size * chosen.calibration.window_tokens
    # Blocks of half precision compute in float32 on a CPU; hidden states are in files.
    in_float32 = _float32_copies(shapes, layout)
    of_window = 8 * (shapes.num_blocks + 1) * chosen.calibration.window_tokens * shapes.hidden
    memory = (
        in_float32 * (shapes.block_bytes + shapes.activations(batch))
        + 12 * elements  # sums in float64, and rounded to float32 for their file
        + COMPARED_COPIES * min(of_window, BYTES_AT_ONCE)
    )
    return Need(PROCESS_BYTES + memory, disk)


def _of_writing(stage: WriteWindows, shapes: _Shapes) -> Need:
    """Of windows that the dense model writes: itself, a cache no wider than its hidden states, and
    the shares of all tokens in float64."""
    from foldstack.compression.text.self_written import WRITING_BATCH

    spec = stage.windows
    batch = min(WRITING_BATCH, spec.num_windows)
    cache = 2 * spec.window_tokens * shapes.num_blocks * shapes.hidden * shapes.element_bytes
    chances = shapes.vocabulary * 3 * FLOAT64_BYTES
    memory = shapes.dense_bytes + batch * (cache + chances) + shapes.activations(batch)
    return Need(PROCESS_BYTES + memory, 4 * spec.num_windows * spec.window_tokens)


def _of_scoring(shapes: _Shapes, layout: Layout) -> int:
    """Bytes of the model, what its distribution is kept of, and one batch's logits; on a CPU one of
    half precision is scored as a copy in float32."""
    from foldstack.compression.evaluation.candidate_loss import LOGIT_BYTES, WINDOWS_AT_ONCE
    from foldstack.compression.methods.search.scoring import TOP

    chosen = layout.config
    in_float32 = _float32_copies(shapes, layout)
    weights = shapes.dense_bytes * (1 if in_float32 == 1 else 1 + in_float32)
    tokens = chosen.sensitivity.tokens
    kept = 8 * tokens * min(TOP, shapes.vocabulary)
    of_window = 4 * chosen.calibration.window_tokens * shapes.vocabulary
    logits = 3 * max(of_window, min(LOGIT_BYTES, WINDOWS_AT_ONCE * of_window))
    hidden = 3 * 4 * tokens * shapes.hidden
    batch = in_float32 * shapes.activations(WINDOWS_AT_ONCE * chosen.calibration.window_tokens)
    return weights + kept + logits + hidden + batch + FLOAT64_COPIES * 8 * shapes.widest**2


def _of_measuring(
    stage: Stage, branch: Branch, model_bytes: int, shapes: _Shapes, layout: Layout
) -> Need:
    """Of a stage that measures a model of `model_bytes`."""
    protocol = layout.config.evaluation.perplexity.protocol
    if stage.stage == "evaluate_model":
        batch = shapes.activations(protocol.batch_size * protocol.window_tokens)
        return Need(PROCESS_BYTES + model_bytes + batch, 0)
    if isinstance(stage, EvaluateTrack):
        protocols = [text.protocol for text in stage.track.texts.values()]
        windows = [each.batch_size * each.window_tokens for each in protocols]
        items = layout.config.evaluation.batch_size * TOKENS_PER_ITEM if stage.track.names else 0
        batch = shapes.activations(max([items, *windows]))
        return Need(PROCESS_BYTES + model_bytes + batch, 0)
    if stage.stage == "write_samples":
        return Need(PROCESS_BYTES + model_bytes, 0)
    if stage.stage == "export_model":
        # The model, the stock one, the same in float32, and the engine with it.
        in_float32 = shapes.dense_bytes * 4 // shapes.element_bytes
        return Need(2 * PROCESS_BYTES + model_bytes + 3 * in_float32, shapes.dense_bytes)
    assert stage.stage in ("benchmark_speed", "benchmark_engine"), stage.stage
    beside = 0 if branch.variant is None else shapes.dense_bytes
    return Need(PROCESS_BYTES + beside + model_bytes, 0)


def _of_recovering(made: Any, shapes: _Shapes, layout: Layout) -> int:
    """Bytes of training the model `made`, which is on the meta device; it is not the same after.

    Where processes share it out, those of one on its GPU; on a CPU, which they share, too, those of
    all of them, each of which has opened the models whole.
    """
    from foldstack.compression.statistics.hidden_states import MEMORY_BYTES
    from foldstack.compression.structure.architectures import architecture_of
    from foldstack.compression.structure.size import count_parameters
    from foldstack.compression.training.recovery import adapters_for

    settings = layout.config.recovery
    blocks = architecture_of(made).blocks(made)
    ends = (count_parameters(made) - count_parameters(blocks)) * shapes.element_bytes
    opened = adapters_for(made.to(shapes.dtype), settings, autocast_of(layout))
    tokens = settings.batch_size * settings.windows.window_tokens
    kept = tokens * len(blocks) * (3 * shapes.widest + 8 * shapes.hidden) * 4
    logits = _logits_at_once(tokens, shapes, layout)
    student, teacher = opened.num_bytes, shapes.dense_bytes if settings.needs_teacher else 0
    if settings.processes > 1:
        models = [size for size in (student, teacher) if size]
        parts = sum(
            ends + shapes.block_bytes + (size - ends) // settings.processes for size in models
        )
        part = parts + kept // settings.processes + logits
        return part if has_gpus(layout) else settings.processes * (sum(models) + part)
    if settings.keeps_teacher(settings.windows.num_windows):
        compared = 1 + (settings.tail_blocks if settings.tail_distillation else 0)
        states = settings.windows.num_windows * settings.windows.window_tokens * shapes.hidden * 4
        teacher += min(MEMORY_BYTES, compared * states)
    return student + teacher + kept + logits


def _logits_at_once(tokens: int, shapes: _Shapes, layout: Layout) -> int:
    """Bytes of those that recovery makes of a batch: the loss is computed in slices of tokens."""
    from foldstack.compression.training.distillation import LOGITS_ELSEWHERE, LOGITS_ON_CPU

    at_once = LOGITS_ELSEWHERE if has_gpus(layout) else LOGITS_ON_CPU
    slices = min(tokens * shapes.vocabulary, max(at_once, shapes.vocabulary))
    copies = LOGIT_COPIES
    if layout.config.recovery.distillation:
        copies += TEACHER_LOGIT_COPIES
    return copies * 4 * slices


def has_gpus(layout: Layout) -> bool:
    """Whether stages compute on GPUs, which have memory of their own."""
    if layout.on_paper:
        return True
    import torch

    name = layout.config.model.device
    return name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())


def _of_compressing(
    branch: Branch, meta: Any, model_bytes: int, shapes: _Shapes, layout: Layout
) -> int:
    """Bytes of a method's work, or of writing its result, whichever is more."""
    from foldstack.compression.checkpoints.checkpoint import SHARD_BYTES

    assert branch.variant is not None
    method = branch.variant.method
    closed_form = FLOAT64_COPIES * 8 * shapes.widest**2 if "gram" in method.needs else 0
    if not method.goes_in_turn:
        return shapes.dense_bytes + model_bytes + closed_form
    along = _of_streams(method, meta, shapes, layout)
    # Weights lie in files: those of one block are read, and of two shards while they are written.
    return max(shapes.block_bytes + closed_form + along, min(model_bytes, 2 * SHARD_BYTES))


def _of_streams(method: Method, meta: Any, shapes: _Shapes, layout: Layout) -> int:
    """Bytes of what the hidden states are used for that go along with a method from block to block;
    they themselves are in files."""
    from foldstack.compression.statistics.stream import BATCH_SIZE

    chosen = layout.config.calibration
    tokens = chosen.num_windows * chosen.window_tokens
    streams = method.arithmetic(meta, tokens).streams
    # Blocks of half precision compute in float32 on a CPU.
    in_float32 = _float32_copies(shapes, layout)
    block = 2 * shapes.block_bytes + shapes.activations(BATCH_SIZE * chosen.window_tokens)
    return 8 * streams * shapes.gram_elements + (in_float32 * block if streams else 0)


def check_room(layout: Layout, missing: set[str]) -> list[str]:
    """A sentence for each thing that the stages still to run would not find room for."""
    needs = needs_of(layout)
    waiting = [stage for stage in layout.stages if stage.fingerprint in missing]
    sentences = []
    disk = sum(needs[stage.fingerprint].disk_bytes for stage in waiting)
    home = layout.config.output.home.expanduser()
    if disk > (free := shutil.disk_usage(home).free):
        sentences.append(disk_too_small(home, disk, free))
    available = available_memory(layout.config.model.device)
    for kind, stage in _hungriest(waiting, needs).items():
        wanted = needs[stage.fingerprint].memory_bytes
        if available is not None and wanted > available and kind in KNOBS:
            sentences.append(
                f"{stage.label} takes {wanted / GIB:.1f} GiB of memory, and "
                f"{available / GIB:.1f} GiB are available: {KNOBS[kind]}"
            )
    return sentences


def _hungriest(stages: list[Stage], needs: Mapping[str, Need]) -> dict[str, Stage]:
    """Of every kind the stage that takes most memory."""
    found: dict[str, Stage] = {}
    for stage in sorted(stages, key=lambda stage: needs[stage.fingerprint].memory_bytes):
        found[stage.stage] = stage
    return found


def available_memory(device: str) -> int | None:
    """Bytes that a process may still take where it computes; None where nobody says."""
    import torch

    if device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    left = memory_left()
    if not MEMORY_FILE.exists():
        return left
    for line in MEMORY_FILE.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
            return free if left is None else min(free, left)
    return left
