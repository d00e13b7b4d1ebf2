"""Weights in files come back after they were let go, and what was written to them stays."""

import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from foldstack.compression.storage import mapped_memory
from foldstack.compression.storage.mapped_memory import release, releasing, trim

ROWS, COLUMNS = 4096, 1024
needs_proc = pytest.mark.skipif(
    not mapped_memory.PAGES.exists(), reason="needs /proc/self/smaps of Linux"
)


@pytest.fixture
def linear(tmp_path: Path) -> nn.Module:
    """A linear whose weight of 16 MiB is mapped from a file."""
    save_file({"weight": torch.arange(ROWS * COLUMNS).float().view(ROWS, COLUMNS)}, tmp_path / "w")
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.load_state_dict(load_file(tmp_path / "w"), assign=True)
    return linear


def resident_bytes(tensor: torch.Tensor) -> int:
    """Memory that the mapping of this tensor takes."""
    found = False
    for line in mapped_memory.PAGES.read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            first, last = (int(a, 16) for a in line.split(" ", 1)[0].split("-"))
            found = first <= tensor.data_ptr() < last
        elif found and line.startswith("Rss:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the tensor is in no mapping")


@needs_proc
def test_released_weights_take_no_memory_and_come_back(linear: Any) -> None:
    weight = linear.weight
    total = weight.double().sum()
    assert resident_bytes(weight) >= weight.nbytes
    release(linear)
    assert resident_bytes(weight) < weight.nbytes / 100
    assert torch.equal(weight.double().sum(), total)


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_what_was_freed_between_what_lives_is_given_back() -> None:
    before = anonymous_bytes()
    size = 64 << 10  # below what the library asks the system for one by one
    many = [torch.ones(size // 4) for _ in range(2048)]
    full = anonymous_bytes() - before
    del many[::2], many[1:-1]  # the last one holds the end of the heap
    trim()
    assert anonymous_bytes() - before < full / 4


@needs_proc
def test_a_block_is_released_once_it_was_run(linear: Any) -> None:
    with releasing([linear]), torch.no_grad():
        linear(torch.ones(1, COLUMNS))
    assert resident_bytes(linear.weight) < linear.weight.nbytes / 100
    assert not linear._forward_hooks


def test_what_was_written_to_stays(linear: Any) -> None:
    linear.weight.data[7, 7] = -1.0
    release(linear)
    assert linear.weight[7, 7] == -1.0


def test_memory_of_its_own_stays() -> None:
    model = nn.Linear(512, 512)
    before = model.weight.clone()
    release(model)
    release([torch.empty(0)])
    assert torch.equal(model.weight, before)
