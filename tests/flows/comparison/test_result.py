"""What a comparison concludes from its rows."""

from pathlib import Path

import pytest

from foldstack.flows.comparison.plots import plot_quality
from foldstack.flows.comparison.result import Comparison, Row


def comparison(**unknown: float) -> Comparison:
    rows = [Row(label="dense", method="dense", before={"bits_per_byte": 2.0})]
    for place, (method, share) in enumerate(unknown.items()):
        facts = {"bits_per_byte": 2.5 + place, "unknown_tokens": share}
        row = Row(label=f"{method} 0.20", method=method, sparsity=0.2, before=facts)
        rows.append(row)
    return Comparison(title="t", sweep="s", model="m", rows=tuple(rows))


def test_a_model_that_does_not_read_the_text_never_wins() -> None:
    found = comparison(blind=1.0, seeing=0.0)
    assert found.best()[0.2].method == "seeing"
    assert found.unread == (
        "100.0% of the text's tokens are unknown to the tokenizer of blind 0.20: what stands there "
        "is not predicted, and perplexity and bits per byte are too low",
    )


def test_what_the_dense_model_does_not_know_either_is_no_disadvantage() -> None:
    found = comparison(one=0.01, other=0.01)
    dense = found.rows[0].model_copy(
        update={"before": {"bits_per_byte": 2.0, "unknown_tokens": 0.01}}
    )
    found = found.model_copy(update={"rows": (dense, *found.rows[1:])})
    assert found.best()[0.2].method == "one"
    assert "dense, one 0.20, other 0.20" in found.unread[0]


def test_a_name_in_letters_that_the_font_lacks_is_no_news(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    facts = {"bits_per_byte": 2.0}
    sizes = {"parameters": 1000}
    rows = tuple(
        Row(label=label, method=label, sparsity=sparsity, before=facts, structure=sizes)
        for label, sparsity in (("dense", None), ("shortgpt", 0.2))
    )
    named = Comparison(title="\u6a21\u578b", sweep="s", model="m", rows=rows)
    assert plot_quality(named, tmp_path / "plot.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_method_whose_recovery_failed_is_no_reason_for_want_of_a_plot(tmp_path: Path) -> None:
    """What was measured of it before is there, and no finished model."""
    facts = {"bits_per_byte": 2.0}
    rows = tuple(
        Row(label=label, method=label, sparsity=sparsity, before=facts, state=state,
            structure={"parameters": 1000})
        for label, sparsity, state in (
            ("dense", None, "done"), ("shortgpt", 0.2, "failed"), ("svd_llm", 0.2, "done")
        )
    )  # fmt: skip
    found = Comparison(title="t", sweep="s", model="m", rows=rows)
    assert plot_quality(found, tmp_path / "plot.png")
