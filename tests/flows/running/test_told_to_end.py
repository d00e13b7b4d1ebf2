"""A flow run that Prefect or the machine tells to end (SIGTERM) does so, whatever its stages do."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.leases import leased

# Run as a script, and imported by its worker process.
FLOW = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from foldstack.flows.running.engines import engine_for
from foldstack.flows.running.progress import Silent
from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.running.prefect_cache import stage_task
from foldstack.tasks.running.worker_pool import ComputedStage, worker_processes
from prefect import flow

class Long(ComputedStage):
    stage = "long"
    packages = ()
    mark: str

    def modules(self):
        return ("foldstack.compression.errors",)

    @property
    def label(self):
        return "long"

    def compute(self, folder, work, progress):
        Path(self.mark).write_text(str(os.getpid()))
        time.sleep(600)
        return {}

class Told(Silent):
    def report(self, label, what, done, total):
        print(what, flush=True)

@flow
def long(stage, store):
    execution = SimpleNamespace(engine="processes")
    layout = SimpleNamespace(config=SimpleNamespace(execution=execution), workers=1)
    with worker_processes(), engine_for(layout, Told()) as engine:
        parameters = {"stage": stage, "store_root": store.root, "report": engine.report}
        engine.runner.submit(stage_task("long", store), parameters).wait()

def stage_of(mark):
    return Long(mark=mark)
"""
START = """
import sys
from long_flow import ArtifactStore, Path, long, stage_of
long(stage_of(sys.argv[1]), ArtifactStore(Path(sys.argv[2])))
"""
SECONDS = 60
Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "computing"


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture
def start(
    tmp_path: Path,
    mark: Path,
    store: ArtifactStore,
    prefect_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Start]:
    (tmp_path / "long_flow.py").write_text(FLOW)
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = {
        "PREFECT_API_URL": prefect_server,
        "PREFECT_HOME": str(tmp_path / "another-home"),
        "PYTHONPATH": str(tmp_path),
    }
    command = [sys.executable, "-c", START, str(mark), str(store.root)]
    with ExitStack() as started:

        def start_it() -> "subprocess.Popen[str]":
            process = subprocess.Popen(
                command, env=os.environ | environment, stdout=subprocess.PIPE, text=True
            )
            started.enter_context(process)
            started.callback(process.kill)
            return process

        yield start_it


def test_a_run_that_computes_ends_with_what_it_computes(start: Start, mark: Path) -> None:
    process = start()
    deadline = time.monotonic() + 4 * SECONDS
    while not (mark.exists() and mark.read_text()):
        assert process.poll() is None, "it ended"
        assert time.monotonic() < deadline, "it does not begin"
        time.sleep(0.1)
    process.terminate()
    process.wait(SECONDS)
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


def test_a_run_that_waits_for_another_process_ends(
    start: Start, mark: Path, store: ArtifactStore
) -> None:
    from long_flow import stage_of  # type: ignore[import-not-found]

    artifact = stage_of(str(mark)).artifact(store)
    with leased(store.lease_folder(artifact.key), print):
        process = start()
        assert process.stdout is not None
        assert process.stdout.readline().startswith("waiting for")
        process.terminate()
        process.wait(SECONDS)
    assert not mark.exists()
