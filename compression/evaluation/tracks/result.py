"""What a track says of a compressed model: the share of every task that is left, and the verdict.

Shares are corrected for chance: 25 % on a four-way task is nothing retained, and not half of 46 %.
A track's score is their geometric mean, which a broken task cannot hide in; the quadratic mean of
raw ratios that LLMCBench (arXiv 2410.21352) publishes stands beside it under its own name.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from pydantic import BaseModel, ConfigDict

from foldstack.compression.evaluation.beside_dense import leaves
from foldstack.compression.evaluation.paired import Item, PairedDifference
from foldstack.compression.evaluation.records import Benchmark, PerplexityResult
from foldstack.compression.evaluation.tracks.judge import WinRate
from foldstack.compression.evaluation.tracks.paired_task import (
    ROLLING,
    PairedLoss,
    PairedScores,
    metric_of,
    paired_losses,
    paired_scores,
    weighting_of,
)
from foldstack.compression.evaluation.tracks.verdict import Thresholds, Verdict

TEXT_TRACK, BENCHMARKS_TRACK = "text", "benchmarks"
"""The tracks of what every model of a run is evaluated by."""
PERPLEXITY = "perplexity"
LEAST, MOST = 0.01, 1.0
"""Shares count for a track's score within these."""
DRAWS = 4000


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@runtime_checkable
class Answers(Protocol):
    """What a model made of benchmarks."""

    @property
    def benchmarks(self) -> Mapping[str, Benchmark]: ...
    def of(self, benchmark: str) -> Sequence[Item]: ...


class TaskResult(_Record):
    """One task of a compressed model beside the dense one, on the same items."""

    task: str
    metric: str
    dense: float
    other: float
    """The compressed model's score; a perplexity or bits per byte is lower when better."""
    num_items: int
    """That both models answered."""
    of_items: int
    """That the dense model answered: more where reading was stopped early."""
    chance: float = 0.0
    retained: float | None = None
    """Share of what the dense model has above chance; of a loss the ratio of perplexities. None
    where the dense model is at chance."""
    stderr: float | None = None
    raw_ratio: float | None = None
    """The other score over the dense one, chance and all; of a loss the ratio of perplexities."""
    verdict: Verdict | None = None
    """None where nothing was scored."""
    items_needed: int | None = None
    """Of an open verdict: items that would decide if it goes on so; None: no number is known."""

    @property
    def is_scored(self) -> bool:
        return self.retained is not None

    @property
    def is_stopped_early(self) -> bool:
        return self.num_items < self.of_items

    @property
    def read(self) -> str:
        """How much was read, in words."""
        of = f" of {self.of_items:,}" if self.is_stopped_early else ""
        return f"{self.num_items:,}{of} {self.unit}"

    @property
    def unit(self) -> str:
        """What is counted."""
        return "windows" if self.metric == PERPLEXITY else "items"


class TrackResult(_Record):
    """All tasks of one track."""

    track: str
    tasks: tuple[TaskResult, ...]
    score: float | None = None
    """Geometric mean of the shares retained, each of 0.01 to 1; None where no task is scored."""
    stderr: float | None = None
    worst: str = ""
    """The task that retains least."""
    agreement: dict[str, float] = {}
    """Of answers that nothing is right about: mean F1 of their words with the dense model's."""
    win_rates: dict[str, WinRate] = {}
    """Of such answers: how often a judge prefers them to the dense model's."""
    om_llmcbench: float | None = None
    """Quadratic mean of the raw ratios, as LLMCBench's overall metric is said to be."""

    @property
    def scored(self) -> list[TaskResult]:
        return [task for task in self.tasks if task.is_scored]

    @property
    def verdict(self) -> Verdict | None:
        """Matching when every scored task is; None where none is scored."""
        return combined([task.verdict for task in self.tasks])


