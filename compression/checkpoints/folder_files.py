"""Small files of a model folder: JSON, read at one door that says what is wrong with it."""

import json
from pathlib import Path
from typing import Any

from foldstack.compression.errors import InputError

BOM = b"\xef\xbb\xbf"
MIB = 1 << 20

LARGEST_BYTES = {
    "config.json": 16 * MIB,
    "generation_config.json": 16 * MIB,
    "tokenizer_config.json": 256 * MIB,
    "special_tokens_map.json": 16 * MIB,
    "added_tokens.json": 256 * MIB,
}
"""The JSON files that a loader reads as an object, and more than any of them ever has."""


def check_json_files(folder: Path) -> None:
    """Refuse a folder in which a loader would stumble over a small JSON file.

    Raises:
        InputError: says which file, what is wrong with it, and what would be right.
    """
    for name, most in LARGEST_BYTES.items():
        if (folder / name).is_file():
            read_json_object(folder / name, most)


def read_json_object(file: Path, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: the file cannot be read, is larger than `most_bytes`, begins with a byte order
            mark (no library reads it then), is no UTF-8, no JSON, or no object.
    """
    try:
        size = file.stat().st_size
        if size > most_bytes:
            raise InputError(
                f"{file} has {size:,} bytes, which is no {file.name}: the most is {most_bytes:,}"
            )
        content = file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    if content.startswith(BOM):
        raise InputError(
            f"{file} begins with a byte order mark, which transformers does not read: save it as "
            "UTF-8 without one"
        )
    try:
        value = json.loads(content.decode())
    except RecursionError:
        raise InputError(f"{file} is nested too deeply to be {file.name} of a model") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} must be UTF-8, and is not: {error}") from error
    except ValueError as error:
        raise InputError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value
