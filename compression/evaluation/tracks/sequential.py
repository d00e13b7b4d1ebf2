"""Stopping early without being wrong more often: looks at some of the items, alpha spent honestly.

Who tests after every batch of items and stops at the first success is wrong far more often than the
level says. Group sequential boundaries (Lan and DeMets 1983) hold the level over all looks
together; they depend on how much was read at each look and on nothing that was found.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.evaluation.tracks.verdict import Thresholds, VerdictRule

NODES = 240
FARTHEST = 8.0
"""Standard deviations below 0 from which on a path is not followed."""
LEAST_ALPHA = 1e-14
"""Less than this is not worth a boundary: it is at infinity."""
Spending = Callable[[float, float], float]


class SequentialRule(BaseModel):
    """How many times a task is looked at while its items are read."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    looks: int = Field(default=6, ge=2, le=20)
    """The last one is at all items; each look before is at two thirds of what the next one is."""
    first_items: int = Field(default=40, ge=20)
    """A look at fewer items is left out."""
    seed: int = 0
    """Of the order in which items are read: the same for every model."""

    def counts(self, num_items: int) -> list[int]:
        """Items read by each look."""
        steps = (num_items * (2 / 3) ** back for back in reversed(range(1, self.looks)))
        early = [math.ceil(step) for step in steps]
        return [*(count for count in early if self.first_items <= count < num_items), num_items]

    def order(self, num_items: int) -> list[int]:
        """Places of the items in the order in which they are read: files are often sorted."""
        return [int(place) for place in np.random.default_rng(self.seed).permutation(num_items)]


def like_obrien_fleming(time: float, alpha: float) -> float:
    """Alpha spent by a share of the items: hardly any early, so that the last look costs little."""
    from scipy import stats

    return float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(time)))


def like_pocock(time: float, alpha: float) -> float:
    """Alpha spent by a share of the items: early as much as later, so that bad models end soon."""
    return alpha * math.log(1 + (math.e - 1) * time)


def thresholds_at(
    rule: VerdictRule, counts: Sequence[int], num_items: int, num_tasks: int
) -> Thresholds:
    """What a statistic must pass at the last of the looks that read `counts` of `num_items`.

    "matching" spends as O'Brien and Fleming do: it is said early of what is far better only.
    "not matching" spends as Pocock does. Each holds its own level whatever the other one stops.
    """
    alpha, times = 1 - rule.confidence, tuple(count / num_items for count in counts)
    return Thresholds(
        matching=boundaries(times, alpha, like_obrien_fleming)[-1],
        not_matching=boundaries(times, alpha / max(1, num_tasks), like_pocock)[-1],
    )


@lru_cache(maxsize=256)
def boundaries(times: tuple[float, ...], alpha: float, spending: Spending) -> tuple[float, ...]:
    """One-sided boundaries of a standard normal statistic at each look.

    The path sum(x) / sqrt(n) of the whole moves by independent normal steps; what of it has not
    crossed yet is followed on a grid from look to look (Armitage, McPherson and Rowe 1969).

    Args:
        times: share of all items at each look, rising, at most 1.
        alpha: chance of crossing at any of them when the truth lies on the margin.
        spending: how much of it is spent by a time.
    """
    from scipy import stats
    from scipy.optimize import brentq

    found: list[float] = []
    spent, before = 0.0, 0.0
    places, mass = np.zeros(1), np.ones(1)
    for time in times:
        step = math.sqrt(time - before)
        wanted = spending(time, alpha) - spent
        spent, before = spent + wanted, time

        def excess(
            bound: float, step: float = step, wanted: float = wanted,
            places: np.ndarray = places, mass: np.ndarray = mass,
        ) -> float:  # fmt: skip
            return float(mass @ stats.norm.sf((bound - places) / step)) - wanted

        if wanted < LEAST_ALPHA:
            bound = math.inf
        else:
            bound = float(brentq(excess, -FARTHEST, FARTHEST * 2, xtol=1e-10))
        found.append(bound / math.sqrt(time))
        nodes, weights = np.polynomial.legendre.leggauss(NODES)
        low, high = -FARTHEST * math.sqrt(time), min(bound, FARTHEST * math.sqrt(time))
        new = low + (nodes + 1) * (high - low) / 2
        density = stats.norm.pdf((new[:, None] - places) / step) @ mass / step
        places, mass = new, density * weights * (high - low) / 2
    return tuple(found)
