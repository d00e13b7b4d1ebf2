"""A chain of stages that only wait and write, in a process of its own: for faults.py.

    python benchmarks/stage_chain.py STORE COMPUTED

makes NUM_STAGES artifacts in the store, each from the one before and each in parts that a killed
run finds again; every part that is computed is a line in the file COMPUTED. Without Prefect and
without models a run takes a second, so that hundreds of kills can be tried.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

from small_sweep import SmallSweep

from foldstack.compression.errors import InputError
from foldstack.tasks.stage import Progress, Stage, run_stage
from foldstack.tasks.store.artifacts import Artifact, ArtifactStore
from foldstack.tasks.store.manifest import Facts

NUM_STAGES, NUM_PARTS, PART_SECONDS = 4, 5, 0.04


class Step(Stage):
    """Waits, writes, and reads what the step before wrote."""

    stage: ClassVar[str] = "step"
    packages: ClassVar[tuple[str, ...]] = ()
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"computed"})
    number: int
    before: tuple[Artifact, ...]
    computed: Path

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.errors",)

    def produce(self, folder: Path, work: Path, progress: Progress) -> Facts:
        for part in range(NUM_PARTS):
            kept = work / str(part)
            if not kept.exists():
                self._compute(part, kept)
            with (folder / "parts.txt").open("a") as stream:
                stream.write(kept.read_text())
        for artifact in self.before:
            (folder / "before.txt").write_text((artifact.open() / "parts.txt").read_text())
        return {"number": self.number}

    def _compute(self, part: int, kept: Path) -> None:
        time.sleep(PART_SECONDS)
        with self.computed.open("a") as stream:
            stream.write(f"{self.number} {part}\n")
        unfinished = kept.with_name("unfinished")
        unfinished.write_text(f"part {part} of {self.number}\n" * 50)
        unfinished.rename(kept)


class StageChain(SmallSweep):
    """The chain where faults.py has a sweep."""

    def start(self) -> "subprocess.Popen[bytes]":
        self.home.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, str(self.store.root), str(self.computed)]
        with self.open_log() as log:
            return subprocess.Popen(
                command, env=self.marked(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    @property
    def computed(self) -> Path:
        return self.home / "computed"

    def result(self) -> dict[str, Any]:
        """Digests of the artifacts' files."""
        return {"artifacts": self.digests()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path, help="folder of the store")
    parser.add_argument("computed", type=Path, help="file to which each part adds a line")
    arguments = parser.parse_args()
    store, computed = ArtifactStore(arguments.store), arguments.computed
    before: tuple[Artifact, ...] = ()
    print("begun", flush=True)
    try:
        for number in range(NUM_STAGES):
            before = (run_stage(Step(number=number, before=before, computed=computed), store),)
    except InputError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
