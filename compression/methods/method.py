"""What every method is: settings, an outline before any data is seen, and a cut after."""

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from jaxtyping import Int
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import PreTrainedModel

from foldstack.compression.errors import InputError
from foldstack.compression.methods.arithmetic import Arithmetic
from foldstack.compression.statistics.gathering import Statistics, gather
from foldstack.compression.statistics.ranking import Ranking, rank_blocks
from foldstack.compression.statistics.sensitivity import Family, Sensitivity
from foldstack.compression.statistics.variant_times import Seconds
from foldstack.compression.storage.spool import Spool
from foldstack.compression.structure.plan import Plan
from foldstack.compression.structure.size import count_parameters, size_of_plan
from foldstack.compression.structure.surgery import Cut, plan_of

# A structure that stays this share of the whole model short of the asked sparsity still counts as
# reaching it.
TOLERANCE = 0.005

GUESSED_PASSES = 6.0
"""Over the calibration windows, of a method that trains or tries out: two with their gradients."""

NO_DENSE_LINEAR = "none of its blocks' linears is dense and its own; factor before that"
"""Why a method that factors linears finds nothing to do."""


def no_progress(_what: str, _done: int, _total: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True)
class Evidence:
    """What a method may look at."""

    calibration: Int[Tensor, "windows tokens"]
    statistics: Statistics
    ranking: Ranking
    work: Path | None = None
    """Folder for what a killed run resumes from."""
    progress: Callable[[str, int, int], None] = no_progress
    """Called with what is being done, how much of it is done, and how much there is."""
    sensitivity: Sensitivity | None = None
    """Scores of the variants that the method asks for."""
    seconds: Seconds | None = None
    """What variants save of the time on this machine, where the method asks for it."""

    def spool(self) -> Spool:
        """Where a method that goes block by block keeps the tensors of those that are done."""
        return Spool(None if self.work is None else self.work / "spool")

    def of(self, model: PreTrainedModel, kinds: frozenset[str]) -> "Evidence":
        """The statistics and the ranking of another model on the same windows, gathered now; on
        disk where there is room for what a killed run resumes from."""
        folder = None if self.work is None else self.work / "statistics"
        statistics = gather(
            model, self.calibration, kinds, progress=self.progress, folder=folder, work=folder
        )
        return replace(
            self, statistics=statistics, ranking=rank_blocks(statistics), sensitivity=None,
            seconds=None,
        )  # fmt: skip


