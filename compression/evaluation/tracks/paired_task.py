"""One task of a track: what the dense model and a compressed one made of the same items."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.paired import (
    Item,
    PairedDifference,
    paired_ratio,
    values_by_item,
)
from foldstack.compression.evaluation.records import Benchmark
from foldstack.compression.evaluation.tracks.verdict import as_normal, ratio_statistic

Weighting = Literal["items", "members"]
"""How a group is averaged: over all items (micro), or over its members' means (macro)."""
METRICS = (
    "acc", "exact_match", "em", "f1", "acc_norm", "rougeL", "pass@1", "prompt_level_strict_acc",
)  # fmt: skip
"""The metric that is scored: the first of these that a task has."""
NORMALISED = ("arc_challenge", "hellaswag", "openbookqa")
"""Tasks whose acc_norm is what papers report."""
ROLLING = "bits_per_byte"
CHANCE_ERRORS = 3.0
"""A dense score that is no more standard errors above chance says nothing of a compressed one."""


@dataclass(frozen=True)
class PairedScores:
    """A task whose score is a mean over items; higher is better."""

    dense: Float64[ndarray, " items"]
    other: Float64[ndarray, " items"]
    weights: Float64[ndarray, " items"]
    """Of each item in the score; they add up to 1."""
    members: Int64[ndarray, " items"]
    """Which member of a group each is of."""
    chance: float
    """What guessing scores."""

    @property
    def num_items(self) -> int:
        return len(self.weights)

    @property
    def scores(self) -> tuple[float, float]:
        """Of the dense model, and of the other one."""
        return float(self.weights @ self.dense), float(self.weights @ self.other)

    @property
    def is_at_chance(self) -> bool:
        """True when the dense model may be guessing."""
        return self.scores[0] - self.chance <= CHANCE_ERRORS * self._error(self.dense)

    def retained(self) -> tuple[float, float]:
        """(other - chance) / (dense - chance), and the standard error of this ratio estimator."""
        dense, other = (score - self.chance for score in self.scores)
        ratio = other / dense
        return ratio, self._error(self.other - ratio * self.dense) / dense

    def statistic(self, ratio: float) -> float:
        """How far the other model's score lies above `ratio` of the dense one's; see verdict."""
        alike = np.ptp(self.weights) < 1e-12
        if alike and np.isin(self.dense, (0, 1)).all() and np.isin(self.other, (0, 1)).all():
            dense, other = self.dense == 1, self.other == 1
            return float(ratio_statistic(
                float(sum(dense & other)), float(sum(dense & ~other)), float(sum(other & ~dense)),
                ratio,
            ))  # fmt: skip
        contrast = self.other - ratio * self.dense
        error = self._error(contrast)
        value = float(self.weights @ contrast)
        return as_normal(value / error if error else 0.0, self.num_items - 1)

    def _error(self, values: Float64[ndarray, " items"]) -> float:
        """Standard error of the weighted mean, of independent items within members."""
        variance = 0.0
        for member in np.unique(self.members):
            chosen = self.members == member
            count = int(chosen.sum())
            if count > 1:
                of_mean = float(values[chosen].var(ddof=1)) / count
                variance += float(self.weights[chosen].sum()) ** 2 * of_mean
        return math.sqrt(variance)


@dataclass(frozen=True)
class PairedLoss:
    """A text, or texts, on which the loss per token or per byte is compared; lower is better."""

    found: PairedDifference
    unit: float
    """Nats in one unit of the loss."""

    @property
    def num_items(self) -> int:
        return self.found.num_items

    @property
    def scores(self) -> tuple[float, float]:
        return self.found.first, self.found.second

    @property
    def is_at_chance(self) -> bool:
        return False

    def retained(self) -> tuple[float, float]:
        """Perplexity of the dense model over that of the other one, and its standard error."""
        ratio = math.exp(min(-self.found.difference * self.unit, 700.0))
        return ratio, ratio * self.found.stderr * self.unit

    def statistic(self, ratio: float) -> float:
        """How far the other model's loss lies below that of a perplexity of dense / `ratio`."""
        room = -math.log(ratio) / self.unit - self.found.difference
        if not self.found.stderr:
            return math.copysign(math.inf, room)
        return as_normal(room / self.found.stderr, self.num_items - 1)


