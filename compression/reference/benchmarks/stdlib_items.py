"""The items of the two benchmarks, made from the test split when lm-eval asks for them.

lm-eval loads this file by path, also where foldstack is not installed; so does this file with the
corpus. The items follow from the text of the standard library alone: the same interpreter gives
the same items, another Python version similar ones.
"""

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

from datasets import Dataset

NUM_ITEMS = 512
CONTEXT_BYTES = 160
CONTINUATION_BYTES = 40
MAX_CONTINUATION_BYTES = 90
REACH = 100
"""Places that are looked at in each direction of length for the other continuations."""
CHUNK_BYTES = 8000


def continuation(**_: object) -> dict[str, Dataset]:
    """Give the items of `stdlib_continuation`: a context, four ways to go on, one of them true.

    A place qualifies where a line that is not blank begins, 160 bytes or more into its module. The
    context is the lines before it, back to the first line break at least 160 bytes away; the
    continuation is the lines from it on until they have 40 bytes (places whose continuation has a
    blank line or more than 90 bytes do not qualify, nor places inside an earlier continuation).
    The three others are continuations from places of other modules, as near in length as there
    are; none of them stands in the context.
    """
    places = [place for path, text in _held_out().items() for place in _places(path, text)]
    places.sort(key=lambda place: (len(place.continuation), place.rank))
    items = []
    for index in sorted(range(len(places)), key=lambda index: places[index].rank):
        others = _distractors(places, index)
        if len(others) == 3:
            items.append(_item(places[index], others))
        if len(items) == NUM_ITEMS:
            break
    return {"test": Dataset.from_list(items)}


def bits_per_byte(**_: object) -> dict[str, Dataset]:
    """Give the items of `stdlib_bits_per_byte`: the first 8 kB, in whole lines, of every module."""
    items = [
        {"path": path, "text": _head(text)}
        for path, text in _held_out().items()
        if len(text) >= CONTEXT_BYTES
    ]
    return {"test": Dataset.from_list(items)}


@dataclass(frozen=True)
class _Place:
    path: str
    offset: int
    context: str
    continuation: str

    rank: str
    """Orders places as a fair draw would, the same way everywhere."""


def _places(path: str, text: str) -> Iterator[_Place]:
    lines = text.splitlines(keepends=True)
    offset, free_from = 0, CONTEXT_BYTES
    for number, line in enumerate(lines):
        if offset >= free_from and line.strip():
            ahead = _continuation_from(lines[number:])
            if ahead:
                start = text.rfind("\n", 0, offset - CONTEXT_BYTES) + 1
                rank = hashlib.sha256(f"{path}:{offset}".encode()).hexdigest()
                yield _Place(path, offset, text[start:offset], ahead, rank)
                free_from = offset + len(ahead)
        offset += len(line)


def _continuation_from(lines: list[str]) -> str:
    taken = ""
    for line in lines:
        if len(taken) >= CONTINUATION_BYTES or not line.strip():
            break
        taken += line
    whole = CONTINUATION_BYTES <= len(taken) <= MAX_CONTINUATION_BYTES
    return taken.rstrip("\n") if whole else ""


def _distractors(by_length: list[_Place], index: int) -> list[str]:
    place = by_length[index]
    # Neighbours on both sides in turn, so that the true one is neither long nor short.
    above, below = by_length[index + 1 :][:REACH], by_length[:index][-REACH:][::-1]
    neighbours = [other for pair in zip_longest(above, below) for other in pair if other]
    others = dict.fromkeys(
        other.continuation
        for other in neighbours
        if other.path != place.path
        and other.continuation != place.continuation
        and other.continuation.strip() not in place.context
    )
    return list(others)[:3]


def _item(place: _Place, others: list[str]) -> dict[str, object]:
    label = int(place.rank[:8], 16) % 4
    return {
        "path": place.path,
        "offset": place.offset,
        "context": place.context,
        "choices": [*others[:label], place.continuation, *others[label:]],
        "label": label,
    }


def _head(text: str) -> str:
    return text if len(text) <= CHUNK_BYTES else text[: text.rfind("\n", 0, CHUNK_BYTES) + 1]


def _held_out() -> dict[str, str]:
    return _corpus().stdlib_split("test")


def _corpus() -> ModuleType:
    file = Path(__file__).resolve().parent.parent / "stdlib_corpus.py"
    spec = importlib.util.spec_from_file_location("stdlib_corpus", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
