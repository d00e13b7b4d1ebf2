"""A process that prints goes on when nobody reads it any more.

What a run prints goes to the worker that started it. A worker that is killed takes nothing of the
run with it but the reader of that pipe: the next line would raise BrokenPipeError, or, as Rich has
it, SystemExit, in the middle of a stage.
"""

import os
import select
import stat
from collections.abc import Sequence
from contextlib import suppress
from threading import Thread

STANDARD = (1, 2)


def outlive_readers(numbers: Sequence[int] = STANDARD) -> None:
    """From now on what is written into a pipe goes nowhere as soon as nobody reads it.

    Args:
        numbers: file descriptors; those that are no pipes stay as they are.
    """
    if not hasattr(select, "poll"):
        return
    pipes = []
    for number in numbers:
        with suppress(OSError):
            if stat.S_ISFIFO(os.fstat(number).st_mode):
                pipes.append(number)
    if pipes:
        Thread(target=_replace, args=[pipes], name="unheard", daemon=True).start()


def _replace(pipes: list[int]) -> None:
    watched = select.poll()
    for number in pipes:
        watched.register(number, 0)  # an error is told of in any case
    left = len(pipes)
    while left:
        for number, _ in watched.poll():
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)
            watched.unregister(number)
            left -= 1
