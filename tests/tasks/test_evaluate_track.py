"""A track is a stage: cached by what it measures, and stopped early only where that is asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldstack.compression.errors import InputError
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.preflight import unknown_benchmarks
from foldstack.flows.running.branches import Layout, lay_out

Lay = Callable[..., Layout]
QUIZ = {"tasks": ["stdlib_continuation"], "limit": 3}


@pytest.fixture
def lay(model_folder: Callable[..., Path], tmp_path: Path) -> Lay:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    source = {"corpus": str(text)}
    folder = model_folder("llama")

    def of(**evaluation: Any) -> Layout:
        data: dict[str, Any] = {
            "model": {"name": str(folder), "device": "cpu"},
            "calibration": {"source": source, "num_windows": 8, "window_tokens": 16},
            "evaluation": {
                "perplexity": {"source": source, "protocol": {"window_tokens": 16}}, **evaluation,
            },
            "methods": ["shortgpt"],
            "sparsities": [0.2],
            "output": {"home": str(tmp_path / "home")},
        }  # fmt: skip
        return lay_out(parse_config(data))

    return of


def fingerprints(layout: Layout) -> dict[str, list[str]]:
    return {
        branch.label: [stage.fingerprint for stage in branch.stages.values()]
        for branch in layout.branches
    }


def test_one_more_track_is_one_more_stage(lay: Lay) -> None:
    """Breaks when adding a track, or renaming one, measures the others again."""
    before, after = (
        lay(tracks={"quiz": QUIZ}),
        lay(tracks={"quiz": QUIZ, "more": QUIZ | {"limit": 4}}),
    )
    for label, stages in fingerprints(before).items():
        assert len(set(fingerprints(after)[label]) - set(stages)) == 1
    renamed = lay(tracks={"inference": QUIZ})
    assert fingerprints(renamed) == fingerprints(before)
    assert "evaluate quiz of dense" in [stage.label for stage in before.stages]


def test_early_stopping_waits_for_the_dense_model_and_is_cached_apart(lay: Lay) -> None:
    """Breaks when a variant is judged without the dense model's items, or a part read passes for
    the whole."""
    whole, early = lay(tracks={"quiz": QUIZ}), lay(tracks={"quiz": QUIZ}, sequential={})
    dense, variant = early.branches
    assert dense.tracks["quiz"].fingerprint == whole.branches[0].tracks["quiz"].fingerprint
    assert dense.tracks["quiz"].artifact(early.store) == variant.tracks["quiz"].dense
    assert variant.tracks["quiz"].fingerprint != whole.branches[1].tracks["quiz"].fingerprint


def test_presets_are_changed_track_by_track(lay: Lay) -> None:
    """Breaks when a setting of one track loses the rest of its preset, or null keeps it."""
    tracks = {"inference": {"limit": 7}, "generation": None}
    chosen = parse_config(
        {"methods": ["shortgpt"], "evaluation": {"preset": "quick", "tracks": tracks}}
    )
    found = chosen.evaluation.tracks
    assert list(found) == ["knowledge", "inference"]
    assert (found["inference"].tasks, found["inference"].limit) == (("arc_easy", "piqa"), 7)
    again = parse_config(chosen.model_dump(mode="json"))
    assert again.evaluation == chosen.evaluation
    with pytest.raises(
        InputError, match="no preset quik: there are kick, llmcbench, quick; did you"
    ):
        parse_config({"methods": ["shortgpt"], "evaluation": {"preset": "quik"}})


@pytest.mark.parametrize("preset", ["kick", "llmcbench", "quick"])
def test_presets_are_tracks(preset: str) -> None:
    """Breaks when a preset names a key that a track has not."""
    chosen = parse_config({"methods": ["shortgpt"], "evaluation": {"preset": preset}})
    assert chosen.evaluation.tracks


def test_what_is_missing_is_said_in_one_sentence_before_anything_runs(
    lay: Lay, tmp_path: Path
) -> None:
    """Breaks when a sweep finds out after hours that a data set is not there."""
    layout = lay(tracks={"quiz": {"tasks": ["arc_easy", "stdlib_continuation", "piqa"]}})
    (sentence,) = unknown_benchmarks(layout, {stage.fingerprint for stage in layout.stages})
    assert "arc_easy" in sentence
    assert "piqa" in sentence
    assert "stdlib_continuation" not in sentence
    assert json.dumps(sentence)  # one line


def test_a_file_of_another_form_is_refused_before_anything_runs(lay: Lay, tmp_path: Path) -> None:
    """Breaks when a wrong file is found out after an hour of compressing."""
    file = tmp_path / "some.jsonl"
    file.write_text('{"query": "Which?", "choices": ["a", "b"]}\n')
    layout = lay(tracks={"own": {"files": {"mine": {"file": str(file), "form": "choices"}}}})
    (sentence,) = unknown_benchmarks(layout, {stage.fingerprint for stage in layout.stages})
    assert sentence.endswith(
        "which needs query, choices and gold, the place of the right one: KeyError 'gold'"
    )
    with pytest.raises(InputError, match=r"items are read from .*none\.jsonl, which is no file"):
        lay(tracks={"own": {"files": {"mine": {"file": "none.jsonl", "form": "choices"}}}})
