"""Hidden states of all windows at one place of a model: in memory, or in a file."""

import mmap
import os
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

MEMORY_BYTES = 1 << 30
"""What hidden states may take of memory before they go to a file."""


class HiddenStates:
    """An array (windows, tokens, hidden), to be filled; its file has no name and goes with it."""

    def __init__(
        self, shape: tuple[int, int, int], dtype: torch.dtype, *, memory_bytes: int, folder: Path
    ) -> None:
        """Make room.

        Args:
            memory_bytes: what may stay in memory; a larger array is in a file.
            folder: where that file is.

        Raises:
            OSError: there is no room for the file on the disk.
        """
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        self._mapping: mmap.mmap | None = None
        if num_bytes <= memory_bytes:
            self.all: Float[Tensor, "windows tokens hidden"] = torch.empty(shape, dtype=dtype)
            return
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # a full disk is told now, not by a bus
            self._mapping = mmap.mmap(file.fileno(), num_bytes)
        self.all = torch.frombuffer(self._mapping, dtype=dtype).view(shape)

    def let_go(self) -> None:
        """Give the memory of what is in a file back; it stays in the file."""
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)
