"""Without this MLflow shows nothing of the memory and processors that long stages took."""

import os
import time

import pytest

from foldstack.tasks.running import usage


def test_a_long_stage_is_sampled_and_a_short_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "SECONDS_BETWEEN_SAMPLES", 0.05)
    with usage.sampled(os.getpid(), "long"):
        deadline = time.monotonic() + 20
        while len(usage.samples_of("long")) < 2:
            assert time.monotonic() < deadline
            sum(range(10000))
    with usage.sampled(os.getpid(), "short"):
        pass
    time.sleep(0.1)
    assert usage.samples_of("short") == []
    for sample in usage.samples_of("long"):
        assert sample.memory_bytes > 10e6
        assert sample.cpu_percent > 0


def test_a_process_that_is_gone_gives_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "SECONDS_BETWEEN_SAMPLES", 0.01)
    with usage.sampled(2**22 + 1, "gone"):
        time.sleep(0.1)
    assert usage.samples_of("gone") == []
