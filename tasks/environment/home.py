"""Where results go, and the sentence for when there is no room: every part says it in these words.

A full disk is met wherever something is written, and libraries have words of their own for it.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from foldstack.compression.errors import InputError

HOME_VARIABLE = "FOLDSTACK_HOME"
STORE_VARIABLE = "FOLDSTACK_STORE"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
WORDS_OF_LIBRARIES = ("No space left on device", "Disk quota exceeded", "database or disk is full")
MIB = 1 << 20
STORE_ARTIFACTS = "/store/artifacts/"
"""In the path of whatever a home's store holds."""


def foldstack_home() -> Path:
    """Where results go: the environment's FOLDSTACK_HOME, or runs/ in the current directory."""
    return Path(os.environ.get(HOME_VARIABLE) or "runs").expanduser().resolve()


def store_url() -> str:
    """The object storage of the environment's FOLDSTACK_STORE; empty for none."""
    return os.environ.get(STORE_VARIABLE, "")


def in_this_home(path: str, home: Path) -> Path | None:
    """Where what lay at `path` in the store of a home lies now that the home is `home`."""
    _, store, inside = path.rpartition(STORE_ARTIFACTS)
    found = home / store.strip("/") / inside
    return found if store and inside and found.exists() else None


def is_disk_full(error: BaseException) -> bool:
    """True when the error, of whatever library, says that there is no room on a disk."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return any(words in str(error) for words in WORDS_OF_LIBRARIES)


@contextmanager
def telling_disk_full(place: Path) -> Iterator[None]:
    """Turn what any library says of a full disk into the sentence; most do not say where.

    Raises:
        InputError: there is no room, at `place` unless the library names a file.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise InputError(disk_full(getattr(error, "filename", None) or place)) from error


def disk_full(place: Path | str) -> str:
    """The sentence for a disk that was full when something was to be written at `place`."""
    return (
        f"no space is left on the disk of {place}; what is finished is kept: {_free_some()}, and "
        "run the same command again"
    )


def disk_too_small(place: Path | str, needed_bytes: int, free_bytes: int) -> str:
    """The sentence for a disk on which there will not be room for what is to be made."""
    return (
        f"too little space is left on the disk of {place}: the results take about "
        f"{_mebibytes(needed_bytes)}, and {_mebibytes(free_bytes)} are free; {_free_some()}, or "
        "ask for fewer sparsities or methods"
    )


def _free_some() -> str:
    return (
        f"`foldstack cache gc` frees some, or set {HOME_VARIABLE} (output.home) to a place on "
        "another disk"
    )


def _mebibytes(size: int) -> str:
    mebibytes = size / MIB
    return f"{mebibytes:.1f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"
