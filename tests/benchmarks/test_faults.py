"""Kills at random moments; `benchmarks/faults.py` has many more, and the servers and the disk."""

import importlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.garbage import collect_garbage, list_artifacts

ROOT = Path(__file__).parents[2]
KILLS = 6
SECONDS = 0.8
"""A little less than the chain takes once it has begun."""


def start(store: ArtifactStore, computed: Path) -> "subprocess.Popen[str]":
    script = ROOT / "benchmarks" / "stage_chain.py"
    command = [sys.executable, str(script), str(store.root), str(computed)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def contents(store: ArtifactStore) -> dict[str, dict[str, str]]:
    """Digest of every file of every artifact, by the artifact's key."""
    return {
        row.artifact.key: {file.name: file.sha256 for file in row.artifact.manifest().files}
        for row in list_artifacts(store)
    }


def created(store: ArtifactStore) -> dict[str, str]:
    return {row.artifact.key: str(row.artifact.manifest().created) for row in list_artifacts(store)}


def test_a_run_that_is_killed_again_and_again_ends_like_one_in_peace(tmp_path: Path) -> None:
    peace, store = ArtifactStore(tmp_path / "peace"), ArtifactStore(tmp_path / "store")
    with start(peace, tmp_path / "computed in peace") as process:
        assert process.wait() == 0
    chance, computed = random.Random(0), tmp_path / "computed"
    finished: dict[str, str] = {}
    for _ in range(KILLS):
        with start(store, computed) as process:
            time.sleep(chance.uniform(0, SECONDS / 2))
            process.kill()
        assert finished.items() <= created(store).items(), "what was finished is made anew"
        finished = created(store)
    with start(store, computed) as process:
        assert process.wait() == 0
    assert finished.items() <= created(store).items()
    assert contents(store) == contents(peace)
    parts = computed.read_text().splitlines()
    assert set(parts) == set((tmp_path / "computed in peace").read_text().splitlines())
    assert len(parts) <= len(set(parts)) + KILLS, "a kill costs more than one part"
    assert list((store.root / "damaged").glob("*")) == []
    collect_garbage(store, keep_days=-1)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


def test_rounds_of_old_logs_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    summary = importlib.import_module("faults").summary
    old = {"kind": "flow", "blows": 2, "lost_seconds": [1.0, 3.0], "undisturbed_seconds": 9.0}
    new = old | {"of": "sweep", "blows": 1, "lost_seconds": [2.0], "refused": 4}
    log = tmp_path / "rounds.jsonl"
    log.write_text("".join(json.dumps(each | {"wrong": []}) + "\n" for each in (old, new)))
    flow = summary(log)["kinds"]["sweep: flow"]
    assert (flow["tried"], flow["survived"], flow["refused"]) == (3, 3, 4)
    assert (flow["lost_seconds_mean"], flow["lost_seconds_most"]) == (2.0, 3.0)


def figures_of(script: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sweeps_survive_kills_and_damage() -> None:
    kinds = ("flow", "worker", "truncate", "flip")
    figures = figures_of("faults.py", "--kills", "2", "--kind", *kinds)
    assert figures["survived"] == figures["tried"] == 2 * len(kinds)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_sweeps_at_the_same_time_make_each_artifact_once() -> None:
    figures = figures_of("concurrency.py", "--scene", "overlap", "dead")
    assert figures["overlap"]["made"] == figures["overlap"]["artifacts"]
