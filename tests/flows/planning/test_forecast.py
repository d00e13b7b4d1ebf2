"""What earlier runs say of a stage's time, and what they do not."""

from types import SimpleNamespace
from typing import Any

import pytest

from foldstack.flows.planning.forecast import Seconds


def stage(kind: str, label: str) -> Any:
    return SimpleNamespace(stage=kind, label=label)


SHORTGPT, SLEB, MODEGPT, DENSE, OTHER = STAGES = (
    stage("compress_model", "compress shortgpt 0.10"),
    stage("compress_model", "compress sleb 0.10"),
    stage("compress_model", "compress modegpt 0.10"),
    stage("evaluate_model", "evaluate dense"),
    stage("evaluate_model", "evaluate sleb 0.10"),
)
ARITHMETIC = {id(SHORTGPT): 10.0, id(SLEB): 6000.0, id(MODEGPT): 60.0, id(DENSE): 50.0}


def seconds_after(**earlier: list[float]) -> Seconds:
    history: dict[tuple[str, str], list[float]] = {}
    for each in STAGES:
        name = each.label.split()[1]
        if name in earlier and each is not OTHER:
            history[each.stage, each.label] = earlier[name]
            history.setdefault((each.stage, ""), []).extend(earlier[name])
    return Seconds(STAGES, history, lambda each: ARITHMETIC[id(each)])


def test_a_method_is_not_expected_to_take_what_another_one_took() -> None:
    told = seconds_after(shortgpt=[30.0, 20.0, 22.0])
    assert told.of(SHORTGPT) == (22.0, "earlier runs")
    # The machine was 2.2 times as slow as its arithmetic: with SLEB it will be, too.
    assert told.of(SLEB) == (pytest.approx(13_200), "arithmetic")


def test_the_pace_is_that_of_the_same_kind_and_one_without_runs_before_them() -> None:
    assert seconds_after().of(SLEB) == (6000.0, "arithmetic")
    assert seconds_after(dense=[500.0]).of(SLEB) == (6000.0, "arithmetic")
    told = seconds_after(shortgpt=[20.0], modegpt=[60.0])
    assert told.of(SLEB) == (9000.0, "arithmetic")


def test_evaluating_one_model_takes_what_another_took() -> None:
    assert seconds_after(dense=[80.0]).of(OTHER) == (80.0, "earlier runs")
