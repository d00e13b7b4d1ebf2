"""A pass that is killed goes on behind the blocks that it has kept, and gives the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from foldstack.compression.statistics import kept_pass
from foldstack.compression.statistics.gathering import KINDS, Statistics, gather

KILLED_AT_ONE_HALF = """
import os, signal, sys
from pathlib import Path

import torch

from foldstack.compression.statistics import kept_pass
from foldstack.compression.checkpoints.checkpoint import load_model
from foldstack.compression.statistics.gathering import KINDS, gather

model, windows, out, work = map(Path, sys.argv[1:])
kept_pass.SECONDS_BETWEEN = 0
torch.set_num_threads(1)

def kill(_what, done, total):
    if done == total // 2:
        os.kill(os.getpid(), signal.SIGKILL)

gather(
    load_model(model), torch.load(windows), KINDS,
    batch_size=2, progress=kill, folder=out, work=work,
)
"""


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(97, (5, 24), generator=torch.Generator().manual_seed(0))


def test_a_killed_pass_goes_on_at_the_next_block(
    tiny_model: Any, windows: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    torch.save(windows, tmp_path / "windows.pt")
    places = [tmp_path / name for name in ("model", "windows.pt", "lost", "work")]
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED_AT_ONE_HALF, *map(str, places)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]

    seen: list[int] = []
    resumed, whole = tmp_path / "resumed", tmp_path / "whole"
    gather(
        model, windows, KINDS, batch_size=2, folder=resumed, work=tmp_path / "work",
        progress=lambda _what, done, _total: seen.append(done),
    ).save(resumed)  # fmt: skip
    num_blocks = len(model.model.layers)
    assert seen == list(range(num_blocks // 2 + 1, num_blocks + 1))
    gather(model, windows, KINDS, batch_size=2, folder=whole).save(whole)
    assert bytes_in(resumed) == bytes_in(whole)


def test_a_pass_killed_at_its_end_has_its_files_again(
    tiny_model: Any, windows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_pass, "SECONDS_BETWEEN", 0)
    model = tiny_model("llama")
    first = gather(model, windows, KINDS, folder=tmp_path / "lost", work=tmp_path / "work")
    again = gather(
        model, windows, KINDS, folder=tmp_path / "out", work=tmp_path / "work",
        progress=lambda *_: pytest.fail("no block runs again"),
    )  # fmt: skip
    assert again.grams.keys() == first.grams.keys()
    assert torch.equal(again.similarity, first.similarity)
    again.save(tmp_path / "out")
    loaded = Statistics.load(tmp_path / "out")
    assert torch.equal(loaded.gram(1, "mlp_input"), first.gram(1, "mlp_input"))


def test_no_checkpoint_is_written_for_little_work(
    tiny_model: Any, windows: torch.Tensor, tmp_path: Path
) -> None:
    gather(tiny_model("llama"), windows, KINDS, folder=tmp_path / "out", work=tmp_path / "work")
    assert not (tmp_path / "work" / "pass" / kept_pass.RECORD).exists()


@pytest.mark.parametrize("file", [kept_pass.RECORD, "states-004", "boundary-001", "grams-000"])
def test_a_pass_whose_files_were_cut_short_begins_anew(
    tiny_model: Any,
    windows: torch.Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    file: str,
) -> None:
    monkeypatch.setattr(kept_pass, "SECONDS_BETWEEN", 0)
    model, out, work = tiny_model("llama"), tmp_path / "out", tmp_path / "work"
    gather(model, windows, KINDS, folder=tmp_path / "whole", work=work)
    (hurt,) = (work / "pass").glob(f"{file}*")
    os.truncate(hurt, hurt.stat().st_size // 2)
    seen: list[int] = []
    again = gather(
        model, windows, KINDS, folder=out, work=work,
        progress=lambda _what, done, _total: seen.append(done),
    )  # fmt: skip
    assert seen == list(range(1, len(model.model.layers) + 1))
    assert str(hurt) in caplog.text
    again.save(out)
    whole = gather(model, windows, KINDS, folder=tmp_path / "fresh")
    whole.save(tmp_path / "fresh")
    assert bytes_in(out) == bytes_in(tmp_path / "fresh")
