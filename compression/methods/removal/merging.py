"""Several blocks merged into one of the same shape: the survivor's weights are a sum of theirs."""

import copy
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Method, smallest_reaching
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import Cut, plan_of


@dataclass(frozen=True)
class Merged:
    """A block whose weights are the sum of coefficient * weights over blocks of the input model."""

    first: int
    """Position in the input model whose place it takes, and whose tensors that are not merged."""
    parts: tuple[tuple[int, float], ...]
    """Position in the input model and coefficient; none is 0."""

    @property
    def is_untouched(self) -> bool:
        return self.parts == ((self.first, 1.0),)


def untouched(positions: Iterable[int]) -> list[Merged]:
    """Every block as it is."""
    return [Merged(position, ((position, 1.0),)) for position in positions]


def merged(blocks: Sequence[Merged], coefficients: Sequence[float]) -> Merged:
    """The block with the sum of coefficient * weights, in the place of the first."""
    total: dict[int, float] = {}
    for block, coefficient in zip(blocks, coefficients, strict=True):
        for position, part in block.parts:
            total[position] = total.get(position, 0.0) + coefficient * part
    parts = tuple((position, part) for position, part in sorted(total.items()) if part != 0)
    return Merged(blocks[0].first, parts)


def outline_of_merges(
    method: Method, model: PreTrainedModel, protect_first: int, protect_last: int
) -> Plan:
    """The structure after the fewest merges that reach the method's sparsity.

    Raises:
        InputError: no number of merges does, or the blocks between the protected ones differ.
    """
    plan = plan_of(model)
    num_blocks = len(plan.blocks)
    stop = num_blocks - protect_last
    if stop > protect_first:
        check_mergeable(method.name, model, range(protect_first, stop))

    # Which blocks merge is not known yet: the deepest ones stand in.
    def without_deepest(count: int) -> Plan:
        return plan.keep(p for p in range(num_blocks) if not stop - count <= p < stop)

    most = max(0, stop - protect_first - 1)
    what = f"merges among {num_blocks} blocks"
    return without_deepest(smallest_reaching(method, model, without_deepest, most, what))


def check_mergeable(method: str, model: PreTrainedModel, positions: Sequence[int]) -> None:
    """Raises InputError when a block has not its own dense linears, or not the others' shapes."""
    plan, blocks = plan_of(model), architecture_of(model).blocks(model)
    owners = {block.weights_of for block in plan.blocks}
    for position in positions:
        block = plan.blocks[position]
        shapes, expected = (
            {name: tuple(p.shape) for name, p in blocks[at].named_parameters()}
            for at in (position, positions[0])
        )
        reason = None
        if not block.has_attention:
            reason = f"is an {block.kind} replacement"
        elif block.weights_of is not None or position in owners:
            reason = "shares its linears"
        elif any(block.forms.values()):
            reason = "has factored or narrow linears"
        elif shapes != expected:
            reason = f"has other shapes than block {positions[0]}"
        if reason is not None:
            raise InputError(
                f"{method} merges blocks of one shape with dense linears of their own, and block "
                f"{position} {reason}; use a method that removes blocks whole (shortgpt, uidl, "
                "sleb), or merge before you share, factor or replace"
            )


class Trial:
    """A copy of a model that shows one way after another of merging its blocks."""

    def __init__(self, model: PreTrainedModel, names: Collection[str]) -> None:
        """`names`: the parameters of a block that are merged; the others stay the first one's."""
        self.model = copy.deepcopy(model)
        self._input = model
        self._names = names
        self._shown: dict[int, Merged] = {}

    def show(self, blocks: Sequence[Merged]) -> list[int]:
        """Give the copy these weights; the positions that are gone, which the caller skips."""
        of_copy = architecture_of(self.model).blocks(self.model)
        wanted = {block.first: block for block in blocks}
        for block in (*untouched(self._shown.keys() - wanted.keys()), *blocks):
            if self._shown.get(block.first, untouched([block.first])[0]) != block:
                parameters = dict(of_copy[block.first].named_parameters())
                with torch.no_grad():
                    for name, tensor in self.weights(block).items():
                        parameters[name].copy_(tensor)
        self._shown = wanted
        return [position for position in range(len(of_copy)) if position not in wanted]

    def weights(self, block: Merged) -> dict[str, Tensor]:
        """The merged parameters, summed in float64, in the model's precision."""
        of_input = architecture_of(self._input).blocks(self._input)
        parts = [
            (dict(of_input[position].named_parameters()), coefficient)
            for position, coefficient in block.parts
        ]
        sums = {}
        with torch.no_grad():
            for name in self._names:
                total = sum(part[name].double() * coefficient for part, coefficient in parts)
                assert isinstance(total, Tensor)
                sums[name] = total.to(self._input.dtype)
        return sums

    def cut_to(self, blocks: Sequence[Merged]) -> Cut:
        """The cut of the input model that leaves these blocks."""
        survivors = tuple(block.first for block in blocks)
        tensors = {
            f"blocks.{position}.{name}": tensor
            for position, block in enumerate(blocks)
            if not block.is_untouched
            for name, tensor in self.weights(block).items()
        }
        return Cut(plan_of(self._input).keep(survivors), survivors, tensors)
