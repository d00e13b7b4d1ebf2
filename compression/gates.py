"""Block gates: one number per block, trained to close where the model can do without the block.

With x^(i) the input of block i and f_i the block, its residual adds included,

    x^(i+1) = x^(i) + g_i (f_i(x^(i)) - x^(i)),     g_i = t_i^2 / (t_i^2 + eps)

so that g = 1 is the model, and g_i = 0 the model without block i. All t train together, and nothing
else does, to lower

    next-token loss + pull * sum of g_i (1 - g_i)     with sum of g = number of blocks to keep

What a gate costs is thus seen with the others partly closed, which scores of single blocks cannot
see. The pull, 0 at first, grows until every gate is at 0 or at 1.

Block gates trained together, polarisation and a budget: FoldGPT (Liu et al. 2024, arXiv
2407.00928), whose formulas are not public; the polarised form: GDP (Guo et al. 2021, arXiv
2109.02220).

What this adds, because gates that follow a penalised budget by Adam found no good set:
- eps is not a schedule: each step solves it for the budget, which then holds exactly. Falling by
  itself, eps opens every gate and polarises nothing, and a price on open gates swings.
- A block that is cheap to close by half may be dear to close, so that relaxed gates rank it wrongly
  (seen in a model of five blocks). With `noise` every window at first has gates of its own, with
  logistic noise added to log t^2, most of them near 0 or 1; it fades while the pull grows. It is
  off unless asked for: on a model of twelve blocks it made the set depend on the seed.
- To shrink all blocks alike costs next to nothing, since what follows them is a norm: only
  differences between gates tell. The gradient with respect to the gates is taken per window, and
  that of the open model on the same window is subtracted and its mean over all windows added (a
  control variate), which takes out 0.97 of the variance at the start.
"""

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.architectures import architecture_of
from foldstack.compression.candidate_loss import windows_of
from foldstack.compression.digest import digest_json
from foldstack.compression.distillation import Blend, head_of
from foldstack.compression.errors import InputError
from foldstack.compression.objective import Objective
from foldstack.compression.training_loop import Checkpoints, History, Schedule, derived_seed

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

_BETAS = (0.9, 0.99)
_CHECKPOINT_EVERY = 10
# Bounds of log(t^2 / eps) between which the budget is solved for: gates of 1e-13.
_FARTHEST = 30.0
_HALVINGS = 60


class GateTraining(BaseModel):
    """How long and how fast block gates train."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    steps: int = Field(default=80, ge=1)
    """Optimizer steps of one training."""
    tokens: int = Field(default=16_384, ge=1)
    """Calibration tokens to train on, in whole windows from the first one."""
    batch_tokens: int = Field(default=1_024, ge=1)
    """Tokens per step, in whole windows."""
    learning_rate: float = Field(default=0.15, gt=0)
    """Of log t^2, by Adam."""
    hold: float = Field(default=0.25, ge=0, lt=1)
    """Fraction of the steps without pull."""
    first_pull: float = Field(default=1.0, gt=0)
    """Pull after that, times the size of the loss's gradient with respect to a gate."""
    last_pull: float = Field(default=5_000.0, gt=0)
    """Pull at nine tenths of the steps, to which it rises geometrically."""
    noise: float = Field(default=0.0, ge=0)
    """Scale of the noise on log t^2 in the first half of the steps, 3 if any; it is gone at nine
    tenths."""

    def noise_at(self, step: int) -> float:
        """Scale of the noise in step `step`, counted from 0."""
        return self.noise * max(0.0, min(1.0, (0.9 - step / self.steps) / 0.4))

    def pull(self, step: int) -> float:
        """Of step `step`, counted from 0, in units of the gradient."""
        done = step / self.steps
        if done < self.hold:
            return 0.0
        rise = min(1.0, (done - self.hold) / max(0.9 - self.hold, 1e-9))
        return self.first_pull * (self.last_pull / self.first_pull) ** rise


@dataclass(frozen=True)
class Gates:
    """What a training of gates ended with.

    Args:
        values: mean gate of each block over the last tenth of the steps.
        history: one row per step: step, loss, pull.
    """

    values: tuple[float, ...]
    history: History

    def order(self) -> tuple[int, ...]:
        """The blocks from the most to the least removable; ties go to the earlier block."""
        return tuple(sorted(range(len(self.values)), key=lambda block: (self.values[block], block)))


