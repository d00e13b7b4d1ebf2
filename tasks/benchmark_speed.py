"""The stage that measures how fast a model is, in turn with the dense one."""

from pathlib import Path
from typing import ClassVar

from foldstack.tasks.artifacts import Artifact
from foldstack.tasks.execution import Execution
from foldstack.tasks.manifest import Facts, hardware
from foldstack.tasks.stage import ModelRef, Progress
from foldstack.tasks.worker_pool import ComputedStage


class BenchmarkSpeed(ComputedStage):
    """Speed, memory and load time of one model on this machine."""

    stage: ClassVar[str] = "benchmark_speed"
    outside_fingerprint: ClassVar[frozenset[str]] = frozenset({"name"})

    dense: ModelRef
    model: ModelRef | Artifact
    execution: Execution
    machine: str = ""
    """A speed is one of a machine: on another one it is measured again."""
    name: str = ""

    def modules(self) -> tuple[str, ...]:
        return ("foldstack.compression.checkpoint",)

    @property
    def label(self) -> str:
        return f"bench {self.name}".strip()

    def compute(self, folder: Path, work: Path, progress: Progress) -> Facts:
        return {}


def this_machine() -> str:
    return hardware()