class ModelVerdict(_Record):
    """The line that is read first of a compressed model."""

    verdict: Verdict | None
    because: str
    """Which task decides, and by how much; what an open verdict would take."""

    def __str__(self) -> str:
        return f"{self.verdict or 'not judged'}: {self.because}" if self.because else "not judged"


def combined(verdicts: Sequence[Verdict | None]) -> Verdict | None:
    """Of several tasks or tracks: not matching if one is not, matching if all are."""
    found = {verdict for verdict in verdicts if verdict is not None}
    if "not matching" in found or not found:
        return "not matching" if found else None
    return "open" if "open" in found else "matching"


def task_of_scores(
    task: str, metric: str, paired: PairedScores | PairedLoss, of_items: int, *,
    at_chance: bool, ratio: float, thresholds: Thresholds,
) -> TaskResult:  # fmt: skip
    """The result of one task.

    Args:
        task: its name.
        metric: its metric.
        paired: both models' scores.
        of_items: that the dense model answered.
        at_chance: the dense model may be guessing.
        ratio: of the dense score that matches.
        thresholds: that decide.
    """
    dense, other = paired.scores
    chance = paired.chance if isinstance(paired, PairedScores) else 0.0
    known = TaskResult(
        task=task, metric=metric, dense=dense, other=other, chance=chance,
        num_items=paired.num_items, of_items=of_items,
    )  # fmt: skip
    if at_chance or (dense <= chance and isinstance(paired, PairedScores)):
        return known
    share, error = paired.retained()
    statistic = paired.statistic(ratio)
    verdict = thresholds.judge(statistic)
    needed = thresholds.items_needed(statistic, paired.num_items) if verdict == "open" else None
    raw = other / dense if isinstance(paired, PairedScores) else share
    return known.model_copy(
        update={
            "retained": share, "stderr": error, "raw_ratio": raw, "verdict": verdict,
            "items_needed": needed,
        }
    )  # fmt: skip


def text_result(
    name: str, dense: PerplexityResult, other: PerplexityResult, found: PairedDifference, *,
    ratio: float, thresholds: Thresholds,
) -> TaskResult:  # fmt: skip
    """The result on a text, whose perplexities are what is shown."""
    result = task_of_scores(
        name, PERPLEXITY, PairedLoss(found, 1.0), found.num_items, at_chance=False, ratio=ratio,
        thresholds=thresholds,
    )  # fmt: skip
    return result.model_copy(update={"dense": dense.perplexity, "other": other.perplexity})


def benchmark_results(
    names: Sequence[str], dense: Answers, other: Answers, *,
    ratio: float, thresholds: Mapping[str, Thresholds],
    metrics: Mapping[str, str], chance: Mapping[str, float],
) -> list[TaskResult]:  # fmt: skip
    """The results of benchmarks and groups; a group without a score of its own is its members.

    Args:
        names: of the benchmarks.
        dense: with all their items.
        other: with the same, or with the first of them.
        ratio: of the dense score that matches.
        thresholds: by name.
        metrics: scored in place of what `metric_of` chooses, by name.
        chance: what guessing scores where the number of choices does not say it, by name.
    """
    found: list[TaskResult] = []
    for name in names:
        benchmark = dense.benchmarks[name]
        metric = metric_of(name, benchmark, metrics)
        members = list(dict.fromkeys(leaves(name, dense.benchmarks)))
        of_dense = {member: dense.of(member) for member in members}
        of_other = {member: other.of(member) for member in members}
        weighting = None if metric is None else weighting_of(metric, benchmark, of_dense)
        if metric is None or weighting is None:
            if benchmark.members:
                limits = dict.fromkeys(benchmark.members, thresholds[name])
                found += benchmark_results(
                    benchmark.members, dense, other, ratio=ratio, thresholds=limits,
                    metrics=metrics, chance=chance,
                )  # fmt: skip
            continue
        if metric == ROLLING:
            if benchmark.members or len(of_dense[name]) < 2:
                continue
            losses = paired_losses(of_dense[name], of_other[name], name)
            found.append(task_of_scores(
                name, metric, losses, len(of_dense[name]), at_chance=False, ratio=ratio,
                thresholds=thresholds[name],
            ))  # fmt: skip
            continue
        paired = [
            paired_scores(of_dense, answered, metric, weighting, chance.get(name))
            for answered in (of_dense, of_other)
        ]
        found.append(task_of_scores(
            name, metric, paired[1], paired[0].num_items, at_chance=paired[0].is_at_chance,
            ratio=ratio, thresholds=thresholds[name],
        ))  # fmt: skip
    return found


