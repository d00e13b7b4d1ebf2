"""A stage that several processes compute: what comes back, and what becomes of those that wait for
one that died."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from foldstack.compression.errors import InputError
from foldstack.tasks.environment.execution import Execution
from foldstack.tasks.running.messages import ProcessDied
from foldstack.tasks.running.ranks import compute_together, fsdp_environment, part


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise two of them would share one, and run out of its memory hours later."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "ACCELERATE_USE_CPU" not in fsdp_environment(Execution(), 2)
    with pytest.raises(InputError, match="processes 4 wants as many GPUs, and 2 are here"):
        fsdp_environment(Execution(), 4)
    told = fsdp_environment(Execution(device="cpu", threads=3), 4)
    assert (told["ACCELERATE_USE_CPU"], told["OMP_NUM_THREADS"]) == ("true", "3")
    with pytest.raises(InputError, match=r"needs model\.device auto, cuda or cpu, got meta"):
        fsdp_environment(Execution(device="meta"), 2)


def test_alone_there_is_nobody_to_leave() -> None:
    assert part()


ERRAND = """
import os, signal
from foldstack.tasks.running.ranks import part
from foldstack.tasks.running.worker_pool import ComputedStage

class Together(ComputedStage):
    stage = "together"
    what: str

    def modules(self): return ()

    def compute(self, folder, work, progress):
        import torch
        rank = torch.distributed.get_rank()
        progress("met", 1, 1)
        if self.what == "die" and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        number = torch.tensor([rank + 1])
        torch.distributed.all_reduce(number)
        if self.what == "fail" and rank == 1:
            raise ValueError("rank one has had enough")
        return {"sum": number.item(), "alone": part(), "environment": "RANK" in os.environ}
"""


@pytest.mark.slow  # two new processes that import torch, three times
def test_they_meet_and_none_outlives_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "errand.py").write_text(ERRAND)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    from errand import Together  # type: ignore[import-not-found]

    seen: list[Any] = []

    def run(what: str) -> Any:
        return compute_together(
            Together(what=what),
            2,
            fsdp_environment(Execution(device="cpu"), 2),
            tmp_path,
            tmp_path,
            lambda *told: seen.append(told),
        )

    assert run("meet") == {"sum": 3, "alone": True, "environment": False}
    assert seen == [("met", 1, 1)]  # by the first one alone
    with pytest.raises(ValueError, match="rank one has had enough"):
        run("fail")
    with pytest.raises(ProcessDied, match=f"process 1 ended with signal {int(signal.SIGKILL)}"):
        run("die")
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["errand.py"]
    sys.modules.pop("errand")
