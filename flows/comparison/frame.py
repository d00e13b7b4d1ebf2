"""Rows as a pandas frame: typed columns, what is asked for of them, and formats of files."""

import io
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

from foldstack.compression.errors import InputError
from foldstack.flows.config.config_errors import did_you_mean

TYPES = {
    "made_at": "datetime64[us, UTC]", "sparsity": "Float64", "seed": "Int64", "is_best": "boolean",
    "title": "string", "sweep": "string", "base_model": "string", "label": "string",
    "method": "string", "state": "string", "cause": "string", "folder": "string",
    "settings": "string",
}  # fmt: skip
"""Of the columns that every frame has."""
COMPARED: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le, ">=": operator.ge, "!=": operator.ne, "==": operator.eq,
    "<": operator.lt, ">": operator.gt, "=": operator.eq,
}  # fmt: skip
CONDITION = re.compile(r"\s*(?P<name>.+?)\s*(?P<how><=|>=|!=|==|<|>|=|~)\s*(?P<value>.*?)\s*")


def typed_frame(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per record. A column's type follows from what its values are, and not from how many
    of them are there: whole numbers Int64, other numbers Float64, and so on; what a record lacks
    is missing.
    """
    names = dict.fromkeys([*TYPES, *(name for record in records for name in record)])
    columns = {name: [record.get(name) for record in records] for name in names}
    return pd.DataFrame(
        {
            name: pd.Series(values, dtype=TYPES.get(name) or _type_of(values))
            for name, values in columns.items()
        }
    )


def _type_of(values: Iterable[Any]) -> str:
    kinds = {type(value) for value in values if value is not None}
    if str in kinds:
        return "string"
    if kinds == {bool}:
        return "boolean"
    return "Int64" if kinds == {int} else "Float64"


def plain_records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows as plain Python values, None where one is missing."""
    names = [str(name) for name in frame.columns]
    rows = frame.astype(object).where(frame.notna(), None).itertuples(index=False, name=None)
    return [dict(zip(names, row, strict=True)) for row in rows]


def where(frame: pd.DataFrame, condition: str, short: Mapping[str, str]) -> pd.DataFrame:
    """The rows for which `NAME OP VALUE` holds: = != < <= > >=, or ~ for "contains".

    Args:
        frame: the rows.
        condition: e.g. "sparsity<=0.3", "quality < 1.3", "method ~ share". Rows without a value
            do not fulfil any.
        short: columns of the frame by names that are easier to type.

    Raises:
        InputError: it is no condition, or the column does not exist or holds something else.
    """
    match = CONDITION.fullmatch(condition)
    if match is None:
        raise InputError(f"a condition is NAME OP VALUE, like speed>1, got {condition!r}")
    name, how, value = match["name"], match["how"], match["value"]
    column = frame[column_of(frame, name, short)]
    if how == "~":
        holds = column.astype("string").str.contains(value, case=False, regex=False)
    elif pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
        try:
            number = float(value)
        except ValueError:
            raise InputError(f"{name} is a number, got {value!r} in {condition!r}") from None
        holds = COMPARED[how](column, number)
    else:
        holds = COMPARED[how](column.astype("string").str.lower(), value.lower())
    return frame[holds.fillna(False).astype(bool)]


def sort(frame: pd.DataFrame, keys: Sequence[str], short: Mapping[str, str]) -> pd.DataFrame:
    """The rows by the first key, then the next; a key that begins with "-" from high to low.

    Raises:
        InputError: there is no such column.
    """
    names = [column_of(frame, key.removeprefix("-"), short) for key in keys]
    return frame.sort_values(
        names, ascending=[not key.startswith("-") for key in keys], kind="stable"
    )


def column_of(frame: pd.DataFrame, name: str, short: Mapping[str, str]) -> str:
    """The column that a short name or its own one means.

    Raises:
        InputError: there is none.
    """
    chosen = short.get(name, name)
    if chosen in frame.columns:
        return chosen
    known = [*short, *map(str, frame.columns)]
    hint = did_you_mean(name, known) or f"; short names are {', '.join(short)}"
    raise InputError(f"there is no column {name} in these sweeps{hint}")


def csv_text(frame: pd.DataFrame) -> str:
    """The frame as CSV."""
    text: str = frame.to_csv(index=False, lineterminator="\n")
    return text


def json_text(frame: pd.DataFrame) -> str:
    """The frame as JSON: a list with one object per row."""
    text: str = frame.to_json(orient="records", date_format="iso", double_precision=15, indent=1)
    return text


def parquet_bytes(frame: pd.DataFrame) -> bytes:
    """The frame as Parquet, every column in its type."""
    stream = io.BytesIO()
    frame.to_parquet(stream, index=False, engine="pyarrow")
    return stream.getvalue()
