"""Servers that die come back, those of a killed parent go, and a taken port is said to be taken."""

import http.server
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from foldstack.compression.errors import InputError
from foldstack.flows.cli import processes
from foldstack.flows.cli.processes import Parts, Server, check_free, last_words, running

SERVE = """
import sys
from http.server import HTTPServer, SimpleHTTPRequestHandler
print("served by", sys.argv[1], flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), SimpleHTTPRequestHandler).serve_forever()
"""
END = "import sys; print('line one\\n\\nlast paragraph,\\nof two lines'); sys.exit(3)"


@pytest.fixture
def server(free_port: int) -> Server:
    return Server(
        name="Little",
        command=(sys.executable, "-c", SERVE, str(free_port)),
        page="",
        health=f"http://127.0.0.1:{free_port}/",
        port_option="--little_port",
    )


def wait_until(is_so: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.05)


def test_a_server_that_dies_is_started_again_and_its_log_goes_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BACK_OFF_SECONDS", (0.1,))
    said: list[str] = []
    with Parts(tmp_path, said.append) as parts:
        parts.add(server)
        first = parts.running[0].pid
        parts.kill("Little")
        parts.restart("Little")
        assert parts.running[0].pid != first
        assert "Little ended with SIGKILL" in said[0]
        assert "started again in 0 s" in said[0]
        assert said[1] == "Little answers again"
    assert (tmp_path / "little.log").read_text().count("served by") == 2
    assert not psutil.pid_exists(parts.running[0].pid if parts.running else first)


def test_one_that_never_starts_is_given_up_with_its_reason_whole(
    free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "BACK_OFF_SECONDS", (0.0,))
    monkeypatch.setattr(processes, "ENDINGS", 3)
    hopeless = Server("Hopeless", (sys.executable, "-c", END), "", f"tcp://127.0.0.1:{free_port}")
    with Parts(tmp_path) as parts:
        parts.start(hopeless)
        with pytest.raises(InputError, match="4 times in a row") as caught:
            parts.restart("Hopeless")
    assert "ended with code 3 (last paragraph, of two lines)" in str(caught.value)


def test_a_taken_port_is_said_with_who_has_it(server: Server, free_port: int) -> None:
    handler = http.server.SimpleHTTPRequestHandler
    with http.server.ThreadingHTTPServer(("127.0.0.1", free_port), handler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(InputError) as caught:
            check_free(server)
        other.shutdown()
    said = str(caught.value)
    assert f"Little cannot listen on port {free_port}" in said
    assert f"process {os.getpid()} does already" in said
    assert "choose another with --little_port" in said


ORPHANS = """
import sys, time
from pathlib import Path
from foldstack.flows.cli.processes import Parts, Server
port, logs = sys.argv[1:]
with Parts(Path(logs)) as parts:
    parts.add(Server("Little", (sys.executable, "-c", {serve!r}, port), "", f"http://127.0.0.1:{{port}}/"))
    print(parts.running[0].pid, flush=True)
    time.sleep(60)
"""


def test_a_killed_parent_leaves_no_orphan(free_port: int, tmp_path: Path) -> None:
    code = textwrap.dedent(ORPHANS).format(serve=SERVE)
    command = [sys.executable, "-c", code, str(free_port), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(orphan))


def test_logs_are_rotated(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 100)
    with running(server, tmp_path) as part:
        for _ in range(5):
            processes.answers(part.server.health)  # each request is a line in its log
    assert {file.name for file in tmp_path.iterdir()} > {"little.log", "little.log.1"}


@pytest.mark.parametrize(
    "text, said",
    [
        (
            "Traceback:\n  File x\nValueError: port is taken\nby another",
            "ValueError: port is taken by another",
        ),
        (
            "INFO started\n\nPort 4200 is in use, use the `--port`\nflag.",
            "Port 4200 is in use, use the `--port` flag.",
        ),
        ("", ""),
    ],
)
def test_last_words_are_whole(text: str, said: str) -> None:
    assert last_words(text.splitlines()) == said
