"""Trainings of block gates (see `gates`): by sampling, and by the gradient of relaxed gates.

Sampled: each window is read without the blocks that its gates, drawn by log t^2 with logistic
noise, close. How much the loss rises is regressed on which blocks were closed, later steps counting
more, and what a block costs by that over a temperature is log t^2. The temperature falls, so that
in the end the same blocks are always closed: their costs, and the others', are those beside each
other. Needs no backward pass.

Relaxed, as in the papers: log t^2 follows the gradient of

    next-token loss + pull * sum of g_i (1 - g_i)

whose pull, 0 at first, grows until every gate is at 0 or at 1. A block that is cheap to close by a
part may be dear to close, so that these gates rank blocks wrongly (docs/claims.md has a case), and
so the sampled ones are there. To shrink all blocks alike costs next to nothing, since what follows
them is a norm: only differences between gates tell. The gradient with respect to the gates is taken
per window, and that of the open model on the same window is subtracted and its mean over all
windows added (a control variate), which takes out 0.97 of the variance at the start.

Gates that are drawn, and closed by how the loss changes: L0 regularisation (Louizos et al. 2018,
arXiv 1712.01312), REINFORCE (Williams 1992); a regression in place of their gradient estimates uses
what earlier steps have seen.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import windows_of
from foldstack.compression.evaluation.token_losses import plain_head, token_losses
from foldstack.compression.methods.sharing.gates import (
    Gates,
    GateTraining,
    along_budget,
    gated,
    gates_of,
)
from foldstack.compression.storage.digest import digest_json
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.training.distillation import Blend, head_of
from foldstack.compression.training.objective import Objective
from foldstack.compression.training.training_checkpoints import Checkpoints, History
from foldstack.compression.training.training_loop import Schedule, derived_seed

Progress = Callable[[str, int, int], None]

_BETAS = (0.9, 0.99)
_CHECKPOINT_EVERY = 10
# Forward passes that cost as much as one with its gradient.
_FORWARD_ONLY = 3
# What the windows of a step count in the regression after one more step.
_MEMORY = 0.97
# Windows with a rise of 0 that the regression begins with, for each block.
_RIDGE = 0.1


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
    form = _Sampled if settings.form == "sampled" else _Relaxed
    run = form(model, windows, num_kept, settings, seed, work)
    with _frozen(model):
        run.read_open(progress)
        while run.step < settings.steps:
            run.take_step()
            run.save()
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


class _Run(ABC):
    """A training's state, in memory and on disk."""

    cheaper: int
    """Tokens of a step over `batch_tokens`."""
    state: tuple[str, ...]
    """Names of the tensors that a killed run goes on with, `log_t2` and the gates besides."""

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
        self.at_once = max(1, settings.batch_tokens // windows.shape[1])
        self.schedule = Schedule(
            steps=settings.steps,
            batch_size=min(len(windows), self.cheaper * self.at_once),
            gradient_accumulation=1,
            warmup_fraction=0.0,
            min_fraction=1.0,
            max_grad_norm=1.0,
            seed=seed,
        )
        self.num_blocks = len(architecture_of(model).blocks(model))
        self.log_t2 = torch.zeros(self.num_blocks, dtype=torch.float64)
        self.gates: list[Tensor] = []
        self.history: History = []
        self.begin()
        self.checkpoints = None
        if work is not None:
            key = _key(model, windows, num_kept, settings, seed)
            self.checkpoints = Checkpoints(work, digest_json(key), every=_CHECKPOINT_EVERY)
            self._resume()

    @abstractmethod
    def begin(self) -> None:
        """Make those tensors."""

    @abstractmethod
    def read_open(self, progress: Progress | None) -> None:
        """See every window with all gates open, unless a killed run has."""

    @abstractmethod
    def take_step(self) -> None:
        """Move log t^2 by what some windows say, and tell `moved`."""

    @property
    def step(self) -> int:
        return len(self.history)

    def moved(self, loss: float, seen: Tensor, **by: float) -> None:
        """Note the step that was taken, by what was seen."""
        if not (math.isfinite(loss) and torch.isfinite(seen).all()):
            raise InputError(
                f"the loss of the gated model must be finite, got {loss} at step {self.step + 1}; "
                "use a model in float32 or bfloat16"
            )
        self.gates.append(gates_of(self.log_t2, self.num_kept))
        self.history.append({"step": self.step + 1, "loss": loss, **by})

    def in_batches(
        self, read: Callable[[Tensor], Tensor], what: str, progress: Progress | None
    ) -> Tensor:
        """What `read` gives for all windows, some at a time."""
        parts, batches = [], torch.arange(len(self.windows)).split(self.at_once)
        for number, batch in enumerate(batches, start=1):
            parts.append(read(batch))
            if progress is not None:
                progress(what, number, len(batches))
        return torch.cat(parts)

    def save(self) -> None:
        """Write a checkpoint, if one is due."""
        if self.checkpoints is None or self.step % self.checkpoints.every:
            return
        tensors = {name: getattr(self, name) for name in ("log_t2", *self.state)}
        self.checkpoints.write(tensors | {"gates": torch.stack(self.gates)}, self.history)

    def _resume(self) -> None:
        saved = None if self.checkpoints is None else self.checkpoints.newest()
        if saved is None:
            return
        for name in ("log_t2", *self.state):
            setattr(self, name, saved.tensors[name])
        self.gates = list(saved.tensors["gates"])
        self.history = saved.record["history"]


class _Sampled(_Run):
    """By what the loss says of windows whose gates were drawn."""

    cheaper = _FORWARD_ONLY
    state = ("open", "closings", "rises")

    def begin(self) -> None:
        self.open = torch.empty(0, dtype=torch.float64)
        """Of every window, its loss with all blocks."""
        self.closings = _RIDGE * torch.eye(self.num_blocks, dtype=torch.float64)
        """Windows in which block i and block j were closed."""
        self.rises = torch.zeros_like(self.log_t2)
        """Of the loss in those in which block i was, summed."""
        with torch.no_grad():
            self.head = plain_head(self.model, self.windows[0].long())

    def read_open(self, progress: Progress | None) -> None:
        def read(batch: Tensor) -> Tensor:
            return self._losses(batch, torch.ones_like(self.log_t2).expand(len(batch), -1))

        if not len(self.open):
            self.open = self.in_batches(read, "losses of open gates", progress)

    def take_step(self) -> None:
        settings, step = self.settings, self.step
        (batch,) = self.schedule.windows_of(step, len(self.windows))
        keys = self.log_t2 + self._noise(len(batch))
        closed = torch.zeros_like(keys).scatter(
            -1, keys.topk(self.num_blocks - self.num_kept, largest=False).indices, 1.0
        )
        losses = self._losses(batch, 1 - closed)
        self.closings = _MEMORY * self.closings + closed.T @ closed
        self.rises = _MEMORY * self.rises + closed.T @ (losses - self.open[batch])
        costs = torch.linalg.solve(self.closings, self.rises)
        deviations = (costs - costs.median()).abs()
        # Of two blocks the median is one's cost; of blocks that cost the same no spread is left.
        spread = float(deviations.median()) or float(deviations.max()) or 1.0
        temperature = settings.temperature(step) * spread
        self.log_t2 = costs / temperature
        self.moved(float(losses.mean()), costs, temperature=temperature)

    def _noise(self, num_windows: int) -> Tensor:
        """Logistic noise, the same for the same seed and step."""
        seed = derived_seed(self.schedule.seed, "gates", self.step)
        generator = torch.Generator().manual_seed(seed)
        shape = (num_windows, self.num_blocks)
        return torch.logit(torch.rand(shape, generator=generator, dtype=torch.float64), eps=1e-4)

    def _losses(
        self, batch: Int[Tensor, " batch"], gates: Float64[Tensor, "batch blocks"]
    ) -> Float64[Tensor, " batch"]:
        """Of some windows, each with gates of its own."""
        losses = []
        with torch.no_grad():
            for some, of_some in zip(
                batch.split(self.at_once), gates.split(self.at_once), strict=True
            ):
                with gated(self.model, of_some.float().to(self.model.device)):
                    of_tokens = token_losses(self.model, self.windows[some].long(), self.head)
                losses.append(of_tokens.mean(-1))
        return torch.cat(losses)


class _Relaxed(_Run):
    """By the gradient with respect to gates between 0 and 1."""

    cheaper = 1
    state = ("open", "mean", "square", "sizes")

    def begin(self) -> None:
        self.objective = Objective(self.model, head_of(self.model), Blend(0.0))
        self.open = torch.empty(0, self.num_blocks, dtype=torch.float64)
        """Of every window, the gradient with all gates open."""
        self.mean, self.square = torch.zeros(2, self.num_blocks, dtype=torch.float64)
        """Adam's moments."""
        self.sizes = torch.empty(0, dtype=torch.float64)
        """Of the gradient in the steps without pull."""

    def read_open(self, progress: Progress | None) -> None:
        ones = torch.ones_like(self.log_t2)
        if not len(self.open):
            self.open = self.in_batches(
                lambda batch: self._gradients(batch, ones)[1], "gradients of open gates", progress
            )

    def take_step(self) -> None:
        settings, step = self.settings, self.step
        (batch,) = self.schedule.windows_of(step, len(self.windows))
        gates = gates_of(self.log_t2, self.num_kept)
        loss, of_windows = self._gradients(batch, gates)
        gradient = (of_windows - self.open[batch] + self.open.mean(0)).mean(0)
        if step <= settings.hold * settings.steps:
            size = (gradient - gradient.median()).abs().median()
            self.sizes = torch.cat([self.sizes, size[None]])
        pull = settings.pull(step) * float(self.sizes.mean())
        slope = along_budget(gates, gradient + pull * (1 - 2 * gates))
        self.mean.lerp_(slope, 1 - _BETAS[0])
        self.square.lerp_(slope**2, 1 - _BETAS[1])
        mean, square = (
            moment / (1 - beta ** (step + 1))
            for moment, beta in zip((self.mean, self.square), _BETAS, strict=True)
        )
        tiny = torch.finfo(square.dtype).tiny
        self.log_t2 -= settings.learning_rate * mean / (square.sqrt() + tiny)
        self.moved(loss, slope, pull=pull)

    def _gradients(self, batch: Tensor, gates: Tensor) -> tuple[float, Tensor]:
        """The mean loss, and every window's gradient with respect to its gates, in float64."""
        tokens = self.windows[batch].to(self.model.device, torch.long)
        of_windows = gates.float().expand(len(batch), -1).to(tokens.device)
        of_windows = of_windows.clone().requires_grad_(True)
        with gated(self.model, of_windows):
            loss, _ = self.objective(tokens)
        (gradients,) = torch.autograd.grad(loss, of_windows)
        return float(loss.detach()), len(batch) * gradients.double().cpu()


def _key(
    model: PreTrainedModel, windows: Tensor, num_kept: int, settings: GateTraining, seed: int
) -> list[Any]:
    """Tells runs apart: the settings, the data, and the model by a sum per parameter."""
    sums = {name: float(p.detach().double().sum()) for name, p in model.named_parameters()}
    content = hashlib.sha256(windows.to(torch.int64).cpu().numpy().tobytes()).hexdigest()
    return [settings.model_dump(mode="json"), seed, num_kept, content, sums]
