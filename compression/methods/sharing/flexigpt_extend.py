"""FlexiGPT in reverse: blocks run again on their own weights, with adapters, to deepen a model."""

import logging
import math
from bisect import bisect_right
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import TOLERANCE, Evidence, Method
from foldstack.compression.methods.sharing.virtual_blocks import (
    adapter_ranks,
    block_shapes,
    gains,
    largest_rank,
    lenders,
    linear_values,
)
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, plan_of

logger = logging.getLogger(__name__)

# The paper's example runs the middle 14 of TinyLlama's 22 blocks again.
_FIRST_OF_MIDDLE, _STOP_OF_MIDDLE = 4 / 22, 18 / 22


class FlexiGptExtend(Method):
    """Make a model deeper: run a range of its blocks again, each repetition with adapters of its
    own.

    FlexiGPT (Smith et al. 2025, arXiv 2501.14713, section 3.5). Every repetition of block j is a
    virtual block on the weights of block j with low-rank adapters and small normed outputs (see
    `FlexiGpt`). Pattern block repeats each block in place (5, 5', 6, 6'), sequential the whole
    range (5, 6, 5', 6'). The adapters start as LoRA's do: right factor random with variance 1 / in,
    left factor zero, so the model starts close to what it was. The sparsity is negative: -0.1 adds
    adapters of a tenth of the stored parameters, which fixes their rank. FLOPs and the KV cache
    grow with the depth. The repetitions are of use after recovery.

    Departs from the paper: the rank follows from the size that may be added (the paper: 256 for
    every linear); the range, which the paper does not give, is the middle 64 % of the blocks; the
    adapters' start, on which it is silent, is LoRA's.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    grows: ClassVar[bool] = True

    steps_of: ClassVar[str] = "ranks of its adapters"
    name: Literal["flexigpt_extend"] = "flexigpt_extend"
    sparsity: float = Field(gt=-1, lt=0)
    """Minus the fraction of the whole model's stored parameters to add at most."""
    pattern: Literal["block", "sequential"] = "block"
    """block: every block of the range is repeated in place; sequential: the range as a whole."""
    start: Annotated[int, Field(ge=0)] | Literal["middle"] = "middle"
    """First block of the range, counted from 0; middle: 18 % of the blocks come before it."""
    stop: Annotated[int, Field(ge=1)] | Literal["middle"] = "middle"
    """Block after the range; middle: 18 % of the blocks come after the range."""
    repeats: int = Field(default=1, ge=1)
    """How often each block of the range runs again."""
    g0: float = Field(default=1e-2, ge=0)
    """Value that the gains of the normed outputs start with; at 0 the adapters get no gradient."""

    def outline(self, model: PreTrainedModel) -> Plan:
        return self._plan(model, self._ranks(model))

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        ranks, order = self._ranks(model), self._order(model)
        plan = self._plan(model, ranks)
        repetitions = [p for p, block in enumerate(order) if block in order[:p]]
        architecture = architecture_of(model)
        blocks = architecture.blocks(model)
        generator = torch.Generator().manual_seed(self.seed)
        tensors = gains(model, repetitions, self.g0)
        for position in repetitions:
            for name, rank in plan.blocks[position].adapters.items():
                weight, bias = linear_values(architecture, blocks[order[position]], name)
                rows, columns = weight.shape
                place = f"blocks.{position}.{name}.adapter"
                noise = torch.randn(rank, columns, generator=generator)
                tensors[f"{place}.first.weight"] = noise / columns**0.5
                tensors[f"{place}.second.weight"] = torch.zeros(rows, rank)
                if bias is not None:
                    tensors[f"{place}.second.bias"] = torch.zeros(rows)
        added = size_of_plan(model.config, plan).parameters / count_parameters(model) - 1
        logger.info(
            "flexigpt_extend: %d blocks become %d (%s), adapters of rank %d at most; %.2f%% "
            "parameters added",
            len(blocks), len(order), ", ".join(map(str, order)), max(ranks.values()), 100 * added,
        )  # fmt: skip
        return Cut(plan, order, tensors)

    def _plan(self, model: PreTrainedModel, ranks: Mapping[str, int]) -> Plan:
        return plan_of(model).repeat(self._order(model), ranks, "normed")

    def _ranks(self, model: PreTrainedModel) -> dict[str, int]:
        """The largest ranks that add no more than was asked."""
        shapes = block_shapes(model, self._range(model)[0])
        dense = count_parameters(model)

        def added(rank: int) -> float:
            plan = self._plan(model, adapter_ranks(shapes, rank))
            return size_of_plan(model.config, plan).parameters / dense - 1

        asked, most = -self.sparsity, largest_rank(shapes)
        rank = bisect_right(range(1, most + 1), asked, key=added)
        if rank == 0 and added(1) <= asked + TOLERANCE:
            rank = 1
        if rank == 0 or (rank == most and added(most) < asked - TOLERANCE):
            # Rounded inwards, so that what the sentence offers is really within reach.
            least, largest = math.ceil(added(1) * 1000) / 1000, int(added(most) * 1000) / 1000
            raise InputError(
                f"flexigpt_extend adds {least:.1%} to {largest:.1%} to this model by these "
                f"repetitions (adapters of rank 1 to {most}), got sparsity {self.sparsity}; ask "
                f"for a value in [{-largest:g}, {-least:g}], or for another range or repeats"
            )
        return adapter_ranks(shapes, rank)

    def _order(self, model: PreTrainedModel) -> tuple[int, ...]:
        """The blocks in the order in which they run."""
        chosen = self._range(model)
        runs = self.repeats + 1
        if self.pattern == "block":
            repeated = [block for block in chosen for _ in range(runs)]
        else:
            repeated = [*chosen] * runs
        return (*range(chosen.start), *repeated, *range(chosen.stop, len(plan_of(model).blocks)))

    def _range(self, model: PreTrainedModel) -> range:
        plan = plan_of(model)
        num_blocks = len(plan.blocks)
        start = round(num_blocks * _FIRST_OF_MIDDLE) if self.start == "middle" else self.start
        middle_stop = max(start + 1, round(num_blocks * _STOP_OF_MIDDLE))
        stop = middle_stop if self.stop == "middle" else self.stop
        if not start < stop <= num_blocks:
            raise InputError(
                f"flexigpt_extend repeats blocks start to stop - 1 of {num_blocks}, got start "
                f"{self.start} and stop {self.stop}"
            )
        owners = lenders(model)
        for block in range(start, stop):
            if block not in owners or plan.blocks[block].outputs != "plain":
                raise InputError(
                    f"flexigpt_extend repeats blocks that store their own linears and have plain "
                    f"outputs, and block {block} does not; choose another start and stop"
                )
        return range(start, stop)
