"""The result of a sweep: one row per variant beside the dense model, as data and as tables."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from foldstack.compression.beside_dense import STANDARD_ERRORS

Facts = dict[str, float | int | str | bool | None]

QUALITY = "bits_per_byte"
"""What the best variant is lowest in, and what the plot shows."""
BEST_RULE = "lowest bits per byte after recovery among the variants of the same sparsity"
GOING_ON = ("after", "- dense ±", "stability")
"""Headings of columns that belong to a measure some columns before."""
SHOWN_METRICS = ("acc", "exact_match", "acc_norm", "f1")
"""A benchmark's column shows the first of these that it has."""


class Row(BaseModel):
    """One variant, or the dense model."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    label: str
    """"dense", or the variant's name: "svd_llm 0.20"."""
    method: str
    sparsity: float | None = None
    """As it was asked for; None for the dense model."""
    seed: int | None = None
    settings: dict[str, Any] = {}
    state: Literal["done", "failed"] = "done"
    cause: str = ""
    """Why it failed."""
    is_input_error: bool = False
    """True when it failed for a mistake of the user's."""
    folder: str = ""
    """The finished model directory."""
    structure: Facts = {}
    """Size and grade of the model."""
    before: Facts = {}
    """Quality right after compression; of the dense model its only one."""
    after: Facts = {}
    """Quality after recovery; empty where there was none."""
    beside_dense: Facts = {}
    """Of the final model: differences from the dense one on the same windows and items."""
    recovery: Facts = {}
    """Steps, tokens and loss of the training."""
    speed: Facts = {}
    seconds: dict[str, float] = {}
    """Wall time of each stage when it was computed."""
    fingerprints: dict[str, str] = {}
    """The artifact of each stage."""

    @property
    def is_dense(self) -> bool:
        return self.sparsity is None

    @property
    def final(self) -> Facts:
        """Quality of the model that the sweep ends with."""
        return self.after or self.before

    def number(self, name: str, part: str = "final") -> float | None:
        """A number of one part, or None when it is not there or is none."""
        value = getattr(self, part).get(name)
        return float(value) if isinstance(value, int | float) and value == value else None


class Rival(BaseModel):
    """A variant beside the best one of its sparsity, on the same windows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    row: str
    best: str
    difference: float
    """In bits per byte, of `row` over `best`."""
    stderr: float
    """Its standard error, from windows alone: training with another seed may differ by more."""

    @property
    def is_level(self) -> bool:
        """True when the text does not tell the two apart."""
        return abs(self.difference) <= STANDARD_ERRORS * self.stderr


class Comparison(BaseModel):
    """Everything that a sweep found out."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    title: str
    sweep: str
    """Digest of what was compared: the same for the same config on the same model."""
    model: str
    rows: tuple[Row, ...]
    rivals: tuple[Rival, ...] = ()
    num_stages: int = 0
    num_cached: int = 0
    seconds: float = 0.0
    """Wall time of this run of the sweep."""
    links: dict[str, str] = {}
    """Where more is to be seen: MLflow, Prefect, files."""
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.state == "failed")

    @property
    def dense(self) -> Row | None:
        return next((row for row in self.rows if row.is_dense), None)

    @property
    def missed(self) -> tuple[str, ...]:
        """Why variants have another sparsity than they were asked for."""
        sentences = {
            str(row.structure["missed"]) for row in self.rows if row.structure.get("missed")
        }
        return tuple(sorted(sentences))

    @property
    def ties(self) -> tuple[str, ...]:
        """Which variants are as good as the best, as far as this text can tell."""
        level: dict[str, list[str]] = {}
        for rival in self.rivals:
            if rival.is_level:
                told = f"{rival.row} ({rival.difference:+.4f} ±{rival.stderr:.4f})"
                level.setdefault(rival.best, []).append(told)
        return tuple(
            f"this text does not tell {best}, the lowest in bits per byte, from {', '.join(rows)}"
            for best, rows in level.items()
        )

    def benchmarks(self) -> dict[str, str]:
        """The metric that is shown of each benchmark, by benchmark."""
        shown: dict[str, str] = {}
        for row in self.rows:
            for name in row.final:
                benchmark, slash, metric = name.rpartition("/")
                if not slash or metric not in SHOWN_METRICS:
                    continue
                rank = SHOWN_METRICS.index
                if benchmark not in shown or rank(metric) < rank(shown[benchmark]):
                    shown[benchmark] = metric
        return shown

    def best(self) -> dict[float, Row]:
        """The best variant at each sparsity, by `BEST_RULE`."""
        best: dict[float, Row] = {}
        for row in self.rows:
            value = row.number(QUALITY)
            if row.sparsity is None or row.state != "done" or value is None:
                continue
            rival = best.get(row.sparsity)
            rival_value = rival.number(QUALITY) if rival else None
            if rival_value is None or value < rival_value:
                best[row.sparsity] = row
        return best


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


def save(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write comparison.json, .csv, .md and, where there is something to show, the plot."""
    from foldstack.flows.plots import plot_quality

    files = save_texts(comparison, folder)
    if plot_quality(comparison, folder / "quality_against_size.png"):
        files["quality_against_size.png"] = folder / "quality_against_size.png"
    return files


def save_texts(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Write comparison.json, .csv and .md."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "comparison.json": comparison.model_dump_json(indent=1),
        "comparison.csv": write_csv(comparison),
        "comparison.md": markdown(comparison) + "\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return {name: folder / name for name in texts}


def load(folder: Path) -> Comparison:
    """The comparison that `save` wrote."""
    data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    return Comparison.model_validate(data)


def variants_at(rows: Sequence[Row], method: str) -> list[Row]:
    """The finished rows of one method, from little to much removed."""
    mine = [row for row in rows if row.method == method and row.state == "done"]
    return sorted(mine, key=lambda row: row.number("parameters", "structure") or 0, reverse=True)
