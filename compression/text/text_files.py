"""Local files with text as people have them: plain, records or tables, compressed or not."""

import bz2
import gzip
import io
import json
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from foldstack.compression.errors import InputError, refusing

PLAIN = (".txt", ".text", ".md", ".markdown", ".rst")
RECORDS = (".jsonl", ".ndjson", ".json")
TABLES = (".csv", ".tsv", ".parquet", ".feather", ".arrow")
PACKED: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
FORMS = (
    f"plain text ({', '.join(PLAIN)}), records ({', '.join(RECORDS)}) or a table "
    f"({', '.join(TABLES)}), also packed ({', '.join(PACKED)})"
)
SURROGATE = re.compile("[\ud800-\udfff]")


def form_of(path: Path) -> str:
    """The suffix that says what a file holds, without that of its packing: ".jsonl"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def is_text_file(name: str) -> bool:
    """True for the name of a file whose form is read here, whether it is there or not."""
    return form_of(Path(name)) in (*PLAIN, *RECORDS, *TABLES)


def read_texts(path: Path, field: str, separator: str | None) -> tuple[list[str], list[str]]:
    """The texts of a file, and what a person should know of how they were read.

    A separator's line ends match those of the file, whatever system wrote it.

    Raises:
        InputError: there is no such file, it is not of a form that is read here, or damaged.
    """
    if not path.is_file():
        raise InputError(f"a corpus file must exist, but there is no file {path.absolute()}")
    form, notes = form_of(path), []
    if form in TABLES:
        found = _table(path, form, field)
    elif form in RECORDS:
        found = list(_records(_decoded(path), path, field))
    elif form in PLAIN:
        text = _decoded(path)
        texts: list[str] = _line_ends_alike(separator).split(text) if separator else [text]
        if separator and len(texts) == 1:
            notes.append(f"{path} has no {separator!r} (separator): it is one document")
        found = list(texts)
    else:
        raise InputError(f"{path} is no corpus: give {FORMS}, or a dataset's name")
    empty = sum(text is None for text in found)
    if empty:
        notes.append(f"{empty} of {len(found)} texts in {path} are null: left out")
    return mended([text for text in found if text is not None], str(path), notes)


def mended(texts: list[str], place: str, notes: list[str]) -> tuple[list[str], list[str]]:
    """Half surrogate pairs, which no tokenizer takes, become U+FFFD; a note says how many."""
    broken = sum(SURROGATE.search(text) is not None for text in texts)
    if broken:
        notes.append(
            f"{broken} texts of {place} hold half a character (a lone surrogate): it is read as "
            "U+FFFD"
        )
        texts = [SURROGATE.sub("�", text) for text in texts]
    return texts, notes


def _line_ends_alike(separator: str) -> re.Pattern[str]:
    return re.compile(r"\r?\n".join(map(re.escape, re.split(r"\r?\n", separator))))


def _decoded(path: Path) -> str:
    # The text as it is, line ends too, so that its digest is that of the same bytes everywhere; a
    # byte order mark is no part of it.
    try:
        return _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"a corpus file must be readable as UTF-8, but {path}: {error}") from error


def _content(path: Path) -> bytes:
    with refusing(f"{path} cannot be read"):
        content = path.read_bytes()
        for suffix in reversed(path.suffixes):
            if suffix.lower() not in PACKED:
                break
            content = PACKED[suffix.lower()](content)
        return content


def _records(text: str, path: Path, field: str) -> Iterator[str | None]:
    if form_of(path) == ".json" and text.lstrip().startswith("["):
        with refusing(f"{path} must be a list of JSON objects, or one a line"):
            records = json.loads(text)
        for number, record in enumerate(records, start=1):
            yield _field_of(record, f"record {number} of {path}", field)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"line {number} of {path}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{place} must be a JSON object, but {error}") from error
            yield _field_of(record, place, field)


def _field_of(record: Any, place: str, field: str) -> str | None:
    if not isinstance(record, dict):
        raise InputError(f"{place} must be a JSON object, got {type(record).__name__}")
    if field not in record:
        raise InputError(
            f"{place} has no field {field!r}: set text_field to one of {', '.join(record)}"
        )
    value = record[field]
    if value is not None and not isinstance(value, str):
        raise InputError(
            f"field {field!r} must be text, but in {place} it is {type(value).__name__}"
        )
    return value


def _table(path: Path, form: str, field: str) -> list[str | None]:
    import pandas

    content = io.BytesIO(_content(path))
    with refusing(f"{path} is no whole {form} file"):
        if form == ".parquet":
            table = pandas.read_parquet(content)
        elif form in (".feather", ".arrow"):
            table = pandas.read_feather(content)
        else:
            mark = "\t" if form == ".tsv" else ","
            table = pandas.read_csv(
                content, sep=mark, dtype=str, keep_default_na=False, encoding="utf-8-sig"
            )
    if field not in table.columns:
        known = ", ".join(map(str, table.columns))
        raise InputError(f"{path} has no column {field!r}: set text_field to one of {known}")
    values = [None if pandas.isna(value) else value for value in table[field].tolist()]
    for number, value in enumerate(values, start=1):
        if value is not None and not isinstance(value, str):
            raise InputError(
                f"column {field!r} must be text, but in row {number} of {path} it is "
                f"{type(value).__name__}"
            )
    return values
