"""What a model made of a track, held against what the dense model made of it."""

import dataclasses
from collections.abc import Callable, Sequence
from statistics import fmean

from foldstack.compression.evaluation.beside_dense import Evaluation, loss_difference
from foldstack.compression.evaluation.paired import Item, PairedDifference, paired_ratio
from foldstack.compression.evaluation.tracks.answers import f1
from foldstack.compression.evaluation.tracks.judge import win_rate
from foldstack.compression.evaluation.tracks.local_records import questions_in
from foldstack.compression.evaluation.tracks.result import (
    BENCHMARKS_TRACK,
    TEXT_TRACK,
    TaskResult,
    TrackResult,
    benchmark_results,
    text_result,
    track_result,
)
from foldstack.compression.evaluation.tracks.sequential import thresholds_at
from foldstack.compression.evaluation.tracks.settings import Track
from foldstack.compression.evaluation.tracks.track_evaluation import TrackEvaluation
from foldstack.compression.evaluation.tracks.verdict import Thresholds, VerdictRule

Progress = Callable[[str, int, int], None]
OPEN, CLOSED = "triviaqa_open", "triviaqa_closed"


def track_result_of(
    name: str,
    track: Track,
    dense: TrackEvaluation,
    other: TrackEvaluation,
    rule: VerdictRule,
) -> TrackResult:
    """A model's result on a track beside the dense model's."""
    result = track_result(name, task_results(other, dense, track.names, track, rule))
    agreement = {task: agreement_of(dense.of(task), other.of(task)) for task in track.described}
    return result.model_copy(update={"agreement": agreement, "win_rates": dict(other.win_rates)})


def judged(
    found: TrackEvaluation, dense: TrackEvaluation, track: Track, progress: Progress | None = None
) -> TrackEvaluation:
    """The same with the win rates that the track's judge gives it over the dense model."""
    if track.judge is None:
        return found
    rates = {}
    for task in track.described:
        questions = questions_in(track.files[task])
        of_dense = {item.doc_id: item.responses[0] for item in dense.of(task)}
        pairs = [
            (questions[item.doc_id], of_dense[item.doc_id], item.responses[0])
            for item in found.of(task)
        ]
        asked, before, after = (list(column) for column in zip(*pairs, strict=True))
        rates[task] = win_rate(track.judge, asked, before, after, progress)
    return dataclasses.replace(found, win_rates=rates)


def agreement_of(dense: Sequence[Item], other: Sequence[Item]) -> float:
    """Mean F1 of the words of two models' answers to the same questions."""
    answers = {item.doc_id: item.responses[0] for item in dense}
    return fmean(f1(item.responses[0], [answers[item.doc_id]]) for item in other)


def evidence_gains(found: TrackEvaluation, track: Track) -> dict[str, PairedDifference]:
    """What evidence in the prompt adds to exact match: each open-book task less the closed-book one
    of the same file, by question."""
    gains = {}
    forms = {name: (local.form or name, local.file) for name, local in track.files.items()}
    for name, (form, file) in forms.items():
        closed = next((n for n, each in forms.items() if each == (CLOSED, file)), None)
        if form == OPEN and closed is not None:
            scores = [
                {item.doc_id: float(str(item.metrics["em"])) for item in found.of(task)}
                for task in (closed, name)
            ]
            shared = sorted(scores[0].keys() & scores[1].keys())
            if len(shared) > 1:
                pair = [[some[number] for number in shared] for some in scores]
                gains[name] = paired_ratio(pair[0], pair[1], [1.0] * len(shared))
    return gains


def measured_anyway(dense: Evaluation, other: Evaluation, rule: VerdictRule) -> list[TrackResult]:
    """The tracks `text` and `benchmarks`, of what every model is evaluated by.

    The first is the perplexity of the text; fewer than two windows or items say nothing.
    """
    found = []
    if dense.perplexity.num_windows > 1:
        text = text_result(
            "perplexity", dense.perplexity, other.perplexity,
            loss_difference(dense.perplexity, other.perplexity),
            ratio=rule.ratio, thresholds=rule.thresholds(1),
        )  # fmt: skip
        found.append(track_result(TEXT_TRACK, [text]))
    inner = {member for each in dense.benchmarks.values() for member in each.members}
    names = [name for name in dense.benchmarks if name not in inner]
    if names:
        limits = dict.fromkeys(names, rule.thresholds(len(names)))
        results = benchmark_results(
            names, dense, other, ratio=rule.ratio, thresholds=limits, metrics={}, chance={}
        )
        found.append(track_result(BENCHMARKS_TRACK, results))
    return found


def task_results(
    other: TrackEvaluation,
    dense: TrackEvaluation,
    names: Sequence[str],
    track: Track,
    rule: VerdictRule,
) -> list[TaskResult]:
    """The results of some tasks of a track, and of all its texts."""

    def limits(name: str) -> Thresholds:
        looks = other.looks.get(name)
        if looks is None:
            return rule.thresholds(track.num_tasks)
        return thresholds_at(rule, looks.counts, looks.of_items, track.num_tasks)

    texts = [
        text_result(
            name, dense.texts[name], text, loss_difference(dense.texts[name], text),
            ratio=rule.ratio, thresholds=rule.thresholds(track.num_tasks),
        )
        for name, text in other.texts.items()
    ]  # fmt: skip
    scores = benchmark_results(
        names, dense, other, ratio=rule.ratio, metrics=track.metrics, chance=track.chance,
        thresholds={name: limits(name) for name in names},
    )  # fmt: skip
    return [*scores, *texts]
