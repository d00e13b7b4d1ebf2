"""A training loop that survives being killed: its schedule, its data order, its steps.

What a step does is a function of the seed and of the step's number alone, so a run that was killed
and resumed ends with the same weights, bit for bit on a CPU, as one that was not.
"""

import hashlib
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from foldstack.compression.errors import InputError
from foldstack.compression.out_of_memory import with_smaller_batches
from foldstack.compression.training.training_checkpoints import Checkpoints, History, Row, Saved

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_MOMENTS = ("exp_avg", "exp_avg_sq")


def derived_seed(*parts: int | str) -> int:
    """A seed of its own for each combination of `parts`, the same on every machine."""
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def warm_cosine(step: int, steps: int, warmup_fraction: float, min_fraction: float) -> float:
    """Linear warm-up to 1, then half a cosine that reaches `min_fraction` at the last step."""
    warmup = min(round(warmup_fraction * steps), steps - 1)
    if step >= steps - 1:
        return min_fraction
    if step < warmup:
        return (step + 1) / warmup
    top = max(warmup - 1, 0)
    progress = (step - top) / (steps - 1 - top)
    return min_fraction + (1 - min_fraction) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Schedule:
    """How long, how fast and in which order to train; counted in optimizer steps."""

    steps: int
    batch_size: int
    gradient_accumulation: int
    warmup_fraction: float
    min_fraction: float
    max_grad_norm: float
    seed: int

    @property
    def windows_per_step(self) -> int:
        return self.batch_size * self.gradient_accumulation

    def learning_rate_fraction(self, step: int) -> float:
        """Share of the highest rate at `step`, counted from 0."""
        return warm_cosine(step, self.steps, self.warmup_fraction, self.min_fraction)

    def windows_of(self, step: int, num_windows: int) -> Int[Tensor, "accumulation batch"]:
        """Indices of the step's windows: each pass over the data takes each once, shuffled."""
        first = step * self.windows_per_step
        chosen = [
            _shuffled(num_windows, self.seed, place // num_windows)[place % num_windows]
            for place in range(first, first + self.windows_per_step)
        ]
        return torch.stack(chosen).view(self.gradient_accumulation, self.batch_size)


@lru_cache(maxsize=4)
def _shuffled(num_windows: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(derived_seed(seed, "order", epoch))
    return torch.randperm(num_windows, generator=generator)


@dataclass
class Training:
    """A run in progress.

    Args:
        objective: prepared by Accelerate, or spread over its processes (see `sharding`); maps token
            windows to (loss, figures), `figures` being a vector of what `figure_names` says.
        trainable: the parameters that the optimizer changes, by a name that is stable across runs;
            of an objective that is spread, this process's parts of them.
        optimizer: AdamW; each of its groups holds its highest learning rate under "peak".
        has_dropout: True when the objective draws random numbers.
    """

    objective: nn.Module
    trainable: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    accelerator: "Accelerator"
    figure_names: tuple[str, ...]
    has_dropout: bool = False
    checkpoints: Checkpoints | None = None
    is_spread: bool = False
    """Whether every process holds but a part of what is trained."""
    _windows_at_once: int = field(default=0, init=False)
    """How many have fitted in memory; 0 before the first step."""

    def run(
        self,
        windows: Int[Tensor, "windows tokens"],
        saved: Saved | None,
        on_step: Callable[[Row], None],
    ) -> tuple[History, float]:
        """Train from `saved` on, or from the start; gives the history and the seconds it took.

        Raises:
            InputError: the loss or its gradient is no longer a finite number.
        """
        history, seconds = self._resume(saved)
        for step in range(len(history), self.schedule.steps):
            started = time.perf_counter()
            row: Row = {"step": step + 1, **self._step(step, windows)}
            seconds += time.perf_counter() - started
            history.append(row)
            self._keep(history, seconds)
            on_step(row)
        return history, seconds

    def _step(self, step: int, windows: Int[Tensor, "windows tokens"]) -> dict[str, float]:
        accelerator = self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        fraction = self.schedule.learning_rate_fraction(step)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * fraction
        micro_batches = self.schedule.windows_of(step, len(windows))[:, rank::world]
        figures = self._accumulate(step, windows[micro_batches])
        norm = accelerator.clip_grad_norm_(self.trainable.values(), self.schedule.max_grad_norm)
        if accelerator.num_processes > 1:
            figures = accelerator.reduce(figures, reduction="mean")
        row = dict(zip(self.figure_names, figures.tolist(), strict=True))
        row |= {"learning_rate_fraction": fraction, "gradient_norm": float(norm)}
        self._check_finite(step, row)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return row

    def _accumulate(
        self, step: int, micro_batches: Int[Tensor, "accumulation batch tokens"]
    ) -> Float[Tensor, " figures"]:
        """Add the gradients of a step's micro-batches up; gives the means of the figures.

        A micro-batch that does not fit in memory goes in parts, as do those of the steps after it:
        losses are means over equally long windows, so weighted parts add up to the whole. With
        several processes the other ones would wait for gradients of a part that they have not.
        """
        if self.accelerator.num_processes > 1:
            return self._accumulate_parts(step, micro_batches, micro_batches.shape[1])
        at_once = self._windows_at_once or micro_batches.shape[1]
        return with_smaller_batches(
            lambda size: self._accumulate_parts(step, micro_batches, size),
            at_once,
            micro_batches.shape[2],
        )

    def _accumulate_parts(
        self, step: int, micro_batches: Int[Tensor, "accumulation batch tokens"], size: int
    ) -> Float[Tensor, " figures"]:
        accelerator = self.accelerator
        self._windows_at_once = size
        self.optimizer.zero_grad(set_to_none=True)  # an attempt may have failed half way
        if self.has_dropout:
            rank = accelerator.process_index
            torch.manual_seed(derived_seed(self.schedule.seed, "dropout", step, rank))
        figures = torch.zeros(len(self.figure_names), device=accelerator.device)
        num_windows = micro_batches.shape[0] * micro_batches.shape[1]
        parts = [part for micro_batch in micro_batches for part in micro_batch.split(size)]
        for number, part in enumerate(parts, start=1):
            is_last, weight = number == len(parts), len(part) / num_windows
            tokens = part.to(accelerator.device, torch.long)
            # Gradients of a spread model are summed up in parts, or each process held all of them.
            waits = not (is_last or self.is_spread)
            with accelerator.no_sync(self.objective) if waits else nullcontext():
                loss, seen = self.objective(tokens)
                # backward() divides by its own count, which the launcher's environment can set.
                accelerator.backward(loss * accelerator.gradient_accumulation_steps * weight)
            figures += seen.detach() * weight
        return figures

    def _check_finite(self, step: int, row: dict[str, float]) -> None:
        wrong = [name for name, value in row.items() if not math.isfinite(value)]
        if wrong:
            peaks = ", ".join(f"{group['peak']:g}" for group in self.optimizer.param_groups)
            raise InputError(
                f"recovery diverged: {wrong[0]} is {row[wrong[0]]} at step {step + 1} of "
                f"{self.schedule.steps}; use lower learning rates (now {peaks})"
            )

    def _keep(self, history: History, seconds: float) -> None:
        if self.checkpoints is None:
            return
        if not (self.is_spread or self.accelerator.is_main_process):
            return
        done = len(history)
        if done % self.checkpoints.every == 0 or done == self.schedule.steps:
            self.checkpoints.write(self._state(), history, seconds=seconds)

    def _state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.trainable.items():
            tensors[f"value/{name}"] = parameter.detach()
            for moment in _MOMENTS:
                tensors[f"{moment}/{name}"] = self.optimizer.state[parameter][moment]
        return tensors

    def _resume(self, saved: Saved | None) -> tuple[History, float]:
        if saved is None:
            return [], 0.0
        history: History = saved.record["history"]
        for parameter in self.trainable.values():
            self.optimizer.state[parameter] = {
                "step": torch.tensor(float(len(history)), device=parameter.device),
                **{moment: torch.zeros_like(parameter) for moment in _MOMENTS},
            }
        saved.read_into(self._state())
        if self.is_spread:
            from torch.distributed.fsdp import FSDPModule

            # What a pass without gradients left together is taken apart, or the next would use it.
            assert isinstance(self.objective, FSDPModule)
            self.objective.reshard()
        logger.info("resumed after step %d of %d", len(history), self.schedule.steps)
        return history, float(saved.record["seconds"])
