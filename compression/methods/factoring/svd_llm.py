"""SVD-LLM: every linear of the blocks becomes two thin ones, best on its own inputs."""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.low_rank import (
    WhitenedSVD,
    eigen_whitened_svd,
    ranks_by_loss,
    tail_energy,
    truncate,
    uniform_ranks,
    whitened_svd,
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
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.storage.mapped_memory import release
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, linear_shapes
from foldstack.compression.structure.surgery import Cut, as_stored, plan_of

logger = logging.getLogger(__name__)


class SvdLlm(Method):
    """Replace every linear of the blocks by two thin ones: its best low-rank form on its own
    inputs.

    SVD-LLM (Wang et al. 2024, arXiv 2403.07378, section 3.1 and algorithm 1). For a weight W (m x
    n) whose inputs have the Gram matrix G = S S^T, and W S = U Sigma V^T cut to rank k:

        W' = (U Sigma^1/2) (Sigma^1/2 V^T S^-1),   k = floor(m n (1 - R) / (m + n))

    R is one fraction for all linears, so chosen that the whole model loses `sparsity`. Embeddings,
    head, norms and biases stay. `update` closed_form goes through the blocks in order and fits U
    again by least squares on the inputs that the blocks compressed so far produce: with
    `dense_target` 0 that is the authors' `--step 2`.

    `allocation` v2 is the ratio allocation of SVD-LLM V2 (Wang et al. 2025, arXiv 2503.12340,
    algorithm 1): among the linears of one name and shape, those that lose more at the uniform rank
    get more of the ranks, whose sum stays.

    Departs from the paper: the factors come from the eigenvectors of W G W^T, which is the same
    optimum without the inverse of S (so a singular G is no special case; `whitening` eigen is V2's
    form), and lie in the two factors with equal norms, for recovery's sake (`low_rank.truncate`);
    what the floors of the ranks leave over is spent on single ranks (`allocation` exact; paper
    keeps the floors); the update aims between the outputs on its inputs and those of the dense
    model (`dense_target`), which repairs what the blocks before have spoilt, and its target leaves
    the bias out, which the released code counts twice; a linear that would not become smaller stays
    dense; in V2's allocation no linear loses more than nine tenths and a loss below e counts as e,
    where the score has its pole. The paper's LoRA recovery is a recovery stage, not part of this
    method.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    steps_of: ClassVar[str] = "ranks"
    name: Literal["svd_llm"] = "svd_llm"
    update: Literal["none", "closed_form"] = "closed_form"
    """Whether U is fitted again on the inputs that the compressed blocks before it produce; none is
    the paper's SVD-LLM (W)."""
    dense_target: float = Field(default=0.4, ge=0, le=1)
    """Share of the dense model's own outputs in what the update fits; 0: the released code's
    target, what the dense weights make of the compressed model's inputs."""
    refit: Refit = "none"
    """What the linears that write into the residual stream are fitted to once more in the update:
    what the dense model's add, or the dense model's stream (`refit`)."""
    allocation: Literal["exact", "paper", "v2", "sensitivity"] = "exact"
    """exact: spend what the floors leave over, to hit the size; paper: the floors alone; v2: as
    exact, then by loss among the linears of one name and shape; sensitivity: lower ranks in the
    MLPs and attentions where the measured loss rises least (`statistics.sensitivity`)."""
    rank_multiple: int = Field(default=1, ge=1)
    """Ranks are multiples of this; 64 suits tensor cores."""
    whitening: Literal["projection", "eigen"] = "projection"
    """projection: onto the leading eigenvectors of W G W^T, without an inverse; eigen: V2's form,
    with the pseudo-inverse of G."""

    @model_validator(mode="after")
    def _refits_in_order(self) -> "SvdLlm":
        if self.refit != "none" and self.update != "closed_form":
            raise ValueError(IN_ORDER.format(needed="closed_form", given=self.update))
        return self

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"ranks"}) if self.allocation == "sensitivity" else frozenset()

    def outline(self, model: PreTrainedModel) -> Plan:
        # v2 gives a type of linear as many ranks as the uniform allocation does, and so its size.
        return plan_of(model).factor(self._ranks(model))

    @property
    def goes_in_turn(self) -> bool:
        return True

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        shapes, ranks = linear_shapes(model), self._ranks(model)
        once = math.fsum(whitened_svd_operations(*shapes[site], ranks[site]) for site in ranks)
        work = Arithmetic(float64=once * (2 if self.allocation == "v2" else 1))
        if self.update == "none":
            return work
        work += fitting_arithmetic(model, ranks, num_tokens, self.dense_target)
        if self.refit == "none":
            return work
        return work + refit_arithmetic(model, plan_of(model), num_tokens)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        ranks = self._ranks(model, evidence)
        if self.allocation == "v2":
            ranks = self._ranks_by_loss(model, ranks, evidence)
        plan = plan_of(model)
        if self.update == "closed_form":
            tensors = fitted_in_order(
                model,
                plan.factor(ranks),
                lambda position: self._factors(model, position, ranks, evidence),
                evidence,
                self.name,
                self.dense_target,
                self.refit,
            )
        else:
            tensors = self._independent(model, ranks, evidence)
        return Cut(plan.factor(ranks), tuple(range(len(plan.blocks))), tensors)

    def _ranks(self, model: PreTrainedModel, evidence: Evidence | None = None) -> dict[Site, int]:
        """A rank for every linear that becomes smaller by it; before there is evidence, one
        fraction for all stands in."""
        shapes = linear_shapes(model)
        dense = sum(m * n for m, n in shapes.values())
        whole = count_parameters(model)
        at_rank_one = sum(min(m + n, m * n) for m, n in shapes.values())
        farthest = (dense - at_rank_one) / whole
        if self.sparsity - TOLERANCE > farthest or not shapes:
            by = "rank 1 in every linear of the blocks" if shapes else NO_DENSE_LINEAR
            raise InputError(unreachable(self, farthest, by))
        removed: float | dict[Site, float] = min(1.0, self.sparsity * whole / dense)
        if self.allocation == "sensitivity" and evidence is not None:
            try:
                removed = sensitive_fractions(
                    model, scores_of(evidence, self), self.sparsity * whole
                )
            except OutOfReach as error:
                by = "the lowest ranks that were scored"
                farthest = error.reach["parameters"] / whole
                raise InputError(unreachable(self, farthest, by)) from None
        ranks = uniform_ranks(
            shapes,
            removed,
            spend_leftover=self.allocation != "paper",
            multiple=self.rank_multiple,
        )
        return {
            site: k for site, k in ranks.items() if k * sum(shapes[site]) < _product(shapes[site])
        }

    def _ranks_by_loss(
        self, model: PreTrainedModel, uniform: Mapping[Site, int], evidence: Evidence
    ) -> dict[Site, int]:
        shapes = linear_shapes(model)
        losses: dict[tuple[str, tuple[int, int]], dict[Site, float]] = defaultdict(dict)
        for site, rank in uniform.items():
            tail = self.decomposed(model, site, evidence, (rank,)).singular_values[rank:]
            losses[site[1], shapes[site]][site] = float(tail.norm())
            evidence.progress("svd_llm losses", sum(map(len, losses.values())), len(uniform))
        ranks: dict[Site, int] = {}
        for (_, shape), of_type in losses.items():
            total = sum(uniform[site] for site in of_type)
            step = self.rank_multiple
            if any(uniform[site] % step for site in of_type):  # ranks below it, of small linears
                step = 1
            ranks |= ranks_by_loss(of_type, shape, total, step)
        return ranks

    def _independent(
        self, model: PreTrainedModel, ranks: Mapping[Site, int], evidence: Evidence
    ) -> dict[str, Tensor]:
        """Factors of every linear by the dense model's own inputs (whitening alone)."""
        blocks, spool = architecture_of(model).blocks(model), evidence.spool()

        def of_block(position: int) -> dict[str, Tensor]:
            tensors: dict[str, Tensor] = {}
            for name, factors in self._factors(model, position, ranks, evidence).items():
                dense = blocks[position].get_submodule(name)
                tensors |= as_stored(named_factors(position, name, factors, dense), model)
            return tensors

        for position, block in enumerate(blocks):
            spool.part(f"block-{position}", partial(of_block, position))
            release(block)
            evidence.progress(self.name, position + 1, len(blocks))
        return spool.tensors

    def _factors(
        self,
        model: PreTrainedModel,
        position: int,
        ranks: Mapping[Site, int],
        evidence: Evidence,
    ) -> dict[str, Factors]:
        return {
            site.name: self._truncated(model, (position, site.name), rank, evidence)
            for site in architecture_of(model).linears
            if (rank := ranks.get((position, site.name))) is not None
        }

    def _truncated(
        self, model: PreTrainedModel, site: Site, rank: int, evidence: Evidence
    ) -> Factors:
        # A function of its own: the whole decomposition is gone before the next one begins.
        svd = self.decomposed(model, site, evidence, (rank,))
        logger.debug(
            "block %d %s: rank %d loses %.3g, computed in %s (rounding adds %.0e of it)",
            *site, rank, tail_energy(svd, rank), svd.left.dtype, svd.rounding,
        )  # fmt: skip
        factors = truncate(svd, rank)
        return as_held(factors, model) if self.update == "closed_form" else factors

    def decomposed(
        self, model: PreTrainedModel, site: Site, evidence: Evidence, ranks: Sequence[int]
    ) -> WhitenedSVD:
        """The decomposition of a linear on its own inputs, to be cut to one of these ranks."""
        architecture = architecture_of(model)
        position, name = site
        linear = architecture.blocks(model)[position].get_submodule(name)
        weight = architecture.weight(linear).detach().to(model.device)
        reads = next(site.reads for site in architecture.linears if site.name == name)
        decompose = (
            eigen_whitened_svd
            if self.whitening == "eigen"
            else partial(whitened_svd, ranks=tuple(ranks))
        )
        # No name for the Gram here: it goes when the decomposition has its own in float64.
        return decompose(
            weight,
            gram_of_users(plan_of(model), position, reads, evidence.statistics).to(model.device),
        )


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]
