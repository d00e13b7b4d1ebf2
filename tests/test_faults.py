"""Kills at random moments; `benchmarks/faults.py` has many more, and the servers and the disk."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from foldstack.tasks.artifacts import ArtifactStore
from foldstack.tasks.garbage import collect_garbage, list_artifacts

ROOT = Path(__file__).parent.parent
NUM_STAGES, NUM_PARTS, PART_SECONDS = 4, 5, 0.04
KILLS = 6

CHAIN = f"""
import sys, time
from pathlib import Path
from foldstack.tasks.artifacts import Artifact, ArtifactStore
from foldstack.tasks.stage import Stage, run_stage

store, computed = ArtifactStore(Path(sys.argv[1])), Path(sys.argv[2])

class Step(Stage):
    stage = "step"
    packages = ()
    number: int
    before: tuple[Artifact, ...]

    def modules(self):
        return ("foldstack.compression.errors",)

    def produce(self, folder, work, progress):
        for part in range({NUM_PARTS}):
            kept = work / str(part)
            if not kept.exists():
                time.sleep({PART_SECONDS})
                with computed.open("a") as stream:
                    stream.write(f"{{self.number}} {{part}}\\n")
                unfinished = work / "unfinished"
                unfinished.write_text(f"part {{part}} of {{self.number}}\\n" * 50)
                unfinished.rename(kept)
            with (folder / "parts.txt").open("a") as stream:
                stream.write(kept.read_text())
        for artifact in self.before:
            (folder / "before.txt").write_text((artifact.open() / "parts.txt").read_text())
        return {{"number": self.number}}

print("begun", flush=True)
before = ()
for number in range({NUM_STAGES}):
    before = (run_stage(Step(number=number, before=before), store),)
"""


def start(store: ArtifactStore, computed: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", CHAIN, str(store.root), str(computed)],
        stdout=subprocess.PIPE,
        text=True,
    )
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
            time.sleep(chance.uniform(0, NUM_PARTS * PART_SECONDS))
            process.kill()
        assert finished.items() <= created(store).items(), "what was finished is made anew"
        finished = created(store)
    with start(store, computed) as process:
        assert process.wait() == 0
    assert finished.items() <= created(store).items()
    assert contents(store) == contents(peace)
    parts = computed.read_text().splitlines()
    assert len(parts) <= NUM_STAGES * NUM_PARTS + KILLS, "a kill costs more than one part"
    assert list((store.root / "damaged").glob("*")) == []
    collect_garbage(store, keep_days=-1)
    assert [path for path in store.root.rglob("*") if path.is_file()] == []


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
