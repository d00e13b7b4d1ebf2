"""Next-token loss and distillation from a teacher, in bounded memory whatever the vocabulary."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.structure.architectures import architecture_of, base_config_of
from foldstack.compression.structure.plan import Plan

FIGURES = ("loss", "cross_entropy", "divergence")

# How many logits exist at a time: on a CPU what its caches hold, elsewhere what keeps a GPU busy.
LOGITS_ON_CPU = 2**21
LOGITS_ELSEWHERE = 2**26

_PROBE_TOKENS = 8


@dataclass(frozen=True)
class Head:
    """The output projection of a causal model: hidden state to logits.

    Args:
        softcap: logits are softcap * tanh(logits / softcap), as in Gemma 2; None leaves them.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, "vocab"] | None = None
    softcap: float | None = None

    def for_compute(self) -> "Head":
        """The head in the precision of the autocast region that we are in."""
        kind = self.weight.device.type
        if not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)
        bias = None if self.bias is None else self.bias.to(dtype)
        return Head(self.weight.to(dtype), bias, self.softcap)

    def logits(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """At least in float32."""
        logits = F.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The output projection of `model`.

    Raises:
        InputError: the model's logits are not what its projection gives.
    """
    head = projection_of(model)
    config = base_config_of(model.config)
    probe = torch.arange(_PROBE_TOKENS, device=head.weight.device)[None] % len(head.weight)
    with torch.no_grad():
        expected = model(input_ids=probe, use_cache=False).logits
        found = head.logits(last_hidden_state(model, probe)).to(expected.dtype)
    if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise InputError(
            f"recovery does not know what {config.model_type} does to its logits after the output "
            "projection; use a model of a supported family"
        )
    return head


def projection_of(model: PreTrainedModel) -> Head:
    """What `head_of` says of a model that was looked at before."""
    projection = model.get_output_embeddings()
    assert isinstance(projection, nn.Linear), type(projection)
    softcap = getattr(base_config_of(model.config), "final_logit_softcapping", None)
    return Head(projection.weight.detach(), _detached(projection.bias), softcap)


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


def last_hidden_state(
    model: PreTrainedModel, tokens: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch tokens hidden"]:
    """What the output projection of `model` reads, without computing the logits."""
    seen: list[Tensor] = []

    def keep_and_shorten(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor]:
        seen.append(inputs[0])
        return (inputs[0][:, :1],)

    handle = model.get_output_embeddings().register_forward_pre_hook(keep_and_shorten)
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def block_outputs(model: PreTrainedModel, positions: Iterable[int]) -> Iterator[dict[int, Tensor]]:
    """Inside, every call of `model` leaves the outputs of these blocks in the dictionary; that of
    the last block is the one before the final norm."""
    blocks = architecture_of(model).blocks(model)
    seen: dict[int, Tensor] = {}

    def keep(position: int, output: Any) -> None:
        seen[position] = output[0] if isinstance(output, tuple) else output

    handles = [
        blocks[position].register_forward_hook(
            lambda _block, _inputs, output, position=position: keep(position, output)
        )
        for position in positions
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tail_pairs(student: Plan, teacher: Plan, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """(student position, teacher position) of the last `num_blocks` blocks of the student.

    A block belongs to the teacher's block that does the last of the base blocks that it stands for,
    the student's last block to the teacher's last one.

    Raises:
        InputError: the teacher lacks a base block that the student has.
    """
    position_of = {
        source: position
        for position, block in enumerate(teacher.blocks)
        for source in block.stands_for
    }
    last = len(student.blocks) - 1
    pairs = []
    for position in range(max(0, last + 1 - num_blocks), last):
        source = student.blocks[position].stands_for[-1]
        if source not in position_of:
            raise InputError(
                f"tail distillation needs a teacher that has every block of the student; block "
                f"{position} of the student is block {source} of the base model, which the "
                f"teacher of {len(teacher.blocks)} blocks lacks"
            )
        pairs.append((position, position_of[source]))
    return (*pairs, (last, len(teacher.blocks) - 1))


def hidden_distance(
    student: Float[Tensor, "tokens hidden"], teacher: Float[Tensor, "tokens hidden"]
) -> Float[Tensor, ""]:
    """Mean over tokens of (1 - cos(u, v)) + |u - v|^2 / |v|^2, at least in float32; 0 for u = v.

    FoldGPT's tail-layer distillation (arXiv 2407.00928), reconstructed; taken per token, so that
    the few tokens with huge hidden states do not hide the others.
    """
    u, v = (
        hidden.to(torch.promote_types(hidden.dtype, torch.float32)) for hidden in (student, teacher)
    )
    size = v.square().sum(-1)
    error = (u - v).square().sum(-1) / size.clamp_min(torch.finfo(v.dtype).eps * size.mean())
    return (1 - F.cosine_similarity(u, v, dim=-1) + error).mean()


@dataclass(frozen=True)
class Reference:
    """What the teacher says: its hidden states, and its head that makes logits of them."""

    hidden: Float[Tensor, "tokens hidden"]
    head: Head

    def for_compute(self) -> "Reference":
        return Reference(self.hidden, self.head.for_compute())

    def logits(self, part: slice) -> Float[Tensor, "part vocab"]:
        return self.head.logits(self.hidden[part])


@dataclass(frozen=True)
class Blend:
    """(1 - distillation) * CE + distillation * T^2 * KL(teacher || student), a mean over tokens.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2; T^2 keeps the size of the gradient.
    """

    distillation: float
    temperature: float = 1.0

    def __call__(
        self,
        hidden: Float[Tensor, "tokens hidden"],
        targets: Int[Tensor, "tokens"],
        head: Head,
        teacher: Reference | None = None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "3"]]:
        """The loss, and the values of FIGURES (KL without T^2), which carry no gradient.

        Gradient flows to `hidden` alone: the heads are frozen. The logits of a slice of tokens are
        made, used and dropped before those of the next.
        """
        loss, figures = _SlicedLoss.apply(hidden, targets, head, teacher, self)  # type: ignore[no-untyped-call]
        return loss, figures

    def of_slice(
        self,
        logits: Float[Tensor, "tokens vocab"],
        targets: Int[Tensor, "tokens"],
        teacher_logits: Float[Tensor, "tokens vocab"] | None,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Sums over the tokens: CE and KL."""
        log_probability = F.log_softmax(logits, dim=-1)
        cross_entropy = F.nll_loss(log_probability, targets, reduction="sum")
        if teacher_logits is None:
            return cross_entropy, torch.zeros_like(cross_entropy)
        if self.temperature != 1:
            log_probability = F.log_softmax(logits / self.temperature, dim=-1)
            teacher_logits = teacher_logits / self.temperature
        teacher_log_probability = F.log_softmax(teacher_logits, dim=-1)
        divergence = F.kl_div(
            log_probability, teacher_log_probability, reduction="sum", log_target=True
        )
        return cross_entropy, divergence

    def weigh(self, cross_entropy: Tensor, divergence: Tensor) -> Tensor:
        weight = self.distillation
        return (1 - weight) * cross_entropy + weight * self.temperature**2 * divergence


class _SlicedLoss(torch.autograd.Function):
    """The loss and, in the same pass over the slices, its gradient: no slice is computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        head: Head,
        teacher: Reference | None,
        blend: Blend,
    ) -> tuple[Tensor, Tensor]:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        head = head.for_compute()
        teacher = None if teacher is None else teacher.for_compute()
        total = torch.zeros(
            2, device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32)
        )
        for part in _slices(len(hidden), len(head.weight), hidden.device.type):
            with torch.set_grad_enabled(needs_gradient):
                piece = hidden[part].detach().requires_grad_(needs_gradient)
                with torch.no_grad():
                    reference = None if teacher is None else teacher.logits(part)
                sums = blend.of_slice(head.logits(piece), targets[part], reference)
                if gradient is not None:
                    loss = blend.weigh(*sums) / len(hidden)
                    (gradient[part],) = torch.autograd.grad(loss, piece)
            total += torch.stack(sums).detach()
        cross_entropy, divergence = total / len(hidden)
        loss = blend.weigh(cross_entropy, divergence)
        figures = torch.stack([loss, cross_entropy, divergence])
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(figures)
        return loss, figures

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0], None, None, None, None


def _slices(num_tokens: int, vocab_size: int, device_type: str) -> Iterator[slice]:
    at_a_time = LOGITS_ON_CPU if device_type == "cpu" else LOGITS_ELSEWHERE
    length = max(1, at_a_time // vocab_size)
    for start in range(0, num_tokens, length):
        yield slice(start, min(start + length, num_tokens))
