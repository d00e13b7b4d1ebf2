"""What a track measures: benchmarks and texts, and how they are asked."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from foldstack.compression.evaluation.harness import SEED
from foldstack.compression.evaluation.records import PerplexityProtocol
from foldstack.compression.evaluation.tracks.judge import Judge
from foldstack.compression.text.corpus import SELF, TextSource

Limit = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
"""Of a track or a text: a part of file names and of MLflow's keys."""


class _Settings(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, hide_input_in_errors=True
    )


FORMS = {
    "choices": "query, choices and gold, the place of the right one",
    "cloze": "context and continuation",
    "contexts": "context_options, continuation and gold",
    "freebaseqa": "RawQuestion and Parses, or question and answers",
    "triviaqa_closed": "question and answer, or question and answers",
    "triviaqa_open": "question, answer, entity_pages and search_results, or question, answers and "
    "evidence",
    "advglue": "a list for each of sst2, qqp, mnli, qnli and rte, with a label in each record",
    "summaries": "article and highlights",
    "instructions": "text, or turns",
}
"""Forms of local files, and what their records hold; any lm-eval task is a form too, of the records
that its data set has."""


class LocalFile(_Settings):
    """A benchmark over a file of yours."""

    file: Path
    """JSON lines, JSON, CSV or Parquet; a relative path counts from the current directory."""
    form: str = ""
    """One of `FORMS`, or an lm-eval task whose prompts these items get; empty: its name says it."""
    suffix: str = ""
    """What is put behind each prompt, such as "\nAnswer:"."""

    @field_validator("file")
    @classmethod
    def _is_absolute(cls, value: Path) -> Path:
        return Path(os.path.abspath(value.expanduser()))


class TrackText(_Settings):
    """A text, and the protocol of its perplexity."""

    source: TextSource = TextSource(split="test")
    protocol: PerplexityProtocol = PerplexityProtocol()

    @field_validator("source")
    @classmethod
    def _is_given(cls, value: TextSource) -> TextSource:
        if value.corpus == SELF:
            raise ValueError(f"a track reads a text that is given; {SELF!r} is none")
        return value


class Track(_Settings):
    """Benchmarks and texts that answer one question about a model."""

    tasks: tuple[str, ...] = ()
    """lm-eval tasks and groups, as in `benchmarks`."""
    files: dict[Name, LocalFile] = {}
    """Benchmarks over files of yours, by a name of yours."""
    texts: dict[Name, TrackText] = {}
    """Texts by a name of yours, for perplexity."""
    limit: Limit | dict[str, Limit] | None = None
    """Items per task, from its beginning; or a number for each that is not to be whole."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; null leaves it to each task."""
    chat_template: bool = False
    """Whether prompts are wrapped as the model's chat template says."""
    metrics: dict[str, str] = {}
    """What a task is scored by, where not by its acc, exact match, F1 or bits per byte."""
    chance: dict[str, float] = {}
    """What guessing scores, where it is not one over the number of choices."""
    judge: Judge | None = None
    """Who compares the answers to `instructions` with the dense model's; null: nobody."""
    seeds: tuple[int, ...] = Field(default=(SEED,), min_length=1)
    """Of few-shot examples and of sampled answers; the scores of several are averaged by item."""
    temperature: float = Field(default=0.0, ge=0)
    """Answers are sampled at it; 0: written greedily."""

    @model_validator(mode="after")
    def _names_are_of_tasks(self) -> "Track":
        limited = self.limit if isinstance(self.limit, dict) else {}
        for key, named in (("limit", limited), ("metrics", self.metrics), ("chance", self.chance)):
            for name in named:
                if name not in self.names:
                    known = ", ".join(self.names) or "none"
                    raise ValueError(f"{key} names {name}, and the tasks are {known}")
        if not self.names and not self.texts:
            raise ValueError("a track needs tasks, files or texts")
        if self.files and self.num_fewshot:
            raise ValueError(
                "num_fewshot is for tasks whose data have examples apart from their items; files "
                f"have none, got {self.num_fewshot} with files {', '.join(self.files)}"
            )
        if twice := set(self.tasks) & set(self.files):
            raise ValueError(f"{sorted(twice)[0]} is among tasks and among files; name one apart")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tasks."""
        return (*self.tasks, *self.files)

    @property
    def described(self) -> tuple[str, ...]:
        """Tasks without right answers."""
        return tuple(n for n, local in self.files.items() if (local.form or n) == "instructions")

    @property
    def limits(self) -> dict[str, int | None]:
        """Items of each task; None for all."""
        if isinstance(self.limit, dict):
            return {name: self.limit.get(name) for name in self.names}
        return dict.fromkeys(self.names, self.limit)

    @property
    def num_tasks(self) -> int:
        """Tasks and texts that are judged."""
        return len(self.names) + len(self.texts)


def files_of(track: Track) -> list[Path]:
    """Local files that the track's tasks are read from."""
    return [local.file for local in track.files.values()]
