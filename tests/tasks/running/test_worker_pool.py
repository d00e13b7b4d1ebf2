"""Stages in processes of their own: their facts, their failures, their end."""

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from foldstack.compression.errors import InputError
from foldstack.tasks.running.messages import ProcessDied
from foldstack.tasks.running.prefect_cache import limited
from foldstack.tasks.running.worker_pool import ComputedStage, WorkerPool, worker_processes
from foldstack.tasks.stage import run_stage
from foldstack.tasks.store.artifacts import ArtifactStore

ERRAND = """
import os, signal, tempfile, time
from foldstack.compression.errors import InputError
from foldstack.tasks.running.worker_pool import ComputedStage

class Errand(ComputedStage):
    stage = "errand"
    packages = ()
    what: str

    def modules(self):
        return ("foldstack.compression.errors",)

    def compute(self, folder, work, progress):
        progress(self.what, 1, 1)
        (folder / "pid.txt").write_text(str(os.getpid()))
        if self.what == "refuse":
            raise InputError("not today")
        if self.what == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "sleep":
            time.sleep(600)
        return {"pid": os.getpid(), "temporary": tempfile.mkdtemp()}
"""


@pytest.fixture(scope="module")
def errand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[type[ComputedStage]]:
    """A stage whose class a worker can import, as it can those of foldstack."""
    folder = tmp_path_factory.mktemp("errand")
    (folder / "errand.py").write_text(ERRAND)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("errand").Errand
    sys.path.remove(str(folder))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def test_without_a_pool_a_stage_computes_here(
    errand: type[ComputedStage], store: ArtifactStore
) -> None:
    assert run_stage(errand(what="a"), store).manifest().facts["pid"] == os.getpid()


def test_temporary_files_of_a_stage_lie_in_its_work_and_go_with_it(
    errand: type[ComputedStage], store: ArtifactStore
) -> None:
    with worker_processes():
        made = run_stage(errand(what="a"), store)
        folder = Path(str(made.manifest().facts["temporary"]))
        assert folder.is_relative_to(store.root / "work" / "errand" / made.fingerprint)
        assert not folder.exists()


def test_a_pool_computes_elsewhere_and_passes_everything_on(
    errand: type[ComputedStage], store: ArtifactStore
) -> None:
    told: list[tuple[str, int, int]] = []
    with worker_processes():
        made = run_stage(errand(what="a"), store, lambda *args: told.append(args))
        again = run_stage(errand(what="b"), store)
        assert made.manifest().facts["pid"] != os.getpid()
        worker = made.manifest().facts["pid"]
        assert worker == again.manifest().facts["pid"], "a worker is used again"
        assert told == [("a", 1, 1)]

        os.kill(int(str(worker)), signal.SIGKILL)
        time.sleep(0.2)
        other = run_stage(errand(what="d"), store).manifest().facts["pid"]
        assert other != worker, "one that was killed while it was idle costs nothing"

        with pytest.raises(InputError, match="not today"):
            run_stage(errand(what="refuse"), store)
        with pytest.raises(RuntimeError, match="want of memory"):
            run_stage(errand(what="die"), store)
        survivor = run_stage(errand(what="c"), store).manifest().facts["pid"]
        assert survivor != made.manifest().facts["pid"]


def test_closing_the_pool_ends_a_worker_that_still_computes(
    errand: type[ComputedStage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("foldstack.tasks.running.worker_pool.SECONDS_TO_LEAVE", 0.2)
    pool, errors = WorkerPool(), []

    def work() -> None:
        try:
            pool.run(errand(what="sleep"), tmp_path, tmp_path, lambda *_: None)
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    while not ((tmp_path / "pid.txt").exists() and (tmp_path / "pid.txt").read_text()):
        time.sleep(0.05)
    pool.kill()
    thread.join(20)
    assert not thread.is_alive()
    assert "the run was told to end" in errors[0]  # and is not tried again
    with pytest.raises(RuntimeError, match="told to end"):
        pool.run(errand(what="a"), tmp_path, tmp_path, lambda *_: None)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid.txt").read_text()), 0)


def test_a_stage_that_takes_too_long_is_ended_and_worth_another_try(
    errand: type[ComputedStage], store: ArtifactStore
) -> None:
    with worker_processes():
        with limited(1.0), pytest.raises(ProcessDied, match="took longer than 1 s"):
            run_stage(errand(what="sleep"), store)
        run_stage(errand(what="quick"), store)
