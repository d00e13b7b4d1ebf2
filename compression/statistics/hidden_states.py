"""Hidden states of all windows at one place of a model: in memory, or in a file."""

import mmap
import os
import tempfile
from pathlib import Path
from typing import IO

import torch
from jaxtyping import Float
from torch import Tensor

MEMORY_BYTES = 1 << 30
"""What hidden states may take of memory before they go to a file."""
ZEROS = bytes(1 << 20)


def file_name(kind: str, boundary: int) -> str:
    """Of a file with the hidden states at a boundary between blocks."""
    return f"{kind}-{boundary:03d}"


class HiddenStates:
    """An array (windows, tokens, hidden), to be filled.

    Its file has no name and goes with it, unless it was given one.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        memory_bytes: int,
        folder: Path,
        name: str | None = None,
    ) -> None:
        """Make room.

        Args:
            memory_bytes: what may stay in memory; a larger array is in a file.
            folder: where that file is.
            name: of a file that stays, for `reopened`; a smaller array is in it, too.

        Raises:
            OSError: there is no room for the file on the disk.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        self._mapping: mmap.mmap | None = None
        if name is None and num_bytes <= memory_bytes:
            self.all: Float[Tensor, "windows tokens hidden"] = torch.empty(shape, dtype=dtype)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with _new_file(folder, name) as file:
            _fill(file, num_bytes)
            self._map(file, shape, dtype)

    @classmethod
    def reopened(
        cls, file: Path, windows_tokens: tuple[int, int], dtype: torch.dtype
    ) -> "HiddenStates":
        """Those of a file with a name, for so many windows of so many tokens."""
        states = cls.__new__(cls)
        width = file.stat().st_size // (windows_tokens[0] * windows_tokens[1] * dtype.itemsize)
        with file.open("r+b") as stream:
            states._map(stream, (*windows_tokens, width), dtype)
        return states

    def let_go(self) -> None:
        """Give the memory of what is in a file back; it stays in the file."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)

    def _map(self, file: IO[bytes], shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self._mapping = mmap.mmap(file.fileno(), torch.Size(shape).numel() * dtype.itemsize)
        self.all = torch.frombuffer(self._mapping, dtype=dtype).view(shape)


def _new_file(folder: Path, name: str | None) -> IO[bytes]:
    if name is None:
        return tempfile.TemporaryFile(dir=folder)
    (folder / name).unlink(missing_ok=True)  # somebody may have mapped it
    return (folder / name).open("w+b")


def _fill(file: IO[bytes], num_bytes: int) -> None:
    """Take the room on the disk: one that is full is told now, not by a bus error."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, num_bytes)
        return
    for start in range(0, num_bytes, len(ZEROS)):  # macOS
        file.write(ZEROS[: num_bytes - start])
    file.flush()
