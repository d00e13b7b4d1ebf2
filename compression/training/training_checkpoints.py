"""The checkpoints of a training: each a folder that appears whole, of one file or of one for each
process that holds a part of the model."""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from foldstack.compression.storage.durable import sync_files, sync_folder

logger = logging.getLogger(__name__)

Row = dict[str, int | float]
History = list[Row]

_RECORD_FILE = "record.json"
_TENSOR_FILE = "tensors.safetensors"


@dataclass(frozen=True)
class Saved:
    """One checkpoint as found: its record, and where its tensors are."""

    folder: Path
    record: dict[str, Any]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those of a process that held the whole model."""
        return load_file(self.folder / _TENSOR_FILE)

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill `tensors`, whole ones or this process's parts (DTensor), which all processes do
        together: the number of them may be another than it was."""
        if self._is_one_file and not _in_parts(tensors):
            stored = self.tensors
            for name, tensor in tensors.items():
                tensor.copy_(stored[name])
            return
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        reader = HuggingFaceStorageReader(str(self.folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load(dict(tensors), storage_reader=reader, no_dist=not _in_parts(tensors))

    @property
    def _is_one_file(self) -> bool:
        return (self.folder / _TENSOR_FILE).is_file()


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in a folder.

    Args:
        folder: where they are kept; made when the first one is written.
        digest: of everything that the run depends on; checkpoints of another digest are not ours.
        every: steps between two checkpoints.
    """

    folder: Path
    digest: str
    every: int

    def newest(self) -> Saved | None:
        """The newest checkpoint of this very run, if any can be read."""
        for folder in reversed(self._folders()):
            try:
                record = json.loads((folder / _RECORD_FILE).read_text())
                if record["digest"] != self.digest:
                    logger.info("%s belongs to other settings or data; not resumed from", folder)
                    continue
                for name in record["files"]:
                    with safe_open(folder / name, framework="pt"):
                        pass  # which finds out whether it is whole
                return Saved(folder, record)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                logger.warning("%s cannot be read (%s); not resumed from", folder, error)
        return None

    def write(self, tensors: Mapping[str, Tensor], history: History, **figures: Any) -> None:
        """Publish a checkpoint by one rename, then drop the older ones.

        It is on the disk before they go: after a power cut one of them is whole. Where the tensors
        are parts (DTensor), every process calls this, and writes its own; the first one publishes.
        """
        if not _in_parts(tensors):
            unfinished = self._begin()
            whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
            save_file(whole, unfinished / _TENSOR_FILE)
            self._publish(unfinished, history, figures)
            return
        from torch import distributed
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        is_first = distributed.get_rank() == 0
        told = [str(self._begin()) if is_first else ""]
        distributed.broadcast_object_list(told)
        # In safetensors: what is written by default are pickles.
        writer = HuggingFaceStorageWriter(told[0], save_distributed=True)
        save(dict(tensors), storage_writer=writer)
        if is_first:
            self._publish(Path(told[0]), history, figures)

    def _begin(self) -> Path:
        unfinished = self.folder / f".unfinished-{os.getpid()}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        return unfinished

    def _publish(self, unfinished: Path, history: History, figures: Mapping[str, Any]) -> None:
        files = sorted(file.name for file in unfinished.iterdir())
        record = {"digest": self.digest, "files": files, "history": history, **figures}
        (unfinished / _RECORD_FILE).write_text(json.dumps(record))
        sync_files(unfinished)
        older = self._folders()
        published = self.folder / f"step-{len(history):08d}"
        if published in older:  # of other settings, or damaged: `newest` did not take it
            shutil.rmtree(published)
        unfinished.rename(published)
        sync_folder(self.folder)
        for folder in older:
            if folder != published:
                shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(f for f in self.folder.iterdir() if re.fullmatch(r"step-\d+", f.name))


def _in_parts(tensors: Mapping[str, Tensor]) -> bool:
    """Whether this process holds but a part of each."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(tensor, DTensor) for tensor in tensors.values())
