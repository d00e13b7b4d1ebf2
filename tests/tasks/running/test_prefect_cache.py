"""Prefect's state is Cached exactly when the store holds the undamaged artifact."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from prefect import flow

from foldstack.tasks.running import prefect_cache
from foldstack.tasks.stage import Stage, run_stage
from foldstack.tasks.store.artifacts import ArtifactStore

# Run by this process and, as a script, by another one.
FLOW = """
import sys
from pathlib import Path
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner
from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.running.prefect_cache import stage_task
from foldstack.tasks.running.messages import ProcessDied
from foldstack.tasks.stage import Stage

class Shout(Stage):
    stage = "shout"
    packages = ()
    outside_fingerprint = frozenset({"batch_size"})
    text: str
    batch_size: int = 8

    def modules(self):
        return ("foldstack.compression.errors",)

    @property
    def label(self):
        return f"shout {self.text}"

    def produce(self, folder, work, progress):
        progress("letters", 1, 2)
        if self.text == "hoarse":
            raise OSError("no voice")
        if self.text == "faint" and self.batch_size > 2:
            raise ProcessDied("ended with signal 9")
        (folder / "text.txt").write_text(self.text.upper())
        return {"letters": len(self.text), "batch_size": self.batch_size}

@flow
def shout_flow(text, root, report=None):
    store = ArtifactStore(root)
    task = stage_task("shout", store, retry_delay_seconds=0)
    return task(
        stage=Shout(text=text), store_root=store.root, report=report, return_state=True
    )

def shout(text, root, report=None):
    state = shout_flow(text, root, report, return_state=True)
    return state.result(raise_on_failure=False)

@flow(task_runner=ThreadPoolTaskRunner(max_workers=2))
def chain_flow(root):
    store = ArtifactStore(root)
    task = stage_task("shout", store, tags=["gpu"])
    first = task.submit(stage=Shout(text="one"), store_root=store.root)
    second = task.submit(stage=Shout(text="two"), store_root=store.root, wait_for=[first])
    second.wait()
    return first.task_run_id, second.task_run_id

