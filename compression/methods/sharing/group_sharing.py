"""Grouped sharing: neighbouring blocks use one set of linear weights, each with norms of its own.

The grouped parameter sharing of FoldGPT (Liu et al. 2024, arXiv 2407.00928), reconstructed: the
paper's formulas are not public. What `block_sharing` and `foldgpt` have in common.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import mean_loss
from foldstack.compression.methods.method import (
    TOLERANCE,
    Evidence,
    Method,
    scores_of,
    smallest_reaching,
    unreachable,
)
from foldstack.compression.statistics.ranking import Ranking
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.statistics.stream import BlockStream
from foldstack.compression.structure.architectures import (
    Architecture,
    architecture_of,
    base_config_of,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, plan_of
from foldstack.compression.training.block_training import next_token_loss

logger = logging.getLogger(__name__)

Window = range
"""Positions of the blocks of one group."""
Weights = dict[str, Tensor]
"""Weights and biases of a block's linears, by their name inside the block."""


class GroupSharing(Method):
    """A method that lets groups of neighbouring blocks use one set of linear weights.

    Between the first `keep_head` and the last `keep_tail` blocks, as many disjoint windows of g
    blocks as the sparsity needs are chosen to maximise their total score

        (mean of cos(x^(i), x^(i+1)) over blocks i + mean of cos(x^(i+1), x^(j+1)) over pairs i < j)
        / 2

    by a dynamic programme. Then, front to back, each group takes the weights with the lowest
    cross-entropy on `leader_windows` calibration windows: those of any member, their mean, or their
    mean weighted by the blocks' importance. Biases follow their weights.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    group_size: int | Literal["smallest"] = Field(default="smallest")
    """Blocks per group, at least 2; smallest: the smallest size that reaches the sparsity."""
    keep_head: int = Field(default=2, ge=0)
    """Number of first blocks that share with nobody."""
    keep_tail: int = Field(default=1, ge=0)
    """Number of last blocks that share with nobody."""
    groups: Literal["similar", "front", "sensitivity"] = "similar"
    """similar: the windows of highest score; front: from the first block that may share on,
    whatever the data say; sensitivity: the windows whose neighbours, two and two, cost the least
    divergence from the dense model on the linears of one of them (`statistics.sensitivity`)."""
    leader: Literal["loss", "first", "mean"] = "loss"
    """Whose weights a group takes. loss: the best of all candidates; first: its first member's;
    mean: the mean of its members'."""
    leader_windows: int = Field(default=32, ge=1)
    """Calibration windows on which the candidates for a group's weights are compared."""
    scale_outputs: bool = False
    """Give every block of a group two vectors of its own, 1 at first, by which attention's and the
    MLP's outputs are multiplied; recovery trains them."""

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"sharing"}) if self.groups == "sensitivity" else frozenset()

    def sharing_outline(self, model: PreTrainedModel) -> Plan:
        """The structure after sharing, as far as it is known before any data."""
        size, count = self._size_and_count(model)
        # Which windows is not known yet: the first ones stand in.
        windows = _first_windows(self.stretches(model), size)[:count]
        return self._shared(plan_of(model), windows)

    def share_groups(
        self, model: PreTrainedModel, evidence: Evidence, importance: Sequence[float]
    ) -> Cut:
        """Choose the groups and their weights; `importance` of every block weighs one mean."""
        size, count = self._size_and_count(model)
        stretches = self.stretches(model)
        groups = _first_windows(stretches, size)[:count]
        if self.groups != "front":
            score = self._score_of(evidence)
            groups = best_windows(stretches, size, count, len(plan_of(model).blocks), score)
        tensors = self._leaders(model, groups, evidence, importance)
        plan = self._shared(plan_of(model), groups)
        if self.scale_outputs:
            hidden_size = base_config_of(model.config).hidden_size
            tensors |= _unit_scales(plan_of(model), groups, hidden_size)
        return Cut(plan, tuple(range(len(plan.blocks))), tensors)

    def _score_of(self, evidence: Evidence) -> Callable[[Window], float]:
        """How well a window may share."""
        if self.groups == "similar":
            return lambda window: window_score(window, evidence.ranking)
        losses = scores_of(evidence, self).losses_of_sharing()

        def score(window: Window) -> float:
            if unknown := [first for first in window[:-1] if first not in losses]:
                raise InputError(
                    f"blocks {unknown[0]} and {unknown[0] + 1} were not scored on one another's "
                    "linears: some block of this model has no dense ones of its own; use groups "
                    "similar"
                )
            return -math.fsum(losses[first] for first in window[:-1])

        return score

    def _shared(self, plan: Plan, groups: Sequence[Window]) -> Plan:
        for group in groups:
            plan = plan.share(group[0], group[1:], "scaled" if self.scale_outputs else "plain")
        return plan

    def _size_and_count(self, model: PreTrainedModel) -> tuple[int, int]:
        """Blocks per group and number of groups."""
        stretches = self.stretches(model)
        longest = max((len(stretch) for stretch in stretches), default=0)
        fixed = self.group_size != "smallest"
        sizes = [int(self.group_size)] if fixed else list(range(2, longest + 1))
        dense, plan = count_parameters(model), plan_of(model)
        farthest = 0.0
        for size in sizes:
            windows = _first_windows(stretches, size)
            if not windows:
                continue
            after = size_of_plan(model.config, self._shared(plan, windows)).parameters
            farthest = max(farthest, 1 - after / dense)
            if farthest >= self.sparsity - TOLERANCE:
                return size, self._count(model, windows)
        of = f"groups of {self.group_size}" if fixed else "groups of any size"
        free = sum(map(len, stretches))
        if longest < 2:
            of = "no two neighbours of one form"
        raise InputError(
            unreachable(self, farthest, f"{of} among {free} of {len(plan.blocks)} blocks")
        )

    def _count(self, model: PreTrainedModel, windows: Sequence[Window]) -> int:
        plan = plan_of(model)
        return smallest_reaching(
            self, model, lambda count: self._shared(plan, windows[:count]), len(windows), "groups"
        )

    def stretches(self, model: PreTrainedModel) -> list[Window]:
        """The stretches of neighbouring blocks that may share: alike, and not sharing already."""
        if self.group_size != "smallest" and self.group_size < 2:
            raise InputError(f"a group shares from 2 blocks on, got group_size {self.group_size}")
        plan = plan_of(model)
        num_blocks = len(plan.blocks)
        owners = {block.weights_of for block in plan.blocks}
        owners |= {lender for lender, _ in plan.lenders}  # of attention heads
        stretches: list[Window] = []
        for position in range(self.keep_head, num_blocks - self.keep_tail):
            block = plan.blocks[position]
            if not block.has_attention or block.weights_of is not None or position in owners:
                continue
            if block.narrow_heads is not None:  # their kept frequencies belong to own linears
                continue
            follows = bool(stretches) and stretches[-1].stop == position
            if follows and plan.blocks[position - 1].forms == block.forms:
                stretches[-1] = range(stretches[-1].start, position + 1)
            else:
                stretches.append(range(position, position + 1))
        return stretches

    def _leaders(
        self,
        model: PreTrainedModel,
        groups: Sequence[Window],
        evidence: Evidence,
        importance: Sequence[float],
    ) -> dict[str, Tensor]:
        """The chosen weights of every group, as a cut names them, at the group's first position."""
        architecture = architecture_of(model)
        trial = copy.deepcopy(model)
        blocks = architecture.blocks(trial)
        # Groups are decided front to back: what enters one is computed once for all its candidates.
        windows = evidence.calibration[: self.leader_windows]
        stream = BlockStream(trial, windows)
        tensors: dict[str, Tensor] = {}
        for index, group in enumerate(groups):
            while stream.position < group.start:
                stream.advance()
            members = {member: _weights(blocks[member], architecture) for member in group}
            candidates = dict(self._candidates(members, importance))
            best = next(iter(candidates))
            if len(candidates) > 1:
                entering = torch.cat(stream.hidden)
                losses = _losses(trial, group, candidates, windows, entering)
                best = min(losses, key=losses.__getitem__)
                logger.info("losses of blocks %d-%d: %s", group[0], group[-1], losses)
            logger.info("blocks %d-%d share the weights of %s", group[0], group[-1], best)
            for member in group:
                _set_weights(blocks[member], candidates[best])
            for name, tensor in candidates[best].items():
                tensors[f"blocks.{group[0]}.{name}"] = tensor
            evidence.progress("share blocks", index + 1, len(groups))
        return tensors

    def _candidates(
        self, members: dict[int, Weights], importance: Sequence[float]
    ) -> Iterator[tuple[str, Weights]]:
        """What a group may take: weights of members, their mean, their mean by importance."""
        weights = list(members.values())
        if self.leader == "mean":
            yield "all, averaged", _mean(weights, [1.0] * len(members))
            return
        own = [(f"block {member}", of_member) for member, of_member in members.items()]
        if self.leader == "first":
            yield own[0]
            return
        yield from own
        yield "all, averaged", _mean(weights, [1.0] * len(members))
        shares = [max(0.0, importance[member]) for member in members]
        if sum(shares) > 0:
            yield "all, by importance", _mean(weights, shares)


