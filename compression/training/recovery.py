"""Recovery: a compressed model is trained for a while, by itself or after its dense teacher."""

import hashlib
import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.storage.digest import digest_json
from foldstack.compression.structure.architectures import base_config_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import plan_of
from foldstack.compression.training.distillation import Blend, head_of, projection_of, tail_pairs
from foldstack.compression.training.objective import FIGURES, Objective, Tail, mean_loss
from foldstack.compression.training.sharding import (
    check_agreement,
    mesh_of,
    parts_of,
    spread_objective,
    take_back,
)
from foldstack.compression.training.teacher_states import WORTH_FROM
from foldstack.compression.training.training_checkpoints import Checkpoints, History, Row
from foldstack.compression.training.training_loop import Schedule, Training, derived_seed

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

    from foldstack.compression.training.adapters import Adapters

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.95)
_SAMPLED_VALUES = 256
_MOST_VALIDATION_WINDOWS = 32

# Accelerate's state, torch's random numbers and the cores belong to the process.
_ONE_AT_A_TIME = threading.Lock()


class Recovery(BaseModel):
    """How a compressed model is trained back: LoRA on its linears, its norms in place.

    Virtual blocks (FlexiGPT) train in place, whatever trains besides: a base's LoRA serves every
    block that borrows from it and is merged into it at the end.

    Sources: LoRA, arXiv 2106.09685, equation 3; distillation, arXiv 1503.02531, section 2; virtual
    blocks, arXiv 2501.14713, section 4.1 and appendix A; distillation of the tail, FoldGPT, arXiv
    2407.00928.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(default=100, ge=0)
    """Optimizer steps; 0 leaves the model as it is."""
    batch_size: int = Field(default=8, ge=1)
    """Windows in one forward pass, over all processes together."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate of the adapters."""
    norm_learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate of the norms and biases."""
    virtual_learning_rate: float = Field(default=1e-3, gt=0)
    """Highest learning rate of what virtual blocks own: adapters, gains, biases and norms; the
    paper's 4e-3 goes with a million tokens per step."""
    train_survivors: Literal["lora_merge", "none", "full"] = "lora_merge"
    """What trains besides virtual blocks. lora_merge: adapters on the other linears, merged at the
    end; full: those linears themselves, which wants a learning rate of 5e-5 or so; none: nothing,
    not even norms."""
    min_learning_rate_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a fraction of the highest."""
    warmup_fraction: float = Field(default=0.03, ge=0, lt=1)
    """Fraction of the steps in which the learning rate rises."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Of the adapters; norms and biases have none."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm."""
    lora_rank: int = Field(default=32, ge=1)
    """Rank of each adapter."""
    lora_alpha: int = Field(default=32, ge=1)
    """An adapter adds lora_alpha / lora_rank * B A to its weight."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout before each adapter; above 0 a small model trains slower."""
    train_norms: bool = True
    """Train norms and all other 1-d parameters of the blocks and the final norm in place."""
    distillation: float = Field(default=0.0, ge=0, le=1)
    """Weight of the divergence from the teacher; the next-token loss has the rest."""
    temperature: float = Field(default=1.0, gt=0)
    """Both distributions are softened by it in the divergence."""
    tail_distillation: float = Field(default=0.0, ge=0)
    """Weight of the distance to the teacher's hidden states after the last blocks, added to the
    loss; the paper's form of FoldGPT wants 1."""
    tail_blocks: int = Field(default=4, ge=1)
    """Number of last blocks whose outputs are compared, each with that of its block in the teacher,
    the last with the teacher's last."""
    cache_teacher: bool = True
    """Where windows come again, let the teacher pass each once and keep its hidden states, in files
    where they take more than a gigabyte."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """bfloat16 is autocast; auto takes it where the hardware multiplies bfloat16 faster."""
    validation_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of the windows, and at most 32 of them, that train nothing: where their next-token loss
    is higher after training than before, the model stays as it was. With 0 nothing is held back."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between two checkpoints."""
    seed: int = 0
    """Of the adapters' start, the order of the windows and the dropout."""

    @property
    def needs_teacher(self) -> bool:
        return self.distillation > 0 or self.tail_distillation > 0

    def keeps_teacher(self, num_windows: int, num_processes: int = 1) -> bool:
        """Whether its hidden states on so many windows are kept, which each process does alone."""
        passed = self.steps * self.schedule.windows_per_step / num_processes
        return self.cache_teacher and self.needs_teacher and passed >= WORTH_FROM * num_windows

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            steps=self.steps,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            warmup_fraction=self.warmup_fraction,
            min_fraction=self.min_learning_rate_fraction,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
        )