if __name__ == "__main__":
    print("task state:", shout(sys.argv[1], Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("flow") / "shout_flow.py"
    file.write_text(FLOW)
    return file


@pytest.fixture(scope="module")
def shouting(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("shout_flow", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def stage(shouting: ModuleType) -> Stage:
    made: Stage = shouting.Shout(text="hello")
    return made


def test_key_is_the_fingerprint(stage: Stage, store: ArtifactStore) -> None:
    inputs = {"stage": stage, "store_root": store.root}
    key = prefect_cache.StoreHoldsArtifact().compute_key(None, inputs, {})  # type: ignore[arg-type]
    assert key == f"shout/{stage.fingerprint}.json"
    assert not store.root.exists(), "a question must not write"


@pytest.mark.usefixtures("prefect_server")
def test_same_stage_is_cached_and_another_is_not(
    shouting: ModuleType, stage: Stage, store: ArtifactStore
) -> None:
    first = shouting.shout("hello", store.root)
    assert first.name == "Completed"
    again = shouting.shout("hello", store.root)
    assert again.name == "Cached"
    assert again.result() == first.result() == stage.artifact(store)
    assert (again.result().open() / "text.txt").read_text() == "HELLO"
    assert shouting.shout("hallo", store.root).name == "Completed"
    assert shouting.shout("hello", store.root.parent / "other").name == "Completed"


def test_another_process_gets_it_cached(
    prefect_server: str, script: Path, stage: Stage, store: ArtifactStore, tmp_path: Path
) -> None:
    run_stage(stage, store)
    environment = os.environ | {
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path / "another-home"),
    }
    done = subprocess.run(
        [sys.executable, str(script), "hello", str(store.root)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    assert "task state: Cached" in done.stdout


@pytest.mark.usefixtures("prefect_server")
def test_artifact_made_without_prefect_is_cached(
    shouting: ModuleType, stage: Stage, store: ArtifactStore
) -> None:
    made = run_stage(stage, store)
    state = shouting.shout("hello", store.root)
    assert state.name == "Cached"
    assert state.result() == made


@pytest.mark.usefixtures("prefect_server")
def test_damaged_or_deleted_artifact_is_made_anew(
    shouting: ModuleType, stage: Stage, store: ArtifactStore
) -> None:
    shouting.shout("hello", store.root)
    file = stage.artifact(store).folder / "text.txt"
    file.write_text("HULLO")
    assert shouting.shout("hello", store.root).name == "Completed"
    assert file.read_text() == "HELLO"
    assert len(list((store.root / "damaged").iterdir())) == 1
    shutil.rmtree(stage.artifact(store).folder)
    assert shouting.shout("hello", store.root).name == "Completed"
    assert file.read_text() == "HELLO"
    assert shouting.shout("hello", store.root).name == "Cached"


@pytest.mark.usefixtures("prefect_server")
def test_record_of_a_moved_store_points_to_its_new_place(
    shouting: ModuleType, stage: Stage, store: ArtifactStore
) -> None:
    shouting.shout("hello", store.root)
    moved = ArtifactStore(store.root.rename(store.root.with_name("moved")))
    state = shouting.shout("hello", moved.root)
    assert state.name == "Cached"
    assert state.result().open() == stage.artifact(moved).folder


@pytest.mark.parametrize(("deployed", "tags"), [(False, {"gpu"}), (True, {"gpu", "shout"})])
def test_kinds_are_tagged_where_an_operator_may_limit_them(
    deployed: bool, tags: set[str], store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefect_cache, "is_deployed", lambda: deployed)
    assert prefect_cache.stage_task("shout", store, tags=["gpu"]).tags == tags


@pytest.mark.usefixtures("prefect_server")
def test_a_flow_that_a_deployments_run_calls_is_deployed_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it the nightly's sweep computes in threads, which cannot be ended."""

    @flow
    def inner() -> bool:
        return prefect_cache.is_deployed()

    @flow
    def outer() -> bool:
        return inner()

    assert not outer()
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "11111111-2222-3333-4444-555555555555")
    assert outer()


@pytest.mark.usefixtures("prefect_server")
def test_stages_in_threads_form_a_graph(shouting: ModuleType, store: ArtifactStore) -> None:
    from prefect.client.orchestration import get_client

    first, second = shouting.chain_flow(store.root)
    with get_client(sync_client=True) as client:
        runs = [client.read_task_run(run) for run in (first, second)]
    assert [(run.name, run.state_name) for run in runs] == [
        ("shout one", "Completed"),
        ("shout two", "Completed"),
    ]
    assert set(runs[0].tags) == {"gpu"}
    assert [str(source.id) for source in runs[1].task_inputs["wait_for"]] == [str(first)]


@pytest.mark.usefixtures("prefect_server")
def test_failed_stage_keeps_its_error_and_leaves_nothing(
    shouting: ModuleType, store: ArtifactStore
) -> None:
    state = shouting.shout("hoarse", store.root)
    assert state.name == "Failed"
    with pytest.raises(OSError, match="no voice"):
        state.result()
    assert not list((store.root / "tmp").iterdir())
    assert shouting.shout("hoarse", store.root).name == "Failed"


@pytest.mark.usefixtures("prefect_server")
def test_person_sees_names_and_progress(
    shouting: ModuleType, store: ArtifactStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client

    monkeypatch.setattr(prefect_cache, "SECONDS_BETWEEN_UPDATES", 0.0)
    reported = []

    def report(stage: Stage, what: str, done: int, total: int) -> None:
        reported.append((stage.label, what, done, total))

    state = shouting.shout("progress", store.root, report)
    assert reported == [("shout progress", "letters", 1, 2)]
    with get_client(sync_client=True) as client:
        assert client.read_task_run(state.state_details.task_run_id).name == "shout progress"
        run = state.state_details.flow_run_id  # other tests' slow stages show theirs, too
        shown = [
            artifact
            for artifact in client.read_artifacts()
            if artifact.type == "progress" and artifact.flow_run_id == run
        ]
    assert [(artifact.key, artifact.description, artifact.data) for artifact in shown] == [
        ("shout-progress", "shout progress", 100.0)
    ]

    assert shouting.shout("hoarse", store.root, report).name == "Failed"
    with get_client(sync_client=True) as client:
        keys = {artifact.key for artifact in client.read_artifacts()}
    assert "shout-hoarse" not in keys, "a bar that stands still"


@pytest.mark.usefixtures("prefect_server")
def test_a_stage_whose_process_died_is_tried_again_with_less_at_once(
    shouting: ModuleType, store: ArtifactStore
) -> None:
    state = shouting.shout("faint", store.root)
    assert state.is_completed()
    assert state.result().manifest().facts["batch_size"] == 2  # 8 and 4 were too much


@pytest.mark.usefixtures("prefect_server")
def test_what_fails_by_its_own_fault_is_not_tried_again(
    shouting: ModuleType, store: ArtifactStore
) -> None:
    from prefect.client.orchestration import get_client

    state = shouting.shout("hoarse", store.root)
    with get_client(sync_client=True) as client:
        run = client.read_task_run(state.state_details.task_run_id)
    assert run.run_count == 1
