"""Block gates: one number per block, trained to close where the model can do without the block.

With x^(i) the input of block i and f_i the block, its residual adds included,

    x^(i+1) = x^(i) + g_i (f_i(x^(i)) - x^(i)),     g_i = t_i^2 / (t_i^2 + eps)

so that g = 1 is the model, and g_i = 0 the model without block i. All t train together
(`gate_training`), and nothing else does, to lower the next-token loss with sum of g = number of
blocks to keep. What a gate costs is thus seen with the others closed, which scores of single blocks
cannot see. eps is not a schedule: it is solved for the budget, which then holds exactly. Falling by
itself, it opens every gate and polarises nothing, and a price on open gates swings.

Block gates trained together, polarisation and a budget: FoldGPT (Liu et al. 2024, arXiv
2407.00928), whose formulas are not public; the polarised form: GDP (Guo et al. 2021, arXiv
2109.02220).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.training.training_checkpoints import History

# Bounds of log(t^2 / eps) between which the budget is solved for: gates of 1e-13.
_FARTHEST = 30.0
_HALVINGS = 60
# Of the steps: then the gates are as far from each other as they get.
_POLARISED = 0.9


class GateTraining(BaseModel):
    """How long and how fast block gates train."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    form: Literal["sampled", "relaxed"] = "sampled"
    """sampled: every window is read with gates that are open or closed, drawn anew; relaxed: with
    gates in between, which follow the gradient."""
    steps: int = Field(default=80, ge=1)
    """Steps of one training."""
    tokens: int = Field(default=16_384, ge=1)
    """Calibration tokens to train on, in whole windows from the first one."""
    batch_tokens: int = Field(default=1_024, ge=1)
    """Tokens at once, in whole windows: those of a relaxed step. A sampled step, which needs no
    gradient, takes as many three times."""
    hold: float = Field(default=0.25, ge=0, lt=1)
    """Fraction of the steps before gates are polarised."""
    learning_rate: float = Field(default=0.15, gt=0)
    """relaxed: of log t^2, by Adam."""
    first_pull: float = Field(default=1.0, gt=0)
    """relaxed: pull to 0 and 1 after `hold`, times the size of the loss's gradient with respect to
    a gate."""
    last_pull: float = Field(default=5_000.0, gt=0)
    """relaxed: pull at nine tenths of the steps, to which it rises geometrically."""
    last_temperature: float = Field(default=0.02, gt=0)
    """sampled: temperature at nine tenths of the steps, over that up to `hold`; it falls
    geometrically."""

    def pull(self, step: int) -> float:
        """Of step `step`, counted from 0, in units of the gradient."""
        if step < self.hold * self.steps:
            return 0.0
        return self.first_pull * (self.last_pull / self.first_pull) ** self._polarised(step)

    def temperature(self, step: int) -> float:
        """Of step `step`, counted from 0, over the first step's."""
        return self.last_temperature ** self._polarised(step)

    def _polarised(self, step: int) -> float:
        """How far the steps before this one have got from `hold` to nine tenths."""
        rise = (step / self.steps - self.hold) / max(_POLARISED - self.hold, 1e-9)
        return max(0.0, min(1.0, rise))


@dataclass(frozen=True)
class Gates:
    """What a training of gates ended with.

    Args:
        values: mean gate of each block over the last tenth of the steps.
        history: one row per step: step, loss, and pull or temperature.
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


def mean_jaccard(sets: Sequence[frozenset[int]]) -> float:
    """Mean over pairs of |a and b| / |a or b|: how much the sets agree; 1 for fewer than two."""
    agreements = [len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
    return sum(agreements) / len(agreements) if agreements else 1.0
