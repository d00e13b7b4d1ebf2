"""FoldGPT-style removal and sharing: blocks whose gates close go, neighbours of the rest share."""

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import mean_loss
from foldstack.compression.methods.method import (
    TOLERANCE,
    Evidence,
    check_evidence,
    scores_of,
    smallest_reaching,
    unreachable,
)
from foldstack.compression.methods.sharing.gate_training import train_gates
from foldstack.compression.methods.sharing.gates import Gates, GateTraining, mean_jaccard
from foldstack.compression.methods.sharing.group_sharing import GroupSharing
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.statistics.stream import skipping
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, build_on_meta, config_for, cut, plan_of

logger = logging.getLogger(__name__)


class FoldGpt(GroupSharing):
    """Remove the blocks whose trained gates close, then let groups of the others share weights.

    FoldGPT (Liu et al. 2024, arXiv 2407.00928), reconstructed: its formulas are not public, so this
    is FoldGPT-style and its numbers are not FoldGPT's. First, a gate per block is trained together
    with all others until as many are closed as blocks must go (see `gates`); those go, whole. Then
    groups of neighbours among what is left use one set of linear weights (see `GroupSharing`), the
    kept gates weighing one of the candidate means. Removal saves parameters, computation and KV
    cache, sharing saves parameters alone.

    n is the smallest number of blocks that holds `removal_portion` of what must go, and larger
    where sharing among the others cannot reach the rest; the smallest number of groups follows.

    Departs from the paper: training of weights comes after (recovery is its own stage, its
    `tail_distillation` is the paper's); every block counts the same in the gates' budget; gates are
    sampled and not only relaxed (`gate_training`); the set that goes is the best of several
    trainings' and block influence's (`selection`).
    """

    name: Literal["foldgpt"] = "foldgpt"
    removal_portion: float = Field(default=0.5, ge=0, le=1)
    """Fraction of what is removed that goes as whole blocks, at least; sharing takes the rest. 1:
    only removal; 0: only sharing."""
    ranking: Literal["gates", "sensitivity"] = "gates"
    """Which blocks go. gates: those whose trained gates close, as in the paper; sensitivity: those
    whose absence alone costs the least divergence from the dense model (`statistics.sensitivity`);
    no gates are trained then."""
    gate_runs: int = Field(default=2, ge=1)
    """Trainings of the gates with seeds of their own, every second one of the other form than
    `gates` has."""
    selection: Literal["lowest_loss", "mean_gate"] = "lowest_loss"
    """Which blocks go. lowest_loss: of the sets that the runs close, and the set of least block
    influence, the one without which the loss on the calibration windows is lowest; mean_gate: those
    whose mean gate over the runs is lowest."""
    gates: GateTraining = GateTraining()
    """How the gates train."""

    def training(self, run: int) -> GateTraining:
        """How the gates train in run `run`, counted from 0."""
        if run % 2 == 0:
            return self.gates
        other = "relaxed" if self.gates.form == "sampled" else "sampled"
        return self.gates.model_copy(update={"form": other})

    def train(self, model: PreTrainedModel, evidence: Evidence, num_kept: int, run: int) -> Gates:
        """The gates of run `run`; one that `evidence.work` has the end of is not trained again."""
        return train_gates(
            model,
            evidence.calibration,
            num_kept,
            self.training(run),
            seed=self.seed * self.gate_runs + run,
            work=None if evidence.work is None else evidence.work / f"gates-{run}",
            progress=evidence.progress,
        )

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"removals"}) if self.ranking == "sensitivity" else frozenset()

    @model_validator(mode="after")
    def _shares_what_is_left(self) -> "FoldGpt":
        if self.groups == "sensitivity":
            raise ValueError(
                "foldgpt shares what its removal leaves, of which there are no scores yet; use "
                "groups similar, or block_sharing, which removes nothing"
            )
        return self

    def outline(self, model: PreTrainedModel) -> Plan:
        # Which blocks go is not known yet: the deepest ones stand in.
        deepest = _deepest(model)
        kept = _without(model, deepest[: self._num_removed(model, deepest)])
        pruned = build_on_meta(config_for(model.config, kept))
        sharing = self._sharing(model, pruned)
        return kept if sharing is None else sharing.sharing_outline(pruned).after(kept)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        count = self._num_removed(model, _deepest(model))
        gates = self._gates(model, evidence, count)
        order = _lowest(model, gates)
        if count:  # counted again: blocks of a model that was cut before differ in size
            count = self._num_removed(model, order)
        survivors = tuple(sorted(order[count:]))
        pruning = Cut(_without(model, order[:count]), survivors)
        sharing = self._sharing(model, self._pruned(model, order[:count]))
        if sharing is None:
            change = pruning
        else:
            shared = sharing._share_after(model, pruning, evidence, gates)
            change = Cut(shared.plan, survivors, shared.tensors)
        self._tell(model, evidence, order[:count], change)
        return change

    def _share_after(
        self, model: PreTrainedModel, pruning: Cut, evidence: Evidence, gates: Sequence[float]
    ) -> Cut:
        """Share among the blocks that `pruning` leaves; their statistics are gathered anew."""
        survivors = [position for position in pruning.inherits if position is not None]
        importance = [gates[position] for position in survivors]
        if len(survivors) == len(gates):
            return self.share_groups(model, evidence, importance)
        pruned = cut(model, pruning)
        shared = self.share_groups(pruned, evidence.of(pruned, self.needs), importance)
        return replace(shared, plan=shared.plan.after(pruning.plan))

    def _gates(self, model: PreTrainedModel, evidence: Evidence, count: int) -> list[float]:
        """The gate of every block, a mean over the runs; block influence where no block goes, and
        measured losses if they rank."""
        if count == 0:
            return list(evidence.ranking.scores["block_influence"])
        if self.ranking == "sensitivity":
            return list(scores_of(evidence, self).losses_of_runs(1))
        num_blocks = len(plan_of(model).blocks)
        runs = [
            self.train(model, evidence, num_blocks - count, run) for run in range(self.gate_runs)
        ]
        if self.gate_runs > 1:
            agreement = mean_jaccard([frozenset(run.order()[:count]) for run in runs])
            logger.info("mean Jaccard index of the runs' removed blocks: %.2f", agreement)
        if self.selection == "lowest_loss":
            scores = [run.values for run in runs]
            return self._best(model, evidence, count, scores)
        means = [sum(values) / len(runs) for values in zip(*(r.values for r in runs), strict=True)]
        logger.info("gates: %s", " ".join(f"{value:.3f}" for value in means))
        return means

    def _best(
        self, model: PreTrainedModel, evidence: Evidence, count: int, gates: list[tuple[float, ...]]
    ) -> list[float]:
        """The scores whose `count` lowest blocks are missed least; ties go to the first gates."""
        losses: dict[frozenset[int], float] = {}
        chosen: dict[frozenset[int], list[float]] = {}
        for scores in (*gates, evidence.ranking.scores["block_influence"]):
            gone = frozenset(_lowest(model, scores)[:count])
            if gone not in losses:
                losses[gone], chosen[gone] = loss_without(model, evidence, gone), list(scores)
        best = min(losses, key=losses.__getitem__)
        told = ", ".join(f"{sorted(gone)}: {loss:.4f}" for gone, loss in losses.items())
        logger.info("calibration loss without blocks %s; those of %s go", told, sorted(best))
        return chosen[best]

    def _tell(
        self, model: PreTrainedModel, evidence: Evidence, gone: Sequence[int], change: Cut
    ) -> None:
        """Both cuts apart, in what is stored and in depth, and what block influence says."""
        dense = count_parameters(model)
        removed = 1 - count_parameters(self._pruned(model, gone)) / dense
        stored = 1 - size_of_plan(model.config, change.plan).parameters / dense
        by_influence = set(evidence.ranking.order()[: len(gone)])
        logger.info(
            "foldgpt removes blocks %s (%.1f%% of the parameters, %d of %d blocks; %d of them are "
            "among the %d of least block influence) and shares away %.1f%%",
            sorted(gone), 100 * removed, len(gone), len(plan_of(model).blocks),
            len(by_influence & set(gone)), len(gone), 100 * (stored - removed),
        )  # fmt: skip

    def _num_removed(self, model: PreTrainedModel, order: Sequence[int]) -> int:
        """How many of `order` go, so that sharing among the others reaches the sparsity."""
        self.stretches(model)  # refuses settings that make no groups
        if self.removal_portion == 0:
            return 0
        plan, most = plan_of(model), len(order) - 1

        def without(count: int) -> Plan:
            return plan.keep(order[count:])

        what = f"{most} of {len(order)} blocks"
        farthest = 1 - size_of_plan(model.config, without(most)).parameters / count_parameters(
            model
        )
        if farthest < self.sparsity - TOLERANCE:
            raise InputError(unreachable(self, farthest, what))
        part = self.model_copy(update={"sparsity": self.sparsity * self.removal_portion})
        least = smallest_reaching(part, model, without, most, what)
        return next(n for n in range(least, len(order)) if self._reaches(model, order[:n]))

    def _reaches(self, model: PreTrainedModel, gone: Sequence[int]) -> bool:
        pruned = self._pruned(model, gone)
        sharing = self._sharing(model, pruned)
        if sharing is None:
            return True
        if self.removal_portion == 1:
            return False
        try:
            sharing.sharing_outline(pruned)
        except InputError:
            return False
        return True

    def _sharing(self, model: PreTrainedModel, pruned: PreTrainedModel) -> "FoldGpt | None":
        """This method for what is left to remove of `pruned`; None if nothing is."""
        left = count_parameters(pruned)
        rest = 1 - count_parameters(model) * (1 - self.sparsity) / left
        return self.model_copy(update={"sparsity": rest}) if rest > TOLERANCE else None

    def _pruned(self, model: PreTrainedModel, gone: Sequence[int]) -> PreTrainedModel:
        """The model without these blocks, on the meta device."""
        return build_on_meta(config_for(model.config, _without(model, gone)))


def _without(model: PreTrainedModel, gone: Collection[int]) -> Plan:
    plan = plan_of(model)
    return plan.keep(p for p in range(len(plan.blocks)) if p not in gone)


def _deepest(model: PreTrainedModel) -> list[int]:
    """The blocks from the last one up."""
    plan = plan_of(model)
    return plan.order_of_removal(reversed(range(len(plan.blocks))))


def _lowest(model: PreTrainedModel, scores: Sequence[float]) -> list[int]:
    """The blocks from that of lowest score up; ties go to the earlier block."""
    order = sorted(range(len(scores)), key=lambda block: (scores[block], block))
    return plan_of(model).order_of_removal(order)


def loss_without(model: PreTrainedModel, evidence: Evidence, gone: Iterable[int]) -> float:
    """Next-token loss on the calibration windows, in nats, of the model without these blocks."""

    def loss_of(batch: Int[Tensor, " batch"]) -> Tensor:
        tokens = evidence.calibration[batch].to(model.device, torch.long)
        loss: Tensor = model(tokens, labels=tokens, use_cache=False).loss
        return loss

    with skipping(model, gone):
        return mean_loss(loss_of, model, evidence.calibration)
