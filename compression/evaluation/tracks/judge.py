"""A judge behind an OpenAI-compatible address: which of two answers is better, in both orders.

Never part of a score. A judge prefers what it reads first, so that each pair is read twice; one
whose words cannot be read as a decision is counted as that, and not as a loss.
"""

import json
import math
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field, field_validator

from foldstack.compression.errors import InputError, told

ASKED = """Two assistants answered the same question. Say which answer is better: more correct, more
helpful, more to the point. Reply with one letter alone: A, B, or T if neither is better.

Question:
{question}

Answer A:
{a}

Answer B:
{b}

Better:"""
DECISION = re.compile(r"^\W*(?:answer\s+)?([ABT])\b", re.IGNORECASE)
POINTS = {"A": 1.0, "T": 0.5, "B": 0.0}
"""Of the answer that stands first."""
Progress = Callable[[str, int, int], None]


class Judge(BaseModel):
    """Who judges."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    url: str
    """Where the API lies, such as http://127.0.0.1:8000/v1."""
    model: str
    """As the API calls it."""
    key_variable: str = ""
    """Environment variable that holds its key; empty: none is sent."""
    timeout_seconds: float = Field(default=60.0, gt=0)

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if not re.fullmatch(r"https?://[^\s@]+", value):
            raise ValueError("judge.url must be an http address without a password")
        return value.rstrip("/")


class WinRate(BaseModel):
    """How often a model's answer is better than the dense one's; a tie is half a win."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    rate: float | None
    """0.5: as good; None where no decision could be read."""
    stderr: float | None
    """Over questions, each of which is judged in both orders."""
    num_questions: int
    unread: int
    """Questions left out, for a decision that could not be read."""
    swayed: int
    """Questions on which the judge preferred the same place in both orders."""


def win_rate(
    judge: Judge,
    questions: Sequence[str],
    dense: Sequence[str],
    other: Sequence[str],
    progress: Progress | None = None,
) -> WinRate:
    """How often `other` answers better than `dense`.

    Raises:
        InputError: the judge cannot be reached, or answers with an error.
    """
    scores: list[float] = []
    unread = swayed = 0
    for number, (question, first, second) in enumerate(zip(questions, dense, other, strict=True)):
        forth = _decided(judge, question, second, first)
        back = _decided(judge, question, first, second)
        if forth is None or back is None:
            unread += 1
        else:
            scores.append((forth + 1 - back) / 2)
            swayed += forth == back != POINTS["T"]
        if progress is not None:
            progress("judge", number + 1, len(questions))
    mean = fmean(scores) if scores else None
    error = None
    if mean is not None and len(scores) > 1:
        squares = math.fsum((score - mean) ** 2 for score in scores)
        error = math.sqrt(squares / (len(scores) - 1) / len(scores))
    return WinRate(
        rate=mean, stderr=error, num_questions=len(questions), unread=unread, swayed=swayed
    )


def _decided(judge: Judge, question: str, a: str, b: str) -> float | None:
    """Points of the first answer; None where the judge's words are no decision."""
    found = DECISION.match(_ask(judge, ASKED.format(question=question, a=a, b=b)).strip())
    return None if found is None else POINTS[found[1].upper()]


def _ask(judge: Judge, prompt: str) -> str:
    content = {
        "model": judge.model, "temperature": 0, "max_tokens": 8,
        "messages": [{"role": "user", "content": prompt}],
    }  # fmt: skip
    headers, key = {"Content-Type": "application/json"}, ""
    if judge.key_variable:
        if not (key := os.environ.get(judge.key_variable, "")):
            raise InputError(f"judge.key_variable names {judge.key_variable}, which is not set")
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        f"{judge.url}/chat/completions", json.dumps(content).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=judge.timeout_seconds) as response:
            found = json.load(response)
        return str(found["choices"][0]["message"]["content"])
    except urllib.error.HTTPError as error:
        said = error.read(4096).decode(errors="replace")
        why = told(RuntimeError(said.replace(key, "...") if key else said))  # some repeat it
        raise InputError(f"the judge at {judge.url} gave no answer: {error}: {why}") from error
    except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
        raise InputError(f"the judge at {judge.url} gave no answer: {told(error)}") from error