def track_result(track: str, tasks: Sequence[TaskResult]) -> TrackResult:
    """The score of a track from its tasks; see the module."""
    scored = [task for task in tasks if task.retained is not None]
    if not scored:
        return TrackResult(track=track, tasks=tuple(tasks))
    shares = [task.retained or 0.0 for task in scored]
    score, error = geometric_mean(shares, [task.stderr or 0.0 for task in scored])
    return TrackResult(
        track=track,
        tasks=tuple(tasks),
        score=score,
        stderr=error,
        worst=min(scored, key=lambda task: task.retained or 0.0).task,
        om_llmcbench=quadratic_mean([task.raw_ratio or 0.0 for task in scored]),
    )


def geometric_mean(shares: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Geometric mean of shares within `LEAST` and `MOST`, and its standard error.

    The error is the spread of the mean when every share varies by its own: the delta method's
    R / N sqrt(sum (se / r)^2) wherever that holds, and right where a share is cut off.
    """
    values = np.clip(shares, LEAST, MOST)
    drawn = np.random.default_rng(0).normal(shares, errors, (DRAWS, len(values)))
    means = np.exp(np.log(np.clip(drawn, LEAST, MOST)).mean(1))
    return float(np.exp(np.log(values).mean())), float(means.std(ddof=1))


def quadratic_mean(ratios: Sequence[float]) -> float:
    """sqrt(1/N sum r^2): never below the arithmetic mean, which is never below the geometric."""
    return math.sqrt(math.fsum(ratio**2 for ratio in ratios) / len(ratios))


def model_verdict(tracks: Sequence[TrackResult], within: float) -> ModelVerdict:
    """The verdict over tracks, with the task that decides it."""
    tasks = [(track.track, task) for track in tracks for task in track.scored]
    verdict = combined([task.verdict for _, task in tasks])
    if verdict is None:
        at_chance = any(track.tasks for track in tracks)
        reason = "the dense model is at chance on every task" if at_chance else ""
        return ModelVerdict(verdict=None, because=reason)
    if verdict == "matching":
        names = f"{len(tasks)} tasks are" if len(tasks) > 1 else f"{tasks[0][1].task} is"
        because = f"{names} within {100 * within:.3g} % of dense"
        return ModelVerdict(verdict=verdict, because=because)
    concerned = [(track, task) for track, task in tasks if task.verdict == verdict]
    if verdict == "not matching":
        _, task = min(concerned, key=lambda each: each[1].retained or 0.0)
        change = 100 * ((task.raw_ratio or 0.0) - 1)
        others = f" and {len(concerned) - 1} more" if len(concerned) > 1 else ""
        return ModelVerdict(
            verdict=verdict, because=f"{task.task} {change:+.1f} % on {task.read}{others}"
        )
    _, task = max(concerned, key=lambda each: each[1].items_needed or math.inf)
    return ModelVerdict(verdict=verdict, because=f"{_what_it_takes(task)}, {task.read} are read")


def _what_it_takes(task: TaskResult) -> str:
    if task.items_needed is None or task.items_needed > 1_000_000:
        return f"{task.task} lies on the margin"
    return f"{task.task} takes about {_rounded(task.items_needed):,} {task.unit}"


def _rounded(count: int) -> int:
    """To two digits, upwards: it is a forecast."""
    size = 10 ** max(0, len(str(count)) - 2)
    return -(-count // size) * size
