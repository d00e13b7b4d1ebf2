"""Leases: one maker at a time, a dead one is taken over, a paused one does no harm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from foldstack.tasks.store.artifacts import ArtifactStore
from foldstack.tasks.store.garbage import collect_garbage
from foldstack.tasks.store.leases import STALE_SECONDS, Held, Lease, leased, living_holder
from foldstack.tasks.store.manifest import Facts

STAGE, FINGERPRINT = "compress", "ab" * 32

HOLDER = """
import sys, time
from pathlib import Path
from foldstack.tasks.store.leases import Lease
lease = Lease.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""

MAKER = f"""
import sys
from pathlib import Path
from foldstack.tasks.store.artifacts import ArtifactStore

def make(folder, work):
    (folder / "maker").write_text("first")
    print("started", flush=True)
    sys.stdin.readline()
    (work / "checkpoint").write_text("of the first")
    return {{"maker": "first"}}

made = ArtifactStore(Path(sys.argv[1])).publish({STAGE!r}, {FINGERPRINT!r}, make)
print(made.manifest().facts["maker"])
"""


def start(code: str, argument: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, str(argument)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def line_of(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "leases" / "compress-abab"


@pytest.fixture
def holder(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the lease."""
    with start(HOLDER, folder) as process:
        assert line_of(process) == "held"
        yield process
        process.kill()


def leave_without_a_beat(file: Path, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(file, (moment, moment))


def pretend_to_be_elsewhere(file: Path) -> None:
    known = json.loads(file.read_text())
    file.write_text(json.dumps(known | {"machine": "another", "host": "elsewhere"}))


def test_only_one_has_it_and_the_others_learn_who(folder: Path) -> None:
    lease = Lease.take(folder)
    with pytest.raises(Held, match=rf":{os.getpid()}$"):
        Lease.take(folder)
    assert str(living_holder(folder)).endswith(f":{os.getpid()}")
    lease.release()
    assert living_holder(folder) is None
    Lease.take(folder).release()
    assert [file.name for file in folder.iterdir()] == ["2.free"], "a number is used once"


def test_discarded_lease_leaves_nothing(folder: Path) -> None:
    Lease.take(folder).discard()
    assert not folder.exists()
    Lease.take(folder).release()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_killed_holder_loses_it_at_once(folder: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(Held, match=f":{holder.pid}$"):
        Lease.take(folder)
    holder.kill()
    holder.wait()
    lease = Lease.take(folder)
    assert not lease.is_lost()
    lease.release()


@pytest.mark.usefixtures("holder")
def test_holder_elsewhere_is_taken_over_when_its_heart_stopped(folder: Path) -> None:
    file = folder / "1"
    pretend_to_be_elsewhere(file)
    with pytest.raises(Held, match="elsewhere:"):
        Lease.take(folder)
    leave_without_a_beat(file, STALE_SECONDS / 2)
    with pytest.raises(Held):
        Lease.take(folder)
    leave_without_a_beat(file, STALE_SECONDS + 5)
    lease = Lease.take(folder)
    assert not file.exists()
    assert not lease.is_lost()
    lease.release()


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"host": 1}'])
def test_lease_that_says_nothing_of_use_counts_until_it_is_stale(folder: Path, text: str) -> None:
    folder.mkdir(parents=True)
    (folder / "7").write_text(text)
    with pytest.raises(Held, match="another process"):
        Lease.take(folder)
    leave_without_a_beat(folder / "7", STALE_SECONDS + 5)
    Lease.take(folder).release()
    assert [file.name for file in folder.iterdir()] == ["8.free"]


def test_heart_beats(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldstack.tasks.store.leases.BEAT_SECONDS", 0.01)
    lease = Lease.take(folder)
    leave_without_a_beat(folder / "1", 1000)
    while time.time() - (folder / "1").stat().st_mtime > 500:
        time.sleep(0.01)
    lease.release()


def test_lost_lease_is_noticed_and_its_release_takes_nothing_away(folder: Path) -> None:
    lost = Lease.take(folder)
    pretend_to_be_elsewhere(folder / "1")
    leave_without_a_beat(folder / "1", STALE_SECONDS + 5)
    successor = Lease.take(folder)
    assert lost.is_lost()
    lost.release()
    lost.discard()
    assert not successor.is_lost()
    with pytest.raises(Held):
        Lease.take(folder)
    successor.release()


def test_many_threads_are_never_in_it_together(folder: Path) -> None:
    inside, most, entries = [0], [0], [0]

    def enter_often() -> None:
        for _ in range(15):
            with leased(folder, lambda holder: None):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                entries[0] += 1
                time.sleep(0.001)
                inside[0] -= 1

    threads = [threading.Thread(target=enter_often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most[0], entries[0]) == (1, 90)


def test_who_waits_is_told_for_whom(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ArtifactStore(tmp_path)
    with start(MAKER, tmp_path) as other:
        assert line_of(other) == "started"
        told: list[str] = []

        def finish_the_other(holder: str) -> None:
            told.append(holder)
            if len(told) == 2:
                other.communicate("go on\n")

        with caplog.at_level("INFO"):
            made = store.publish(STAGE, FINGERPRINT, must_not_run, on_wait=finish_the_other)
        assert {text.rpartition(":")[2] for text in told} == {str(other.pid)}
    assert made.manifest().facts == {"maker": "first"}
    assert caplog.text.count("waiting for it") == 1


def must_not_run(folder: Path, work: Path) -> Facts:
    raise AssertionError("made twice")


def test_paused_maker_comes_back_and_takes_what_its_successor_made(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    with start(MAKER, tmp_path) as paused:
        assert line_of(paused) == "started"
        paused.send_signal(signal.SIGSTOP)
        lease = next(store.lease_folder(f"{STAGE}-{FINGERPRINT}").iterdir())
        leave_without_a_beat(lease, STALE_SECONDS + 5)

        def make(folder: Path, work: Path) -> Facts:
            (folder / "maker").write_text("second")
            assert not (work / "checkpoint").exists()
            return {"maker": "second"}

        made = store.publish(STAGE, FINGERPRINT, make)
        paused.send_signal(signal.SIGCONT)
        answer, _ = paused.communicate("go on\n", timeout=100)
        assert answer.strip() == "second"
        assert paused.returncode == 0
    assert (made.open() / "maker").read_text() == "second"
    assert not list((store.root / "tmp").iterdir())
    assert not (store.root / "work" / STAGE / FINGERPRINT).exists()


def test_maker_that_comes_back_while_its_successor_works_waits_for_it(
    tmp_path: Path,
) -> None:
    store = ArtifactStore(tmp_path)
    with start(MAKER, tmp_path) as paused:
        assert line_of(paused) == "started"
        key = f"{STAGE}-{FINGERPRINT}"
        leave_without_a_beat(store.lease_folder(key) / "1", STALE_SECONDS + 5)

        def make_slowly(folder: Path, work: Path) -> Facts:
            # The first one finds its folders gone, tries anew, and so waits for this one.
            (folder / "maker").write_text("second")
            assert paused.stdin is not None
            paused.stdin.write("go on\n")
            paused.stdin.flush()
            time.sleep(0.3)
            return {"maker": "second"}

        made = store.publish(STAGE, FINGERPRINT, make_slowly)
        answer, _ = paused.communicate(timeout=100)
    assert made.manifest().facts == {"maker": "second"}
    assert answer.strip() == "second"


def test_leases_of_what_was_never_made_are_garbage_when_old(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    Lease.take(store.lease_folder("compress-" + "01" * 32)).release()
    held = Lease.take(store.lease_folder("compress-" + "02" * 32))
    assert collect_garbage(store) == []
    then = (datetime.now(UTC) - timedelta(days=40)).timestamp()
    for path in (store.root / "leases").rglob("*"):
        os.utime(path, (then, then))
    os.utime(store.lease_folder("compress-" + "02" * 32) / "1")
    assert [removal.kind for removal in collect_garbage(store)] == ["lease"]
    assert not held.is_lost()
    held.release()
