"""Whether a compressed model is as good as the dense one: matching, not matching, or not known yet.

LLM-KICK (arXiv 2310.01382) calls a model matching when it is no worse than the dense one by more
than 5 %, relative. Said of a sample, that is a test of non-inferiority on paired items: matching
once the one-sided limit of the ratio is above 1 - within, not matching once the other one is below,
and else open.
"""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import BaseModel, ConfigDict, Field

Verdict = Literal["matching", "not matching", "open"]
Counts = Float64[ndarray, " cases"] | float


class VerdictRule(BaseModel):
    """When a model matches the dense one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    within: float = Field(default=0.05, gt=0, lt=1)
    """How much worse it may be, as a share of the dense model's score."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of "matching", and of a track's "not matching", each: one-sided."""

    @property
    def ratio(self) -> float:
        """The least share of the dense score that matches."""
        return 1 - self.within

    def thresholds(self, num_tasks: int) -> "Thresholds":
        """What a task's statistic must pass, of a track of so many tasks.

        A track matches when every task does, so that each may be tested at the full level
        (intersection-union test, Berger 1982). It does not match as soon as one does not: there
        the level is shared by all of them (Bonferroni).
        """
        from scipy import stats

        alpha = 1 - self.confidence
        return Thresholds(
            matching=float(stats.norm.isf(alpha)),
            not_matching=float(stats.norm.isf(alpha / max(1, num_tasks))),
        )


class Thresholds(BaseModel):
    """Standard normal deviates from the margin that decide."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    matching: float
    not_matching: float
    """Below minus this a task is not matching."""

    def judge(self, statistic: float) -> Verdict:
        """The verdict on a task."""
        if statistic > self.matching:
            return "matching"
        return "not matching" if statistic < -self.not_matching else "open"

    def items_needed(self, statistic: float, num_items: int) -> int | None:
        """Items at which a task would be decided if it went on as it has begun; None if never.

        A statistic grows as the square root of the number of items.
        """
        threshold = self.matching if statistic > 0 else self.not_matching
        if statistic == 0:
            return None
        return max(num_items, math.ceil(num_items * (threshold / abs(statistic)) ** 2))


def ratio_statistic(both: Counts, only_dense: Counts, only_other: Counts, ratio: float) -> Counts:
    """How far the shares of right answers lie from other / dense = `ratio`, in standard errors.

    The score test of a ratio of paired proportions (Nam and Blackwelder 2002; Tang, Tang and Chan
    2003): the variance is that of the most likely model with exactly this ratio, so that no
    disagreement among ten items does not pass for certainty. With the shares p of the four
    outcomes of a pair, it is

        z = sqrt(n) (p_both + p_other - r (p_both + p_dense)) / sqrt(r (q_dense + q_other)),

    q being most likely under the ratio; the number of items that both get wrong cancels.

    Args:
        both: items that both models get right; a number, or one for each of several cases.
        only_dense: items that the dense model alone gets right.
        only_other: items that the other one alone gets right.
        ratio: in (0, 1].

    Returns:
        Positive where the other model is better than the ratio; 0 where nobody gets anything right.
    """
    right = np.maximum(both + only_dense + only_other, 1e-300)
    # x = only_dense under the ratio: the root of a quadratic that leaves no share negative. All
    # are counts here, n times the shares.
    gap = (1 - ratio) * right
    a = (1 + ratio) * right
    b = -(both * (1 + ratio) * gap + only_dense * (right + (1 + ratio) * gap) + only_other * right)
    c = only_dense * right * gap
    x = (-b + np.sqrt(np.maximum(b * b - 4 * a * c, 0.0))) / (2 * a)
    variance = (1 + ratio) * x - gap
    difference = both + only_other - ratio * (both + only_dense)
    found = np.where(variance > 0, difference / np.sqrt(np.maximum(variance, 1e-300)), 0.0)
    return found if found.ndim else float(found)


def as_normal(statistic: float, degrees: int) -> float:
    """The standard normal deviate that is as unlikely as Student's t of so many degrees."""
    from scipy import stats

    if not math.isfinite(statistic):
        return statistic
    # From the tail, where what is likely is not 1 within rounding.
    tail = stats.norm.isf(stats.t.sf(abs(statistic), degrees))
    return math.copysign(float(tail), statistic)
