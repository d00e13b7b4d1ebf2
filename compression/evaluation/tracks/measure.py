"""A track measured: every item of its tasks, every window of its texts, kept in a folder."""

import dataclasses
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.evaluation.beside_dense import Evaluation, leaves, loss_difference
from foldstack.compression.evaluation.harness import (
    Benchmark,
    HarnessResult,
    evaluate,
    read_items,
    write_items,
)
from foldstack.compression.evaluation.paired import Item, PairedDifference, paired_ratio
from foldstack.compression.evaluation.perplexity import PerplexityResult, measure_perplexity
from foldstack.compression.evaluation.tracks.answers import f1
from foldstack.compression.evaluation.tracks.judge import WinRate, win_rate
from foldstack.compression.evaluation.tracks.local_tasks import (
    Reader,
    local_task,
    questions_in,
)
from foldstack.compression.evaluation.tracks.result import (
    BENCHMARKS_TRACK,
    TEXT_TRACK,
    TaskResult,
    TrackResult,
    benchmark_results,
    text_result,
    track_result,
)
from foldstack.compression.evaluation.tracks.sequential import SequentialRule, thresholds_at
from foldstack.compression.evaluation.tracks.settings import Track
from foldstack.compression.evaluation.tracks.verdict import Thresholds, VerdictRule
from foldstack.compression.text.corpus import documents

Progress = Callable[[str, int, int], None]
OPEN, CLOSED = "triviaqa_open", "triviaqa_closed"
BENCHMARKS, ITEMS, LOOKS, SPREAD = "benchmarks.json", "items.jsonl", "looks.json", "spread.json"
WIN_RATES = "win_rates.json"


