"""What to do when memory runs out: the same work in smaller batches."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from foldstack.compression.errors import InputError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def with_smaller_batches(work: Callable[[int], Result], batch_size: int, num_tokens: int) -> Result:
    """`work(batch_size)`, begun anew with half of it as often as memory runs out.

    For work whose result does not depend on the batch size.

    Raises:
        InputError: not even one window of `num_tokens` fits.
    """
    while True:
        try:
            return work(batch_size)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
        # Not in the handler: its traceback would keep the tensors alive.
        batch_size = _halved(batch_size, num_tokens)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on the CPU, torch raises a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        "DefaultCPUAllocator" in str(error)
    )


def _halved(batch_size: int, num_tokens: int) -> int:
    """The next batch size to try when `batch_size` windows of `num_tokens` do not fit.

    Raises:
        InputError: it was one window already.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if batch_size == 1:
        raise InputError(
            f"one window of {num_tokens} tokens does not fit in memory: set window_tokens lower"
        )
    logger.warning(
        "%d windows at once do not fit in memory, going on with %d", batch_size, batch_size // 2
    )
    return batch_size // 2
