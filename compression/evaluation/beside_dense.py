"""What compression changed, item by item: a model's evaluation beside that of the dense one.

Two models that read the same windows and answered the same items differ by far less noise than two
that did not, because both find the same items hard. So every figure here is of pairs.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose, log
from statistics import fmean

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.paired import (
    Item,
    PairedDifference,
    paired_difference,
    paired_ratio,
)
from foldstack.compression.evaluation.records import Benchmark, PerplexityResult
from foldstack.compression.evaluation.stability import Stability, stability


@dataclass(frozen=True)
class Evaluation:
    """All that was measured of one model's quality."""

    perplexity: PerplexityResult
    benchmarks: Mapping[str, Benchmark]
    items: Sequence[Item]
    """Of all benchmarks."""

    def of(self, benchmark: str) -> Sequence[Item]:
        """The items of one benchmark."""
        return self._by_benchmark.get(benchmark, ())

    @cached_property
    def _by_benchmark(self) -> Mapping[str, Sequence[Item]]:
        found: dict[str, list[Item]] = defaultdict(list)
        for item in self.items:
            found[item.benchmark].append(item)
        return dict(found)


def loss_difference(first: PerplexityResult, second: PerplexityResult) -> PairedDifference:
    """How much more the second model loses per predicted token on the same windows, in nats.

    Raises:
        InputError: they did not read the same windows.
    """
    if first.window_tokens != second.window_tokens or first.num_bytes != second.num_bytes:
        raise InputError(
            "two models' losses pair only on the same windows, got "
            f"{first.num_windows} windows of {first.num_tokens} tokens and {first.num_bytes} "
            f"bytes, and {second.num_windows} of {second.num_tokens} and {second.num_bytes}"
        )
    tokens = [float(count) for count in first.window_tokens]
    return paired_ratio(first.window_nll, second.window_nll, tokens)


def bits_per_byte_difference(
    first: PerplexityResult, second: PerplexityResult
) -> tuple[float, float] | None:
    """The same in bits per byte of text, with its standard error; None where bytes are unknown or
    one window is all there is."""
    if not first.num_bytes or first.num_windows < 2:
        return None
    found = loss_difference(first, second)
    scale = first.num_tokens / first.num_bytes / log(2)
    return found.difference * scale, found.stderr * scale


def beside_dense(dense: Evaluation, compressed: Evaluation) -> dict[str, float]:
    """Differences from the dense model with their standard errors, and LLM-Streamline's stability.

    By name: "bits_per_byte_difference" and "..._stderr"; for every score of a benchmark that is the
    mean of its items "NAME/METRIC_difference", "..._stderr" and, where items are right or wrong,
    "NAME/METRIC_mcnemar_p"; for multiple choice "NAME/stability", "NAME/agreement" and
    "NAME/stability_items" (see `stability`). A group of benchmarks has the plain mean of its
    members' stability. What fewer than two windows or items say has no error, and is left out.

    Raises:
        InputError: the two were not measured on the same windows and items.
    """
    facts: dict[str, float] = {}
    bits = bits_per_byte_difference(dense.perplexity, compressed.perplexity)
    if bits is not None:
        facts["bits_per_byte_difference"], facts["bits_per_byte_difference_stderr"] = bits
    stable: dict[str, Stability] = {}
    for name, metric, found in _paired_scores(dense, compressed):
        score = f"{name}/{metric}"
        facts[f"{score}_difference"] = found.difference
        facts[f"{score}_difference_stderr"] = found.stderr
        if found.mcnemar_p is not None:
            facts[f"{score}_mcnemar_p"] = found.mcnemar_p
        if metric == "acc" and all(_is_choice(item) for item in dense.of(name)):
            stable[name] = stability(dense.of(name), compressed.of(name), name)
            facts[f"{name}/stability_items"] = stable[name].effective_items
    for name in dense.benchmarks:
        members = [stable[each] for each in leaves(name, dense.benchmarks) if each in stable]
        if members:
            facts[f"{name}/stability"] = fmean(member.stability for member in members)
            facts[f"{name}/agreement"] = fmean(member.agreement for member in members)
    return facts


def _paired_scores(
    first: Evaluation, second: Evaluation
) -> Iterator[tuple[str, str, PairedDifference]]:
    """Benchmark, metric and difference of every score that is the mean of its items.

    Others (the F1 of a whole set) are functions of all items at once: what lm-eval keeps of an item
    is no part of them that could be subtracted.
    """
    for name, benchmark in first.benchmarks.items():
        for metric, score in benchmark.scores.items():
            if benchmark.num_items < 2 or not _is_mean(first.of(name), metric):
                continue
            found = paired_difference(first.of(name), second.of(name), name, metric)
            if isclose(found.first, score.value, rel_tol=1e-6, abs_tol=1e-9):
                yield name, metric, found


def _is_choice(item: Item) -> bool:
    return len(item.loglikelihoods) == len(item.choice_tokens) > 1


def _is_mean(items: Sequence[Item], metric: str) -> bool:
    name = metric.partition(",")[0]
    values = [item.metrics[name] for item in items if name in item.metrics]
    is_plain = not any(isinstance(value, tuple) for value in values)
    return bool(values) and (is_plain or name == "bits_per_byte")


def leaves(name: str, benchmarks: Mapping[str, Benchmark]) -> Iterator[str]:
    """The benchmarks with items of their own in a group; of a benchmark itself."""
    members = benchmarks[name].members if name in benchmarks else ()
    if not members:
        yield name
    for member in members:
        yield from leaves(member, benchmarks)
