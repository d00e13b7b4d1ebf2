"""Stages on the workers of a Dask scheduler: the same results, and sentences for what is amiss."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foldstack.compression.checkpoints import checkpoint
from foldstack.compression.checkpoints.checkpoint import ReloadReport
from foldstack.compression.errors import InputError
from foldstack.compression.statistics.gathering import Statistics
from foldstack.flows.config.run_config import parse_config
from foldstack.flows.planning.preflight import check
from foldstack.flows.running import dask_scheduler, engines
from foldstack.flows.running.branches import Layout, lay_out
from foldstack.flows.running.progress import Silent
from foldstack.flows.sweep import run_sweep
from foldstack.tasks.stage import run_stage
from foldstack.tasks.store.artifacts import ArtifactStore

distributed = pytest.importorskip("distributed")

pytestmark = pytest.mark.foreign_warnings

LayOut = Callable[..., Layout]
NewDisplay = Callable[[], Any]


@pytest.fixture(autouse=True)
def no_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = ReloadReport(1.0, 0.0, 0.0, True, (1,), 1, "LlamaForCausalLM", 0.0)
    monkeypatch.setattr(checkpoint, "check_reload", lambda model, folder, **_: seen)


@pytest.fixture
def laid_out(
    tmp_path: Path, model_folder: Callable[..., Path], text_lines: tuple[str, ...]
) -> LayOut:
    """Maker of a layout on a tiny model; `home` and everything else can be set."""
    text = tmp_path / "lines.txt"
    text.write_text("\n\n".join(text_lines))
    source = {"corpus": str(text), "separator": "\n\n"}
    windows = {"num_windows": 5, "window_tokens": 16, "bos": "none"}
    protocol = {"window_tokens": 32, "max_tokens": 200}
    model = str(model_folder("llama"))

    def make(home: str, **changes: Any) -> Layout:
        data: dict[str, Any] = {
            "model": {"name": model, "device": "cpu"},
            "calibration": {"source": source, **windows},
            "methods": ["svd_llm"],
            "evaluation": {"perplexity": {"source": source, "protocol": protocol}},
            "speed": {"enabled": False},
            "tracking": {"enabled": False},
            "output": {"home": str(tmp_path / home)},
        }
        return lay_out(parse_config(data | changes))

    return make


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A scheduler on loopback; its workers are threads of this process."""
    settings = {"processes": False, "protocol": "tcp", "host": "127.0.0.1"}
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, **settings
    ) as made:
        yield made


def on(address: str) -> dict[str, str]:
    return {"engine": "dask", "address": address}


