"""LLM-Streamline's stability (llm_streamline.md, acceptance test 9)."""

import math

import pytest

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.paired import Item
from foldstack.compression.evaluation.stability import stability

Options = tuple[float, ...]


def items_of(answers: list[tuple[float, Options]], metric: str = "acc") -> list[Item]:
    return [
        Item(
            benchmark="b", doc_id=number, doc_hash=f"h{number}", filter="none", target="",
            loglikelihoods=options, choice_tokens=(1,) * len(options), metrics={metric: right},
        )
        for number, (right, options) in enumerate(answers)
    ]  # fmt: skip


def test_equal_spreads_give_plain_agreement() -> None:
    before = items_of([(1, (-1, -3)), (1, (-2, 0)), (0, (-5, -7)), (0, (-1, 1))])
    after = items_of([(1, (0, 0)), (0, (0, 0)), (1, (0, 0)), (0, (0, 0))])
    found = stability(before, after, "b")
    assert found.stability == pytest.approx(0.5)
    assert (found.agreement, found.num_items) == (0.5, 4)
    assert found.effective_items == pytest.approx(4)
    assert (found.right_to_wrong, found.wrong_to_right) == (1, 1)


def test_an_option_counts_by_its_mean_per_token() -> None:
    """Long options have large sums, which say nothing of how sure the model is."""
    short = items_of([(1, (-1.0, -3.0)), (1, (-2.0, -2.0))])
    long = [
        item.model_copy(
            update={
                "loglikelihoods": tuple(40 * value for value in item.loglikelihoods),
                "choice_tokens": (40, 40),
            }
        )
        for item in short
    ]
    after = items_of([(0, (0.0, 0.0)), (1, (0.0, 0.0))])
    assert stability(long, after, "b").stability == pytest.approx(
        stability(short, after, "b").stability
    )


def test_by_hand_with_one_confident_item_flipped() -> None:
    """Spreads with k - 1: of (-1, -3) sqrt(2), of (0, 0) 0, of (-1, -2, -3) 1."""
    before = items_of([(1, (-1.0, -3.0)), (1, (0.0, 0.0)), (0, (-1.0, -2.0, -3.0))])
    after = items_of([(0, (9.0, 9.0)), (1, (9.0, 9.0)), (0, (9.0, 9.0, 9.0))])
    found = stability(before, after, "b")
    flipped, kept = math.exp(math.sqrt(2)), 1 + math.e
    assert found.stability == pytest.approx(kept / (kept + flipped))
    assert found.agreement == pytest.approx(2 / 3)
    squares = flipped**2 + 1 + math.e**2
    assert found.effective_items == pytest.approx((kept + flipped) ** 2 / squares)


def test_the_order_of_the_items_changes_nothing() -> None:
    """The released script fails this."""
    before = items_of([(1, (-1, -9)), (0, (0, 0)), (1, (-2, -3)), (1, (-4, -4.5))])
    after = items_of([(1, (0, 0)), (1, (0, 0)), (0, (0, 0)), (1, (0, 0))])
    expected = stability(before, after, "b")
    assert stability(before[::-1], [after[i] for i in (2, 0, 3, 1)], "b") == expected


def test_the_weights_are_the_originals_alone() -> None:
    before = items_of([(1, (-1, -9)), (0, (0, 0))])
    after = items_of([(0, (0, 0)), (0, (-1, -9))])
    assert stability(before, after, "b").stability < 0.01
    assert stability(after, before, "b").stability > 0.99


def test_very_confident_items_do_not_overflow() -> None:
    before = items_of([(1, (-1, -5000)), (0, (0, 0))])
    after = items_of([(1, (0, 0)), (1, (0, 0))])
    assert stability(before, after, "b").stability == pytest.approx(1)


def test_what_cannot_be_compared_is_refused() -> None:
    items = items_of([(1, (-1, -2)), (0, (-1, -2))])
    with pytest.raises(InputError, match="1 of 2 have no counterpart"):
        stability(items, items[:1], "b")
    with pytest.raises(InputError, match="no item of benchmark c has a metric 'acc'"):
        stability(items, items, "c")
    for options in ((-1.0,), (-math.inf, -1.0)):
        odd = items_of([(1, options)])
        with pytest.raises(InputError, match=r"at least 2 options, got .* document 0 of b"):
            stability(odd, odd, "b")
    graded = items_of([(0.5, (-1, -2))])
    with pytest.raises(InputError, match=r"0 or 1, got acc = 0\.5"):
        stability(graded, graded, "b")
