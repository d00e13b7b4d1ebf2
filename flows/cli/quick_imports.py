"""Import what a command needs without Python's garbage collector."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Inside are imports: hundreds of thousands of objects that stay, and no garbage.

    The collector does not look through them while they come, and never again: that saves some of
    the seconds that the imports of torch, transformers and Prefect take, and one when they end.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
