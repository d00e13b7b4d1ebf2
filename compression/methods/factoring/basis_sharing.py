"""Basis Sharing: linears of the same name in neighbouring blocks are factored on one basis."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.low_rank import (
    pooled_gram,
    shared_factors,
    uniform_ranks,
    updated_directions,
    whitened_svd_operations,
)
from foldstack.compression.closed_forms.selection import OutOfReach
from foldstack.compression.errors import InputError
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.factoring.factored_linears import (
    Factors,
    Site,
    as_held,
    fitted_in_order,
    fitting_arithmetic,
    gram_of_users,
    named_factors,
    sensitive_fractions,
)
from foldstack.compression.methods.method import (
    NO_DENSE_LINEAR,
    TOLERANCE,
    Evidence,
    Method,
    check_evidence,
    scores_of,
    unreachable,
)
from foldstack.compression.methods.refit import IN_ORDER, Refit, refit_arithmetic
from foldstack.compression.statistics.block_residency import run_blocks_in_turn
from foldstack.compression.statistics.gathering import Statistics, gather
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.storage.mapped_memory import release
from foldstack.compression.structure.architectures import architecture_of, base_config_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, linear_shapes
from foldstack.compression.structure.surgery import Cut, as_stored, cut, plan_of, storage_of

logger = logging.getLogger(__name__)

# Private in the paper: the output projection's measured loss rises when it is shared, and the MLP's
# second linear maps wide to narrow, so that side by side its rank rises. GPT-2 is the exception.
_PRIVATE = ("self_attn.o_proj", "self_attn.out_proj", "mlp.down_proj", "fc2", "mlp.c_proj")
_KEYS_AND_VALUES = ("self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Group:
    """Linears of one name, at `positions`, on one basis of width `rank`."""

    name: str
    reads: str
    positions: tuple[int, ...]
    rank: int


class BasisSharing(Method):
    """Factor the linears of the same name in neighbouring blocks on one basis; each block keeps its
    own coefficients.

    Basis Sharing (Wang et al. 2024, arXiv 2410.03765, sections 3.1 to 3.3). For g consecutive
    blocks, with W_i (m x n) the weights of one name and G = S^T S the sum of their inputs' Gram
    matrices, stacked on top of each other and cut to rank k:

        [W_1; ...; W_g] S^T = U Sigma V^T,   B = Sigma^1/2 V^T S^-T,   C_i = (U Sigma^1/2)_i
        W_i' = C_i B,   k = floor(g m n (1 - R) / (n + g m))

    R is one fraction for all linears, so chosen that the whole model loses `sparsity`. B is stored
    once per group. Linears that share with nobody are factored alone, which is SVD-LLM (W), and so
    is everything with `group_size` 1. Embeddings, head, norms and biases stay. The computation per
    token does not fall as the parameters do.

    `update` fits the coefficients again on the inputs that the compressed model produces: global
    (the paper's at high sparsities, all at once, from one pass) or layerwise (in order, to a target
    that repairs what the blocks before have spoilt, as `SvdLlm` does). `pooling` equal_traces
    scales the Gram matrices before they are pooled, so that the block with the largest activations
    does not own the basis; once each block's coefficients are fitted to it, that no longer pays.

    Departs from the paper: since the pooled loss charges every block with its errors on the others'
    inputs, the coefficients are fitted again on the block's own (`coefficients` paper keeps those
    of the pooled SVD), and in order whatever the sparsity; a shorter last group gets a rank of its
    own size; what the floors of the ranks leave over is spent on single ranks (`allocation` exact;
    paper keeps the floors); the factors come without an inverse, see `low_rank`; a group that would
    not become smaller stays dense. Blocks that use another's weights count with its inputs, and
    linears already factored stay as they are.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    steps_of: ClassVar[str] = "ranks"
    name: Literal["basis_sharing"] = "basis_sharing"
    group_size: int = Field(default=2, ge=1)
    """Consecutive blocks that share a basis; what is left at the end is a smaller group."""
    shared_linears: Literal["paper"] | tuple[str, ...] = "paper"
    """Names, inside a block, of the linears that share; paper: those that read the input of the
    attention or of the MLP, without keys and values where query heads share those, and GPT-2's
    attention output."""
    pooling: Literal["equal_traces", "paper"] = "paper"
    """How the Gram matrices of a group add up: scaled to equal traces, or as they are."""
    coefficients: Literal["refit", "paper"] = "refit"
    """refit: by the block's own inputs; paper: as the SVD on the pooled inputs leaves them."""
    update: Literal["none", "global", "layerwise"] = "layerwise"
    """Whether, and in which order, coefficients are fitted again on the compressed model's inputs;
    layerwise always fits a block's to its own."""
    dense_target: float = Field(default=0.4, ge=0, le=1)
    """Share of the dense model's own outputs in what the layerwise update fits; 0: only what the
    dense weights make of the compressed model's inputs."""
    refit: Refit = "none"
    """What the linears that write into the residual stream are fitted to once more in the layerwise
    update: what the dense model's add, or the dense model's stream (`refit`)."""
    allocation: Literal["exact", "paper", "sensitivity"] = "exact"
    """exact: spend what the floors leave over, to hit the size; paper: the floors alone;
    sensitivity: as exact, with more removed from the groups where the measured loss rises least
    (`statistics.sensitivity`; of single blocks factored alone)."""

    rank_multiple: int = Field(default=1, ge=1)
    """Ranks are multiples of this; 64 suits tensor cores."""

    @model_validator(mode="after")
    def _refits_in_order(self) -> "BasisSharing":
        if self.refit != "none" and self.update != "layerwise":
            raise ValueError(IN_ORDER.format(needed="layerwise", given=self.update))
        return self

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"ranks"}) if self.allocation == "sensitivity" else frozenset()

    def outline(self, model: PreTrainedModel) -> Plan:
        return _factored(plan_of(model), self._groups(model))

    @property
    def goes_in_turn(self) -> bool:
        return True

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        shapes, groups = linear_shapes(model), self._groups(model)
        factors = (
            whitened_svd_operations(
                sum(shapes[position, group.name][0] for position in group.positions),
                shapes[group.positions[0], group.name][1],
                group.rank,
            )
            for group in groups
        )
        ranks = {(position, g.name): g.rank for g in groups for position in g.positions}
        work = Arithmetic(float64=math.fsum(factors))
        if self.update == "none":
            return work
        target = self.dense_target if self.update == "layerwise" else 0.0
        work += fitting_arithmetic(model, ranks, num_tokens, target)
        if self.refit == "none":
            return work
        return work + refit_arithmetic(model, plan_of(model), num_tokens)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        groups = self._groups(model, evidence)
        plan = _factored(plan_of(model), groups)
        inherits = tuple(range(len(plan.blocks)))
        if self.update == "layerwise":
            tensors = self._layerwise(model, groups, evidence)
        else:
            tensors = self._independent(model, groups, evidence)
        if self.update == "global":
            # The inputs that the whole compressed model produces, on disk where there is room.
            smaller = cut(model, Cut(plan, inherits, tensors), share_memory=True)
            if storage_of(model) != model.device:
                run_blocks_in_turn(smaller, model.device)
            folder = None if evidence.work is None else evidence.work / "deviated"
            deviated = gather(smaller, evidence.calibration, {"gram"}, folder=folder, work=folder)
            spool = evidence.spool()
            for group in groups:
                update = partial(self._updated, model, group, tensors, deviated)
                tensors |= spool.part(f"updated-{_part(group)}", update)
        return Cut(plan, inherits, tensors)

    def _groups(self, model: PreTrainedModel, evidence: Evidence | None = None) -> list[Group]:
        """What is factored, by its first position and the order of the names in a block; before
        there is evidence, one fraction for all stands in."""
        shapes = linear_shapes(model)
        members = self._members(model, shapes)
        stacked = {
            site: (sum(shapes[position, site[1]][0] for position in positions), shapes[site][1])
            for site, positions in members.items()
        }
        dense = sum(m * n for m, n in stacked.values())
        whole = count_parameters(model)
        at_rank_one = sum(min(m + n, m * n) for m, n in stacked.values())
        farthest = (dense - at_rank_one) / whole
        if self.sparsity - TOLERANCE > farthest or not shapes:
            by = "rank 1 in every group of linears" if shapes else NO_DENSE_LINEAR
            raise InputError(unreachable(self, farthest, by))
        removed: float | dict[Site, float] = min(1.0, self.sparsity * whole / dense)
        if self.allocation == "sensitivity" and evidence is not None:
            try:
                of_linear = sensitive_fractions(
                    model, scores_of(evidence, self), self.sparsity * whole
                )
            except OutOfReach as error:
                by = "the lowest ranks that were scored"
                farthest = error.reach["parameters"] / whole
                raise InputError(unreachable(self, farthest, by)) from None
            removed = {
                site: fmean(of_linear[position, site[1]] for position in positions)
                for site, positions in members.items()
            }
        ranks = uniform_ranks(
            stacked,
            removed,
            spend_leftover=self.allocation != "paper",
            multiple=self.rank_multiple,
        )
        reads = {site.name: site.reads for site in architecture_of(model).linears}
        return [
            Group(site[1], reads[site[1]], members[site], rank)
            for site, rank in ranks.items()
            if rank * sum(stacked[site]) < stacked[site][0] * stacked[site][1]
        ]

    def _members(
        self, model: PreTrainedModel, shapes: Mapping[Site, tuple[int, int]]
    ) -> dict[Site, tuple[int, ...]]:
        """The positions of every group, by its first site; all read inputs of one width."""
        shared = self._shared_names(model)
        storing = sorted({position for position, _ in shapes})
        place = {position: index // self.group_size for index, position in enumerate(storing)}
        members: dict[tuple[str, int | str, int], list[int]] = {}
        for (position, name), (_, width) in shapes.items():
            together = place[position] if name in shared else f"alone at {position}"
            members.setdefault((name, together, width), []).append(position)
        return {(positions[0], key[0]): tuple(positions) for key, positions in members.items()}

    def _shared_names(self, model: PreTrainedModel) -> set[str]:
        names = [site.name for site in architecture_of(model).linears]
        if self.shared_linears != "paper":
            if unknown := sorted(set(self.shared_linears) - set(names)):
                raise InputError(
                    f"shared_linears names linears of a block, {', '.join(names)}; "
                    f"got {', '.join(unknown)}"
                )
            return set(self.shared_linears)
        config = base_config_of(model.config)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        is_grouped = kv_heads < config.num_attention_heads
        private = _PRIVATE + (_KEYS_AND_VALUES if is_grouped else ())
        return set(names) - set(private)

    def _independent(
        self, model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence
    ) -> dict[str, Tensor]:
        """Bases and coefficients by the dense model's own inputs."""
        spool = evidence.spool()

        def of_group(group: Group) -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = {}
            for position, factors in self._factors(model, group, evidence).items():
                tensors |= as_stored(_named(model, group, position, factors), model)
            return tensors

        for index, group in enumerate(groups):
            spool.part(_part(group), partial(of_group, group))
            release(_weights(model, group))
            evidence.progress(self.name, index + 1, len(groups))
        return spool.tensors

    def _layerwise(
        self, model: PreTrainedModel, groups: Sequence[Group], evidence: Evidence
    ) -> dict[str, Tensor]:
        """As `_independent`, then coefficients fitted on what the compressed blocks produce."""
        ready: dict[Site, Factors] = {}

        def factors_of(position: int) -> dict[str, Factors]:
            mine = [group for group in groups if position in group.positions]
            for group in mine:
                if (position, group.name) not in ready:
                    of_group = self._factors(model, group, evidence)
                    for member, pair in of_group.items():
                        if member >= position:  # those before it were left by a killed run
                            ready[member, group.name] = as_held(pair, model)
            return {group.name: ready.pop((position, group.name)) for group in mine}

        plan = _factored(plan_of(model), groups)
        tensors = fitted_in_order(
            model, plan, factors_of, evidence, self.name, self.dense_target, self.refit
        )
        for group in groups:
            for position in group.positions[1:]:
                del tensors[f"{_place(position, group)}.first.weight"]
        return tensors

    def _factors(
        self, model: PreTrainedModel, group: Group, evidence: Evidence
    ) -> dict[int, Factors]:
        """The basis and the coefficients of every member, by its position."""
        weights = _weights(model, group)
        grams = _grams(model, group, evidence.statistics)
        pooled = pooled_gram(grams, equal_traces=self.pooling == "equal_traces")
        basis, coefficients = shared_factors(weights, pooled, group.rank)
        if self.coefficients == "refit" and len(weights) > 1:
            coefficients = _fitted(weights, basis, coefficients, grams)
        return {
            position: (basis, own)
            for position, own in zip(group.positions, coefficients, strict=True)
        }

    def _updated(
        self,
        model: PreTrainedModel,
        group: Group,
        tensors: Mapping[str, Tensor],
        deviated: Statistics,
    ) -> dict[str, Tensor]:
        """The group's coefficients, fitted on the compressed model's inputs."""
        grams = _grams(model, group, deviated)
        if self.coefficients == "paper":
            pooled = pooled_gram(grams, equal_traces=self.pooling == "equal_traces")
            grams = [pooled] * len(grams)
        names = [f"{_place(position, group)}.second.weight" for position in group.positions]
        before = [tensors[name].to(model.device) for name in names]
        basis = tensors[f"{_place(group.positions[0], group)}.first.weight"].to(model.device)
        after = _fitted(_weights(model, group), basis, before, grams)
        return {
            name: new.to(old.dtype) for name, new, old in zip(names, after, before, strict=True)
        }


def _factored(plan: Plan, groups: Sequence[Group]) -> Plan:
    ranks = {(p, group.name): group.rank for group in groups for p in group.positions}
    bases = {(p, group.name): group.positions[0] for group in groups for p in group.positions}
    return plan.factor(ranks, bases)


def _place(position: int, group: Group) -> str:
    return f"blocks.{position}.{group.name}"


def _part(group: Group) -> str:
    return f"group-{group.positions[0]}-{group.name}"


def _weights(model: PreTrainedModel, group: Group) -> list[Tensor]:
    architecture = architecture_of(model)
    blocks = architecture.blocks(model)
    linears = [blocks[position].get_submodule(group.name) for position in group.positions]
    return [architecture.weight(linear).detach().to(model.device) for linear in linears]


def _grams(model: PreTrainedModel, group: Group, statistics: Statistics) -> list[Tensor]:
    plan = plan_of(model)
    return [
        gram_of_users(plan, position, group.reads, statistics).to(model.device)
        for position in group.positions
    ]


def _fitted(
    weights: Sequence[Tensor],
    basis: Tensor,
    coefficients: Sequence[Tensor],
    grams: Sequence[Tensor],
) -> list[Tensor]:
    """Coefficients W_i G_i B^T (B G_i B^T)^-1: least squares on the inputs of each Gram."""
    return [
        updated_directions(weight, basis, own, gram)
        for weight, own, gram in zip(weights, coefficients, grams, strict=True)
    ]


def _named(
    model: PreTrainedModel, group: Group, position: int, factors: Factors
) -> dict[str, Tensor]:
    """The factors of one member as a cut names them; the basis at the group's first alone."""
    dense = architecture_of(model).blocks(model)[position].get_submodule(group.name)
    tensors = named_factors(position, group.name, factors, dense)
    if position != group.positions[0]:
        del tensors[f"{_place(position, group)}.first.weight"]
    return tensors