def test_added_shards_are_the_whole(laid_out: LayOut) -> None:
    whole, parts = laid_out("home"), laid_out("home", statistics={"shards": 2})
    run_stage(whole.calibration, whole.store)
    for stage in (whole.statistics, *parts.shards, parts.statistics):
        run_stage(stage, whole.store)
    expected = Statistics.load(whole.statistics.artifact(whole.store).open())
    added = Statistics.load(parts.statistics.artifact(whole.store).open())
    assert added.num_tokens == expected.num_tokens == 5 * 16
    assert set(added.grams) == set(expected.grams)
    for key in expected.grams:
        torch.testing.assert_close(added.gram(*key), expected.gram(*key), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(added.input_sum(*key), expected.input_sum(*key))
    torch.testing.assert_close(added.similarity, expected.similarity)
    torch.testing.assert_close(added.last_token_angle, expected.last_token_angle)


@pytest.mark.usefixtures("prefect_server")
def test_dask_finds_what_processes_find(
    cluster: Any, laid_out: LayOut, new_display: NewDisplay
) -> None:
    execution, shards = on(cluster.scheduler_address), {"shards": 2}
    here = laid_out("here", statistics=shards, workers=1)
    there = laid_out("there", statistics=shards, execution=execution)
    check(there)
    assert there.workers == 2
    heard, again = new_display(), new_display()
    expected, found = run_sweep(here, Silent()), run_sweep(there, heard)
    assert [row.state for row in found.rows] == ["done", "done"]
    for mine, theirs in zip(found.rows, expected.rows, strict=True):
        assert mine.number("bits_per_byte") == theirs.number("bits_per_byte")
    assert {"gather statistics 1/2", "gather statistics 2/2"} <= heard.progress
    assert set(heard.outcomes.values()) == {"done"}
    run_sweep(there, again)
    assert set(again.outcomes.values()) == {"cached"}


@pytest.mark.usefixtures("prefect_server")
def test_what_waits_for_a_failed_stage_is_skipped(
    cluster: Any, laid_out: LayOut, new_display: NewDisplay
) -> None:
    from foldstack.flows.sweep import SweepFailed

    layout = laid_out("home", execution=on(cluster.scheduler_address))
    run_stage(layout.calibration, layout.store)
    (layout.model.folder / "model.safetensors").write_bytes(b"torn")
    heard = new_display()
    with pytest.raises(SweepFailed, match=r"gather statistics|evaluate dense|models failed"):
        run_sweep(layout, heard)
    assert heard.outcomes["gather statistics"].startswith("failed")
    assert heard.outcomes["compress svd_llm 0.20"] == "skipped"


def test_a_scheduler_that_does_not_answer_is_named(
    laid_out: LayOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ANSWER_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"scheduler at tcp://127.0.0.1:1 does not answer"):
        check(laid_out("home", execution=on("tcp://127.0.0.1:1")))


@pytest.mark.parametrize(
    ("workers", "sentence"),
    [
        ({"n_workers": 0}, "has no workers; start some with `dask worker"),
        ({"n_workers": 1, "threads_per_worker": 2}, "must run one stage at a time, and .* runs 2"),
    ],
)
def test_workers_that_cannot_be_used_are_refused(
    laid_out: LayOut, workers: dict[str, int], sentence: str
) -> None:
    settings = {"processes": False, "protocol": "tcp", "host": "127.0.0.1"}
    with (
        distributed.LocalCluster(dashboard_address=None, **settings, **workers) as cluster,
        pytest.raises(InputError, match=sentence),
    ):
        check(laid_out("home", execution=on(cluster.scheduler_address)))


def test_a_worker_with_other_code_or_another_file_system_objects(laid_out: LayOut) -> None:
    layout = laid_out("home")
    stages = {"0" * 64: layout.ranking}
    assert "another version" in engines._objection(stages, {})
    gone = {"output.home": layout.store.root / "elsewhere" / ".probe-1"}
    assert "does not see output.home" in engines._objection({}, gone)
    assert engines._objection({layout.ranking.fingerprint: layout.ranking}, {}) == ""


def test_without_the_package_a_sentence_says_what_to_install(
    laid_out: LayOut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_scheduler, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'foldstack\[dask\]'"):
        check(laid_out("home", execution=on("tcp://127.0.0.1:8786")))


ERRAND = """
import os, time
from pathlib import Path
from prefect import flow
from foldstack.flows.running.engines import _dask_runner
from foldstack.tasks.running.prefect_cache import stage_task
from foldstack.tasks.running.worker_pool import ComputedStage

class Errand(ComputedStage):
    stage = "errand"
    packages = ()
    what: str
    marks: str

    def modules(self):
        return ("foldstack.compression.errors",)

    def compute(self, folder, work, progress):
        with (Path(self.marks) / self.what).open("a") as file:
            file.write(f"{os.getpid()}\\n")
        if self.what == "long" and not (Path(self.marks) / "go").exists():
            time.sleep(600)
        return {"pid": os.getpid()}

@flow
def errands(address, store, marks, during):
    task = stage_task("errand", store)
    with _dask_runner(address) as runner:
        def submit(what):
            stage = Errand(what=what, marks=str(marks))
            return runner.submit(task, {"stage": stage, "store_root": store.root, "report": None})
        first = submit("short")
        first.wait()
        second = submit("long")
        during()
        second.wait()
        return first.state.name, second.state.name
"""


@pytest.mark.usefixtures("prefect_server")
def test_a_killed_worker_costs_the_stage_that_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dask_errand.py").write_text(ERRAND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    marks, store = tmp_path / "marks", ArtifactStore(tmp_path / "store")
    marks.mkdir()

    def kill() -> None:
        deadline = time.monotonic() + 120
        while not (marks / "long").exists() or not (marks / "long").read_text().endswith("\n"):
            assert time.monotonic() < deadline, "nobody began"
            time.sleep(0.05)
        (marks / "go").touch()
        os.kill(int((marks / "long").read_text()), signal.SIGKILL)

    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        errands = importlib.import_module("dask_errand").errands
        states = errands(cluster.scheduler_address, store, marks, kill)
    assert states == ("Completed", "Completed")
    assert len((marks / "short").read_text().split()) == 1
    first, second = (marks / "long").read_text().split()
    assert first != second


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_are_faster_than_one_and_a_killed_one_costs_its_stage_only() -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "fanout.py"
    done = subprocess.run(
        [sys.executable, str(script), "--json"], capture_output=True, text=True, check=True
    )
    seen = json.loads(done.stdout)
    assert seen["speed_up"] > 1.2
    assert seen["stages_begun_again"] == [seen["killed_stage"]]
    assert seen["stages_begun_again_undisturbed"] == []
    assert seen["largest_difference_bits_per_byte"] == 0
