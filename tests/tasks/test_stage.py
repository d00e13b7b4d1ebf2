"""Stages: what counts in a fingerprint, what runs, and why."""

import logging
from pathlib import Path
from typing import ClassVar

import pytest
from pydantic import BaseModel

from foldstack.compression.errors import InputError
from foldstack.tasks import stage as stage_module
from foldstack.tasks.running.explanation import Change, explain
from foldstack.tasks.stage import ModelRef, Progress, Stage, no_progress, run_stage
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.store.manifest import Facts


class Settings(BaseModel):
    sparsity: float = 0.25
    seed: int = 0
    blocks: tuple[int, ...] = (1, 2)


class Count(Stage):
    stage: ClassVar[str] = "count"
    model: ModelRef
    settings: Settings = Settings()
    device: str = "cpu"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"device"})

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.errors",)

    @property
    def label(self) -> str:
        return f"count {self.settings.sparsity}"

    def produce(self, folder: Path, work: Path, progress: Progress) -> Facts:
        start = work / "start"
        if not start.exists():
            start.write_text("started")
            if self.settings.seed == 13:
                raise RuntimeError("killed")
        progress("counting", 1, 1)
        (folder / "count.txt").write_text(start.read_text())
        return {"blocks": len(self.settings.blocks)}


class Report(Stage):
    stage: ClassVar[str] = "report"
    counts: tuple[Artifact, ...]
    title: str = "all"

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.storage.digest",)

    def produce(self, folder: Path, work: Path, progress: Progress) -> Facts:
        texts = [(count.open() / "count.txt").read_text() for count in self.counts]
        (folder / "report.txt").write_text("\n".join(texts))
        return {}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def model(name: str = "tiny", fingerprint: str = "ab" * 32) -> ModelRef:
    return ModelRef(name=name, folder=Path("/models") / name, fingerprint=fingerprint)


def count(seed: int = 0, sparsity: float = 0.25) -> Count:
    return Count(model=model(), settings=Settings(seed=seed, sparsity=sparsity))


def test_equal_stages_have_equal_fingerprints_wherever_their_inputs_are(tmp_path: Path) -> None:
    assert count().fingerprint == count().fingerprint
    assert Count(model=model("renamed")).fingerprint == count().fingerprint
    assert Count(model=model(), device="cuda").fingerprint == count().fingerprint
    here, there = ArtifactStore(tmp_path / "here"), ArtifactStore(tmp_path / "there")
    reports = [Report(counts=(count().artifact(store),)).fingerprint for store in (here, there)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(count(sparsity=0.5), id="a parameter"),
        pytest.param(Count(model=model(), settings=Settings(blocks=(2, 1))), id="an order"),
        pytest.param(Count(model=model(fingerprint="cd" * 32)), id="the model's bytes"),
    ],
)
def test_what_determines_the_output_changes_the_fingerprint(other: Count) -> None:
    assert other.fingerprint != count().fingerprint


def test_versions_code_and_kind_of_stage_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = count().fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "package_version", lambda name: "0.0")
        assert count().fingerprint != before
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "code_sources", lambda modules, alone: {"x": "changed"})
        assert count().fingerprint != before
    with monkeypatch.context() as patch:
        patch.setattr(Count, "stage", "recount")
        assert count().fingerprint != before
    assert count().fingerprint == before


def test_copy_with_other_settings_has_another_fingerprint() -> None:
    first = count()
    before = first.fingerprint
    copy = first.model_copy(update={"settings": Settings(seed=5)})
    assert copy.fingerprint == count(seed=5).fingerprint != before


