"""What it saves to read items until a verdict is known, and whether the verdicts are the same.

    python benchmarks/early_stopping.py [--recipe tracks-demo] [--home DIR] [--json] [KEY=VALUE ...]

Every variant of the recipe is measured on its tracks twice: whole, and under `sequential`. All that
comes before is made once; a second call prints what is in the home.
--simulate draws tasks of 500 items instead, of models that keep a known share of the dense one's
right answers.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from foldstack.compression.evaluation.tracks.result import TaskResult
from foldstack.compression.evaluation.tracks.sequential import SequentialRule, thresholds_at
from foldstack.compression.evaluation.tracks.track_beside_dense import track_result_of
from foldstack.compression.evaluation.tracks.verdict import (
    Thresholds,
    VerdictRule,
    ratio_statistic,
)
from foldstack.flows.config.run_config import RunConfig, load_config
from foldstack.flows.running.branches import Branch, Layout, lay_out
from foldstack.tasks.evaluate_track import load_track
from foldstack.tasks.stage import run_stage
from foldstack.tasks.store.artifacts import Artifact

RATIOS = (0.5, 0.7, 0.8, 0.9, 0.95, 1.0)
OUTCOMES = ("same", "matching", "not matching", "open")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tracks-demo")
    parser.add_argument("--home", type=Path, help="where results are kept; else nowhere")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("overrides", nargs="*", help="of the recipe, KEY=VALUE")
    parser.add_argument("--simulate", action="store_true", help="draw tasks; no model is run")
    arguments = parser.parse_args()
    if arguments.simulate:
        shares = [simulated(ratio) for ratio in RATIOS]
        if arguments.json:
            print(json.dumps(shares, indent=1))
            return
        print("| keeps | items read of 500 | same verdict | matching | not matching | open |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: |")
        for row in shares:
            cells = [f"{row['items']:.0f}", *(f"{row[key]:.1%}" for key in OUTCOMES)]
            print(f"| {row['ratio']:.2f} | " + " | ".join(cells) + " |")
        return
    with TemporaryDirectory() as folder:
        rows = measure(arguments.recipe, arguments.home or Path(folder), arguments.overrides)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print("| model | task | whole | early | items | of | seconds whole | early |")
    print("| --- | --- | --- | --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        cells = [row[name] for name in ("model", "task", "whole", "early", "items", "of_items")]
        cells += [f"{row[name]:.1f}" for name in ("seconds_whole", "seconds_early")]
        print("| " + " | ".join(map(str, cells)) + " |")
    print(summary(rows))


def simulated(ratio: float, cases: int = 4000, items: int = 500) -> dict[str, float]:
    """Tasks on which the dense model is right on 60 % and the other one on `ratio` of that; beside
    what it lost, 5 % of the items change sides each way."""
    rule, sequential = VerdictRule(), SequentialRule()
    dense, lost, swapped = 0.6, 0.6 * (1 - ratio), 0.05
    shares = [dense - lost - swapped, lost + swapped, swapped, 1 - dense - swapped]
    drawn = np.random.default_rng(0).choice(4, (cases, items), p=shares)
    counts = sequential.counts(items)
    verdicts, read = np.zeros(cases), np.full(cases, items)
    for number, count in enumerate(counts):
        bounds = thresholds_at(rule, counts[: number + 1], items, 1)
        found = _verdicts(drawn[:, :count], rule, bounds)
        read = np.where((verdicts == 0) & (found != 0), count, read)
        verdicts = np.where(verdicts == 0, found, verdicts)
    whole = _verdicts(drawn, rule, rule.thresholds(1))
    return {
        "ratio": ratio, "items": float(read.mean()), "same": float((whole == verdicts).mean()),
        "matching": float((verdicts == 1).mean()), "not matching": float((verdicts == -1).mean()),
        "open": float((verdicts == 0).mean()),
    }  # fmt: skip


def _verdicts(drawn: "np.ndarray", rule: VerdictRule, bounds: Thresholds) -> "np.ndarray":
    """1 for matching, -1 for not, 0 for open."""
    both, first, second = ((drawn == kind).sum(1).astype(float) for kind in range(3))
    z = np.asarray(ratio_statistic(both, first, second, rule.ratio))
    return np.where(z > bounds.matching, 1, np.where(z < -bounds.not_matching, -1, 0))


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """Items, seconds and verdicts of all rows together."""
    total = {key: sum(row[key] for row in rows) for key in
             ("items", "of_items", "seconds_whole", "seconds_early")}  # fmt: skip
    same = sum(row["whole"] == row["early"] for row in rows)
    return (
        f"{total['items']} of {total['of_items']} items read "
        f"({1 - total['items'] / total['of_items']:.0%} saved), {total['seconds_early']:.0f} s "
        f"instead of {total['seconds_whole']:.0f} s; {same} of {len(rows)} verdicts are the same"
    )


def measure(recipe: str, home: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each task of each variant; a track's seconds are shared by its tasks."""
    beside = ["speed.enabled=false", "tracking.enabled=false", f"output.home={home}"]
    early = lay_out(load_config(recipe, [*overrides, *beside]))
    if early.config.evaluation.sequential is None:
        raise SystemExit(f"recipe {recipe} has no evaluation.sequential")
    whole = lay_out(load_config(recipe, [*overrides, *beside, "evaluation.sequential=null"]))
    rows: list[dict[str, Any]] = []
    for layout in (early, whole):
        for stage in layout.before_speeds:
            if not stage.stage.startswith("evaluate_model"):
                run_stage(stage, layout.store)
    for pair in zip(early.branches[1:], whole.branches[1:], strict=True):
        for track in early.config.evaluation.tracks:
            rows += _rows(track, early, pair)
    return rows


def _rows(track: str, layout: Layout, pair: tuple[Branch, Branch]) -> list[dict[str, Any]]:
    made = [branch.tracks[track].artifact(layout.store) for branch in pair]
    dense = layout.branches[0].tracks[track].artifact(layout.store)
    results = [_results(layout.config, track, dense, artifact) for artifact in made]
    seconds = [artifact.manifest().seconds / max(1, len(results[0])) for artifact in made]
    return [
        {
            "model": pair[0].label, "task": task, "whole": results[1][task].verdict,
            "early": early.verdict, "items": early.num_items, "of_items": early.of_items,
            "seconds_whole": seconds[1], "seconds_early": seconds[0],
        }
        for task, early in results[0].items()
    ]  # fmt: skip


def _results(
    config: RunConfig, track: str, dense: Artifact, made: Artifact
) -> dict[str, TaskResult]:
    evaluation = config.evaluation
    found = track_result_of(
        track, evaluation.tracks[track], load_track(dense), load_track(made), evaluation.verdict
    )
    return {task.task: task for task in found.tasks}


if __name__ == "__main__":
    main()
