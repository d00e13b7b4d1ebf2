import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.data.dataset_source_registry import get_dataset_source_from_json
from mlflow.data.huggingface_dataset_source import HuggingFaceDatasetSource
from mlflow.entities import Run

from foldstack.tasks.tracking.run_record import DatasetUse, ModelFiles, RunRecord
from foldstack.tasks.tracking.tracker import Tracker
from foldstack.tasks.tracking.tracking_database import follow_home

pytestmark = pytest.mark.foreign_warnings


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    plan = tmp_path / "plan.json"
    plan.write_text("{}")
    return RunRecord(
        name="shortgpt 0.25",
        fingerprint="ab" * 32,
        params={"method.name": "shortgpt", "sparsity": 0.25},
        metrics={"quality/bits_per_byte": 1.5},
        series={"recovery/loss": [(0, 3.0), (10, 2.0)]},
        system={"compress_memory_usage_megabytes": [(1e9, 700.0), (1e9 + 10, 800.0)]},
        tags={"foldstack.method": "shortgpt"},
        datasets=[DatasetUse("stories", "f" * 64, "stories.txt", "calibration")],
        files={"compress/plan.json": plan},
        texts={"environment.txt": "torch"},
        model=ModelFiles(tmp_path / "store" / "model", "digest of the weights"),
        sweep="s1",
    )


def log(tracker: Tracker, *records: RunRecord) -> None:
    for record in records:
        tracker.log(record)
    tracker.finish()


def runs(uri: str, experiment: str = "foldstack/tiny") -> list[Run]:
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    return list(client.search_runs([found.experiment_id])) if found else []


def tracker_at(uri: str, folder: Path) -> Tracker:
    return Tracker(uri, "foldstack/tiny", folder / "receipts", folder / "mlartifacts")


def test_a_record_arrives_whole(uri: str, tmp_path: Path, record: RunRecord) -> None:
    tracker = tracker_at(uri, tmp_path)
    log(tracker, record)

    (run,) = runs(uri)
    client = MlflowClient(tracking_uri=uri)
    assert tracker.warnings == []
    assert run.info.run_id == tracker.run_ids[record.fingerprint]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"method.name": "shortgpt", "sparsity": "0.25"}
    taken = "system/compress_memory_usage_megabytes"
    assert run.data.metrics == {"quality/bits_per_byte": 1.5, "recovery/loss": 2.0, taken: 800.0}
    moments = [each.timestamp for each in client.get_metric_history(run.info.run_id, taken)]
    assert moments == [1000 * 10**9, 1000 * 10**9 + 10_000]
    assert len(client.get_metric_history(run.info.run_id, "recovery/loss")) == 2
    assert run.data.tags["foldstack.sweeps"] == "s1"
    (use,) = run.inputs.dataset_inputs
    assert (use.dataset.name, use.dataset.digest) == ("stories", "f" * 36)
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {
        "compress",
        "environment.txt",
    }


def test_logging_twice_changes_nothing(uri: str, tmp_path: Path, record: RunRecord) -> None:
    log(tracker_at(uri, tmp_path), record)
    before = Path(uri.removeprefix("sqlite:///")).read_bytes()
    again = tracker_at(uri, tmp_path)
    log(again, record)

    assert again.run_ids
    assert Path(uri.removeprefix("sqlite:///")).read_bytes() == before


def test_a_lost_receipt_does_not_log_a_second_run(
    uri: str, tmp_path: Path, record: RunRecord
) -> None:
    log(tracker_at(uri, tmp_path), record)
    for receipt in (tmp_path / "receipts").iterdir():
        receipt.unlink()
    log(tracker_at(uri, tmp_path), record)

    (run,) = runs(uri)
    client = MlflowClient(tracking_uri=uri)
    assert len(client.get_metric_history(run.info.run_id, "recovery/loss")) == 2


def test_a_deleted_run_is_logged_again(uri: str, tmp_path: Path, record: RunRecord) -> None:
    tracker = tracker_at(uri, tmp_path)
    log(tracker, record)
    MlflowClient(tracking_uri=uri).delete_run(tracker.run_ids[record.fingerprint])
    log(tracker_at(uri, tmp_path), record)

    (run,) = runs(uri)
    assert run.info.run_id != tracker.run_ids[record.fingerprint]


def test_a_run_that_was_cut_off_is_completed(uri: str, tmp_path: Path, record: RunRecord) -> None:
    partial = replace(record, metrics={}, series={}, status="RUNNING")
    log(tracker_at(uri, tmp_path), partial)
    assert runs(uri)[0].info.status == "RUNNING"
    log(tracker_at(uri, tmp_path), record)

    (run,) = runs(uri)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["quality/bits_per_byte"] == 1.5


def test_a_second_sweep_adds_its_tag_to_the_same_run(
    uri: str, tmp_path: Path, record: RunRecord
) -> None:
    log(tracker_at(uri, tmp_path), record)
    log(tracker_at(uri, tmp_path), replace(record, sweep="s2"))

    (run,) = runs(uri)
    assert run.data.tags["foldstack.sweeps"] == "s1 s2"