@contextmanager
def gated(model: nn.Module, gates: Float[Tensor, "*windows blocks"]) -> Iterator[None]:
    """Inside, block i puts out x + g_i (f_i(x) - x): exactly f_i(x) at 1 and exactly x at 0.

    Nothing in `model` changes. Gates may differ between the windows of a batch. Not for decoding
    from a cache, which a closed block would still fill.
    """
    blocks = architecture_of(model).blocks(model)
    assert gates.shape[-1] == len(blocks), f"{gates.shape[-1]} gates for {len(blocks)} blocks"

    def hook_of(position: int) -> Callable[..., Any]:
        def mix(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            gate = gates[..., position, None, None].to(after)
            mixed = torch.lerp(before, after, gate)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        return mix

    handles = [
        block.register_forward_hook(hook_of(position), with_kwargs=True)
        for position, block in enumerate(blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gates_of(
    log_t2: Float[Tensor, "*windows blocks"], num_kept: int
) -> Float[Tensor, "*windows blocks"]:
    """t^2 / (t^2 + eps), with the eps of each window for which its gates add up to `num_kept`."""
    low = log_t2.amin(-1, keepdim=True) - _FARTHEST
    high = log_t2.amax(-1, keepdim=True) + _FARTHEST
    for _ in range(_HALVINGS):  # the larger eps is, the smaller is the sum
        log_eps = (low + high) / 2
        is_over = torch.sigmoid(log_t2 - log_eps).sum(-1, keepdim=True) > num_kept
        low, high = torch.where(is_over, log_eps, low), torch.where(is_over, high, log_eps)
    return torch.sigmoid(log_t2 - log_eps)


def along_budget(
    gates: Float[Tensor, "*windows blocks"], gradient: Float[Tensor, "*windows blocks"]
) -> Float[Tensor, "*windows blocks"]:
    """The gradient with respect to log t^2 of what has this gradient with respect to the gates.

    eps follows t so that the sum of the gates stays: with w = g (1 - g), dg_i = w_i (dlog t_i^2 -
    dlog eps), and dlog eps is the mean of dlog t^2 weighted by w.
    """
    weight = gates * (1 - gates)
    total = weight.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).tiny)
    return weight * (gradient - (weight * gradient).sum(-1, keepdim=True) / total)


def train_gates(
    model: PreTrainedModel,
    windows: Int[Tensor, "windows tokens"],
    num_kept: int,
    settings: GateTraining,
    *,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress | None = None,
) -> Gates:
    """Train the gates of `model` until `num_kept` of them are open; `model` stays as it is.

    Deterministic given the seed, which decides the order of the windows. With `work`, a folder, a
    killed run continues there. Memory grows with batch_tokens: the activations of all blocks.

    Raises:
        InputError: there is no block to remove or none to keep, or the loss is not finite.
    """
    num_blocks = len(architecture_of(model).blocks(model))
    if not 0 < num_kept < num_blocks:
        raise InputError(f"gates keep 1 to {num_blocks - 1} of {num_blocks} blocks, got {num_kept}")
    windows = windows_of(windows, settings.tokens)
    run = _Run(model, windows, num_kept, settings, seed, work)
    with _frozen(model):
        run.open_gradients(progress)
        while run.step < settings.steps:
            run.take_step()
            if progress is not None:
                progress("train gates", run.step, settings.steps)
    last = run.gates[-math.ceil(settings.steps / 10) :]
    return Gates(tuple(torch.stack(last).mean(0).tolist()), run.history)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


class _Run:
    """A training's state, in memory and on disk."""

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Tensor,
        num_kept: int,
        settings: GateTraining,
        seed: int,
        work: Path | None,
    ) -> None:
        self.model, self.windows, self.num_kept, self.settings = model, windows, num_kept, settings
        self.objective = Objective(model, head_of(model), Blend(0.0))
        batch = min(len(windows), max(1, settings.batch_tokens // windows.shape[1]))
        self.schedule = Schedule(
            steps=settings.steps,
            batch_size=batch,
            gradient_accumulation=1,
            warmup_fraction=0.0,
            min_fraction=1.0,
            max_grad_norm=1.0,
            seed=seed,
        )
        num_blocks = len(architecture_of(model).blocks(model))
        self.log_t2, self.mean, self.square = torch.zeros(3, num_blocks, dtype=torch.float64)
        self.open = torch.empty(0, num_blocks, dtype=torch.float64)
        self.sizes: list[float] = []
        self.gates: list[Tensor] = []
        self.history: History = []
        self.checkpoints = None
        if work is not None:
            key = _key(model, windows, num_kept, settings, seed)
            self.checkpoints = Checkpoints(work, digest_json(key), every=_CHECKPOINT_EVERY)
            self._resume()

    @property
    def step(self) -> int:
        return len(self.history)

    def open_gradients(self, progress: Progress | None) -> None:
        """The gradient of every window's loss at the open gates, unless a killed run had it."""
        if len(self.open):
            return
        indices = torch.arange(len(self.windows)).split(self.schedule.batch_size)
        ones = torch.ones_like(self.log_t2)
        parts = []
        for number, batch in enumerate(indices, start=1):
            parts.append(self._gradients(batch, ones)[1])
            if progress is not None:
                progress("gradients of open gates", number, len(indices))
        self.open = torch.cat(parts)

    def take_step(self) -> None:
        """One step of Adam on log t^2, and a checkpoint when one is due."""
        settings, step = self.settings, self.step
        (batch,) = self.schedule.windows_of(step, len(self.windows))
        gates = gates_of(self.log_t2 + self._noise(len(batch)), self.num_kept)
        loss, gradients = self._gradients(batch, gates)
        gradients = gradients - self.open[batch] + self.open.mean(0)
        if step <= settings.hold * settings.steps:
            mean = gradients.mean(0)
            self.sizes.append(float((mean - mean.median()).abs().median()))
        pull = settings.pull(step) * sum(self.sizes) / len(self.sizes)
        slope = along_budget(gates, gradients + pull * (1 - 2 * gates)).mean(0)
        self.mean.lerp_(slope, 1 - _BETAS[0])
        self.square.lerp_(slope**2, 1 - _BETAS[1])
        mean, square = (
            moment / (1 - beta ** (step + 1))
            for moment, beta in zip((self.mean, self.square), _BETAS, strict=True)
        )
        tiny = torch.finfo(square.dtype).tiny
        self.log_t2 -= settings.learning_rate * mean / (square.sqrt() + tiny)
        self.gates.append(gates_of(self.log_t2, self.num_kept))
        self.history.append({"step": step + 1, "loss": loss, "pull": pull})
        self._save()

    def _noise(self, num_windows: int) -> Tensor:
        """Logistic noise, the same for the same seed and step."""
        seed = derived_seed(self.schedule.seed, "gates", self.step)
        generator = torch.Generator().manual_seed(seed)
        shape = (num_windows, len(self.log_t2))
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return self.settings.noise_at(self.step) * torch.logit(uniform, eps=1e-4)

    def _gradients(self, batch: Tensor, gates: Tensor) -> tuple[float, Tensor]:
        """The mean loss, and every window's gradient with respect to its gates, in float64."""
        tokens = self.windows[batch].to(self.model.device, torch.long)
        of_windows = gates.float().expand(len(batch), -1).to(tokens.device)
        of_windows = of_windows.clone().requires_grad_(True)
        with gated(self.model, of_windows):
            loss, _ = self.objective(tokens)
        (gradients,) = torch.autograd.grad(loss, of_windows)
        if not (torch.isfinite(loss) and torch.isfinite(gradients).all()):
            raise InputError(
                f"the loss of the gated model must be finite, got {float(loss.detach())} at step "
                f"{self.step + 1}; use a model in float32 or bfloat16"
            )
        return float(loss.detach()), len(batch) * gradients.double().cpu()

    def _save(self) -> None:
        if self.checkpoints is None or self.step % self.checkpoints.every:
            return
        tensors = {
            "log_t2": self.log_t2,
            "mean": self.mean,
            "square": self.square,
            "open": self.open,
            "gates": torch.stack(self.gates),
        }
        self.checkpoints.write(tensors, self.history, sizes=self.sizes)

    def _resume(self) -> None:
        saved = None if self.checkpoints is None else self.checkpoints.newest()
        if saved is None:
            return
        self.log_t2, self.mean, self.square, self.open = (
            saved.tensors[name] for name in ("log_t2", "mean", "square", "open")
        )
        self.gates = list(saved.tensors["gates"])
        self.history, self.sizes = saved.record["history"], saved.record["sizes"]


def _key(
    model: PreTrainedModel, windows: Tensor, num_kept: int, settings: GateTraining, seed: int
) -> list[Any]:
    """Tells runs apart: the settings, the data, and the model by a sum per parameter."""
    sums = {name: float(p.detach().double().sum()) for name, p in model.named_parameters()}
    content = hashlib.sha256(windows.to(torch.int64).cpu().numpy().tobytes()).hexdigest()
    return [settings.model_dump(mode="json"), seed, num_kept, content, sums]


def mean_jaccard(sets: Sequence[frozenset[int]]) -> float:
    """Mean over pairs of |a and b| / |a or b|: how much the sets agree; 1 for fewer than two."""
    agreements = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    return sum(agreements) / len(agreements) if agreements else 1.0
