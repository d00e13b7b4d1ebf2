"""What may stand at each site of a model, and what it saves there.

| site | variants | tensors from |
|---|---|---|
| MLP; query-key and value-output pairs | widths on a grid | MoDeGPT |
| MLP; attention | all linears at a share of their parameters | SVD-LLM |
| block | absent | nothing |

What a family forbids (queries and keys that are normed head by head cannot lose coordinates) or a
model does not have (linears of its own, behind an earlier method) has no variants.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.narrowing.inner_widths import InnerDimension
from foldstack.compression.methods.narrowing.modegpt import MoDeGpt
from foldstack.compression.statistics.sensitivity import (
    FAMILIES,
    PARTS,
    Part,
    Saved,
    Slot,
    Variant,
    VariantKind,
)
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import BlockSize, linear_shapes, size_of_block
from foldstack.compression.structure.surgery import build_on_meta, config_for, plan_of

GRID = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
"""Shares of a width that are gone, of the scored widths."""
RANK_GRID = (0.25, 0.4, 0.55, 0.7)
"""Shares of a linear's parameters that are gone, of the scored ranks."""
_WIDTH_KIND: dict[Part, VariantKind] = {
    "mlp": "mlp_width",
    "query_key": "query_key_width",
    "value_output": "value_output_width",
}
PER_MILLE = 1000

Choice = frozenset[Variant]
"""The variants that stand in a model, of which no two decide about the same."""
DENSE: Choice = frozenset()


@dataclass(frozen=True)
class Library:
    """The variants of one model.

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

    def variants(self, families: Iterable[str] = FAMILIES) -> list[Variant]:
        """What is scored, block by block, that which saves least of a site first.

        Raises:
            InputError: a family is unknown.
        """
        if unknown := set(families) - set(FAMILIES):
            raise InputError(
                f"variants are of {', '.join(FAMILIES)}; got {', '.join(sorted(unknown))}"
            )
        found = [v for position in self.positions for v in self._of_block(position, set(families))]
        return found

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
    def dimensions(self) -> dict[Slot, InnerDimension]:
        """The inner dimensions that may become narrower."""
        if self.plan.is_sliced or not all(map(self._is_dense, self.positions)):
            return {}
        return {(d.position, d.kind): d for d in self.narrowing.inner_dimensions(self.model)}

    @cached_property
    def shapes(self) -> Mapping[tuple[int, str], tuple[int, int]]:
        """(out, in) of the linears that may be factored."""
        return linear_shapes(self.model)

    def width(self, position: int, part: Part, width: int) -> Variant:
        """The variant of a narrower dimension."""
        return Variant(kind=_WIDTH_KIND[part], first=position, stop=position + 1, level=width)

    def ranks(self, variant: Variant) -> dict[tuple[int, str], int]:
        """Ranks of the linears of a factored variant; those that would not shrink are left out."""
        if not variant.kind.endswith("_rank"):
            return {}
        of_mlp = variant.kind == "mlp_rank"
        found = {}
        for site in architecture_of(self.model).linears:
            if site.reads.startswith("mlp") != of_mlp:
                continue
            rows, columns = self.shapes[variant.first, site.name]
            rank = int(rows * columns * variant.level / PER_MILLE / (rows + columns) + 1e-9)
            step = self.rank_multiple if rank >= self.rank_multiple else 1
            rank = max(1, rank // step * step)
            if rank * (rows + columns) < rows * columns:
                found[variant.first, site.name] = rank
        return found

    def plan_with(self, variants: Iterable[Variant]) -> Plan:
        """The structure with these variants, in which absent blocks are still there."""
        variants = list(variants)
        widths = {slot: v.level for v in variants if v.kind.endswith("_width") for slot in v.slots}
        plan = self.narrowing.narrow_plan(self.model, widths) if widths else self.plan
        ranks = {site: rank for v in variants for site, rank in self.ranks(v).items()}
        return plan.factor(ranks) if ranks else plan

    def structure(self, choice: Iterable[Variant]) -> tuple[Plan, tuple[int, ...]]:
        """The structure of a choice, and the positions that survive in it."""
        choice = list(choice)
        gone = absent(choice)
        survivors = tuple(p for p in self.positions if p not in gone)
        return self.plan_with(choice).keep(survivors), survivors

    def saved(self, variant: Variant) -> Saved:
        """What a variant saves."""
        like = [self._like(position) for position in range(variant.first, variant.stop)]
        before = [self._size(position, ()) for position in like]
        after = [] if variant.kind == "absent" else [self._size(like[0], (variant,))]
        return Saved(
            parameters=sum(s.parameters for s in before) - sum(s.parameters for s in after),
            flops=sum(s.flops_per_token for s in before) - sum(s.flops_per_token for s in after),
            kv_bytes=sum(s.kv_bytes_per_token for s in before)
            - sum(s.kv_bytes_per_token for s in after),
        )

    def _like(self, position: int) -> int:
        """The first position whose block has the sizes of this one."""
        block = self.plan.blocks[position]
        if any(block.forms.values()) or block.weights_of is not None or not block.has_attention:
            return position
        shapes = self._parameters[position]
        return next(p for p in self.positions if self._parameters[p] == shapes)

    @cached_property
    def _parameters(self) -> list[dict[str, tuple[int, ...]]]:
        blocks = architecture_of(self.model).blocks(self.model)
        return [{name: tuple(p.shape) for name, p in b.named_parameters()} for b in blocks]

    @cached_property
    def _sizes(self) -> dict[tuple[int, tuple[Variant, ...]], BlockSize]:
        return {}

    def _size(self, position: int, variants: tuple[Variant, ...]) -> BlockSize:
        here = tuple(
            v.model_copy(update={"first": position, "stop": position + 1}) for v in variants
        )
        key = position, here
        if key not in self._sizes:
            if here:
                plan = self.plan_with(here).keep([position])
                made = build_on_meta(config_for(self.model.config, plan))
                self._sizes[key] = size_of_block(made, 0)
            else:
                self._sizes[key] = size_of_block(self.model, position)
        return self._sizes[key]

    def _is_dense(self, position: int) -> bool:
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

    def _of_block(self, position: int, families: set[str]) -> Iterator[Variant]:
        if "widths" in families:
            for part in PARTS:
                yield from self._widths(position, part)
        if "ranks" in families and self._is_dense(position) and not self.plan.is_sliced:
            for kind in ("mlp_rank", "attention_rank"):
                yield from self._ranks_of(position, kind)
        if "removals" in families and self._may_go(position):
            yield Variant(kind="absent", first=position, stop=position + 1)

    def _may_go(self, position: int) -> bool:
        several = len(self.plan.blocks) > 1
        return several and not self.plan.is_sliced and self.plan.can_go(position, ())

    def _widths(self, position: int, part: Part) -> Iterator[Variant]:
        dimension = self.dimensions.get((position, part))
        if dimension is None:
            return
        widths = (dimension.floor((1 - gone) * dimension.size) for gone in self.grid)
        for width in dict.fromkeys(widths):
            if width < dimension.size:
                yield self.width(position, part, width)

    def _ranks_of(self, position: int, kind: VariantKind) -> Iterator[Variant]:
        for gone in self.rank_grid:
            level = round(PER_MILLE * (1 - gone))
            variant = Variant(kind=kind, first=position, stop=position + 1, level=level)
            if self.ranks(variant):
                yield variant


def absent(choice: Iterable[Variant]) -> frozenset[int]:
    """The positions whose blocks are gone."""
    gone = (range(v.first, v.stop) for v in choice if v.kind == "absent")
    return frozenset(position for positions in gone for position in positions)