@dataclass(frozen=True)
class RecoveryResult:
    """A recovered model, and how it came about.

    Args:
        history: one row per optimizer step: step, loss, cross_entropy, divergence, tail_distance,
            learning_rate_fraction, gradient_norm.
        tokens: tokens trained on.
        seconds: spent in steps, those before an interruption included.
        validation_before, validation_after: next-token loss in nats per token on the validation
            windows; None without such.
    """

    model: PreTrainedModel
    history: History
    tokens: int
    seconds: float
    validation_before: float | None = None
    validation_after: float | None = None

    @property
    def is_worse(self) -> bool:
        """True when training made the validation loss rise: the model stayed as it was."""
        if self.validation_before is None or self.validation_after is None:
            return False
        return self.validation_after > self.validation_before

    @property
    def summary(self) -> str:
        """One sentence for a person."""
        trained = f"{len(self.history)} steps, {self.tokens} tokens, {self.seconds:.1f} s"
        if self.validation_before is None or self.validation_after is None:
            return f"recovery: {trained}"
        losses = f"validation loss {self.validation_before:.4f} -> {self.validation_after:.4f}"
        verdict = "; it made the model worse, which stays as it was" if self.is_worse else ""
        return f"recovery: {losses} in {trained}{verdict}"


def recover(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    settings: Recovery,
    *,
    teacher: PreTrainedModel | None = None,
    plan: Plan | None = None,
    validation: Int[Tensor, "validation_windows validation_tokens"] | None = None,
    work: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> RecoveryResult:
    """Train `model` in place on token windows; embeddings and output projection stay as they are.

    The model keeps its class and its tensors' names; its weights, too, where training made it worse
    on the `validation` windows, or else on those that the settings hold back. With `work`,
    checkpoints go there, and a run of the same model, data and settings goes on from the newest. On
    an exception the model is as it came. Runs in one process wait for each other. `plan` says which
    base blocks are left, which a stock model without them cannot say by itself; without it that is
    `plan_of(model)`.

    In several processes that Accelerate launched each calls this with the same arguments, and has
    the whole recovered model in the end. They train with the whole of it, or, launched with FSDP,
    each with its part of the blocks (see `sharding`); then `model` and `teacher` belong on the CPU.

    Raises:
        InputError: the loss is no longer finite, or settings, data and models do not fit together.
    """
    if validation is None:
        windows, validation = _held_back(windows, settings)
    _check(model, windows, settings, teacher)
    tail = _tail(plan or plan_of(model), model, settings, teacher)
    with _ONE_AT_A_TIME, _random_numbers(settings.seed):
        accelerator = _accelerator(settings)
        mesh = mesh_of(accelerator)
        if not settings.needs_teacher:
            teacher = None
        if teacher is not None:
            teacher.eval()
        if mesh is None:
            for whole in filter(None, (model, teacher)):
                whole.to(accelerator.device)
        return _recover(
            model, windows, settings, teacher, tail, validation, work, progress, accelerator, mesh
        )


def _recover(
    model: PreTrainedModel,
    windows: Tensor,
    settings: Recovery,
    teacher: PreTrainedModel | None,
    tail: Tail | None,
    validation: Tensor | None,
    work: Path | None,
    progress: Callable[[str, int, int], None] | None,
    accelerator: "Accelerator",
    mesh: "DeviceMesh | None",
) -> RecoveryResult:
    dtype = autocast_dtype(settings.precision, accelerator.device)
    digest = _digest(model, windows, settings, teacher, tail, dtype)
    check_agreement(digest, accelerator)
    checkpoints = None
    if work is not None:
        checkpoints = Checkpoints(work, digest, settings.checkpoint_every)
    head_of(model)  # which refuses what the loss could not be computed of
    adapters = adapters_for(model, settings, dtype)
    batch_size = settings.batch_size
    try:
        blend = Blend(settings.distillation, settings.temperature)
        trainable: dict[str, nn.Parameter] = adapters.trainable
        if mesh is None:
            objective = Objective(model, projection_of(model), blend, teacher, dtype, tail)
        else:
            objective = spread_objective(
                model, blend, teacher, dtype, tail, mesh, accelerator.device
            )
            batch_size //= accelerator.num_processes
            trainable = parts_of(objective, model, trainable)
        before = None if validation is None else mean_loss(objective, validation, batch_size)
        training = Training(
            objective=objective if mesh is not None else accelerator.prepare(objective),
            trainable=trainable,
            optimizer=_optimizer(adapters, trainable, settings),
            schedule=settings.schedule,
            accelerator=accelerator,
            figure_names=FIGURES,
            has_dropout=settings.lora_dropout > 0,
            checkpoints=checkpoints,
            is_spread=mesh is not None,
        )
        saved = None if checkpoints is None else checkpoints.newest()
        # Of a teacher that is spread each process would need the states of all windows.
        if mesh is None and settings.keeps_teacher(len(windows), accelerator.num_processes):
            folder = Path(tempfile.gettempdir()) if work is None else work
            objective.keep_teacher(windows, batch_size, folder)
        accelerator.wait_for_everyone()
        history, seconds = training.run(windows, saved, _reporter(progress, settings.steps))
        after = None if validation is None else mean_loss(objective, validation, batch_size)
        if mesh is not None:
            take_back(trainable, adapters.trainable)
    except BaseException:
        adapters.discard()
        raise
    tokens = settings.steps * settings.schedule.windows_per_step * windows.shape[1]
    result = RecoveryResult(model, history, tokens, seconds, before, after)
    if settings.steps and not result.is_worse:
        adapters.merge()
    else:
        adapters.discard()
    logger.log(logging.WARNING if result.is_worse else logging.INFO, result.summary)
    return result


def _held_back(windows: Tensor, settings: Recovery) -> tuple[Tensor, Tensor | None]:
    """The windows that train, and those that tell whether it did any good; None without such."""
    count = min(round(settings.validation_fraction * len(windows)), _MOST_VALIDATION_WINDOWS)
    if not (settings.steps and count):
        return windows, None
    generator = torch.Generator().manual_seed(derived_seed(settings.seed, "validation"))
    order = torch.randperm(len(windows), generator=generator)
    return windows[order[count:].sort().values], windows[order[:count].sort().values]


def _tail(
    plan: Plan, model: PreTrainedModel, settings: Recovery, teacher: PreTrainedModel | None
) -> Tail | None:
    if settings.tail_distillation == 0:
        return None
    if teacher is None:
        raise InputError(
            f"tail_distillation {settings.tail_distillation} needs a teacher; give one or set "
            "tail_distillation: 0"
        )
    sizes = [base_config_of(each.config).hidden_size for each in (teacher, model)]
    bases = [each.base_num_blocks for each in (plan_of(teacher), plan)]
    if sizes[0] != sizes[1] or bases[0] != bases[1]:
        raise InputError(
            "tail_distillation compares hidden states of one base model; teacher and student have "
            f"hidden sizes {sizes[0]} and {sizes[1]} and come from {bases[0]} and {bases[1]} blocks"
        )
    pairs = tail_pairs(plan, plan_of(teacher), settings.tail_blocks)
    return Tail(settings.tail_distillation, pairs)


def autocast_dtype(
    precision: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> torch.dtype | None:
    """The type that matmuls are cast to on `device`; None computes in float32."""
    if precision == "auto":
        if device.type == "cuda":
            gains = torch.cuda.is_bf16_supported(including_emulation=False)
        else:  # without its matrix unit a CPU gains nothing
            gains = device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if gains else None
    return torch.bfloat16 if precision == "bfloat16" else None


def adapters_for(
    model: PreTrainedModel, settings: Recovery, dtype: torch.dtype | None
) -> "Adapters":
    """`model`, which may be on the meta device, opened for a training that computes in `dtype` (see
    `autocast_dtype`)."""
    from foldstack.compression.training.adapters import Adapters

    return Adapters(
        model,
        rank=settings.lora_rank,
        alpha=settings.lora_alpha,
        dropout=settings.lora_dropout,
        train_vectors=settings.train_norms,
        in_float32=dtype is None,
        survivors=settings.train_survivors,
    )


def _optimizer(
    adapters: "Adapters", trainable: Mapping[str, nn.Parameter], settings: Recovery
) -> torch.optim.Optimizer:
    """Of what is trained, which may be parts of the adapters' parameters by the same names."""
    groups = [
        {
            "params": [trainable[name] for name in adapters.matrices],
            "peak": settings.learning_rate,
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [trainable[name] for name in adapters.vectors],
            "peak": settings.norm_learning_rate,
            "weight_decay": 0.0,
        },
        {
            "params": [trainable[name] for name in adapters.virtual],
            "peak": settings.virtual_learning_rate,
            "weight_decay": 0.0,
        },
    ]
    filled = [group for group in groups if group["params"]]
    return torch.optim.AdamW(filled, lr=settings.learning_rate, betas=BETAS, fused=True)


def _reporter(
    progress: Callable[[str, int, int], None] | None, steps: int
) -> Callable[[Row], None]:
    def report(row: Row) -> None:
        if progress is not None:
            progress(f"recovery, loss {row['loss']:.3f}", int(row["step"]), steps)

    return report


def _accelerator(settings: Recovery) -> "Accelerator":
    from accelerate import Accelerator, DistributedType

    accelerator = Accelerator()
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"recovery was launched under {accelerator.distributed_type.value}; use FSDP, or plain "
            "data parallelism"
        )
    if accelerator.scaler is not None:
        raise InputError("recovery trains in bfloat16 or float32; launch it without fp16")
    if settings.batch_size % accelerator.num_processes:
        raise InputError(
            f"batch_size is shared out over the processes; {settings.batch_size} is not a multiple "
            f"of {accelerator.num_processes}"
        )
    return accelerator


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Seeded from `seed` inside, as they were outside."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(derived_seed(seed, "adapters"))
        yield


def _check(
    model: PreTrainedModel, windows: Tensor, settings: Recovery, teacher: PreTrainedModel | None
) -> None:
    if len(windows) == 0 or windows.shape[1] < 2:
        raise InputError(
            f"recovery needs windows of 2 tokens or more, got {len(windows)} of {windows.shape[1]}"
        )
    is_virtual = any(block.is_virtual for block in plan_of(model).blocks)
    if settings.train_survivors == "none" and not is_virtual:
        raise InputError(
            "train_survivors none trains virtual blocks alone, and this model has none; use "
            "lora_merge or full"
        )
    if settings.distillation > 0 and teacher is None:
        raise InputError(
            f"distillation {settings.distillation} needs a teacher; give one or set distillation: 0"
        )
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise InputError(
            "teacher and student must share a tokenizer; their vocabularies have "
            f"{teacher.config.vocab_size} and {model.config.vocab_size} tokens"
        )


def _digest(
    model: PreTrainedModel,
    windows: Tensor,
    settings: Recovery,
    teacher: PreTrainedModel | None,
    tail: Tail | None,
    dtype: torch.dtype | None,
) -> str:
    """Of all that the outcome depends on, the weights represented by some values of each tensor."""
    return digest_json(
        {
            "settings": settings.model_dump(mode="json", exclude={"checkpoint_every", "precision"}),
            "autocast": str(dtype),
            "tail": None if tail is None else tail.pairs,
            "windows": hashlib.sha256(windows.to(torch.int64).cpu().numpy().tobytes()).hexdigest(),
            "model": _sample(model),
            "teacher": None if teacher is None else _sample(teacher),
        }
    )


def _sample(model: PreTrainedModel) -> dict[str, str]:
    sample = {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)[:_SAMPLED_VALUES].cpu()
        content = hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes())
        sample[name] = f"{tuple(parameter.shape)} {parameter.dtype} {content.hexdigest()}"
    return sample
