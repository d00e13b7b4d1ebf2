"""Without this a run ends when the worker that started it is killed."""

import os
import time

import pytest

from foldstack.tasks.environment.unheard import outlive_readers


def test_what_nobody_reads_any_more_can_still_be_written() -> None:
    read, write = os.pipe()
    outlive_readers([write])
    os.write(write, b"heard")
    assert os.read(read, 5) == b"heard"
    os.close(read)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.write(write, b"unheard")
        except BrokenPipeError:
            time.sleep(0.01)
        else:
            break
    else:
        pytest.fail("the pipe is still broken")
    os.close(write)
