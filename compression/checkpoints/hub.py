"""Models of the Hugging Face hub: what is needed of one comes, once; no torch needed."""

import glob
import json
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from foldstack.compression.checkpoints.pickled_weights import PICKLE, PICKLE_INDEX, without_pickles
from foldstack.compression.checkpoints.stored_weights import INDEX_FILE, WEIGHTS_FILE
from foldstack.compression.errors import InputError, told

SMALL_FILES = (
    "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.bpe", "additional_chat_templates/*",
)  # fmt: skip
"""All but the weights; of folders in a repository (original/, onnx/) nothing is needed."""


def download(model: str, revision: str | None) -> Path:
    """The local folder of a model on the hub, or in the hub's cache where it is out of reach.

    Of several copies of the weights that one comes which transformers reads. Where all are pickles
    they are read as tensors and nothing else, and written as safetensors beside the cache.

    Raises:
        InputError: there is no such model, the hub cannot be reached, or nothing in it can be read.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    chosen: dict[str, Any] = {}
    try:
        found = HfApi().model_info(model, revision=revision)
        names = [file.rfilename for file in found.siblings or []]
        revision = found.sha or revision
        wanted = [name for name in names if _is_small(name)]
        wanted += _weights_of(model, revision, names)
        chosen = {"allow_patterns": [glob.escape(name) for name in wanted]}
    except InputError:
        raise
    except (HfHubHTTPError, ValueError) as error:
        raise InputError(f"{model} cannot be fetched from the hub: {told(error)}") from error
    except Exception:  # out of reach, or switched off: what the cache holds will do
        chosen = {"local_files_only": True}
    try:
        folder = Path(snapshot_download(model, revision=revision, **chosen))
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{model} is not a local directory, and the hub cannot be reached or is switched off: "
            "connect, or download the model first and give its directory"
        ) from error
    except (HfHubHTTPError, ValueError, OSError) as error:
        raise InputError(f"{model} cannot be fetched from the hub: {told(error)}") from error
    return without_pickles(folder, model)


def _is_small(name: str) -> bool:
    in_folder = "/" in name
    return any(fnmatch(name, pattern) for pattern in SMALL_FILES if ("/" in pattern) == in_folder)


def _weights_of(model: str, revision: str | None, names: Iterable[str]) -> list[str]:
    """The files of one copy of the weights: safetensors before GGUF before pickles."""
    there = set(names)
    for whole, index in ((WEIGHTS_FILE, INDEX_FILE), (PICKLE, PICKLE_INDEX)):
        if whole in there:
            return [whole]
        if index in there:
            return _shards(model, revision, index)
        gguf = sorted(name for name in there if name.endswith(".gguf"))
        if len(gguf) > 1:
            raise InputError(
                f"{model} on the hub holds {len(gguf)} GGUF files; download one, like {gguf[0]}, "
                "and give its path"
            )
        if gguf:
            return gguf
    pickles = [name for name in sorted(there) if name.endswith((".bin", ".pt", ".pth", ".msgpack"))]
    what = f"its weights are {pickles[0]}" if pickles else "it holds no weights"
    raise InputError(
        f"{model} on the hub has neither {WEIGHTS_FILE} nor {PICKLE}: {what}; give a repository "
        "that transformers loads"
    )


def _shards(model: str, revision: str | None, index: str) -> list[str]:
    from huggingface_hub import hf_hub_download

    file = Path(hf_hub_download(model, index, revision=revision))
    try:
        listed = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        return [index, *sorted({str(name) for name in listed})]
    except (ValueError, LookupError, AttributeError) as error:
        raise InputError(f"{index} of {model} does not list the weights' files") from error
