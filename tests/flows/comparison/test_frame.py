"""Frames: types of columns, conditions, and files that come back as they went."""

import io
from collections.abc import Callable

import pandas as pd
import pytest

from foldstack.compression.errors import InputError
from foldstack.flows.comparison.frame import (
    csv_text,
    json_text,
    parquet_bytes,
    plain_records,
    sort,
    typed_frame,
    where,
)
from foldstack.flows.comparison.result import Comparison
from foldstack.flows.comparison.tables import short_names


def test_columns_have_types_and_the_names_of_mlflow(comparison: Comparison) -> None:
    frame = comparison.frame()
    assert len(frame) == len(comparison.rows) == 7
    types = {str(name): str(frame[name].dtype) for name in frame.columns}
    assert types["label"] == types["cause"] == types["size/grade"] == "string"
    assert types["sparsity"] == types["quality/bits_per_byte"] == "Float64"
    assert types["seed"] == types["size/parameters"] == "Int64"
    assert types["is_best"] == "boolean"
    assert types["made_at"] == "datetime64[us, UTC]"
    numbers = comparison.rows[1].numbers()
    assert numbers["quality/bits_per_byte"] == 1.05
    assert numbers["before_recovery/bits_per_byte"] == pytest.approx(1.15)
    assert set(numbers) <= set(frame.columns)


def test_types_do_not_depend_on_which_rows_there_are(comparison: Comparison) -> None:
    whole = comparison.frame()
    dense = typed_frame(comparison.records()[:1])
    for name in set(whole.columns) & set(dense.columns):
        assert whole[name].dtype == dense[name].dtype, name


def test_dense_has_no_recovery_and_its_quality_is_its_only_one(comparison: Comparison) -> None:
    dense = plain_records(comparison.frame())[0]
    assert dense["quality/bits_per_byte"] == 1.0
    assert dense["before_recovery/bits_per_byte"] is None
    assert dense["sparsity"] is None


def test_parquet_comes_back_whole(comparison: Comparison) -> None:
    frame = comparison.frame()
    back = pd.read_parquet(io.BytesIO(parquet_bytes(frame)))
    pd.testing.assert_frame_equal(back, frame)


def test_csv_and_json_hold_every_number(comparison: Comparison) -> None:
    frame = comparison.frame()
    csv = pd.read_csv(io.StringIO(csv_text(frame)))
    records = pd.read_json(io.StringIO(json_text(frame)))
    for read in (csv, records):
        assert list(read["label"]) == [row.label for row in comparison.rows]
        for row, value in zip(comparison.rows, read["quality/bits_per_byte"], strict=True):
            assert row.state == "failed" or value == row.final["bits_per_byte"]


@pytest.mark.parametrize(
    ("condition", "labels"),
    [
        ("speed>1.1", ["shortgpt 0.10", "shortgpt 0.30"]),
        ("speed >= 1.1", ["shortgpt 0.10", "shortgpt 0.30", "modegpt 0.30"]),
        ("sparsity=0.1", ["shortgpt 0.10", "modegpt 0.10"]),
        ("method ~ GPT", ["shortgpt 0.10", "modegpt 0.10", "shortgpt 0.30", "modegpt 0.30"]),
        ("state != done", ["mka 0.30"]),
        ("quality/bits_per_byte<1.02", ["dense", "modegpt 0.10"]),
        ("is_best=true", ["modegpt 0.10", "modegpt 0.30"]),
        ("settings=", []),
    ],
)
def test_conditions(condition: str, labels: list[str], comparison: Comparison) -> None:
    """A row without the value fulfils none of them, not even !=."""
    frame = comparison.frame()
    assert list(where(frame, condition, short_names(frame))["label"]) == labels


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("speed", "NAME OP VALUE"),
        ("speeed>1", "did you mean speed?"),
        ("speed>fast", "speed is a number, got 'fast'"),
    ],
)
def test_conditions_that_are_none(condition: str, sentence: str, comparison: Comparison) -> None:
    frame = comparison.frame()
    with pytest.raises(InputError, match=r"column|number|condition") as caught:
        where(frame, condition, short_names(frame))
    assert sentence in str(caught.value)


def test_sorting_both_ways_keeps_what_is_missing_last(comparison: Comparison) -> None:
    frame = comparison.frame()
    ordered = sort(frame, ["sparsity", "-speed"], short_names(frame))
    assert list(ordered["label"]) == [
        "shortgpt 0.10", "modegpt 0.10", "shortgpt 0.30", "modegpt 0.30", "svd_llm 0.30",
        "mka 0.30", "dense",
    ]  # fmt: skip


def test_several_sweeps_are_one_frame(make_comparison: Callable[..., Comparison]) -> None:
    first, second = make_comparison(), make_comparison(title="other", sweep="ba9876543210")
    frame = typed_frame([*first.records(), *second.records()])
    assert list(frame["title"]) == ["small", "other"]
