"""What a plan looks like: the base model's blocks in a row, and what became of each."""

from collections.abc import Iterable, Iterator
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


def cells_of(plan: Plan) -> list[Cell]:
    """The executed blocks in order, and the removed ones where they were."""
    cells, gone = [], list(plan.removed_blocks)
    for position, block in enumerate(plan.blocks):
        while gone and gone[0] < block.source:
            cells.append(_removed(gone.pop(0)))
        cells.append(_executed(plan, position, block))
    return cells + [_removed(source) for source in gone]


def _removed(source: int) -> Cell:
    return Cell(str(source), "removed", f"block {source}: removed")


def _executed(plan: Plan, position: int, block: BlockPlan) -> Cell:
    label = _span(block.stands_for)
    done = list(_done(plan, position, block))
    look: Look = next((look for look in _BY_WEIGHT if look in dict(done)), "own")
    told = "; ".join(sentence for _, sentence in done) or LOOKS["own"]
    return Cell(label, look, f"block {label}: {told}")


_BY_WEIGHT: tuple[Look, ...] = ("trained", "shared", "factored", "narrow")


def _done(plan: Plan, position: int, block: BlockPlan) -> Iterator[tuple[Look, str]]:
    """What was done to a block, and how that looks."""
    if block.kind != "original":
        inside = "" if block.intermediate_size is None else f" {block.intermediate_size} wide"
        yield "trained", f"a trained {block.kind}{inside} in place of the run"
    elif len(block.stands_for) > 1:
        yield "shared", "merged from several blocks"
    if block.weights_of is not None:
        owner = _span(plan.blocks[block.weights_of].stands_for)
        yield "shared", f"uses the weights of block {owner}"
    if block.adapters:
        yield "shared", f"adapters of rank {_range(block.adapters.values())}"
    factored = [form for form in block.linears.values() if isinstance(form, LowRank)]
    if factored:
        ranks = _range(form.rank for form in factored)
        yield "factored", f"{len(factored)} linears of two factors, rank {ranks}"
        lenders = sorted({form.basis_of for form in factored if form.basis_of is not None})
        if lenders:
            names = ", ".join(_span(plan.blocks[lender].stands_for) for lender in lenders)
            yield "factored", f"on the basis of block {names}"
    if len(block.linears) > len(factored):
        yield "shared", "attention heads use slices of other heads' weights"
    if block.mlp_width is not None:
        yield "narrow", f"MLP {block.mlp_width} wide"
    if block.narrow_heads is not None:
        heads = block.narrow_heads
        yield "narrow", f"heads of {heads.qk_dim} query-key and {heads.v_dim} value coordinates"
    if block.sliced is not None:
        widths = _range((block.sliced.entering, block.sliced.middle, block.sliced.leaving))
        yield "narrow", f"residual stream {widths} wide"
    if block.outputs != "plain":
        yield "own", f"{block.outputs} outputs"


def _span(sources: tuple[int, ...]) -> str:
    return str(sources[0]) if len(sources) == 1 else f"{sources[0]}-{sources[-1]}"


def _range(numbers: Iterable[int]) -> str:
    values = sorted(numbers)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
