"""A loss as a function of what is saved, from a few places where it is known."""

import math
from collections.abc import Iterable

import numpy as np
from scipy.interpolate import PchipInterpolator

CURVE_STEPS = 40
"""Of a curve that is spread over, between nothing and the farthest that is known."""
NO_LOSS = 1e-12
"""Nats: below it a loss is none."""


class LossCurve:
    """The loss of a site as a function of what it saves, from a few of its scores.

    Between two of them logarithm over logarithm, monotone and without overshoot (Fritsch and
    Carlson 1980), as losses of widths rise by orders of magnitude; before the first one a straight
    line from zero, which is no less than the truth where the curve bends upwards.
    """

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        """Points (saved, loss) with something saved; a loss never falls as more is saved."""
        known = sorted((saved, loss) for saved, loss in points if math.isfinite(loss) and saved > 0)
        assert known, "a curve has at least one point"
        self._saved = np.array([saved for saved, _ in known])
        losses = np.maximum.accumulate([max(loss, NO_LOSS) for _, loss in known])
        self._losses = losses
        self._between = None
        if len(known) > 1:
            self._between = PchipInterpolator(np.log(self._saved), np.log(losses))

    @property
    def farthest(self) -> float:
        """The most that is known to be saved."""
        return float(self._saved[-1])

    def __call__(self, saved: float) -> float:
        """The loss where so much is saved, at most `farthest`."""
        first = float(self._saved[0])
        if saved <= first or self._between is None:
            return float(self._losses[0]) * max(0.0, saved) / first
        return float(np.exp(self._between(math.log(min(saved, self.farthest)))))

    def points(self, count: int) -> list[tuple[float, float]]:
        """(saved, loss) at `count` equal steps from nothing to `farthest`, and where known."""
        steps = {self.farthest * n / count for n in range(count + 1)}
        return [(saved, self(saved)) for saved in sorted({*steps, *map(float, self._saved)})]
