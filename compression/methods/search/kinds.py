"""What may stand at a site, a class for each kind: where, in which structure, of which tensors.

| site | variants | tensors from |
|---|---|---|
| MLP; query-key and value-output pairs | widths on a grid | MoDeGPT |
| MLP; attention | all linears at a share of their parameters | SVD-LLM |
| MLP; attention | absent | nothing but a bias |
| KV heads | neighbours merged | `closed_forms.head_merging` |
| block; run of blocks | absent | nothing |
| run of blocks | a map that the MLP before it takes in | ReplaceMe |
| two neighbours | both on the linears of one of them, norms their own | the model |

What a family forbids (queries and keys that are normed head by head cannot lose coordinates, nor
be merged) or a model does not have (linears of its own, behind an earlier method) has no variants.
A further kind is a class here, and its row in `statistics.sensitivity`, which says what it decides
about.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from foldstack.compression.closed_forms.channel_removal import (
    refitting_operations,
    removal_operations,
)
from foldstack.compression.closed_forms.low_rank import truncate, whitened_svd_operations
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.factoring.factored_linears import named_factors
from foldstack.compression.methods.narrowing.inner_widths import Widths
from foldstack.compression.methods.replacement.replaceme import can_take_in
from foldstack.compression.methods.search.head_tensors import merged_heads, merged_plan
from foldstack.compression.methods.search.materials import Materials
from foldstack.compression.methods.search.sites import RUN_LENGTHS, Sites
from foldstack.compression.statistics.sensitivity import (
    KINDS,
    Part,
    Variant,
    VariantKind,
)
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import as_stored

PER_MILLE = 1000


@dataclass(frozen=True)
class Kind(ABC):
    """One kind of variant."""

    name: VariantKind

    @abstractmethod
    def offered(self, sites: Sites, position: int) -> Iterator[Variant]:
        """Those that begin at a block, that which saves least of a site first."""

    def widths(self, variant: Variant) -> Widths:
        """The inner dimensions that it narrows, and to what; 0 is none at all."""
        del variant
        return {}

    def changed(self, sites: Sites, plan: Plan, variant: Variant) -> Plan:
        """What becomes of the structure besides narrower dimensions and blocks that go."""
        del sites, variant
        return plan

    def tensors(
        self, materials: Materials, variant: Variant, position: int
    ) -> Mapping[str, Tensor]:
        """What changes of the block at `position` besides that, as a cut of the same depth names it
        and the model stores it."""
        del materials, variant, position
        return {}

    def prepare(self, materials: Materials, variant: Variant) -> None:
        """Make what takes a pass through the dense model."""
        del materials, variant

    def arithmetic(self, sites: Sites, variant: Variant, num_tokens: int) -> Arithmetic:
        """Of its tensors, after statistics of `num_tokens`."""
        del sites, variant, num_tokens
        return Arithmetic()

    def at(self, first: int, stop: int | None = None, level: int = 0) -> Variant:
        """One of this kind."""
        stop = first + 1 if stop is None else stop
        return Variant(kind=self.name, first=first, stop=stop, level=level)


@dataclass(frozen=True)
class _Width(Kind):
    part: Part

    def offered(self, sites: Sites, position: int) -> Iterator[Variant]:
        dimension = sites.dimensions.get((position, self.part))
        if dimension is None:
            return
        widths = (dimension.floor((1 - gone) * dimension.size) for gone in sites.grid)
        for width in dict.fromkeys(widths):
            if width < dimension.size:
                yield self.at(position, level=width)

    def widths(self, variant: Variant) -> Widths:
        return {(variant.first, self.part): variant.level}

    def arithmetic(self, sites: Sites, variant: Variant, num_tokens: int) -> Arithmetic:
        operations = 0.0
        for site in architecture_of(sites.model).linears:
            rows, columns = sites.shapes.get((variant.first, site.name), (0, 0))
            if self.part == "mlp" and site.reads == "mlp_output":
                operations += refitting_operations(rows, columns, variant.level)
                levels = max(1, sum(1 for _ in self.offered(sites, variant.first)))
                # The order is found at the first width, and to the end at the second.
                operations += min(levels, 2) / levels * removal_operations(rows, columns, 0)
            elif self.part != "mlp" and site.reads == "attention_input":
                operations += 2.0 * rows * columns**2
        return Arithmetic(float64=operations)


@dataclass(frozen=True)
class _Rank(Kind):
    reads: str
    """How the activations are called that its linears read."""

    def offered(self, sites: Sites, position: int) -> Iterator[Variant]:
        if not sites.is_dense(position) or sites.plan.is_sliced:
            return
        for gone in sites.rank_grid:
            variant = self.at(position, level=_level(gone))
            if self.ranks(sites, variant):
                yield variant

    def ranks(self, sites: Sites, variant: Variant) -> dict[tuple[int, str], int]:
        """Of the linears; those that would not shrink are left out."""
        found = {}
        for site in architecture_of(sites.model).linears:
            if not site.reads.startswith(self.reads):
                continue
            rows, columns = sites.shapes[variant.first, site.name]
            rank = _rank(sites, (rows, columns), variant.level)
            if rank * (rows + columns) < rows * columns:
                found[variant.first, site.name] = rank
        return found

    def changed(self, sites: Sites, plan: Plan, variant: Variant) -> Plan:
        return plan.factor(self.ranks(sites, variant))

    def tensors(
        self, materials: Materials, variant: Variant, position: int
    ) -> Mapping[str, Tensor]:
        sites = materials.sites
        model = sites.model
        block = architecture_of(model).blocks(model)[position]
        tensors: dict[str, Tensor] = {}
        for site, rank in self.ranks(sites, variant).items():
            name, shape = site[1], sites.shapes[site]
            scored = {_rank(sites, shape, _level(gone)) for gone in sites.rank_grid}
            factors = truncate(materials.svd(position, name, sorted(scored | {rank})), rank)
            tensors |= named_factors(position, name, factors, block.get_submodule(name))
        return as_stored(tensors, model)

    def arithmetic(self, sites: Sites, variant: Variant, num_tokens: int) -> Arithmetic:
        # One decomposition serves all ranks of a linear.
        operations = (
            whitened_svd_operations(*sites.shapes[site]) / len(sites.rank_grid)
            for site in self.ranks(sites, variant)
        )
        return Arithmetic(float64=sum(operations))


def _level(gone: float) -> int:
    """Of a rank that removes this share of a linear's parameters."""
    return round(PER_MILLE * (1 - gone))


