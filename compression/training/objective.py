"""What recovery minimises: token windows in, the loss of the student beside its teacher out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from foldstack.compression.out_of_memory import with_smaller_batches
from foldstack.compression.training.distillation import FIGURES as BLEND_FIGURES
from foldstack.compression.training.distillation import (
    Blend,
    Head,
    Reference,
    block_outputs,
    head_of,
    hidden_distance,
    last_hidden_state,
)
from foldstack.compression.training.teacher_states import Taught, TeacherStates

FIGURES = (*BLEND_FIGURES, "tail_distance")


class _Float32Attention(TorchFunctionMode):
    """Attention in float32 inside a CPU's autocast region.

    PyTorch's fused kernel takes 2 to 4 times as long backward in bfloat16, which has no fast path.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            return func(
                *(_in_float32(argument) for argument in args),
                **{name: _in_float32(argument) for name, argument in kwargs.items()},
            )


def _in_float32(argument: Any) -> Any:
    is_half = isinstance(argument, Tensor) and argument.dtype == torch.bfloat16
    return argument.float() if is_half else argument


@dataclass(frozen=True)
class Tail:
    """Adds weight * mean over pairs of `hidden_distance` to the loss (FoldGPT, arXiv 2407.00928).

    Args:
        pairs: positions in the student and in the teacher whose outputs are to agree.
    """

    weight: float
    pairs: tuple[tuple[int, int], ...]


class Objective(nn.Module):
    """Token windows to the loss of the student, beside a teacher that is not part of the module."""

    def __init__(
        self,
        student: PreTrainedModel,
        head: Head,
        blend: Blend,
        teacher: PreTrainedModel | None = None,
        autocast_to: torch.dtype | None = None,
        tail: Tail | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self._head = head
        # In a tuple, so that neither Accelerate nor an optimizer finds the teacher's parameters.
        self._teacher = None if teacher is None else (teacher, head_of(teacher))
        self._blend = blend
        self._autocast_to = autocast_to
        self._tail = tail
        self._states: TeacherStates | None = None

    def keep_teacher(
        self, windows: Int[Tensor, "windows tokens"], batch_size: int, folder: Path
    ) -> None:
        """Let the teacher pass all windows now; where there is room for its hidden states, it does
        not pass them again."""
        device = next(self.parameters()).device

        def make(batch: Tensor) -> Taught:
            tokens = batch.to(device, torch.long)
            with torch.autocast(
                device.type, dtype=self._autocast_to, enabled=self._autocast_to is not None
            ):
                return self._taught(tokens)

        self._states = with_smaller_batches(
            lambda size: TeacherStates.of(windows, make, size, folder),
            batch_size,
            windows.shape[1],
        )

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], use_teacher: bool = True
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "4"]]:
        """The loss to minimise, and the values of FIGURES."""
        targets = tokens[:, 1:].reshape(-1)
        dtype = self._autocast_to
        pairs = () if self._tail is None or not use_teacher else self._tail.pairs
        with torch.autocast(tokens.device.type, dtype=dtype, enabled=dtype is not None):
            with (
                self._attention(tokens),
                block_outputs(self.student, [own for own, _ in pairs]) as outputs,
            ):
                hidden = _predicting(last_hidden_state(self.student, tokens))
            if self._teacher is None or not use_teacher:
                loss, figures = self._blend(hidden, targets, self._head)
                return loss, F.pad(figures, (0, 1))
            last, *teacher_outputs = (self._states or self._taught)(tokens)
            seen = Reference(_predicting(last), self._teacher[1])
            reference = seen if self._blend.distillation else None
            loss, figures = self._blend(hidden, targets, self._head, reference)
            if self._tail is None:
                return loss, F.pad(figures, (0, 1))
            distances = [
                hidden_distance(_predicting(outputs[own]), _predicting(its))
                for (own, _), its in zip(pairs, teacher_outputs, strict=True)
            ]
            distance = torch.stack(distances).mean()
            loss = loss + self._tail.weight * distance
            figures = torch.cat([loss.detach()[None], figures[1:], distance.detach()[None]])
            return loss, figures

    def _taught(self, tokens: Int[Tensor, "batch tokens"]) -> Taught:
        """What is compared with: the teacher's last hidden states, and the outputs of its blocks
        that the tail names."""
        assert self._teacher is not None
        teacher = self._teacher[0]
        positions = [] if self._tail is None else [its for _, its in self._tail.pairs]
        with torch.no_grad(), block_outputs(teacher, positions) as outputs:
            last = last_hidden_state(teacher, tokens)
        return [last, *(outputs[position] for position in positions)]

    def _attention(self, tokens: Tensor) -> AbstractContextManager[object]:
        needs_it = self._autocast_to is not None and tokens.device.type == "cpu"
        return _Float32Attention() if needs_it and torch.is_grad_enabled() else nullcontext()


def _predicting(
    hidden: Float[Tensor, "batch tokens hidden"],
) -> Float[Tensor, "predictions hidden"]:
    return hidden[:, :-1].reshape(-1, hidden.shape[-1])


def mean_loss(
    objective: Objective, windows: Int[Tensor, "windows tokens"], batch_size: int
) -> float:
    """Next-token loss of the student over `windows`, in nats per token, without dropout.

    In smaller batches if memory is short; not in one of several processes, which others wait for.
    """
    device = next(objective.parameters()).device

    def total(at_once: int) -> float:
        sums = 0.0
        for batch in windows.split(at_once):
            _, figures = objective(batch.to(device, torch.long), use_teacher=False)
            sums += float(figures[FIGURES.index("cross_entropy")]) * len(batch)
        return sums

    with torch.no_grad(), _without_dropout(objective):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return total(batch_size) / len(windows)
        return with_smaller_batches(total, batch_size, windows.shape[1]) / len(windows)


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    switched_on = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in switched_on:
            part.training = True
