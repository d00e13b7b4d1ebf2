"""SLEB: remove, one at a time, the block whose absence costs the least loss."""

import json
import logging
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import deletion_losses, windows_of
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.method import (
    TOLERANCE,
    Evidence,
    Method,
    check_evidence,
    smallest_reaching,
)
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, plan_of

logger = logging.getLogger(__name__)

_GONE_FILE = "removed.json"


class Sleb(Method):
    """Remove blocks greedily by the loss of the model without them on calibration text.

    SLEB (Song et al. 2024, arXiv 2402.09025, section 3.3 and algorithm 1). While the model is too
    large, of all blocks between the barriers the one goes whose removal from what is left gives the
    least

        - mean over tokens of log p(token | those before it)

    Nothing else changes. L blocks and n removals cost the sum over s < n of (L - barriers - s)
    evaluations, each of which starts at its candidate: what comes before is computed once per
    removal. Ties go to the earlier block.

    Departs from the paper: n follows from the sparsity of the whole model; the calibration is
    counted in tokens (the released code's 128 samples are lines of WikiText-2, 8 to 10 thousand
    tokens).
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    name: Literal["sleb"] = "sleb"
    early_barrier: int = Field(default=1, ge=0)
    """Number of first blocks that stay; 1 in the released code."""
    latter_barrier: int = Field(default=1, ge=0)
    """Number of last blocks that stay; 1 in the released code."""
    loss_tokens: int = Field(default=65_536, ge=1)
    """Calibration tokens on which removals are compared, in whole windows from the first one."""

    def outline(self, model: PreTrainedModel) -> Plan:
        plan = plan_of(model)
        num_blocks = len(plan.blocks)
        # Which blocks go is not known yet: the deepest ones stand in.
        order = plan.order_of_removal(reversed(self._removable(model)))

        def without_deepest(count: int) -> Plan:
            return plan.keep(_without(order[:count], num_blocks))

        most = min(len(order), num_blocks - 1)
        what = f"of {num_blocks} blocks"
        return without_deepest(smallest_reaching(self, model, without_deepest, most, what))

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        num_blocks, removable = len(plan_of(model).blocks), len(self._removable(model))
        compared = min(1.0, self.loss_tokens / num_tokens)
        passes = heads = 0.0
        for gone in range(num_blocks - len(self.outline(model).blocks)):
            candidates = removable - gone
            passes += (1 + candidates / 2) * (num_blocks - gone) / num_blocks
            heads += candidates
        return Arithmetic(passes=compared * passes, heads=compared * heads)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        plan = plan_of(model)
        num_blocks = len(plan.blocks)
        num_removals = num_blocks - len(self.outline(model).blocks)
        removable = self._removable(model)
        total = sum(len(removable) - step for step in range(num_removals))
        windows = windows_of(evidence.calibration, self.loss_tokens)
        gone = _resumed(evidence.work)
        done = sum(len(removable) - step for step in range(len(gone)))

        def tell() -> None:
            nonlocal done
            done += 1
            evidence.progress("sleb", done, max(done, total))

        while not self._is_reached(model, survivors := _without(gone, num_blocks)):
            alive = [p for p in removable if p not in gone and plan.can_go(p, gone)]
            losses = deletion_losses(model, windows, alive, gone=gone, tell=tell)
            least = min(alive, key=lambda position: (losses[position], position))
            logger.info("sleb removes block %d: loss %.4f", least, losses[least])
            gone.append(least)
            _save(gone, evidence.work)
        return Cut(plan.keep(survivors), survivors)

    def _removable(self, model: PreTrainedModel) -> list[int]:
        num_blocks = len(plan_of(model).blocks)
        removable = list(range(self.early_barrier, num_blocks - self.latter_barrier))
        if not removable:
            raise InputError(
                f"sleb needs a block that it may remove, got early_barrier {self.early_barrier} "
                f"and latter_barrier {self.latter_barrier} for {num_blocks} blocks"
            )
        return removable

    def _is_reached(self, model: PreTrainedModel, survivors: tuple[int, ...]) -> bool:
        # Counted after every removal: blocks that share weights or were replaced differ in size.
        left = size_of_plan(model.config, plan_of(model).keep(survivors)).parameters
        return 1 - left / count_parameters(model) >= self.sparsity - TOLERANCE


def _resumed(work: Path | None) -> list[int]:
    """The blocks that a killed run had removed."""
    if work is None or not (work / _GONE_FILE).exists():
        return []
    gone: list[int] = json.loads((work / _GONE_FILE).read_text())
    return gone


def _save(gone: list[int], work: Path | None) -> None:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        written = work / f"{_GONE_FILE}.tmp"
        written.write_text(json.dumps(gone))
        written.replace(work / _GONE_FILE)  # at once: a killed run leaves no half of a file


def _without(gone: list[int], num_blocks: int) -> tuple[int, ...]:
    return tuple(position for position in range(num_blocks) if position not in gone)
