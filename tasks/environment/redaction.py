"""Secrets come from the environment and go nowhere else: into no log, page, file or traceback."""

import logging
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from foldstack.compression.errors import InputError

HIDDEN = "***"
# Values of such variables are secrets wherever they turn up.
SECRET_NAMES = re.compile(
    r"TOKEN$|PASSWORD|PASSWD|SECRET|API_KEY|ACCESS_KEY|AUTH_STRING|CREDENTIAL"
)
NOT_SECRET = re.compile(r"^(TOKENIZERS_|.*(_FILE|_PATH|_URL)$)")
SHORTEST = 8
"""A shorter value may be any word of a text."""
USER_INFO = re.compile(r"(?<=://)[^/\s@'\"]*:[^/\s'\"]*@")


def redacted(text: str) -> str:
    """`text` without passwords of addresses, and without the secrets of the environment."""
    text = USER_INFO.sub("", text)
    for secret in environment_secrets():
        text = text.replace(secret, HIDDEN)
    return text


def environment_secrets() -> list[str]:
    """Values of the variables whose names speak of secrets, the longest first."""
    values = set()
    for name, value in os.environ.items():
        if SECRET_NAMES.search(name) and not NOT_SECRET.match(name):
            # "user:password" is a secret as a whole and in its second half.
            values |= {value, value.rpartition(":")[2]}
    return sorted((value for value in values if len(value) >= SHORTEST), key=len, reverse=True)


@contextmanager
def without_secrets() -> Iterator[None]:
    """Errors leave without the secrets that they, or what caused them, speak of.

    An error that speaks of none goes through as it is.

    Raises:
        InputError: there was one, and it spoke of a secret.
        RuntimeError: another error did.
    """
    try:
        yield
    except Exception as error:
        told = "".join(traceback.format_exception(error))
        if redacted(told) == told:
            raise
        clean = redacted(str(error))
        if isinstance(error, InputError):
            raise InputError(clean) from None
        raise RuntimeError(f"{type(error).__name__}: {clean}") from None


def hide_in_logs() -> None:
    """From now on, no line that this process logs holds a secret, whichever library logs it.

    The hub's client, for one, logs the address that it could not reach.
    """
    make = logging.getLogRecordFactory()
    if getattr(make, "hides_secrets", False):
        return

    def make_clean(*arguments: Any, **settings: Any) -> logging.LogRecord:
        record = make(*arguments, **settings)
        with suppress(Exception):  # a line that cannot be formatted is its handler's to report
            said = record.getMessage()
            if (clean := redacted(said)) != said:
                record.msg, record.args = clean, ()
        return record

    make_clean.hides_secrets = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_clean)
