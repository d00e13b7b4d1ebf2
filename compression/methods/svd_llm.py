"""SVD-LLM: every linear of the blocks becomes two thin ones, best on its own inputs."""

import copy
import logging
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.architectures import architecture_of
from foldstack.compression.errors import InputError
from foldstack.compression.low_rank import (
    tail_energy,
    truncate,
    uniform_ranks,
    updated_directions,
    whitened_svd,
)
from foldstack.compression.method import (
    TOLERANCE,
    Evidence,
    Method,
    check_evidence,
    unreachable,
)
from foldstack.compression.modeling_foldstack import LowRankLinear
from foldstack.compression.plan import Plan
from foldstack.compression.size import count_parameters, linear_shapes
from foldstack.compression.statistics import gram_hooks
from foldstack.compression.stream import BlockStream
from foldstack.compression.surgery import Cut, plan_of

logger = logging.getLogger(__name__)

Site = tuple[int, str]
Factors = tuple[Tensor, Tensor]


class SvdLlm(Method):
    """Replace every linear of the blocks by two thin ones: its best low-rank form on its own
    inputs.

    SVD-LLM (Wang et al. 2024, arXiv 2403.07378, section 3.1 and algorithm 1). For a weight W (m x
    n) whose inputs have the Gram matrix G = S S^T, and W S = U Sigma V^T cut to rank k:

        W' = (U Sigma^1/2) (Sigma^1/2 V^T S^-1),   k = floor(m n (1 - R) / (m + n))

    R is one fraction for all linears, so chosen that the whole model loses `sparsity`. Embeddings,
    head, norms and biases stay. `update` closed_form is the authors' `--step 2`: going through the
    blocks in order, U is fitted again by least squares on the inputs that the blocks compressed so
    far produce.

    Departs from the paper: the factors come from the eigenvectors of W G W^T, which is the same
    optimum without the inverse of S (so a singular G is no special case); what the floors of the
    ranks leave over is spent on single ranks (`allocation` exact; paper keeps the floors); the
    update's target leaves the bias out, which the released code counts twice; a linear that would
    not become smaller stays dense. The paper's LoRA recovery is a recovery stage, not part of this
    method.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    name: Literal["svd_llm"] = "svd_llm"
    update: Literal["none", "closed_form"] = "none"
    """Whether U is fitted again on the inputs that the compressed blocks before it produce."""
    allocation: Literal["exact", "paper"] = "exact"
    """exact: spend what the floors leave over, to hit the size; paper: the floors alone."""

    def outline(self, model: PreTrainedModel) -> Plan:
        return plan_of(model).factor(self._ranks(model))

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        ranks = self._ranks(model)
        plan = plan_of(model)
        if self.update == "closed_form":
            tensors = self._sequential(model, ranks, evidence)
        else:
            tensors = self._independent(model, ranks, evidence)
        return Cut(plan.factor(ranks), tuple(range(len(plan.blocks))), tensors)

    def _ranks(self, model: PreTrainedModel) -> dict[Site, int]:
        """A rank for every linear that becomes smaller by it."""
        shapes = linear_shapes(model)
        dense = sum(m * n for m, n in shapes.values())
        whole = count_parameters(model)
        at_rank_one = sum(min(m + n, m * n) for m, n in shapes.values())
        farthest = (dense - at_rank_one) / whole
        if self.sparsity - TOLERANCE > farthest or not shapes:
            raise InputError(unreachable(self, farthest, "rank 1 in every linear of the blocks"))
        removed = min(1.0, self.sparsity * whole / dense)
        ranks = uniform_ranks(shapes, removed, spend_leftover=self.allocation == "exact")
        return {
            site: k for site, k in ranks.items() if k * sum(shapes[site]) < _product(shapes[site])
        }

    def _independent(
        self, model: PreTrainedModel, ranks: Mapping[Site, int], evidence: Evidence
    ) -> dict[str, Tensor]:
        """Factors of every linear by the dense model's own inputs (whitening alone)."""
        blocks = architecture_of(model).blocks(model)
        tensors: dict[str, Tensor] = {}
        for position, block in enumerate(blocks):
            for name, factors in self._factors(model, position, ranks, evidence).items():
                tensors |= _named(position, name, factors, block.get_submodule(name))
            evidence.progress("svd_llm", position + 1, len(blocks))
        return tensors

    def _sequential(
        self, model: PreTrainedModel, ranks: Mapping[Site, int], evidence: Evidence
    ) -> dict[str, Tensor]:
        """As `_independent`, then U fitted on what the compressed blocks before it produce."""
        plan = plan_of(model)
        if any(block.weights_of is not None for block in plan.blocks):
            raise InputError(
                "update closed_form fits every block to its own inputs, and this model has blocks "
                "that share weights; use update none, or share the weights after factoring"
            )
        architecture = architecture_of(model)
        stream = BlockStream(model, evidence.calibration)
        tensors: dict[str, Tensor] = {}
        for position, block in enumerate(stream.blocks):
            factors = self._factors(model, position, ranks, evidence)
            # Inside the block every linear sees the inputs that its original siblings produce.
            with gram_hooks(block, architecture) as deviated:
                for _ in stream.outputs(block):
                    pass
            for site in architecture.linears:
                if site.name not in factors:
                    continue
                module = block.get_submodule(site.name)
                first, second = factors[site.name]
                weight = architecture.weight(module).detach()
                gram = deviated[site.reads].to(weight.device)
                factors[site.name] = first, updated_directions(weight, first, second, gram)
                tensors |= _named(position, site.name, factors[site.name], module)
            stream.advance(_with_factors(block, factors))
            evidence.progress("svd_llm", position + 1, len(stream.blocks))
        return tensors

    def _factors(
        self,
        model: PreTrainedModel,
        position: int,
        ranks: Mapping[Site, int],
        evidence: Evidence,
    ) -> dict[str, Factors]:
        architecture = architecture_of(model)
        block = architecture.blocks(model)[position]
        factors = {}
        for site in architecture.linears:
            rank = ranks.get((position, site.name))
            if rank is None:
                continue
            weight = architecture.weight(block.get_submodule(site.name)).detach()
            gram = _gram_of_users(model, position, site.reads, evidence).to(weight.device)
            svd = whitened_svd(weight, gram)
            factors[site.name] = truncate(svd, rank)
            lost = tail_energy(svd, rank)
            logger.debug("block %d %s: rank %d loses %.3g", position, site.name, rank, lost)
        return factors


