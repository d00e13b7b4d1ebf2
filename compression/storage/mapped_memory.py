"""Memory of what lies in files: it is read when it is used, and given back when told so.

Transformers and safetensors map weights from their files instead of reading them, so a model that
was just loaded takes no memory; each page comes when it is touched first, and then stays. Whoever
is done with a block gives its pages back, and the memory of a pass over the model is one block.
"""

import ctypes
import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

MAPPINGS = Path("/proc/self/smaps")
UNCHANGED = "0 kB"


def release(tensors: nn.Module | Iterable[Tensor]) -> None:
    """Give back the memory of those tensors that are mapped from files; using them reads it again.

    Tensors in memory of their own stay as they are, and so does every file of whose mapped pages
    one was written to. Does nothing where the system has no /proc.
    """
    if isinstance(tensors, nn.Module):
        tensors = [*tensors.parameters(), *tensors.buffers()]
    ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.device.type == "cpu"]
    if not ranges or not MAPPINGS.exists():
        return
    page = mmap.PAGESIZE
    mappings = list(_unchanged_file_mappings())
    for start, stop in ranges:
        for first, last in mappings:
            if first <= start < stop <= last:
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


def _unchanged_file_mappings() -> Iterator[tuple[int, int]]:
    """First address and end of every private mapping of a file that nobody has written to.

    To drop a page that was written to would undo the writing.
    """
    place: tuple[int, int] | None = None
    for line in MAPPINGS.read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name.split(" ", 1)[0]:
            addresses, permissions, _, _, inode, *_ = line.split()
            first, last = (int(address, 16) for address in addresses.split("-"))
            is_private_file = permissions.endswith("p") and inode != "0"
            place = (first, last) if is_private_file else None
        elif name == "Anonymous" and place is not None and value.strip() == UNCHANGED:
            yield place


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
