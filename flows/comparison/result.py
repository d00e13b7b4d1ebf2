"""The result of a sweep as data: one row per variant beside the dense model."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from foldstack.compression.evaluation.paired import STANDARD_ERRORS
from foldstack.compression.evaluation.records import Sample
from foldstack.compression.evaluation.tracks.result import ModelVerdict, TrackResult

if TYPE_CHECKING:
    import pandas

Facts = dict[str, float | int | str | bool | None]

QUALITY = "bits_per_byte"
"""What the best variant is lowest in, and what the plot shows."""
UNKNOWN = "unknown_tokens"
"""Share of the text's tokens that are the unknown token: their text is lost."""
BestBy = Literal["quality", "speed_at_quality", "size_at_quality"]
BEST_RULES: dict[BestBy, str] = {
    "quality": "lowest bits per byte among the variants of the same sparsity",
    "speed_at_quality": "fastest decoding among the variants of the same sparsity whose bits per "
    "byte are within {within:.3g} of the lowest, or cannot be told from it",
    "size_at_quality": "fewest parameters among the variants of the same sparsity whose bits per "
    "byte are within {within:.3g} of the lowest, or cannot be told from it",
}


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
    forecast: Facts = {}
    """What a method that says so expected of the compressed model: `kl_added`, `kl` and its error
    in nats per token, times as shares of the dense model's; and `loss_rise`, measured on the text
    of the evaluation before recovery."""
    recovery: Facts = {}
    """Steps, tokens and loss of the training."""
    speed: Facts = {}
    verdict: ModelVerdict | None = None
    """Whether the final model still matches the dense one; None for that one."""
    tracks: tuple[TrackResult, ...] = ()
    """Of the final model: the run's text and benchmarks, and every track."""
    samples: tuple[Sample, ...] = ()
    """Prompts that the final model continued."""
    costs: Facts = {}
    """Footprint and speed in one figure each."""
    engines: Facts = {}
    """What it is exported as, and how fast that decodes: "gguf-q4_k_m/decode_speedup"."""
    seconds: dict[str, float] = {}
    """Wall time of each stage when it was computed."""
    fingerprints: dict[str, str] = {}
    """The artifact of each stage."""

    @property
    def is_dense(self) -> bool:
        return self.sparsity is None

    @property
    def effort_seconds(self) -> float:
        """Wall time of compressing and healing, after the statistics that all methods share."""
        return sum(self.seconds.get(part, 0.0) for part in ("compress", "recover"))

    @property
    def name(self) -> str:
        """What it is called among variants of its sparsity: the label without that."""
        seed = f" seed {self.seed}"
        return self.method + seed if self.label.endswith(seed) else self.method

    @property
    def final(self) -> Facts:
        """Quality of the model that the sweep ends with."""
        return self.after or self.before

    def numbers(self) -> dict[str, Any]:
        """Everything that was measured by one name each: "quality/bits_per_byte",
        "size/parameters"; "quality" is that of the final model. MLflow's metrics have these names.
        """
        parts: dict[str, Mapping[str, Any]] = {
            "quality": self.final,
            "before_recovery": self.before if self.after else {},
            "beside_dense": self.beside_dense,
            "forecast": self.forecast,
            "size": self.structure,
            "recovery": self.recovery,
            "speed": self.speed,
            "track": {**self.costs, **_of_tracks(self.tracks)},
            "engines": self.engines,
            "time": {f"{part}_seconds": seconds for part, seconds in self.seconds.items()},
        }
        return {f"{part}/{k}": v for part, facts in parts.items() for k, v in facts.items()}

    def number(self, name: str, part: str = "final") -> float | None:
        """A number of one part, or None when it is not there or is none."""
        value = getattr(self, part).get(name)
        return float(value) if isinstance(value, int | float) and value == value else None