def test_who_only_waited_does_not_say_that_it_made_it(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = count()
    made = run_stage(stage, store)
    caplog.clear()
    monkeypatch.setattr(
        ArtifactStore, "find", lambda *_: None
    )  # made right after it was looked for
    with caplog.at_level(logging.INFO, "foldstack"):
        assert run_stage(stage, store) == made
    assert caplog.messages == [f"count 0.25: another process has just made it, as {made}"]


def test_stage_runs_once_then_is_found(
    store: ArtifactStore, caplog: pytest.LogCaptureFixture
) -> None:
    progress = []
    with caplog.at_level(logging.INFO, "foldstack"):
        made = run_stage(count(), store, lambda *told: progress.append(told))
        found = run_stage(count(), store, lambda *told: progress.append(told))
    assert made == found == count().artifact(store)
    assert progress == [("counting", 1, 1)]
    assert ["made in" in line or "found in" in line for line in caplog.messages] == [True, True]
    known = made.manifest()
    assert known.facts == {"blocks": 2}
    assert known.label == "count 0.25"
    assert known.inputs == (f"model/{'ab' * 32}",)
    assert known.ingredients["parameters"]["settings"]["sparsity"] == 0.25


def test_chain_is_laid_out_before_anything_runs(store: ArtifactStore) -> None:
    counts = [count(seed) for seed in (1, 2)]
    report = Report(counts=tuple(one.artifact(store) for one in counts))
    fingerprint = report.fingerprint
    with pytest.raises(InputError, match="not in the store"):
        run_stage(report, store)
    for one in counts:
        run_stage(one, store)
    assert report.fingerprint == fingerprint
    made = run_stage(report, store)
    assert (made.open() / "report.txt").read_text() == "started\nstarted"
    assert made.manifest().inputs == tuple(f"count/{one.fingerprint}" for one in counts)


def test_failed_stage_resumes_from_its_work_folder(store: ArtifactStore) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        run_stage(count(seed=13), store)
    run_stage(count(seed=13), store)
    assert not list((store.root / "work" / "count").iterdir())


def test_field_that_json_cannot_say_is_refused() -> None:
    class Odd(Count):
        odd: complex = 1j

    with pytest.raises(AssertionError, match="JSON types, got complex"):
        _ = Odd(model=model()).fingerprint


def test_explanation_of_a_hit_and_of_an_empty_store(store: ArtifactStore) -> None:
    assert "holds no count at all" in str(explain(count(), store))
    run_stage(count(), store)
    explanation = explain(count(), store)
    assert explanation.is_hit
    assert str(explanation) == f"count 0.25: hit, {count().artifact(store)}"


def test_explanation_of_a_miss_names_what_differs_from_the_nearest(store: ArtifactStore) -> None:
    run_stage(count(seed=1, sparsity=0.5), store)
    run_stage(count(seed=1), store)
    run_stage(Count(model=model(), settings=Settings(seed=3, blocks=(9,))), store)
    explanation = explain(count(seed=2), store)
    assert not explanation.is_hit
    assert explanation.nearest is not None
    assert explanation.nearest.fingerprint == count(seed=1).fingerprint
    assert explanation.changes == (Change("parameters.settings.seed", 1, 2),)
    assert "parameters.settings.seed: 1 -> 2" in str(explanation)


def test_explanation_of_changed_code_names_the_file(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(count(), store)
    code = count().ingredients()["code"]
    edited = code | {"foldstack.compression.errors": "0" * 64}
    monkeypatch.setattr(stage_module, "code_sources", lambda modules, alone: edited)
    assert "code.foldstack.compression.errors changed" in str(explain(count(), store))


def test_explanation_of_damage_changes_nothing(store: ArtifactStore) -> None:
    file = run_stage(count(), store).folder / "count.txt"
    file.write_text("x")
    assert "is damaged: count.txt" in str(explain(count(), store))
    assert file.exists()


def test_model_is_known_by_its_bytes_and_says_when_it_is_gone(tmp_path: Path) -> None:
    gone = ModelRef(name="tiny", folder=tmp_path / "gone", fingerprint="ab" * 32)
    with pytest.raises(InputError, match="tiny must be a folder"):
        gone.open()
    assert no_progress("nothing", 0, 0) is None
