"""The compressed structure as data: the executed blocks, and what may become of them.

A plan is relative to a base model (a stock Hugging Face decoder). It holds no tensors, survives
JSON, and is all that `modeling_foldstack.restructure` needs to build the model again. Methods
derive a new plan from the plan of the model that they are given (`keep`, `share`, `borrow`,
`repeat`, `factor`, `share_slices`, `replace`), which is what makes methods stack.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from foldstack.compression.errors import InputError
from foldstack.compression.structure.block_plan import (
    NO_FORMS,
    BlockKind,
    BlockPlan,
    Form,
    LowRank,
    NarrowHeads,
    Outputs,
    Record,
    Sliced,
    original_block,
)
from foldstack.compression.structure.head_slices import HeadSlices, Slice, settle

_Basis = tuple[Literal["old", "new"], int]


def _slices_moved(blocks: Sequence[BlockPlan], stored_at: Mapping[int, int]) -> list[BlockPlan]:
    """The blocks of a new order whose slices still point to the old one, which `stored_at` maps."""
    old_position = {new: old for old, new in stored_at.items()}
    moved = list(blocks)
    for name in sorted({name for block in blocks for name in block.linears}):
        forms = {
            position: form
            for position, block in enumerate(blocks)
            if isinstance(form := block.linears.get(name), HeadSlices)
        }
        for position, form in settle(forms, old_position, stored_at).items():
            linears = {n: f for n, f in moved[position].linears.items() if n != name}
            if form is not None:
                linears[name] = form
            moved[position] = moved[position].model_copy(update={"linears": linears})
    return moved


def _renumbered_slices(block: BlockPlan, new_position: Mapping[int, int]) -> dict[str, Form]:
    """The forms of a block whose plan is put in another order."""
    return {
        name: form.with_origins([o and (new_position[o[0]], o[1]) for o in form.slices])
        if isinstance(form, HeadSlices)
        else form
        for name, form in block.linears.items()
    }


class Plan(Record):
    """The sequence of executed blocks of a model made from `base_model_type`."""

    version: Literal[1] = 1
    base_model_type: str
    base_num_blocks: int = Field(ge=1)
    blocks: tuple[BlockPlan, ...] = Field(min_length=1)

    @classmethod
    def identity(cls, base_model_type: str, num_blocks: int) -> "Plan":
        """The plan of an untouched model."""
        blocks = tuple(original_block(source) for source in range(num_blocks))
        return cls(base_model_type=base_model_type, base_num_blocks=num_blocks, blocks=blocks)

    @model_validator(mode="after")
    def _references_point_to_owners(self) -> "Plan":
        for position, block in enumerate(self.blocks):
            if block.stands_for[-1] >= self.base_num_blocks:
                raise ValueError(
                    f"position {position} stands for base block {block.stands_for[-1]}, "
                    f"the base model has {self.base_num_blocks}"
                )
            if block.weights_of is not None:
                self._check_owner(position, block.weights_of)
            for name, form in block.linears.items():
                if isinstance(form, HeadSlices):
                    self._check_slices(position, name, form)
                elif form.basis_of is not None:
                    self._check_basis(position, name, form)
        return self

    @model_validator(mode="after")
    def _residual_widths_meet(self) -> "Plan":
        widths = [block.sliced for block in self.blocks]
        if not any(widths):
            return self
        for position, (before, after) in enumerate(pairwise(widths), start=1):
            if before is None or after is None:
                raise ValueError("either all blocks of a plan are sliced or none is")
            if before.leaving != after.entering:
                raise ValueError(
                    f"position {position} is entered by {after.entering} coordinates, "
                    f"{before.leaving} leave the block before it"
                )
        return self

    def _check_owner(self, position: int, owner: int) -> None:
        if not 0 <= owner < len(self.blocks):
            raise ValueError(
                f"position {position} refers to {owner}, the plan has {len(self.blocks)} blocks"
            )
        if self.blocks[owner].weights_of is not None or not self.blocks[owner].has_attention:
            raise ValueError(f"position {position} refers to {owner}, which owns no linears")

    def _check_basis(self, position: int, name: str, form: LowRank) -> None:
        assert form.basis_of is not None
        if not 0 <= form.basis_of < position:
            raise ValueError(
                f"position {position} refers to {form.basis_of}, which does not come before it"
            )
        owner = self.blocks[form.basis_of].linears.get(name)
        rank = owner.rank if isinstance(owner, LowRank) and owner.basis_of is None else None
        if rank != form.rank:
            raise ValueError(
                f"position {position} shares the basis of {name} with position {form.basis_of}, "
                f"which does not own one of rank {form.rank}"
            )

    def _check_slices(self, position: int, name: str, form: HeadSlices) -> None:
        if self.blocks[position].narrow_heads is not None:
            raise ValueError(f"position {position} has narrow heads and slices of {name}")
        for origin in form.slices:
            if origin is None:
                continue
            lender, index = origin
            self._check_owner(position, lender)
            lent = self.blocks[lender].linears.get(name)
            # One of a position's own slices may stand for another: both had one donor that is gone.
            stores_it = 0 <= index < len(form.slices) and (
                lent is None
                or (
                    isinstance(lent, HeadSlices)
                    and lent.same_cut(form)
                    and lent.slices[index] is None
                )
            )
            if not stores_it or self.blocks[lender].narrow_heads is not None:
                raise ValueError(
                    f"position {position} uses slice {index} of {name} of position {lender}, which "
                    "does not store one like that"
                )

    @property
    def is_native(self) -> bool:
        """True when a stock class of the base architecture can express this structure."""
        is_stock = all(
            block.has_attention
            and block.weights_of is None
            and not block.linears
            and block.narrow_heads is None
            and block.outputs == "plain"
            and block.sliced is None
            for block in self.blocks
        )
        widths = {block.mlp_width for block in self.blocks}
        return is_stock and len(widths) == 1 and 0 not in widths

    @property
    def is_sliced(self) -> bool:
        """True when the residual stream has a basis, and maybe a width, of its own at each link."""
        return self.blocks[0].sliced is not None

    @property
    def removed_blocks(self) -> tuple[int, ...]:
        """Base blocks whose own work nobody does any more, in order."""
        present = {source for block in self.blocks for source in block.stands_for}
        return tuple(source for source in range(self.base_num_blocks) if source not in present)

    @property
    def lenders(self) -> frozenset[tuple[int, str]]:
        """Position and name of every linear of which another position uses slices."""
        return frozenset(
            (origin[0], name)
            for position, block in enumerate(self.blocks)
            for name, form in block.linears.items()
            if isinstance(form, HeadSlices)
            for origin in form.slices
            if origin is not None and origin[0] != position
        )

    def _refuse_slices(self, positions: Iterable[int], what: str) -> None:
        """Raises InputError when one of the positions lends slices to another."""
        lending = {position for position, _ in self.lenders}
        for position in positions:
            if position in lending:
                raise InputError(
                    f"block {position} cannot {what}: other blocks use attention heads of its; "
                    "do that before sharing heads"
                )

    def owner(self, position: int) -> int:
        """Position that stores the linears that `position` uses."""
        weights_of = self.blocks[position].weights_of
        return position if weights_of is None else weights_of

    def can_go(self, position: int, gone: Container[int]) -> bool:
        """Whether a block may be removed with those in `gone`: no other that stays has adapters on
        its linears."""
        return all(
            other in gone
            for other, block in enumerate(self.blocks)
            if block.adapters and block.weights_of == position
        )

    def order_of_removal(self, order: Iterable[int]) -> list[int]:
        """`order`, in which a block waits until those with adapters on its linears have gone; one
        that none of the order frees is left out."""
        waiting, gone = list(order), list[int]()
        while ready := [position for position in waiting if self.can_go(position, gone)]:
            gone.append(ready[0])
            waiting.remove(ready[0])
        return gone

    def keep(self, positions: Iterable[int]) -> "Plan":
        """The plan with only these positions left, in ascending order.

        When an owner of shared weights goes, its first surviving borrower becomes the owner.

        Raises:
            InputError: the owner goes, and a block with adapters on its linears stays; or the
                blocks are sliced, so that a removed one is missed between two bases.
        """
        kept = sorted(set(positions))
        if not kept:
            raise ValueError("a model keeps at least one block")
        if len(kept) < len(self.blocks):
            self._refuse_sliced("removed")
        new_position = {old: new for new, old in enumerate(kept)}
        heirs = self._heirs(kept)
        blocks, bases = [], []
        for old in kept:
            owner = self.owner(old)
            heir = heirs[owner]
            is_heir = heir == old
            stored = {
                "weights_of": None if is_heir else new_position[heir],
                **(self.blocks[owner].forms if is_heir else NO_FORMS),
            }
            blocks.append(self.blocks[old].model_copy(update=stored))
            bases.append(self._bases(owner))
        stored_at = {owner: new_position[heir] for owner, heir in heirs.items()}
        return self._with_blocks(_slices_moved(blocks, stored_at), bases)

    def after(self, first: "Plan") -> "Plan":
        """This plan, of the model that `first` makes, as a plan of the base model of `first`.

        A model of a native plan is a stock one, which does not know what it was made from: a plan
        of it counts its blocks from 0. The plan of any other says by itself what it is made from,
        and stays as it is.
        """
        if not first.is_native:
            return self
        return Plan(
            base_model_type=first.base_model_type,
            base_num_blocks=first.base_num_blocks,
            blocks=tuple(block.after(first.blocks) for block in self.blocks),
        )

    def _heirs(self, kept: Sequence[int]) -> dict[int, int]:
        """Who stores what each owner stored: itself if it stays, else its first borrower."""
        heirs: dict[int, int] = {}
        for old in kept:
            owner = self.owner(old)
            if owner not in kept and self.blocks[old].adapters:
                raise InputError(
                    f"block {owner} cannot go while block {old} stays, which has adapters on its "
                    "linears; remove both, or only the latter"
                )
            heirs.setdefault(owner, owner if owner in kept else old)
        return heirs

    def share(self, owner: int, members: Iterable[int], outputs: Outputs = "plain") -> "Plan":
        """The plan in which `members` use the linears of `owner`; their norms stay their own.

        Where `outputs` is not plain, all of the group treat their sub-layers' outputs as it says.

        The earliest of the group stores the linears, whoever's they were: `owner` only says whose
        tensors they start from, which is the business of the cut.
        """
        self._refuse_sliced("shared")
        group = sorted({owner, *members})
        self._refuse_slices(group, "share its linears as a whole")
        for position in group:
            if self.owner(position) != position or not self.blocks[position].has_attention:
                raise ValueError(f"position {position} has no linears of its own to share")
            if self.blocks[position].narrow_heads is not None:
                # Its kept frequencies and any query and key norms belong to its own linears.
                raise InputError(f"position {position} has narrow heads; share before narrowing")
        forms = self.blocks[owner].forms
        for name, form in self.blocks[owner].linears.items():
            if isinstance(form, LowRank) and (form.basis_of or 0) > group[0]:
                raise ValueError(
                    f"position {group[0]} cannot use the linears of position {owner}: the basis of "
                    f"{name} is stored at position {form.basis_of}, which comes later"
                )
        blocks, bases = list(self.blocks), self._all_bases()
        changed = {} if outputs == "plain" else {"outputs": outputs}
        for position in group:
            is_first = position == group[0]
            blocks[position] = blocks[position].model_copy(
                update={
                    "weights_of": None if is_first else group[0],
                    **(forms if is_first else NO_FORMS),
                    **changed,
                }
            )
        bases[group[0]] = self._bases(owner)
        return self._with_blocks(blocks, bases)

    def borrow(
        self, bases: Mapping[int, int], ranks: Mapping[str, int], outputs: Outputs = "plain"
    ) -> "Plan":
        """The plan in which every position in `bases` uses the linears of its base.

        Each of them adds adapters of `ranks`, by the linears' names, and treats its sub-layers'
        outputs as `outputs` says; its norms stay its own.
        """
        self._refuse_sliced("borrowed")
        blocks = list(self.blocks)
        self._refuse_slices(bases, "give up its linears")
        for position, base in bases.items():
            if self.owner(position) != position or not blocks[position].has_attention:
                raise ValueError(f"position {position} has no linears of its own to give up")
            if any(blocks[p].narrow_heads for p in (position, base) if p < len(blocks)):
                raise ValueError(f"position {position} or {base} has narrow heads; borrow before")
            blocks[position] = blocks[position].borrowing(base, ranks, outputs)
        return self._with_blocks(blocks)

    def repeat(
        self, order: Sequence[int], ranks: Mapping[str, int], outputs: Outputs = "plain"
    ) -> "Plan":
        """The plan that runs the positions in `order`, some of them more than once.

        The first occurrence of a position is what it was; every later one uses the linears of the
        first, adds adapters of `ranks` and treats its sub-layers' outputs as `outputs` says.
        """
        self._refuse_sliced("repeated")
        first = {old: order.index(old) for old in dict.fromkeys(order)}
        if len(first) != len(self.blocks):
            raise ValueError(f"order names {len(first)} of {len(self.blocks)} positions")
        blocks = []
        for new, old in enumerate(order):
            block = self.blocks[old]
            if new == first[old]:
                weights_of = None if block.weights_of is None else first[block.weights_of]
                linears = _renumbered_slices(block, first)
                update = {"weights_of": weights_of, "linears": linears}
                blocks.append(block.model_copy(update=update))
            elif block.weights_of is not None or not block.has_attention:
                raise ValueError(f"position {old} has no linears of its own to repeat")
            else:
                blocks.append(block.borrowing(first[old], ranks, outputs))
        return self._with_blocks(blocks, [self._bases(old) for old in order])

    def factor(
        self,
        ranks: Mapping[tuple[int, str], int],
        basis_of: Mapping[tuple[int, str], int] | None = None,
    ) -> "Plan":
        """The plan in which linear `name` of `position` has rank `ranks[position, name]`.

        Those with an entry in `basis_of` use the first factor of the linear of the same name at
        that position, which `ranks` gives the same rank; the others have one of their own.
        """
        blocks, bases = list(self.blocks), self._all_bases()
        for (position, name), rank in ranks.items():
            if self.owner(position) != position:
                raise ValueError(
                    f"position {position} stores no linears; factor its owner's instead"
                )
            if (position, name) in self.lenders:
                self._refuse_slices([position], f"factor {name}")
            linears = {**blocks[position].linears, name: LowRank(rank=rank)}
            blocks[position] = blocks[position].model_copy(update={"linears": linears})
            bases[position][name] = ("new", (basis_of or {}).get((position, name), position))
        return self._with_blocks(blocks, bases)

    def multiply_out(self, sites: Iterable[tuple[int, str]]) -> "Plan":
        """The plan in which the factored linears at these positions, by name, are dense again; with
        a basis all that use it."""
        blocks = list(self.blocks)
        for position, name in sites:
            linears = {n: form for n, form in blocks[position].linears.items() if n != name}
            blocks[position] = blocks[position].model_copy(update={"linears": linears})
        return self._with_blocks(blocks)

    def share_slices(self, cuts: Mapping[str, HeadSlices], donors: Mapping[Slice, Slice]) -> "Plan":
        """The plan in which each slice in `donors` is its donor's, in every linear of `cuts`.

        `cuts` says by name how a linear is cut. No donor has a donor itself.
        """
        if donors:
            self._refuse_sliced("shared head by head")
        blocks = list(self.blocks)
        for position in sorted({position for position, _ in donors}):
            linears = dict(blocks[position].linears)
            for name, cut in cuts.items():
                form = linears.get(name, cut)
                if self.owner(position) != position or not isinstance(form, HeadSlices):
                    raise ValueError(f"position {position} has no dense {name} of its own to slice")
                origins = [
                    donors.get((position, index), origin)
                    for index, origin in enumerate(form.slices)
                ]
                linears[name] = form.with_origins(origins)
            blocks[position] = blocks[position].model_copy(update={"linears": linears})
        return self._with_blocks(blocks)

    def narrow(
        self,
        mlp_widths: Mapping[int, int] | None = None,
        heads: Mapping[int, NarrowHeads] | None = None,
    ) -> "Plan":
        """The plan in which these positions have an MLP of that width, and heads of those."""
        mlp_widths, heads = mlp_widths or {}, heads or {}
        self._refuse_slices(heads, "have narrower heads")
        blocks = list(self.blocks)
        for position in sorted({*mlp_widths, *heads}):
            block = blocks[position]
            if not block.has_attention or self.owner(position) != position:
                raise ValueError(f"position {position} stores no linears to narrow")
            if block.linears:
                raise ValueError(
                    f"position {position} has factored or sliced linears; narrow before that"
                )
            if any(other.adapters and other.weights_of == position for other in blocks):
                raise ValueError(f"position {position} has borrowers with adapters of its widths")
            update = {
                "mlp_width": mlp_widths.get(position, block.mlp_width),
                "narrow_heads": heads.get(position, block.narrow_heads),
            }
            blocks[position] = block.model_copy(update=update)
        return self._with_blocks(blocks)

    def replace(
        self, start: int, stop: int, kind: BlockKind, intermediate_size: int | None = None
    ) -> "Plan":
        """The plan in which one block of `kind` stands for positions start ... stop - 1.

        A layer has the widths of the block at `start`.
        """
        self._refuse_sliced("replaced")
        if not 0 <= start < stop <= len(self.blocks):
            raise ValueError(f"run {start}..{stop} is not inside 0..{len(self.blocks)}")
        if kind == "original":
            raise ValueError("a replacement is a layer, ffn or swiglu block")
        stands_for = tuple(s for block in self.blocks[start:stop] for s in block.stands_for)
        first = self.blocks[self.owner(start)]
        replacement = BlockPlan(
            kind=kind,
            source=stands_for[0],
            stands_for=stands_for,
            intermediate_size=intermediate_size,
            mlp_width=first.mlp_width if kind == "layer" else None,
            narrow_heads=first.narrow_heads if kind == "layer" else None,
        )
        kept = self.keep([p for p in range(len(self.blocks)) if not start < p < stop])
        kept._refuse_slices([start], "be replaced")  # what the others of the run lent has moved
        blocks = list(kept.blocks)
        if any(block.weights_of == start for block in blocks):
            raise ValueError(
                f"position {start} owns weights that other blocks share; replace those too"
            )
        blocks[start] = replacement
        return kept._with_blocks(blocks)

    def slice(self, widths: Sequence[Sliced]) -> "Plan":
        """The plan in which block i works on a residual stream of `widths[i]`."""
        self._refuse_sliced("sliced again")
        for position, block in enumerate(self.blocks):
            if not block.has_attention or block.weights_of is not None or block.outputs != "plain":
                raise InputError(
                    f"position {position} cannot be sliced: it is no plain block with linears of "
                    "its own; slice before sharing, replacing or borrowing"
                )
            if block.linears:
                raise InputError(
                    f"position {position} has factored linears or shared heads; slice before that"
                )
        return self._with_blocks(
            [
                block.model_copy(update={"sliced": sliced})
                for block, sliced in zip(self.blocks, widths, strict=True)
            ]
        )

    def _refuse_sliced(self, what: str) -> None:
        """Neighbours of a sliced block would meet in different bases of the residual stream."""
        if self.is_sliced:
            raise InputError(
                f"the blocks of a sliced model cannot be {what}: each works in a basis of its own; "
                "do that before slicing"
            )

    def _bases(self, position: int) -> dict[str, _Basis]:
        """For every factored linear stored at `position`: which basis its first factor is."""
        return {
            name: ("old", position if form.basis_of is None else form.basis_of)
            for name, form in self.blocks[position].linears.items()
            if isinstance(form, LowRank)
        }

    def _all_bases(self) -> list[dict[str, _Basis]]:
        return [self._bases(position) for position in range(len(self.blocks))]

    def _with_blocks(
        self,
        blocks: Sequence[BlockPlan],
        bases: Sequence[Mapping[str, _Basis]] | None = None,
    ) -> "Plan":
        """The plan of these blocks, in which the first user of a basis stores it for the rest.

        `bases` says which one each factored linear of each block uses; default: those of before.
        """
        bases = self._all_bases() if bases is None else bases
        holders: dict[tuple[str, _Basis], int] = {}
        settled = []
        for position, block in enumerate(blocks):
            linears = dict(block.linears)
            for name, form in block.linears.items():
                if isinstance(form, HeadSlices):
                    continue
                holder = holders.setdefault((name, bases[position][name]), position)
                basis_of = None if holder == position else holder
                linears[name] = form.model_copy(update={"basis_of": basis_of})
            settled.append(block.model_copy(update={"linears": linears}))
        return Plan(
            base_model_type=self.base_model_type,
            base_num_blocks=self.base_num_blocks,
            blocks=tuple(settled),
        )
