"""How far a compressed model still answers as the original did, right or wrong.

Accuracy hides answers that changed both ways. LLM-Streamline's stability (arXiv 2403.19135,
equations 5 and 6) is the weighted share of items whose correctness did not change; plain agreement
is the same with equal weights.
"""

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.paired import Item


class Stability(BaseModel):
    """What became of the original's right and wrong answers to multiple-choice items."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    num_items: int
    stability: float
    """Equation 6, in [0, 1]."""
    agreement: float
    """Share of items whose correctness did not change."""
    effective_items: float
    """1 / sum of squared weights: how many equally weighted items stability is as noisy as."""
    right_to_wrong: int
    wrong_to_right: int


def stability(
    original: Sequence[Item], compressed: Sequence[Item], benchmark: str, metric: str = "acc"
) -> Stability:
    """Stability of one benchmark; that of a group is the plain mean over its benchmarks.

    With p_ij the mean negative log likelihood per token of option j of item i under the original
    model alone (the "PPL" of the paper's OpenCompass, there of the prompt and the option together),

        w_i = exp(std_i) / sum over m of exp(std_m),    std_i of p_ij over j, with k - 1
        stability = sum of w_i over the items that are right, or wrong, with both models

    Departs from the paper: p is of the option alone, as lm-eval gives it, which lies further apart;
    see `effective_items`. The released script adds up the first weights of the file, not those of
    the items that agree.

    Args:
        original: items of the uncompressed model, of any benchmarks and in any order.
        compressed: items of the other.
        benchmark: whose items to compare.
        metric: what says whether an item is right, 0 or 1.

    Raises:
        InputError: the two were not measured on the same items, or these are no multiple choice.
    """
    before, after = (_by_document(items, benchmark, metric) for items in (original, compressed))
    if before.keys() != after.keys():
        raise InputError(
            f"stability on {benchmark} needs the same items for both models, "
            f"{len(before.keys() ^ after.keys())} of {len(before.keys() | after.keys())} have no "
            "counterpart"
        )
    spreads = [_spread(item) for item in before.values()]
    largest = max(spreads)
    weights = [math.exp(spread - largest) for spread in spreads]
    total = math.fsum(weights)
    changes = [_right(after[key], metric) - _right(before[key], metric) for key in before]
    kept = [weight for weight, change in zip(weights, changes, strict=True) if change == 0]
    return Stability(
        num_items=len(changes),
        stability=math.fsum(kept) / total,
        agreement=len(kept) / len(changes),
        effective_items=total**2 / math.fsum(weight**2 for weight in weights),
        right_to_wrong=changes.count(-1),
        wrong_to_right=changes.count(1),
    )


def _by_document(items: Sequence[Item], benchmark: str, metric: str) -> dict[tuple[int, str], Item]:
    found = {
        (item.doc_id, item.doc_hash): item
        for item in items
        if item.benchmark == benchmark and item.filter == "none" and metric in item.metrics
    }
    if not found:
        raise InputError(f"no item of benchmark {benchmark} has a metric {metric!r} to compare")
    return found


def _spread(item: Item) -> float:
    """Standard deviation of the options' log likelihoods per token."""
    sums, tokens = item.loglikelihoods, item.choice_tokens
    if len(sums) < 2 or len(tokens) != len(sums) or not all(map(math.isfinite, sums)):
        raise InputError(
            "stability needs items with finite log likelihoods and numbers of tokens of at least 2 "
            f"options, got {sums} and {tokens} for document {item.doc_id} of {item.benchmark}"
        )
    values = [total / count for total, count in zip(sums, tokens, strict=True)]
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _right(item: Item, metric: str) -> int:
    value = item.metrics[metric]
    if value not in (0.0, 1.0):
        raise InputError(
            f"stability needs a metric that is 0 or 1, got {metric} = {value} for document "
            f"{item.doc_id} of {item.benchmark}"
        )
    return 1 if value == 1.0 else 0
