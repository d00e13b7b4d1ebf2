"""A compressed model beside the dense one: pairs of windows and of items, by hand."""

import math
from collections.abc import Sequence

import pytest

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.beside_dense import Evaluation, beside_dense, loss_difference
from foldstack.compression.evaluation.paired import Item
from foldstack.compression.evaluation.records import (
    Benchmark,
    PerplexityProtocol,
    PerplexityResult,
    Score,
)
from foldstack.compression.evaluation.stability import stability

TOKENS = (10, 10, 4)
NUM_BYTES = 60
OPTIONS = [(-1.0, -3.0), (-2.0, -2.5), (-0.5, -6.0), (-4.0, -1.0)]


def loss(nll: Sequence[float], tokens: Sequence[int] = TOKENS) -> PerplexityResult:
    mean = sum(nll) / sum(tokens)
    return PerplexityResult(
        perplexity=math.exp(mean),
        nll=mean,
        bits_per_byte=sum(nll) / math.log(2) / NUM_BYTES,
        num_tokens=sum(tokens),
        num_bytes=NUM_BYTES,
        num_unknown=0,
        num_windows=len(nll),
        window_nll=tuple(nll),
        window_tokens=tuple(tokens),
        dtype="float32",
        protocol=PerplexityProtocol(),
    )


def items_of(benchmark: str, right: Sequence[float]) -> list[Item]:
    return [
        Item(
            benchmark=benchmark, doc_id=number, doc_hash=f"{benchmark}{number}", filter="none",
            target="", loglikelihoods=OPTIONS[number], choice_tokens=(1, 2),
            metrics={"acc": value},
        )
        for number, value in enumerate(right)
    ]  # fmt: skip


def benchmark_of(
    items: Sequence[Item], metric: str = "acc", value: float | None = None
) -> Benchmark:
    mean = sum(float(str(item.metrics[metric])) for item in items) / len(items)
    score = Score(value=mean if value is None else value, stderr=None, higher_is_better=True)
    return Benchmark(version="1", num_fewshot=0, num_items=len(items), scores={metric: score})


def evaluation(nll: Sequence[float], *answers: list[Item], **groups: Benchmark) -> Evaluation:
    benchmarks = {items[0].benchmark: benchmark_of(items) for items in answers}
    return Evaluation(loss(nll), benchmarks | groups, [item for items in answers for item in items])


def test_losses_pair_by_window() -> None:
    dense, compressed = evaluation((20.0, 30.0, 8.0)), evaluation((25.0, 35.0, 10.0))
    found = beside_dense(dense, compressed)
    bits = [each.perplexity.bits_per_byte or 0 for each in (dense, compressed)]
    assert found["bits_per_byte_difference"] == pytest.approx(bits[1] - bits[0])
    # Every window loses half a nat per token more: no window speaks against it.
    assert found["bits_per_byte_difference_stderr"] == pytest.approx(0, abs=1e-12)
    uneven = beside_dense(dense, evaluation((20.0, 40.0, 10.0)))
    residuals = [0 - 5, 10 - 5, 2 - 2]
    per_token = math.sqrt(sum(r * r for r in residuals) * 3 / 2) / 24
    assert uneven["bits_per_byte_difference"] == pytest.approx(12 / math.log(2) / NUM_BYTES)
    assert uneven["bits_per_byte_difference_stderr"] == pytest.approx(
        per_token * 24 / math.log(2) / NUM_BYTES
    )


def test_items_pair_whatever_their_order_and_each_benchmark_by_itself() -> None:
    before = items_of("a", (1, 1, 0, 1)), items_of("b", (1, 0, 1))
    after = items_of("a", (1, 0, 1, 0))[::-1], items_of("b", (1, 0, 1))
    found = beside_dense(evaluation((1, 2, 3), *before), evaluation((1, 2, 3), *after))
    assert found["a/acc_difference"] == pytest.approx(-0.25)
    assert found["a/acc_mcnemar_p"] == 1.0  # two against one
    assert found["a/acc_difference_stderr"] == pytest.approx(
        math.sqrt((0.0625 + 2 * 0.5625 + 1.5625) / 3 / 4)
    )
    told = stability(before[0], after[0], "a")
    assert found["a/stability"] == told.stability
    assert found["a/agreement"] == 0.25
    assert found["a/stability_items"] == told.effective_items
    assert found["b/acc_difference"] == found["b/acc_difference_stderr"] == 0
    assert found["b/stability"] == found["b/agreement"] == 1


def test_a_group_has_the_plain_mean_of_its_members() -> None:
    before = items_of("a", (1, 1, 0, 1)), items_of("b", (1, 0, 1))
    after = items_of("a", (1, 0, 1, 0)), items_of("b", (1, 0, 1))
    score = {"acc": Score(value=0.5, stderr=None, higher_is_better=True)}
    inner, outer = (
        Benchmark(version="1", num_fewshot=0, num_items=0, members=members, scores=score)
        for members in (("b",), ("a", "inner"))
    )
    found = beside_dense(
        evaluation((1, 2, 3), *before, inner=inner, outer=outer),
        evaluation((1, 2, 3), *after, inner=inner, outer=outer),
    )
    assert found["outer/stability"] == pytest.approx((found["a/stability"] + 1) / 2)
    assert found["outer/agreement"] == pytest.approx((0.25 + 1) / 2)
    assert found["inner/stability"] == 1
    assert "outer/acc_difference" not in found


def test_what_is_no_mean_of_items_is_left_out() -> None:
    """lm-eval keeps (gold, answer) of an item for F1: neither is a part of the score."""
    items = [
        item.model_copy(update={"metrics": {"f1": (1.0, float(item.doc_id % 2))}})
        for item in items_of("a", (0, 0, 0, 0))
    ]
    pairs = Benchmark(
        version="1", num_fewshot=0, num_items=4,
        scores={"f1": Score(value=0.66, stderr=None, higher_is_better=True)},
    )  # fmt: skip
    one = Evaluation(loss((1, 2, 3)), {"a": pairs}, items)
    assert [name for name in beside_dense(one, one) if name.startswith("a/")] == []
    answers = items_of("a", (1, 0, 1, 0))
    odd = Evaluation(loss((1, 2, 3)), {"a": benchmark_of(answers, value=0.9)}, answers)
    assert "a/acc_difference" not in beside_dense(odd, odd)


def test_one_window_or_item_has_no_error_and_so_no_difference() -> None:
    alone = Evaluation(
        loss((3.0,), (10,)), {"a": benchmark_of(items_of("a", (1,)))}, items_of("a", (1,))
    )
    assert beside_dense(alone, alone) == {}


def test_other_windows_and_items_are_refused() -> None:
    first = evaluation((1, 2, 3), items_of("a", (1, 0, 1)))
    with pytest.raises(InputError, match="got 3 windows of 24 tokens and 60 bytes, and 3 of 25"):
        loss_difference(first.perplexity, loss((1, 2, 3), (10, 10, 5)))
    with pytest.raises(InputError, match="same items for both models, 1 of 3"):
        beside_dense(first, evaluation((1, 2, 3), items_of("a", (1, 0))))
