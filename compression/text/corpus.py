"""Text from where the user says: the standard library, a local file, or a dataset of the hub."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.errors import InputError
from foldstack.compression.reference.stdlib_corpus import SPLITS, stdlib_split

if TYPE_CHECKING:
    from datasets import Dataset

PYTHON_STDLIB = "python-stdlib"
SELF = "self"


class TextSource(BaseModel):
    """Where text comes from, and which part of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    corpus: str = PYTHON_STDLIB
    """"python-stdlib" (comes with Python), a .txt or .jsonl file, the name of a dataset, or "self":
    what the dense model of the run writes itself."""
    subset: str | None = None
    """Configuration of a dataset, such as "wikitext-2-raw-v1"; only for datasets."""
    split: str = "train"
    """Split of the standard library or of a dataset; a local file is whole under any name, and of
    "self" each split is drawn by itself."""
    text_field: str = "text"
    """The field with the text, of a .jsonl file or a dataset."""
    separator: str | None = None
    """What stands between two documents of a .txt file; without it the file is one document."""
    revision: str | None = None
    """Branch, tag or commit of a dataset on the hub; give a commit to pin its content."""
    temperature: float = Field(default=1.0, gt=0)
    """What the logits are divided by before a token is drawn; only for "self"."""


def documents(source: TextSource) -> list[str]:
    """Give the texts of a source in order, without those that are blank.

    Raises:
        InputError: there is no such source, split or field, the hub cannot be reached, or no text
            is left.
    """
    if source.corpus == SELF:
        raise InputError(
            f"corpus {SELF!r} is what the dense model of a run writes, and here is none: give "
            f"{PYTHON_STDLIB!r}, a .txt or .jsonl file, or the name of a dataset"
        )
    if source.corpus == PYTHON_STDLIB:
        texts = list(_stdlib_modules(source.split).values())
    elif source.corpus.endswith((".txt", ".jsonl")):
        texts = _read_file(Path(source.corpus), source)
    else:
        texts = _read_dataset(source)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"a corpus must hold text, but {_described(source)} is blank")
    return texts


def source_digest(source: TextSource) -> str:
    """Give the SHA-256 of the documents: equal exactly where the text is equal.

    Raises:
        InputError: as for `documents`.
    """
    content = hashlib.sha256()
    for text in documents(source):
        data = text.encode("utf-8", "surrogatepass")
        content.update(len(data).to_bytes(8, "big") + data)
    return content.hexdigest()


def stdlib_dataset(split: str) -> "Dataset":
    """Give a split of the standard library as a dataset with the columns `path` and `text`.

    Raises:
        InputError: `split` is none of train, validation, test.
    """
    from datasets import Dataset

    modules = _stdlib_modules(split)
    return Dataset.from_dict({"path": list(modules), "text": list(modules.values())})


def _stdlib_modules(split: str) -> dict[str, str]:
    if split not in SPLITS:
        raise InputError(f"{PYTHON_STDLIB} has the splits {', '.join(SPLITS)}, got {split!r}")
    try:
        return stdlib_split(split)
    except FileNotFoundError as error:
        raise InputError(f"{error}: give a local .txt or .jsonl file as corpus") from error


def _read_file(path: Path, source: TextSource) -> list[str]:
    if not path.is_file():
        raise InputError(f"a corpus file must exist, but there is no file {path.absolute()}")
    try:
        # newline="": the text as it is, so that its digest is that of the same bytes everywhere.
        with path.open(encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"a corpus file must be readable as UTF-8, but {path}: {error}") from error
    if path.suffix == ".jsonl":
        return [
            _field_of_line(line, f"line {number} of {path}", source.text_field)
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    return text.split(source.separator) if source.separator else [text]


def _field_of_line(line: str, place: str, field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place} must be a JSON object, but {error}") from error
    if not isinstance(record, dict):
        raise InputError(f"{place} must be a JSON object, got {type(record).__name__}")
    if field not in record:
        raise InputError(
            f"{place} has no field {field!r}: set text_field to one of {', '.join(record)}"
        )
    if not isinstance(record[field], str):
        found = type(record[field]).__name__
        raise InputError(f"field {field!r} must be text, but in {place} it is {found}")
    return record[field]


def _read_dataset(source: TextSource) -> list[str]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    try:
        dataset = load_dataset(
            source.corpus, source.subset, split=source.split, revision=source.revision
        )
    except DatasetNotFoundError as error:
        raise InputError(
            f"no corpus {source.corpus!r}: give {PYTHON_STDLIB!r}, a .txt or .jsonl file, or the "
            "name of a dataset that the hub shows you"
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"{source.corpus!r} is no local file, and the hub cannot be reached or is switched "
            "off: connect, or give a local .txt or .jsonl file"
        ) from error
    except (ValueError, OSError, RuntimeError) as error:  # an unknown split or subset among them
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"dataset {source.corpus!r} cannot be loaded: {what}") from error
    if source.text_field not in dataset.column_names:
        raise InputError(
            f"{source.corpus} has no field {source.text_field!r}: "
            f"set text_field to one of {', '.join(dataset.column_names)}"
        )
    texts = [text or "" for text in dataset[source.text_field]]
    if not all(isinstance(text, str) for text in texts):
        found = dataset.features[source.text_field]
        raise InputError(
            f"field {source.text_field!r} must be text, in {source.corpus} it is {found}"
        )
    return texts


def _described(source: TextSource) -> str:
    parts = [source.corpus, source.subset, source.split]
    return " ".join(part for part in parts if part)