class Looks(BaseModel):
    """How far a task was read under a sequential rule."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    counts: tuple[int, ...]
    """Items read by each look."""
    of_items: int
    """That the dense model answered."""


@dataclass(frozen=True)
class TrackEvaluation:
    """What a model made of a track."""

    benchmarks: Mapping[str, Benchmark] = field(default_factory=dict)
    items: Sequence[Item] = ()
    texts: Mapping[str, PerplexityResult] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    """Standard deviation of scores over seeds, by "task/metric"; of one seed none."""
    looks: Mapping[str, Looks] = field(default_factory=dict)
    """By task, where reading might have been stopped early."""
    win_rates: Mapping[str, WinRate] = field(default_factory=dict)
    """By task, where a judge was asked."""

    def of(self, benchmark: str) -> Sequence[Item]:
        """The items of one benchmark."""
        return self._by_benchmark.get(benchmark, ())

    @cached_property
    def _by_benchmark(self) -> Mapping[str, Sequence[Item]]:
        found: dict[str, list[Item]] = defaultdict(list)
        for item in self.items:
            found[item.benchmark].append(item)
        return dict(found)

    def save(self, folder: Path) -> None:
        """Write it as JSON files."""
        (folder / BENCHMARKS).write_bytes(_BENCHMARKS.dump_json(dict(self.benchmarks), indent=1))
        (folder / LOOKS).write_bytes(_LOOKS.dump_json(dict(self.looks), indent=1))
        (folder / WIN_RATES).write_bytes(_WIN_RATES.dump_json(dict(self.win_rates), indent=1))
        (folder / SPREAD).write_text(json.dumps(dict(self.spread), indent=1), encoding="utf-8")
        write_items(self.items, folder / ITEMS)
        for name, text in self.texts.items():
            file = folder / f"perplexity.{name}.json"
            file.write_text(text.model_dump_json(indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "TrackEvaluation":
        """What `save` wrote."""
        texts = {
            file.name.removeprefix("perplexity.").removesuffix(".json"): file
            for file in sorted(folder.glob("perplexity.*.json"))
        }
        return cls(
            _BENCHMARKS.validate_json((folder / BENCHMARKS).read_bytes()),
            read_items(folder / ITEMS),
            {name: PerplexityResult.model_validate_json(file.read_bytes())
             for name, file in texts.items()},
            json.loads((folder / SPREAD).read_bytes()),
            _LOOKS.validate_json((folder / LOOKS).read_bytes()),
            _WIN_RATES.validate_json((folder / WIN_RATES).read_bytes()),
        )  # fmt: skip


_BENCHMARKS = TypeAdapter(dict[str, Benchmark])
_LOOKS = TypeAdapter(dict[str, Looks])
_WIN_RATES = TypeAdapter(dict[str, WinRate])


@dataclass(frozen=True)
class TrackMeasurement:
    """One model on one track: call it.

    Args:
        model: on the device that it shall run on.
        tokenizer: the model's.
        track: what is measured.
        include_paths: folders with further task YAML files.
        batch_size: of lm-eval.
        progress: told of requests and windows done.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    track: Track
    include_paths: Sequence[Path] = ()
    batch_size: int = 8
    progress: Progress | None = None

    def whole(self) -> TrackEvaluation:
        """All items."""
        results = []
        for limit in dict.fromkeys(self.track.limits.values()):
            names = [name for name, own in self.track.limits.items() if own == limit]
            results.append(self._over_seeds(names, limit=limit))
        return TrackEvaluation(
            {name: found for result, _ in results for name, found in result.benchmarks.items()},
            [item for result, _ in results for item in result.items],
            self._texts(),
            {name: spread for _, spreads in results for name, spread in spreads.items()},
        )

    def until_decided(
        self, dense: TrackEvaluation, rule: VerdictRule, sequential: SequentialRule
    ) -> TrackEvaluation:
        """Items in a fixed random order, each task until its verdict is known.

        Args:
            dense: what the dense model made of all of them.
            rule: of the verdict.
            sequential: of the looks.
        """
        found = TrackEvaluation(dense.benchmarks, texts=self._texts())
        orders = {name: _Order.of(name, dense, sequential) for name in self.track.names}
        # What is never judged is never decided: it is read whole.
        for name in orders:
            if not _task_results(dense, dense, [name], self.track, rule):
                orders[name] = orders[name].at_once()
        items: list[Item] = []
        looks: dict[str, Looks] = {}
        waiting = list(orders)
        for number in range(sequential.looks):
            waiting = [name for name in waiting if number < len(orders[name].counts)]
            if not waiting:
                break
            samples = {
                leaf: ids for name in waiting for leaf, ids in orders[name].between(number).items()
            }
            result, _ = self._over_seeds(waiting, samples=samples)
            items += result.items
            for name in waiting:
                looks[name] = orders[name].looks(number)
            found = TrackEvaluation(dense.benchmarks, tuple(items), found.texts, looks=looks)
            verdicts = _open_tasks(found, dense, waiting, self.track, rule)
            waiting = [name for name in waiting if name in verdicts]
        return found

    def _texts(self) -> dict[str, PerplexityResult]:
        return {
            name: measure_perplexity(
                self.model, self.tokenizer, documents(text.source), text.protocol, self.progress
            )
            for name, text in self.track.texts.items()
        }

    def _local(self, names: Sequence[str], lm: Any) -> list[Any]:
        """Those of the tasks that are read from files."""
        reader = Reader(self.tokenizer, lm.max_length)
        return [
            local_task(name, local, reader)
            for name, local in self.track.files.items()
            if name in names
        ]

    def _over_seeds(
        self,
        names: Sequence[str],
        *,
        limit: int | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
    ) -> tuple[HarnessResult, dict[str, float]]:
        """The result of each seed, averaged by item, and the spread of the scores."""
        results = [
            evaluate(
                self.model,
                self.tokenizer,
                [name for name in names if name not in self.track.files],
                local=functools.partial(self._local, names),
                include_paths=self.include_paths,
                num_fewshot=self.track.num_fewshot,
                limit=limit,
                samples=samples,
                chat_template=self.track.chat_template,
                temperature=self.track.temperature,
                batch_size=self.batch_size,
                seed=seed,
                progress=self.progress,
            )
            for seed in self.track.seeds
        ]
        return (results[0], {}) if len(results) == 1 else averaged(results)


def track_result_of(
    name: str,
    track: Track,
    dense: TrackEvaluation,
    other: TrackEvaluation,
    rule: VerdictRule,
) -> TrackResult:
    """A model's result on a track beside the dense model's."""
    result = track_result(name, _task_results(other, dense, track.names, track, rule))
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


