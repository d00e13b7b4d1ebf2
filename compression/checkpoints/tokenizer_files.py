"""The files that a tokenizer is made of, and what it makes of a text that tells it from others."""

import json
import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from foldstack.compression.errors import InputError

CONFIG_FILE = "tokenizer_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", CONFIG_FILE, "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "*.bpe", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""Patterns. A class may name others, which `tokenizer_files` finds too."""

NEEDING_A_PACKAGE = {
    "tekken.json": "mistral_common",
    "*.tiktoken": "tiktoken",
    "*.model": "sentencepiece",
}
"""Files that transformers reads by packages which are no dependencies."""

PLAIN_TEXT = (
    "def fold(x):\n    return x[0] + 12_345.678  # naïve café, Größe; «да»; שלום; 中文の列",
    " two  spaces\tand a tab\r\n\r\n🙂 <|end|> </s> [MASK]",
)
SAMPLED_TOKENS = 256


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer in `folder`, those included that its own class names."""
    patterns = {*TOKENIZER_FILES, *_named_by_class(folder)}
    return sorted({f for pattern in patterns for f in folder.glob(pattern) if f.is_file()})


def _named_by_class(folder: Path) -> list[str]:
    try:
        entries = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        found: Any = tokenizer_class_from_name(entries["tokenizer_class"])
    except (OSError, ValueError, LookupError, TypeError, ImportError):
        return []  # there is none, or none that transformers knows: loading it says so
    names = getattr(found, "vocab_files_names", None) or {}
    return [name for name in names.values() if "/" not in name]


def missing_package(folder: Path) -> str:
    """The words for a tokenizer that only a package can read which is not here; else none."""
    if (folder / "tokenizer.json").is_file():
        return ""
    for pattern, package in NEEDING_A_PACKAGE.items():
        files = sorted(folder.glob(pattern))
        if files and find_spec(package) is None:
            return (
                f"{files[0].name} needs the package {package}; where that is installed, save the "
                "tokenizer once with transformers' save_pretrained, which writes tokenizer.json"
            )
    return ""


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copy the files of a tokenizer, all of them; gives those in `source`."""
    files = tokenizer_files(source)
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return files


def name_class(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a folder say which class its tokenizer is of: where the model's type does not tell."""
    file = folder / CONFIG_FILE
    entries = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if entries.get("tokenizer_class"):
        return
    entries["tokenizer_class"] = type(tokenizer).__name__
    file.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sample_text(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that a tokenizer with other tokens, or other rules, would read otherwise."""
    vocabulary = sorted(tokenizer.get_vocab().values())
    step = max(1, len(vocabulary) // SAMPLED_TOKENS)
    some: Any = tokenizer.decode(vocabulary[::step])
    return [*PLAIN_TEXT, str(some)]


def tokens_of(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """The tokens of texts, with those that begin and end one."""
    encode: Any = tokenizer
    return [list(map(int, encode(text)["input_ids"])) for text in texts]


def check_same_tokens(
    folder: Path, expected: list[list[int]], found: list[list[int]], texts: list[str]
) -> None:
    """Whether the tokenizer that lies in `folder` reads texts as the one that it came from.

    Raises:
        InputError: it does not.
    """
    for text, before, after in zip(texts, expected, found, strict=True):
        if before != after:
            raise InputError(
                f"the tokenizer does not travel: in {folder} it reads {text[:40]!r}... as "
                f"{after[:6]}, and where it came from as {before[:6]}; save it once with "
                "transformers' save_pretrained, which writes tokenizer.json"
            )
