"""A run whose text is `self`: who writes what, when it is written anew, and what reads it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from foldstack.compression.checkpoints.checkpoint import load_tokenizer
from foldstack.compression.text.calibration import Windows
from foldstack.compression.text.self_written import written_texts
from foldstack.flows.config.run_config import RunConfig, parse_config
from foldstack.flows.planning.forecast import dry_run
from foldstack.flows.planning.needs import needs_of
from foldstack.flows.running.branches import lay_out
from foldstack.tasks.evaluate_model import load_perplexity
from foldstack.tasks.stage import run_stage
from foldstack.tasks.write_windows import WriteWindows

Make = Callable[..., RunConfig]


@pytest.fixture
def make(model_folder: Callable[..., Path], tmp_path: Path) -> Make:
    folder = model_folder("llama")

    def config(temperature: float = 1.0, seed: int = 0) -> RunConfig:
        source = {"corpus": "self", "temperature": temperature}
        windows = {"num_windows": 3, "window_tokens": 16}
        return parse_config(
            {
                "model": {"name": str(folder), "device": "cpu"},
                "calibration": {"source": source, **windows, "seed": seed},
                "methods": ["shortgpt"],
                "recovery": {"steps": 1, "source": source, "windows": {**windows, "seed": 1}},
                "evaluation": {
                    "perplexity": {
                        "source": {"corpus": "self", "split": "test"},
                        "protocol": {"window_tokens": 16},
                    }
                },
                "output": {"home": str(tmp_path / "home")},
            }
        )

    return config


def test_dense_model_writes_all_three_texts_and_they_differ(make: Make) -> None:
    layout = lay_out(make())
    assert [stage.label for stage in layout.windows] == [
        "write calibration windows",
        "write recovery windows",
        "write evaluation windows",
    ]
    made = [run_stage(stage, layout.store) for stage in layout.windows]
    written = [Windows.load(artifact.open()) for artifact in made]
    assert [tuple(windows.tokens.shape) for windows in written] == [(3, 16), (3, 16), (64, 16)]
    texts = [tuple(map(tuple, windows.tokens.tolist())) for windows in written]
    assert not set(texts[0]) & {*texts[1], *texts[2]}

    # Every model of the run is measured on the last one.
    evaluate = layout.branches[0].before
    measured = load_perplexity(run_stage(evaluate, layout.store))
    assert measured.num_bytes is not None
    documents = written_texts(written[2], load_tokenizer(layout.model.folder))
    joined = "\n\n".join(documents).encode()
    assert len(joined) - 4 < measured.num_bytes < len(joined)  # the first token is not predicted
    assert {branch.before.written for branch in layout.branches} == {made[2]}
    assert {f"write_windows/{artifact.fingerprint}" for artifact in made[2:]} <= set(
        evaluate.inputs()
    )


def test_windows_are_written_anew_when_what_decides_them_changes(make: Make) -> None:
    def fingerprint(**changes: float) -> str:
        stage = lay_out(make(**changes)).calibration
        assert isinstance(stage, WriteWindows)
        return stage.fingerprint

    usual = fingerprint()
    assert fingerprint() == usual
    assert len({usual, fingerprint(temperature=0.8), fingerprint(seed=3)}) == 3


def test_plan_foresees_the_writing(make: Make) -> None:
    config = make()
    layout = lay_out(config)
    written = {stage.fingerprint: stage for stage in layout.windows}
    expected = {entry.label: entry for entry in dry_run(config).stages}
    for fingerprint, stage in written.items():
        entry = expected[stage.label]
        assert entry.basis == "arithmetic"
        assert 0 < entry.seconds < 60
        assert entry.memory_bytes == needs_of(layout)[fingerprint].memory_bytes > 0