def _product(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _gram_of_users(model: PreTrainedModel, position: int, reads: str, evidence: Evidence) -> Tensor:
    """The Gram of all inputs that the linears stored at `position` see, borrowers' included."""
    plan = plan_of(model)
    users = [user for user in range(len(plan.blocks)) if plan.owner(user) == position]
    grams = [evidence.statistics.gram(user, reads) for user in users]
    return torch.stack(grams).sum(0) if len(grams) > 1 else grams[0]


def _named(position: int, name: str, factors: Factors, dense: nn.Module) -> dict[str, Tensor]:
    """The factors as a cut names them, in the precision of the weight; the bias once, on
    `second`."""
    place = f"blocks.{position}.{name}"
    weight = dense.weight
    assert isinstance(weight, Tensor)
    first, second = (factor.to(weight.dtype) for factor in factors)
    tensors = {f"{place}.first.weight": first, f"{place}.second.weight": second}
    if dense.bias is not None:
        assert isinstance(dense.bias, Tensor)
        tensors[f"{place}.second.bias"] = dense.bias.detach()
    return tensors


def _with_factors(block: nn.Module, factors: Mapping[str, Factors]) -> nn.Module:
    """A copy of the block with the factored linears in place."""
    compressed = copy.deepcopy(block)
    for name, (first, second) in factors.items():
        parent_path, _, attribute = name.rpartition(".")
        parent = compressed.get_submodule(parent_path)
        dense = getattr(parent, attribute)
        thin = LowRankLinear(first.shape[1], second.shape[0], len(first), dense.bias is not None)
        thin = thin.to(dense.weight.device, dense.weight.dtype)
        thin.load_state_dict(
            {
                k.removeprefix("blocks.0.x."): v
                for k, v in _named(0, "x", (first, second), dense).items()
            }
        )
        setattr(parent, attribute, thin)
    return compressed
