"""Progress where there is no terminal: few lines, and how long it still takes."""

import io

import pytest
from rich.console import Console

from foldstack.flows.running import progress
from foldstack.flows.running.progress import Lines, console_on


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_stage_says_a_line_a_minute_with_the_time_that_is_left(clock: list[float]) -> None:
    stream = io.StringIO()
    lines = Lines(Console(file=stream, width=200))
    for done in range(301):  # five minutes, a step a second
        lines.report("train", "steps", done, 400)
        clock[0] += 1
    said = stream.getvalue().splitlines()
    assert [line.split(": ")[1] for line in said] == [
        "steps 60/400, about 6 min left", "steps 120/400, about 5 min left",
        "steps 180/400, about 4 min left", "steps 240/400, about 3 min left",
        "steps 300/400, about 2 min left",
    ]  # fmt: skip


def test_what_a_stage_does_next_has_a_pace_of_its_own(clock: list[float]) -> None:
    """Of the slow loading nothing is known when the quick steps begin."""
    stream = io.StringIO()
    lines = Lines(Console(file=stream, width=200))
    lines.report("train", "loading", 0, 0)
    clock[0] += 50
    lines.report("train", "steps", 0, 100)
    clock[0] += 20
    lines.report("train", "steps", 40, 100)
    assert stream.getvalue().strip() == "train: steps 40/100, about 30 s left"


def test_stages_side_by_side_have_a_minute_each(clock: list[float]) -> None:
    stream = io.StringIO()
    lines = Lines(Console(file=stream, width=200))
    for _ in range(3):
        for label in ("a", "b"):
            lines.report(label, "", 1, 0)
        clock[0] += 61
    assert len(stream.getvalue().splitlines()) == 4


@pytest.mark.parametrize(("said", "width"), [("", 120), ("80", 80), ("0", 120), ("wide", 120)])
def test_a_pipe_is_as_wide_as_columns_says(
    said: str, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", said)
    assert console_on(io.StringIO()).width == width
