"""What is registered can be loaded by whoever has MLflow and transformers, and nothing of ours."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from transformers import PreTrainedModel

from foldstack.compression.checkpoints.checkpoint import load_model, save_model
from foldstack.compression.structure.surgery import Cut, cut, plan_of
from foldstack.flows.cli.processes import Server, running
from foldstack.tasks.tracking.logged_models import upload
from foldstack.tasks.tracking.registry import Aliased, aliased_versions
from foldstack.tasks.tracking.run_record import ModelFiles, RunRecord
from foldstack.tasks.tracking.tracker import Tracker

pytestmark = pytest.mark.foreign_warnings

NAME = "foldstack-tiny"
EXPERIMENT = "foldstack/tiny"


def native(model: PreTrainedModel) -> PreTrainedModel:
    return cut(model, Cut(plan_of(model).keep([0, 2, 3]), (0, 2, 3)))


def portable(model: PreTrainedModel) -> PreTrainedModel:
    return cut(model, Cut(plan_of(model).share(0, [1]), (0, 1, 2, 3)))


@pytest.fixture
def folder_of(
    tmp_path: Path, tiny_model: Callable[..., PreTrainedModel], tokenizer_folder: Path
) -> Callable[[str], Path]:
    def make(grade: str) -> Path:
        model = tiny_model("llama", vocab_size=288)
        smaller = {"native": native, "portable": portable}[grade](model)
        folder = tmp_path / "store" / grade
        assert save_model(smaller, folder, tokenizer_from=tokenizer_folder) == grade
        (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\nA card.\n")
        return folder

    return make


def record_of(folder: Path, *, upload: bool) -> RunRecord:
    return RunRecord(
        name=f"{folder.name} 0.25",
        fingerprint=f"fingerprint of {folder.name}",
        params={"sparsity": 0.25},
        metrics={"quality/bits_per_byte": 1.5},
        tags={"foldstack.stage.compress": "ab" * 32},
        model=ModelFiles(folder, f"digest of {folder.name}", upload),
    )


def register(uri: str, tmp_path: Path, *records: RunRecord) -> Tracker:
    tracker = Tracker(uri, EXPERIMENT, tmp_path / "receipts", tmp_path / "mlartifacts")
    for record in records:
        tracker.log(record)
        alias = f"best-{record.name.split()[0]}"
        tracker.register_best(NAME, record, alias, "the best of all", {"sparsity": "0.25"})
    tracker.finish()
    assert tracker.warnings == []
    return tracker


def only_alias(uri: str) -> Aliased:
    (found,) = aliased_versions(uri)
    return found


@pytest.mark.parametrize("grade", ["native", "portable"])
def test_a_registered_model_is_loaded_with_equal_logits(
    uri: str, tmp_path: Path, folder_of: Callable[[str], Path], grade: str
) -> None:
    import mlflow

    folder = folder_of(grade)
    register(uri, tmp_path, record_of(folder, upload=True))
    mlflow.set_tracking_uri(uri)
    loaded = mlflow.transformers.load_model(f"models:/{NAME}@best-{grade}")
    ids = torch.arange(2, 42)[None]
    with torch.inference_mode():
        wanted, got = (
            each(ids, use_cache=False).logits for each in (load_model(folder), loaded.model)
        )
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert only_alias(uri).is_uploaded


def test_mlflow_knows_the_model_of_a_run_its_numbers_and_what_it_takes(
    uri: str, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    record = record_of(folder_of("native"), upload=True)
    tracker = register(uri, tmp_path, record)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    run = client.get_run(tracker.run_ids[record.fingerprint])
    (output,) = run.outputs.model_outputs
    model = client.get_logged_model(output.model_id)
    assert (model.name, model.source_run_id) == ("native-0-25", run.info.run_id)
    assert {metric.key: metric.value for metric in model.metrics} == {"quality/bits_per_byte": 1.5}
    version = client.get_model_version_by_alias(NAME, "best-native")
    assert version.tags == {"sparsity": "0.25"}
    described = tmp_path / "mlartifacts" / "models" / model.model_id / "artifacts"
    text = (described / "MLmodel").read_text()
    assert "loader_module: mlflow.transformers" in text
    assert "max_new_tokens" in text  # of the signature
    assert "A card." in (described / "model_card.md").read_text()
    needed = (described / "requirements.txt").read_text().splitlines()
    assert not any("foldstack" in line or "+" in line for line in needed)


def test_what_is_not_uploaded_is_known_by_its_place_and_can_be_uploaded_later(
    uri: str, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of("native")
    record = record_of(folder, upload=False)
    register(uri, tmp_path, record)
    entry = only_alias(uri)
    assert not entry.is_uploaded
    assert entry.fingerprints == ("ab" * 32,)
    assert str(entry) == f"{NAME}@best-native (version 1)"
    assert list((tmp_path / "mlartifacts").rglob("*.safetensors")) == []

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert record.model is not None
    upload(client, client.get_logged_model(entry.model_id), record.model)
    assert only_alias(uri).is_uploaded


def test_a_later_sweep_uploads_what_an_earlier_one_did_not(
    uri: str, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    later = record_of(folder_of("native"), upload=True)
    assert later.model is not None
    register(uri, tmp_path, replace(later, model=replace(later.model, upload=False)))
    register(uri, tmp_path, later)
    assert only_alias(uri).is_uploaded
    assert len(list((tmp_path / "mlartifacts").rglob("*.safetensors"))) == 1


LOAD = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "foldstack":
            raise ModuleNotFoundError("foldstack is not installed here")
sys.meta_path.insert(0, Absent())
import mlflow
mlflow.set_tracking_uri(sys.argv[1])
for name in sys.argv[2:]:
    print(mlflow.transformers.load_model(name)("Once upon", max_new_tokens=4)[0]["generated_text"])
"""


@pytest.mark.slow
def test_models_load_where_there_is_no_foldstack(
    uri: str, tmp_path: Path, folder_of: Callable[[str], Path]
) -> None:
    folders = [folder_of(grade) for grade in ("native", "portable")]
    register(uri, tmp_path, *(record_of(folder, upload=True) for folder in folders))
    names = [f"models:/{NAME}@best-{folder.name}" for folder in folders]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, uri, *names], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Once upon") == 2


@contextmanager
def served(uri: str, name: str, logs: Path, port: int) -> Iterator[str]:
    # MLflow looks for uvicorn on the PATH; beside this Python's programs or those it builds upon.
    programs = Path(str(distribution("uvicorn").locate_file("../../../bin"))).resolve()
    command = ("models", "serve", "-m", name, "--env-manager", "local", "--port", str(port))
    server = Server(
        name="Model",
        command=(sys.executable, "-m", "mlflow", *command),
        page=f"http://127.0.0.1:{port}",
        health=f"http://127.0.0.1:{port}/ping",
        settings={"MLFLOW_TRACKING_URI": uri, "PATH": f"{programs}:{os.environ['PATH']}"},
    )
    with running(server, logs):
        yield f"http://127.0.0.1:{port}/invocations"


@pytest.mark.slow
def test_a_served_model_answers_a_prompt(
    uri: str, tmp_path: Path, folder_of: Callable[[str], Path], free_port: int
) -> None:
    register(uri, tmp_path, record_of(folder_of("portable"), upload=True))
    name = f"models:/{NAME}@best-portable"
    body = json.dumps({"inputs": ["Once upon"], "params": {"max_new_tokens": 3}}).encode()
    with served(uri, name, tmp_path / "logs", free_port) as address:
        request = urllib.request.Request(
            address, data=body, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            (text,) = json.load(answer)["predictions"]
    assert text.startswith("Once upon")