def test_more_values_than_a_batch_and_overlong_ones_arrive(
    uri: str, tmp_path: Path, record: RunRecord
) -> None:
    many = {f"setting {index}": "x" * 7000 if index == 3 else index for index in range(230)}
    log(tracker_at(uri, tmp_path), replace(record, params=many))

    (run,) = runs(uri)
    assert len(run.data.params) == 230
    assert len(run.data.params["setting 3"]) <= 6000
    assert "cut" in run.data.params["setting 3"]


def test_a_dead_server_costs_seconds_and_one_warning(tmp_path: Path, record: RunRecord) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    tracker = tracker_at(f"http://127.0.0.1:{port}", tmp_path)
    started = time.perf_counter()
    log(tracker, *(replace(record, fingerprint=f"{index:064d}") for index in range(5)))

    assert time.perf_counter() - started < 5
    (warning,) = tracker.warnings
    assert "next run logs what is missing" in warning


def test_what_a_dead_server_missed_is_logged_by_the_next_run(
    uri: str, tmp_path: Path, record: RunRecord
) -> None:
    dead = Tracker("http://127.0.0.1:9", "foldstack/tiny", tmp_path / "receipts")
    log(dead, record)
    assert dead.warnings
    log(tracker_at(uri, tmp_path), record)

    assert len(runs(uri)) == 1


