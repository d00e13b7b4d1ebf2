"""LLM-Streamline: one run of blocks makes room for one small trained block."""

import math
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.architectures import architecture_of, base_config_of
from foldstack.compression.block_training import (
    BatchLoss,
    Schedule,
    fit,
    least_squares_map,
    next_token_loss,
    regression_loss,
    split_windows,
    train_only,
)
from foldstack.compression.errors import InputError
from foldstack.compression.method import Evidence, Method, check_evidence, smallest_reaching
from foldstack.compression.plan import Plan
from foldstack.compression.run_states import RunStates
from foldstack.compression.surgery import Cut, cut, plan_of

Replacement = Literal["none", "ffn", "swiglu", "layer"]

# Epochs and learning rate of a replacement when the settings leave them open (llm_streamline's
# small-model measurements; the released code takes 2e-4 for all of them).
_EPOCHS = {"ffn": 12, "swiglu": 12, "layer": 6}
_LEARNING_RATE = {"ffn": 1e-3, "swiglu": 1e-3, "layer": 2e-4}


class LlmStreamline(Method):
    """Replace the run of blocks whose input and output are most alike by one trained block.

    LLM-Streamline (Chen et al. 2024, arXiv 2403.19135, section 3). Of all runs of n blocks the one
    with the largest

        s(l) = mean over tokens of cos(x^(l), x^(l+n))

    goes. In its place comes h: an FFN W2 relu(W1 x + b1) + b2 of width 4d, a SwiGLU network of the
    model's own width, a decoder layer that starts as a copy of the first removed one, or nothing.
    Only h trains, on the run's recorded input X and output Y (equation 4)

        mean over all elements of (h(X) - Y)^2

    or, with loss llm, on the next-token loss of the model around it. n is the smallest number of
    blocks with n * P_block - P_h at least the asked share of all parameters.

    Departs from the paper: the layer is trained with the causal mask it has at inference (the
    released MSE path forgets it); the last block's output is taken before the final norm; the
    schedule counts optimizer steps and the best state is a copy; the last block may not be part of
    the run unless `may_remove_last`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    name: Literal["llm_streamline"] = "llm_streamline"
    replacement: Replacement = "layer"
    """What stands for the run; with none it is only removed."""
    loss: Literal["mse", "llm"] = "mse"
    """mse: regression of the run's output; llm: next-token loss of the model around the block."""
    initial: Literal["random", "linear_map"] = "random"
    """What an ffn starts from: random weights as in the paper, or the least-squares linear map from
    X to Y, which 2d of its 4d units hold exactly (x = relu(x) - relu(-x))."""
    may_remove_last: bool = False
    """Whether the run may contain the last block."""
    epochs: Annotated[int, Field(ge=0)] | Literal["by_replacement"] = "by_replacement"
    """Passes over the calibration windows; 12 for ffn and swiglu, 6 for a layer."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["by_replacement"] = "by_replacement"
    """Peak learning rate; 1e-3 for ffn and swiglu, 2e-4 for a layer."""
    min_learning_rate: float = Field(default=5e-5, ge=0)
    """Learning rate of the last optimizer step."""
    weight_decay: float = Field(default=1e-3, ge=0)
    gradient_clip: float = Field(default=5.0, gt=0)
    """Largest norm of the gradient."""
    batch_size: int = Field(default=8, ge=1)
    """Windows per optimizer step."""
    memory_gib: float = Field(default=8.0, ge=0)
    """Most that the recorded inputs and outputs of the run may take; where they need more, every
    batch is computed again from its tokens."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the calibration windows that choose the best state and train nothing."""

    @model_validator(mode="after")
    def _only_an_ffn_holds_a_linear_map(self) -> "LlmStreamline":
        if self.initial == "linear_map" and self.replacement != "ffn":
            raise ValueError(
                f"initial linear_map is for replacement ffn, got replacement {self.replacement}"
            )
        return self

    def outline(self, model: PreTrainedModel) -> Plan:
        length = self._run_length(model)
        # The place is not known yet: the deepest allowed run stands in.
        return self._plan(model, self._last_stop(model) - length, length)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        length = self._run_length(model)
        start = self._best_start(model, evidence, length)
        plan = self._plan(model, start, length)
        inherits = self._inherits(model, start, length)
        if self.replacement == "none" or length == 0:
            return Cut(plan, inherits)
        initial = Cut(plan, inherits, self._random_tensors(model, start))
        smaller = cut(model, initial).float()
        student = architecture_of(smaller).blocks(smaller)[start]
        train_only(smaller, [student])
        self._train(model, smaller, student, (start, start + length), evidence)
        trained = student.state_dict().items()
        return Cut(plan, inherits, {f"blocks.{start}.{name}": tensor for name, tensor in trained})

    def _run_length(self, model: PreTrainedModel) -> int:
        stop = self._last_stop(model)
        most = stop if self.replacement != "none" else min(stop, len(plan_of(model).blocks) - 1)
        what = f"blocks of {len(plan_of(model).blocks)}, replacement {self.replacement}"
        return smallest_reaching(
            self, model, lambda length: self._plan(model, stop - length, length), most, what
        )

    def _last_stop(self, model: PreTrainedModel) -> int:
        num_blocks = len(plan_of(model).blocks)
        return num_blocks if self.may_remove_last else num_blocks - 1

    def _best_start(self, model: PreTrainedModel, evidence: Evidence, length: int) -> int:
        if length == 0:
            return 0
        similarity = evidence.ranking.run_similarity(length)
        starts = range(self._last_stop(model) - length + 1)
        return max(starts, key=lambda start: (similarity[start], -start))

    def _plan(self, model: PreTrainedModel, start: int, length: int) -> Plan:
        plan = plan_of(model)
        if length == 0:
            return plan
        if self.replacement == "none":
            kept = [p for p in range(len(plan.blocks)) if not start <= p < start + length]
            return plan.keep(kept)
        width = None if self.replacement == "layer" else self._width(model)
        try:
            return plan.replace(start, start + length, self.replacement, width)
        except ValueError as error:
            raise InputError(f"llm_streamline cannot replace this run: {error}") from error

    def _width(self, model: PreTrainedModel) -> int:
        config = base_config_of(model.config)
        if self.replacement == "ffn":
            return 4 * int(config.hidden_size)
        widths = (
            getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner")
        )
        return int(next((width for width in widths if width), 4 * config.hidden_size))

    def _inherits(self, model: PreTrainedModel, start: int, length: int) -> tuple[int | None, ...]:
        num_blocks = len(plan_of(model).blocks)
        before, after = range(start), range(start + length, num_blocks)
        if length == 0 or self.replacement == "none":
            return (*before, *after)
        return (*before, start if self.replacement == "layer" else None, *after)

    def _random_tensors(self, model: PreTrainedModel, position: int) -> dict[str, Tensor]:
        """What torch gives new linears: uniform in +-1/sqrt(inputs). A layer starts as a copy."""
        if self.replacement == "layer":
            return {}
        hidden, width = int(base_config_of(model.config).hidden_size), self._width(model)
        shapes: dict[str, tuple[int, ...]] = {"up.weight": (width, hidden)}
        if self.replacement == "ffn":
            shapes |= {"up.bias": (width,), "down.weight": (hidden, width), "down.bias": (hidden,)}
        else:
            shapes |= {"gate.weight": (width, hidden), "down.weight": (hidden, width)}
        generator = torch.Generator().manual_seed(self.seed)
        tensors = {}
        for name, shape in shapes.items():
            bound = 1 / math.sqrt(width if name.startswith("down") else hidden)
            uniform = 2 * torch.rand(shape, generator=generator) - 1
            tensors[f"blocks.{position}.ffn.{name}"] = bound * uniform
        return tensors

    def _schedule(self) -> Schedule:
        epochs = _EPOCHS[self.replacement] if self.epochs == "by_replacement" else self.epochs
        rate = self.learning_rate
        if rate == "by_replacement":
            rate = _LEARNING_RATE[self.replacement]
        return Schedule(
            epochs=epochs,
            batch_size=self.batch_size,
            learning_rate=rate,
            min_learning_rate=min(self.min_learning_rate, rate),
            weight_decay=self.weight_decay,
            gradient_clip=self.gradient_clip,
            validation_fraction=self.validation_fraction,
            seed=self.seed,
        )

    def _train(
        self,
        model: PreTrainedModel,
        smaller: PreTrainedModel,
        student: nn.Module,
        run: tuple[int, int],
        evidence: Evidence,
    ) -> None:
        schedule, windows = self._schedule(), evidence.calibration
        states = RunStates(
            model, windows, *run, batch_size=self.batch_size, memory_gib=self.memory_gib
        )
        if self.initial == "linear_map":
            train = split_windows(len(states), schedule).train
            pairs = (states.pair(batch) for batch in train.split(self.batch_size))
            _set_linear(student, *least_squares_map(pairs))
        checkpoints = None if evidence.work is None else evidence.work / "replacement"

        def train_on(loss_of: BatchLoss) -> None:
            progress = evidence.progress
            fit(student, loss_of, len(states), schedule, checkpoints=checkpoints, progress=progress)

        if self.loss == "llm":
            with next_token_loss(smaller, run[0], windows, states) as loss_of:
                train_on(loss_of)
            return
        through = partial(states.through, student)
        train_on(regression_loss(through, states.pair, model.device))


def _set_linear(student: nn.Module, matrix: Tensor, bias: Tensor) -> None:
    """Make an ffn student the map x -> matrix x + bias; its other units start silent but
    trainable."""
    up, down = student.get_submodule("ffn.up"), student.get_submodule("ffn.down")
    assert isinstance(up, nn.Linear)
    assert isinstance(down, nn.Linear)
    size = len(bias)
    with torch.no_grad():
        identity = torch.eye(size)
        up.weight[: 2 * size] = torch.cat([identity, -identity])
        up.bias[: 2 * size] = 0
        down.weight.zero_()
        down.weight[:, : 2 * size] = torch.cat([matrix, -matrix], dim=1)
        down.bias.copy_(bias)
