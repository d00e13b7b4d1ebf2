"""MKA: merge neighbouring blocks whose outputs lie on the most similar manifolds."""

import logging
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float64, Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.evaluation.candidate_loss import (
    WINDOWS_AT_ONCE,
    mean_loss,
    windows_of,
)
from foldstack.compression.methods.method import Evidence, Method, check_evidence
from foldstack.compression.methods.removal.manifold import similarity_of_layers
from foldstack.compression.methods.removal.merging import (
    Merged,
    Trial,
    merged,
    outline_of_merges,
    untouched,
)
from foldstack.compression.statistics.stream import BlockStream, skipping
from foldstack.compression.structure.architectures import architecture_of
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.surgery import Cut, plan_of
from foldstack.compression.training.block_training import next_token_loss

logger = logging.getLogger(__name__)

_LINE = (0.0, 0.25, 0.5, 0.75, 1.0)


class Mka(Method):
    """Merge the neighbours of highest similarity pairwise until the model is small enough.

    MKA, Pruning via Merging (Liu et al. 2024, arXiv 2406.16330). Each block's outputs, one point
    per calibration window (the mean over its tokens), become a diffusion map; the similarity of two
    blocks is the mutual information of their maps over their entropies

        S_lm = I(l; m) / sqrt(H_l H_m)

    Of all neighbours l, m = l + 1 the most similar ones become one block in the place of l

        theta = lambda theta_l + (1 - lambda) theta_m

    norms and biases included, and S is computed anew from the merged model.

    Departs from the paper and from its released code, which merges nothing (its merged weights go
    into a temporary; it deletes the last blocks): kernel and entropies are those of
    `manifold`; the pair is chosen by S as announced, not always the last one; a
    block is described by its output, which says what m does to l's, not by its input; lambda comes
    from a search on five points by calibration loss, deletions of l and of m included (`weight`
    similarity is the published lambda = S_lm, released the nearly constant one of the code); the
    first and last block stay; calibration is plain text, not the questions of the benchmark that is
    reported.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    name: Literal["mka"] = "mka"
    weight: (
        Literal["line_search", "similarity", "released"] | Annotated[float, Field(ge=0, le=1)]
    ) = "line_search"
    """lambda, the earlier block's share: a number, the best of 0, 0.25, 0.5, 0.75 and 1 by
    calibration loss, S_lm, or released: sigmoid(a_l / (a_l + a_m)) with a the mean of S over all
    blocks, 0.62 for blocks alike."""
    dimensions: int = Field(default=2, ge=1)
    """Of the diffusion maps."""
    neighbours: int = Field(default=5, ge=1)
    """Of a point in the estimate of information; more than twice as many windows are needed."""
    map_windows: int = Field(default=128, ge=3)
    """Calibration windows that are the points of the maps, from the first one."""
    loss_tokens: int = Field(default=65_536, ge=1)
    """Calibration tokens of the search for lambda, in whole windows from the first one."""
    protect_first: int = Field(default=1, ge=0)
    """Number of first blocks that are merged with nothing."""
    protect_last: int = Field(default=1, ge=0)
    """Number of last blocks that are merged with nothing."""

    def outline(self, model: PreTrainedModel) -> Plan:
        return outline_of_merges(self, model, self.protect_first, self.protect_last)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        num_blocks = len(plan_of(model).blocks)
        num_merges = num_blocks - len(self.outline(model).blocks)
        blocks = untouched(range(num_blocks))
        if num_merges == 0:
            return Cut(plan_of(model), tuple(range(num_blocks)))
        windows = evidence.calibration[: self.map_windows]
        some = architecture_of(model).blocks(model)[self.protect_first]
        trial = Trial(model, [name for name, _ in some.named_parameters()])
        for done in range(num_merges):
            outputs = block_outputs(trial, blocks, windows)
            similarity = similarity_of_layers(outputs, self.dimensions, self.neighbours)
            of_pairs = similarity.diagonal(1).tolist()
            pairs = range(self.protect_first, len(blocks) - self.protect_last - 1)
            at = max(pairs, key=lambda pair: (of_pairs[pair], -pair))
            blocks = self._merge(trial, blocks, at, similarity, evidence.calibration)
            evidence.progress("mka", done + 1, num_merges)
        logger.info("mka merged %s", [block for block in blocks if not block.is_untouched])
        return trial.cut_to(blocks)

    def _merge(
        self,
        trial: Trial,
        blocks: Sequence[Merged],
        at: int,
        similarity: Float64[Tensor, "blocks blocks"],
        calibration: Int[Tensor, "windows tokens"],
    ) -> list[Merged]:
        """The blocks with those at `at` and `at` + 1 merged."""

        def with_share(share: float) -> list[Merged]:
            pair = merged(blocks[at : at + 2], [share, 1 - share])
            return [*blocks[:at], pair, *blocks[at + 2 :]]

        if self.weight == "line_search":
            windows = windows_of(calibration, self.loss_tokens)
            losses = losses_of(trial, [with_share(share) for share in _LINE], at, windows)
            return with_share(min(zip(losses, _LINE, strict=True))[1])
        if self.weight == "similarity":
            return with_share(float(similarity[at, at + 1]))
        if self.weight == "released":
            return with_share(released_share(similarity, at))
        return with_share(self.weight)


def released_share(similarity: Float64[Tensor, "blocks blocks"], at: int) -> float:
    """The earlier block's share in the authors' code."""
    mean = similarity.mean(1)
    return float(torch.sigmoid(mean[at] / (mean[at] + mean[at + 1])))


def block_outputs(
    trial: Trial, blocks: Sequence[Merged], windows: Int[Tensor, "windows tokens"]
) -> Float64[Tensor, "blocks windows hidden"]:
    """Every block's output, before the final norm, as the mean over a window's tokens.

    The first token is left out where there are others: it is often an attention sink with a hidden
    state of its own size, which would be all that the mean shows.
    """
    first = 1 if windows.shape[1] > 1 else 0
    outputs = []
    with skipping(trial.model, trial.show(blocks)):
        stream = BlockStream(trial.model, windows, batch_size=WINDOWS_AT_ONCE)
        of_blocks = {block.first for block in blocks}
        while stream.position < len(stream.blocks):
            is_left = stream.position in of_blocks
            stream.advance()
            if is_left:
                outputs.append(torch.cat([h[:, first:].double().mean(1) for h in stream.hidden]))
    return torch.stack(outputs)


def losses_of(
    trial: Trial,
    candidates: Sequence[Sequence[Merged]],
    at: int,
    windows: Int[Tensor, "windows tokens"],
) -> list[float]:
    """Next-token loss of candidates that are the same up to block `at` and in which blocks stay."""
    position = candidates[0][at].first
    losses = []
    with skipping(trial.model, trial.show(candidates[0])):
        stream = BlockStream(trial.model, windows, batch_size=WINDOWS_AT_ONCE)
        while stream.position < position:
            stream.advance()
        entering = torch.cat(stream.hidden)
        with next_token_loss(trial.model, position, windows, entering) as loss_of:
            for candidate in candidates:
                trial.show(candidate)
                losses.append(mean_loss(loss_of, trial.model, windows))
    return losses
