"""The items of the two benchmarks, made from the test split when lm-eval asks for them.

lm-eval loads this file by path, also where foldstack is not installed; so does this file with the
corpus. The items follow from the text of the standard library alone: the same interpreter gives
the same items, another Python version similar ones.
"""

import hashlib
import importlib.util
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from datasets import Dataset

NUM_ITEMS = 512
CONTEXT_BYTES = 160
CONTINUATION_BYTES = 40
MAX_CONTINUATION_BYTES = 90
CHUNK_BYTES = 8000


def continuation(**_: object) -> dict[str, Dataset]:
    """Give the items of `stdlib_continuation`: a context, four ways to go on, one of them true.

    A place qualifies where a line that is not blank begins, 160 bytes or more into its module. The
    context is the lines before it, back to the first line break at least 160 bytes away; the
    continuation is the lines from it on until they have 40 bytes (places whose continuation has a
    blank line or more than 90 bytes do not qualify, nor places inside an earlier continuation).
    The three others are continuations of other places that begin with the same indentation,
    nearest in length, of the same module while it has them; none of them stands in the context.
    """
    places = [place for path, text in _held_out().items() for place in _places(path, text)]
    places.sort(key=lambda place: place.rank)
    near: dict[tuple[str, int], list[_Place]] = defaultdict(list)
    far: dict[int, list[_Place]] = defaultdict(list)
    for place in places:
        near[place.path, place.indentation].append(place)
        far[place.indentation].append(place)
    items = []
    for place in places:
        others = _distractors(place, near[place.path, place.indentation])
        if len(others) < 3:
            others = list(dict.fromkeys(others + _distractors(place, far[place.indentation])))[:3]
        if len(others) == 3:
            items.append(_item(place, others))
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

    indentation: int
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
                indentation = len(ahead) - len(ahead.lstrip(" \t"))
                rank = hashlib.sha256(f"{path}:{offset}".encode()).hexdigest()
                yield _Place(path, offset, text[start:offset], ahead, indentation, rank)
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


def _distractors(place: _Place, alike: list[_Place]) -> list[str]:
    length = len(place.continuation)
    found: dict[str, None] = {}
    # The sort is stable and `alike` in order of rank: so are places of the same length.
    for other in sorted(alike, key=lambda other: abs(len(other.continuation) - length)):
        text = other.continuation
        if text != place.continuation and text.strip() not in place.context:
            found[text] = None
        if len(found) == 3:
            break
    return list(found)


def _item(place: _Place, others: list[str]) -> dict[str, object]:
    label = int(place.rank[:8], 16) % 4
    choices = [*others[:label], place.continuation, *others[label:]]
    return {
        "path": place.path,
        "offset": place.offset,
        "context": place.context,
        "choices": choices,
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
