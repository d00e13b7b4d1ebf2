"""A comparison as tables: of texts for people, and of all its numbers."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from foldstack.flows.comparison.result import QUALITY, Comparison, Row

GOING_ON = ("after", "- dense ±", "stability")
"""Headings of columns that belong to a measure some columns before."""


def columns(comparison: Comparison) -> list[str]:
    """Headings of the table, in order."""
    heads = ["model", "sparsity", "realised", "parameters"]
    heads += ["bits/byte before", "after", "- dense ±"]
    for benchmark, metric in comparison.benchmarks().items():
        heads += [f"{benchmark} {metric} before", "after", "- dense ±"]
        heads += ["stability"] * _has_stability(comparison, benchmark)
    return [*heads, "decode tok/s", "dense beside", "x dense", "grade"]


def cells(comparison: Comparison) -> list[list[str]]:
    """One list of texts per row, under `columns`."""
    return [_cells_of(comparison, row) for row in comparison.rows]


def _cells_of(comparison: Comparison, row: Row) -> list[str]:
    if row.state == "failed":
        empty = [""] * (len(columns(comparison)) - 3)
        return [row.method, _number(row.sparsity, "{:.2f}"), "failed", *empty]
    texts = [
        row.label if row.is_dense else row.method + f" seed {row.seed}" * bool(row.seed),
        _number(row.sparsity, "{:.3g}"),
        _number(row.number("realised_sparsity", "structure"), "{:.3f}"),
        _number(row.number("parameters", "structure"), "{:,.0f}"),
        _number(row.number(QUALITY, "before"), "{:.3f}"),
        _number(row.number(QUALITY, "after"), "{:.3f}"),
        _difference(row, QUALITY),
    ]
    for benchmark, metric in comparison.benchmarks().items():
        name = f"{benchmark}/{metric}"
        texts.append(_number(row.number(name, "before"), "{:.3f}"))
        texts.append(_number(row.number(name, "after"), "{:.3f}"))
        texts.append(_difference(row, name))
        if _has_stability(comparison, benchmark):
            texts.append(_number(row.number(f"{benchmark}/stability", "beside_dense"), "{:.3f}"))
    return [
        *texts,
        _number(row.number("decode_tokens_per_second", "speed"), "{:,.0f}"),
        # Of the same minutes: between the rates of two rows the machine may have changed its pace.
        _number(row.number("dense_decode_tokens_per_second", "speed"), "{:,.0f}"),
        _number(row.number("decode_speedup", "speed"), "{:.2f}"),
        str(row.structure.get("grade") or ""),
    ]


def _has_stability(comparison: Comparison, benchmark: str) -> bool:
    return any(f"{benchmark}/stability" in row.beside_dense for row in comparison.rows)


def _difference(row: Row, name: str) -> str:
    """From the dense model, with the standard error of the pairs; of the dense one its own."""
    if row.is_dense:
        return _number(row.number(f"{name}_stderr"), "±{:.3f}")
    error = _number(row.number(f"{name}_difference_stderr", "beside_dense"), " ±{:.3f}")
    return _number(row.number(f"{name}_difference", "beside_dense"), "{:+.3f}") + error


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def markdown(comparison: Comparison) -> str:
    """The table for a page that renders Markdown."""
    lines = [columns(comparison), ["---"] * len(columns(comparison)), *cells(comparison)]
    return "\n".join("| " + " | ".join(texts) + " |" for texts in lines)


def records(comparison: Comparison) -> list[dict[str, str]]:
    """One mapping of heading to text per row, every heading a different one."""
    heads: list[str] = []
    of = ""  # what a heading that says no measure of its own goes on with
    for head in columns(comparison):
        of = head.removesuffix(" before") if head.endswith(" before") else of
        heads.append(f"{of} {head}" if head in GOING_ON else head)
    return [dict(zip(heads, texts, strict=True)) for texts in cells(comparison)]


def flat(row: Row) -> dict[str, Any]:
    """All numbers of a row by one name each: "after/bits_per_byte", "size/parameters"."""
    values: dict[str, Any] = {
        "label": row.label, "method": row.method, "sparsity": row.sparsity, "seed": row.seed,
        "state": row.state, "cause": row.cause, "folder": row.folder,
    }  # fmt: skip
    parts: Mapping[str, Mapping[str, Any]] = {
        "size": row.structure, "before_recovery": row.before, "after_recovery": row.after,
        "beside_dense": row.beside_dense, "recovery": row.recovery, "speed": row.speed,
        "seconds": row.seconds,
    }  # fmt: skip
    return values | {
        f"{part}/{k}": v for part, numbers in parts.items() for k, v in numbers.items()
    }


def write_csv(comparison: Comparison) -> str:
    """All numbers of all rows as CSV text."""
    rows = [flat(row) for row in comparison.rows]
    heads = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=heads)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