def _losses(
    trial: PreTrainedModel,
    group: Window,
    candidates: Mapping[str, Weights],
    windows: Tensor,
    entering: Tensor,
) -> dict[str, float]:
    """The next-token loss with each of the candidates in all blocks of the group."""
    blocks = architecture_of(trial).blocks(trial)
    losses = {}
    with next_token_loss(trial, group.start, windows, entering) as loss_of:
        for what, weights in candidates.items():
            for member in group:
                _set_weights(blocks[member], weights)
            losses[what] = mean_loss(loss_of, trial, windows)
    return losses


def _unit_scales(plan: Plan, groups: Sequence[Window], hidden_size: int) -> dict[str, Tensor]:
    """The vectors of the blocks that had none, as a cut names them."""
    return {
        f"blocks.{position}.{sublayer}_output.weight": torch.ones(hidden_size)
        for group in groups
        for position in group
        for sublayer in ("attention", "mlp")
        if plan.blocks[position].outputs == "plain"
    }


def _first_windows(stretches: Sequence[Window], size: int) -> list[Window]:
    """As many disjoint windows as fit, from the front."""
    return [
        stretch[start : start + size]
        for stretch in stretches
        for start in range(0, len(stretch) - size + 1, size)
    ]


def window_score(window: Window, ranking: Ranking) -> float:
    """How alike the blocks of a window are; see `BlockSharing`."""
    cosine = ranking.similarity
    own = [cosine[i][i + 1] for i in window]
    pairs = [cosine[i + 1][j + 1] for i in window for j in window if i < j]
    return (sum(own) / len(own) + sum(pairs) / len(pairs)) / 2