def test_what_is_slow_is_waited_for_and_what_stands_still_is_not(
    tmp_path: Path, record: RunRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, never = [], threading.Event()

    def write(self: Tracker, item: RunRecord) -> None:
        if item.name == "stuck":
            never.wait(60)
        time.sleep(0.2)
        written.append(item.name)

    monkeypatch.setattr(Tracker, "_write", write)
    slow = tracker_at("sqlite:///nowhere.db", tmp_path)
    for number in range(5):
        slow.log(replace(record, fingerprint=f"{number:064d}", name=str(number)))
    slow.finish(patience_seconds=0.5)  # of a second in all
    assert written == list("01234")
    assert slow.warnings == []

    hung = tracker_at("sqlite:///nowhere.db", tmp_path)
    hung.log(replace(record, fingerprint="ef" * 32, name="stuck"))
    hung.finish(patience_seconds=0.5)
    never.set()
    assert "did not answer within" in hung.warnings[0]


def test_the_best_run_gets_the_alias(uri: str, tmp_path: Path, record: RunRecord) -> None:
    other = replace(record, fingerprint="cd" * 32, name="other")
    first = tracker_at(uri, tmp_path)
    first.log(record)
    first.register_best("foldstack-tiny", record, "best-at-25", "lowest bits per byte")
    first.finish()
    second = tracker_at(uri, tmp_path)
    second.log(other)
    second.register_best("foldstack-tiny", other, "best-at-25", "lowest bits per byte")
    second.finish()

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    version = client.get_model_version_by_alias("foldstack-tiny", "best-at-25")
    assert second.warnings == []
    assert version.run_id == second.run_ids[other.fingerprint]


def test_the_compare_page_is_a_view_of_the_sweep_that_is_there(
    uri: str, tmp_path: Path, record: RunRecord
) -> None:
    """A view that the experiment does not have is an error on a page without charts."""
    tracker = tracker_at(uri, tmp_path)
    assert tracker.pages("a-sweep") == {}
    log(tracker, replace(record, sweep="a-sweep"))

    page = tracker.pages("a-sweep")["mlflow compare"]
    assert not re.search(r"[\[\]\"' ]", page), "terminals cut links there"
    key = re.search("viewStateShareKey=([^&]+)", page)
    assert key is not None
    experiment = MlflowClient(tracking_uri=uri).get_experiment_by_name("foldstack/tiny")
    assert experiment is not None
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key[1]}"])
    assert "LIKE '%a-sweep%'" in view["searchFilter"]
    shown = {section["uuid"] for section in view["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} <= shown


def test_variants_are_shown_below_the_sweep_that_made_them(
    uri: str, tmp_path: Path, record: RunRecord
) -> None:
    sweeps = [replace(record, fingerprint=name * 32, model=None) for name in ("aa", "bb")]
    for sweep in sweeps:
        tracker = tracker_at(uri, tmp_path)
        log(tracker, sweep, replace(record, sweep=sweep.fingerprint, parent=sweep.fingerprint))
        assert tracker.warnings == []
    found = {run.data.tags["foldstack.fingerprint"]: run for run in runs(uri)}
    tags = found[record.fingerprint].data.tags
    assert tags["foldstack.sweeps"].split() == [each.fingerprint for each in sweeps]
    assert tags["mlflow.parentRunId"] == found[sweeps[0].fingerprint].info.run_id


def test_a_long_table_is_made_when_it_is_logged_and_not_again(
    uri: str, tmp_path: Path, record: RunRecord
) -> None:
    made = []

    def table() -> dict[str, list[object]]:
        made.append(1)
        return {"item": ["one", "two"], "score": [1.0, 0.0]}

    for _ in range(2):
        log(tracker_at(uri, tmp_path), replace(record, tables={"items_table.json": table}))
    assert len(made) == 1
    client, (run,) = MlflowClient(tracking_uri=uri), runs(uri)
    file = client.download_artifacts(run.info.run_id, "items_table.json", str(tmp_path))
    assert json.loads(Path(file).read_text())["data"] == [["one", 1.0], ["two", 0.0]]
    assert "items_table.json" in run.data.tags["mlflow.loggedArtifacts"]  # MLflow compares it


OPEN = """
import sys
from foldstack.tasks.tracking.tracker import open_experiment
print(open_experiment(sys.argv[1], "foldstack/tiny", None)[1])
"""


def test_a_database_that_several_make_at_once_after_one_was_killed_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "home" / "mlflow.db"
    file.parent.mkdir()
    file.with_name("mlflow.db.unfinished").write_bytes(b"half a database")
    command = [sys.executable, "-c", OPEN, f"sqlite:///{file}"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0]
    assert len(told) == 1, "one experiment"
    assert [path.name for path in file.parent.iterdir()] == ["mlflow.db"]


class TestAHomeThatMoved:
    """The database of a home in another place names its files where they are now."""

    @pytest.fixture
    def moved(self, uri: str, tmp_path: Path, record: RunRecord) -> Path:
        old, new = tmp_path / "old home", tmp_path / "new"
        old.mkdir()
        (tmp_path / "mlflow.db").rename(old / "mlflow.db")
        tracker = tracker_at(f"sqlite:///{old / 'mlflow.db'}", old)
        log(tracker, replace(record, tags={"model_uri": (old / "store").as_uri() + "/x"}))
        assert tracker.warnings == []
        old.rename(new)
        return new

    def test_new_runs_write_into_it(self, moved: Path, record: RunRecord) -> None:
        tracker = tracker_at(f"sqlite:///{moved / 'mlflow.db'}", moved)
        log(tracker, replace(record, fingerprint="cd" * 32))
        assert tracker.warnings == []
        assert not (moved.parent / "old home").exists()
        uris = {run.info.artifact_uri for run in runs(tracker.uri)}
        assert len(uris) == 2
        assert all(uri.startswith((moved / "mlartifacts").as_uri()) for uri in uris)
        client = MlflowClient(tracking_uri=tracker.uri)
        for run in runs(tracker.uri):
            assert [file.path for file in client.list_artifacts(run.info.run_id, "compress")]
        tags = {run.data.tags.get("model_uri") for run in runs(tracker.uri)}
        assert (moved / "store").as_uri() + "/x" in tags

    def test_a_copy_and_what_it_was_copied_from_are_two(
        self, moved: Path, record: RunRecord
    ) -> None:
        copy = moved.parent / "copy"
        follow_home(f"sqlite:///{moved / 'mlflow.db'}", moved)
        shutil.copytree(moved, copy)
        for home in (copy, moved):
            uri = f"sqlite:///{home / 'mlflow.db'}"
            follow_home(uri, home)
            assert runs(uri)[0].info.artifact_uri.startswith((home / "mlartifacts").as_uri())

    def test_a_database_of_two_homes_stays_as_it_is(self, uri: str, record: RunRecord) -> None:
        first = Path(uri.removeprefix("sqlite:///")).parent
        second = first / "second"
        log(tracker_at(uri, second), record)
        follow_home(uri, first)
        assert runs(uri)[0].info.artifact_uri.startswith((second / "mlartifacts").as_uri())


def test_a_run_lasts_as_long_as_its_stages(uri: str, tmp_path: Path, record: RunRecord) -> None:
    log(tracker_at(uri, tmp_path), replace(record, started=1.7e9, seconds=42.0))
    (run,) = runs(uri)
    assert run.info.start_time == 1_700_000_000_000
    assert run.info.end_time - run.info.start_time == 42_000


def test_a_dataset_of_the_hub_is_one_for_mlflow_too(
    uri: str, tmp_path: Path, record: RunRecord
) -> None:
    origin = {"path": "wikitext", "config_name": "wikitext-2-raw-v1", "split": "test"}
    origin |= {"data_dir": None, "data_files": None, "revision": "abc"}
    use = DatasetUse("text", "f" * 64, "wikitext", "evaluation", {}, "hugging_face", origin)
    log(tracker_at(uri, tmp_path), replace(record, datasets=[use]))
    (run,) = runs(uri)
    (found,) = run.inputs.dataset_inputs
    source = get_dataset_source_from_json(found.dataset.source, found.dataset.source_type)
    assert isinstance(source, HuggingFaceDatasetSource)
    assert (source.path, source.revision) == ("wikitext", "abc")
