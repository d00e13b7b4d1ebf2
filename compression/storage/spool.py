"""Tensors made part after part, each kept on disk as soon as it is made."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldstack.compression.storage.durable import sync_file, sync_folder

logger = logging.getLogger(__name__)


class Spool:
    """The tensors of a cut while it is made; a run that was killed finds the parts it finished.

    Parts on disk are mapped, not read, and every run computes with what was written, so that it
    makes no difference which run made a part. Without a folder they are in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        """Keep parts in `folder`, which belongs to this one computation: names say it all."""
        self._folder = folder
        self.tensors: dict[str, Tensor] = {}
        """Those of all parts so far."""

    def has(self, name: str) -> bool:
        """Whether an earlier run has left this part."""
        return self._folder is not None and read_whole(self._file(name)) is not None

    def part(self, name: str, make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of one part: as an earlier run has left them, or made now."""
        if self._folder is None:
            tensors = dict(make())
        else:
            file = self._file(name)
            found = read_whole(file)
            if found is None:
                write_at_once(make(), file)
                found = load_file(file)
            tensors = found
        self.tensors |= tensors
        return tensors

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"


def read_whole(file: Path) -> dict[str, Tensor] | None:
    """The tensors that `write_at_once` has left; None where there is no file.

    One that is cut short, as a disk leaves it that lied about what it had written, counts as none,
    and the log names it.
    """
    try:
        return load_file(file)
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError) as error:
        logger.warning(
            "%s was left by an earlier run and cannot be read (%s): made anew", file, error
        )
        file.unlink()
        return None


def write_at_once(tensors: Mapping[str, Tensor], file: Path) -> None:
    """The file is there whole or not at all, whenever the process or the machine dies."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    # Copies: two of them may be views of one tensor, which safetensors refuses.
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    save_file(copies, unfinished)
    sync_file(unfinished)
    unfinished.replace(file)
    sync_folder(file.parent)
