"""A process that stands by: one for many requests, another for one that died, none left behind."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from foldstack.compression.checkpoints.checkpoint import RELOADER
from foldstack.compression.evaluation.memory_probe import PROBE
from foldstack.compression.standby import Standby

TELLING = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"):
        sys.exit("out of paper")
    told = {"process": os.getpid(), "folder": os.environ["OWN"], "mode": os.environ["MODE"]}
    print(json.dumps(told), flush=True)
"""


@pytest.fixture
def standby() -> Iterator[Standby]:
    made = Standby(("-c", TELLING), {"MODE": "test"}, folder_in="OWN")
    yield made
    made.end()


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_answers_many_requests_and_leaves_nothing(standby: Standby) -> None:
    first, second = standby.ask({}), standby.ask({})
    assert first == second
    assert first["mode"] == "test"
    assert Path(first["folder"]).is_dir()
    standby.end()
    assert not is_running(first["process"])
    assert not Path(first["folder"]).exists()


@pytest.mark.parametrize(
    ("of_ours", "program"),
    [(RELOADER, RELOADER._arguments[-1:]), (PROBE, PROBE._arguments[-2:])],
    ids=["reload check", "memory probe"],
)
def test_packages_are_seen_wherever_this_python_finds_them(
    of_ours: Standby, program: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages by PYTHONPATH, which may say a relative place: else what reloads models finds no
    torch, after all the work."""
    (tmp_path / "found_only_there.py").write_text("ANSWER = 42\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f".{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    telling = "import found_only_there as f; input(); print(f.ANSWER)"
    options = of_ours._arguments[: -len(program)]
    standby = Standby((*options, "-c", telling), of_ours._environment)
    try:
        assert standby.ask({}) == 42
    finally:
        standby.end()


def test_its_last_words_are_told_and_another_takes_its_place(standby: Standby) -> None:
    first = standby.ask({})["process"]
    with pytest.raises(RuntimeError, match="out of paper"):
        standby.ask({"die": True})
    assert standby.ask({})["process"] != first


def test_one_that_was_killed_is_there_again(standby: Standby) -> None:
    process = standby.ask({})["process"]
    os.kill(process, signal.SIGKILL)
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert standby.ask({})["process"] != process


def test_its_folder_is_there_again_where_it_was_swept(standby: Standby) -> None:
    folder = Path(standby.ask({})["folder"])
    folder.rmdir()
    assert standby.ask({})["folder"] == str(folder)
    assert folder.is_dir()
