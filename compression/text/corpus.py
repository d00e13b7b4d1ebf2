"""Text from where the user says: the standard library, a local file, or a dataset of the hub."""

import hashlib
import logging
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from foldstack.compression.errors import InputError, told
from foldstack.compression.reference.stdlib_corpus import SPLITS, stdlib_split
from foldstack.compression.storage.digest import saw
from foldstack.compression.text.text_files import FORMS, is_text_file, mended, read_texts

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

PYTHON_STDLIB = "python-stdlib"
DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""What the hub calls a dataset: the name of a folder may look alike."""
SELF = "self"


class TextSource(BaseModel):
    """Where text comes from, and which part of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    corpus: str = PYTHON_STDLIB
    """"python-stdlib" (comes with Python), a file with text, records or a table, the folder or the
    name of a dataset, or "self": what the dense model of the run writes itself."""
    subset: str | None = None
    """Configuration of a dataset, such as "wikitext-2-raw-v1"; only for datasets."""
    split: str = "train"
    """Split of the standard library or of a dataset; a local file is whole under any name, and of
    "self" each split is drawn by itself."""
    text_field: str = "text"
    """The field with the text, of records, a table or a dataset."""
    separator: str | None = None
    """What stands between two documents of a plain text; without it the file is one document."""
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
            f"{PYTHON_STDLIB!r}, a file with text, or the name of a dataset"
        )
    return _read(source)[0]


def source_digest(source: TextSource) -> str:
    """Give the SHA-256 of the documents: equal exactly where the text is equal.

    What is to be known of how they were read goes into the log, once for each process.

    Raises:
        InputError: as for `documents`.
    """
    content = hashlib.sha256()
    texts, notes = _read(source)
    for note in notes:
        _tell(note)
    for text in texts:
        data = text.encode()
        content.update(len(data).to_bytes(8, "big") + data)
    return content.hexdigest()


@cache
def _tell(note: str) -> None:
    """A text is calibrated on, recovered with and measured on: it is told of once."""
    logger.warning("%s", note)


def _read(source: TextSource) -> tuple[list[str], list[str]]:
    """The texts, and what a person should know of them."""
    path = Path(source.corpus).expanduser()
    if source.corpus == PYTHON_STDLIB:
        texts, notes = list(_stdlib_modules(source.split).values()), list[str]()
    elif path.is_file() or is_text_file(source.corpus):
        saw(path)
        texts, notes = read_texts(path, source.text_field, source.separator)
    else:
        texts, notes = _read_dataset(source)
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise InputError(f"a corpus must hold text, but {_described(source)} is blank")
    return texts, notes


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
        raise InputError(f"{error}: give a local file as corpus") from error


def _read_dataset(source: TextSource) -> tuple[list[str], list[str]]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetNotFoundError

    folder, notes = Path(source.corpus).expanduser(), list[str]()
    if folder.is_dir() and DATASET_NAME.fullmatch(source.corpus):
        notes.append(
            f"corpus {source.corpus} is the folder {folder.resolve()} and not the dataset of that "
            f"name on the hub; ./{source.corpus} says so"
        )
    try:
        dataset = load_dataset(
            str(folder) if folder.is_dir() else source.corpus,
            source.subset,
            split=source.split,
            revision=source.revision,
        )
    except DatasetNotFoundError as error:
        raise InputError(
            f"no corpus {source.corpus!r}: give {PYTHON_STDLIB!r}, a file ({FORMS}), or the name "
            "of a dataset that the hub shows you"
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"{source.corpus!r} is no local file, and the hub cannot be reached or is switched "
            f"off: connect, or give a local file ({FORMS})"
        ) from error
    except Exception as error:  # an unknown split or subset, and whatever a damaged file brings
        raise InputError(f"dataset {source.corpus!r} cannot be loaded: {told(error)}") from error
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
    return mended(texts, source.corpus, notes)


def _described(source: TextSource) -> str:
    parts = [source.corpus, source.subset, source.split]
    return " ".join(part for part in parts if part)
