"""LLM-Streamline: one run of blocks makes room for one small trained block."""

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import (
    TOLERANCE,
    Evidence,
    Method,
    check_evidence,
    scores_of,
    unreachable,
)
from foldstack.compression.methods.replacement.block_start import refit_outputs, start_as_linear_map
from foldstack.compression.statistics.run_states import RunStates, States
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.structure.architectures import (
    Architecture,
    architecture_of,
    base_config_of,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, cut, plan_of
from foldstack.compression.training.block_training import (
    BatchLoss,
    Schedule,
    fit,
    mean_loss,
    next_token_loss,
    regression_loss,
    split_windows,
    train_only,
)

Replacement = Literal["none", "ffn", "swiglu", "layer"]

# Peak learning rate of the regression: the released 2e-4 at the paper's width of 4096, more for
# narrower blocks, which bear more (measured at 64 and 192); a share of it for the next-token loss.
_RATE_TIMES_WIDTH, _RATES = 0.8, (2e-4, 4e-3)
_LLM_SHARE = 0.25
_EPOCHS = {"mse": 12, "llm": 6}


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

    Departs from the paper: h starts as in the paper and in closed form, and the better one stays;
    it trains at a rate that depends on the width, after a warm-up (initial paper, learning_rate
    2e-4 and warmup_fraction 0 are the released form); the layer is trained with the causal mask it
    has at inference (the released MSE path forgets it); the last block's output is taken before the
    final norm; the schedule counts optimizer steps and the best state is a copy; the last block may
    not be part of the run unless `may_remove_last`.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    name: Literal["llm_streamline"] = "llm_streamline"
    ranking: Literal["similarity", "sensitivity"] = "similarity"
    """Which run goes. similarity: the paper's; sensitivity: the one whose absence alone costs the
    least divergence from the dense model (`statistics.sensitivity`)."""
    replacement: Replacement = "layer"
    """What stands for the run; with none it is only removed."""
    loss: Literal["mse", "llm"] = "mse"
    """mse: regression of the run's output; llm: next-token loss of the model around the block."""
    initial: Literal["paper", "least_squares", "better"] = "better"
    """paper: random weights, and for a layer those of the run's first block. least_squares: from
    there, in closed form, an ffn becomes the linear map from X to Y and the output projections of a
    layer or swiglu are fitted to Y; kept where it is nearer to Y on the validation windows. better:
    both are trained, and the one that ends with the lower loss on the validation windows stays."""
    may_remove_last: bool = False
    """Whether the run may contain the last block."""
    epochs: Annotated[int, Field(ge=0)] | Literal["by_loss"] = "by_loss"
    """Passes over the calibration windows; 12 with loss mse, 6 with llm."""
    learning_rate: Annotated[float, Field(gt=0)] | Literal["by_width"] = "by_width"
    """Peak learning rate; by_width: with loss mse 0.8 / hidden size within 2e-4 ... 4e-3, which is
    the released 2e-4 at 4096; with llm a quarter of that, at least 2e-4."""
    min_learning_rate: float = Field(default=5e-5, ge=0)
    """Learning rate of the last optimizer step."""
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the optimizer steps in which the learning rate rises to its peak: without any, the
    first steps can throw a start in closed form away."""
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

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"removals", "runs"}) if self.ranking == "sensitivity" else frozenset()

    def outline(self, model: PreTrainedModel) -> Plan:
        # The place is not known yet: the deepest allowed run stands in.
        length, starts = self._runs(model)
        return self._plan(model, starts[-1], length)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        length, starts = self._runs(model)
        if self.ranking == "sensitivity":
            losses = scores_of(evidence, self).losses_of_runs(length)
            start = min(starts, key=lambda start: (losses[start], start))
        else:
            similarity = evidence.ranking.run_similarity(length)
            start = max(starts, key=lambda start: (similarity[start], -start))
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

    def _runs(self, model: PreTrainedModel) -> tuple[int, list[int]]:
        """The least length of a run that reaches the sparsity, and where such runs start.

        Where blocks share weights, runs of one length remove more or less, or cannot go.
        """
        plan, dense = plan_of(model), count_parameters(model)
        num_blocks = len(plan.blocks)
        stop = num_blocks if self.may_remove_last else num_blocks - 1
        most = stop if self.replacement != "none" else min(stop, num_blocks - 1)
        enough = self.sparsity - TOLERANCE
        if enough <= 0:
            return 0, [0]
        farthest, reason = 0.0, ""
        for length in range(1, most + 1):
            starts: list[int] = []
            for start in reversed(range(stop - length + 1)):
                if starts and plan.is_native:  # all blocks of one size, no ties between them
                    starts.append(start)
                    continue
                try:
                    left = size_of_plan(model.config, self._plan(model, start, length)).parameters
                except InputError as error:
                    reason = f"; {error}"
                    continue
                farthest = max(farthest, 1 - left / dense)
                if 1 - left / dense >= enough:
                    starts.append(start)
                elif plan.is_native:
                    break
            if starts:
                return length, sorted(starts)
        what = f"{most} blocks of {num_blocks}, replacement {self.replacement}{reason}"
        raise InputError(unreachable(self, farthest, what))

    def _plan(self, model: PreTrainedModel, start: int, length: int) -> Plan:
        plan = plan_of(model)
        if length == 0:
            return plan
        if self.replacement == "none":
            kept = [p for p in range(len(plan.blocks)) if not start <= p < start + length]
            return plan.keep(kept)
        width = None if self.replacement == "layer" else self._width(model)
        if self.replacement == "layer":
            self._check_can_be_copied(plan, start)
        try:
            return plan.replace(start, start + length, self.replacement, width)
        except ValueError as error:
            raise InputError(f"llm_streamline cannot replace this run: {error}") from error

    def _check_can_be_copied(self, plan: Plan, start: int) -> None:
        """Raises InputError where a plain layer cannot start as a copy of block `start`."""
        block = plan.blocks[start]
        owner = plan.blocks[plan.owner(start)]
        found = None
        if owner.linears:
            found = "is factored"
        elif block.weights_of is not None:
            found = f"uses the linears of block {block.weights_of}"
        elif block.outputs != "plain":
            found = f"has {block.outputs} outputs"
        if found is not None:
            raise InputError(
                f"llm_streamline cannot start a layer as a copy of block {start}, which {found}; "
                "use replacement ffn, swiglu or none, or replace before that"
            )

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

    def _schedule(self, hidden_size: int) -> Schedule:
        epochs = _EPOCHS[self.loss] if self.epochs == "by_loss" else self.epochs
        if self.learning_rate == "by_width":
            least, most = _RATES
            share = _LLM_SHARE if self.loss == "llm" else 1.0
            rate = max(least, share * min(most, _RATE_TIMES_WIDTH / hidden_size))
        else:
            rate = self.learning_rate
        return Schedule(
            epochs=epochs,
            batch_size=self.batch_size,
            learning_rate=rate,
            min_learning_rate=min(self.min_learning_rate, rate),
            warmup_fraction=self.warmup_fraction,
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
        windows = evidence.calibration
        schedule = self._schedule(int(base_config_of(model.config).hidden_size))
        states = RunStates(
            model, windows, *run, batch_size=self.batch_size, memory_gib=self.memory_gib
        )
        through = partial(states.through, student)
        regression = regression_loss(through, states.pair, model.device)
        papers = copy.deepcopy(student.state_dict())
        starts = [papers]
        if self.initial != "paper":
            split = split_windows(len(states), schedule)
            error = mean_loss(regression, split.validation, self.batch_size)
            self._start_in_closed_form(architecture_of(model), student, states, split.train)
            # Not where there are too few tokens for so many weights.
            if mean_loss(regression, split.validation, self.batch_size) <= error:
                closed = copy.deepcopy(student.state_dict())
                starts = [closed] if self.initial == "least_squares" else [papers, closed]
        if self.loss == "llm":
            with next_token_loss(smaller, run[0], windows, states) as loss_of:
                self._train_from(starts, student, loss_of, schedule, evidence)
            return
        self._train_from(starts, student, regression, schedule, evidence)

    def _train_from(
        self,
        starts: list[dict[str, Tensor]],
        student: nn.Module,
        loss_of: BatchLoss,
        schedule: Schedule,
        evidence: Evidence,
    ) -> None:
        """Train from each start, and leave in `student` what ends with the lowest loss."""
        least, best = math.inf, starts[0]
        for number, start in enumerate(starts):
            student.load_state_dict(start)
            name = "replacement" if number == 0 else f"replacement-{number}"
            training = fit(
                student,
                loss_of,
                len(evidence.calibration),
                schedule,
                checkpoints=None if evidence.work is None else evidence.work / name,
                progress=evidence.progress,
            )
            if (loss := min(training.validation_losses)) < least:
                least, best = loss, copy.deepcopy(student.state_dict())
        student.load_state_dict(best)

    def _start_in_closed_form(
        self, architecture: Architecture, student: nn.Module, states: RunStates, train: Tensor
    ) -> None:
        def pairs() -> Iterator[tuple[States, States]]:
            return (states.pair(batch) for batch in train.split(self.batch_size))

        if self.replacement == "ffn":
            start_as_linear_map(student, pairs)
            return
        outputs = [s.name for s in architecture.linears if s.reads.endswith("_output")]
        names = ["ffn.down"] if self.replacement == "swiglu" else outputs
        linears = [student.get_submodule(name) for name in names]
        refit_outputs(architecture, linears, partial(states.through, student), pairs)
