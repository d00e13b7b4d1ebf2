"""Memory of what lies in files: it is read when it is used, and given back when told so.

Transformers and safetensors map weights from their files instead of reading them, so a model that
was just loaded takes no memory; each page comes when it is touched first, and then stays. Whoever
is done with a block gives its pages back, and the memory of a pass over the model is one block.
"""

import ctypes
import mmap
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

MAPPINGS = Path("/proc/self/maps")
PAGES = Path("/proc/self/smaps")
# Addresses, permissions that end in p for private, offset, device, and an inode that is none for
# memory without a file.
FILE_MAPPING = re.compile(
    r"^(?P<first>[0-9a-f]+)-(?P<last>[0-9a-f]+) ...p [0-9a-f]+ [0-9a-f:]+ [1-9]", re.MULTILINE
)
UNCHANGED = "0 kB"
WORTH_A_LOOK = 1 << 20
"""Bytes. To ask the system where a tensor lies takes as long as to read this much again."""


def release(tensors: nn.Module | Iterable[Tensor]) -> None:
    """Give back the memory of those tensors that are mapped from files; using them reads it again.

    Tensors in memory of their own stay as they are, and so does every file of whose mapped pages
    one was written to. Does nothing where the system has no /proc, or less than `WORTH_A_LOOK`
    would be won.
    """
    if isinstance(tensors, nn.Module):
        tensors = [*tensors.parameters(), *tensors.buffers()]
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.device.type == "cpu"]
    if sum(stop - start for start, stop in ranges) < WORTH_A_LOOK or not MAPPINGS.exists():
        return
    page = mmap.PAGESIZE
    # Most models lie in memory of their own: that is seen in a fraction of the time which it takes
    # the system to count the pages of every mapping.
    mapped = _inside(ranges, _file_mappings())
    for start, stop, last in _inside([(a, b) for a, b, _ in mapped], _unchanged_file_mappings()):
        low, high = start // page * page, -(-stop // page) * page
        _madvise()(low, min(high, last) - low, mmap.MADV_DONTNEED)


def trim() -> None:
    """Give back what was freed and the C library keeps, with holes, for allocations to come.

    Does nothing where the library is not GNU's.
    """
    trimming = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trimming is not None:
        trimming(ctypes.c_size_t(0))


@contextmanager
def releasing(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every block gives its memory back as soon as it was run."""

    def after(_module: nn.Module, _args: Any, _output: Any, block: nn.Module) -> None:
        release(block)

    handles = [block.register_forward_hook(partial(after, block=block)) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _inside(
    ranges: Iterable[tuple[int, int]], mappings: Iterable[tuple[int, int]]
) -> list[tuple[int, int, int]]:
    """Start and stop of every range that lies in a mapping, and where that mapping ends."""
    ranges = list(ranges)
    if not ranges:
        return []
    return [
        (start, stop, last)
        for first, last in mappings
        for start, stop in ranges
        if first <= start < stop <= last
    ]


def _file_mappings() -> Iterator[tuple[int, int]]:
    """First address and end of every private mapping of a file."""
    for match in FILE_MAPPING.finditer(MAPPINGS.read_text()):
        yield int(match["first"], 16), int(match["last"], 16)


def _unchanged_file_mappings() -> Iterator[tuple[int, int]]:
    """The same of those that nobody has written to: dropping a changed page would undo the change.

    Each is described by a line like those of `_file_mappings`, then by what of it is in memory.
    """
    place: tuple[int, int] | None = None
    for line in PAGES.read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ", 1)[0]:
            found = FILE_MAPPING.match(line)
            place = (int(found["first"], 16), int(found["last"], 16)) if found else None
        elif name == "Anonymous" and place is not None and value.strip() == UNCHANGED:
            yield place


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
