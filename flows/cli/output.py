"""What a command prints: its result, alone on standard output."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO


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