def _rank(sites: Sites, shape: tuple[int, int], level: int) -> int:
    rows, columns = shape
    rank = int(rows * columns * level / PER_MILLE / (rows + columns) + 1e-9)
    step = sites.rank_multiple if rank >= sites.rank_multiple else 1
    return max(1, rank // step * step)


@dataclass(frozen=True)
class _Sublayer(Kind):
    """Attention or an MLP that adds no more than a bias: as narrow as can be."""

    def offered(self, sites: Sites, position: int) -> Iterator[Variant]:
        if sites.narrows:
            yield self.at(position)

    def widths(self, variant: Variant) -> Widths:
        return {(variant.first, part): 0 for part in KINDS[self.name].parts}


@dataclass(frozen=True)
class _KvHeads(Kind):
    def offered(self, sites: Sites, position: int) -> Iterator[Variant]:
        if not sites.narrows or sites.heads.has_norms:
            return
        whole = sites.heads.kv_heads
        fewer = (whole // 2, whole // 4, whole // 8, 1)
        for count in dict.fromkeys(n for n in fewer if 0 < n < whole and whole % n == 0):
            yield self.at(position, level=count)

    def changed(self, sites: Sites, plan: Plan, variant: Variant) -> Plan:
        return merged_plan(sites, plan, variant.first, variant.level)

    def tensors(
        self, materials: Materials, variant: Variant, position: int
    ) -> Mapping[str, Tensor]:
        return merged_heads(materials, position, variant.level)

    def arithmetic(self, sites: Sites, variant: Variant, num_tokens: int) -> Arithmetic:
        sizes = sites.heads
        hidden = next(iter(sites.shapes.values()))[1]
        width = sizes.kv_heads // variant.level * sizes.head_dim
        merges = 2.0 * width * hidden**2 + 8.0 * sizes.heads * hidden * width**2
        return Arithmetic(float64=variant.level * merges)


@dataclass(frozen=True)
class _Gone(Kind):
    shortest: int
    longest: int

    def offered(self, sites: Sites, position: int) -> Iterator[Variant]:
        for run in sites.runs_from(position, self.shortest):
            if len(run) <= self.longest:
                yield self.at(run.start, run.stop)


@dataclass(frozen=True)
class _Map(Kind):
    def offered(self, sites: Sites, position: int) -> Iterator[Variant]:
        if sites.narrows and can_take_in(sites.model, sites.plan, position):
            for run in sites.runs_from(position + 1, 1):
                yield self.at(position, run.stop)

    def tensors(
        self, materials: Materials, variant: Variant, position: int
    ) -> Mapping[str, Tensor]:
        return materials.maps.of(variant.first, variant.stop) if position == variant.first else {}

    def prepare(self, materials: Materials, variant: Variant) -> None:
        materials.maps.of(variant.first, variant.stop)

    def arithmetic(self, sites: Sites, variant: Variant, num_tokens: int) -> Arithmetic:
        (down,) = (s.name for s in architecture_of(sites.model).linears if s.reads == "mlp_output")
        rows, width = sites.shapes[variant.first, down]
        depth = len(sites.positions)
        return Arithmetic(
            float64=width**3 / 3 + 2.0 * rows * width**2,
            products=num_tokens * (width**2 + 2.0 * rows * width),
            passes=3.0 / depth,  # the block twice, and one more of the run
        )


@dataclass(frozen=True)
class _Shared(Kind):
    def offered(self, sites: Sites, position: int) -> Iterator[Variant]:
        other = position + 1
        if other == len(sites.positions) or not sites.narrows:
            return
        blocks = sites.plan.blocks
        is_alike = sites.parameters[position] == sites.parameters[other]
        if is_alike and blocks[position].outputs == blocks[other].outputs == "plain":
            for of in (0, 1):
                yield self.at(position, position + 2, of)

    def changed(self, sites: Sites, plan: Plan, variant: Variant) -> Plan:
        return plan.share(variant.first + variant.level, range(variant.first, variant.stop))

    def tensors(
        self, materials: Materials, variant: Variant, position: int
    ) -> Mapping[str, Tensor]:
        lender = variant.first + variant.level
        if position == lender:
            return {}
        model = materials.sites.model
        block = architecture_of(model).blocks(model)[lender]
        return {
            f"blocks.{position}.{site.name}.{name}": parameter.detach()
            for site in architecture_of(model).linears
            for name, parameter in block.get_submodule(site.name).named_parameters(recurse=False)
        }


_ALL: Sequence[Kind] = (
    _Width("mlp_width", "mlp"),
    _Width("query_key_width", "query_key"),
    _Width("value_output_width", "value_output"),
    _Rank("mlp_rank", "mlp"),
    _Rank("attention_rank", "attention"),
    _Gone("absent", 1, 1),
    _Sublayer("attention_absent"),
    _Sublayer("mlp_absent"),
    _KvHeads("kv_heads"),
    _Gone("run_absent", 2, max(RUN_LENGTHS)),
    _Map("run_map"),
    _Shared("shared"),
)
KIND_OF: dict[VariantKind, Kind] = {kind.name: kind for kind in _ALL}
WIDTH_OF: dict[Part, Kind] = {kind.part: kind for kind in _ALL if isinstance(kind, _Width)}
