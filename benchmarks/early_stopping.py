"""What it saves to read items until a verdict is known, and whether the verdicts are the same.

    python benchmarks/early_stopping.py [--recipe tracks-demo] [--home DIR] [--json] [KEY=VALUE ...]

Every variant of the recipe is measured on its tracks twice: whole, and under `sequential`. All that
comes before is made once; a second call prints what is in the home.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from foldstack.compression.evaluation.tracks.result import TaskResult
from foldstack.compression.evaluation.tracks.track_beside_dense import track_result_of
from foldstack.flows.config.run_config import RunConfig, load_config
from foldstack.flows.running.branches import Branch, Layout, lay_out
from foldstack.tasks.evaluate_track import load_track
from foldstack.tasks.stage import run_stage
from foldstack.tasks.store.artifacts import Artifact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="tracks-demo")
    parser.add_argument("--home", type=Path, help="where results are kept; else nowhere")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument("overrides", nargs="*", help="of the recipe, KEY=VALUE")
    arguments = parser.parse_args()
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
