"""The sites of a model: what a choice decides about, and what the model allows there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedModel

from foldstack.compression.methods.narrowing.inner_widths import InnerDimension
from foldstack.compression.methods.narrowing.modegpt import MoDeGpt
from foldstack.compression.statistics.sensitivity import PARTS, Slot
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.heads import HeadSizes, head_sizes
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import linear_shapes
from foldstack.compression.structure.surgery import plan_of

GRID = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
"""Shares of a width that are gone, of the scored widths."""
RANK_GRID = (0.25, 0.4, 0.55, 0.7)
"""Shares of a linear's parameters that are gone, of the scored ranks."""
RUN_LENGTHS = (1, 2, 3, 4, 6, 8)
"""Blocks of the runs that are scored, where they are at most half of the model's."""


@dataclass(frozen=True)
class Sites:
    """The sites of one model.

    Args:
        model: may be on the meta device.
        grid, rank_grid: shares that are gone.
        narrowing: how widths shrink, and to which multiples.
        rank_multiple: ranks are multiples of this.
    """

    model: PreTrainedModel
    grid: Sequence[float] = GRID
    rank_grid: Sequence[float] = RANK_GRID
    narrowing: MoDeGpt = field(
        default_factory=lambda: MoDeGpt(sparsity=0.5, mlp_selection="greedy")
    )
    rank_multiple: int = 1

    @cached_property
    def plan(self) -> Plan:
        """Of the model."""
        return plan_of(self.model)

    @cached_property
    def positions(self) -> range:
        """Of the model's blocks."""
        return range(len(self.plan.blocks))

    @cached_property
    def slots(self) -> list[Slot]:
        """What a choice decides about."""
        return [(position, part) for position in self.positions for part in PARTS]

    @cached_property
    def heads(self) -> HeadSizes:
        """How the model's attention is divided."""
        return head_sizes(self.model)

    @cached_property
    def narrows(self) -> bool:
        """Whether inner dimensions may become narrower: all blocks are dense, in one basis."""
        return not self.plan.is_sliced and all(map(self.is_dense, self.positions))

    @cached_property
    def dimensions(self) -> dict[Slot, InnerDimension]:
        """The inner dimensions that may become narrower."""
        if not self.narrows:
            return {}
        return {(d.position, d.kind): d for d in self.narrowing.inner_dimensions(self.model)}

    @cached_property
    def shapes(self) -> Mapping[tuple[int, str], tuple[int, int]]:
        """(out, in) of the linears that may be factored."""
        return linear_shapes(self.model)

    @cached_property
    def parameters(self) -> list[dict[str, tuple[int, ...]]]:
        """The shapes of every block's parameters."""
        blocks = architecture_of(self.model).blocks(self.model)
        return [{name: tuple(p.shape) for name, p in b.named_parameters()} for b in blocks]

    def is_dense(self, position: int) -> bool:
        """Whether a block has dense linears of its own that nobody else uses."""
        block = self.plan.blocks[position]
        lending = {p for p, _ in self.plan.lenders}
        owners = {b.weights_of for b in self.plan.blocks}
        return (
            block.has_attention
            and block.weights_of is None
            and not block.linears
            and block.narrow_heads is None
            and position not in lending | owners
        )

    def may_go(self, positions: Iterable[int]) -> bool:
        """Whether these blocks may be removed together, and one is left."""
        gone = set(positions)
        is_some = len(gone) < len(self.plan.blocks)
        return is_some and not self.plan.is_sliced and all(self.plan.can_go(p, gone) for p in gone)

    def runs_from(self, start: int, shortest: int) -> list[range]:
        """The runs of blocks from `start` on that may go."""
        most = len(self.plan.blocks) // 2
        lengths = [n for n in RUN_LENGTHS if shortest <= n <= most]
        runs = [range(start, start + n) for n in lengths if start + n <= len(self.plan.blocks)]
        return [run for run in runs if self.may_go(run)]
