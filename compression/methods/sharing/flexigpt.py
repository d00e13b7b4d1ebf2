"""FlexiGPT: pruned blocks come back as virtual ones, on the weights of the block most like them."""

import logging
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedModel

from foldstack.compression.closed_forms.low_rank import whitened_svd_operations
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.method import (
    Evidence,
    Method,
    check_evidence,
    scores_of,
    smallest_reaching,
)
from foldstack.compression.methods.sharing.gain_fitting import better_gains
from foldstack.compression.methods.sharing.virtual_blocks import (
    Aggregate,
    Initial,
    adapter_ranks,
    adapters_of_difference,
    block_distances,
    block_shapes,
    borrowable,
    gains,
    largest_rank,
    lenders,
    nearest,
)
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.structure.architectures import base_config_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, cut, plan_of

logger = logging.getLogger(__name__)

# The paper's rank at its width of 4096, and in proportion below.
_WIDTH_PER_RANK = 16
_LARGEST_DEFAULT_RANK = 256
# So near to the pruned model that its perplexity is the pruned model's to a few thousandths.
_SMALL_GAIN = 0.01


class FlexiGpt(Method):
    """Let the blocks with the least block influence borrow the weights of others, with adapters of
    their own.

    FlexiGPT (Smith et al. 2025, arXiv 2501.14713, section 3). The k blocks of lowest block
    influence are pruned, and each comes back in its place as a virtual block on the weights W_j of
    the surviving block from which a rank-r adapter leads closest to it, judged by leading rank-r
    parts (equations 2 to 5). It owns adapters A B that start as the rank-r part of W_i - W_j
    (equations 7 and 8), the norms and biases of block i, and two gains:

        x + LN(attention(x); g),   then   x + LN(MLP(x); g)

    with LN without bias and g small at first, so that training starts near the pruned model. k is
    the smallest number for which what is gained by k blocks, less what the virtual ones own,
    reaches the sparsity. Stored parameters fall; FLOPs and the KV cache do not. The virtual blocks
    are of use after recovery, which trains their parameters in full.

    Departs from the paper: adapters start nearest to W_i - W_j on the inputs that block i has, as
    SVD-LLM's factors do (arXiv 2403.07378, theorem 3.2), unless `init` is paper; k follows from the
    net sparsity of the whole model (the paper gives no rule); `allocation` exact gives what k
    blocks remove too much to the ranks of the adapters (paper: one fixed rank); gains start as the
    least-squares ones on calibration windows where those help, unless `g0` is a number, as in the
    paper; the last block's output is taken before the final norm for block influence. Silent there
    and chosen here: input norms and biases from the pruned block, one base per block by the sum
    over its linears.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"similarity", "gram"})

    steps_of: ClassVar[str] = "virtual blocks and ranks of their adapters"
    name: Literal["flexigpt"] = "flexigpt"
    ranking: Literal["block_influence", "sensitivity"] = "block_influence"
    """Which blocks become virtual ones. block_influence: those of the least, as in the paper;
    sensitivity: those whose absence alone costs the least divergence from the dense model
    (`statistics.sensitivity`)."""
    rank: Annotated[int, Field(ge=1)] | Literal["by_width"] = "by_width"
    """Rank of the adapters and of the leading parts that are compared, at most half a linear's
    smaller side; by_width: a sixteenth of the hidden width, at most 256."""
    allocation: Literal["exact", "paper"] = "exact"
    """exact: raise the rank until the sparsity is just reached; paper: the rank as it is."""
    g0: Annotated[float, Field(ge=0)] | Literal["fitted"] = "fitted"
    """What the gains of the normed outputs start with. fitted: by least squares to the outputs of
    the pruned block, or 0.01 where the model is better with that; the paper: a small number; at 0
    the adapters get no gradient."""
    gain_windows: int = Field(default=32, ge=1)
    """Calibration windows that gains are fitted on."""
    agg: Aggregate = "sum"
    """How the distances of a block's linears add up: as they are, or each relative to its norm."""
    init: Initial = "whitened"
    """What adapters start as. whitened: nearest to the difference of the weights on the pruned
    block's inputs; paper: nearest to it by itself, the singular values all in A; balanced: the
    same, their roots in A and in B."""
    outputs: Literal["normed", "plain"] = "normed"
    """plain leaves the norms of the sub-layers' outputs out, which the paper shows to break the
    start."""

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"removals"}) if self.ranking == "sensitivity" else frozenset()

    def outline(self, model: PreTrainedModel) -> Plan:
        count, ranks = self._count_and_ranks(model)
        # Which blocks and whose weights is not known yet: the deepest on the first one's stand in.
        return self._plan(model, count, ranks)

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        guess = super().arithmetic(model, num_tokens)
        count, _ = self._count_and_ranks(model)
        if self.init != "whitened" or count == 0:
            return guess
        shapes = block_shapes(model, lenders(model)[0]).values()
        of_block = math.fsum(whitened_svd_operations(*shape) for shape in shapes)
        return guess + Arithmetic(float64=count * of_block)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        count, ranks = self._count_and_ranks(model)
        plan, inherits = plan_of(model), tuple(range(len(plan_of(model).blocks)))
        if count == 0:
            return Cut(plan, inherits)
        may_go = set(self._removable(model))
        order = evidence.ranking.order()
        if self.ranking == "sensitivity":
            order = scores_of(evidence, self).order_of_removal()
        virtual = [block for block in order if block in may_go][:count]
        candidates = [block for block in lenders(model) if block not in virtual]
        # The metric has the method's own rank, whatever the adapters get on top of it.
        by_metric = adapter_ranks(block_shapes(model, candidates[0]), self._base_rank(model))
        bases = nearest(block_distances(model, virtual, candidates, by_metric, self.agg))
        evidence.progress("flexigpt", 1, 2)
        tensors = adapters_of_difference(model, bases, ranks, self.init, evidence.statistics)
        smaller = plan.borrow(bases, ranks, self.outputs)
        if self.outputs == "normed":
            start = gains(model, bases, _SMALL_GAIN if self.g0 == "fitted" else self.g0)
            if self.g0 == "fitted":
                virtual_model = cut(model, Cut(smaller, inherits, tensors | start))
                windows = evidence.calibration[: self.gain_windows]
                start = better_gains(model, virtual_model, start, windows)
            tensors |= start
        self._report(model, smaller, bases, ranks)
        evidence.progress("flexigpt", 2, 2)
        return Cut(smaller, inherits, tensors)

    def _count_and_ranks(self, model: PreTrainedModel) -> tuple[int, dict[str, int]]:
        """Number of virtual blocks, and the ranks of their adapters by linear."""
        owners, removable = lenders(model), self._removable(model)
        num_blocks = len(plan_of(model).blocks)
        shapes = block_shapes(model, owners[0]) if owners else {}
        most = min(len(removable), len(owners) - 1) if owners else 0
        base_rank = self._base_rank(model)
        ranks = adapter_ranks(shapes, base_rank)
        count = smallest_reaching(
            self,
            model,
            lambda count: self._plan(model, count, ranks),
            most,
            f"virtual blocks of {num_blocks}, rank {base_rank}",
        )
        if count == 0 or self.allocation == "paper":
            return count, ranks
        allowed = (1 - self.sparsity) * count_parameters(model)

        def parameters(rank: int) -> int:
            plan = self._plan(model, count, adapter_ranks(shapes, rank))
            return size_of_plan(model.config, plan).parameters

        more = range(base_rank + 1, largest_rank(shapes) + 1)
        return count, adapter_ranks(shapes, base_rank + bisect_right(more, allowed, key=parameters))

    def _base_rank(self, model: PreTrainedModel) -> int:
        if self.rank != "by_width":
            return int(self.rank)
        width = int(base_config_of(model.config).hidden_size)
        return max(1, min(width // _WIDTH_PER_RANK, _LARGEST_DEFAULT_RANK))

    def _removable(self, model: PreTrainedModel) -> list[int]:
        return borrowable(plan_of(model), lenders(model))

    def _plan(self, model: PreTrainedModel, count: int, ranks: Mapping[str, int]) -> Plan:
        plan, virtual = plan_of(model), self._removable(model)[::-1][:count]
        base = next((p for p in lenders(model) if p not in virtual), 0)
        return plan.borrow(dict.fromkeys(virtual, base), ranks, self.outputs)

    def _report(
        self,
        model: PreTrainedModel,
        smaller: Plan,
        bases: Mapping[int, int],
        ranks: Mapping[str, int],
    ) -> None:
        dense, plan = count_parameters(model), plan_of(model)
        without = plan.keep([p for p in range(len(plan.blocks)) if p not in bases])
        gross, net = (
            1 - size_of_plan(model.config, p).parameters / dense for p in (without, smaller)
        )
        logger.info(
            "flexigpt: %d of %d blocks virtual (%s), adapters of rank %s; gross %.2f%%, net %.2f%% "
            "of the parameters removed; FLOPs and KV cache are not",
            len(bases), len(plan.blocks), _arrows(bases), _span(ranks.values()),
            100 * gross, 100 * net,
        )  # fmt: skip


def _arrows(bases: Mapping[int, int]) -> str:
    return ", ".join(f"{position} on {base}" for position, base in sorted(bases.items()))


def _span(ranks: Iterable[int]) -> str:
    ordered = sorted(set(ranks))
    return " to ".join(str(rank) for rank in (ordered[0], ordered[-1])[: len(ordered)])
