"""Differences between two models that were measured on the same items, with their uncertainty."""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from foldstack.compression.errors import InputError

STANDARD_ERRORS = 1.96
"""Half of a 95 % interval."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Item(_Record):
    """What a model made of one item of a benchmark."""

    benchmark: str
    doc_id: int
    doc_hash: str
    """Of the item's content: two models were asked the same exactly if these are equal."""
    prompt_hash: str = ""
    """Of what the model was given to read: examples before an item may differ with their order."""
    filter: str
    """lm-eval's name of how answers were read out of the model's output; mostly "none"."""
    target: str
    """The right choice or answer; shortened."""
    loglikelihoods: tuple[float, ...] = ()
    """Of each choice, or of the whole text; nats."""
    choice_tokens: tuple[int, ...] = ()
    """How many tokens each choice is; of a multiple-choice item."""
    responses: tuple[str, ...] = ()
    """What the model wrote, for a generation benchmark."""
    metrics: dict[str, float | tuple[float, ...]]
    """Of this item alone; a pair for a weighted metric: log likelihood and weight."""


class PairedDifference(_Record):
    """How much better or worse the second of two models is, judged item by item.

    The standard error is that of the mean of the items' differences: far smaller than that of two
    independent runs, because both models find the same items hard.
    """

    num_items: int
    first: float
    second: float
    difference: float
    """second - first."""
    stderr: float
    """Standard error of the difference."""
    only_first: int | None
    """Items that the first model alone got right; None for a metric that is not 0 or 1."""
    only_second: int | None
    mcnemar_p: float | None
    """Exact two-sided McNemar test: how likely a split of the differing items at least as uneven
    as this one is, if both models are equally good; None for a metric that is not 0 or 1."""


def paired_difference(
    first: Sequence[Item], second: Sequence[Item], benchmark: str, metric: str
) -> PairedDifference:
    """Two models' difference in one metric of one benchmark, paired by item.

    A metric whose items are pairs (log likelihood, weight), as lm-eval's bits per byte, is compared
    as the ratio of the sums; its unit is then nats per unit of weight, or bits for bits_per_byte.

    Args:
        first: items of one model, of any benchmarks.
        second: items of the other.
        benchmark: whose items to compare.
        metric: as in the result's scores: "acc", or "exact_match,strict-match" with a filter.

    Raises:
        InputError: the two were not measured on the same items, or have no such metric.
    """
    a, b = (values_by_item(items, benchmark, metric) for items in (first, second))
    if a.keys() != b.keys():
        raise InputError(
            f"a paired comparison on {benchmark} needs the same items for both models, "
            f"{len(a.keys() ^ b.keys())} of {len(a.keys() | b.keys())} have no counterpart"
        )
    unit = -1 / math.log(2) if metric.startswith("bits_per_byte") else 1.0
    values_a = [a[key][0] * unit for key in a]
    values_b = [b[key][0] * unit for key in a]
    weights = [a[key][1] for key in a]
    if weights != [b[key][1] for key in a]:
        raise InputError(f"the items of {benchmark} have other weights for the second model")
    return paired_ratio(values_a, values_b, weights)


def paired_ratio(
    first: Sequence[float], second: Sequence[float], weights: Sequence[float]
) -> PairedDifference:
    """Difference of sum(second) / sum(weights) and sum(first) / sum(weights).

    With weights of 1 the difference of two means; with the summed losses of a text's windows and
    their token counts the difference of two losses per token. The standard error is that of a ratio
    estimator (Cochran, Sampling Techniques, 3rd edition, equation 2.46), without the correction for
    a finite population; for weights of 1 it is the standard error of the mean.

    Raises:
        InputError: there are fewer than two items.
    """
    num_items = len(weights)
    if num_items < 2:
        raise InputError(f"a paired comparison needs at least 2 items, got {num_items}")
    total = math.fsum(weights)
    differences = [b - a for a, b in zip(first, second, strict=True)]
    difference = math.fsum(differences) / total
    squares = math.fsum(
        (d - difference * w) ** 2 for d, w in zip(differences, weights, strict=True)
    )
    is_binary = {*first, *second} <= {0.0, 1.0} and {*weights} == {1.0}
    only_first, only_second = differences.count(-1.0), differences.count(1.0)
    return PairedDifference(
        num_items=num_items,
        first=math.fsum(first) / total,
        second=math.fsum(second) / total,
        difference=difference,
        stderr=math.sqrt(squares * num_items / (num_items - 1)) / total,
        only_first=only_first if is_binary else None,
        only_second=only_second if is_binary else None,
        mcnemar_p=mcnemar_p(only_first, only_second) if is_binary else None,
    )


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar test: the differing items are fair coins if the models are equal."""
    num_differing, fewer = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(num_differing, k) for k in range(fewer + 1))
    return min(1.0, 2 * tail / 2**num_differing)


def values_by_item(
    items: Sequence[Item], benchmark: str, metric: str
) -> dict[tuple[int, str], tuple[float, float]]:
    """Value and weight by document."""
    name, _, answer_filter = metric.partition(",")
    found = {}
    for item in items:
        is_asked = item.benchmark == benchmark and item.filter == (answer_filter or "none")
        if is_asked and name in item.metrics:
            value = item.metrics[name]
            found[item.doc_id, item.doc_hash] = (
                (value[0], value[1]) if isinstance(value, tuple) else (value, 1.0)
            )
    if not found:
        raise InputError(f"no item of benchmark {benchmark} has a metric {metric!r} to compare")
    return found
