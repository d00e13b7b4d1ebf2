"""The result of a sweep as data: one row per variant beside the dense model."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from foldstack.compression.evaluation.beside_dense import STANDARD_ERRORS

Facts = dict[str, float | int | str | bool | None]

QUALITY = "bits_per_byte"
"""What the best variant is lowest in, and what the plot shows."""
UNKNOWN = "unknown_tokens"
"""Share of the text's tokens that are the unknown token: their text is lost."""
BEST_RULE = "lowest bits per byte after recovery among the variants of the same sparsity"
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

    @property
    def unread(self) -> tuple[str, ...]:
        """Which models do not read all of the text, so that their figures are too good."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            if share := row.number(UNKNOWN):
                found.setdefault(f"{share:.1%}", []).append(row.label)
        return tuple(
            f"{share} of the text's tokens are unknown to the tokenizer of {', '.join(labels)}: "
            "what stands there is not predicted, and perplexity and bits per byte are too low"
            for share, labels in found.items()
        )

    def best(self) -> dict[float, Row]:
        """The best variant at each sparsity, by `BEST_RULE`.

        One that reads less of the text than the dense model, the rest being unknown to its
        tokenizer, is none.
        """
        best: dict[float, Row] = {}
        read = (self.dense.number(UNKNOWN) if self.dense else None) or 0.0
        for row in self.rows:
            value = row.number(QUALITY)
            if row.sparsity is None or row.state != "done" or value is None:
                continue
            if (row.number(UNKNOWN) or 0.0) > read:
                continue
            rival = best.get(row.sparsity)
            rival_value = rival.number(QUALITY) if rival else None
            if rival_value is None or value < rival_value:
                best[row.sparsity] = row
        return best


def variants_at(rows: Sequence[Row], method: str) -> list[Row]:
    """The finished rows of one method, from little to much removed."""
    mine = [row for row in rows if row.method == method and row.state == "done"]
    return sorted(mine, key=lambda row: row.number("parameters", "structure") or 0, reverse=True)
