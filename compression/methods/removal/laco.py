"""LaCo: merge neighbouring blocks into one by adding up what tells them apart."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import Evidence, Method, check_evidence
from foldstack.compression.methods.removal.merging import (
    Merged,
    Trial,
    merged,
    outline_of_merges,
    untouched,
)
from foldstack.compression.statistics.stream import skipping
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import Cut, plan_of
from foldstack.compression.training.distillation import last_hidden_state

logger = logging.getLogger(__name__)

# Tried from above until the sparsity is reached; the last one accepts every merge.
_THRESHOLDS = (*(round(0.95 - 0.05 * step, 2) for step in range(20)), -math.inf)


class Laco(Method):
    """Merge runs of blocks into their first one where the final hidden states change little.

    LaCo (Yang et al. 2024, arXiv 2402.11187, section 2, equation 1 and algorithm 1). The blocks
    l + 1 ... l + m collapse into block l, whose linears become

        theta_l + sum over k = 1 ... m of (theta_{l+k} - theta_l)

    while its norms stay. A pointer l goes from the last blocks to the first; a merge of the
    `blocks_per_merge` blocks from l on is accepted when the mean over a few sentences of the cosine
    between the original model's final hidden states and the candidate's, each flattened over its
    tokens, is above the threshold; then l moves by `interval`, else by 1. The search ends when the
    sparsity is reached, with a last merge of fewer blocks if need be.

    Departs from the paper: the depth is asked for, and threshold and blocks per merge follow (the
    paper tunes them by hand): the highest threshold in steps of 0.05 that gets there, with the most
    blocks per merge that do at this threshold; all differences are taken to the same theta_l (the
    released code updates it in between, so that its sum telescopes to the last block of the run:
    `merge` released does that); the pointer never skips the first block; a sentence is the
    beginning of a calibration window.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    name: Literal["laco"] = "laco"
    merge: Literal["sum_of_differences", "released"] = "sum_of_differences"
    """released: what the authors' notebooks compute, the last block's linears with the first one's
    norms."""
    blocks_per_merge: int = Field(default=4, ge=2)
    """Blocks that become one, C in the paper: 3 for Baichuan2-13B, 7 for Llama-2-13B. The largest
    that is tried when the threshold is highest."""
    interval: int = Field(default=1, ge=1)
    """By how much the pointer moves after a merge, less than `blocks_per_merge`; I in the paper."""
    threshold: Annotated[float, Field(ge=-1, le=1)] | Literal["highest"] = "highest"
    """Cosine above which a merge is accepted; highest: the highest one that reaches the sparsity.
    The paper takes 0.45 to 0.75."""
    num_sentences: int = Field(default=10, ge=1)
    """Calibration windows whose beginnings are compared; 10 in the paper."""
    sentence_tokens: int = Field(default=64, ge=2)
    """Tokens from the beginning of a window."""
    protect_first: int = Field(default=0, ge=0)
    """Number of first blocks that take no part; the paper's lower end of the range."""
    protect_last: int = Field(default=1, ge=0)
    """Number of last blocks that take no part; 1 in the released code."""

    @model_validator(mode="after")
    def _can_merge_everything(self) -> "Laco":
        if self.interval >= self.blocks_per_merge:
            raise ValueError(
                f"interval must be below blocks_per_merge {self.blocks_per_merge}, "
                f"got {self.interval}"
            )
        return self

    def outline(self, model: PreTrainedModel) -> Plan:
        return outline_of_merges(self, model, self.protect_first, self.protect_last)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        num_blocks = len(plan_of(model).blocks)
        target = len(self.outline(model).blocks)
        sentences = evidence.calibration[: self.num_sentences, : self.sentence_tokens]
        judge = _Judge(model, sentences, self.protect_first)
        blocks = untouched(range(num_blocks))
        for threshold, size in self._attempts():
            blocks = self._search(judge, num_blocks, target, threshold, size)
            evidence.progress("laco", num_blocks - len(blocks), num_blocks - target)
            if len(blocks) == target:
                logger.info("laco at threshold %g merges %d at once: %s", threshold, size, blocks)
                return judge.trial.cut_to(blocks)
        raise InputError(
            f"laco with threshold {self.threshold} merges {num_blocks - len(blocks)} blocks away, "
            f"sparsity {self.sparsity} needs {num_blocks - target}; lower the threshold, or leave "
            "it at 'highest'"
        )

    def _attempts(self) -> Iterator[tuple[float, int]]:
        """Thresholds and blocks per merge, in the order in which they are tried."""
        if self.threshold != "highest":
            yield self.threshold, self.blocks_per_merge
            return
        for threshold in _THRESHOLDS:
            for size in range(self.blocks_per_merge, self.interval, -1):
                yield threshold, size

    def _search(
        self, judge: "_Judge", num_blocks: int, target: int, threshold: float, size: int
    ) -> list[Merged]:
        """The blocks that are left once `target` is reached or the pointer has reached its end."""
        blocks = untouched(range(num_blocks))
        first = min(size, num_blocks - target + 1)
        pointer = max(num_blocks - self.protect_last - first, self.protect_first)
        while len(blocks) > target and pointer >= self.protect_first:
            left = len(blocks) - self.protect_last - pointer
            count = min(size, left, len(blocks) - target + 1)
            run = blocks[pointer : pointer + count]
            candidate = [*blocks[:pointer], self._merge(run), *blocks[pointer + count :]]
            step = 1
            if judge.similarity(candidate) > threshold:
                blocks, step = candidate, self.interval
            at_end = pointer == self.protect_first
            pointer = self.protect_first - 1 if at_end else max(pointer - step, self.protect_first)
        return blocks

    def _merge(self, run: Sequence[Merged]) -> Merged:
        if self.merge == "released":
            return Merged(run[0].first, run[-1].parts)
        # theta_l + sum of (theta_{l+k} - theta_l), with the terms of theta_l added up.
        return merged(run, [2.0 - len(run)] + [1.0] * (len(run) - 1))


class _Judge:
    """Compares the final hidden states of merged models with the original's; asks nothing twice."""

    def __init__(
        self, model: PreTrainedModel, sentences: Int[Tensor, "sentences tokens"], mergeable: int
    ) -> None:
        """`mergeable`: position of a block whose linears tell the names of all blocks' linears."""
        family = architecture_of(model)
        linears = tuple(f"{site.name}." for site in family.linears)
        block = family.blocks(model)[mergeable]
        names = [name for name, _ in block.named_parameters() if name.startswith(linears)]
        self.trial = Trial(model, names)
        self._sentences = sentences.to(model.device, torch.long)
        self._original = self._final_states([])
        self._known: dict[tuple[Merged, ...], float] = {}

    def similarity(self, blocks: Sequence[Merged]) -> float:
        """Mean cosine over the sentences; -1 for states that are not finite."""
        key = tuple(blocks)
        if key not in self._known:
            states = self._final_states(self.trial.show(blocks))
            cosine = torch.cosine_similarity(states, self._original, dim=-1).mean()
            self._known[key] = float(cosine.nan_to_num(-1).clamp(-1, 1))
        return self._known[key]

    def _final_states(self, gone: Sequence[int]) -> Float[Tensor, "sentences features"]:
        with torch.no_grad(), skipping(self.trial.model, gone):
            return last_hidden_state(self.trial.model, self._sentences).double().flatten(1)
