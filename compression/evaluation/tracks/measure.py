"""A track measured: all of it, or until the verdict on each task is known."""

import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from foldstack.compression.evaluation.beside_dense import leaves
from foldstack.compression.evaluation.harness import evaluate
from foldstack.compression.evaluation.paired import Item
from foldstack.compression.evaluation.perplexity import measure_perplexity
from foldstack.compression.evaluation.records import HarnessResult, PerplexityResult
from foldstack.compression.evaluation.tracks.local_tasks import Reader, local_task
from foldstack.compression.evaluation.tracks.sequential import SequentialRule
from foldstack.compression.evaluation.tracks.settings import Track
from foldstack.compression.evaluation.tracks.track_beside_dense import task_results
from foldstack.compression.evaluation.tracks.track_evaluation import Looks, TrackEvaluation
from foldstack.compression.evaluation.tracks.verdict import VerdictRule
from foldstack.compression.text.corpus import documents

Progress = Callable[[str, int, int], None]


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
            if not task_results(dense, dense, [name], self.track, rule):
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
        if any(task.verdict == "open" for task in task_results(other, dense, [name], track, rule))
    }