def best_windows(
    stretches: Sequence[Window],
    size: int,
    count: int,
    num_blocks: int,
    score_of: Callable[[Window], float],
) -> list[Window]:
    """`count` disjoint windows of `size` neighbouring blocks with the largest total score.

    Dynamic programme over the blocks: the best choice of c windows among the first blocks either
    ends with the window before this block or leaves this block out. O(blocks * count).
    """
    ends = {
        stretch[start + size - 1] + 1: stretch[start : start + size]
        for stretch in stretches
        for start in range(len(stretch) - size + 1)
    }
    # best[end][c]: score and windows of the best choice of c windows among blocks 0 ... end - 1.
    nothing: tuple[float, list[Window]] = (-math.inf, [])
    best: list[list[tuple[float, list[Window]]]] = [[(0.0, []), *[nothing] * count]]
    for end in range(1, num_blocks + 1):
        row = list(best[end - 1])
        if (window := ends.get(end)) is not None:
            score = score_of(window)
            for c in range(1, count + 1):
                before, chosen = best[end - size][c - 1]
                if before + score > row[c][0]:
                    row[c] = (before + score, [*chosen, window])
        best.append(row)
    score, windows = best[num_blocks][count]
    assert score > -math.inf, "the count was checked against the windows that fit"
    return windows


def _weights(block: nn.Module, architecture: Architecture) -> Weights:
    return {
        f"{site.name}.{name}": tensor.clone()
        for site in architecture.linears
        for name, tensor in block.get_submodule(site.name).state_dict().items()
    }


def _set_weights(block: nn.Module, weights: Weights) -> None:
    parameters = dict(block.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            parameters[name].copy_(tensor)


def _mean(weights: Sequence[Weights], importance: Sequence[float]) -> Weights:
    shares = torch.tensor(importance, dtype=torch.float64) / sum(importance)
    means = {}
    for name, tensor in weights[0].items():
        stacked = torch.stack([part[name].double() for part in weights])
        means[name] = torch.einsum("m,m...->...", shares.to(stacked.device), stacked).to(
            tensor.dtype
        )
    return means
