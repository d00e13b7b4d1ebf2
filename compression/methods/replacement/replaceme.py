"""ReplaceMe: runs of blocks become one linear map each, folded into the MLP before them."""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.candidate_loss import deletion_losses, windows_of
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.methods.in_order import Streams, compressed_in_order
from foldstack.compression.methods.method import (
    TOLERANCE,
    Evidence,
    Method,
    check_evidence,
    scores_of,
    smallest_reaching,
)
from foldstack.compression.methods.refit import Fit, Sides, adds_plainly, refitted_mlp
from foldstack.compression.statistics.sensitivity import Family
from foldstack.compression.structure.architectures import architecture_of, base_config_of
from foldstack.compression.structure.head_slices import HeadSlices
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, linear_shapes, size_of_plan
from foldstack.compression.structure.surgery import Cut, plan_of


class ReplaceMe(Method):
    """Replace a run of blocks by a linear map of what the MLP before it writes, which its last
    linear takes in.

    ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819, sections 2.1 to 2.3). With y the output of
    the MLP of block l - 1, r the residual stream that it is added to, and x^(l+n) what leaves the
    run of n blocks that begins at l,

        T = argmin sum over tokens of |r + T y - x^(l+n)|^2,   W_down' = T W_down

    by ridge regression around T = 1, which is the plain removal of the run. Nothing is added to the
    model: the result is a stock one with fewer blocks. The run is that with the largest mean cosine
    of what enters and leaves it.

    Departs from the paper: by default all of W_down is fitted (`fitted` projection), of which the
    map is a special case; errors count over the size of the token's stream (`weighting`), so that
    tokens that all others attend to do not own the fit; there may be several runs (`runs`), each
    fitted on what those before it have left; a bias is fitted along; the sums hold no padding
    (windows have none) and the solution needs no inverse. Where a norm stands behind the MLP (Gemma
    2 and 3) the map comes before it, and the norm's gains are fitted as well (`refit`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"similarity"})

    name: Literal["replaceme"] = "replaceme"
    fitted: Literal["projection", "map"] = "projection"
    """What is fitted: all of the last linear of the MLP before a run, or, as in the paper, a map of
    its output."""
    weighting: Literal["relative", "equal"] = "relative"
    """Whether errors count over the size of each token's residual stream, or all alike as in the
    paper."""
    ridge: float = Field(default=1e-3, gt=0)
    """Strength that holds the weights where they are, over the mean energy of what is read."""
    choice: Literal["cosine", "loss", "sensitivity"] = "cosine"
    """cosine: the runs with the largest cosines of what enters and leaves them; loss: one block
    after the other, each the one whose absence costs the least next-token loss; sensitivity: the
    runs whose maps alone cost the least divergence from the dense model
    (`statistics.sensitivity`)."""
    loss_tokens: int = Field(default=16_384, ge=1)
    """Tokens of the calibration text that choice loss measures on."""
    runs: int = Field(default=1, ge=1)
    """The most runs; 1 in the paper."""
    protect_last: int = Field(default=0, ge=0)
    """Number of last blocks that stay; the paper protects none."""

    @property
    def scores(self) -> frozenset[Family]:
        return frozenset({"maps"}) if self.choice == "sensitivity" else frozenset()

    def outline(self, model: PreTrainedModel) -> Plan:
        # Which blocks go is not known yet: the deepest ones stand in.
        plan, removable = plan_of(model), self._removable(model)
        return self._plan(plan, removable[len(removable) - self._count(model, removable) :])

    @property
    def goes_in_turn(self) -> bool:
        return self.choice != "loss"

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        removable = self._removable(model)
        count = self._count(model, removable)
        site = next(s.name for s in architecture_of(model).linears if s.reads == "mlp_output")
        hidden = int(base_config_of(model.config).hidden_size)
        rows, width = linear_shapes(model).get((removable[0] - 1, site), (hidden, hidden))
        width = rows if self.fitted == "map" else width
        runs, num_blocks = min(self.runs, count), len(plan_of(model).blocks)
        work = Arithmetic(
            float64=runs * (width**3 / 3 + 2.0 * rows * width**2),
            products=runs * num_tokens * (width**2 + 2.0 * rows * width),
            passes=2.0 + 2.0 * runs / num_blocks,
            streams=2,
        )
        if self.choice != "loss":
            return work
        share = min(1.0, self.loss_tokens / num_tokens)
        tried = count * len(removable)
        return work + Arithmetic(passes=share * tried / 2, heads=share * tried)

    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        check_evidence(model, evidence)
        plan, gone = plan_of(model), self._gone(model, evidence)
        kept = [position for position in range(len(plan.blocks)) if position not in gone]
        behind = dict(zip(kept, [*kept[1:], len(plan.blocks)], strict=True))
        smaller = plan.keep(kept)

        def mapped(position: int, streams: Streams) -> dict[str, Tensor]:
            source = kept[position]
            if behind[source] == source + 1:
                return {}
            assert streams.dense is not None
            block = copy.deepcopy(architecture_of(model).blocks(model)[source])
            to = partial(streams.dense_to, behind[source])
            how = Fit(
                target="residual",
                ridge=self.ridge,
                by_output=self.fitted == "map",
                relative=self.weighting == "relative",
            )
            sides = Sides(streams.dense, streams.deviated, block, to)
            return refitted_mlp(model, position, sides, how)

        if not gone:
            return Cut(plan, tuple(kept))
        tensors = compressed_in_order(
            model, smaller, mapped, evidence, self.name, inherits=kept, beside_dense=True
        )
        return Cut(smaller, tuple(kept), tensors)

    def _removable(self, model: PreTrainedModel) -> list[int]:
        """The blocks that may go: something can be folded into the MLP before any run of them.

        Raises:
            InputError: there is none.
        """
        plan = plan_of(model)
        candidates = range(1, len(plan.blocks) - self.protect_last)
        removable = [p for p in candidates if can_take_in(model, plan, p - 1)]
        if not removable:
            raise InputError(
                "replaceme folds a map into the last linear of the MLP before a run, which must be "
                "a block's own, whose output is added to the residual stream as it is or normed; "
                "no block of this model that may stay is followed by one that may go"
            )
        return removable

    def _count(self, model: PreTrainedModel, removable: Sequence[int]) -> int:
        """The smallest number of blocks that reaches the sparsity."""
        plan = plan_of(model)
        return smallest_reaching(
            self,
            model,
            lambda count: self._plan(plan, removable[len(removable) - count :]),
            len(removable),
            f"of {len(plan.blocks)} blocks, each behind an MLP that can take a map in",
        )

    def _plan(self, plan: Plan, gone: Sequence[int]) -> Plan:
        return plan.keep([p for p in range(len(plan.blocks)) if p not in gone])

    def _gone(self, model: PreTrainedModel, evidence: Evidence) -> set[int]:
        """The blocks to remove: as few as reach the sparsity (those of a model that was cut before
        may differ in size)."""
        removable = self._removable(model)
        plan, dense = plan_of(model), count_parameters(model)
        chosen: set[int] = set()
        for count in range(self._count(model, removable), len(removable) + 1):
            if count == 0:
                return set()
            if self.choice == "loss":
                chosen = self._by_loss(model, evidence, set(removable), count, chosen)
            else:
                distance = self._distance(evidence)
                num_blocks = len(plan.blocks)
                chosen = runs_of_least_distance(distance, num_blocks, removable, count, self.runs)
            try:
                left = size_of_plan(model.config, self._plan(plan, sorted(chosen))).parameters
            except InputError:  # others have adapters on the linears of one of them
                continue
            if 1 - left / dense >= self.sparsity - TOLERANCE:
                return chosen
        raise InputError(
            f"replaceme finds no {self.runs} run{'s' * (self.runs > 1)} of blocks that together "
            f"hold {self.sparsity:.1%} of this model's parameters; allow more runs or ask for less"
        )

    def _distance(self, evidence: Evidence) -> Callable[[int, int], float]:
        """What a run from a block up to another one costs."""
        if self.choice == "sensitivity":
            scores = scores_of(evidence, self)
            return lambda start, stop: scores.loss_of_run(range(start, stop), "run_map")
        similarity = evidence.ranking.similarity
        return lambda start, stop: 1 - similarity[start][stop]

    def _by_loss(
        self,
        model: PreTrainedModel,
        evidence: Evidence,
        removable: set[int],
        count: int,
        gone: set[int],
    ) -> set[int]:
        """`gone` and others, one after the other, until `count` are."""
        windows, gone = windows_of(evidence.calibration, self.loss_tokens), set(gone)
        while len(gone) < count:
            candidates = [
                p for p in sorted(removable - gone) if number_of_runs({*gone, p}) <= self.runs
            ]
            if not candidates:
                break
            losses = deletion_losses(model, windows, candidates, gone=gone)
            gone.add(min(losses, key=lambda p: (losses[p], p)))
            evidence.progress("replaceme losses", len(gone), count)
        return gone


def runs_of_least_distance(
    distance_of: Callable[[int, int], float],
    num_blocks: int,
    removable: Sequence[int],
    count: int,
    most_runs: int,
) -> set[int]:
    """`count` of the blocks `removable`, in at most so many runs, with the least sum of what each
    run costs, from its first block up to the one behind it; of equal ones the earlier. Empty if
    there are no such runs.

    By dynamic programming: what comes before a block that stays does not matter behind it.
    """
    may_go = set(removable)
    best: dict[tuple[int, int, int], tuple[float, tuple[int, ...]]] = {(0, 0, 0): (0.0, ())}
    for position in range(num_blocks):
        for removed in range(count + 1):
            for runs in range(most_runs + 1):
                if (found := best.get((position, removed, runs))) is None:
                    continue
                _offer(best, (position + 1, removed, runs), found)
                if runs == most_runs:
                    continue
                for stop in range(position + 1, min(num_blocks, position + count - removed) + 1):
                    if stop - 1 not in may_go:
                        break
                    distance = distance_of(position, stop)
                    if math.isinf(distance):  # nobody knows
                        continue
                    cost = found[0] + distance, (*found[1], *range(position, stop))
                    # The block behind a run stays, where there is one.
                    state = min(stop + 1, num_blocks), removed + stop - position, runs + 1
                    _offer(best, state, cost)
    ends = [best[s] for runs in range(most_runs + 1) if (s := (num_blocks, count, runs)) in best]
    return set(min(ends)[1]) if ends else set()


def _offer(
    best: dict[tuple[int, int, int], tuple[float, tuple[int, ...]]],
    state: tuple[int, int, int],
    found: tuple[float, tuple[int, ...]],
) -> None:
    if state not in best or found < best[state]:
        best[state] = found


def number_of_runs(positions: set[int]) -> int:
    """Of neighbouring positions."""
    return sum(position - 1 not in positions for position in positions)


def can_take_in(model: PreTrainedModel, plan: Plan, position: int) -> bool:
    """Whether the last linear of a block's MLP can take in a map of what it writes: its output is
    added to the residual stream as it is or normed, and it is the block's alone."""
    name = next(s.name for s in architecture_of(model).linears if s.reads == "mlp_output")
    is_sliced = isinstance(plan.blocks[position].linears.get(name), HeadSlices)
    is_lent = (position, name) in plan.lenders
    return adds_plainly(model, plan, position) and not is_sliced and not is_lent
