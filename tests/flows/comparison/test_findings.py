"""What a sweep found, in words."""

from collections.abc import Callable

import pytest

from foldstack.flows.comparison.findings import findings, ties
from foldstack.flows.comparison.result import Comparison, Rival, Row

MakeRow = Callable[..., Row]
MakeComparison = Callable[..., Comparison]


def test_each_size_has_its_sentence(comparison: Comparison) -> None:
    assert findings(comparison) == [
        "At 10 % modegpt is best: 0.010 ± 0.001 bits per byte above dense (+1.0 %), decoding "
        "slower than dense (0.90 times as fast); quiz -5.0 ± 2.0 points; shortgpt decodes 1.20 "
        "times as fast as dense (+0.050 ± 0.010 bits per byte).",
        "At 30 % modegpt is best: 0.100 ± 0.010 bits per byte above dense (+10.0 %), decoding 1.10 "
        "times as fast; quiz -5.0 ± 2.0 points; shortgpt decodes 1.45 times as fast as dense "
        "(+0.200 ± 0.010 bits per byte); shortgpt and svd_llm cannot be told apart.",
        "1 of 7 models failed: mka 0.30.",
    ]


def test_being_level_is_not_handed_on(make_row: MakeRow, make_comparison: MakeComparison) -> None:
    """a and b are level, b and c too, a and c are not: two groups, and no third within them."""
    rows = [make_row(name, 0.2, quality) for name, quality in
            [("a", 1.1), ("b", 1.115), ("c", 1.13), ("d", 1.5)]]  # fmt: skip
    comparison = make_comparison(*rows, pair_error=0.01)
    assert ties(comparison, comparison.by_sparsity()[0.2]) == [["a", "b"], ["b", "c"]]
    wide = make_comparison(*rows, pair_error=0.02)
    assert ties(wide, wide.by_sparsity()[0.2]) == [["a", "b", "c"]]
    assert "a, b and c cannot be told apart" in findings(wide)[0]


def test_level_means_within_a_95_per_cent_interval() -> None:
    assert Rival(row="b", lower="a", difference=0.0195, stderr=0.01).is_level
    assert not Rival(row="b", lower="a", difference=0.0197, stderr=0.01).is_level


@pytest.mark.parametrize(
    ("quality", "error", "speed", "told"),
    [
        (1.003, 0.002, 1.01, "this text cannot tell it from dense (+0.003 ± 0.002 bits per byte), "
         "decoding as fast as dense"),
        (0.98, 0.002, 1.5, "0.020 ± 0.002 bits per byte below dense (-2.0 %), decoding 1.50"),
        (1.0004, 0.00004, 0.5, "0.00040 ± 0.00004 bits per byte above dense (+0.0 %), decoding "
         "slower than dense (0.50 times as fast)"),
    ],
)  # fmt: skip
def test_signs_errors_and_speeds(
    quality: float, error: float, speed: float, told: str,
    make_row: MakeRow, make_comparison: MakeComparison,
) -> None:  # fmt: skip
    (sentence,) = findings(make_comparison(make_row("x", 0.2, quality, error, speed)))
    assert sentence.startswith(f"At 20 % x is the only variant: {told}")


def test_a_score_that_may_not_have_changed_says_so(
    make_row: MakeRow, make_comparison: MakeComparison
) -> None:
    row = make_row("x", 0.2, 1.1)
    noisy = row.model_copy(
        update={"beside_dense": row.beside_dense | {"quiz/acc_difference_stderr": 0.03}}
    )
    assert "quiz -5.0 ± 3.0 points, which may be no change" in findings(make_comparison(noisy))[0]


def test_what_was_not_measured_is_not_told(
    make_row: MakeRow, make_comparison: MakeComparison
) -> None:
    row = make_row("x", 0.2, 1.1, speed=2.0).model_copy(update={"speed": {}, "beside_dense": {}})
    assert findings(make_comparison(row)) == ["At 20 % x is the only variant: 1.100 bits per byte."]
    silent = row.model_copy(update={"before": {}, "after": {}})
    assert "none of the variants is called the best" in findings(make_comparison(silent))[0]
    assert findings(make_comparison()) == []


def test_best_that_knows_speed_and_size(make_row: MakeRow, make_comparison: MakeComparison) -> None:
    """The fastest of those within 2 % of the lowest; what is level counts as near, however far."""
    rows = [
        make_row("low", 0.2, 1.10, speed=0.9),
        make_row("near", 0.2, 1.12, speed=1.1),
        make_row("far", 0.2, 1.20, speed=1.6, structure={"parameters": 1}),
    ]
    by = {"best_by": "speed_at_quality", "best_within": 0.02}
    assert make_comparison(*rows).best()[0.2].method == "low"
    chosen = make_comparison(*rows, **by)
    assert chosen.best()[0.2].method == "near"
    assert findings(chosen)[0].startswith(
        "At 20 % near is best, the fastest of those near the lowest in bits per byte: 0.120"
    )
    assert "within 0.02 of the lowest" in chosen.best_rule
    assert make_comparison(*rows, **by, pair_error=0.1).best()[0.2].method == "far"
    smallest = make_comparison(*rows, best_by="size_at_quality", best_within=0.1)
    assert smallest.best()[0.2].method == "far"


def test_seeds_are_told_apart(make_row: MakeRow, make_comparison: MakeComparison) -> None:
    rows = [make_row("x", 0.2, 1.1 + seed / 10, seed=seed, label=f"x 0.20 seed {seed}")
            for seed in (0, 1)]  # fmt: skip
    assert findings(make_comparison(*rows))[0].startswith("At 20 % x seed 0 is best")


def test_what_was_expected_stands_beside_what_was_measured(
    make_row: MakeRow, make_comparison: MakeComparison
) -> None:
    """Without it nobody sees that changes add up to less than they cost together."""
    forecast = {
        "kl_added": 0.08, "kl": 0.11, "kl_stderr": 0.006, "loss_rise": 0.104,
        "loss_rise_stderr": 0.004, "prefill_seconds": 0.75, "decode_seconds": 0.8,
    }  # fmt: skip
    row = make_row("search", 0.3, 1.2, forecast=forecast)
    row = row.model_copy(update={"speed": {"prefill_speedup": 1.25, "decode_speedup": 1.0}})
    assert findings(make_comparison(row))[1] == (
        "search 0.30: its changes cost 0.080 nats per token when each is made alone, "
        "0.110 ± 0.006 together; the loss rose by 0.104 ± 0.004 before recovery; reading was to "
        "take 0.75 of the dense model's time and takes 0.80; writing was to take 0.80 of the dense "
        "model's time and takes 1.00."
    )
    assert row.numbers()["forecast/kl"] == 0.11