class Rival(BaseModel):
    """Two variants of one sparsity, on the same windows."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    row: str
    """Label of the one that is higher in bits per byte."""
    lower: str = Field(validation_alias=AliasChoices("lower", "best"))
    """Label of the other one. (Where a file says "best", only that one was paired.)"""
    difference: float
    """In bits per byte, of `row` over `lower`."""
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
    """Every two finished variants of a sparsity."""
    best_by: BestBy = "quality"
    best_within: float = 0.01
    """How far from the lowest bits per byte, as a fraction of it, the best may be that is best by
    something else."""
    made_at: datetime | None = None
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
    def best_rule(self) -> str:
        """What the best variant of a sparsity is best in."""
        return BEST_RULES[self.best_by].format(within=self.best_within)

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
        """The best variant at each sparsity, by `best_rule`."""
        return {sparsity: self._best_of(rows) for sparsity, rows in self.by_sparsity().items()}

    def by_sparsity(self) -> dict[float, list[Row]]:
        """The variants with a quality at each sparsity, from little to much removed, the lowest in
        bits per byte first.

        One that reads less of the text than the dense model, the rest being unknown to its
        tokenizer, is not among them: its quality is none.
        """
        found: dict[float, list[Row]] = {}
        read = (self.dense.number(UNKNOWN) if self.dense else None) or 0.0
        for row in sorted(self.rows, key=lambda row: row.number(QUALITY) or 0.0):
            if row.sparsity is None or row.state != "done" or row.number(QUALITY) is None:
                continue
            if (row.number(UNKNOWN) or 0.0) <= read:
                found.setdefault(row.sparsity, []).append(row)
        return dict(sorted(found.items()))

    def level_with(self, label: str) -> set[str]:
        """The variants of its sparsity that the text does not tell from this one."""
        pairs = [{pair.row, pair.lower} for pair in self.rivals if pair.is_level]
        return {other for pair in pairs if label in pair for other in pair - {label}}

    def near_the_lowest(self, rows: Sequence[Row]) -> list[Row]:
        """Those of one sparsity, the lowest first, whose quality is as good for `best_by`."""
        lowest = rows[0].number(QUALITY) or 0.0
        level = self.level_with(rows[0].label)
        bound = lowest * (1 + self.best_within)
        return [row for row in rows if (row.number(QUALITY) or 0.0) <= bound or row.label in level]

    def _best_of(self, rows: Sequence[Row]) -> Row:
        near = self.near_the_lowest(rows)
        if self.best_by == "speed_at_quality":
            return max(near, key=lambda row: row.number("decode_speedup", "speed") or 0.0)
        if self.best_by == "size_at_quality":
            return min(near, key=lambda row: row.number("parameters", "structure") or float("inf"))
        return rows[0]

    def records(self) -> list[dict[str, Any]]:
        """One mapping per row: which model of which sweep it is, and all its numbers."""
        best = {row.label for row in self.best().values()}
        cheapest = min((seconds for row in self.rows if (seconds := row.effort_seconds)), default=0)
        return [
            {
                "title": self.title, "sweep": self.sweep, "base_model": self.model,
                "made_at": self.made_at, "label": row.label, "method": row.method,
                "sparsity": row.sparsity, "seed": row.seed, "state": row.state, "cause": row.cause,
                "is_best": row.label in best, "folder": row.folder,
                "settings": json.dumps(row.settings) if row.settings else None,
                "verdict": row.verdict and row.verdict.verdict,
                "because": row.verdict and row.verdict.because, **row.numbers(),
                **({"track/effort": row.effort_seconds / cheapest} if row.effort_seconds else {}),
            }
            for row in self.rows
        ]  # fmt: skip

    def frame(self) -> "pandas.DataFrame":
        """All rows and numbers as a pandas frame with typed columns."""
        from foldstack.flows.comparison.frame import typed_frame

        return typed_frame(self.records())


def _of_tracks(tracks: Sequence[TrackResult]) -> Facts:
    """Scores of tracks with their errors, and of each task the share that is left of it."""
    facts: Facts = {}
    for track in tracks:
        facts[track.track] = track.score
        facts[f"{track.track}_stderr"] = track.stderr
        facts[f"{track.track}_om_llmcbench"] = track.om_llmcbench
        facts |= {f"{track.track}/{task}_agreement": v for task, v in track.agreement.items()}
        facts |= {f"{track.track}/{task}_win_rate": v.rate for task, v in track.win_rates.items()}
        for task in track.tasks:
            name = f"{track.track}/{task.task}"
            facts[name] = task.other
            facts[f"{name}_items"] = task.num_items
            facts[f"{name}_retained"] = task.retained
            facts[f"{name}_retained_stderr"] = task.stderr
    return {name: value for name, value in facts.items() if value is not None}


def variants_at(rows: Sequence[Row], method: str) -> list[Row]:
    """The finished rows of one method, from little to much removed."""
    mine = [row for row in rows if row.method == method and row.state == "done"]
    return sorted(mine, key=lambda row: row.number("parameters", "structure") or 0, reverse=True)
