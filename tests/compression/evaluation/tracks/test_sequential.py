"""Looks at some of the items: boundaries known from the literature, and how often they err."""

import numpy as np
import pytest

from foldstack.compression.evaluation.tracks.sequential import (
    SequentialRule,
    boundaries,
    like_obrien_fleming,
    like_pocock,
    thresholds_at,
)
from foldstack.compression.evaluation.tracks.verdict import VerdictRule, ratio_statistic

FIVE = (0.2, 0.4, 0.6, 0.8, 1.0)


def test_boundaries_are_the_published_ones() -> None:
    """Five looks at one-sided 2.5 %: Lan-DeMets boundaries as gsDesign's documentation has them."""
    wanted = [4.8769, 3.3569, 2.6803, 2.2898, 2.0310]
    assert boundaries(FIVE, 0.025, like_obrien_fleming) == pytest.approx(wanted, abs=2e-4)
    wanted = [2.4380, 2.4268, 2.4101, 2.3966, 2.3859]
    assert boundaries(FIVE, 0.025, like_pocock) == pytest.approx(wanted, abs=1e-4)


def test_one_look_is_the_plain_test() -> None:
    """Breaks when a task that was read at once is judged by another bound."""
    assert boundaries((1.0,), 0.05, like_pocock) == pytest.approx([1.6449], abs=1e-4)


def test_looks_end_with_all_items_and_order_is_fixed() -> None:
    """Breaks when a last look is missing, or two models are asked in different orders."""
    rule = SequentialRule()
    assert rule.counts(500) == [66, 99, 149, 223, 334, 500]
    assert rule.counts(45) == [45]
    assert rule.order(500) == rule.order(500) != list(range(500))
    assert sorted(rule.order(500)) == list(range(500))


@pytest.mark.parametrize("seed", [0, 1])
def test_stopping_early_is_wrong_no_more_often_than_the_level(seed: int) -> None:
    """Breaks when alpha is spent at every look anew: then some 15 % of the verdicts would be wrong.

    On the margin itself, where both "matching" and "not matching" are as wrong as can be.
    """
    rule, sequential, items, cases = VerdictRule(), SequentialRule(), 600, 8000
    dense, only_dense = 0.7, 0.085
    only_other = only_dense - (1 - rule.ratio) * dense
    shares = [dense - only_dense, only_dense, only_other, 1 - dense - only_other]
    outcomes = np.random.default_rng(seed).choice(4, (cases, items), p=shares)
    counts = sequential.counts(items)
    bounds = [thresholds_at(rule, counts[: k + 1], items, 1) for k in range(len(counts))]
    verdict = np.zeros(cases)
    careless = np.zeros(cases, dtype=bool)
    for count, bound in zip(counts, bounds, strict=True):
        both, first, second = ((outcomes[:, :count] == k).sum(1).astype(float) for k in range(3))
        z = np.asarray(ratio_statistic(both, first, second, rule.ratio))
        careless |= z > rule.thresholds(1).matching
        verdict = np.where((verdict == 0) & (z > bound.matching), 1, verdict)
        verdict = np.where((verdict == 0) & (z < -bound.not_matching), -1, verdict)
    assert (verdict == 1).mean() < 0.057
    assert (verdict == -1).mean() < 0.057
    assert careless.mean() > 0.1  # what the boundaries are for


def test_a_bad_model_is_dropped_early_and_a_good_one_pays_little() -> None:
    """Breaks when the two sides are swapped: then good models would pay and bad ones be read on."""
    first = thresholds_at(VerdictRule(), [66], 500, 1)
    assert first.not_matching < 2.4 < 5 < first.matching
    last = thresholds_at(VerdictRule(), SequentialRule().counts(500), 500, 1)
    assert last.matching < 1.75
