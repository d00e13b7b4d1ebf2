"""What the tensors of variants are made from, and what several of them have in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from foldstack.compression.closed_forms.low_rank import WhitenedSVD
from foldstack.compression.methods.factoring.svd_llm import SvdLlm
from foldstack.compression.methods.method import Evidence
from foldstack.compression.methods.narrowing.modegpt import Orders
from foldstack.compression.methods.search.run_maps import RunMaps
from foldstack.compression.methods.search.sites import Sites


@dataclass
class Materials:
    """Of one model."""

    sites: Sites
    evidence: Evidence

    def __post_init__(self) -> None:
        self._factoring = SvdLlm(sparsity=0.5, update="none")
        self.orders: Orders = {}
        self._svds: dict[tuple[int, str], WhitenedSVD] = {}

    def svd(self, position: int, name: str, ranks: Sequence[int]) -> WhitenedSVD:
        """Of a linear, for all of its ranks."""
        site = position, name
        if site not in self._svds or self._svds[site].left.shape[1] < max(ranks):
            model = self.sites.model
            self._svds[site] = self._factoring.decomposed(model, site, self.evidence, ranks)
        return self._svds[site]

    @cached_property
    def maps(self) -> RunMaps:
        """Of the runs of blocks."""
        return RunMaps(self.sites.model, self.evidence)

    def forget(self) -> None:
        """Let go of what is kept for the other levels of a site."""
        self._svds.clear()