class Method(BaseModel, ABC):
    """One way to make a model smaller: its settings are the fields, its rule is `compress`.

    Every method is usable from `sparsity` alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    needs: ClassVar[frozenset[str]]
    """Kinds of statistics that `compress` reads: "similarity", "gram"."""

    grows: ClassVar[bool] = False
    """Whether it adds parameters: its sparsity is negative."""

    name: str
    sparsity: float = Field(gt=0, lt=1)
    """Fraction of the whole model's stored parameters to remove; tied and shared ones count
    once."""
    seed: int = Field(default=0, ge=0)
    """Seed of whatever is random in the method."""

    steps_of: ClassVar[str] = "whole blocks"
    """What it removes one after the other: why it may miss a sparsity."""

    @property
    def title(self) -> str:
        """What a person calls it in a table."""
        return self.name

    def modules(self) -> tuple[str, ...]:
        """The library modules whose code its result depends on, besides what they import."""
        return (type(self).__module__,)

    @property
    def goes_in_turn(self) -> bool:
        """Whether `compress` holds the weights of one block at a time, not those of the model."""
        return False

    def arithmetic(self, model: PreTrainedModel, num_tokens: int) -> Arithmetic:
        """What `compress` computes after `num_tokens` of calibration; a guess, where data decide.

        `model` may be on the meta device.
        """
        del model, num_tokens
        guess = 0.0 if self.goes_in_turn else GUESSED_PASSES
        return Arithmetic(passes=guess, heads=guess)

    @property
    def scores(self) -> frozenset[Family]:
        """Families of variants whose scores `compress` reads (`statistics.sensitivity`)."""
        return frozenset()

    @property
    def times(self) -> frozenset[Family]:
        """Families of variants of which `compress` reads how much time they save (`Seconds`)."""
        return frozenset()

    @property
    def contenders(self) -> tuple["Method", ...]:
        """What a sweep makes, heals a little and holds against one another in the place of this
        method; itself alone where there is nothing to choose from."""
        return (self,)

    @abstractmethod
    def outline(self, model: PreTrainedModel) -> Plan:
        """The structure that `compress` will choose, or one of the same size, before any data is
        seen.

        Where a model was cut before and its blocks differ in size, which of them go decides the
        size: the deepest stand in, and the size may be off by what they differ.
        `model` may be on the meta device.

        Raises:
            InputError: the sparsity is out of this method's reach for this model.
        """

    @abstractmethod
    def compress(self, model: PreTrainedModel, evidence: Evidence) -> Cut:
        """Decide what becomes of `model`; changes nothing in it."""


def smallest_reaching(
    method: Method,
    model: PreTrainedModel,
    plan_for: Callable[[int], Plan],
    most: int,
    what: str,
) -> int:
    """The smallest count in 0 ... most for which `plan_for(count)` removes what `method` was asked.

    A larger count must not remove less.

    Raises:
        InputError: not even `most` reaches the sparsity; says how far it gets.
    """
    removed = _removed_by(model, plan_for)
    enough = method.sparsity - TOLERANCE
    if enough <= 0:
        return 0
    farthest = removed(most) if most > 0 else 0.0
    if farthest < enough:
        raise InputError(unreachable(method, farthest, f"{most} {what}"))
    return bisect_left(range(most + 1), enough, key=removed)


def nearest_reaching(
    method: Method,
    model: PreTrainedModel,
    plan_for: Callable[[int], Plan],
    most: int,
    what: str,
) -> int:
    """The same where steps are small: the count that comes nearest to the sparsity."""
    smallest = smallest_reaching(method, model, plan_for, most, what)
    removed = _removed_by(model, plan_for)
    # `most` stands for all that is beyond it.
    above = smallest + bisect_left(range(smallest, most), method.sparsity, key=removed)
    return min((max(above - 1, smallest), above), key=lambda n: abs(removed(n) - method.sparsity))


def _removed_by(model: PreTrainedModel, plan_for: Callable[[int], Plan]) -> Callable[[int], float]:
    """The share of the parameters that a count removes; 0 removes nothing."""
    dense = count_parameters(model)

    def removed(count: int) -> float:
        if count == 0:
            return 0.0
        return 1 - size_of_plan(model.config, plan_for(count)).parameters / dense

    return removed


def missed(method: Method, realised: float) -> str | None:
    """Why `method` removed another fraction than it was asked; None within the tolerance."""
    if abs(realised - method.sparsity) <= TOLERANCE:
        return None
    return (
        f"{method.title} removed {realised:.1%} of the parameters where {method.sparsity:.1%} was "
        f"asked: it goes in steps of {method.steps_of}, and {_WHICH[realised > method.sparsity]}"
    )


_WHICH = {
    True: "one step fewer would have left too much",
    False: "one more was out of its reach",
}


def unreachable(method: Method, farthest: float, by: str) -> str:
    """The sentence about a sparsity that `method` cannot reach for a model."""
    if farthest <= 0:
        return (
            f"{method.name} cannot make this model smaller ({by}); got sparsity {method.sparsity}"
        )
    # Rounded down, so that what the sentence offers is really within reach.
    offered = int(farthest * 1000) / 1000
    return (
        f"{method.name} can remove at most {offered:.1%} of this model's parameters ({by}), "
        f"got sparsity {method.sparsity}; ask for a value in (0, {offered:g}]"
    )


def check_evidence(model: PreTrainedModel, evidence: Evidence) -> None:
    """Raises InputError when the ranking or the statistics are of a model of another depth."""
    num_blocks = len(plan_of(model).blocks)
    for what, found in (
        ("ranking", evidence.ranking.num_blocks),
        ("statistics", evidence.statistics.num_blocks),
    ):
        if found != num_blocks:
            raise InputError(
                f"the {what} must be of the model to compress, which has {num_blocks} blocks; "
                f"got one of {found} blocks"
            )


def scores_of(evidence: Evidence, method: Method) -> Sensitivity:
    """The scores that a method asks for.

    Raises:
        InputError: they are not among the evidence.
    """
    if evidence.sensitivity is None:
        asked = ", ".join(sorted(method.scores))
        raise InputError(
            f"{method.name} with these settings reads scores of {asked}, and there are none; make "
            "them with `methods.search.scoring.scored`"
        )
    return evidence.sensitivity.of(method.scores)
