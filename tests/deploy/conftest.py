"""What the tests of stacks share."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not below pytest's own folder, which is closed to Postgres's user."""
    with tempfile.TemporaryDirectory(prefix="foldstack-") as made:
        Path(made).chmod(0o711)
        yield Path(made)
