"""Train one block of a model and nothing else.

LLM-Streamline (arXiv 2403.19135, section 3 and its released code): AdamW with a cosine from the
learning rate to the least one, after a warm-up where one is asked for; gradients clipped, the state
with the lowest validation loss kept. Two losses: the regression of a replaced run's output from its
input, and the next-token loss of the model around the block.

Unlike the released code the schedule counts optimizer steps (its last one has the least learning
rate), the best state is a copy (the initial one counts too), and what trains is chosen by identity.
"""

import copy
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

from foldstack.compression.errors import InputError
from foldstack.compression.statistics.run_states import RunStates, States
from foldstack.compression.statistics.stream import starting_at
from foldstack.compression.storage.digest import digest_json
from foldstack.compression.training.training_checkpoints import Checkpoints, History
from foldstack.compression.training.training_loop import warm_cosine

BatchLoss = Callable[[Int[Tensor, " batch"]], Float[Tensor, ""]]
"""Mean loss of the windows with these indices."""


class Schedule(BaseModel):
    """How long and how fast a block trains."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    epochs: int = Field(ge=0)
    batch_size: int = Field(ge=1)
    """Windows per optimizer step."""
    learning_rate: float = Field(gt=0)
    min_learning_rate: float = Field(ge=0)
    """Learning rate of the last step."""
    warmup_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the steps in which the learning rate rises to its peak."""
    weight_decay: float = Field(ge=0)
    gradient_clip: float = Field(gt=0)
    """Largest norm of the gradient."""
    validation_fraction: float = Field(gt=0, lt=1)
    """Share of the windows that choose the best state and train nothing."""
    seed: int = Field(ge=0)

    def rate(self, step: int, num_steps: int) -> float:
        """Learning rate of optimizer step `step` of `num_steps`, counted from 0."""
        least = self.min_learning_rate / self.learning_rate
        return self.learning_rate * warm_cosine(step, num_steps, self.warmup_fraction, least)


@dataclass
class Training:
    """What a training run did."""

    num_steps: int
    train_losses: list[float]
    """Mean loss of every epoch."""
    validation_losses: list[float]
    """Loss before training, then after every epoch."""

    @property
    def best_epoch(self) -> int:
        """Epochs after which the kept state was reached; 0 is the initial state."""
        losses = self.validation_losses
        return min(range(len(losses)), key=losses.__getitem__)


@dataclass(frozen=True)
class Split:
    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]


def split_windows(num_windows: int, schedule: Schedule) -> Split:
    """A random split of the windows, the same for the same seed.

    Raises:
        InputError: there are fewer than two windows.
    """
    if num_windows < 2:
        raise InputError(
            f"training a block needs at least 2 windows (one to validate on), got {num_windows}"
        )
    num_validation = max(1, round(num_windows * schedule.validation_fraction))
    num_validation = min(num_validation, num_windows - 1)
    order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(schedule.seed))
    return Split(train=order[num_validation:], validation=order[:num_validation])


def fit(
    student: nn.Module,
    loss_of: BatchLoss,
    num_windows: int,
    schedule: Schedule,
    *,
    checkpoints: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Training:
    """Train `student`'s parameters in place and leave the best of its states in it.

    With `checkpoints`, a folder written to after every epoch, a killed run continues there.

    Raises:
        InputError: the loss is not finite, or there are too few windows.
    """
    split = split_windows(num_windows, schedule)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay
    )
    run = _Run(student, optimizer, checkpoints, key=_key(student, schedule, num_windows))
    per_epoch = -(-len(split.train) // schedule.batch_size)
    if not run.resume():
        run.record_validation(mean_loss(loss_of, split.validation, schedule.batch_size))
    while (epoch := len(run.training.train_losses)) < schedule.epochs:
        generator = torch.Generator().manual_seed(schedule.seed * 1_000_003 + epoch + 1)
        order = split.train[torch.randperm(len(split.train), generator=generator)]
        total = 0.0
        for step, batch in enumerate(
            torch.split(order, schedule.batch_size), start=epoch * per_epoch
        ):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step, per_epoch * schedule.epochs)
            loss = loss_of(batch)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, schedule.gradient_clip)
            optimizer.step()
            total += float(loss.detach()) * len(batch)
            if progress is not None:
                progress("train replacement", step + 1, per_epoch * schedule.epochs)
        run.training.num_steps += per_epoch
        run.training.train_losses.append(total / len(split.train))
        run.record_validation(mean_loss(loss_of, split.validation, schedule.batch_size))
        run.save()
    student.load_state_dict(run.best)
    return run.training


