"""What a model made of a track: every item of its tasks, every window of its texts, in a folder."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter

from foldstack.compression.evaluation.harness import read_items, write_items
from foldstack.compression.evaluation.paired import Item
from foldstack.compression.evaluation.records import Benchmark, PerplexityResult
from foldstack.compression.evaluation.tracks.judge import WinRate

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
