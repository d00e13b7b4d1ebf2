"""UIDL: remove the run of blocks that turns the last token's hidden state least."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.method import (
    TOLERANCE,
    Evidence,
    Method,
    check_evidence,
    scores_of,
    smallest_reaching,
)
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, plan_of


class Uidl(Method):
    """Remove one run of neighbouring blocks, chosen by the angle between what enters and leaves it.

    The Unreasonable Ineffectiveness of the Deeper Layers (Gromov et al. 2024, arXiv 2403.17887,
    sections 3.2 and 4.4). Of all runs of n blocks the one with the least

        d(l, n) = mean over windows of arccos(cos(x^(l), x^(l+n))) / pi    at the last token

    goes (equation 7), or, with run deepest, the n blocks before the protected last ones, for which
    the paper says that healing is a must. n is the smallest number that reaches the sparsity;
    nothing else changes. Ties go to the earlier run.

    Departs from the paper: the last block stays in both variants unless `protect_last` is 0 (the
    paper finds the runs that end with it farthest apart, and its simple variant spares it); its
    output is taken before the final norm; healing is not part of the method (recovery is its own
    stage).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    name: Literal["uidl"] = "uidl"
    run: Literal["least_angle", "deepest"] = "least_angle"
    """least_angle: the run of least angular distance; deepest: the last blocks that may go, without
    a look at the data."""
    ranking: Literal["angle", "sensitivity"] = "angle"
    """What least_angle compares. angle: the paper's distance; sensitivity: the divergence from the
    dense model when the run alone is absent (`statistics.sensitivity`)."""
    protect_first: int = Field(default=0, ge=0)
    """Number of first blocks that stay; the paper protects none."""
    protect_last: int = Field(default=1, ge=0)
    """Number of last blocks that stay; 1 is the paper's simple variant."""

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"removals", "runs"}) if self.ranking == "sensitivity" else frozenset()

    def outline(self, model: PreTrainedModel) -> Plan:
        # Where the run is is not known yet: the deepest one stands in.
        return plan_of(model).keep(self._survivors(model, self._deepest(model)))

    @property
    def goes_in_turn(self) -> bool:
        return True

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        run = self._deepest(model)
        if self.run == "least_angle" and run:
            run = self._least_angle(model, evidence, run)
        survivors = self._survivors(model, run)
        return Cut(plan_of(model).keep(survivors), survivors)

    def _deepest(self, model: PreTrainedModel) -> range:
        plan = plan_of(model)
        num_blocks = len(plan.blocks)
        stop = num_blocks - self.protect_last
        if stop <= self.protect_first:
            raise InputError(
                f"uidl needs a block that it may remove, got protect_first {self.protect_first} "
                f"and protect_last {self.protect_last} for {num_blocks} blocks"
            )
        longest = min(stop - self.protect_first, num_blocks - 1)
        deepest = [
            range(stop, stop),
            *(self._last_run(plan, n, stop) for n in range(1, longest + 1)),
        ]
        runs = [run for run in deepest if run is not None]
        count = smallest_reaching(
            self,
            model,
            lambda count: plan.keep(self._survivors(model, runs[count])),
            len(runs) - 1,
            f"of {num_blocks} blocks",
        )
        return runs[count]

    def _last_run(self, plan: Plan, length: int, stop: int) -> range | None:
        """The deepest run of this length that can go."""
        starts = reversed(range(self.protect_first, stop - length + 1))
        runs = (range(start, start + length) for start in starts)
        return next((run for run in runs if _can_go(plan, run)), None)

    def _least_angle(self, model: PreTrainedModel, evidence: Evidence, deepest: range) -> range:
        length, starts = len(deepest), range(self.protect_first, deepest.start + 1)
        angle: Sequence[float] = evidence.ranking.run_angle(length)
        if self.ranking == "sensitivity":
            angle = scores_of(evidence, self).losses_of_runs(length)
        dense, before = count_parameters(model), plan_of(model)
        for start in sorted(starts, key=lambda start: (angle[start], start)):
            run = range(start, start + len(deepest))
            if not _can_go(before, run):
                continue
            plan = before.keep(self._survivors(model, run))
            # Blocks that share weights or were replaced are of different sizes: a run as long as
            # the deepest one may hold too little.
            if 1 - size_of_plan(model.config, plan).parameters / dense >= self.sparsity - TOLERANCE:
                return run
        raise AssertionError("the deepest run is one of them and reaches the sparsity")

    def _survivors(self, model: PreTrainedModel, run: range) -> tuple[int, ...]:
        return tuple(p for p in range(len(plan_of(model).blocks)) if p not in run)


def _can_go(plan: Plan, run: range) -> bool:
    return all(plan.can_go(position, run) for position in run)
