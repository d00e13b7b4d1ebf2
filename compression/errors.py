"""The one exception that the command line turns into a sentence and exit code 2."""

from collections.abc import Iterator
from contextlib import contextmanager

TOLD_CHARACTERS = 300


class InputError(ValueError):
    """A mistake of the user's, told in one sentence: the rule, what came, what to do."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever a library raises at the user's files becomes the sentence `what: <its words>`.

    Libraries raise what they like, and other things from version to version: nothing is listed
    here but what is no fault of a file.

    Raises:
        InputError: something was raised.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        raise InputError(f"{what}: {told(error)}") from error


def told(error: BaseException) -> str:
    """An error's words in one line, for use inside a sentence; its name where they say little."""
    words = " ".join(str(error).split())
    if len(words) > TOLD_CHARACTERS:
        words = words[: TOLD_CHARACTERS - 4].rstrip() + " ..."
    if isinstance(error, LookupError) or not words:
        return f"{type(error).__name__} {words}".strip()
    return words
