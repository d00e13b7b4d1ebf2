"""Whole commands in processes of their own: a model from the hub's cache, Ctrl-C, the servers."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "someone/tiny-llama"

CONFIG = """
name: whole
model: {{name: {model}, device: cpu}}
calibration:
  source: {{corpus: {text}, separator: "\\n\\n"}}
  num_windows: 4
  window_tokens: 32
methods: [shortgpt]
sparsities: [0.15]
evaluation:
  perplexity:
    source: {{corpus: {text}, separator: "\\n\\n"}}
    protocol: {{window_tokens: 32}}
speed: {{enabled: false}}
"""


@pytest.fixture
def hub(tmp_path: Path, model_folder: Callable[..., Path]) -> dict[str, str]:
    """Environment in which the hub is out of reach and its cache holds one model."""
    repository = tmp_path / "hub" / f"models--{HUB_ID.replace('/', '--')}"
    shutil.copytree(model_folder("llama"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "FOLDSTACK_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def config(tmp_path: Path, text_lines: tuple[str, ...]) -> Path:
    text = tmp_path / "lines.txt"
    text.write_text("\n\n".join(text_lines))
    file = tmp_path / "whole.yaml"
    file.write_text(CONFIG.format(model=HUB_ID, text=text))
    return file


@contextmanager
def started(
    *arguments: str, environment: dict[str, str], output: int
) -> Iterator["subprocess.Popen[str]"]:
    """The command in a process group of its own, of which nothing is left afterwards."""
    command = [sys.executable, "-m", "foldstack.flows.cli.app", *arguments]
    with subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def json_of(*arguments: str, environment: dict[str, str]) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "foldstack.flows.cli.app", *arguments, "--json"],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.timeout(900)
def test_a_run_that_was_stopped_goes_on_where_it_was(
    hub: dict[str, str], config: Path, prefect_server: str
) -> None:
    """By SIGTERM to it and its server, as `timeout` sends it: Prefect would ask the server, which
    is gone, for minutes. The model comes from the hub's cache, pinned to its commit.
    """
    with started("run", str(config), environment=hub, output=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if re.search(r"rank blocks: done", line):
                os.killpg(process.pid, signal.SIGTERM)
                told_to_end = time.monotonic()
                break
        rest = process.stderr.read()
        assert process.wait(60) == 128 + signal.SIGTERM, said + rest
    assert time.monotonic() - told_to_end < 20
    assert f"stopped by SIGTERM; what is finished is kept, to go on: foldstack run {config}" in rest
    assert "Traceback" not in rest

    hub["PREFECT_API_URL"] = prefect_server  # one of their own would be half of what the rest takes
    found = json_of("run", str(config), environment=hub)
    assert int(str(found["num_cached"])) >= 3  # calibration, statistics, ranking
    rows = found["rows"]
    assert isinstance(rows, list)
    assert [row["state"] for row in rows] == ["done", "done"]
    assert "At 15 % shortgpt is the only variant" in str(found["findings"])
    resolved = next(Path(hub["FOLDSTACK_HOME"]).glob("sweeps/*/config.yaml")).read_text()
    assert COMMIT in resolved

    # What `evaluate` would measure is in the store already.
    evaluated = json_of("evaluate", HUB_ID, "--config", str(config), environment=hub)
    assert evaluated["bits_per_byte"] == rows[0]["before"]["bits_per_byte"]
    compressed = rows[1]["folder"]
    beside = json_of(
        "evaluate", compressed, "--against", HUB_ID, "--config", str(config), environment=hub
    )
    name = "bits_per_byte_difference"
    assert beside[f"beside_dense/{name}"] == pytest.approx(rows[1]["beside_dense"][name])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.timeout(600)
def test_ui_serves_both_pages_until_ctrl_c(tmp_path: Path) -> None:
    ports = {"--prefect_port": free_port(), "--mlflow_port": free_port()}
    arguments = [text for name, port in ports.items() for text in (name, str(port))]
    environment = {"FOLDSTACK_HOME": str(tmp_path), "PREFECT_HOME": str(tmp_path / "prefect")}
    with started("ui", *arguments, environment=environment, output=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(3)]
        for line, port in zip(said, ports.values(), strict=False):
            address = f"http://127.0.0.1:{port}"
            assert address in line
            with urllib.request.urlopen(address, timeout=30) as page:
                assert b"<html" in page.read().lower()
        assert "Ctrl-C" in said[2]
        process.send_signal(signal.SIGINT)
        assert process.wait(200) == 130
    for port in ports.values():
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5)
