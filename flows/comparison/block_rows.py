"""What a plan looks like: the base model's blocks in a row, and what became of each."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from foldstack.compression.structure.block_plan import BlockPlan, LowRank
from foldstack.compression.structure.plan import Plan

Look = Literal["own", "factored", "narrow", "shared", "trained", "removed"]
LOOKS: dict[Look, str] = {
    "own": "as it was",
    "factored": "linears of two factors",
    "narrow": "narrower",
    "shared": "another block's weights",
    "trained": "trained in place of a run",
    "removed": "removed",
}


@dataclass(frozen=True)
class Cell:
    """One block."""

    label: str
    """The base blocks whose work it does: "5", or "5-7"."""
    look: Look
    """What was done to it most of all."""
    told: str
    """Everything that was done to it, as a sentence."""
    note: str = ""
    """Its widths and ranks in a few characters: "r 5-9"."""
    span: int = 1
    """How many base blocks it stands for."""
    kept: float | None = None
    """What it stores, as a share of what those store in the dense model."""


def cells_of(plan: Plan, stored: Sequence[int] = (), dense: Sequence[int] = ()) -> list[Cell]:
    """The executed blocks in order, and the removed ones where they were.

    Args:
        plan: the structure.
        stored: parameters of each executed block; empty when they are not known.
        dense: parameters of each block of the base model.
    """
    cells, gone = [], list(plan.removed_blocks)
    for position, block in enumerate(plan.blocks):
        while gone and gone[0] < block.source:
            cells.append(_removed(gone.pop(0)))
        kept = None
        if len(stored) == len(plan.blocks) and len(dense) == plan.base_num_blocks:
            kept = stored[position] / sum(dense[source] for source in block.stands_for)
        cells.append(_executed(plan, position, block, kept))
    return cells + [_removed(source) for source in gone]


def is_aligned(plan: Plan) -> bool:
    """True when every base block is done by one block at most, so that structures can stand below
    each other block by block.
    """
    done = [source for block in plan.blocks for source in block.stands_for]
    return len(done) == len(set(done)) and done == sorted(done)


def _removed(source: int) -> Cell:
    return Cell(str(source), "removed", f"block {source}: removed", kept=0.0)


def _executed(plan: Plan, position: int, block: BlockPlan, kept: float | None) -> Cell:
    label = _span(block.stands_for)
    done = list(_done(plan, position, block))
    looks = [look for look, _, _ in done]
    look: Look = next((look for look in _BY_WEIGHT if look in looks), "own")
    told = "; ".join(sentence for _, sentence, _ in done) or LOOKS["own"]
    size = "" if kept is None else f"; stores {100 * kept:.0f} % of the dense weights"
    note = next((note for each, _, note in done if each == look and note), "")
    return Cell(label, look, f"block {label}: {told}{size}", note, len(block.stands_for), kept)


_BY_WEIGHT: tuple[Look, ...] = ("trained", "shared", "factored", "narrow")


def _done(plan: Plan, position: int, block: BlockPlan) -> Iterator[tuple[Look, str, str]]:
    """What was done to a block: how that looks, as words, and in a few characters."""
    if block.kind != "original":
        width = block.intermediate_size
        inside = "" if width is None else f" {width} wide"
        yield (
            "trained",
            f"a trained {block.kind}{inside} in place of the run",
            (block.kind if width is None else f"{block.kind} {width}"),
        )
    elif len(block.stands_for) > 1:
        yield "shared", "merged from several blocks", "merged"
    if block.weights_of is not None:
        owner = _span(plan.blocks[block.weights_of].stands_for)
        ranks = f" + r {_range(block.adapters.values(), '-')}" if block.adapters else ""
        yield "shared", f"uses the weights of block {owner}", f"= {owner}{ranks}"
    if block.adapters:
        yield "shared", f"adapters of rank {_range(block.adapters.values())}", ""
    factored = [form for form in block.linears.values() if isinstance(form, LowRank)]
    if factored:
        ranks = _range((form.rank for form in factored), "-")
        told = _range(form.rank for form in factored)
        yield "factored", f"{len(factored)} linears of two factors, rank {told}", f"r {ranks}"
        lenders = sorted({form.basis_of for form in factored if form.basis_of is not None})
        if lenders:
            names = ", ".join(_span(plan.blocks[lender].stands_for) for lender in lenders)
            yield "factored", f"on the basis of block {names}", ""
    if len(block.linears) > len(factored):
        yield "shared", "attention heads use slices of other heads' weights", "heads"
    yield from _narrowed(block)
    if block.outputs != "plain":
        yield "own", f"{block.outputs} outputs", ""


def _narrowed(block: BlockPlan) -> Iterator[tuple[Look, str, str]]:
    heads, widths = block.narrow_heads, block.sliced
    if block.mlp_width is not None:
        attention = "" if heads is None else f" · {heads.qk_dim}/{heads.v_dim}"
        yield "narrow", f"MLP {block.mlp_width} wide", f"w {block.mlp_width}{attention}"
    if heads is not None:
        yield (
            "narrow",
            f"heads of {heads.qk_dim} query-key and {heads.v_dim} value coordinates",
            f"h {heads.qk_dim}/{heads.v_dim}",
        )
    if widths is not None:
        streams = (widths.entering, widths.middle, widths.leaving)
        yield "narrow", f"residual stream {_range(streams)} wide", f"d {_range(streams, '-')}"


def _span(sources: tuple[int, ...]) -> str:
    return str(sources[0]) if len(sources) == 1 else f"{sources[0]}-{sources[-1]}"


def _range(numbers: Iterable[int], to: str = " to ") -> str:
    values = sorted(numbers)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}{to}{values[-1]}"
