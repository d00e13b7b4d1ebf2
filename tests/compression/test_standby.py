"""A process that stands by: one for many requests, another for one that died, none left behind."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

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
