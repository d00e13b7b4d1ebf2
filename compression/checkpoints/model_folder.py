"""Find the folder of a model, and say in one sentence what is wrong with it; no torch needed."""

import json
import re
from pathlib import Path

from foldstack.compression.checkpoints import stored_weights
from foldstack.compression.checkpoints.folder_files import check_json_files
from foldstack.compression.checkpoints.hub import download
from foldstack.compression.errors import InputError

REFERENCE = "reference"
GGUF = ".gguf"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str, revision: str | None = None) -> Path:
    """The local folder of a model: "reference", a directory, or a hub id (its code never comes).

    Raises:
        InputError: there is no such model, the hub cannot be reached, or the folder is incomplete.
    """
    folder = locate(model, revision)
    check_folder(folder)
    return folder


def locate(model: str, revision: str | None = None) -> Path:
    """The local folder of a model, or its GGUF file, whatever is in it.

    Raises:
        InputError: there is no such model, or the hub cannot be reached.
    """
    if model == REFERENCE:
        from foldstack.compression.reference import MODEL_FOLDER

        return MODEL_FOLDER
    path = Path(model).expanduser()
    if path.is_dir() or (path.suffix == GGUF and path.is_file()):
        return path.resolve()
    if is_hub_id(model):
        return download(model, revision)
    raise InputError(
        f"no model {model!r}: give a directory or a GGUF file that exists, a hub id such as "
        f"Qwen/Qwen3-0.6B, or {REFERENCE!r}"
    )


def gguf_of(place: Path) -> Path | None:
    """The GGUF file that a place is or, without safetensors beside it, holds; None for none.

    Raises:
        InputError: it holds several.
    """
    if place.suffix == GGUF and place.is_file():
        return place
    files = sorted(place.glob(f"*{GGUF}"))
    if not files or any(place.glob("*.safetensors")):
        return None
    if len(files) > 1:
        raise InputError(
            f"{place} holds {len(files)} GGUF files; give the path of one of them, such as "
            f"{files[0]}"
        )
    return files[0]


def quantization_of(folder: Path) -> str | None:
    """What the weights in a folder are quantised by, as its config names it; None for nothing."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # which is what `check_folder` says
        return None
    named = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(named, dict):
        return None
    if named.get("load_in_4bit") or named.get("load_in_8bit"):
        return "bitsandbytes"
    return str(named.get("quant_method", "an unnamed scheme"))


def is_hub_id(model: str) -> bool:
    """True for owner/name where there is no such folder: what is meant is on the hub."""
    is_one = HUB_ID.fullmatch(model) is not None and not model.startswith((".", "/"))
    return is_one and not Path(model).exists()


def check_folder(folder: Path) -> None:
    """Refuse a folder that lacks a config or weights, holds pickles only, or was cut short.

    Raises:
        InputError: says what is wrong and what would be right.
    """
    config = folder / "config.json"
    if gguf_of(folder) is not None or quantization_of(folder) is not None:
        raise InputError(
            f"{folder} holds quantised weights: make plain ones of them first, in Python by "
            "quantized_weights.dequantize; the command line does so by itself"
        )
    if not config.is_file():
        if (folder / "adapter_config.json").is_file():
            stored_weights.weight_files(folder)
        raise InputError(f"{folder} is not a model directory: it holds no config.json")
    check_json_files(folder)
    stored_weights.stored_tensors(folder)
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"{folder} holds an adapter beside the weights of a whole model, and a loader would "
            "lay it on top: merge it (peft's merge_and_unload), or move adapter_config.json and "
            "adapter_model.* to another folder"
        )
