"""A run is told again without being run while nothing that it went by has changed."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foldstack.compression.storage import digest
from foldstack.compression.text.corpus import TextSource, source_digest
from foldstack.flows.comparison.files import save_texts
from foldstack.flows.comparison.result import Comparison, Row
from foldstack.flows.comparison.unchanged import Question, found_before, note
from foldstack.flows.config.run_config import load_config
from foldstack.tasks.store.artifacts import ArtifactStore

CONFIG = """
model: {{name: {place}/model}}
calibration: {{source: {{corpus: {place}/text.txt}}}}
methods: [shortgpt]
output: {{home: {place}/home}}
"""


class Run:
    """One that has ended, of one stage."""

    def __init__(self, place: Path) -> None:
        self.place, self.config = place, place / "config.yaml"
        for folder in ("model", "code/flows", "packages", "home/models", "home/sweeps/model-s"):
            (place / folder).mkdir(parents=True)
        (place / "text.txt").write_text("a text")
        (place / "model/config.json").write_text("{}")
        (place / "code/flows/a.py").write_text("pass")
        self.config.write_text(CONFIG.format(place=place))
        self.store = ArtifactStore(place / "home/store")
        self.artifact = self.store.artifact("rank_blocks", "0" * 16)
        self.artifact.folder.mkdir(parents=True)
        for name in ("manifest.json", "scores.json"):
            (self.artifact.folder / name).write_text("{}")
        source_digest(TextSource(corpus=str(place / "text.txt")))
        digest.digest_folder(place / "model")

    def end(self, *overrides: str, **told: Any) -> None:
        config = load_config(str(self.config), overrides)
        row = Row(
            label="dense",
            method="dense",
            sparsity=0,
            state="failed" if told.pop("failed", False) else "done",
        )
        comparison = Comparison(
            title="t", sweep="s", model="m", rows=(row,), num_stages=1, num_cached=0, **told
        )
        folder = self.place / "home/sweeps/model-s"
        save_texts(comparison, folder)
        stage = SimpleNamespace(artifact=lambda store: self.artifact)
        layout: Any = SimpleNamespace(
            config=config, store=self.store, stages=[stage], report_folder=folder
        )
        # Asked when all that is read here had been there for long.
        note(replace(self.question(*overrides), asked_at=time.time() + 10), layout, comparison)

    def question(self, *overrides: str) -> Question:
        question = Question.of(str(self.config), overrides)
        assert question is not None
        return question


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("MLFLOW_TRACKING_URI", "FOLDSTACK_STORE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(digest, "SEEN", set())
    monkeypatch.setattr(digest, "PACKAGE_FOLDER", tmp_path / "code")
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    return Run(tmp_path)


def test_what_was_found_is_told_again(run: Run) -> None:
    assert found_before(run.question()) is None
    run.end()
    manifest = run.artifact.folder / "manifest.json"
    os.utime(manifest, (1, 1))  # the store dates it whenever something uses it
    found = found_before(run.question())
    assert found is not None
    assert (found.num_cached, found.num_stages) == (1, 1)
    assert manifest.stat().st_mtime > 1
    assert found_before(run.question("sparsities=[0.5]")) is None


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a text": lambda place: (place / "text.txt").write_text("b text"),
    "a file of the model": lambda place: (place / "model/config.json").write_text("[]"),
    "one more file of the model": lambda place: (place / "model/more.json").touch(),
    "our code": lambda place: (place / "code/flows/a.py").write_text("None"),
    "a package": lambda place: (place / "packages/other-2.0.dist-info").mkdir(),
    "an artifact": lambda place: next(place.rglob("scores.json")).write_text("[]"),
    "a manifest": lambda place: next(place.rglob("manifest.json")).write_text("[]"),
    "no store": lambda place: shutil.rmtree(place / "home/store"),
    "the report": lambda place: next(place.rglob("comparison.md")).unlink(),
    "a link": lambda place: (place / "home/models/a").symlink_to("b"),
    "what MLflow holds": lambda place: (place / "home/mlflow.db").touch(),
    "the config": lambda place: (place / "config.yaml").write_text("methods: [uidl]"),
    "the config's end": lambda place: (place / "config.yaml").write_text("methods: ["),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_anything_is_seen(change: Callable[[Path], Any], run: Run) -> None:
    run.end()
    assert found_before(run.question()) is not None
    time.sleep(0.02)  # a file system's clock ticks
    change(run.place)
    question = Question.of(str(run.config), ())
    assert question is None or found_before(question) is None


def test_what_a_run_makes_is_new(run: Run) -> None:
    """The store takes digests of it, too."""
    made = run.artifact.folder / "scores.json"
    digest.digest_file(made)
    os.utime(made, (time.time() + 60, time.time() + 60))
    run.end()
    assert found_before(run.question()) is not None


def test_what_was_changed_under_a_run_is_not_noted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been read before: what was made of it is not what it is now."""
    monkeypatch.setattr("time.time", lambda: (run.place / "text.txt").stat().st_mtime - 10.5)
    run.end()
    assert not run.question().file.exists()


def test_another_environment_is_another_question(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run.question()
    assert run.question() == before
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert run.question() != before
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.chdir(tmp_path)
    assert run.question() != before


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ((), {"failed": True}),
        ((), {"warnings": ("something to know",)}),
        (("model.name=someone/model",), {}),
        (("calibration.source.corpus=wikitext",), {}),
        (("tracking.uri=http://server:5000",), {}),
        (("output.store=s3://bucket/prefix",), {}),
    ],
)
def test_what_files_alone_do_not_tell_is_not_noted(
    overrides: tuple[str, ...], told: dict[str, Any], run: Run
) -> None:
    run.end(*overrides, **told)
    assert found_before(run.question(*overrides)) is None
