"""The recipe for one model that nobody has written one for: from a few wishes to a config."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foldstack.compression.checkpoints.model_folder import REFERENCE
from foldstack.compression.errors import InputError
from foldstack.compression.text.corpus import PYTHON_STDLIB, SELF, TextSource, documents
from foldstack.compression.text.text_files import is_text_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_METHOD = "modegpt"
"""The best that there is, by docs/methods.md."""
DEFAULT_SPARSITY = 0.2
NUM_WINDOWS, WINDOW_TOKENS = 128, 256
NUM_TEST_WINDOWS = 64
RECOVERY_BATCH = 8
DISTILLATION = 0.5
MOST_CHARACTERS_PER_TOKEN = 16
"""No text of human language needs more to fill a window."""


@dataclass(frozen=True)
class Wishes:
    """What a person says of the smaller model; everything but `model` may be left out."""

    model: str
    revision: str | None = None
    sparsity: float = DEFAULT_SPARSITY
    method: str = DEFAULT_METHOD
    calibration: str = ""
    """Text: see `source_named`. When empty, the reference model's own, or what the model writes."""
    test: str = ""
    """Text to measure on; when empty as for `calibration`."""
    recover: int = 0
    """Steps of recovery."""
    benchmarks: Sequence[str] = ()
    dtype: str = "auto"
    device: str = "auto"
    home: Path | None = None


def sparsity_of(sparsity: float | None, to: float | None) -> float:
    """The sparsity that was asked for, as what is gone or as what stays.

    Raises:
        InputError: both were given, or it is no fraction between 0 and 1.
    """
    if sparsity is not None and to is not None:
        raise InputError(f"give --sparsity or --to, not both; got {sparsity:g} and {to:g}")
    name, value = ("--to", to) if to is not None else ("--sparsity", sparsity)
    if value is None:
        return DEFAULT_SPARSITY
    if not 0 < value < 1:
        raise InputError(f"{name} must be a fraction between 0 and 1, such as 0.3, got {value:g}")
    return value if to is None else round(1 - value, 12)


def source_named(text: str, split: str) -> dict[str, Any]:
    """The text source that a word on the command line stands for: "self", "python-stdlib", a file
    with text, or a dataset: its folder, NAME or NAME:SUBSET."""
    if text in (SELF, PYTHON_STDLIB):
        return {"corpus": text, "split": split}
    path = Path(text).expanduser()
    if path.is_file() or is_text_file(text):
        return {"corpus": str(path.absolute())}
    if path.is_dir():
        return {"corpus": str(path.absolute()), "split": split}
    name, _, subset = text.partition(":")
    return {"corpus": name, **({"subset": subset} if subset else {}), "split": split}


def recipe_for(wishes: Wishes, folder: Path) -> dict[str, Any]:
    """The config, as plain data with nothing in it that is the default anyway.

    Args:
        wishes: what was asked for.
        folder: the model's, with plain weights.

    Raises:
        InputError: the model has no usable tokenizer, or a text cannot be read.
    """
    from foldstack.compression.checkpoints.checkpoint import load_config, load_tokenizer

    config, tokenizer = load_config(folder), load_tokenizer(folder)
    own = PYTHON_STDLIB if wishes.model == REFERENCE else SELF
    context = getattr(config, "max_position_embeddings", None) or WINDOW_TOKENS
    tokens = min(WINDOW_TOKENS, context)
    bos = "document" if tokenizer.bos_token_id is not None else "none"
    source = source_named(wishes.calibration or own, "train")
    steps = {"steps": wishes.recover, "batch_size": RECOVERY_BATCH, "distillation": DISTILLATION}
    most = max(NUM_WINDOWS, wishes.recover * RECOVERY_BATCH)
    available = _windows_in(source, tokenizer, tokens, most)
    windows = {"window_tokens": tokens, "bos": bos}
    trained_on = {"num_windows": min(wishes.recover * RECOVERY_BATCH, available), "seed": 1}
    model = {
        "name": _address(wishes.model),
        "revision": wishes.revision,
        "dtype": wishes.dtype,
        "device": wishes.device,
    }
    usual = (None, "auto")
    return {
        "name": f"compress {Path(wishes.model).name.removesuffix('.gguf')}",
        "model": {key: value for key, value in model.items() if value not in usual},
        "calibration": {"source": source, "num_windows": min(NUM_WINDOWS, available), **windows},
        "methods": [wishes.method],
        "sparsities": [wishes.sparsity],
        **(
            {"recovery": {**steps, "source": source, "windows": {**trained_on, **windows}}}
            if wishes.recover
            else {}
        ),
        "evaluation": {
            "perplexity": _perplexity(wishes.test or own, tokens, bos),
            **({"benchmarks": list(wishes.benchmarks)} if wishes.benchmarks else {}),
        },
        "speed": {"enabled": False},
        **({"output": {"home": str(wishes.home.expanduser().absolute())}} if wishes.home else {}),
    }


def _address(model: str) -> str:
    """The name as it is found from anywhere: a recipe may be run in another folder."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() and model != REFERENCE else model


def _perplexity(text: str, tokens: int, bos: str) -> dict[str, Any]:
    source = source_named(text, "test")
    protocol: dict[str, Any] = {"window_tokens": tokens, "max_tokens": NUM_TEST_WINDOWS * tokens}
    if text == SELF:  # its windows again: each begins with a document
        protocol |= {"joiner": "", "bos": bos, "score_last": False}
    elif text != PYTHON_STDLIB and bos != "none":
        protocol |= {"bos": "window"}
    return {"source": source, "protocol": protocol}


def _windows_in(
    source: dict[str, Any], tokenizer: "PreTrainedTokenizerBase", tokens: int, most: int
) -> int:
    """How many windows the text fills, from 1 to `most`; reads no more of it than it must."""
    if source["corpus"] == SELF:
        return most
    wanted = most * tokens
    found = 0
    for text in documents(TextSource(**source)):
        part = text[: wanted * MOST_CHARACTERS_PER_TOKEN]
        found += len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"])
        if found >= wanted:
            return most
    return max(1, found // tokens)
