"""What a model folder's safetensors files hold, read from their headers; no torch needed."""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from foldstack.compression.checkpoints.folder_files import MIB, read_json_object
from foldstack.compression.errors import InputError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_INDEX_BYTES = 1024 * MIB
SHARD = re.compile(r"\w[\w.-]*\.safetensors")
"""A shard's name: without a folder, so that an index cannot point out of the model's own."""
SAFETENSORS_LENGTH_BYTES = 8


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its name there, safetensors dtype ("BF16"), shape and size."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by its name.

    Raises:
        InputError: there are no safetensors, one is damaged or cut short, or they are not what the
            index says.
    """
    held: dict[str, StoredTensor] = {}
    named = _named_by_index(folder)
    for file in weight_files(folder):
        status = file.stat()
        own = _read_header(file, status.st_size, status.st_mtime_ns)
        held |= {name: tensor for name, tensor in own.items() if not named or name in named}
    if lost := sorted(named - held.keys()):
        raise InputError(f"{folder / INDEX_FILE} names {lost[0]}, which none of its files holds")
    return held


def weight_files(folder: Path) -> list[Path]:
    """The files that a loader takes the weights from.

    Raises:
        InputError: there are none, or one that the index names is missing.
    """
    index = folder / INDEX_FILE
    if (folder / WEIGHTS_FILE).is_file() and not index.is_file():
        return [folder / WEIGHTS_FILE]
    if index.is_file():
        try:
            names = sorted(set(read_json_object(index, LARGEST_INDEX_BYTES)["weight_map"].values()))
            outside = [name for name in names if not SHARD.fullmatch(name)]
        except (LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index} does not list the weights of a sharded model") from error
        if outside:
            raise InputError(
                f"{index} must name safetensors files beside it, and names {outside[0]!r}"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder} lacks {missing[0]}, which {index.name} names")
        if (folder / WEIGHTS_FILE).is_file() and WEIGHTS_FILE not in names:
            raise InputError(
                f"{folder} holds {WEIGHTS_FILE} and shards that {index.name} names, and a loader "
                "takes one of the two: move the other away"
            )
        return [folder / name for name in names]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise InputError(
            f"{folder} holds its weights as a pickle (.bin), which foldstack never loads from a "
            "folder: convert it with transformers' save_pretrained, which writes safetensors"
        )
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter and no model: merge it into its base model "
            "(peft's merge_and_unload) and save that"
        )
    raise InputError(f"{folder} holds no {WEIGHTS_FILE}")


def _named_by_index(folder: Path) -> set[str]:
    index = folder / INDEX_FILE
    if not index.is_file():
        return set()
    found: Any = read_json_object(index, LARGEST_INDEX_BYTES).get("weight_map")
    return set(found) if isinstance(found, dict) else set()


@lru_cache(maxsize=64)
def _read_header(file: Path, size: int, _changed_ns: int) -> dict[str, StoredTensor]:
    """The tensors of a file that is whole, as long as its header says: a download may be cut."""
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(SAFETENSORS_LENGTH_BYTES), "little")
        start = SAFETENSORS_LENGTH_BYTES + header_bytes
        try:
            if start > size:
                raise ValueError("the header is cut short")
            header = json.loads(stream.read(header_bytes))
            held = {
                name: StoredTensor(
                    file, name, str(entry["dtype"]), tuple(map(int, entry["shape"])),
                    int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            }  # fmt: skip
            ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
            promised = start + max((int(end) for end in ends), default=0)
        except RecursionError:
            raise InputError(f"{file} is not a whole safetensors file: nested headers") from None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{file} is not a whole safetensors file: {error}") from error
    if size != promised:
        raise InputError(f"{file} is damaged: it has {size} bytes, its header says {promised}")
    return held
