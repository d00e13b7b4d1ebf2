"""A small comparison with everything that its pages show."""

from collections.abc import Callable
from datetime import UTC, datetime
from itertools import combinations
from typing import Any

import pytest

from foldstack.flows.comparison.result import Comparison, Rival, Row

MakeRow = Callable[..., Row]

BITS = "bits_per_byte"


@pytest.fixture
def make_row() -> MakeRow:
    """Maker of a finished variant: its quality, and beside dense (1.0) the error; its speed."""

    def make(
        method: str, sparsity: float, quality: float, error: float = 0.01, speed: float = 1.0,
        **more: Any,
    ) -> Row:  # fmt: skip
        facts: dict[str, Any] = {
            "label": f"{method} {sparsity:.2f}",
            "method": method,
            "sparsity": sparsity,
            "seed": 0,
            "settings": {"name": method, "sparsity": sparsity, "rank": 7, "allocation": None},
            "structure": {
                "parameters": round(1e6 * (1 - sparsity)), "realised_sparsity": sparsity,
                "grade": "native",
            },
            "before": {BITS: quality + 0.1, "quiz/acc": 0.5},
            "after": {BITS: quality, "quiz/acc": 0.55},
            "beside_dense": {
                f"{BITS}_difference": quality - 1.0, f"{BITS}_difference_stderr": error,
                "quiz/acc_difference": -0.05, "quiz/acc_difference_stderr": 0.02,
                "quiz/stability": 0.9,
            },
            "speed": {"decode_speedup": speed, "decode_tokens_per_second": 100 * speed},
            "seconds": {"compress": 90.0, "recover": 150.0},
        }  # fmt: skip
        return Row(**facts | more)

    return make


@pytest.fixture
def make_comparison(make_row: MakeRow) -> Callable[..., Comparison]:
    """Maker of a comparison of some rows with the dense model; errors of pairs as given."""

    def make(*rows: Row, pair_error: float = 0.01, **more: Any) -> Comparison:
        dense = Row(
            label="dense", method="dense", structure={"parameters": 1_000_000},
            before={BITS: 1.0, "quiz/acc": 0.6, "quiz/acc_stderr": 0.03},
            speed={"decode_speedup": 1.0, "decode_tokens_per_second": 100.0},
        )  # fmt: skip
        facts: dict[str, Any] = {
            "title": "small", "sweep": "0123456789ab", "model": "some/tiny",
            "rows": (dense, *rows), "made_at": datetime(2026, 11, 30, 9, tzinfo=UTC),
            "num_stages": 9,
        }  # fmt: skip
        comparison = Comparison(**facts | more)
        pairs = [
            Rival(row=b.label, lower=a.label, stderr=pair_error,
                  difference=(b.number(BITS) or 0) - (a.number(BITS) or 0))
            for level in comparison.by_sparsity().values() for a, b in combinations(level, 2)
        ]  # fmt: skip
        return comparison.model_copy(update={"rivals": tuple(pairs)})

    return make


@pytest.fixture
def comparison(make_row: MakeRow, make_comparison: Callable[..., Comparison]) -> Comparison:
    """Two sizes; at the larger one a tie for the second place, and a method that failed."""
    return make_comparison(
        make_row("shortgpt", 0.1, 1.05, speed=1.2),
        make_row("modegpt", 0.1, 1.01, error=0.001, speed=0.9),
        make_row("shortgpt", 0.3, 1.20, speed=1.45),
        make_row("svd_llm", 0.3, 1.21, speed=0.8),
        make_row("modegpt", 0.3, 1.10, speed=1.1),
        Row(label="mka 0.30", method="mka", sparsity=0.3, seed=0, state="failed",
            cause="out of <memory>"),
    )  # fmt: skip
