"""Which variants there are for a model, what it becomes with some of them, and what they save."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from foldstack.compression.errors import InputError
from foldstack.compression.methods.narrowing.inner_widths import Widths
from foldstack.compression.methods.search.kinds import KIND_OF, WIDTH_OF
from foldstack.compression.methods.search.sites import Sites
from foldstack.compression.statistics.sensitivity import (
    FAMILIES,
    FAMILY_OF,
    Part,
    Saved,
    Variant,
)
from foldstack.compression.statistics.variant_times import Seconds
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import BlockSize, block_sizes_of_plan

Choice = frozenset[Variant]
"""The variants that stand in a model, of which no two decide about the same."""
DENSE: Choice = frozenset()


@dataclass(frozen=True)
class Library(Sites):
    """The variants of one model; `seconds` has what they save of the time, if that is known."""

    seconds: Seconds | None = None

    def variants(self, families: Iterable[str] = FAMILIES) -> list[Variant]:
        """What is scored, block by block, that which saves least of a site first.

        Raises:
            InputError: a family is unknown.
        """
        families = set(families)
        if unknown := families - set(FAMILIES):
            raise InputError(
                f"variants are of {', '.join(FAMILIES)}; got {', '.join(sorted(unknown))}"
            )
        kinds = [kind for name, kind in KIND_OF.items() if FAMILY_OF[name] in families]
        return [v for p in self.positions for kind in kinds for v in kind.offered(self, p)]

    def width(self, position: int, part: Part, width: int) -> Variant:
        """The variant of a narrower dimension."""
        return WIDTH_OF[part].at(position, level=width)

    def plan_with(self, variants: Iterable[Variant]) -> Plan:
        """The structure with these variants, in which absent blocks are still there."""
        variants = in_order(variants)
        widths = widths_of(variants)
        plan = self.narrowing.narrow_plan(self.model, widths) if widths else self.plan
        for variant in variants:
            plan = KIND_OF[variant.kind].changed(self, plan, variant)
        return plan

    def structure(self, choice: Iterable[Variant]) -> tuple[Plan, tuple[int, ...]]:
        """The structure of a choice, and the positions that survive in it."""
        choice = list(choice)
        gone = absent(choice)
        survivors = tuple(p for p in self.positions if p not in gone)
        return self.plan_with(choice).keep(survivors), survivors

    def saved(self, variant: Variant) -> Saved:
        """What a variant saves."""
        touched = variant.gone or range(variant.first, variant.stop)
        like = [self._like(position) for position in touched]
        before = [self._dense_sizes[position] for position in like]
        after: tuple[BlockSize, ...] = ()
        if not variant.gone:
            after = self._sizes_with(variant, like[0])
        return Saved(
            parameters=sum(s.parameters for s in before) - sum(s.parameters for s in after),
            flops=sum(s.flops_per_token for s in before) - sum(s.flops_per_token for s in after),
            kv_bytes=sum(s.kv_bytes_per_token for s in before)
            - sum(s.kv_bytes_per_token for s in after),
        )

    def savings(self, variant: Variant) -> dict[str, float]:
        """The same by the name of a budget, with what is known of time, in shares of the dense
        model's."""
        saved = self.saved(variant)
        told = {name: float(value) for name, value in saved.model_dump().items()}
        return told | ({} if self.seconds is None else self.seconds.saved(variant, saved.flops))

    @cached_property
    def attending(self) -> frozenset[int]:
        """The blocks of the model that attend."""
        return frozenset(
            position
            for position, block in enumerate(self.plan.blocks)
            if block.has_attention
            and (
                (form := self.plan.blocks[self.plan.owner(position)].narrow_heads) is None
                or form.attends
            )
        )

    def silenced(self, variant: Variant) -> int:
        """How many blocks attend no more."""
        is_alone = variant.kind == "attention_absent"
        return len(self.attending.intersection([variant.first] if is_alone else variant.gone))

    def _like(self, position: int) -> int:
        """The first position whose block has the sizes of this one."""
        block = self.plan.blocks[position]
        if any(block.forms.values()) or block.weights_of is not None or not block.has_attention:
            return position
        shapes = self.parameters[position]
        return next(p for p in self.positions if self.parameters[p] == shapes)

    def _sizes_with(self, variant: Variant, like: int) -> tuple[BlockSize, ...]:
        """Of the blocks that it is about; one block is counted where the first like it is."""
        if variant.stop == variant.first + 1:
            variant = variant.model_copy(update={"first": like, "stop": like + 1})
        if variant not in self._sizes:
            plan = self.plan_with([variant]).keep(range(variant.first, variant.stop))
            self._sizes[variant] = self._sizes_of(plan)
        return self._sizes[variant]

    @cached_property
    def _sizes(self) -> dict[Variant, tuple[BlockSize, ...]]:
        return {}

    @cached_property
    def _dense_sizes(self) -> tuple[BlockSize, ...]:
        return self._sizes_of(self.plan)

    def _sizes_of(self, plan: Plan) -> tuple[BlockSize, ...]:
        return block_sizes_of_plan(self.model.config, plan, self.model.dtype)


def in_order(choice: Iterable[Variant]) -> list[Variant]:
    """Variants in one order, whatever the hashes of this process are."""
    return sorted(choice, key=lambda v: (v.first, v.stop, v.kind, v.level))


def widths_of(variants: Iterable[Variant]) -> Widths:
    """The inner dimensions that some variants narrow, and to what."""
    return {slot: width for v in variants for slot, width in KIND_OF[v.kind].widths(v).items()}


def absent(choice: Iterable[Variant]) -> frozenset[int]:
    """The positions whose blocks are gone."""
    return frozenset(position for variant in choice for position in variant.gone)
