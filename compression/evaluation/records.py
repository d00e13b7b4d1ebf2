"""What is measured of a model, as data: read without loading torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from foldstack.compression.evaluation.paired import Item
from foldstack.compression.text.bos import Bos


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Score(_Record):
    """One metric of one benchmark."""

    value: float
    stderr: float | None
    """Standard error of the mean over items; None where lm-eval gives no closed form."""
    higher_is_better: bool | None


class Benchmark(_Record):
    """All metrics of one benchmark, or of a group of them."""

    version: str
    num_fewshot: int
    num_items: int
    """Items scored; 0 for a group."""
    members: tuple[str, ...] = ()
    """What a group is made of: benchmarks, and groups again."""
    scores: dict[str, Score]
    """By metric; "metric,filter" where lm-eval filters answers."""


class HarnessResult(_Record):
    """What lm-eval found. The items are no part of the JSON: `write_items` puts them beside it."""

    benchmarks: dict[str, Benchmark]
    lm_eval_version: str
    seed: int
    limit: int | None
    batch_size: int
    dtype: str
    items: tuple[Item, ...] = Field(default=(), exclude=True, repr=False)


class PerplexityProtocol(BaseModel):
    """What is predicted from what. Losses are taken and summed in float64."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    window_tokens: int = Field(default=512, ge=2)
    """Tokens fed to the model at once, a window's BOS included; windows do not overlap."""
    bos: Bos = "none"
    """Where BOS tokens stand: nowhere, at the start of the whole text, before each document (only
    if `joiner` is empty), or at the start of each window. In a text they are predicted too; in
    front of a window they are not."""
    joiner: str = "\n\n"
    """What stands between documents; empty: they are encoded one by one and follow each other."""
    score_last: bool = True
    """Whether a window's last position counts, which predicts the first token after the window: T
    tokens predicted per window of T. Most papers leave it out: T - 1 per window."""
    remainder: Literal["score", "drop"] = "score"
    """What becomes of the tokens after the last full window: one shorter window, or left out."""
    max_tokens: int = Field(default=0, ge=0)
    """Tokens of the text to use, from its beginning; 0 = all."""
    batch_size: int = Field(default=8, ge=1)
    """Windows per forward pass; halved as often as memory makes it necessary."""

    @model_validator(mode="after")
    def _documents_are_apart(self) -> "PerplexityProtocol":
        if self.bos == "document" and self.joiner:
            raise ValueError(
                f"bos 'document' needs documents that are encoded one by one, got joiner "
                f"{self.joiner!r}: set joiner to '' or bos to 'stream'"
            )
        return self

    @property
    def span(self) -> int:
        """Tokens that make one full window: those fed, and the target of the last position."""
        return self.window_tokens + self.score_last


class PerplexityResult(BaseModel):
    """Perplexity of one model on one text, and what it was computed from."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings"
    )

    perplexity: float
    """exp of `nll`."""
    nll: float
    """Mean negative log likelihood over all predicted tokens, nats per token."""
    bits_per_byte: float | None
    """Total negative log likelihood in bits over `num_bytes`; None for a slow tokenizer."""
    num_tokens: int
    """Tokens predicted."""
    num_bytes: int | None
    """UTF-8 bytes of the text that the predicted tokens stand for."""
    num_unknown: int
    """Predicted tokens that are the unknown token: their text is lost, bits per byte too low."""
    num_windows: int
    window_nll: tuple[float, ...]
    """Summed negative log likelihood of each window, nats: pairs with another model's."""
    window_tokens: tuple[int, ...]
    """Tokens predicted in each window."""
    dtype: str
    """Of the model's weights."""
    protocol: PerplexityProtocol


class Sample(_Record):
    """A prompt and its continuation."""

    prompt: str
    continuation: str
