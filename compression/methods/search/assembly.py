"""From a choice of variants to the model: the structure, the tensors, and single blocks of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.methods.method import Evidence, no_progress
from foldstack.compression.methods.search.kinds import KIND_OF
from foldstack.compression.methods.search.library import Choice, Library, in_order, widths_of
from foldstack.compression.methods.search.materials import Materials
from foldstack.compression.statistics.sensitivity import Variant
from foldstack.compression.storage.mapped_memory import release
from foldstack.compression.storage.spool import Spool
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import Cut, cut


@dataclass
class Assembly:
    """Makes what variants of a model consist of.

    Args:
        library: what there is for the model.
        evidence: of the model.
    """

    library: Library
    evidence: Evidence

    @property
    def model(self) -> PreTrainedModel:
        return self.library.model

    @cached_property
    def materials(self) -> Materials:
        return Materials(self.library, self.evidence)

    def block(self, position: int, choice: Iterable[Variant]) -> nn.Module:
        """The block at `position` with what a choice has there, computing where the model does.

        It belongs to nobody else, and shares the memory of what did not change.
        """
        here = of_position(choice, position)
        plan = self.library.plan_with(here).keep([position])
        made = cut(
            self.model,
            Cut(plan, (position,), _renamed(self.tensors(position, here), position, 0)),
            share_memory=True,
        )
        block = architecture_of(made).blocks(made)[0]
        return block.to(self.model.device)

    def prepare(self, choices: Iterable[Choice]) -> None:
        """Make what takes a pass through the dense model, while it is the dense one."""
        for variant in in_order(set().union(*choices)):
            KIND_OF[variant.kind].prepare(self.materials, variant)

    def cut(
        self,
        choice: Choice,
        spool: Spool | None = None,
        progress: Callable[[str, int, int], None] = no_progress,
    ) -> Cut:
        """The cut that makes the model of a choice; what is made goes to `spool` by block."""
        spool = spool or Spool(None)
        plan, survivors = self.library.structure(choice)
        blocks = architecture_of(self.model).blocks(self.model)

        def made(new: int, position: int) -> dict[str, Tensor]:
            if plan.blocks[new].weights_of is not None:  # its linears are stored elsewhere
                return {}
            return _renamed(self.tensors(position, of_position(choice, position)), position, new)

        for new, position in enumerate(survivors):
            spool.part(f"chosen-{position}", partial(made, new, position))
            release(blocks[position])
            self.forget()
            progress("search", new + 1, len(survivors))
        return Cut(plan, survivors, spool.tensors)

    def tensors(self, position: int, here: Iterable[Variant]) -> dict[str, Tensor]:
        """What changes in a block, as a cut of the same depth names it and the model stores it."""
        here = in_order(here)
        form = self.library.plan_with(here).blocks[position]
        parts = {part for _, part in widths_of(here)}
        tensors = self.library.narrowing.narrow_block(
            self.model,
            position,
            form,
            self.evidence,
            self.materials.orders,
            mlp="mlp" in parts,
            heads=bool(parts - {"mlp"}),
        )
        for variant in here:
            tensors |= KIND_OF[variant.kind].tensors(self.materials, variant, position)
        return tensors

    def forget(self) -> None:
        """Let go of what is kept for the other levels of a site."""
        self.materials.forget()


def _renamed(tensors: dict[str, Tensor], position: int, new: int) -> dict[str, Tensor]:
    """As a cut names them that has the block at position `new`."""
    start = f"blocks.{position}."
    return {f"blocks.{new}.{name.removeprefix(start)}": t for name, t in tensors.items()}


def of_position(choice: Iterable[Variant], position: int) -> list[Variant]:
    """What a choice has inside the block at `position`, in one order."""
    return in_order(v for v in choice if v.first <= position < v.stop and position not in v.gone)