def averaged(results: Sequence[HarnessResult]) -> tuple[HarnessResult, dict[str, float]]:
    """One result of several seeds: item by item the mean of its numbers, and of the scores; and the
    standard deviation of each score over the seeds."""
    by_key: dict[tuple[str, str, int], list[Item]] = defaultdict(list)
    for result in results:
        for item in result.items:
            by_key[item.benchmark, item.filter, item.doc_id].append(item)
    items = [
        some[0].model_copy(update={"metrics": {
            metric: fmean(values)
            for metric in some[0].metrics
            if all(isinstance(item.metrics.get(metric), float) for item in some)
            for values in [[float(item.metrics[metric]) for item in some]]  # type: ignore[arg-type]
        }})
        for some in by_key.values()
    ]  # fmt: skip
    benchmarks, spread = dict(results[0].benchmarks), {}
    for name, benchmark in benchmarks.items():
        scores = dict(benchmark.scores)
        for metric, score in scores.items():
            values = [result.benchmarks[name].scores[metric].value for result in results]
            scores[metric] = score.model_copy(update={"value": fmean(values), "stderr": None})
            spread[f"{name}/{metric}"] = stdev(values)
        benchmarks[name] = benchmark.model_copy(update={"scores": scores})
    whole = results[0].model_copy(update={"benchmarks": benchmarks, "items": tuple(items)})
    return whole, spread


@dataclass(frozen=True)
class _Order:
    """In which order the documents of a task and of a group's members are read, and how far."""

    documents: Mapping[str, Sequence[int]]
    counts: Sequence[int]

    @classmethod
    def of(cls, name: str, dense: TrackEvaluation, rule: SequentialRule) -> "_Order":
        ids = {
            leaf: sorted({item.doc_id for item in dense.of(leaf)})
            for leaf in leaves(name, dense.benchmarks)
        }
        ordered = {
            leaf: [some[place] for place in rule.order(len(some))] for leaf, some in ids.items()
        }
        whole = cls(ordered, [sum(map(len, ids.values()))])
        return cls(ordered, whole.growing(rule.counts(whole.counts[-1])))

    def at_once(self) -> "_Order":
        """The same in a single look."""
        return _Order(self.documents, self.counts[-1:])

    def growing(self, counts: Sequence[int]) -> list[int]:
        """The looks at which every member has more documents than at the one before: lm-eval takes
        no documents for all of them."""
        kept: list[int] = []
        parts = dict.fromkeys(self.documents, 0)
        for count in counts[:-1]:
            new = {leaf: self._part(ids, count) for leaf, ids in self.documents.items()}
            if all(parts[leaf] < new[leaf] < len(ids) for leaf, ids in self.documents.items()):
                kept.append(count)
                parts = new
        return [*kept, counts[-1]]

    def between(self, number: int) -> dict[str, list[int]]:
        """Documents of each member that a look adds; sorted, as lm-eval goes through them."""
        before = self.counts[number - 1] if number else 0
        return {
            leaf: sorted(ids[self._part(ids, before) : self._part(ids, self.counts[number])])
            for leaf, ids in self.documents.items()
        }

    def looks(self, number: int) -> Looks:
        counts = (
            sum(self._part(ids, count) for ids in self.documents.values())
            for count in self.counts[: number + 1]
        )
        return Looks(counts=tuple(counts), of_items=self.counts[-1])

    def _part(self, ids: Sequence[int], count: int) -> int:
        """So many of a member's documents are among the first `count` of all."""
        return -(-len(ids) * count // self.counts[-1])


def _open_tasks(
    other: TrackEvaluation,
    dense: TrackEvaluation,
    names: Sequence[str],
    track: Track,
    rule: VerdictRule,
) -> set[str]:
    """Those that more items might decide."""
    return {
        name
        for name in names
        if any(task.verdict == "open" for task in _task_results(other, dense, [name], track, rule))
    }


def _task_results(
    other: TrackEvaluation,
    dense: TrackEvaluation,
    names: Sequence[str],
    track: Track,
    rule: VerdictRule,
) -> list[TaskResult]:
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
