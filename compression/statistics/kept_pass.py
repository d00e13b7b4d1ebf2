"""How far a pass over a model's blocks has come, kept on disk for the run that goes on with it."""

import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from foldstack.compression.statistics.gram_files import GramKey, gram_file
from foldstack.compression.statistics.hidden_states import file_name
from foldstack.compression.storage.durable import sync_files
from foldstack.compression.storage.spool import read_whole, write_at_once

logger = logging.getLogger(__name__)

SECONDS_BETWEEN = 10.0
"""A checkpoint waits for the disk, so there is none before so much work would be lost."""
RECORD = "done.safetensors"
STATES, BOUNDARIES = "states", "boundary"
SIZE = "size/"


class KeptPass:
    """The state of a pass in a folder that belongs to this one computation.

    The hidden states, and the Grams where there are any, are written into files there while they
    are computed. A checkpoint makes them last, and then the small rest is written at once: the
    blocks that are done, the sums of their inputs, the bounds on the ranks of their Grams, and the
    sizes of the files. A run that finds a file of another size begins anew: what entered the blocks
    that are done is not kept.
    """

    def __init__(self, folder: Path | None, kinds: Sequence[str] = (STATES,)) -> None:
        """Without a folder nothing is kept; `kinds` are the names of the hidden states that go from
        block to block."""
        self.folder = folder
        self._kinds = kinds
        self.position = 0
        """Blocks that an earlier run has done."""
        self.input_sums: dict[GramKey, Tensor] = {}
        self.ranks: dict[str, int] = {}
        """Of Grams that cannot have full rank, by what a person calls them."""
        self._last = time.monotonic()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            if (record := read_whole(folder / RECORD)) is not None and self._is_whole(record):
                self._read(record)

    def name(self, kind: str) -> str | None:
        """What the files of hidden states are to be called; None: they need not stay."""
        return None if self.folder is None else kind

    def begin_anew(self) -> None:
        """Take nothing of what an earlier run has kept."""
        self.position = 0
        self.input_sums, self.ranks = {}, {}
        if self.folder is not None:
            # Before any file changes: those that are made keep their size from the start.
            (self.folder / RECORD).unlink(missing_ok=True)

    def checkpoint(self, position: int) -> None:
        """Keep what is done up to the input of block `position`, unless it was kept just now."""
        if self.folder is None or time.monotonic() - self._last < SECONDS_BETWEEN:
            return
        sync_files(self.folder)
        record = {"position": torch.tensor(position)}
        record |= {f"input/{p}/{reads}": total for (p, reads), total in self.input_sums.items()}
        record |= {f"rank/{name}": torch.tensor(rank) for name, rank in self.ranks.items()}
        for file in self._files(position):
            record[f"{SIZE}{file.name}"] = torch.tensor(file.stat().st_size)
        write_at_once(record, self.folder / RECORD)
        for kind in self._kinds:
            for file in self.folder.glob(f"{kind}-*"):
                if file.name != file_name(kind, position):
                    file.unlink()
        self._last = time.monotonic()

    def show_grams(self, folder: Path) -> None:
        """Let the files of the Grams be in `folder` too."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in () if self.folder is None else self.folder.glob("grams-*"):
            target = folder / file.name
            target.unlink(missing_ok=True)
            try:
                os.link(file, target)
            except OSError:  # another disk, or one without links
                shutil.copyfile(file, target)

    def _files(self, position: int) -> list[Path]:
        """What a run that goes on at block `position` reads."""
        assert self.folder is not None
        names = [file_name(kind, position) for kind in self._kinds]
        names += [file_name(BOUNDARIES, boundary) for boundary in range(position)]
        files = [self.folder / name for name in names]
        files += [gram_file(self.folder, done) for done in range(position)]
        return [file for file in files if file.is_file()]

    def _is_whole(self, record: dict[str, Tensor]) -> bool:
        """Whether the files are as they were when `record` was written; else it goes."""
        assert self.folder is not None
        for name in [name for name in record if name.startswith(SIZE)]:
            file, size = self.folder / name.removeprefix(SIZE), int(record.pop(name))
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                now = "is missing" if found is None else f"has {found} bytes instead of {size}"
                logger.warning("%s, left by an earlier run, %s: the pass begins anew", file, now)
                self.begin_anew()
                return False
        return True

    def _read(self, record: dict[str, Tensor]) -> None:
        self.position = int(record.pop("position"))
        for name, tensor in record.items():
            kind, _, rest = name.partition("/")
            if kind == "rank":
                self.ranks[rest] = int(tensor)
            else:
                block, _, reads = rest.partition("/")
                self.input_sums[int(block), reads] = tensor
