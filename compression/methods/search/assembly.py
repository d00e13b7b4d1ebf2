"""From a choice of variants to the model: the structure, the tensors, and single blocks of it."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.low_rank import WhitenedSVD, truncate
from foldstack.compression.methods.factoring.factored_linears import named_factors
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.method import Evidence, no_progress
from foldstack.compression.methods.search.library import Choice, Library
from foldstack.compression.statistics.sensitivity import Variant
from foldstack.compression.storage.mapped_memory import release
from foldstack.compression.storage.spool import Spool
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.surgery import Cut, as_stored, cut


@dataclass
class Assembly:
    """Makes what variants of a model consist of.

    Args:
        library: what there is for the model.
        evidence: of the model.
    """

    library: Library
    evidence: Evidence

    def __post_init__(self) -> None:
        self._factoring = SvdLlm(sparsity=0.5, update="none")
        self._svds: dict[tuple[int, str], WhitenedSVD] = {}

    @property
    def model(self) -> PreTrainedModel:
        return self.library.model

    def block(self, position: int, choice: Iterable[Variant]) -> nn.Module:
        """The block at `position` with what a choice has there, computing where the model does.

        It belongs to nobody else, and shares the memory of what did not change.
        """
        here = of_position(choice, position)
        plan = self.library.plan_with(here).keep([position])
        made = cut(
            self.model,
            Cut(plan, (position,), self._moved(position, 0, here)),
            share_memory=True,
        )
        block = architecture_of(made).blocks(made)[0]
        return block.to(self.model.device)

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
        for new, position in enumerate(survivors):
            here = of_position(choice, position)
            spool.part(f"chosen-{position}", partial(self._moved, position, new, here))
            release(blocks[position])
            self.forget()
            progress("search", new + 1, len(survivors))
        return Cut(plan, survivors, spool.tensors)

    def _moved(self, position: int, new: int, here: Collection[Variant]) -> dict[str, Tensor]:
        """What changes in a block, as a cut names it that has it at position `new`."""
        start = f"blocks.{position}."
        return {
            f"blocks.{new}.{name.removeprefix(start)}": tensor
            for name, tensor in self.tensors(position, here).items()
        }

    def tensors(self, position: int, here: Collection[Variant]) -> dict[str, Tensor]:
        """What changes in a block, as a cut of the same depth names it and the model stores it."""
        form = self.library.plan_with(here).blocks[position]
        is_narrower = any(v.kind == "mlp_width" for v in here)
        tensors = self.library.narrowing.narrow_block(
            self.model, position, form, self.evidence, mlp=is_narrower
        )
        for variant in here:
            if variant.kind.endswith("_rank"):
                tensors |= as_stored(self._factors(variant), self.model)
        return tensors

    def forget(self) -> None:
        """Let go of what is kept for the other levels of a site."""
        self._svds.clear()

    def _factors(self, variant: Variant) -> dict[str, Tensor]:
        block = architecture_of(self.model).blocks(self.model)[variant.first]
        tensors: dict[str, Tensor] = {}
        for (position, name), rank in self.library.ranks(variant).items():
            if (position, name) not in self._svds:
                site = position, name
                self._svds[site] = self._factoring.decomposed(self.model, site, self.evidence)
            factors = truncate(self._svds[position, name], rank)
            tensors |= named_factors(position, name, factors, block.get_submodule(name))
        return tensors


def of_position(choice: Iterable[Variant], position: int) -> list[Variant]:
    """What a choice has inside the block at `position`, in one order."""
    here = (v for v in choice if v.kind != "absent" and v.first <= position < v.stop)
    return sorted(here, key=lambda v: (v.kind, v.level))
