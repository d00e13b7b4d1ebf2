"""Matching, not matching or open: the test against brute force, and how often it is wrong."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from foldstack.compression.evaluation.tracks.verdict import (
    VerdictRule,
    as_normal,
    ratio_statistic,
)

RULE = VerdictRule()


def _most_likely_variance(both: int, first: int, second: int, ratio: float) -> float:
    """Of sum(other - ratio dense), under the most likely shares with that ratio, by search."""
    right = both + first + second
    gap = (1 - ratio) * right

    def unlikely(x: float) -> float:
        counts = (right - (1 + ratio) * x) / ratio, x, (x - gap) / ratio
        pairs = zip((both, first, second), counts, strict=True)
        return -sum(n * math.log(max(c, 1e-300)) for n, c in pairs if n)

    found = minimize_scalar(
        unlikely, bounds=(gap, right / (1 + ratio)), method="bounded", options={"xatol": 1e-12}
    )
    return (1 + ratio) * found.x - gap


@pytest.mark.parametrize("ratio", [0.8, 0.95, 1.0])
def test_statistic_is_that_of_the_most_likely_model(ratio: float) -> None:
    """Breaks when the closed form of the constrained estimate is not the maximum."""
    for both, first, second in itertools.product((0, 40, 300), (1, 7, 60), (0, 3, 50)):
        variance = _most_likely_variance(both, first, second, ratio)
        wanted = (both + second - ratio * (both + first)) / math.sqrt(variance)
        found = ratio_statistic(float(both), float(first), float(second), ratio)
        assert found == pytest.approx(wanted, rel=1e-4)


def test_at_ratio_one_it_is_mcnemar() -> None:
    """Breaks when items that both get right weigh in where they cannot."""
    assert ratio_statistic(77.0, 20.0, 12.0, 1.0) == pytest.approx(-8 / math.sqrt(32))


def test_numbers_of_items() -> None:
    """Dense 46 %, 10 % disagreement: about 512 items certify equality, 100 to 200 do not."""
    thresholds = RULE.thresholds(1)
    z = float(ratio_statistic(41.0, 5.0, 5.0, RULE.ratio))
    assert thresholds.judge(z) == "open"
    assert 480 < (thresholds.items_needed(z, 100) or 0) < 540
    assert thresholds.items_needed(0.0, 100) is None


def test_ten_answers_alike_are_no_proof() -> None:
    """Breaks when no disagreement among few items passes for certainty."""
    thresholds = RULE.thresholds(1)
    assert thresholds.judge(float(ratio_statistic(5.0, 0.0, 0.0, RULE.ratio))) == "open"
    assert thresholds.judge(float(ratio_statistic(60.0, 0.0, 0.0, RULE.ratio))) == "matching"
    assert ratio_statistic(0.0, 0.0, 0.0, RULE.ratio) == 0.0


def test_verdicts_are_as_rarely_wrong_as_they_say() -> None:
    """Breaks when the level is not held on the margin itself, where it is hardest."""
    draw = np.random.default_rng(0)
    dense, disagree, items, cases = 0.6, 0.14, 300, 40_000
    other = RULE.ratio * dense
    only_dense = (disagree + dense - other) / 2
    shares = [dense - only_dense, only_dense, disagree - only_dense, 1 - dense - disagree / 2]
    shares[3] = 1 - sum(shares[:3])
    counts = draw.multinomial(items, shares, cases).astype(float)
    z = np.asarray(ratio_statistic(counts[:, 0], counts[:, 1], counts[:, 2], RULE.ratio))
    thresholds = RULE.thresholds(1)
    assert (z > thresholds.matching).mean() == pytest.approx(0.05, abs=0.008)
    assert (z < -thresholds.not_matching).mean() == pytest.approx(0.05, abs=0.008)


def test_many_tasks_share_the_level_of_not_matching_alone() -> None:
    """Breaks when a track of ten tasks calls a good model bad ten times as often."""
    one, ten = RULE.thresholds(1), RULE.thresholds(10)
    assert one.matching == ten.matching == pytest.approx(1.6449, abs=1e-4)
    assert ten.not_matching == pytest.approx(2.5758, abs=1e-4)


def test_few_windows_need_more_than_a_normal_would() -> None:
    """Breaks when a text of eight windows is judged as if its spread were known."""
    assert as_normal(1.895, 7) == pytest.approx(1.645, abs=1e-3)  # 95 % of t with 7 degrees
    assert as_normal(-1.895, 7) == pytest.approx(-1.645, abs=1e-3)
    assert as_normal(math.inf, 7) == math.inf