def metric_of(task: str, benchmark: Benchmark, chosen: Mapping[str, str]) -> str | None:
    """The metric by which a task is scored; None where it has none that can be.

    Raises:
        InputError: the one that is asked for is not there.
    """
    if task in chosen:
        if chosen[task] not in benchmark.scores:
            raise InputError(
                f"{task} has no metric {chosen[task]}; it has {', '.join(benchmark.scores)}"
            )
        return chosen[task]
    if task in NORMALISED and "acc_norm" in benchmark.scores:
        return "acc_norm"
    ranked = {name.partition(",")[0]: name for name in reversed(benchmark.scores)}
    return next((ranked[name] for name in (*METRICS, ROLLING) if name in ranked), None)


def weighting_of(
    metric: str, benchmark: Benchmark, members: Mapping[str, Sequence[Item]]
) -> Weighting | None:
    """How lm-eval averaged a group; None if it has no score, or one that is neither mean."""
    if not benchmark.members or metric not in benchmark.scores:
        return "items" if not benchmark.members else None
    value = benchmark.scores[metric].value
    values = [_plain(items, name, metric) for name, items in members.items()]
    pooled = [each for some in values for each in some]
    if math.isclose(math.fsum(pooled) / len(pooled), value, rel_tol=1e-6, abs_tol=1e-9):
        return "items"
    means = [math.fsum(some) / len(some) for some in values]
    is_macro = math.isclose(math.fsum(means) / len(means), value, rel_tol=1e-6, abs_tol=1e-9)
    return "members" if is_macro else None


def paired_scores(
    dense: Mapping[str, Sequence[Item]],
    other: Mapping[str, Sequence[Item]],
    metric: str,
    weighting: Weighting,
    chance: float | None = None,
) -> PairedScores:
    """A task from its items.

    Args:
        dense: by benchmark, one for each member of a group.
        other: the same; where it was stopped early the first ones of them.
        metric: as in `metric_of`.
        weighting: of a group.
        chance: what guessing scores; None: one over the number of choices.

    Raises:
        InputError: the other model answered items that the dense one did not.
    """
    first: list[float] = []
    second: list[float] = []
    weights: list[float] = []
    numbers: list[int] = []
    guessed: list[float] = []
    total = sum(len(values_by_item(other[name], name, metric)) for name in dense)
    for number, name in enumerate(dense):
        a, b = (values_by_item(items[name], name, metric) for items in (dense, other))
        if strangers := b.keys() - a.keys():
            raise InputError(
                f"a paired comparison on {name} needs the same items for both models, "
                f"{len(strangers)} of {len(b)} were not asked of the dense one"
            )
        _check_prompts(dense[name], other[name], name)
        first += [a[key][0] for key in b]
        second += [value for value, _ in b.values()]
        weights += [1 / total if weighting == "items" else 1 / len(dense) / len(b)] * len(b)
        numbers += [number] * len(b)
        choices = {(item.doc_id, item.doc_hash): len(item.loglikelihoods) for item in dense[name]}
        guessed += [1 / choices[key] if choices[key] > 1 else 0.0 for key in b]
    share = np.array(weights)
    return PairedScores(
        np.array(first), np.array(second), share, np.array(numbers),
        float(share @ np.array(guessed)) if chance is None else chance,
    )  # fmt: skip


def paired_losses(dense: Sequence[Item], other: Sequence[Item], task: str) -> PairedLoss:
    """A rolling task in bits per byte, weighted by the bytes of its documents."""
    a, b = (values_by_item(items, task, ROLLING) for items in (dense, other))
    bits = [[-values[key][0] / math.log(2) for key in b] for values in (a, b)]
    return PairedLoss(paired_ratio(bits[0], bits[1], [b[key][1] for key in b]), math.log(2))


def _check_prompts(dense: Sequence[Item], other: Sequence[Item], task: str) -> None:
    asked = {(item.doc_id, item.doc_hash): item.prompt_hash for item in dense}
    for item in other:
        if item.prompt_hash != asked.get((item.doc_id, item.doc_hash), item.prompt_hash):
            raise InputError(
                f"the two models read other examples before the items of {task}: they are drawn in "
                "the order of the items; set num_fewshot to 0, or leave evaluation.sequential out"
            )


def _plain(items: Sequence[Item], benchmark: str, metric: str) -> list[float]:
    return [value for value, _ in values_by_item(items, benchmark, metric).values()]
