"""Tables for people: which columns there are, and what fits."""

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from foldstack.compression.errors import InputError
from foldstack.flows.comparison.result import Comparison, Row
from foldstack.flows.comparison.tables import (
    arranged,
    chosen,
    columns,
    count,
    markdown,
    minutes,
    records,
)
from foldstack.flows.comparison.terminal import print_result, result_table


def names(comparison: Comparison) -> list[str]:
    return [column.name for column in columns(comparison.frame())]


def shown(comparison: Comparison, width: int, *, is_screen: bool = True) -> list[str]:
    """Lines of the result as a console of this width shows it."""
    stream = io.StringIO()
    print_result(
        comparison,
        Console(file=stream, width=width, force_terminal=is_screen, color_system=None),
    )
    return stream.getvalue().splitlines()


def test_what_nobody_measured_is_no_column(
    comparison: Comparison, make_row: Callable[..., Row], make_comparison: Callable[..., Comparison]
) -> None:
    assert names(comparison) == [
        "model", "size", "removed", "before", "quality", "difference", "speed", "quiz_before",
        "quiz", "quiz_difference", "quiz_stability", "tokens", "compress", "recover", "grade",
    ]  # fmt: skip
    plain = make_row("x", 0.2, 1.1, after={}, before={"bits_per_byte": 1.1}, speed=1.0,
                     beside_dense={}, seconds={})  # fmt: skip
    plain = plain.model_copy(update={"speed": {}})
    dense = make_comparison().rows[0].model_copy(update={"speed": {}, "before": {}})
    bare = make_comparison(plain).model_copy(update={"rows": (dense, plain)})
    assert names(bare) == ["model", "size", "removed", "quality", "grade"]


@pytest.mark.parametrize("is_screen", [True, False])
@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_table_fits_and_tells_first_what_decides(
    width: int, is_screen: bool, comparison: Comparison
) -> None:
    lines = shown(comparison, width, is_screen=is_screen)
    assert max(map(len, lines)) <= width
    best = next(line for line in lines if "modegpt 0.30 *" in line)
    for text in ("700 k", "1.100", "+0.100 ±0.010", "1.10"):
        assert text in best
    assert "…" not in "".join(lines)


def test_wider_consoles_have_more_columns(comparison: Comparison) -> None:
    def num_columns(width: int) -> int:
        console = Console(width=width, force_terminal=True)
        return len(result_table(comparison.frame(), console).columns)

    assert 5 <= num_columns(80) < num_columns(120) < num_columns(200) == len(names(comparison))


def test_the_last_lines_say_what_was_found(comparison: Comparison) -> None:
    said = " ".join(shown(comparison, 80))
    assert said.index("At 10 % modegpt is best") > said.index("0 of 9 stages from the store")
    assert said.endswith("1 of 7 models failed: mka 0.30.")


def test_names_are_no_markup(comparison: Comparison) -> None:
    rows = [row.model_copy(update={"label": f"{row.label} [red]"}) for row in comparison.rows]
    lines = shown(comparison.model_copy(update={"title": "[bold]", "rows": tuple(rows)}), 120)
    assert lines[0].strip() == "[bold]"
    assert sum("0.30 [red]" in line for line in lines[:20]) == 4


def test_rows_are_read_by_size_and_quality(comparison: Comparison) -> None:
    assert list(arranged(comparison.frame())["label"]) == [
        "dense", "modegpt 0.10", "shortgpt 0.10", "modegpt 0.30", "shortgpt 0.30", "svd_llm 0.30",
        "mka 0.30",
    ]  # fmt: skip


def test_columns_are_chosen_by_short_names_and_by_those_of_the_frame(
    comparison: Comparison,
) -> None:
    frame = comparison.frame()
    found = chosen(frame, ["model", "speed", "time/compress_seconds"])
    assert [column.source for column in found] == [
        "label", "speed/decode_speedup", "time/compress_seconds",
    ]  # fmt: skip
    assert markdown(frame, found).splitlines()[2:4] == [
        "| dense | 1.00 |  |", "| shortgpt 0.10 | 1.20 | 90 |",
    ]  # fmt: skip
    with pytest.raises(InputError, match="did you mean quality"):
        chosen(frame, ["qualty"])


def test_markdown_escapes_and_marks_failures(comparison: Comparison) -> None:
    rows = tuple(row.model_copy(update={"label": row.label.replace(" ", "|")})
                 for row in comparison.rows)  # fmt: skip
    text = markdown(comparison.model_copy(update={"rows": rows}).frame())
    lines = text.splitlines()
    assert all(line.replace("\\|", "").count("|") == lines[0].count("|") for line in lines)
    assert "| mka\\|0.30 | failed |" in text


def test_what_failed_after_it_was_measured_shows_no_figures(comparison: Comparison) -> None:
    best = comparison.rows[5].model_copy(update={"state": "failed", "cause": "recover: no memory"})
    rows = (*comparison.rows[:5], best)
    text = markdown(comparison.model_copy(update={"rows": rows}).frame())
    assert text.splitlines()[-1].startswith("| modegpt 0.30 | failed |  |")
    assert "1.100" not in text.splitlines()[-1]


def test_records_hold_numbers_and_no_texts_of_numbers(comparison: Comparison) -> None:
    best = next(row for row in records(comparison.frame()) if row["model"] == "modegpt 0.30")
    assert best["bits/byte"] == 1.1
    assert best["over dense"] == pytest.approx(0.1)
    assert best["± over dense"] == 0.01
    assert best["size"] == 700_000


def test_units() -> None:
    assert [count(value) for value in (999, 3_955_392, 8.03e9)] == ["999", "3.955 M", "8.03 B"]
    assert [minutes(value) for value in (3.456, 186, 8640)] == ["3.46 s", "3.1 min", "2.4 h"]
