"""Shares retained, a track's score and the verdict on a model, by hand and against a bootstrap."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from foldstack.compression.errors import InputError
from foldstack.compression.evaluation.paired import Item
from foldstack.compression.evaluation.records import Benchmark, Score
from foldstack.compression.evaluation.tracks.paired_task import PairedScores
from foldstack.compression.evaluation.tracks.result import (
    TrackResult,
    combined,
    geometric_mean,
    model_verdict,
    quadratic_mean,
)
from foldstack.compression.evaluation.tracks.settings import Track
from foldstack.compression.evaluation.tracks.track_beside_dense import track_result_of
from foldstack.compression.evaluation.tracks.track_evaluation import TrackEvaluation
from foldstack.compression.evaluation.tracks.verdict import VerdictRule

RULE = VerdictRule()
FOUR_WAY = (-1.0, -2.0, -3.0, -4.0)
Answers = Mapping[str, Sequence[float]]


def items_of(task: str, values: Sequence[float], options: Sequence[float] = FOUR_WAY) -> list[Item]:
    return [
        Item(
            benchmark=task, doc_id=number, doc_hash=f"{task}{number}", filter="none", target="",
            loglikelihoods=tuple(options), choice_tokens=(1,) * len(options),
            metrics={"acc": float(value)},
        )
        for number, value in enumerate(values)
    ]  # fmt: skip


def evaluation(
    answers: Answers, groups: Mapping[str, tuple[Sequence[str], float]]
) -> TrackEvaluation:
    benchmarks = {
        name: Benchmark(
            version="1", num_fewshot=0, num_items=len(values),
            scores={"acc": Score(value=float(np.mean(values)), stderr=None, higher_is_better=True)},
        )
        for name, values in answers.items()
    }  # fmt: skip
    for name, (members, value) in groups.items():
        score = Score(value=value, stderr=None, higher_is_better=True)
        benchmarks[name] = Benchmark(
            version="1", num_fewshot=0, num_items=0, members=tuple(members), scores={"acc": score}
        )
    items = [item for name, values in answers.items() for item in items_of(name, values)]
    return TrackEvaluation(benchmarks, items)


def result_of(
    dense: Answers, other: Answers, tasks: Sequence[str],
    groups: Mapping[str, tuple[Sequence[str], float]] | None = None,
) -> TrackResult:  # fmt: skip
    pair = [evaluation(answers, groups or {}) for answers in (dense, other)]
    return track_result_of("quiz", Track(tasks=tuple(tasks)), pair[0], pair[1], RULE)


def answers(right: int, of: int) -> list[float]:
    return [1.0] * right + [0.0] * (of - right)


def test_dense_beside_itself() -> None:
    """Breaks when a model that changed nothing is not whole, sure, and matching."""
    dense = {"a": answers(120, 200), "b": answers(140, 200)}
    result = result_of(dense, dense, ("a", "b"))
    assert (result.score, result.stderr, result.verdict) == (1.0, 0.0, "matching")
    assert result.om_llmcbench == 1.0
    assert str(model_verdict([result], 0.05)) == "matching: 2 tasks are within 5 % of dense"


def test_guessing_retains_nothing() -> None:
    """Breaks when chance counts: a guesser on a four-way task would keep half of 46 %."""
    guesses = [float(number % 4 == 0) for number in range(400)]
    result = result_of({"a": answers(184, 400)}, {"a": guesses}, ["a"])
    (task,) = result.tasks
    assert task.chance == pytest.approx(0.25)
    assert task.retained == pytest.approx(0.0, abs=1e-9)
    assert task.raw_ratio == pytest.approx(0.543, abs=1e-3)
    assert result.score == pytest.approx(0.01)  # the floor of a share
    assert task.verdict == "not matching"
    assert "a -45.7 % on 400 items" in str(model_verdict([result], 0.05))


def test_a_dense_model_at_chance_says_nothing() -> None:
    """Breaks when noise over noise becomes a share."""
    result = result_of(
        {"a": answers(55, 200), "b": answers(120, 200)},
        {"a": answers(20, 200), "b": answers(120, 200)}, ("a", "b"),
    )  # fmt: skip
    at_chance, scored = result.tasks
    assert at_chance.retained is None is at_chance.verdict
    assert (result.score, result.worst, result.verdict) == (1.0, "b", "matching")
    assert scored.is_scored
    empty = result_of({"a": answers(55, 200)}, {"a": answers(20, 200)}, ["a"])
    assert (empty.score, empty.verdict) == (None, None)
    assert str(model_verdict([empty], 0.05)) == (
        "not judged: the dense model is at chance on every task"
    )


def test_an_open_verdict_says_what_it_would_take() -> None:
    """Breaks when too few items read as a verdict."""
    dense = answers(60, 100)
    other = [0.0, 0.0, *dense[2:60], 1.0, 1.0, *dense[62:]]
    verdict = model_verdict([result_of({"a": dense}, {"a": other}, ["a"])], 0.05)
    assert verdict.verdict == "open"
    assert verdict.because == "a takes about 160 items, 100 items are read"


def test_a_group_is_averaged_as_lm_eval_did() -> None:
    """Breaks when the largest subset decides where every subset has one vote, or the reverse."""
    dense = {"big": answers(270, 300), "small": answers(60, 100)}
    other = {"big": answers(240, 300), "small": answers(30, 100)}
    for value, wanted in ((330 / 400, 270 / 400), (0.75, (0.8 + 0.3) / 2)):
        groups = {"group": (("big", "small"), value)}
        (task,) = result_of(dense, other, ["group"], groups).tasks
        assert (task.dense, task.other) == (pytest.approx(value), pytest.approx(wanted))
    without = result_of(dense, other, ["group"], {"group": (("big", "small"), 0.123)})
    assert [task.task for task in without.tasks] == ["big", "small"]


def test_means_of_ratios_are_in_their_order() -> None:
    """Quadratic is never below arithmetic, and that never below geometric."""
    draw = np.random.default_rng(0)
    for _ in range(50):
        ratios = draw.uniform(0.02, 1, 4)
        geometric, _ = geometric_mean(ratios.tolist(), [0.0] * 4)
        assert quadratic_mean(ratios.tolist()) >= ratios.mean() >= geometric


def test_om_llmcbench_by_hand() -> None:
    """Two models, three tasks: the published mean hides the broken task, ours does not."""
    dense = {"a": answers(160, 200), "b": answers(100, 200), "c": answers(120, 200)}
    for rights, wanted in (((160, 80, 120), 0.9381), ((80, 100, 60), 0.7071)):
        other = {name: answers(right, 200) for name, right in zip("abc", rights, strict=True)}
        assert result_of(dense, other, "abc").om_llmcbench == pytest.approx(wanted, abs=1e-4)


def test_error_is_that_of_a_bootstrap_over_items() -> None:
    """Breaks when the delta method, or the independence of tasks, is wrong by a tenth."""
    draw = np.random.default_rng(3)
    tasks: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, kept in zip("abc", (0.8, 0.7, 0.6), strict=True):
        dense = (draw.random(500) < 0.75).astype(float)
        tasks[name] = dense, np.where(draw.random(500) < kept, dense, draw.random(500) < 0.25) * 1.0
    result = result_of(
        {name: pair[0].tolist() for name, pair in tasks.items()},
        {name: pair[1].tolist() for name, pair in tasks.items()}, "abc",
    )  # fmt: skip
    scores = []
    for _ in range(3000):
        shares = []
        for dense, other in tasks.values():
            chosen = draw.integers(0, 500, 500)
            shares.append((other[chosen].mean() - 0.25) / (dense[chosen].mean() - 0.25))
        scores.append(float(np.exp(np.log(shares).mean())))
    assert result.stderr == pytest.approx(np.std(scores), rel=0.1)
    by_hand = (
        (result.score or 0)
        / 3
        * np.sqrt(sum(((task.stderr or 0) / (task.retained or 1)) ** 2 for task in result.tasks))
    )
    assert result.stderr == pytest.approx(by_hand, rel=0.05)


def test_items_stopped_early_pair_with_the_first_of_dense() -> None:
    """Breaks when the dense score of a task that was read in part is that of all items."""
    dense = {"a": [*answers(30, 50), *answers(50, 50)]}
    result = result_of(dense, {"a": answers(30, 50)}, ["a"])
    (task,) = result.tasks
    assert (task.dense, task.other) == pytest.approx((0.6, 0.6))
    assert (task.num_items, task.of_items) == (50, 100)
    assert task.read == "50 of 100 items"


def test_items_that_dense_was_not_asked_are_refused() -> None:
    """Breaks when two models are compared on different items."""
    with pytest.raises(InputError, match="10 of 60 were not asked of the dense one"):
        result_of({"a": answers(30, 50)}, {"a": answers(30, 60)}, ["a"])


def test_scores_between_right_and_wrong_are_judged_by_their_spread() -> None:
    """Breaks when F1 is counted as if it were right or wrong."""
    draw = np.random.default_rng(0)
    dense = draw.uniform(0.4, 0.8, 200)
    paired = PairedScores(
        dense, dense * 0.98, np.full(200, 1 / 200), np.zeros(200, dtype=np.int64), 0.0
    )
    assert paired.retained() == (pytest.approx(0.98), pytest.approx(0.0, abs=1e-12))
    assert RULE.thresholds(1).judge(paired.statistic(RULE.ratio)) == "matching"


def test_verdicts_of_tasks_and_tracks_combine() -> None:
    """Breaks when one task that does not match is outvoted."""
    assert combined(["matching", "not matching", "open"]) == "not matching"
    assert combined(["matching", "open", None]) == "open"
    assert combined([None, "matching"]) == "matching"
    assert combined([None]) is None