def mean_loss(loss_of: BatchLoss, windows: Int[Tensor, " n"], batch_size: int) -> float:
    """Mean loss of these windows, without gradients.

    Raises:
        InputError: it is not finite.
    """
    with torch.no_grad():
        batches = torch.split(windows, batch_size)
        total = math.fsum(float(loss_of(batch)) * len(batch) for batch in batches)
    mean = total / len(windows)
    if not math.isfinite(mean):
        raise InputError(
            f"the training loss of the replacement must be finite, got {mean}; "
            "use a lower learning_rate, or a model in float32 or bfloat16"
        )
    return mean


class _Run:
    """A training run's state, in memory and on disk."""

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        checkpoints: Path | None,
        key: Any,
    ) -> None:
        self.student, self.optimizer = student, optimizer
        self.checkpoints = None
        if checkpoints is not None:
            self.checkpoints = Checkpoints(checkpoints, digest_json(key), every=1)
        self.training = Training(num_steps=0, train_losses=[], validation_losses=[])
        self.best: dict[str, Any] = {}

    def record_validation(self, loss: float) -> None:
        if loss < min(self.training.validation_losses, default=math.inf):
            self.best = copy.deepcopy(self.student.state_dict())
        self.training.validation_losses.append(loss)

    def save(self) -> None:
        if self.checkpoints is None:
            return
        tensors = {f"student.{name}": tensor for name, tensor in self.student.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
        history: History = [{"train_loss": loss} for loss in self.training.train_losses]
        self.checkpoints.write(tensors, history, training=vars(self.training))

    def resume(self) -> bool:
        """Take up the state on disk, if it is of this very run."""
        saved = None if self.checkpoints is None else self.checkpoints.newest()
        if saved is None:
            return False
        parts: dict[str, dict[str, Tensor]] = {"student": {}, "best": {}, "optimizer": {}}
        for name, tensor in saved.tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            number, _, moment = name.partition(".")
            moments.setdefault(int(number), {})[moment] = tensor
        self.student.load_state_dict(parts["student"])
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.best, self.training = parts["best"], Training(**saved.record["training"])
        return True


def _key(student: nn.Module, schedule: Schedule, num_windows: int) -> list[Any]:
    """Tells runs apart: the settings, and where the student starts."""
    start = {name: float(p.detach().double().sum()) for name, p in student.named_parameters()}
    return [schedule.model_dump(mode="json"), num_windows, start]


def regression_loss(
    student: Callable[[States], States],
    pair: Callable[[Int[Tensor, " batch"]], tuple[States, States]],
    device: torch.device,
) -> BatchLoss:
    """Mean squared error of the student's outputs, over all elements (arXiv 2403.19135, eq. 4)."""

    def loss_of(batch: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        inputs, targets = pair(batch)
        output = student(inputs.to(device, torch.float32))
        return nn.functional.mse_loss(output, targets.to(device, torch.float32))

    return loss_of


@contextmanager
def next_token_loss(
    model: PreTrainedModel,
    position: int,
    windows: Int[Tensor, "windows tokens"],
    inputs: Tensor | RunStates,
) -> Iterator[BatchLoss]:
    """Inside, the cross-entropy of `model` on the windows, with what enters block `position` given.

    The blocks before it are frozen, so what they compute is computed once, outside.
    """
    entering = torch.empty(0)

    def loss_of(batch: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
        nonlocal entering
        entering = inputs[batch]
        tokens = windows[batch].to(model.device, torch.long)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    with starting_at(model, position, lambda: entering):
        yield loss_of


def train_only(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Freeze every parameter but those of `blocks`: by identity, never by a part of a name."""
    model.requires_grad_(False)
    for block in blocks:
        block.requires_grad_(True)
