"""`cache gc` never removes the only copy of what an alias of MLflow's points to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from foldstack.compression.errors import InputError
from foldstack.flows.cli.command_cache import gc_command
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.store.manifest import Facts
from foldstack.tasks.tracking.run_record import ModelFiles, RunRecord
from foldstack.tasks.tracking.tracker import Tracker
from foldstack.tasks.tracking.tracking_database import make_database

pytestmark = pytest.mark.foreign_warnings

NAME = "foldstack-tiny"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path / "home"


@pytest.fixture
def artifact(home: Path, model_folder: Callable[..., Path]) -> Artifact:
    def produce(folder: Path, work: Path) -> Facts:
        shutil.copytree(model_folder("llama"), folder / "model")
        return {}

    store = ArtifactStore(home / "store")
    return store.publish("compress_model", "ab" * 32, produce, label="compress shortgpt 0.25")


@pytest.fixture
def registered(home: Path, artifact: Artifact) -> str:
    """The address where a version's alias points to the artifact's model."""
    uri = f"sqlite:///{home / 'mlflow.db'}"
    make_database(uri)
    record = RunRecord(
        name="shortgpt 0.25",
        fingerprint="cd" * 32,
        metrics={"quality/bits_per_byte": 1.5},
        tags={"foldstack.stage.compress": artifact.fingerprint},
        model=ModelFiles(artifact.folder / "model", "digest", upload=False),
    )
    tracker = Tracker(uri, "foldstack/tiny", home / "tracking", home / "mlartifacts")
    tracker.log(record)
    tracker.register_best(NAME, record, "accepted-at-0-25", "the first")
    tracker.finish()
    assert tracker.warnings == []
    return uri


def gc(home: Path, *, upload: bool = False, without_mlflow: bool = False) -> str:
    return gc_command(
        home, keep_days=-1, keep=[], max_gib=None, upload=upload,
        without_mlflow=without_mlflow, dry_run=False, as_json=False,
    )  # fmt: skip


def test_the_only_copy_stays_until_mlflow_has_it(
    home: Path, artifact: Artifact, registered: str
) -> None:
    said = gc(home)
    assert "compress shortgpt 0.25: foldstack-tiny@accepted-at-0-25 (version 1)" in said
    assert "foldstack cache gc --upload" in said
    assert artifact.folder.exists()

    gc(home, upload=True)
    assert not artifact.folder.exists()
    mlflow.set_tracking_uri(registered)
    loaded = mlflow.transformers.load_model(f"models:/{NAME}@accepted-at-0-25")
    assert loaded("item", max_new_tokens=2)[0]["generated_text"].startswith("item")


def test_without_its_alias_a_model_may_go(home: Path, artifact: Artifact, registered: str) -> None:
    client = MlflowClient(tracking_uri=registered, registry_uri=registered)
    client.delete_registered_model_alias(NAME, "accepted-at-0-25")
    gc(home)
    assert not artifact.folder.exists()


def test_what_cannot_be_asked_is_not_guessed(
    home: Path, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"MLflow at http://127\.0\.0\.1:9 does not answer"):
        gc(home)
    assert artifact.folder.exists()
    gc(home, without_mlflow=True)
    assert not artifact.folder.exists()


def test_a_machine_may_read_what_stays(home: Path, artifact: Artifact, registered: str) -> None:
    told = json.loads(
        gc_command(
            home, keep_days=-1, keep=[], max_gib=None, upload=False, without_mlflow=False,
            dry_run=True, as_json=True,
        )
    )  # fmt: skip
    (held,) = told["held"]
    assert held["fingerprint"] == artifact.fingerprint
    assert held["aliases"] == [f"{NAME}@accepted-at-0-25 (version 1)"]
