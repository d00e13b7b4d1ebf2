"""Weights that a repository of the hub has as pickles only, read as tensors and written again."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from foldstack.compression.checkpoints.folder_files import read_json_object
from foldstack.compression.checkpoints.stored_weights import (
    INDEX_FILE,
    LARGEST_INDEX_BYTES,
    WEIGHTS_FILE,
)
from foldstack.compression.errors import InputError, refusing

if TYPE_CHECKING:
    from torch import Tensor

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
NAME = re.compile(r"\w[\w.-]*\.bin")


def without_pickles(folder: Path, model: str) -> Path:
    """The same model with safetensors: `folder` itself where it has some, else a folder beside the
    hub's cache, made once for each commit.

    Raises:
        InputError: a pickle holds something else than tensors, or is damaged.
    """
    files = _pickles(folder)
    if not files or any(folder.glob("*.safetensors")):
        return folder
    from huggingface_hub import cached_assets_path

    kept = cached_assets_path("foldstack", namespace=model.replace("/", "--"), subfolder="plain")
    made, unfinished = kept / folder.name, kept / f".{folder.name}.{os.getpid()}"
    if not made.is_dir():
        unfinished.mkdir(parents=True)
        try:
            convert(folder, files, unfinished)
            unfinished.rename(made)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return made


def _pickles(folder: Path) -> list[Path]:
    if (folder / PICKLE).is_file():
        return [folder / PICKLE]
    index = folder / PICKLE_INDEX
    if not index.is_file():
        return []
    listed = read_json_object(index, LARGEST_INDEX_BYTES).get("weight_map")
    names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
    for name in names:
        if not NAME.fullmatch(name) or not (folder / name).is_file():
            raise InputError(f"{index} must name files beside it that are there, and names {name}")
    return [folder / name for name in names]


def convert(folder: Path, files: list[Path], target: Path) -> None:
    """Write the tensors of `files` as safetensors into `target`, with all other small files.

    Raises:
        InputError: a file holds something else than tensors, or is damaged.
    """
    from safetensors.torch import save_file

    listed: dict[str, str] = {}
    total = 0
    for number, file in enumerate(files, start=1):
        tensors = tensors_in(file)
        name = WEIGHTS_FILE
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, target / name, metadata={"format": "pt"})
        listed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": listed}
        (target / INDEX_FILE).write_text(json.dumps(index, indent=1), encoding="utf-8")
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".bin" and file.name != PICKLE_INDEX:
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


def tensors_in(file: Path) -> "dict[str, Tensor]":
    """The tensors of a pickle by name, by torch's reader that runs nothing and makes nothing else.

    Raises:
        InputError: the file holds something else, or is damaged.
    """
    import torch

    try:
        held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # its own words advise to run what the file holds
        raise InputError(
            f"{file} holds something else than tensors by name, or is damaged: torch's reader of "
            "weights refuses it, and foldstack uses no other"
        ) from error
    with refusing(f"{file} cannot be read"):
        if not isinstance(held, dict):
            raise InputError(f"{file} must hold tensors by name, got {type(held).__name__}")
        # Two names of one tensor become two tensors: which of them are one is the config's to say.
        return {
            str(name): tensor.detach().clone().contiguous()
            for name, tensor in held.items()
            if isinstance(tensor, torch.Tensor)
        }
