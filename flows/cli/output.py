"""What a command prints: its result, alone on standard output."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from foldstack.compression.errors import InputError

if TYPE_CHECKING:
    from foldstack.flows.comparison.result import Comparison


@contextmanager
def output_for_result() -> Iterator[TextIO]:
    """Standard output, for the result alone: whatever else prints meanwhile goes to standard error.

    Libraries print, also from C; so the file descriptor itself is turned round.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    with os.fdopen(kept, "w", encoding=sys.stdout.encoding, errors="replace") as output:
        try:
            yield output
        finally:
            output.flush()
            sys.stdout.flush()
            os.dup2(output.fileno(), 1)


def print_json(value: Any, output: TextIO) -> None:
    print(json.dumps(value, indent=1), file=output)


def print_facts(facts: Mapping[str, Any], output: TextIO, as_json: bool) -> None:
    if as_json:
        print_json(facts, output)
        return
    width = max(len(name) for name in facts)
    for name, value in facts.items():
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"{name:<{width}}  {text}", file=output)


def exit_code(comparison: "Comparison") -> int:
    """0 when every model is there, else 1.

    Raises:
        InputError: everything failed, and for a mistake of the user's.
    """
    if not comparison.failed:
        return 0
    first = comparison.failed[0]
    if len(comparison.failed) == len(comparison.rows) and first.is_input_error:
        raise InputError(first.cause)
    return 1
