"""ShortGPT: remove the blocks that change the hidden states least."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import (
    Evidence,
    Method,
    check_evidence,
    scores_of,
    smallest_reaching,
)
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import Cut, plan_of


class ShortGpt(Method):
    """Remove the blocks with the least block influence, all at once, wherever they are.

    ShortGPT (Men et al. 2024, arXiv 2403.03853, equation 1 and section 3.2). With x^(l) the input
    of block l, its influence is

        BI_l = 1 - mean over tokens of cos(x^(l), x^(l+1))

    The n blocks of lowest BI are deleted, n the smallest number that reaches the sparsity; nothing
    else changes. Ties go to the earlier block.

    Departs from the paper: the last block's output is taken before the final norm (the released
    code scores it through the norm, which makes it look important); n follows from the sparsity of
    the whole model; the statistics leave the first token of a window out unless they were gathered
    with it.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    name: Literal["shortgpt"] = "shortgpt"
    ranking: Literal["block_influence", "sensitivity"] = "block_influence"
    """block_influence: the paper's score; sensitivity: the divergence from the dense model when the
    block alone is absent (`statistics.sensitivity`)."""
    protect_first: int = Field(default=0, ge=0)
    """Number of first blocks that stay whatever their score; the paper protects none."""
    protect_last: int = Field(default=0, ge=0)
    """Number of last blocks that stay whatever their score; the paper protects none."""

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"removals"}) if self.ranking == "sensitivity" else frozenset()

    def outline(self, model: PreTrainedModel) -> Plan:
        # Which blocks go is not known yet: the deepest ones stand in.
        return plan_of(model).keep(self._survivors(model, self._removable(model)[::-1]))

    @property
    def goes_in_turn(self) -> bool:
        return True

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        removable = set(self._removable(model))
        ranked = evidence.ranking.order()
        if self.ranking == "sensitivity":
            ranked = scores_of(evidence, self).order_of_removal()
        order = [block for block in ranked if block in removable]
        survivors = self._survivors(model, order)
        return Cut(plan_of(model).keep(survivors), survivors)

    def _removable(self, model: PreTrainedModel) -> list[int]:
        num_blocks = len(plan_of(model).blocks)
        removable = list(range(self.protect_first, num_blocks - self.protect_last))
        if not removable:
            raise InputError(
                f"shortgpt needs a block that it may remove, got protect_first "
                f"{self.protect_first} and protect_last {self.protect_last} for {num_blocks} blocks"
            )
        return removable

    def _survivors(self, model: PreTrainedModel, order: Sequence[int]) -> tuple[int, ...]:
        plan = plan_of(model)
        num_blocks, order = len(plan.blocks), plan.order_of_removal(order)

        def without_first(count: int) -> list[int]:
            return sorted(set(range(num_blocks)) - set(order[:count]))

        most = min(len(order), num_blocks - 1)
        what = f"of {num_blocks} blocks"
        count = smallest_reaching(
            self, model, lambda count: plan.keep(without_first(count)), most, what
        )
        return tuple(without_first(count))
