"""Find the folder of a model, and say in one sentence what is wrong with it; no torch needed."""

import json
import re
from pathlib import Path

from foldstack.compression.errors import InputError

REFERENCE = "reference"
GGUF = ".gguf"
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
SHARD = re.compile(r"\w[\w.-]*\.safetensors")
"""A shard's name: without a folder, so that an index cannot point out of the model's own."""
SAFETENSORS_LENGTH_BYTES = 8


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
    if HUB_ID.fullmatch(model) and not model.startswith((".", "/")):
        return _download(model, revision)
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


def _download(model: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(HUB_FILES)))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{model} is not a local directory, and the hub cannot be reached or is switched off: "
            "connect, or download the model first and give its directory"
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{model} cannot be fetched from the hub: {what}") from error


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
        raise InputError(f"{folder} is not a model directory: it holds no config.json")
    try:
        json.loads(config.read_text())
    except RecursionError:
        raise InputError(f"{config} is nested too deeply to be the config of a model") from None
    except ValueError as error:
        raise InputError(f"{config} is not valid JSON: {error}") from error
    for shard in _weight_files(folder):
        _check_safetensors(shard)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            outside = [name for name in names if not SHARD.fullmatch(name)]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"{index} does not list the weights of a sharded model") from error
        if outside:
            raise InputError(
                f"{index} must name safetensors files beside it, and names {outside[0]!r}"
            )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder} lacks {missing[0]}, which {index.name} names")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise InputError(
            f"{folder} holds its weights as a pickle (.bin), which foldstack never loads: "
            "convert it with transformers' save_pretrained, which writes safetensors"
        )
    raise InputError(f"{folder} holds no model.safetensors")


def _check_safetensors(file: Path) -> None:
    """The header is whole and the file as long as it says: catches truncated downloads."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(SAFETENSORS_LENGTH_BYTES), "little")
        start = SAFETENSORS_LENGTH_BYTES + header_bytes
        try:
            if start > size:
                raise ValueError("the header is cut short")
            header = json.loads(stream.read(header_bytes))
            ends = [e["data_offsets"][1] for name, e in header.items() if name != "__metadata__"]
            promised = start + max((int(end) for end in ends), default=0)
        except RecursionError:
            raise InputError(f"{file} is not a whole safetensors file: nested headers") from None
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
            raise InputError(f"{file} is not a whole safetensors file: {error}") from error
    if size != promised:
        raise InputError(f"{file} is damaged: it has {size} bytes, its header says {promised}")
